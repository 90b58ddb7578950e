"""Every kernel against float64, against its bandwidth floor, and beside the best 16-bit attention.

    python benchmarks/kernels.py --json benchmarks/results/kernels.json --plot benchmarks/results/kernels.png

One command, less than 5 minutes on one GPU. `--only decode,prefill` runs single sections (`check`, `decode`, `formats`,
`flex`, `prefill`, `compress`, `flush`, `tune`); `--dry` runs a tiny version of everything on the CPU, in Triton's
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
import triton
import triton.language as tl
from provenance import provenance
from torch.nn.attention import SDPBackend, sdpa_kernel

from minikv_compile.kernels.attend import attend_triton, block_bytes
from minikv_compile.kernels.compress import compress_reference, compress_triton, empty_packed
from minikv_compile.kernels.jit import CODE_EXPONENT, code_position, codes_at
from minikv_compile.kernels.packing import BLOCK, dequantize, unpack, value_group
from minikv_compile.kernels.prefill import causal_attention_lse
from minikv_compile.kernels.scores import column_scores_reference, column_scores_triton
from minikv_compile.kernels.tuning import ATTEND_VARIANTS, attend_tuning
from minikv_compile.rotation import hadamard

SECTIONS = ("check", "decode", "formats", "prefill", "compress", "flush", "flex", "tune")
DEFAULT_SECTIONS = SECTIONS[:-1]
ROTATED_BYTES = 256 * 2**20
"""Sets of inputs together, at least: four times the L2 cache of an H200."""
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float32: 4e-5}
"""Of attention. fp32: operands have 22 bits, tensor cores truncate sums, and the sums over codes and over zeros, each
far larger than the output, nearly cancel; 1.8e-5 was measured."""
WINDOW = 64
"""Queries of the last-window scores."""


@dataclass(frozen=True)
class Case:
    """One decode step."""

    name: str = "default"
    batch: int = 1
    length: int = 8192
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    bits: int = 2
    k_group: int = 128
    k_axis: str = "token"
    v_group: int = 128
    rotate: bool = True
    new: int = 1
    dense: int = 196
    """Tokens in the dense region: sinks, important tokens, window and half of the buffer."""
    dense_capacity: int = 260
    ragged: bool = False
    variant: str = ""

    @property
    def tier(self) -> int:
        """Tokens in the tier."""
        return max(0, self.length - self.dense) // BLOCK * BLOCK

    @property
    def bytes(self) -> int:
        """What a step must read and write, at least."""
        element = self.dtype.itemsize
        code_bytes = 2 * self.tier * self.dim * self.bits / 8
        meta_bytes = 2 * 2 * self.tier * self.dim * (1 / self.k_group + 1 / min(self.v_group, self.dim))
        kv_bytes = code_bytes + meta_bytes + 2 * (self.length - self.tier) * self.dim * element
        return int(self.batch * (self.kv_heads * kv_bytes + 2 * self.heads * self.dim * element))

    @property
    def label(self) -> str:
        tokens = f"{self.length // 1024}K" if self.length % 1024 == 0 else str(self.length)
        return f"B{self.batch}x{tokens} {self.heads}/{self.kv_heads} D{self.dim}"


MINIKV = dict(name="minikv g16", k_group=16, v_group=16, rotate=False, dense=64, dense_capacity=128)
DECODE = [Case(batch=b, length=n * 1024) for b, n in ((16, 32), (64, 8), (4, 128), (1, 128), (1, 32), (1, 8))]
FORMATS = [
    Case(batch=16, length=32768, **MINIKV),
    Case(batch=16, length=32768, name="4 bit", bits=4),
    Case(batch=16, length=32768, name="8 bit", bits=8),
    Case(batch=4, length=32768, heads=32, kv_heads=32),
    Case(batch=16, length=32768, heads=64),
    Case(batch=32, length=32768, heads=28, kv_heads=4),
    Case(batch=32, length=32768, dim=64, v_group=64),
]
TUNED = [DECODE[0], DECODE[1], *DECODE[3:], *FORMATS[:3]]
SMALL = dict(batch=3, length=4 * BLOCK + 100, dense=100, ragged=True, heads=8, kv_heads=2)
CHECKED = [
    Case(**SMALL),
    Case(**SMALL, dtype=torch.float16),
    Case(**SMALL, dtype=torch.float32),
    Case(**SMALL, bits=4, dtype=torch.float16),
    Case(**SMALL, bits=8),
    Case(**{**SMALL, "name": "g16", "k_group": 16, "v_group": 16}),
    Case(**{**SMALL, "name": "g16", "k_group": 16, "v_group": 16, "bits": 4}, dtype=torch.float16),
    Case(**{**SMALL, "name": "g16", "k_group": 16, "v_group": 16, "bits": 8}),
    Case(**SMALL, k_group=32, v_group=32),
    Case(**SMALL, k_group=64, v_group=64),
    Case(**SMALL, k_axis="channel"),
    Case(**SMALL, k_axis="channel", k_group=16, v_group=16, bits=4, dtype=torch.float16),
    Case(**SMALL, dim=64, v_group=64),
    Case(**SMALL, dim=64, dtype=torch.float16, k_axis="channel", k_group=32, v_group=32),
    Case(**SMALL, dim=80, v_group=16),
    Case(**SMALL, dim=80, v_group=16, dtype=torch.float16, bits=4),
    Case(**SMALL, dim=96, v_group=32),
    Case(**SMALL, dim=256),
    Case(**SMALL, dim=256, dtype=torch.float16, k_group=16, v_group=16),
    Case(**SMALL, dim=256, dtype=torch.float32, k_group=32, v_group=32),
    Case(**{**SMALL, "heads": 2}),
    Case(**{**SMALL, "heads": 14}),
    Case(**{**SMALL, "heads": 16}, dtype=torch.float16),
    Case(**{**SMALL, "heads": 32}),
    Case(**{**SMALL, "heads": 32}, dim=256),
    Case(**SMALL, new=5),
    Case(**SMALL, new=16, dtype=torch.float16, rotate=False),
]
DRY = [
    replace(CHECKED[0], batch=2, length=228, dim=64, v_group=64),
    replace(CHECKED[9], batch=1, length=228, dim=64, v_group=64, dtype=torch.float16),
]


def tensors(case: Case, device: torch.device, seed: int) -> list:
    """Random arguments of `attend_triton`. Codes and metadata are drawn as such, but for small ragged cases, which are
    quantized, and poisoned past their valid lengths."""
    generator = torch.Generator(device).manual_seed(seed)
    rotation = hadamard(case.dim).to(device) if case.rotate else None

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=case.dtype)

    batch, kv, dim = case.batch, case.kv_heads, case.dim
    blocks = max(case.tier // BLOCK, 1)
    grouping = dict(key=(case.k_group, case.k_axis), value=(case.v_group, "channel"))
    tier_tokens = torch.full((batch,), case.tier, device=device)
    dense_tokens = torch.full((batch,), case.length - case.tier, device=device)
    capacity = max(case.dense_capacity, case.length - case.tier)
    tiers = []
    for layout, (group, axis) in grouping.items():
        if case.ragged:
            x = normal(batch, kv, blocks * BLOCK, dim)
            full = torch.full((batch,), blocks * BLOCK, dtype=torch.int32, device=device)
            packed = compress_triton(x, None, 0, full, blocks, case.bits, group, axis, layout, rotation, 1.0)
        else:
            packed = empty_packed(batch, kv, blocks, dim, case.bits, group, axis, layout, case.dtype, device)
            packed[0].random_(-(2**15), 2**15, generator=generator)
            packed[1].uniform_(0.5, 1.5, generator=generator).div_(2**case.bits - 1)
            packed[2].uniform_(-0.75, -0.25, generator=generator)
        tiers.append(packed)
    dense = [normal(batch, kv, capacity, dim) for _ in range(2)]
    if case.ragged:
        tier_tokens = (tier_tokens - torch.arange(batch, device=device) * BLOCK).clamp(min=0)
        dense_tokens = (dense_tokens - 31 * torch.arange(batch, device=device)).clamp(min=case.new)
        for row in range(batch):
            for tier in tiers:
                for meta in tier[1:]:
                    meta[row, :, tier_tokens[row] // BLOCK :] = torch.nan
            for x in dense:
                x[row, :, dense_tokens[row] - case.new :] = torch.nan
    none = torch.zeros_like(tier_tokens)
    state = torch.stack([case.length - dense_tokens, none, tier_tokens, none, none, none], -1).int()
    q = normal(batch, case.heads, case.new, dim)
    new = [normal(batch, kv, case.new, dim) for _ in range(2)]
    return [q, *new, *tiers, *dense, state, case.length, dim**-0.5, case.bits, case.k_group, case.k_axis,
            case.v_group, rotation]  # fmt: skip


def exact(arguments: list) -> torch.Tensor:
    """What `attend_triton` computes, in float64; its dense regions hold the new tokens already."""
    q, _, _, k_tier, v_tier, k_dense, v_dense, state, length, scale, bits, *rest = arguments
    k_group, k_axis, v_group, rotation = rest
    batch, heads, n, dim = q.shape
    ratio = heads // k_dense.shape[1]
    out = torch.empty(q.shape, dtype=torch.float64, device=q.device)
    matrix = torch.eye(dim) if rotation is None else rotation
    matrix = matrix.to(q.device, torch.float64)
    for row in range(batch):
        blocks, dense = int(state[row, 2]) // BLOCK, length - int(state[row, 0])

        def values(tier, layout, group, axis, row=row, blocks=blocks):
            codes, scales, zeros = (t[row, :, :blocks] for t in tier)
            if axis == "channel":
                scales, zeros = scales.mT, zeros.mT
            dim_of_group = -2 if axis == "token" else -1
            scales, zeros = (t.double().repeat_interleave(group, dim_of_group) for t in (scales, zeros))
            return (unpack(codes, bits, layout) * scales + zeros).flatten(1, 2) @ matrix.T

        k = torch.cat([values(k_tier, "key", k_group, k_axis), k_dense[row, :, :dense].double()], 1)
        v = torch.cat([values(v_tier, "value", v_group, "channel"), v_dense[row, :, :dense].double()], 1)
        k, v = (x.repeat_interleave(ratio, 0) for x in (k, v))
        logits = q[row].double() @ k.mT * scale
        later = torch.arange(k.shape[1], device=q.device) > k.shape[1] - n + torch.arange(n, device=q.device)[:, None]
        out[row] = logits.masked_fill(later, -torch.inf).softmax(-1) @ v
    return out


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Of the norms; NaN counts as infinite."""
    error = float((actual.double() - expected).norm() / expected.norm())
    return math.inf if math.isnan(error) else error


