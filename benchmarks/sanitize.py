"""Launches every kernel at small shapes, for a memory checker to watch.

    python benchmarks/sanitize.py                  # runs compute-sanitizer's memcheck, racecheck and initcheck
    compute-sanitizer --tool memcheck python benchmarks/sanitize.py --launch

The kernels are compiled by a run without the checker, which would slow the compiler down. PyTorch's allocator is told
not to cache, so that each tensor is an allocation of its own and an access just past it is seen.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial

import _path  # noqa: F401
import torch
import triton

from minikv_compile.kernels.attend import Important, attend_triton
from minikv_compile.kernels.compress import compress_triton, dense_region_triton, empty_packed
from minikv_compile.kernels.flush import flush_triton
from minikv_compile.kernels.important import distance_from_mean_triton, stored_order_triton
from minikv_compile.kernels.linear import STEP, TILE, linear_triton
from minikv_compile.kernels.packing import BLOCK, value_group
from minikv_compile.kernels.scores import column_scores_triton
from minikv_compile.kernels.select import bitmask_triton, highest_triton
from minikv_compile.kernels.tuning import MANY_KEYS, scores_tuning
from minikv_compile.rotation import hadamard

DEVICE = "cuda"
"""The tests launch on the CPU, in Triton's interpreter, and watch addresses there."""

TOOLS = ("memcheck", "racecheck", "initcheck")
ATTEND = [
    dict(),
    dict(dim=64),
    dict(dim=64, dtype=torch.float16, bits=4, group=32),
    dict(dim=80, group=16, heads=14, rotate=False),
    dict(dim=128, group=16, axis="channel", bits=8, new=3),
    dict(dim=128, tier=False),
    dict(dim=128, group=64, axis="channel", rotate=False, important_bits=4),
    dict(metadata_bits=8, noise=1 / 24, group=128),
    dict(dim=64, metadata_bits=8, noise=1 / 24, group=128),
    dict(dim=80, metadata_bits=8, group=16, bits=4, axis="channel"),
]
"""Head dimensions with and without padding, one and two sides, each width of codes, groups along tokens and channels, no tier,
an important one, metadata of 8 bits."""


def counters(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.zeros(n, dtype=torch.int32, device=x.device) for n in ((x.shape[0], x.shape[2]), x.shape[0]))


def attend(
    dim=128, dtype=torch.bfloat16, bits=2, group=64, axis="token", heads=8, new=1, rotate=True, tier=True,
    important_bits=0, metadata_bits=16, noise=0.0,
) -> None:  # fmt: skip
    """Two ragged rows, of which the second has no block in its tier."""
    batch, kv_heads, blocks, length = 2, 2, 2, 1000
    rotation = hadamard(dim).to(DEVICE) if rotate else None
    tokens = torch.tensor([blocks * BLOCK, 0], dtype=torch.int32, device=DEVICE)
    k_group = group if axis == "token" else value_group(group, dim)
    x = torch.randn(batch, kv_heads, blocks * BLOCK, dim, device=DEVICE).to(dtype)
    balancer = torch.rand(batch, kv_heads, dim, device=DEVICE) + 0.5 if important_bits else None

    def packed(bits):
        return [
            compress_triton(
                x, None, 0, tokens, blocks, bits, g, a, layout, rotation, counted=counters(x),
                balancer=balancer if layout == "key" else None, metadata_bits=metadata_bits,
            )  # fmt: skip
            for layout, g, a in (("key", k_group, axis), ("value", value_group(group, dim), "channel"))
        ]

    tiers = packed(bits)
    important = Important(*packed(important_bits), important_bits) if important_bits else None
    dense = [torch.randn(batch, kv_heads, 70, dim, device=DEVICE).to(dtype) for _ in range(2)]
    offset = torch.tensor([length - 70, length - new], device=DEVICE)
    none = torch.zeros_like(offset)
    state = torch.stack([offset, none, tokens, none, none, tokens if important_bits else none], -1).int()
    q, k, v = (torch.randn(batch, h, new, dim, device=DEVICE).to(dtype) for h in (heads, kv_heads, kv_heads))
    k_tier, v_tier = tiers if tier else (None, None)
    attend_triton(q, k, v, k_tier, v_tier, *dense, state, length, dim**-0.5, bits, k_group, axis,
                  value_group(group, dim), rotation if tier else None, balancer, important, noise)  # fmt: skip


def compress(dim: int, dtype: torch.dtype, layout: str, group: int, rotate: bool, fed: bool = False) -> None:
    """Gathered tokens, with error feedback or without, then the dense region that is left."""
    batch, kv_heads, seq = 2, 2, 300
    x = torch.randn(batch, kv_heads, seq, dim, device=DEVICE).to(dtype)
    x[0, 0, 7, 3] = torch.inf
    index = torch.rand(batch, kv_heads, seq, device=DEVICE).argsort(-1)
    tokens = torch.tensor([2 * BLOCK, BLOCK], dtype=torch.int32, device=DEVICE)
    axis = "token" if layout == "key" else "channel"
    counted = counters(x)
    compress_triton(
        x, index, 4, tokens, 2, 2, group, axis, layout, hadamard(dim).to(DEVICE) if rotate else None, counted=counted,
        factors=torch.randn(batch, kv_heads, dim, dim, device=DEVICE) / dim if fed else None,
    )  # fmt: skip
    dense_region_triton(x, index, 4, tokens, seq - tokens, 200, counted)


