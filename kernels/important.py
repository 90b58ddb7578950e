"""Which tokens are held apart: how far keys lie from the mean key of their head, and the order of storage."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .jit import to_fp32, unit_last

AVERAGED = 256
"""Keys, at least, whose mean is taken: of a longer prompt, every second, third, ... key."""


def _mean(keys: Tensor) -> Tensor:
    """fp32 [kv_heads, head_dim]. What is not finite counts as 0, so that one such key does not move all others."""
    return keys[:, :: max(1, keys.shape[1] // AVERAGED)].float().nan_to_num(0.0, 0.0, 0.0).mean(1)


def distance_from_mean_reference(keys: Tensor) -> Tensor:
    """The squared distance of each key from the mean key (of about `AVERAGED`), in plain PyTorch.

    Args:
        keys: [kv_heads, n, head_dim], any strides.

    Returns:
        fp32 [kv_heads, n]; 0 where it is not finite.
    """
    return (keys.float() - _mean(keys)[:, None]).square().sum(-1).nan_to_num(0.0, 0.0, 0.0)


@triton.jit(do_not_specialize=["count", "step"])
def _mean_kernel(
    KEYS, OUT, stride_h, stride_n, count, step, D: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """One program: CHANNELS channels of one head, of every `step`-th of its tokens."""
    head = tl.program_id(0).to(tl.int64)
    token = tl.arange(0, TOKENS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    at = KEYS + head * stride_h + (token * step).to(tl.int64)[:, None] * stride_n + channel[None, :]
    keys = to_fp32(tl.load(at, mask=(token < count)[:, None] & (channel < D)[None, :], other=0.0))
    mean = tl.sum(tl.where(tl.abs(keys) < float("inf"), keys, 0.0), 0) / count
    tl.store(OUT + head * D + channel, mean, mask=channel < D)


def _mean_triton(keys: Tensor) -> Tensor:
    """`_mean` as a Triton kernel: one launch, where torch makes four."""
    heads, n, dim = keys.shape
    step = max(1, n // AVERAGED)
    out = torch.empty(heads, dim, dtype=torch.float32, device=keys.device)
    _mean_kernel[heads, triton.cdiv(dim, 16)](
        keys, out, *keys.stride()[:2], triton.cdiv(n, step), step, D=dim, TOKENS=2 * AVERAGED, CHANNELS=16, num_warps=4
    )
    return out


@triton.jit(do_not_specialize=["n"])
def _distance_kernel(
    KEYS, MEAN, OUT, stride_h, stride_n, n, D: tl.constexpr, DP: tl.constexpr, TOKENS: tl.constexpr
):  # fmt: skip
    """One program: TOKENS tokens of one head."""
    head = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    channel = tl.arange(0, DP)
    at = KEYS + head * stride_h + token.to(tl.int64)[:, None] * stride_n + channel[None, :]
    keys = to_fp32(tl.load(at, mask=(token < n)[:, None] & (channel < D)[None, :], other=0.0))
    away = keys - tl.load(MEAN + head * D + channel, mask=channel < D, other=0.0)[None, :]
    distance = tl.sum(away * away, 1)
    tl.store(OUT + head * n + token, tl.where(distance < float("inf"), distance, 0.0), mask=token < n)


def distance_from_mean_triton(keys: Tensor) -> Tensor:
    """`distance_from_mean` as Triton kernels: the keys are read once, and nothing of their size is made."""
    keys = unit_last(keys)
    heads, n, dim = keys.shape
    out = torch.empty(heads, n, dtype=torch.float32, device=keys.device)
    tokens = 32
    _distance_kernel[(triton.cdiv(n, tokens), heads)](
        keys, _mean_triton(keys), out, *keys.stride()[:2], n, D=dim, DP=triton.next_power_of_2(dim), TOKENS=tokens, num_warps=4
    )
    return out


def distance_from_mean(keys: Tensor) -> Tensor:
    """Arguments and result as in `distance_from_mean_reference`."""
    run = distance_from_mean_triton if keys.is_cuda else distance_from_mean_reference
    return run(keys)


NO_TOKEN = 2**31 - 1
"""Stands behind the important tokens of rows that have fewer than others."""


def stored_order_reference(important: Tensor, counts: Tensor, n: int, sinks: int) -> Tensor:
    """Tokens in the order of storage: sinks, important tokens, the rest; in plain PyTorch.

    Args:
        important: int64 [batch, kv_heads, most], of row b `counts[b]` tokens, ascending, none of them one of the first
            `sinks` tokens; then NO_TOKEN.
        counts: int [batch].

    Returns:
        int64 [batch, kv_heads, n].
    """
    slot = torch.arange(n, device=important.device).expand(*important.shape[:2], -1)
    token = slot - counts[:, None, None]
    # Important token m has `important[m] - m` others before it.
    others_before = important - torch.arange(important.shape[2], device=important.device)
    others_before = torch.where(important == NO_TOKEN, NO_TOKEN, others_before)
    rest = token + torch.searchsorted(others_before, token.contiguous(), right=True)
    if important.shape[2]:
        apart = important.gather(2, (slot - sinks).clamp(0, important.shape[2] - 1))
        rest = torch.where(token < sinks, apart, rest)
    return torch.where(slot < sinks, slot, rest)


@triton.jit(do_not_specialize=["n", "sinks", "most"])
def _order_kernel(
    IMPORTANT, COUNTS, OUT, n, sinks, most, stride_counts, HEADS: tl.constexpr, COUNT: tl.constexpr, SLOTS: tl.constexpr
):  # fmt: skip
    """One program: SLOTS slots of one head of a row."""
    row = tl.program_id(1).to(tl.int64)
    slot = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    count = tl.load(COUNTS + row // HEADS * stride_counts).to(tl.int32)
    token = slot - count
    before = tl.zeros([SLOTS], tl.int32)
    for low in range(0, count, COUNT):
        m = low + tl.arange(0, COUNT)
        important = tl.load(IMPORTANT + row * most + m, mask=m < count, other=2**30).to(tl.int32)
        before += tl.sum(((important - m)[None, :] <= token[:, None]).to(tl.int32), 1)
    rest = token + before
    apart = tl.load(IMPORTANT + row * most + slot - sinks, mask=(slot >= sinks) & (token < sinks), other=0)
    stored = tl.where(slot < sinks, slot, tl.where(token < sinks, apart, rest))
    tl.store(OUT + row * n + slot, stored.to(tl.int64), mask=slot < n)


def stored_order_triton(important: Tensor, counts: Tensor, n: int, sinks: int) -> Tensor:
    """`stored_order` as a Triton kernel: one launch."""
    batch, heads, most = important.shape
    out = torch.empty(batch, heads, n, dtype=torch.int64, device=important.device)
    slots = 64
    _order_kernel[(triton.cdiv(n, slots), batch * heads)](
        important.contiguous(), counts, out, n, sinks, most, counts.stride(0), HEADS=heads,
        COUNT=min(triton.next_power_of_2(max(most, 1)), 128), SLOTS=slots, num_warps=4,
    )  # fmt: skip
    return out


def stored_order(important: Tensor, counts: Tensor, n: int, sinks: int) -> Tensor:
    """Arguments and result as in `stored_order_reference`."""
    run = stored_order_triton if important.is_cuda else stored_order_reference
    return run(important, counts, n, sinks)
