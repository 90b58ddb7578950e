"""`minikv study`: runs one of `studies.STUDIES` and writes its table, plot and figures."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .config import ConfigError, MiniKVConfig
from .evaluate import Runner, make_group, run_methods, running
from .measure import parse_method
from .peers import PeerError, parse_peer
from .persistence import persistence
from .results import BESIDE, Cell, Failure, beside, wilson
from .studies import BITS, BYTES, LENGTH, PERSISTENCE, SCORES, TIMES, Study, is_other


@dataclass(frozen=True)
class Settings:
    """How much of a study is measured, and with what."""

    prompts: int
    batch: int
    seed: int
    inner: str
    deadline: float = float("inf")
    """Nothing new is started after this `time.monotonic()`."""
    lengths: tuple[int, ...] = ()
    """Instead of the study's."""
    steps: int = 32
    """Times: decoded tokens."""


@dataclass(frozen=True)
class Point:
    """One number of a study."""

    method: str
    panel: str
    """What `y` is: a task's score, or a quantity with its unit."""
    length: int
    x: float
    y: float
    low: float | None = None
    """Of the 95% interval, where there is one."""
    high: float | None = None


def run_study(
    study: Study, model: Any, tokenizer: Any, settings: Settings, say: Callable[[str], None] = print
) -> tuple[list[Point], list[Cell], list[Failure]]:
    """Measure a study.

    Args:
        model, tokenizer: of scores and persistence; the model also of times, where the study names no shapes.
        say: called with a line for each method or cell that is done.

    Returns:
        its points; the cells that they come from, of scores; and what could not run.
    """
    lengths = settings.lengths or study.lengths
    points, cells, failures = [], [], []
    measured = {SCORES: _scores, TIMES: _times, PERSISTENCE: _persistence}[study.kind]
    for found in measured(study, model, tokenizer, lengths, settings):
        if isinstance(found, Failure):
            failures.append(found)
        elif isinstance(found, Cell):
            cells.append(found)
            points += cell_points(found, study.x)
        else:
            points.append(found)
        say(json.dumps(asdict(found)))
    return points, cells, failures


def _scores(study: Study, model: Any, tokenizer: Any, lengths, settings: Settings) -> Iterator[Cell | Failure]:
    seeds = dict(prompts=settings.prompts, seed=settings.seed, tokenizer=tokenizer, batch=settings.batch)
    groups = [make_group(task, length, **seeds) for length in lengths for task in study.tasks]
    for method in study.methods:
        if (failure := cannot(method)) is not None:
            yield failure
            continue
        for cell in run_methods(model, tokenizer, [method], groups, study.places, settings.inner, fed=True):
            yield cell
            if time.monotonic() > settings.deadline:
                return


def cannot(method: str) -> Failure | None:
    """Why there is no such method, if so."""
    try:
        parse_peer(method) or parse_method(method)
    except (ConfigError, PeerError) as error:
        return Failure(method, str(error))
    return None


def cell_points(cell: Cell, x: str) -> Iterator[Point]:
    """What is drawn of a cell."""
    at = cell.method, cell.length, x_of(cell.method, x, cell.length, cell.share_of_dense_bytes)
    make = lambda panel, *y: Point(at[0], panel, at[1], at[2], *y)  # noqa: E731
    if cell.bits_per_byte is not None:
        yield make("text: bits per byte", cell.bits_per_byte)
        yield make("text: KL(full || method), nats", cell.kl)
    else:
        low, high = wilson(cell.score, cell.prompts)
        yield make(f"{cell.task}, question {cell.place}: score, %", *(100 * y for y in (cell.score, low, high)))
    if x not in (BYTES, BITS):
        yield make("bytes, % of dense", 100 * cell.share_of_dense_bytes)


def x_of(method: str, x: str, length: int, share: float) -> float:
    """Where a method stands on the axis `x`."""
    if x == BYTES:
        return 100 * share
    if x == BITS:
        return 16 * share
    if x == LENGTH:
        return length
    config = parse_method(method)
    return float(getattr(config if config is not None else MiniKVConfig(), x) or 0)


