"""Every kernel against float64, against its bandwidth floor, and beside the best 16-bit attention.

    python benchmarks/kernel_times.py --json benchmarks/results/kernels.json --plot benchmarks/results/kernels.png

One command, less than 5 minutes on one GPU. `--only decode,prefill` runs single sections (`check`, `decode`, `formats`,
`flex`, `prefill`, `compress`, `flush`, `linear`, `tune`); `--dry` runs a tiny version of everything on the CPU, in Triton's
interpreter. All ratios are taken within one run. Times are medians of CUDA graph replays that rotate among several sets
of inputs, larger than the L2 cache together. The *floor* of a row is the time in which the device copies as many bytes
as the kernel has to read and write at least.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import functools
import json
import math
import multiprocessing
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

if "--dry" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import _path  # noqa: F401
import torch
import torch.nn.functional as F
from kernel_cases import CHECKED, DECODE, DRY, FORMATS, TUNED, Case, tensors, tuning_of
from kernel_checks import run_check
from kernel_report import plot, table
from provenance import provenance
from torch.nn.attention import SDPBackend, sdpa_kernel

from minikv_compile.kernels.attend import attend_triton
from minikv_compile.kernels.linear import linear_triton, parts_of
from minikv_compile.kernels.packing import BLOCK
from minikv_compile.kernels.prefill import causal_attention_lse
from minikv_compile.kernels.scores import column_scores_triton
from minikv_compile.kernels.tuning import ATTEND_VARIANTS

SECTIONS = ("check", "decode", "formats", "prefill", "compress", "flush", "linear", "flex", "tune")
DEFAULT_SECTIONS = SECTIONS[:-1]
ROTATED_BYTES = 256 * 2**20
"""Sets of inputs together, at least: four times the L2 cache of an H200."""
WINDOW = 64
"""Queries of the last-window scores."""
REST_SECONDS = 0.5
"""Before each measurement of graphs. 16-bit attention brings the card to its power cap, and what is measured within the next
tenth of a second runs at lower clocks: 130 instead of 116 us, whoever's kernel it is."""


class Timer:
    """Medians of graph replays; on the CPU, of calls."""

    def __init__(self, device: torch.device, seconds: float):
        self.device, self.seconds = device, seconds

    def __call__(self, calls: list[Callable[[], object]], graph: bool = True) -> float:
        """Microseconds per call, rotating among `calls`, which use different inputs."""

        def run() -> None:
            for call in calls:
                call()

        if self.device.type == "cpu":
            before = time.perf_counter()
            run()
            return (time.perf_counter() - before) / len(calls) * 1e6
        run()
        torch.cuda.synchronize()
        replay = run
        if graph:
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured):
                run()
            replay = captured.replay
            time.sleep(REST_SECONDS)
        times: list[float] = []
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        deadline = time.perf_counter() + self.seconds
        while len(times) < 5 or (time.perf_counter() < deadline and len(times) < 200):
            start.record()
            replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3 / len(calls))
        return statistics.median(times[1:])


@dataclass
class Benchmark:
    device: torch.device
    deadline: float
    dry: bool
    timer: Timer
    bandwidth: float = 0.0
    """Bytes per microsecond, read plus written."""
    rows: list[dict] = field(default_factory=list)
    checks: list[dict] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    sdpa: dict = field(default_factory=dict)

    def more(self, what: str) -> bool:
        """Whether there is time to start `what`."""
        if time.perf_counter() < self.deadline:
            return True
        self.skipped.append(what)
        return False

    def row(self, section: str, what: str, **values) -> None:
        self.rows.append(dict(section=section, what=what, **values))
        text = "  ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
        print(f"  {section}: {what}: {text}", flush=True)

    def sets(self, size: int) -> int:
        """How many sets of inputs of `size` bytes to rotate among."""
        return 1 if self.dry else min(64, max(1, math.ceil(ROTATED_BYTES / size)))

    def guarded(self, what: str, run: Callable[[], None]) -> None:
        """Runs one row. A failure is a row, too; memory is given back."""
        if not self.more(what):
            return
        try:
            run()
        except Exception as error:
            self.row("failed", what, error=repr(error)[:300])
            if self.device.type == "cuda":
                torch.cuda.synchronize()  # raises again where the device is lost
        finally:
            if self.device.type == "cuda":
                torch.cuda.empty_cache()


