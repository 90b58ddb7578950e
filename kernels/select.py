"""The tokens with the highest scores, in the order of their positions, and which ones they are, in bits."""

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
def _bits(SCORES, PLACES, low, n, TILE: tl.constexpr, AMONG: tl.constexpr):
    """Scores `low ... low + TILE - 1` of `n`, or, with AMONG, those at PLACES. Numbers that are not negative are ordered as
    their bits are."""
    at = low + tl.arange(0, TILE)
    real = at < n
    if AMONG:
        at = tl.load(PLACES + at, mask=real, other=-1)
        real = at >= 0
    return tl.load(SCORES + at, mask=real, other=-1.0).to(tl.int32, bitcast=True)


@triton.jit(do_not_specialize=["n", "count", "width"])
def _highest_kernel(
    SCORES, PLACES, OUT, stride, n, count, width, TILE: tl.constexpr, ONE_TILE: tl.constexpr, AMONG: tl.constexpr
):  # fmt: skip
    """One program: a shard of `width` scores of a row of `n`, which it reads once for each two bits, or once where it fits in
    registers; until as many scores as wanted reach the threshold, which seldom takes all bits.

    OUT [rows, shards, count]: positions in the row, -1 where the shard has too few. AMONG: of the row's scores only those
    at PLACES [rows, n] count, where these are not -1.
    """
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * width
    SCORES += row * stride + start
    PLACES += row * n
    OUT += (row * tl.num_programs(1) + tl.program_id(1)) * count
    wanted = count
    n = tl.minimum(n - start, width)
    count = tl.minimum(count, n)
    bits = _bits(SCORES, PLACES, 0, n, TILE, AMONG)
    threshold = 0  # what `count` scores reach; two more bits of the largest such number a round
    reached = n  # by how many
    i = 0
    while (i < 16) & (reached != count):
        first = threshold | (1 << (30 - 2 * i))
        # Bit 31 is the sign: in the first round there is only one candidate.
        high = 1 << tl.minimum(30 - 2 * i, 28)
        second = tl.where(i == 0, first, threshold | (2 * high))
        third = tl.where(i == 0, first, threshold | (3 * high))
        if ONE_TILE:
            both = tl.sum((bits >= first).to(tl.int32) + ((bits >= second).to(tl.int32) << 15))  # TILE < 2**15
            firsts, seconds = both & 0x7FFF, both >> 15
            thirds = tl.sum((bits >= third).to(tl.int32))
        else:
            zero = tl.zeros([TILE], tl.int32)
            found, found2, found3 = zero, zero, zero
            for low in range(0, n, TILE):
                bits = _bits(SCORES, PLACES, low, n, TILE, AMONG)
                found += (bits >= first).to(tl.int32)
                found2 += (bits >= second).to(tl.int32)
                found3 += (bits >= third).to(tl.int32)
            firsts, seconds, thirds = tl.sum(found), tl.sum(found2), tl.sum(found3)
        threshold = tl.where(firsts >= count, first, threshold)
        threshold = tl.where(seconds >= count, second, threshold)
        threshold = tl.where(thirds >= count, third, threshold)
        reached = tl.where(firsts >= count, firsts, reached)
        reached = tl.where(seconds >= count, seconds, reached)
        reached = tl.where(thirds >= count, thirds, reached)
        i += 1

    # Of the scores at the threshold, the first ones. Counts of both kinds go through one scan.
    above = tl.sum((bits > threshold).to(tl.int32))
    if not ONE_TILE:
        above = 0
        for low in range(0, n, TILE):
            above += tl.sum((_bits(SCORES, PLACES, low, n, TILE, AMONG) > threshold).to(tl.int32))
    ties = count - above
    done = 0
    for low in range(0, n, TILE):
        if not ONE_TILE:
            bits = _bits(SCORES, PLACES, low, n, TILE, AMONG)
        both = (bits > threshold).to(tl.int32) + ((bits == threshold).to(tl.int32) << 15)
        before = tl.cumsum(both, 0)
        ties_before = before >> 15
        taken = (bits > threshold) | ((bits == threshold) & (ties_before <= ties))
        place = done + (before & 0x7FFF) + tl.minimum(ties_before, ties) - 1
        at = low + tl.arange(0, TILE)
        position = tl.load(PLACES + at, mask=taken, other=-1) if AMONG else (start + at).to(tl.int64)
        tl.store(OUT + place, position, mask=taken)
        if not ONE_TILE:
            done += tl.sum(taken.to(tl.int32))
            ties -= tl.minimum(tl.sum((bits == threshold).to(tl.int32)), ties)
    for place in range(count, wanted):
        tl.store(OUT + place, tl.full([], -1, tl.int64))


