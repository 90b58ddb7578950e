"""What really fits a GPU's memory, beside what `minikv plan` says: caches are made, a prompt is read, a token decoded.

Both sides read prompts row by row, and each layer's MLP in chunks of tokens: what it holds for a whole long prompt would
be more than its cache (`chunked`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor
from torch.library import custom_op

from .bench import DENSE, Settings, Timer, decoder_of, prompts_of, read, reason, release
from .measure import FULL
from .plan import Fit, Planner

CHUNK = 2048
"""Tokens per chunk of an MLP."""
STEP = 1.05
"""By which factor a probe goes past the plan: how well the two have to agree."""


@custom_op("minikv::chunked_mlp", mutates_args=())
def chunked_mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, chunk: int) -> Tensor:
    """A gated MLP (SiLU, no biases) of [batch, tokens, width], `chunk` tokens at a time: the same numbers, and memory for
    the inner ones of one chunk only."""
    out = torch.empty_like(x)
    for part, target in zip(x.split(chunk, 1), out.split(chunk, 1), strict=True):
        target.copy_(F.linear(F.silu(F.linear(part, gate)) * F.linear(part, up), down))
    return out


@chunked_mlp.register_fake
def _(x, gate, up, down, chunk):
    return torch.empty_like(x)


@contextmanager
def chunked(model: Any, chunk: int = CHUNK) -> Iterator[None]:
    """A model whose MLPs read `chunk` tokens at a time."""

    def forward(mlp: Any) -> Callable[[Tensor], Tensor]:
        weights = mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight
        return lambda x: torch.ops.minikv.chunked_mlp(x, *weights, chunk)

    mlps = [layer.mlp for layer in model.model.layers]
    for mlp in mlps:
        mlp.forward = forward(mlp)
    try:
        yield
    finally:
        for mlp in mlps:
            del mlp.forward


@dataclass
class Capacity:
    """What fits under one method; bytes and tokens."""

    method: str
    what: str
    """ "batch", of rows of `prompt` tokens, or "prompt", alone."""
    prompt: int
    memory: int
    planned: int
    """The largest by `minikv plan`."""
    fits: int
    """The largest that was seen to fit. 0: none."""
    too_many: int
    """The smallest that was seen not to. 0: none."""
    planned_bytes: int
    """By the plan, of what fits."""
    peak_bytes: int
    """The most that was allocated then."""
    seconds: float
    failed: str = ""
    """Why a probe failed, where it was not for memory."""


def planner_of(method: str, meta: Any, settings: Settings) -> Planner:
    return Planner(meta, FULL if method == DENSE else method, settings.room)


def probe(method: str, model: Any, batch: int, prompt: int, settings: Settings) -> int | None:
    """The most bytes allocated while `batch` rows of `prompt` tokens are read (one of them; the others are copies) and
    decoded, or None if there is not enough memory."""
    timer, decoder = Timer(model.device), None
    timer.peak()
    try:
        decoder = decoder_of(method, model, batch, prompt, settings)
        read(decoder, prompts_of(model, batch, prompt), settings, timer, last=False)
        decoder.step()
        timer.wait()
        return timer.peak()
    except torch.OutOfMemoryError:
        return None
    finally:
        del decoder


def search(fits: Callable[[int], int | None], planned: int, unit: int, probes: int) -> Iterator[tuple[int, int | None]]:
    """Probes from `planned` on by factors of `STEP`, in multiples of `unit`: up while it fits, or down until it does.

    Yields:
        (what was tried, what `fits` said).
    """
    trial, last = max(planned // unit, 1) * unit, None
    for _ in range(probes):
        found = fits(trial)
        yield trial, found
        up = found is not None
        if trial == unit and not up or last is not None and up != last:
            return
        last = up
        trial = max(trial + unit, int(trial * STEP) // unit * unit) if up else min(trial - unit, int(trial / STEP) // unit * unit)
        trial = max(trial, unit)


def measure_capacity(
    method: str, model: Any, meta: Any, what: str, prompt: int, memory: int, settings: Settings, probes: int
) -> Capacity:
    """The largest batch of rows of `prompt` tokens, or the longest prompt, in `memory` bytes of the GPU.

    Args:
        meta: the model on the meta device. what: "batch" or "prompt".
    """
    begun = time.monotonic()
    planner = planner_of(method, meta, settings)
    fit: Fit = planner.fit(memory, prompt)
    reading = fit.reading_bytes
    batch = what == "batch"
    planned = fit.largest_batch if batch else fit.longest_prompt
    found = Capacity(method, what, prompt, memory, planned, 0, 0, 0, 0, 0.0)
    settings = Settings(inner="eager", steps=settings.steps, rows=1)

    def fits(trial: int) -> int | None:
        try:
            return probe(method, model, *((trial, prompt) if batch else (1, trial)), settings)
        finally:
            release()

    try:
        for trial, peak in search(fits, planned, 1 if batch else 128, probes):
            if peak is None:
                found.too_many = trial
            elif trial > found.fits:
                found.fits, found.peak_bytes = trial, peak
    except Exception as error:
        found.failed = reason(error)
    if found.fits:
        rows, length = (found.fits, prompt) if batch else (1, found.fits)
        found.planned_bytes = planner.total_bytes(rows, length, -(-reading * length // prompt))
    found.seconds = time.monotonic() - begun
    return found


def capacity_table(found: list[Capacity], head: str) -> Table:
    """A row per method and question, beside the dense decoder."""
    shown = Table(title=f"{head}; in brackets: against {DENSE}")
    for name in ("what", "method", "planned", "fits", "does not fit", "peak GiB", "of the plan", "s"):
        shown.add_column(name, justify="right")
    for c in found:
        dense = next((d for d in found if d.method == DENSE and d.what == c.what), None)
        ratio = f" ({c.fits / dense.fits:.2f}x)" if dense and dense.fits else ""
        what = f"batch of {c.prompt}" if c.what == "batch" else "longest prompt"
        share = f"{c.peak_bytes / c.planned_bytes:.1%}" if c.planned_bytes else c.failed
        shown.add_row(
            what, c.method, f"{c.planned:,}", f"{c.fits:,}{ratio}", f"{c.too_many:,}" if c.too_many else "",
            f"{c.peak_bytes / 2**30:.2f}", share, f"{c.seconds:.0f}",
        )  # fmt: skip
    return shown