def poison(device: torch.device) -> None:
    """Fill the memory that the next allocations get with NaN."""
    kept = [torch.full((n,), torch.nan, device=device) for n in (2**26, *[2**17] * 16)] if device.type == "cuda" else []
    del kept


def check_attend(case: Case, seed: int, device: torch.device) -> dict:
    """Error of one small step, and whether a second run gives the same bits."""
    small = replace(case, batch=3, length=4 * BLOCK + 100, dense=100, ragged=True) if not case.ragged else case
    arguments = tensors(small, device, seed)
    poison(device)
    out = attend_triton(*arguments, tuning=tuning_of(case))
    same = torch.equal(out, attend_triton(*arguments, tuning=tuning_of(case)))
    error = relative_error(out, exact(arguments))
    tolerance = TOLERANCE[case.dtype]
    what = f"{case.name}{' ' + case.variant if case.variant else ''} {case.heads}/{case.kv_heads} D{case.dim}"
    what += f" {case.bits} bit g{case.k_group}/{case.v_group} {case.k_axis} n{case.new} {str(case.dtype)[6:]}"
    return dict(what=f"attend {what}", error=error, limit=tolerance, ok=error <= tolerance and same, repeats=same)


def tuning_of(case: Case):
    """The table's choice for a case, or the variant that it names."""
    size = block_bytes(case.dim, case.bits, case.k_group, case.v_group)
    rows = case.batch * case.heads * case.new
    chosen = attend_tuning(triton.next_power_of_2(case.dim), case.dtype.itemsize, size, rows)
    return replace(chosen, **ATTEND_VARIANTS.get(case.variant, {}))