def measure_bandwidth(bench: Benchmark) -> None:
    size = 2**20 if bench.dry else 2**32
    source = torch.empty(size, dtype=torch.uint8, device=bench.device).random_()
    target = torch.empty_like(source)
    time_us = bench.timer([lambda: target.copy_(source)], graph=False)
    bench.bandwidth = 2 * size / time_us
    bench.row("bandwidth", "device copy", tb_per_s=bench.bandwidth / 1e6)


def run_checks(bench: Benchmark, tasks: list[tuple], workers: int) -> None:
    print(f"{len(tasks)} checks, {workers} at a time", flush=True)
    if bench.dry:
        results = [run_check(*task) for task in tasks]
    else:
        results = []
        # Not `with`: leaving it would wait for workers that hang.
        pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
        futures = [pool.submit(run_check, *task) for task in tasks]
        for task, future in zip(tasks, futures, strict=True):
            try:
                results.append(future.result(timeout=max(1.0, bench.deadline - time.perf_counter())))
            except Exception as error:
                results.append([dict(what=str(task), ok=False, error=math.inf, limit=0, failure=repr(error)[:300])])
        processes = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()
    for row in (row for rows in results for row in rows):
        bench.checks.append(row)
        if not row["ok"]:
            print("  FAILED", row, flush=True)
    good = [row for row in bench.checks if row["ok"]]
    worst = max((row["error"] / row["limit"] for row in bench.checks if row["limit"]), default=0.0)
    print(f"{len(good)} of {len(bench.checks)} ok, worst error {worst:.2f} of its limit", flush=True)


BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "default": None,
}


def sdpa_call(q, k, v, backend: SDPBackend | None, folded: bool = False, causal: bool = False) -> None:
    """`folded`: the query heads of a KV head as so many queries, which decode may: what a careful user would write."""
    if folded:
        q = q.view(q.shape[0], k.shape[1], -1, q.shape[-1])
    gqa = q.shape[1] != k.shape[1]
    with sdpa_kernel(backend) if backend is not None else contextlib.nullcontext():
        F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=gqa)


def time_sdpa(bench: Benchmark, case: Case) -> dict[str, float]:
    """Microseconds of 16-bit decode attention on as many tokens, by backend."""
    key = case.label
    if key in bench.sdpa:
        return bench.sdpa[key]
    size = 2 * case.batch * case.kv_heads * case.length * case.dim * case.dtype.itemsize
    inputs = [
        [torch.randn(case.batch, h, n, case.dim, device=bench.device, dtype=case.dtype)
         for h, n in ((case.heads, 1), (case.kv_heads, case.length), (case.kv_heads, case.length))]
        for _ in range(bench.sets(size))
    ]  # fmt: skip
    times = {}
    for name, backend in BACKENDS.items() if not bench.dry else [("default", None)]:
        for folded in (False, True) if case.heads != case.kv_heads else (False,):
            label = name + (" folded" if folded else "")
            with contextlib.suppress(RuntimeError):
                times[label] = bench.timer([functools.partial(sdpa_call, *x, backend, folded) for x in inputs])
    bench.sdpa[key] = times
    return times


def time_attend(bench: Benchmark, case: Case) -> float:
    inputs = [tensors(case, bench.device, seed) for seed in range(bench.sets(case.bytes))]
    tuning = tuning_of(case)
    return bench.timer([functools.partial(attend_triton, *x, tuning=tuning) for x in inputs])


