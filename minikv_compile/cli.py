"""The command line: `minikv`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from .config import PRESETS
from .measure import FULL, Measurement, answers_table, draw_kept, figures_table, layers_table, measure
from .report import explain as explain_model

METHODS = f'"{FULL}" (the dense cache) or a preset: {", ".join(PRESETS)}. Repeat to compare.'

app = typer.Typer(help="Run decoder LLMs from a packed 2-bit KV cache.", no_args_is_help=True, add_completion=False)
console = Console()

Model = Annotated[str, typer.Option(help="Path or name of a Hugging Face causal LM.")]
Device = Annotated[str, typer.Option(help='"cpu", "cuda", or "auto": CUDA where there is one.')]
Dtype = Annotated[str, typer.Option(help='"bfloat16", "float16", "float32", or "auto": the checkpoint\'s.')]
Inner = Annotated[str, typer.Option(help='Compiler of the rewritten graph: "inductor", "eager", or "auto" (Inductor on CUDA).')]


def load(path: str, device: str = "auto", dtype: str = "auto"):
    """A causal LM and its tokenizer, in eval mode, on its device."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype if dtype == "auto" else getattr(torch, dtype))
    return model.eval().to(device), AutoTokenizer.from_pretrained(path)


def inner_for(model, inner: str) -> str:
    """Inductor's C++ takes a minute to compile a graph; on a CPU that pays off for long runs only."""
    return inner if inner != "auto" else "inductor" if model.device.type == "cuda" else "eager"


def compare(model, tokenizer, prompt: str, methods: list[str], max_new_tokens: int, inner: str) -> list[Measurement]:
    """Answer one prompt with each method, with a progress bar."""
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total} tokens"), TimeElapsedColumn()
    runs = []
    with Progress(*columns, console=console, transient=True) as progress:
        for method in methods:
            task = progress.add_task(f"{method}: prefill and decode", total=max_new_tokens)
            run = measure(
                model, tokenizer, prompt, method, max_new_tokens, inner_for(model, inner), lambda: progress.advance(task)
            )
            progress.update(task, completed=max_new_tokens)
            runs.append(run)
    return runs


@app.command()
def generate(
    model: Model,
    prompt_file: Annotated[Path, typer.Option(help="Text file with the prompt, question included.", exists=True)],
    method: Annotated[
        list[str], typer.Option(help=METHODS)
    ] = [FULL, "default", "minikv"],  # noqa: B006
    max_new_tokens: int = 64,
    device: Device = "auto",
    dtype: Dtype = "auto",
    inner: Inner = "auto",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Write a picture of which tokens each layer kept (PNG).")] = None,
) -> None:
    """Answer a prompt with each method; print the answers, the measured bytes and the time."""
    for name in method:
        if name != FULL and name not in PRESETS:
            raise typer.BadParameter(f"{name!r} is neither {FULL!r} nor a preset ({', '.join(PRESETS)})")
    lm, tokenizer = load(model, device, dtype)
    runs = compare(lm, tokenizer, prompt_file.read_text(), method, max_new_tokens, inner)
    for table in (answers_table(runs, "Answers"), figures_table(runs), layers_table(runs)):
        console.print(table)
    if picture is not None:
        draw_kept(runs, picture)
    if json_file is not None:
        json_file.write_text(json.dumps([run.figures() for run in runs], indent=1))


@app.command()
def explain(
    model: Model,
    tokens: Annotated[int, typer.Option(help="Length of the prompt to trace with.")] = 64,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Say which attention sites of a model are rewritten, and why the others are not."""
    lm, tokenizer = load(model, device, dtype)
    console.print(str(explain_model(lm, input_ids=torch.randint(0, lm.config.vocab_size, (1, tokens), device=lm.device))))


if __name__ == "__main__":
    app()