@triton.jit
def _codes_kernel(WORDS, X, OUT, POSITION: tl.constexpr, BITS: tl.constexpr):
    row, inner, column = tl.arange(0, 16), tl.arange(0, 32), tl.arange(0, 8)
    codes = codes_at(tl.load(WORDS + row[:, None] * 32 + inner[None, :]), POSITION, BITS)
    out = tl.dot(codes, tl.load(X + inner[:, None] * 8 + column[None, :]))
    tl.store(OUT + row[:, None] * 8 + column[None, :], out)


def check_codes(device: torch.device) -> dict:
    """Codes are fp16 subnormal numbers: products with integers must be exact."""
    wrong = 0
    for bits in (2, 4, 8):
        for position in range(0, 16, bits):
            packed = torch.randint(-(2**15), 2**15, (16, 32), device=device, dtype=torch.int16)
            x = torch.randint(-8, 9, (32, 8), device=device).half()
            out = torch.full((16, 8), torch.nan, device=device)
            _codes_kernel[(1,)](packed, x, out, POSITION=position, BITS=bits, num_warps=1)
            expected = ((packed.int() >> position) & (2**bits - 1)).double() @ x.double()
            # Functions for constants: plain ones outside of a kernel.
            unit = 2.0 ** (int(CODE_EXPONENT.value) - int(code_position(position, bits)))
            wrong += int((out.double() * unit != expected).sum())
    return dict(what="codes as subnormal operands: values that differ", error=wrong, limit=0, ok=wrong == 0)