def decode_row(bench: Benchmark, section: str, case: Case) -> None:
    ours = time_attend(bench, case)
    floor = case.bytes / bench.bandwidth
    theirs = time_sdpa(bench, case)
    best = min(theirs, key=theirs.get)
    dense_floor = 2 * case.batch * case.kv_heads * case.length * case.dim * case.dtype.itemsize / bench.bandwidth
    bench.row(
        section, f"{case.name} {case.label}", time_us=ours, floor_us=floor, share=floor / ours,
        faster=theirs[best] / ours, best=best, best_us=theirs[best], best_share=dense_floor / theirs[best],
        sdpa={k: round(v, 2) for k, v in theirs.items()},
    )  # fmt: skip


def tune_rows(bench: Benchmark, case: Case) -> None:
    floor = case.bytes / bench.bandwidth
    for variant in ("", *ATTEND_VARIANTS):
        what = f"{variant or 'chosen'} {case.name} {case.label}"

        def run(variant=variant, what=what):
            time_us = time_attend(bench, replace(case, variant=variant))
            bench.row("tune", what, time_us=time_us, share=floor / time_us)

        bench.guarded(what, run)


def flex_row(bench: Benchmark, case: Case) -> None:
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, dynamic=False)
    size = 2 * case.batch * case.kv_heads * case.length * case.dim * case.dtype.itemsize
    calls = []
    for _ in range(bench.sets(size)):
        q, k, v = (
            torch.randn(case.batch, h, n, case.dim, device=bench.device, dtype=case.dtype)
            for h, n in ((case.heads, 1), (case.kv_heads, case.length), (case.kv_heads, case.length))
        )
        calls.append(functools.partial(compiled, q, k, v, enable_gqa=True))
    time_us = bench.timer(calls)
    bench.row("flex", f"FlexAttention {case.label}", time_us=time_us, share=size / bench.bandwidth / time_us)


def causal_inputs(bench: Benchmark, seq: int, heads: int = 32, kv_heads: int = 8, dim: int = 128) -> list[torch.Tensor]:
    dtype = torch.bfloat16
    return [torch.randn(1, h, seq, dim, device=bench.device, dtype=dtype) for h in (heads, kv_heads, kv_heads)]


def time_causal(bench: Benchmark, x: list[torch.Tensor]) -> dict[str, float]:
    """Microseconds of causal SDPA, by backend, launched one by one."""
    times = {}
    for name, backend in BACKENDS.items() if not bench.dry else [("default", None)]:
        with contextlib.suppress(RuntimeError):
            times[name] = bench.timer([functools.partial(sdpa_call, *x, backend, causal=True)], graph=False)
    return times


def prefill_row(bench: Benchmark, seq: int) -> None:
    x = causal_inputs(bench, seq)
    q, k, v = x
    scale = q.shape[-1] ** -0.5
    before = time_causal(bench, x)

    def first() -> torch.Tensor:
        if bench.dry:
            return q.new_zeros(q.shape[:3], dtype=torch.float32)
        return causal_attention_lse(q, k, v, scale)[1]

    def both() -> None:
        column_scores_triton(q, k, first(), scale)

    def window() -> None:
        column_scores_triton(q, k, first(), scale, last=WINDOW)

    lse = first()
    second = bench.timer([lambda: column_scores_triton(q, k, lse, scale)], graph=False)
    values = dict(
        attention_and_scores_us=bench.timer([both], graph=False), scores_us=second,
        attention_and_window_us=bench.timer([window], graph=False),
    )  # fmt: skip
    # Clocks drift by up to 10% within a row: SDPA is timed before and after ours.
    after = time_causal(bench, x)
    theirs = {name: (before[name] + after[name]) / 2 for name in before}
    best = min(theirs.values())
    values = dict(sdpa_us=best, **values)
    flops = seq * seq * q.shape[1] * q.shape[-1]  # q @ k^T below the diagonal
    bench.row(
        "prefill", f"{seq} tokens", **values, ratio=values["attention_and_scores_us"] / best,
        window_ratio=values["attention_and_window_us"] / best, sdpa_tflops=2 * flops / best / 1e6,
        scores_tflops=flops / second / 1e6, sdpa={k: round(v, 1) for k, v in theirs.items()},
    )  # fmt: skip
    if seq <= 4096 and not bench.dry:
        ratio = bench.timer([both]) / bench.timer([functools.partial(sdpa_call, *x, BACKENDS["cudnn"], causal=True)])
        bench.row("prefill", f"{seq} tokens, in a CUDA graph", ratio=ratio)