def scores(dim: int, dtype: torch.dtype, last: int | None, keys: int = 0) -> None:
    """Two rows of different length, in the tiles for `keys` keys."""
    q, k = (torch.randn(2, h, 200, dim, device=DEVICE).to(dtype) for h in (4, 2))
    lse = torch.randn(2, 4, 200, device=DEVICE)
    tuning = scores_tuning(triton.next_power_of_2(dim), q.element_size(), keys)
    column_scores_triton(q, k, lse, dim**-0.5, torch.tensor([200, 77], device=DEVICE), last, tuning=tuning)


def highest(rows: int, n: int) -> None:
    highest_triton(torch.rand(rows, n, device=DEVICE), 100)


def important(dim: int, n: int) -> None:
    """Tokens that are held apart, the order of storage, and which ones are kept, in bits."""
    distance = distance_from_mean_triton(torch.randn(3, n, dim, device=DEVICE).bfloat16())
    order = stored_order_triton(highest_triton(distance, 64)[None], torch.tensor([64], dtype=torch.int32, device=DEVICE), n, 0)
    bitmask_triton(order, torch.tensor([n - 7], dtype=torch.int32, device=DEVICE), n)


def flush(dim: int) -> None:
    """Two rows, of which one is full: it flushes two blocks."""
    state = torch.tensor([[250, 0, 0, 0, 4, 0], [0, 0, BLOCK, 0, 4, 0]], dtype=torch.int32, device=DEVICE)
    layers = []
    for layout, group, axis in (("key", BLOCK, "token"), ("value", 16, "channel")):
        dense = torch.randn(2, 3, 384, dim, device=DEVICE)
        tier = empty_packed(2, 3, 4, dim, 2, group, axis, layout, dense.device)
        layers.append([(*tier, dense, state.clone(), dense)])
    flush_triton(*layers, 384, 1, 300, 64, 2, 2, (BLOCK, 16), ("token", "channel"), hadamard(dim).to(DEVICE), False, 1.0)


def linear(splits: int) -> None:
    """Three rows that lie apart, weights of one, two and three tiles."""
    x = torch.randn(3, 2 * splits * STEP + 8, device=DEVICE).bfloat16()[:, :-8]
    linear_triton(x, [torch.randn(n * TILE, x.shape[1], device=DEVICE).bfloat16() for n in (1, 2, 3)], splits)


LAUNCHES = {
    **{f"attend {i}": partial(attend, **case) for i, case in enumerate(ATTEND)},
    "compress keys": partial(compress, 128, torch.bfloat16, "key", 64, True),
    "compress values": partial(compress, 128, torch.bfloat16, "value", 64, True),
    "compress padded": partial(compress, 80, torch.float16, "value", 16, False),
    "compress fed back": partial(compress, 80, torch.bfloat16, "key", 64, True, fed=True),
    "compress wide, fed back": partial(compress, 256, torch.bfloat16, "key", 64, True, fed=True),
    "scores": partial(scores, 128, torch.bfloat16, None),
    "scores wide": partial(scores, 128, torch.bfloat16, None, MANY_KEYS),
    "scores last": partial(scores, 80, torch.float16, 64),
    "highest": partial(highest, 4, 1000),
    "highest of many": partial(highest, 2, 40000),
    "important": partial(important, 128, 5000),
    "important padded": partial(important, 80, 190),
    "flush": partial(flush, 80),
    "linear": partial(linear, 1),
    "linear in parts": partial(linear, 4),
}
"""Every kernel once or more."""


def launch() -> None:
    torch.manual_seed(0)
    for run in LAUNCHES.values():
        run()
    torch.cuda.synchronize()
    print("launched")


def output_of(run: subprocess.Popen, seconds: float) -> str:
    """What a process of a session of its own prints; it is ended after so long, with those that it began."""
    try:
        return run.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        end(run)
        return run.communicate()[0] + "\nnot done in time"


def end(run: subprocess.Popen) -> None:
    with suppress(ProcessLookupError):  # those that it began may be left where it is not
        os.killpg(run.pid, signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--launch", action="store_true", help="only launch the kernels, for a checker outside")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for all tools, which run at once")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")  # here: tests that import this file capture CUDA graphs
    launch()
    if args.launch:
        return
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        parser.error("compute-sanitizer is not installed")
    runs = {
        tool: subprocess.Popen(
            [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, __file__, "--launch"],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )
        for tool in TOOLS
    }  # fmt: skip
    failed, start = False, time.perf_counter()
    try:
        for tool, run in runs.items():
            output = output_of(run, max(1.0, args.timeout - (time.perf_counter() - start)))
            failed |= run.returncode != 0
            words = ("=========", "launched", "not done")
            lines = [line for line in output.splitlines() if line.startswith(words)]
            print(f"{tool}: exit {run.returncode}", *(lines[-40:] if run.returncode else lines[-2:]), sep="\n  ")
    finally:  # Ctrl-C does not reach sessions of their own
        for run in runs.values():
            end(run)
    sys.exit(failed)


if __name__ == "__main__":
    main()
