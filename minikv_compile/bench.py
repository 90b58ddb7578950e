"""A whole decoder, decoding from each kind of cache: ours beside the fastest dense decoder of the same run.

Prompts are read row by row, where a method's caches can be put together; each row's cache has room for the timed steps.
Compilation, warm-up and capture are reported apart.
"""

from __future__ import annotations

import gc
import math
import re
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from .config import ConfigError
from .decoders import Decoder, Dense, Dynamic, Eager, Fixed, Pressed, Quanto, Static, captured
from .measure import parse_method
from .peers import parse_peer
from .plan import parse_tokens

DENSE, TRANSFORMERS, STATIC, QUANTO = "dense", "transformers", "static", "quanto"
"""Methods that are not ours: `Dense`, `Eager`, `Static`, `Quanto`; and kvpress's (`peers`)."""
DYNAMIC = "@dynamic"
"""Ends the name of a method of ours on a `DynamicCache`."""
ARCHITECTURES = "llama", "mistral", "qwen3"
"""What `Dense` can decode."""
TUNED = {"coordinate_descent_tuning": True}
"""Inductor's options under `--tuned`: it writes the matrix-vector products of one row by itself, and measures tiles."""


@dataclass
class Settings:
    """How to measure."""

    inner: str = "inductor"
    """"inductor" or "eager": for the decode step of the methods that compile one."""
    steps: int = 64
    """Decode steps that are timed."""
    rows: int | None = None
    """Rows of a batch that are read; the others are copies. None: all."""
    minutes: float = float("inf")
    """Nothing new is started after so long."""
    tuned: bool = False
    bandwidth: float = 0.0
    """Of a device's copy, read and written bytes per second. 0: not measured."""

    @property
    def options(self) -> dict[str, Any] | None:
        return TUNED if self.tuned else None

    @property
    def room(self) -> int:
        """Tokens for every step: the captured and untimed ones included."""
        return self.steps + 24


@dataclass
class Case:
    """Prompts of some lengths, one after the other, in caches with room for the longest."""

    batch: int
    prompts: list[int]


@dataclass
class Figures:
    """What one method took for one prompt length; times in milliseconds, memory in bytes."""

    method: str
    batch: int
    prompt: int
    first_token: float
    """Of one row, the fastest of the rows: no compilation in it. Where a batch is read at once, its share."""
    per_token: float
    per_token_p99: float
    decode_rate: float
    """Tokens per second of all rows, decoding."""
    total_rate: float
    """Prompt and new tokens per second of all rows, from the first prompt's start to the last step's end."""
    steps: int
    host: float | None
    """What the host is busy for in a step: from the call to its return, the device idle before it. None on a CPU, which is the
    device."""
    prefill_peak: int
    decode_peak: int
    cache_bytes: int
    capacity: int
    """Tokens of the longest prompt that the same cache had room for."""
    rows_read: int
    roofline: float
    """Bytes of the weights and the cache, or the prompt's share of it, over the bandwidth of a copy, of the time per token. 0: not
    measured."""
    preparation: float
    """Compilation, warm-up and capture, in seconds; 0 where a method had been prepared for a shorter prompt."""


@dataclass
class Failed:
    """A cell that gave no figures."""

    method: str
    batch: int
    prompt: int
    failed: str


class Timer:
    """Times calls in milliseconds: by events on a GPU, by the clock elsewhere."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"

    def __call__(self, call: Callable[[], Any], repeats: int) -> list[float]:
        if not self.on_gpu:
            stamps = [time.perf_counter()]
            for _ in range(repeats):
                call()
                stamps.append(time.perf_counter())
            return [1e3 * (b - a) for a, b in zip(stamps, stamps[1:], strict=False)]
        events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        events[0].record()
        for event in events[1:]:
            call()
            event.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False)]

    def host(self, call: Callable[[], Any], repeats: int) -> float | None:
        """The median time that the host is busy with a call; None where there is no other device."""
        if not self.on_gpu:
            return None
        times = []
        for _ in range(repeats):
            self.wait()
            begun = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - begun))
        self.wait()
        return statistics.median(times)

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def peak(self) -> int:
        """The most memory allocated since the last call."""
        if not self.on_gpu:
            return 0
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak


def copy_bandwidth(device: torch.device, size: int = 2**30) -> float:
    """Bytes per second that a copy of `size` bytes reads and writes, the best of several."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2e3 * size / min(Timer(device)(lambda: target.copy_(source), 8))