def compress_row(bench: Benchmark, preset: str, seq: int) -> None:
    """The whole op `minikv::compress` of one layer: selection, dense region, counters.

    In a prefill the host runs ahead of the device, so `of_attention` is of device time; `launched_us` is what the op
    takes alone, host included.
    """
    from minikv_compile.config import MiniKVConfig
    from minikv_compile.feedback import query_moments
    from minikv_compile.ops import compress_prompt

    x = causal_inputs(bench, seq)
    before = min(time_causal(bench, x).values())
    config = MiniKVConfig.preset(preset)
    k, v = x[1:]
    scores = None if config.observed_queries is None else torch.rand(k.shape[:3], device=bench.device)
    q_range = torch.rand(*k.shape[:2], k.shape[3], device=bench.device) if config.balances else None
    moments = query_moments(x[0], k, None, None) if config.feeds_back else None
    layer, layers = 15, 32

    def run() -> None:
        compress_prompt(k, v, scores, None, None, layer, layers, config.to_json(), q_range, moments)

    launched = bench.timer([run], graph=False)
    device_us, launches = device_time(run, bench.dry)
    attention = (before + min(time_causal(bench, x).values())) / 2
    bench.row(
        "compress", f"{preset}, {seq} tokens", time_us=device_us, launches=launches, launched_us=launched,
        of_attention=device_us / attention,
    )  # fmt: skip


def device_time(run: Callable[[], None], dry: bool, repeats: int = 10) -> tuple[float, float]:
    """Microseconds that the device spends in the kernels and copies of one call, and their number."""
    if dry:
        run()
        return 1.0, 0.0
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(repeats):
            run()
        torch.cuda.synchronize()
    events = [event for event in profile.key_averages() if event.device_time_total > 0]
    return sum(e.device_time_total for e in events) / repeats, sum(e.count for e in events) / repeats


def flush_row(bench: Benchmark, batch: int, layers: int) -> None:
    """A flush of one block of each row of all layers' keys and values, spread over layers and the steps between two flushes."""
    from minikv_compile.config import MiniKVConfig
    from minikv_compile.ops import ROLES, compress_prompt, fields
    from minikv_compile.tensor import make_room, wrap_prompt

    config, heads, dim = MiniKVConfig.preset("default"), 8, 128
    length = 9 * BLOCK + config.pinned(config.important_tokens())  # ends with a full dense region
    names = [fields(config, role, False) for role in ROLES]
    parts = []
    for layer in range(layers):
        k, v = (torch.randn(batch, heads, length, dim, device=bench.device, dtype=torch.bfloat16) for _ in ROLES)
        made = iter(compress_prompt(k, v, None, None, None, layer, layers, config.to_json(), None))
        parts += [({n: next(made) for n in of_role}, role, length, layer) for role, of_role in zip(ROLES, names, strict=True)]
    tensors = wrap_prompt(parts, config)
    full = config.pinned(config.important_tokens()) + config.room
    tensors = [kv.longer(full - (length - kv.occupancy.offsets[0])) for kv in tensors]
    states = torch.stack([kv.state for kv in tensors])
    for kv, state in zip(tensors, states, strict=True):
        kv.state = state
        kv._blocks_to_flush(1, config.room)  # its tier grows once
    kept, before = states.clone(), [(kv.occupancy.offsets, kv.occupancy.blocks) for kv in tensors]

    def run():
        states.copy_(kept)
        for kv, (offsets, blocks) in zip(tensors, before, strict=True):
            kv.occupancy.offsets, kv.occupancy.blocks = offsets, blocks
        make_room(tensors, [1] * len(tensors))

    launched = bench.timer([run], graph=False)
    per_step = config.buffer * layers
    device_us, launches = device_time(run, bench.dry)
    bench.row(
        "flush", f"B{batch}, keys and values of {layers} layers", time_us=launched, per_step_us=launched / per_step,
        launches=launches, device_us=device_us, device_per_step_us=device_us / per_step,
    )  # fmt: skip


