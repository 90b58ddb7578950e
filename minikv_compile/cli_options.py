"""What the commands share: their application, their options, and how those are read."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from .config import PRESETS
from .measure import FULL, parse_method
from .peers import parse_peer
from .shapes import SHAPES

METHODS = f'"{FULL}" (the dense cache) or a preset ({", ".join(PRESETS)}), changed or not: "default:group=32:bits=4"'
MODELS = f"A named shape ({', '.join(SHAPES)}), or path or name of a Hugging Face causal LM."

app = typer.Typer(help="Run decoder LLMs from a packed 2-bit KV cache.", no_args_is_help=True, add_completion=False)
console = Console()

Model = Annotated[str, typer.Option(help="Path or name of a Hugging Face causal LM.")]
Device = Annotated[str, typer.Option(help='"cpu", "cuda", or "auto": CUDA where there is one.')]
Dtype = Annotated[
    Literal["auto", "bfloat16", "float16", "float32"], typer.Option(help='"auto": the checkpoint\'s.')
]
Inner = Annotated[
    Literal["auto", "inductor", "eager"],
    typer.Option(help='Compiler of the rewritten graph; "auto": Inductor on CUDA.'),
]


def usable_device(name: str) -> torch.device:
    """
    Raises:
        ValueError: there is none of this name.
    """
    try:
        return torch.empty(0, device=("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name).device
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(f"{name!r}: {str(error).splitlines()[0].split('. ')[0]}") from error


def in_a_folder(path: Path | None) -> Path | None:
    """Said before the work, not after it."""
    if path is not None and not path.absolute().parent.is_dir():
        raise typer.BadParameter(f"there is no folder {path.absolute().parent}.")
    return path


Json = Annotated[Path | None, typer.Option("--json", help="Write the figures here.", callback=in_a_folder)]


def progress_of(unit: str) -> Progress:
    """A progress bar that counts `unit`."""
    counter = TextColumn("{task.completed}/{task.total} " + unit)
    return Progress(
        TextColumn("{task.description}"), BarColumn(), counter, TimeElapsedColumn(), console=console, transient=True
    )


def parsed(parse: Callable, *args: Any, option: str, **kwargs: Any) -> Any:
    """`parse(*args)`, whose ValueError is one of an option."""
    try:
        return parse(*args, **kwargs)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from None


def check_methods(methods: list[str], option: str, peers: bool = False) -> None:
    """Name what is wrong with a method before a model is loaded. `peers`: other packages' are right, too."""
    for method in methods:
        try:
            if not parse_peer(method):
                parse_method(method)
            elif not peers:
                raise ValueError(f"{method!r} is another package's: `minikv eval --feed` and `minikv bench` run it")
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint=option) from None


def split_methods(text: str) -> list[str]:
    """A comma-separated option, not split at the commas of a list."""
    return re.split(r",(?![^\[]*\])", text)


def listed(text: str, names: tuple[str, ...], option: str) -> list[str]:
    """A comma-separated option, each part one of `names`."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    for part in parts:
        if part not in names:
            raise typer.BadParameter(f"{part!r} is none of {', '.join(names)}", param_hint=option)
    return parts


def numbers(text: str, option: str) -> list[int]:
    """A comma-separated option of positive numbers."""
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise typer.BadParameter(f"{text!r}: must be numbers of tokens, as in 4096,8192", param_hint=option)
    return [int(part) for part in text.split(",")]
