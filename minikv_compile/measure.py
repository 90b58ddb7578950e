"""Generate with one method and measure what a user would: the answer, the bytes, the tokens kept, the time."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from transformers.generation.streamers import BaseStreamer

from .backend import MiniKVBackend
from .config import ConfigError, MiniKVConfig
from .report import CacheReport, cache_report
from .tensor import SEQ, KVTensor

FULL = "full"
"""The method that compresses nothing: the model as it is, with its own dense cache."""


@dataclass
class Measurement:
    """One generation."""

    method: str
    answer: str
    prompt_tokens: int
    new_tokens: int
    first_token_seconds: float
    """From the call to the first token: prefill, and compilation where the method compiles."""
    seconds_per_token: float
    """Mean over the tokens after the second; the second compiles the decode graph."""
    cache: CacheReport
    kept: list[list[float]] = field(repr=False, default_factory=list)
    """Of each layer, for each token, the share of KV heads that keep it."""

    def figures(self) -> dict[str, Any]:
        """What `--json` writes."""
        figures = {name: value for name, value in asdict(self).items() if name not in ("cache", "kept")}
        report = self.cache
        return figures | {
            "cache_bytes": report.bytes, "dense_bytes": report.dense_bytes, "compression": report.compression,
            "bits_per_element": report.bits_per_element, "layers": [asdict(layer) for layer in report.layers],
        }  # fmt: skip


class _Clock(BaseStreamer):
    """Notes when each token arrives."""

    def __init__(self, on_token: Callable[[], None]):
        self.on_token, self.times = on_token, []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())
        if len(self.times) > 1:  # the first is the prompt
            self.on_token()

    def end(self) -> None:
        pass


def parse_method(text: str) -> MiniKVConfig | None:
    """A preset, with changes to single fields: "default:group=32:policy=observation_window". None for "full".

    Raises:
        ConfigError: unknown preset or field, or a value out of range.
    """
    if text == FULL:
        return None
    preset, *changes = text.split(":")
    fields = dict(change.partition("=")[::2] for change in changes)
    for name in fields:
        if name not in MiniKVConfig.__dataclass_fields__:
            raise ConfigError(f"{text!r}: MiniKVConfig has no field {name!r}.")
    return MiniKVConfig.preset(preset, **{name: _value(value) for name, value in fields.items()})


def _value(text: str) -> Any:
    try:
        return json.loads({"True": "true", "False": "false"}.get(text, text))
    except ValueError:
        return text


@contextmanager
def compiled_forward(model: torch.nn.Module, config: MiniKVConfig | None, inner: str) -> Iterator[Callable[..., Any]]:
    """`model` with its forward compiled by a MiniKV backend, and back to what it was; None leaves it alone.

    Yields:
        The forward that compresses nothing.
    """
    plain = model.forward
    if config is None:
        yield plain
        return
    model.forward = torch.compile(plain, backend=MiniKVBackend(config, inner))
    try:
        yield plain
    finally:
        del model.forward
        torch.compiler.reset()


def measure(
    model: Any, tokenizer: Any, prompt: str, method: str | MiniKVConfig, max_new_tokens: int = 32,
    inner: str = "inductor", on_token: Callable[[], None] = lambda: None,
) -> Measurement:  # fmt: skip
    """Answer `prompt` greedily.

    Args:
        method: "full", a preset with or without changes (`parse_method`), or a configuration.
        inner: compiler of the rewritten graphs.
        on_token: called for each new token.
    """
    config = method if isinstance(method, MiniKVConfig) else parse_method(method)
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    clock = _Clock(on_token)
    with compiled_forward(model, config, inner), torch.no_grad():
        start = time.perf_counter()
        out = model.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, streamer=clock, return_dict_in_generate=True,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        )  # fmt: skip
    arrivals = clock.times[1:]
    prompt_tokens = inputs["input_ids"].shape[1]
    steady = arrivals[1:]
    return Measurement(
        method=method if isinstance(method, str) else repr(method),
        answer=tokenizer.decode(out.sequences[0, prompt_tokens:], skip_special_tokens=True),
        prompt_tokens=prompt_tokens,
        new_tokens=len(arrivals),
        first_token_seconds=arrivals[0] - start,
        seconds_per_token=(steady[-1] - steady[0]) / (len(steady) - 1) if len(steady) > 1 else float("nan"),
        cache=cache_report(out.past_key_values),
        kept=[_kept(layer.keys) for layer in out.past_key_values.layers],
    )


def _kept(keys: torch.Tensor) -> list[float]:
    if isinstance(keys, KVTensor):
        return keys.kept_mask()[0].float().mean(0).tolist()
    return [1.0] * keys.shape[SEQ]


def answers_table(runs: list[Measurement], title: str = "") -> Table:
    """Answers side by side."""
    table = Table(title=title, show_lines=True)
    table.add_column("method")
    table.add_column("answer", overflow="fold")
    for run in runs:
        table.add_row(run.method, repr(run.answer.strip().split("\n")[0]))
    return table


def figures_table(runs: list[Measurement]) -> Table:
    """Bytes in all, and time."""
    table = Table(title=f"Measured: {runs[0].prompt_tokens} prompt tokens, {runs[0].new_tokens} new")
    for name in ("method", "cache bytes", "of dense", "compression", "bits / element", "first token s", "s / token"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for run in runs:
        cache = run.cache
        table.add_row(
            run.method, f"{cache.bytes:,}", f"{cache.bytes / cache.dense_bytes:.1%}", f"{cache.compression:.1%}",
            f"{cache.bits_per_element:.2f}", f"{run.first_token_seconds:.1f}", f"{run.seconds_per_token:.3f}",
        )  # fmt: skip
    return table


def layers_table(runs: list[Measurement]) -> Table:
    """Bytes and kept tokens of each layer."""
    table = Table(title="Per layer: bytes, and tokens kept per KV head")
    table.add_column("layer", justify="right")
    for run in runs:
        table.add_column(run.method, justify="right")
    for i, layers in enumerate(zip(*(run.cache.layers for run in runs), strict=True)):
        table.add_row(str(i), *(f"{layer.bytes:,}  {layer.kept[0]:,}" for layer in layers))
    return table


def draw_kept(runs: list[Measurement], path: Path) -> None:
    """A picture of which tokens each layer kept, one panel per method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(len(runs), 1, figsize=(11, 1.1 + 1.9 * len(runs)), sharex=True, squeeze=False)
    for panel, run in zip(panels[:, 0], runs, strict=True):
        style = dict(aspect="auto", interpolation="antialiased", cmap="viridis", vmin=0, vmax=1)
        image = panel.imshow(torch.tensor(run.kept), **style)
        panel.set_ylabel("layer")
        share = run.cache.bytes / run.cache.dense_bytes
        panel.set_title(f"{run.method}: {share:.1%} of the dense cache's bytes", fontsize=10, loc="left")
    panels[-1, 0].set_xlabel("token")
    figure.colorbar(image, ax=panels[:, 0].tolist(), label="share of KV heads that keep it")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)