def decoded_weights(model: Any) -> int:
    """Bytes of the weights that a decode step reads: all, but for an embedding of its own, of which it reads rows."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return sum(x.nbytes for x in model.parameters() if x is not embedding or x is head)


def check_method(method: str) -> None:
    """
    Raises:
        ConfigError: no method, or a preset that cannot be changed so.
        PeerError: a setting of kvpress's without a value.
        ImportError: what the method needs is not installed.
    """
    if method == QUANTO and find_spec("optimum") is None:
        raise ImportError(f"the method {QUANTO!r} needs optimum-quanto: pip install 'minikv-compile[benchmark]'")
    if method in (DENSE, TRANSFORMERS, STATIC, QUANTO):
        return
    peer = parse_peer(method)
    if peer is None:
        if parse_method(method.removesuffix(DYNAMIC)) is None:
            raise ConfigError(f"{method!r}: the dense decoders here are {DENSE!r}, {TRANSFORMERS!r} and {STATIC!r}.")
    elif not peer.drops:
        raise ConfigError(f"{method!r}: of transformers' quantized caches, {QUANTO!r} alone is timed.")
    elif find_spec("kvpress") is None:
        raise ImportError(f"the method {method!r} needs kvpress: pip install --no-deps kvpress")


def check_model(model: Any, methods: list[str]) -> None:
    """
    Raises:
        ValueError: `Dense` does not know the architecture.
    """
    kind = model.config.model_type
    if DENSE in methods and kind not in ARCHITECTURES:
        raise ValueError(f"the method {DENSE!r} knows {', '.join(ARCHITECTURES)}, not {kind!r}")


def decoder_of(method: str, model: Any, batch: int, longest: int, settings: Settings) -> Decoder:
    """What one method decodes with, for prompts of up to `longest` tokens."""
    inner, options = settings.inner, settings.options
    if method == DENSE:
        return Dense(model, batch, longest, options, compiled=inner == "inductor")
    if method == STATIC:
        return Static(model, batch, longest, settings.room, inner, options)
    if method in (TRANSFORMERS, QUANTO):
        return (Eager if method == TRANSFORMERS else Quanto)(model, batch)
    if (peer := parse_peer(method)) is not None:
        return Pressed(model, batch, peer)
    config = parse_method(method.removesuffix(DYNAMIC))
    if method.endswith(DYNAMIC):
        return Dynamic(model, config, batch, inner)
    return Fixed(model, config, batch, longest, settings.room, inner, options)


def prompts_of(model: Any, batch: int, length: int) -> torch.Tensor:
    """Random tokens, the same for every method."""
    generator = torch.Generator(model.device).manual_seed(0)
    return torch.randint(0, model.config.vocab_size, (batch, length), device=model.device, generator=generator)


def read(decoder: Decoder, ids: torch.Tensor, settings: Settings, timer: Timer, last: bool = True) -> list[float]:
    """Milliseconds per row of reading `ids`, whose other rows are copies where `settings` say so."""
    batch, length = ids.shape
    decoder.begin(length)
    if decoder.whole:
        times = [t / batch for t in timer(lambda: decoder.prefill(0, ids), 1)]
    else:
        count = min(batch, settings.rows or batch)
        starts = iter(range(count))
        times = timer(lambda: decoder.prefill(row := next(starts), ids[row : row + 1]), count)
        for row in range(count, batch):
            decoder.copy_row(count - 1, row)
    decoder.ready(last)
    return times


def run(method: str, model: Any, case: Case, settings: Settings) -> Iterator[Figures]:
    """One method in one case: figures for each prompt length, shortest first."""
    device, timer, batch = model.device, Timer(model.device), case.batch
    lengths = sorted(case.prompts)
    begun = time.perf_counter()
    decoder = decoder_of(method, model, batch, lengths[-1], settings)
    step = None
    for length in lengths:
        ids = prompts_of(model, batch, length)
        # Once before: the first prompt of a length compiles kernels for it.
        decoder.begin(length)
        decoder.prefill(0, ids if decoder.whole else ids[:1])
        timer.wait()
        preparation = time.perf_counter() - begun
        timer.peak()
        first = read(decoder, ids, settings, timer, length == lengths[-1])
        prefill_peak = timer.peak()
        begun = time.perf_counter()
        if step is None or decoder.recaptured or not decoder.captures:
            for _ in range(decoder.warm_up):
                decoder.step()
            step = captured(decoder.step, device) if decoder.captures else decoder.step
            timer.wait()
            preparation += time.perf_counter() - begun
        timer.peak()
        times = sorted(timer(step, settings.steps))
        decode_peak, host = timer.peak(), timer.host(step, 8)
        per_token = statistics.median(times)
        capacity = lengths[-1] if decoder.shared else length
        least = decoded_weights(model) + decoder.bytes() * length / capacity
        floor = least / settings.bandwidth if settings.bandwidth else 0.0
        yield Figures(
            method=method, batch=batch, prompt=length, first_token=min(first), per_token=per_token,
            per_token_p99=times[math.ceil(0.99 * len(times)) - 1], decode_rate=1e3 * batch / per_token,
            total_rate=1e3 * batch * (length + settings.steps) / (statistics.mean(first) * batch + sum(times)),
            steps=settings.steps, host=host, prefill_peak=prefill_peak, decode_peak=decode_peak,
            cache_bytes=decoder.bytes(), capacity=capacity, rows_read=min(batch, settings.rows or batch),
            roofline=1e3 * floor / per_token, preparation=preparation,
        )  # fmt: skip
        begun = time.perf_counter()


def parse_cases(text: str) -> list[Case]:
    """Of each part of "1x128k,16x32768,1x1k+2k+4k": batch x prompt tokens; lengths with + share a cache.

    Raises:
        ValueError: anything else.
    """
    parts = text.lower().split(",")
    for part in parts:
        if not re.fullmatch(r"\s*[1-9]\d*x[1-9]\d*[km]?(\+[1-9]\d*[km]?)*\s*", part):
            raise ValueError(f"{part!r}: must be batch x prompt tokens, as in 16x32768, 1x128k or 1x1k+2k+4k")
    split = (part.partition("x") for part in parts)
    return [Case(int(batch), [parse_tokens(p) for p in prompts.split("+")]) for batch, _, prompts in split]


def release() -> None:
    """Forget what was compiled, and give back memory that nothing holds."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def reason(error: Exception) -> str:
    """One line of what went wrong."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0][:200]}"


def run_cases(model: Any, cases: list[Case], methods: list[str], settings: Settings) -> Iterator[Figures | Failed]:
    """The figures of each case, method and prompt length, in this order, or why there are none; the run goes on."""
    begun = time.monotonic()
    for case in cases:
        for method in methods:
            if time.monotonic() - begun > 60 * settings.minutes:
                return
            remaining = sorted(case.prompts)
            try:
                with torch.no_grad():
                    for figures in run(method, model, case, settings):
                        remaining.remove(figures.prompt)
                        yield figures
            except Exception as error:  # whatever another package raises is that method's result
                for prompt in remaining:
                    yield Failed(method, case.batch, prompt, reason(error))
            release()


def baseline(result: Figures, results: list[Figures | Failed]) -> Figures | None:
    """The dense decoder of the same case."""
    found = (r for r in results if isinstance(r, Figures) and r.method == DENSE)
    return next((r for r in found if (r.batch, r.prompt) == (result.batch, result.prompt)), None)


def break_even(results: list[Figures | Failed], method: str) -> str:
    """From which prompt on, of those measured at batch 1, a method is no slower per token than the dense decoder."""
    rows = [r for r in results if isinstance(r, Figures) and r.method == method and r.batch == 1]
    pairs = sorted((r.prompt, baseline(r, results)) for r in rows if baseline(r, results))
    slower = [p for (p, dense), r in zip(pairs, sorted(rows, key=lambda r: r.prompt), strict=False)
              if r.per_token > dense.per_token]  # fmt: skip
    lengths = [p for p, _ in pairs]
    if not slower:
        return f"{method} is at least as fast per token as {DENSE} at each of {lengths} tokens"
    later = [p for p in lengths if p > max(slower)]
    return f"{method} breaks even between {max(slower)} and {later[0] if later else 'more'} tokens"


def bench_table(results: list[Figures | Failed], head: str) -> Table:
    """A row per case and method, beside the dense decoder of the same case."""
    shown = Table(title=f"{head}; in brackets: against {DENSE}")
    times = ("first token ms", "ms / token", "p99", "host ms", "of roofline", "decode tok/s", "total tok/s")
    for name in ("case", "method", *times, "prefill GiB", "decode GiB", "cache GiB"):
        shown.add_column(name, justify="right")
    for r in results:
        if isinstance(r, Failed):
            shown.add_row(f"{r.batch}x{r.prompt}", r.method, r.failed)
            continue
        dense = baseline(r, results)

        def cell(name: str, digits: int = 2, unit: float = 1, dense: Any = dense, r: Any = r) -> str:
            value, base = getattr(r, name), dense and getattr(dense, name)
            return f"{value / unit:.{digits}f}" + (f" ({value / base:.2f}x)" if base else "")

        host, share = (f"{x:.2f}" if x else "" for x in (r.host, r.roofline))
        shown.add_row(
            f"{r.batch}x{r.prompt}", r.method, cell("first_token", 0), cell("per_token"), f"{r.per_token_p99:.2f}", host,
            share, cell("decode_rate", 1), cell("total_rate", 0),
            *(cell(name, 2, 2**30) for name in ("prefill_peak", "decode_peak", "cache_bytes")),
        )  # fmt: skip
    short = {r.method for r in results if isinstance(r, Figures) and r.batch == 1 and baseline(r, results)} - {DENSE}
    shown.caption = "\n".join(break_even(results, method) for method in sorted(short))
    return shown


def rows_of(results: list[Figures | Failed]) -> list[dict[str, Any]]:
    """What `--json` writes."""
    return [asdict(r) for r in results]


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Time per token over the prompt at batch 1, and bars of each batch: `rows` of the JSON file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if "failed" not in row]
    cases = sorted({(row["batch"], row["prompt"]) for row in rows})
    methods = list(dict.fromkeys(row["method"] for row in rows))
    panels = [("per_token", 1, "ms per token"), ("first_token", 1e3, "s to the first token of a row"),
              ("decode_peak", 2**30, "GiB, most in decode"), ("cache_bytes", 2**30, "GiB of cache")]  # fmt: skip
    figure, axes = plt.subplots(2, 2, figsize=(max(9, 1.1 * len(cases) * len(methods) ** 0.5), 7))
    for axis, (name, unit, label) in zip(axes.flat, panels, strict=True):
        for i, method in enumerate(methods):
            found = {(row["batch"], row["prompt"]): row[name] / unit for row in rows if row["method"] == method}
            places = [j + (i - (len(methods) - 1) / 2) * 0.8 / len(methods) for j, case in enumerate(cases) if case in found]
            axis.bar(places, [found[case] for case in cases if case in found], 0.8 / len(methods), label=method)
        axis.set_xticks(range(len(cases)), [f"{b}x{p // 1024}K" if p >= 1024 else f"{b}x{p}" for b, p in cases], fontsize=8)
        axis.set_yscale("log")
        axis.set_title(label, fontsize=10, loc="left")
    axes[0, 0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