def line_of(method: str, x: str) -> str:
    """The line of a plot that a method belongs to: its text without the field that is drawn over, and without those that
    follow from it."""
    name, *changes = method.split(":")
    if x in (BYTES, BITS):
        kept = [c for c in changes if c.split("=")[0] not in ("ratio", "heavy", "group", "bits", "important_bits")]
    else:
        kept = [c for c in changes if not c.startswith(f"{x}=") and not (x in ("bits", "recent") and c.startswith("heavy="))]
    return ":".join([name, *kept])


WARM_UP = 4096
"""Tokens that are enough to compile everything with."""


def _times(study: Study, model: Any, tokenizer: Any, lengths, settings: Settings) -> Iterator[Point | Failure]:
    from .shapes import load_model

    on_gpu = model.device.type == "cuda"
    for shape in study.shapes or ("",):
        try:
            timed = load_model(shape, study.layers, model.device, torch.bfloat16) if shape else model
        except torch.OutOfMemoryError as error:
            yield Failure(shape, str(error).splitlines()[0])
            continue
        for method in study.methods:
            if time.monotonic() > settings.deadline:
                return
            name = f"{shape} {method}" if len(study.shapes) > 1 else method
            try:
                with running(timed, method, settings.inner) as runner, torch.no_grad():
                    for length in lengths:
                        figures = time_of(timed, runner, length, settings.steps, on_gpu)
                        at = x_of(method, study.x, length, figures["bytes, % of dense"] / 100)
                        yield from (Point(name, panel, length, at, y) for panel, y in figures.items())
            except (torch.OutOfMemoryError, ConfigError, PeerError) as error:
                yield Failure(name, str(error).splitlines()[0])


