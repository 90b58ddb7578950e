"""The tokens with the highest scores, in the order of their positions."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def highest_reference(scores: Tensor, count: int) -> Tensor:
    """Positions of the `count` highest scores of each row, ascending, in plain PyTorch.

    Args:
        scores: fp32 [rows, n], none negative. Which of equal scores are taken is open.

    Returns:
        int64 [rows, count].
    """
    return scores.topk(count, dim=-1).indices.sort(-1).values


@triton.jit
def _bits(SCORES, row, stride, low, n, TILE: tl.constexpr):
    """Numbers that are not negative are ordered as their bits are."""
    at = low + tl.arange(0, TILE)
    return tl.load(SCORES + row * stride + at, mask=at < n, other=-1.0).to(tl.int32, bitcast=True)


@triton.jit(do_not_specialize=["n", "count"])
def _highest_kernel(SCORES, OUT, stride, n, count, TILE: tl.constexpr, ONE_TILE: tl.constexpr):
    """One program: one row, which it reads once for each bit, or once where it fits in registers."""
    row = tl.program_id(0).to(tl.int64)
    bits = _bits(SCORES, row, stride, 0, n, TILE)
    threshold = 0
    for i in range(31):
        candidate = threshold | (1 << (30 - i))
        found = tl.zeros([TILE], tl.int32)
        for low in range(0, n, TILE):
            if not ONE_TILE:
                bits = _bits(SCORES, row, stride, low, n, TILE)
            found += (bits >= candidate).to(tl.int32)
        threshold = tl.where(tl.sum(found) >= count, candidate, threshold)
    found = tl.zeros([TILE], tl.int32)
    for low in range(0, n, TILE):
        if not ONE_TILE:
            bits = _bits(SCORES, row, stride, low, n, TILE)
        found += (bits > threshold).to(tl.int32)
    ties = count - tl.sum(found)  # of the scores at the threshold, the first ones

    done = 0
    for low in range(0, n, TILE):
        if not ONE_TILE:
            bits = _bits(SCORES, row, stride, low, n, TILE)
        tie = (bits == threshold).to(tl.int32)
        taken = (bits > threshold) | ((tie > 0) & (tl.cumsum(tie, 0) <= ties))
        place = done + tl.cumsum(taken.to(tl.int32), 0) - 1
        tl.store(OUT + row * count + place, (low + tl.arange(0, TILE)).to(tl.int64), mask=taken)
        done += tl.sum(taken.to(tl.int32))
        ties -= tl.sum(tie)


def highest_triton(scores: Tensor, count: int) -> Tensor:
    """`highest` as a Triton kernel: one launch, where torch sorts twice."""
    rows, n = scores.shape
    scores = scores if scores.stride(-1) == 1 else scores.contiguous()
    out = torch.empty(rows, count, dtype=torch.int64, device=scores.device)
    if count:
        tile = min(max(triton.next_power_of_2(n), 1024), 16384)
        _highest_kernel[rows,](
            scores, out, scores.stride(0), n, count, TILE=tile, ONE_TILE=n <= tile, num_warps=tile // 512
        )  # fmt: skip
    return out


def highest(scores: Tensor, count: int) -> Tensor:
    """Arguments and result as in `highest_reference`."""
    run = highest_triton if scores.is_cuda else highest_reference
    return run(scores, count)