def check_compress(dim: int, dtype: torch.dtype, bits: int, group: int, device: torch.device) -> list[dict]:
    """Relative error of dequantized values against the reference's, keys and values, gathered and rotated."""
    rows = []
    torch.manual_seed(1)
    seq, blocks = 700, 4
    x = torch.randn(2, 2, seq, dim).to(dtype)
    index = torch.stack([torch.randperm(seq) for _ in range(4)]).view(2, 2, seq)
    tokens = torch.tensor([blocks * BLOCK, 2 * BLOCK], dtype=torch.int32)
    v_group = value_group(group, dim)
    for layout, axis, g in (("key", "token", group), ("value", "channel", v_group), ("key", "channel", v_group)):
        arguments = (4, tokens, blocks, bits, g, axis, layout, hadamard(dim), 1.0)
        moved = [t.to(device) if isinstance(t, torch.Tensor) else t for t in arguments]
        poison(device)
        ours = [t.cpu() for t in compress_triton(x.to(device), index.to(device), *moved)]
        theirs = compress_reference(x, index, *arguments)
        (a, b) = (dequantize(unpack(p[0], bits, layout), p[1], p[2], g, axis).double() for p in (ours, theirs))
        error, limit = relative_error(a, b), 3e-2 if bits == 2 else 1e-2  # few codes next to a tie differ by one
        what = f"compress {layout} {axis} D{dim} {bits} bit g{g} {str(dtype)[6:]}"
        rows.append(dict(what=what, error=error, limit=limit, ok=error <= limit))
    return rows


def check_scores(dim: int, dtype: torch.dtype, last: int | None, device: torch.device) -> list[dict]:
    """Output, log-sum-exp and column sums of a prefill."""
    torch.manual_seed(2)
    seq, scale = 700, dim**-0.5
    q, k, v = (torch.randn(2, h, seq, dim, device=device).to(dtype) for h in (8, 2, 2))
    keys, values = (x.double().repeat_interleave(4, 1) for x in (k, v))
    later = torch.ones(seq, seq, dtype=torch.bool, device=device).triu(1)
    logits = (q.double() @ keys.mT * scale).masked_fill(later, -torch.inf)
    what, rows = f"D{dim} {str(dtype)[6:]}", []
    lse = logits.logsumexp(-1)
    if device.type == "cuda":
        out, lse = causal_attention_lse(q, k, v, scale)
        first_pass = (("output", out, logits.softmax(-1) @ values), ("lse", lse, logits.logsumexp(-1)))
        for name, actual, expected in first_pass:
            assert actual.shape == expected.shape
            error = relative_error(actual, expected)
            rows.append(dict(what=f"prefill {name} {what}", error=error, limit=1e-2, ok=error <= 1e-2))
    lengths = torch.tensor([seq, 401], device=device)
    expected = column_scores_reference(q.double(), k.double(), scale, lengths, last)
    poison(device)
    error = relative_error(column_scores_triton(q, k, lse.float(), scale, lengths, last), expected)
    rows.append(dict(what=f"scores last={last} {what}", error=error, limit=2e-3, ok=error <= 2e-3))
    return rows