def time_of(model: Any, runner: Runner, length: int, steps: int, on_gpu: bool) -> dict[str, float]:
    """One prompt of random tokens and `steps` decoded ones, after as many of a prompt of at most WARM_UP tokens."""
    ids = torch.randint(0, model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0)).to(model.device)
    settle = torch.cuda.synchronize if on_gpu else lambda: None
    for n in (min(length, WARM_UP), length):
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        settle()
        begun = time.perf_counter()
        out = runner.forward(input_ids=ids[:, :n].contiguous(), use_cache=True, logits_to_keep=1)
        settle()
        first = time.perf_counter()
        for _ in range(steps):
            token = out.logits[:, -1:].argmax(-1)
            out = runner.forward(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        settle()
        done = time.perf_counter()
    report = runner.report(out.past_key_values, 1, length + steps)
    figures = {
        "first token, ms": 1e3 * (first - begun), "ms per token": 1e3 * (done - first) / steps,
        "cache, MiB": report.bytes / 2**20, "bytes, % of dense": 100 * report.bytes / report.dense_bytes,
    }  # fmt: skip
    return figures | ({"most memory, GiB": torch.cuda.max_memory_allocated() / 2**30} if on_gpu else {})


def _persistence(study: Study, model: Any, tokenizer: Any, lengths, settings: Settings) -> Iterator[Point]:
    for length in lengths:
        for policy, step, share in persistence(model, tokenizer, study.methods, length, settings.prompts, settings.seed):
            yield Point(policy, "attention to the prompt that the chosen tenth gets, %", length, step, 100 * share)


# What is written


def write_study(
    name: str, study: Study, points: list[Point], cells: list[Cell], failures: list[Failure], about: dict, folder: Path
) -> None:
    """NAME.json with all figures, NAME.md with the table and the command, NAME.png."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {
        **about, "study": name, "question": study.question, "points": [asdict(point) for point in points],
        "cells": [cell.figures() for cell in cells], "failed": [failure.figures() for failure in failures],
    }  # fmt: skip
    (folder / f"{name}.json").write_text(json.dumps(figures, indent=1) + "\n")
    if points:
        draw(study, points, folder / f"{name}.png")
    (folder / f"{name}.md").write_text("\n".join(_page(name, study, points, cells, failures, about)) + "\n")


def _page(name: str, study: Study, points, cells, failures, about: dict) -> Iterator[str]:
    yield f"# {study.question}\n\n`{about['command']}`\n"
    versions = ", ".join(f"{package} {version}" for package, version in about["versions"].items())
    yield f"{about['date']}, {about['device']}, {about['dtype']}, {versions}."
    yield f"{about['prompts']} prompts a cell, seed {about['seed']}.\n"
    if "note" in about:
        yield f"{about['note']}\n"
    if points:
        yield f"![{name}]({name}.png)\n"
    lengths = sorted({point.length for point in points})
    for length in lengths:
        yield f"## {length:,} tokens\n"
        yield from _table([point for point in points if point.length == length], study.x)
        yield ""
    if rows := list(beside(cells, is_other)):
        yield "## Ours beside others\n"
        yield "Each method of others, and the best of ours that takes at most its bytes; means over the tasks.\n"
        yield "| " + " | ".join(BESIDE) + " |\n" + "|---" * len(BESIDE) + "|"
        yield from ("| " + " | ".join(row) + " |" for row in rows)
        yield ""
    if failures:
        yield "## Could not run\n"
        yield from (f"- `{failure.method}`: {failure.reason}" for failure in failures)


def _table(points: list[Point], x: str) -> Iterator[str]:
    panels = list(dict.fromkeys(point.panel for point in points))
    shown = x if x not in (BYTES,) else "bytes, % of dense"
    yield f"| method | {shown} | " + " | ".join(panels) + " |"
    yield "|---" * (2 + len(panels)) + "|"
    measured = x in (BYTES, BITS)  # of each prompt: a row has their mean
    rows: dict[tuple[str, float], dict[str, Point]] = {}
    for point in points:
        rows.setdefault((point.method, 0 if measured else point.x), {})[point.panel] = point
    for (method, at), row in rows.items():
        at = f"{statistics.mean(point.x for point in row.values()):.2f}" if measured else f"{at:g}"
        yield f"| `{method}` | {at} | " + " | ".join(_shown(row.get(panel)) for panel in panels) + " |"


def _shown(point: Point | None) -> str:
    if point is None:
        return ""
    digits = 1 if abs(point.y) >= 10 or point.low is not None else 4
    interval = f" ({point.low:.0f}-{point.high:.0f})" if point.low is not None else ""
    return f"{point.y:.{digits}f}{interval}"


def draw(study: Study, points: list[Point], path: Path) -> None:
    """A panel for each quantity, a line for each kind of method; lengths differ in their dashes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = list(dict.fromkeys(point.panel for point in points))
    lines = list(dict.fromkeys(line_of(point.method, study.x) for point in points))
    lengths = sorted({point.length for point in points}) if study.x != LENGTH else [0]
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(5 * columns, 3.6 * rows), squeeze=False, layout="constrained")
    for axis, panel in zip(axes.flat, panels, strict=False):
        for number, line in enumerate(lines):
            for style, length in zip(("-", "--", ":", "-."), lengths, strict=False):
                mine = sorted(
                    (p for p in points if p.panel == panel and line_of(p.method, study.x) == line and length in (0, p.length)),
                    key=lambda p: p.x,
                )
                if not mine:
                    continue
                label = line if len(lengths) == 1 else f"{line}, {length:,} tokens"
                xs, ys = [p.x for p in mine], [p.y for p in mine]
                axis.plot(xs, ys, style, marker="o", ms=3, lw=1, color=f"C{number % 10}", label=label)
                if mine[0].low is not None:
                    ends = [p.low for p in mine], [p.high for p in mine]
                    axis.fill_between(xs, *ends, color=f"C{number % 10}", alpha=0.1, lw=0)
        axis.set_title(panel, loc="left", fontsize=9)
        axis.set_xlabel(f"{study.x}, % of dense" if study.x == BYTES else study.x)
        axis.grid(alpha=0.3)
        if study.x == LENGTH:
            axis.set_xscale("log", base=2)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    marks = {label: mark for axis in axes.flat for mark, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(marks.values(), marks.keys(), loc="outside lower center", fontsize=7, ncols=2)
    figure.savefig(path, dpi=100)
    plt.close(figure)