LINEAR = {
    "q, k, v": ((4096, 1024, 1024), 4096), "o": ((4096,), 4096), "gate, up": ((14336, 14336), 4096), "down": ((4096,), 14336),
}
"""Outputs and inputs of layers of Llama-3.1-8B that read one input."""


def linear_row(bench: Benchmark, name: str, sizes: tuple[int, ...], inputs: int, rows: int) -> None:
    """Products of `rows` rows with all of these weights, beside cuBLAS' one by one. (What sums the parts is not in it.)"""
    if bench.dry:
        sizes, inputs = tuple(size // 16 for size in sizes), inputs // 8
    splits, floor = parts_of(sum(sizes), inputs), 2 * sum(sizes) * inputs
    make = functools.partial(torch.randn, device=bench.device, dtype=torch.bfloat16)
    sets = [[make(size, inputs) for size in sizes] for _ in range(bench.sets(floor))]
    x = make(rows, inputs)
    exact = torch.cat([x.double() @ weight.double().mT for weight in sets[0]], -1)
    error = ((linear_triton(x, sets[0], splits).sum(0) - exact).norm() / exact.norm()).item()
    bench.checks.append(dict(what=f"linear {name}, {rows} rows", error=error, ok=error < 1e-5))
    time_us = bench.timer([functools.partial(linear_triton, x, weights, splits) for weights in sets])
    library = bench.timer([lambda weights=weights: [F.linear(x, weight) for weight in weights] for weights in sets])
    bench.row(
        "linear", f"{name}, {rows} row{'s' * (rows > 1)}", time_us=time_us, share=floor / bench.bandwidth / time_us,
        faster=library / time_us, best="cuBLAS", best_us=library, best_share=floor / bench.bandwidth / library, parts=splits,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--only", default=",".join(DEFAULT_SECTIONS), help=f"sections: {', '.join(SECTIONS)}")
    parser.add_argument("--tune", action="store_true", help="only time the variants of tuning.py")
    parser.add_argument("--minutes", type=float, default=4.8, help="after which no new row starts")
    parser.add_argument("--seconds", type=float, default=0.15, help="of measuring, per number")
    parser.add_argument("--workers", type=int, default=min(12, os.cpu_count() or 1), help="processes for the checks")
    parser.add_argument("--json", help="where to write everything")
    parser.add_argument("--plot", help="where to draw decode and prefill")
    parser.add_argument("--dry", action="store_true", help="a tiny version on the CPU")
    args = parser.parse_args()
    sections = ["tune"] if args.tune else args.only.split(",")
    if unknown := set(sections) - set(SECTIONS):
        parser.error(f"unknown sections: {', '.join(sorted(unknown))}")
    if not args.dry and not torch.cuda.is_available():
        parser.error("needs a CUDA device (or --dry)")

    start = time.perf_counter()
    device = torch.device("cpu" if args.dry else "cuda")
    bench = Benchmark(device, start + 60 * args.minutes, args.dry, Timer(device, args.seconds))
    torch.manual_seed(0)

    def finish() -> None:
        print(f"\n{table(bench.rows, bench.bandwidth)}")
        bad = [row for row in bench.checks if not row["ok"]]
        print(f"checks: {len(bench.checks) - len(bad)} ok, {len(bad)} failed", *(r["what"] for r in bad), sep="\n  ")
        if bench.skipped:
            print("no time left for:", *bench.skipped, sep="\n  ")
        if args.json:
            result = dict(
                provenance(device), seconds=round(time.perf_counter() - start, 1), copy_tb_per_s=bench.bandwidth / 1e6,
                checks=bench.checks, rows=bench.rows, skipped=bench.skipped,
            )  # fmt: skip
            Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
        if args.plot:
            plot(bench.rows, args.plot, WINDOW)
        sys.stdout.flush()

    def give_up() -> None:
        print("HANGS: the last row did not end. Where it is:", flush=True)
        faulthandler.dump_traceback(all_threads=True)
        try:
            finish()
        finally:
            os._exit(3)

    watchdog = threading.Timer(60 * args.minutes + 40, give_up)
    watchdog.daemon = True
    watchdog.start()

    try:
        run_sections(bench, sections, args.workers)
    except Exception as error:  # a lost device: what was measured is still written
        bench.row("failed", "the run", error=repr(error)[:500])
    watchdog.cancel()
    finish()
    sys.exit(any(not row["ok"] for row in bench.checks) or any(row["section"] == "failed" for row in bench.rows))


def run_sections(bench: Benchmark, sections: list[str], workers: int) -> None:
    decode, formats, tuned = (DECODE, FORMATS, TUNED) if not bench.dry else (DRY[:1], DRY[1:], DRY[:1])
    checked = list(CHECKED if not bench.dry else DRY) if "check" in sections else []
    # What is timed later compiles here, in parallel, and is checked by the way.
    timed = (decode[:1] if "decode" in sections else []) + (formats if "formats" in sections else [])
    for case in [tuned[0], *tuned[5:]] if "tune" in sections else []:
        timed += [replace(case, variant=v) for v in ("", *ATTEND_VARIANTS)]
    tasks: list[tuple] = [("attend", case, seed) for seed, case in enumerate([*timed, *checked])]
    if "check" in sections:
        tasks.append(("codes",))
        b, h, f = torch.bfloat16, torch.float16, torch.float32
        shapes = [
            (64, h, 2, 32, 8), (128, b, 2, 64, 8), (80, b, 2, 16, 16), (256, f, 8, 128, 16), (96, h, 4, 32, 8),
            (128, b, 2, 16, 16),
        ]  # fmt: skip
        tasks += [("compress", *shape) for shape in shapes[: 1 if bench.dry else None]]
        shapes = [(64, h, None), (128, b, None), (128, b, WINDOW), (80, h, WINDOW), (256, b, None), (64, f, None)]
        tasks += [("scores", *shape) for shape in shapes[: 1 if bench.dry else None]]
    run_checks(bench, tasks, workers)
    measure_bandwidth(bench)
    if "decode" in sections:
        for case in decode:
            bench.guarded(case.label, functools.partial(decode_row, bench, "decode", case))
    if "formats" in sections:
        for case in formats:
            bench.guarded(f"{case.name} {case.label}", functools.partial(decode_row, bench, "formats", case))
    if "tune" in sections:
        for case in tuned:
            tune_rows(bench, case)
    if "prefill" in sections:
        for seq in (1024, 2048, 4096, 8192, 16384, 32768, 65536) if not bench.dry else (128,):
            bench.guarded(f"prefill {seq}", functools.partial(prefill_row, bench, seq))
    if "compress" in sections:
        for preset in ("default", "minikv"):
            bench.guarded(f"compress {preset}", functools.partial(compress_row, bench, preset, 16384 if not bench.dry else 260))
    if "flush" in sections:
        for batch, layers in ((1, 32), (16, 32)) if not bench.dry else ((1, 2),):
            bench.guarded(f"flush B{batch}", functools.partial(flush_row, bench, batch, layers))
    if "linear" in sections:
        for name, (sizes, inputs) in LINEAR.items():
            for rows in (1, 16):
                bench.guarded(f"linear {name}", functools.partial(linear_row, bench, name, sizes, inputs, rows))
    if "flex" in sections and not bench.dry:
        for case in (DECODE[5], DECODE[4], DECODE[0]):
            bench.guarded(f"flex {case.label}", functools.partial(flex_row, bench, case))


if __name__ == "__main__":
    main()