def run_check(name: str, *arguments) -> list[dict]:
    """One check, in a worker process: so compilations run in parallel, and what they compile is cached for all."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check = dict(attend=check_attend, codes=check_codes, compress=check_compress, scores=check_scores)[name]
    start = time.perf_counter()
    try:
        rows = check(*arguments, device)
    except Exception as error:  # a check that crashes is a failed check
        rows = [dict(what=f"{name} {arguments}", ok=False, error=math.inf, limit=0, failure=repr(error)[:500])]
    rows = rows if isinstance(rows, list) else [rows]
    rows[0]["seconds"] = round(time.perf_counter() - start, 1)
    return rows


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
    from minikv_compile.ops import compress_prompt

    x = causal_inputs(bench, seq)
    before = min(time_causal(bench, x).values())
    config = MiniKVConfig.preset(preset)
    k, v = x[1:]
    scores = None if config.observed_queries is None else torch.rand(k.shape[:3], device=bench.device)
    q_range = torch.rand(*k.shape[:2], k.shape[3], device=bench.device) if config.balances else None
    layer, layers = 15, 32

    def run() -> None:
        compress_prompt(k, v, scores, None, None, layer, layers, config.to_json(), q_range)

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


def flush_row(bench: Benchmark, batch: int) -> None:
    """A flush of one block of each row, keys and values, spread over the steps between two flushes."""
    from minikv_compile import ops
    from minikv_compile.config import MiniKVConfig

    config = MiniKVConfig.preset("default")
    heads, dim, blocks = 8, 128, 8
    pinned = config.pinned(config.important_tokens(0))
    capacity = pinned + config.room
    dense = [torch.randn(batch, heads, capacity, dim, device=bench.device, dtype=torch.bfloat16) for _ in range(2)]
    tiers, states = [], []
    for role in ops.ROLES:
        group, axis = ops.grouping(config, role, dim)
        tiers.append(empty_packed(batch, heads, blocks, dim, 2, group, axis, role, torch.bfloat16, bench.device))
        states.append(torch.tensor([[0, 0, BLOCK, 0, pinned, 0]] * batch, dtype=torch.int32, device=bench.device))

    def run():
        for role, tier, x, state in zip(ops.ROLES, tiers, dense, states, strict=True):
            state[:, :3] = 0
            torch.ops.minikv.flush(*tier, x, state, capacity, 1, config.room, 1, role, config.to_json())

    launched = bench.timer([run], graph=False)
    captured = bench.timer([run])
    bench.row(
        "flush", f"B{batch}, keys and values", time_us=launched, per_step_us=launched / config.buffer,
        device_us=captured, device_per_step_us=captured / config.buffer,
    )  # fmt: skip


def table(rows: list[dict], bandwidth: float) -> str:
    """What was measured, one line a row."""
    lines = [f"device copy {bandwidth / 1e6:.2f} TB/s", f"{'':44}{'time':>10}{'of floor':>10}{'ratio':>8}"]
    for row in rows:
        share = f"{row['share']:.0%}" if "share" in row else ""
        ratio, note = "", ""
        if "faster" in row:
            ratio = f"{row['faster']:.2f}x"
            note = f"than {row['best']} {row['best_us']:.1f} us ({row['best_share']:.0%})"
        elif "ratio" in row:
            ratio = f"{row['ratio']:.2f}"
            note = f"of SDPA; last window {row['window_ratio']:.3f}" if "window_ratio" in row else "of SDPA"
        elif "of_attention" in row:
            ratio, note = f"{row['of_attention']:.1%}", "of the layer's attention"
        elif "per_step_us" in row:
            note = f"{row['per_step_us']:.2f} us a step; on the device {row['device_per_step_us']:.2f}"
        elif "error" in row:
            note = row["error"]
        time_us = row.get("time_us", row.get("attention_and_scores_us"))
        shown = "" if time_us is None else f"{time_us:.1f} us"
        lines.append(f"{row['section'] + ' ' + row['what']:44}{shown:>10}{share:>10}{ratio:>8}  {note}")
    return "\n".join(lines)


def plot(rows: list[dict], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    decode = [row for row in rows if "faster" in row]
    prefill = [row for row in rows if "window_ratio" in row]
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 0.4 * max(len(decode), 6) + 1.5), width_ratios=(3, 2))
    names = [row["what"] for row in decode][::-1]
    left.barh(names, [row["faster"] for row in decode][::-1], color="tab:blue")
    for i, row in enumerate(decode[::-1]):
        left.text(row["faster"], i, f" {row['faster']:.2f}x, {row['share']:.0%} of floor", va="center", fontsize=8)
    left.axvline(1, color="black", linewidth=0.8)
    left.set_xlabel("times faster than the best bf16 SDPA on the same tokens")
    left.set_xlim(0, 1.4 * max([1.0, *[row["faster"] for row in decode]]))
    lengths = [int(row["what"].split()[0]) for row in prefill]
    right.plot(lengths, [row["ratio"] for row in prefill], "o-", label="with cumulative scores")
    window_ratios = [row["window_ratio"] for row in prefill]
    right.plot(lengths, window_ratios, "s-", label=f"with scores of the last {WINDOW} queries")
    right.axhline(1, color="black", linewidth=0.8)
    right.set(xlabel="prompt tokens", ylabel="time over the best SDPA alone")
    if prefill:
        right.set_xscale("log", base=2)
        right.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


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
            plot(bench.rows, args.plot)
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
        shapes = [(64, h, 2, 32), (128, b, 2, 64), (80, b, 2, 16), (256, f, 8, 128), (96, h, 4, 32), (128, b, 2, 16)]
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
        for batch in (1, 16) if not bench.dry else (1,):
            bench.guarded(f"flush B{batch}", functools.partial(flush_row, bench, batch))
    if "flex" in sections and not bench.dry:
        for case in (DECODE[5], DECODE[4], DECODE[0]):
            bench.guarded(f"flex {case.label}", functools.partial(flex_row, bench, case))


if __name__ == "__main__":
    main()