SHARD = 512
"""Scores that one warp holds in registers."""


def highest_triton(scores: Tensor, count: int) -> Tensor:
    """`highest` as a Triton kernel: one launch, where torch sorts twice; or two, where few of many are wanted: a program has a
    row to itself, and most multiprocessors none, so shards of it come first."""
    rows, n = scores.shape
    scores = scores if scores.stride(-1) == 1 else scores.contiguous()
    shards = triton.cdiv(n, SHARD)
    if 0 < 8 * count <= SHARD and n >= 8 * SHARD:
        first = _launch_highest(scores, None, count, shards)
        return _launch_highest(scores, first.flatten(1), count, 1)[:, 0]
    return _launch_highest(scores, None, count, 1)[:, 0]


def _launch_highest(scores: Tensor, places: Tensor | None, count: int, shards: int) -> Tensor:
    """Positions of the `count` highest scores of each shard, or of those at `places`: int64 [rows, shards, count]."""
    n = scores.shape[1] if places is None else places.shape[1]
    out = torch.empty(scores.shape[0], shards, count, dtype=torch.int64, device=scores.device)
    if count:
        width = n if shards == 1 else SHARD
        tile = min(max(triton.next_power_of_2(width), SHARD), 16384)
        warps = 1 if tile == SHARD else max(tile // 2048, 4)
        _highest_kernel[scores.shape[0], shards](
            scores, out if places is None else places, out, scores.stride(0), n, count, width, TILE=tile, ONE_TILE=width <= tile,
            AMONG=places is not None, num_warps=warps,
        )  # fmt: skip
    return out


def highest(scores: Tensor, count: int) -> Tensor:
    """Arguments and result as in `highest_reference`."""
    run = highest_triton if scores.is_cuda else highest_reference
    return run(scores, count)


def bitmask_reference(index: Tensor, counts: Tensor, n: int) -> Tensor:
    """Which of `n` tokens are among `index`, in plain PyTorch.

    Args:
        index: int64 [batch, heads, kept], below `n`. counts: int [batch]: only the first so many of a row count.

    Returns:
        uint8 [batch, heads, ceil(n / 8)]: bit s % 8 of byte s // 8 stands for token s.
    """
    batch, heads, kept = index.shape
    mask = torch.zeros(batch, heads, -(-n // 8) * 8 + 1, dtype=torch.bool, device=index.device)
    real = torch.arange(kept, device=index.device) < counts[:, None, None]
    mask.scatter_(2, torch.where(real, index, mask.shape[-1] - 1), True)
    bits = mask[..., :-1].unflatten(-1, (-1, 8)).to(torch.uint8) << torch.arange(8, dtype=torch.uint8, device=mask.device)
    return bits.sum(-1, dtype=torch.uint8)


@triton.jit(do_not_specialize=["kept", "words"])
def _bitmask_kernel(
    INDEX, COUNTS, OUT, stride_b, stride_h, stride_k, stride_counts, kept, words, HEADS: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """One program: TILE places of one head of a row."""
    row = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * TILE + tl.arange(0, TILE)
    real = (place < kept) & (place < tl.load(COUNTS + row // HEADS * stride_counts))
    at = INDEX + row // HEADS * stride_b + row % HEADS * stride_h + place.to(tl.int64) * stride_k
    token = tl.load(at, mask=real, other=0)
    bit = tl.full([TILE], 1, tl.int32) << (token % 32).to(tl.int32)
    tl.atomic_or(OUT + row * words + token // 32, bit, mask=real)


def bitmask_triton(index: Tensor, counts: Tensor, n: int) -> Tensor:
    """`bitmask` as a Triton kernel. In words of 32 bits, whose bytes are in ascending order."""
    batch, heads, kept = index.shape
    words = triton.cdiv(n, 32)
    out = torch.zeros(batch, heads, words, dtype=torch.int32, device=index.device)
    tile = 256
    _bitmask_kernel[(triton.cdiv(kept, tile), batch * heads)](
        index, counts, out, *index.stride(), counts.stride(0), kept, words, HEADS=heads, TILE=tile, num_warps=4
    )
    return out.view(torch.uint8)[..., : -(-n // 8)].contiguous()


def bitmask(index: Tensor, counts: Tensor, n: int) -> Tensor:
    """Arguments and result as in `bitmask_reference`."""
    run = bitmask_triton if index.is_cuda else bitmask_reference
    return run(index, counts, n)
