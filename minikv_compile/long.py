"""Long generations: whether anything grows but the cache, or compiles again, while one token follows another."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table

from . import compat
from .bench import DENSE, Failed, Settings, Timer, decoder_of, prompts_of, read, reason, release
from .decoders import captured

WARM_UP = 8
"""Tokens that are decoded before the first checkpoint, and before a step is captured."""


@dataclass
class Checkpoint:
    """What there is after so many tokens. Bytes are of the device; 0 for what is allocated on a CPU, which is not counted."""

    method: str
    batch: int
    prompt: int
    tokens: int
    """Decoded of each row since the warm-up."""
    per_token: float
    """Milliseconds, the mean since the checkpoint before; 0 at the first."""
    allocated: int
    cache_bytes: int
    beyond_cache: int
    """By how much more than the cache what is allocated has grown since the warm-up."""
    graphs: int
    """That were compiled since the warm-up."""


def allocated(device: torch.device) -> int:
    """Bytes of the tensors on a GPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


@torch.no_grad()
def generate(method: str, model: Any, batch: int, prompt: int, every: int, settings: Settings) -> Iterator[Checkpoint]:
    """Decode `settings.steps` tokens of each row after its prompt of `prompt` tokens; a checkpoint after the warm-up, then
    every `every` tokens. The step is a CUDA graph where the method's cache allows one."""
    device, timer = model.device, Timer(model.device)
    decoder = decoder_of(method, model, batch, prompt, settings)
    read(decoder, prompts_of(model, batch, prompt), settings, timer)
    for _ in range(WARM_UP):
        decoder.step()
    step = captured(decoder.step, device) if decoder.captures else decoder.step
    timer.wait()
    graphs, done, per_token, first = compat.compiled_graphs(), 0, 0.0, None
    while True:
        now = allocated(device), decoder.bytes()
        first = first or now
        beyond = now[0] - first[0] - (now[1] - first[1]) if now[0] else 0
        yield Checkpoint(method, batch, prompt, done, per_token, *now, beyond, compat.compiled_graphs() - graphs)
        count = min(every, settings.steps - done)
        if not count:
            return
        per_token = sum(timer(step, count)) / count
        done += count


def run_long(
    model: Any, methods: list[str], batch: int, prompt: int, every: int, settings: Settings
) -> Iterator[Checkpoint | Failed]:
    """The checkpoints of each method; one that fails gives a row that says why, and the next follows."""
    for method in methods:
        try:
            yield from generate(method, model, batch, prompt, every, settings)
        except Exception as error:  # whatever another package raises is that method's result
            yield Failed(method, batch, prompt, reason(error))
        release()


def check_grows(methods: list[str]) -> None:
    """
    Raises:
        ValueError: `DENSE`, whose every step is the one after the prompt.
    """
    if DENSE in methods:
        raise ValueError(f"the method {DENSE!r} decodes one step again and again: it generates nothing")


def long_table(results: list[Checkpoint | Failed], head: str) -> Table:
    """A row per checkpoint; a method's last says what has become of it."""
    shown = Table(title=f"{head}; growth beyond the cache's, and graphs, since the warm-up")
    shown.add_column("method", no_wrap=True)
    for name in ("tokens", "ms / token", "allocated MiB", "cache MiB", "growth beyond, bytes", "graphs"):
        shown.add_column(name, justify="right")
    for r in results:
        if isinstance(r, Failed):
            shown.add_row(r.method, r.failed)
            continue
        on_gpu = (f"{r.allocated / 2**20:.1f}", f"{r.beyond_cache:,}") if r.allocated else ("", "")
        shown.add_row(
            r.method, f"{r.tokens:,}", f"{r.per_token:.2f}" if r.tokens else "", on_gpu[0], f"{r.cache_bytes / 2**20:.1f}",
            on_gpu[1], str(r.graphs),
        )  # fmt: skip
    return shown
