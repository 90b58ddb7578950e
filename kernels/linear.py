"""Products of few rows with the weights of linear layers that read the same rows: the weights' bytes are all that they cost.

cuBLAS sees one weight at a time. One of 8 or 32 MB has too few tiles of outputs to keep a GPU's memory busy, so that it splits
the inputs, too, and sums the parts in a second kernel. Here the weights are one matrix, and the parts are summed by whoever
reads the product (Inductor fuses that). On an H200, for one row, q, k and v of Llama-3.1-8B: 15 us instead of 27, their bytes
take 12 (benchmarks/results/linear.json).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .jit import INTERPRET, to_fp32

MOST_ROWS = 16
"""Of an input: what one product of matrices takes."""
MOST_WEIGHTS = 3
TILE = 64
"""Outputs of a program. A weight has a multiple of it."""
STEP = 128
"""Inputs of a product. A weight has a multiple of it."""
PROGRAMS = 132
"""As many, at least: an H200 has so many multiprocessors."""
MOST_SPLITS = 8
WARPS = 4


def linear_reference(x: Tensor, weights: Sequence[Tensor], splits: int) -> Tensor:
    """As `linear_triton`."""
    parts = zip(x.float().chunk(splits, -1), torch.cat(list(weights)).float().chunk(splits, -1), strict=True)
    return torch.stack([part @ weight.mT for part, weight in parts])


def parts_of(outputs: int, inputs: int) -> int:
    """Into how many parts inputs are split."""
    splits = 1
    while splits < MOST_SPLITS and outputs // TILE * splits < PROGRAMS and inputs % (2 * splits * STEP) == 0:
        splits *= 2
    return splits


@triton.jit
def _linear_kernel(
    X, W0, W1, W2, OUT, COUNT: tl.constexpr, OUTPUTS: tl.constexpr, FIRST1: tl.constexpr, FIRST2: tl.constexpr,
    INPUTS: tl.constexpr, PART: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: TILE outputs, all of one weight, of PART of its inputs. Weights begin at outputs 0, FIRST1 and FIRST2; COUNT of
    the ROWS rows are there."""
    out, part, row, output = _products(X, W0, W1, W2, COUNT, FIRST1, FIRST2, INPUTS, PART, ROWS, TILE, STEP, STAGES)
    tl.store(OUT + (part * COUNT + row) * OUTPUTS + output, out, mask=row < COUNT)


@triton.jit
def _products(
    X, W0, W1, W2, COUNT: tl.constexpr, FIRST1: tl.constexpr, FIRST2: tl.constexpr, INPUTS: tl.constexpr, PART: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """(fp32 [ROWS, TILE], place of the part [1, 1], row [ROWS, 1], output [1, TILE])."""
    first = tl.program_id(0) * TILE
    part = tl.program_id(1)
    weight, begin = W0, 0
    if first >= FIRST2:
        weight, begin = W2, FIRST2
    elif first >= FIRST1:
        weight, begin = W1, FIRST1
    row = tl.arange(0, ROWS)
    output = tl.arange(0, TILE)
    k = part * PART + tl.arange(0, STEP)
    weight += (first - begin + output)[:, None] * INPUTS + k[None, :]
    x_ptr = X + row[:, None] * INPUTS + k[None, :]
    real = (row < COUNT)[:, None]
    out = tl.zeros([TILE, ROWS], tl.float32)
    for i in tl.range(0, PART, STEP, num_stages=STAGES):
        w = tl.load(weight + i)
        x = tl.load(x_ptr + i, mask=real, other=0.0)
        if INTERPRET:
            out = tl.dot(to_fp32(w), to_fp32(x).T, out)
        else:
            out = tl.dot(w, x.T, out)
    return out.T, tl.full([1, 1], 0, tl.int32) + part, row[:, None], (first + output)[None, :]


@dataclass(frozen=True)
class Launch:
    """How the kernel is launched."""

    grid: tuple[int, int]
    constants: dict[str, int]
    shape: tuple[int, int, int]
    """Of the output."""

    @classmethod
    def of(cls, rows: int, inputs: int, outputs: Sequence[int], splits: int) -> Launch:
        """`outputs`: of each weight."""
        ends = list(accumulate(outputs))
        total = ends[-1]
        # Large matrices have enough tiles of twice the size, which read the rows half as often.
        wide = total >= 2 * TILE * PROGRAMS and all(n % (2 * TILE) == 0 for n in outputs)
        first1, first2 = (*ends[:-1], total, total)[:2]
        tile = 2 * TILE if wide else TILE
        constants = dict(
            COUNT=rows, OUTPUTS=total, FIRST1=first1, FIRST2=first2, INPUTS=inputs, PART=inputs // splits, ROWS=MOST_ROWS,
            TILE=tile, STEP=STEP, STAGES=3 if wide else 4,
        )  # fmt: skip
        return cls((total // tile, splits), constants, (splits, rows, total))


def three(weights: Sequence[Any]) -> list[Any]:
    """`weights` as the kernel takes them."""
    return [*weights, *[weights[0]] * (MOST_WEIGHTS - len(weights))]


def linear_triton(x: Tensor, weights: Sequence[Tensor], splits: int) -> Tensor:
    """What each part of the inputs adds to the outputs of all weights. One launch.

    Args:
        x: fp16 or bf16 [rows, in], at most MOST_ROWS.
        weights: of x's dtype, each [out, in], contiguous, of less than 2**31 elements, at most MOST_WEIGHTS; out is a multiple
            of TILE.
        splits: of the inputs, each of a multiple of STEP.

    Returns:
        fp32 [splits, rows, sum of out], to be summed.
    """
    launch = Launch.of(*x.shape, [weight.shape[0] for weight in weights], splits)
    out = x.new_empty(launch.shape, dtype=torch.float32)
    _linear_kernel[launch.grid](x.contiguous(), *three(weights), out, **launch.constants, num_warps=WARPS)
    return out
