"""Around a flush: which rows flush and how much, and what is left of the dense region moves up.

The quantizing in between is `compress`. Nothing here depends on the host, so that a CUDA graph can hold it; where no row
is full, programs end at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .packing import BLOCK
from .state import IN_TIER, OFFSET, PINNED, STATE_COLUMNS

PART = 32
"""Tokens that a program moves at once."""


def plan_reference(state: Tensor, length: int, n: int, room: int, window: int, blocks: int) -> Tensor:
    """What leaves each row's dense region: int32 [4, batch]: tokens that leave it, blocks in its tier so far, tokens in it
    so far, and how many of those are pinned.

    Args:
        state: int32 [batch, COLUMNS] (`state`). length: logical tokens. n, room: rows that could not hold `n` more in
            `room` tokens behind the pinned ones are full, and give up whole blocks, at most `blocks`, of what is neither
            pinned nor window.
    """
    in_dense, pinned = length - state[:, OFFSET], state[:, PINNED]
    full = (in_dense - pinned + n > room).int()
    tokens = full * ((in_dense - pinned - window) // BLOCK).clamp(0, blocks) * BLOCK
    return torch.stack([tokens, state[:, IN_TIER] // BLOCK, in_dense, pinned]).int()


@triton.jit
def leaving(in_dense, pinned, n, room, window, blocks, BLOCK: tl.constexpr):
    """Tokens that leave a dense region, as in `plan_reference`."""
    tokens = tl.minimum(tl.maximum(in_dense - pinned - window, 0) // BLOCK, blocks) * BLOCK
    return tl.where(in_dense - pinned + n > room, tokens, 0)


@triton.jit(do_not_specialize=["length", "n", "room", "batch"])
def _plan_kernel(
    STATE, PLAN, length, n, room, window, blocks, batch, BLOCK: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = row < batch
    offset = tl.load(STATE + row * STATE_COLUMNS, mask=real, other=0)
    in_tier = tl.load(STATE + row * STATE_COLUMNS + 2, mask=real, other=0)
    pinned = tl.load(STATE + row * STATE_COLUMNS + 4, mask=real, other=0)
    in_dense = length - offset
    tl.store(PLAN + row, leaving(in_dense, pinned, n, room, window, blocks, BLOCK), mask=real)
    tl.store(PLAN + batch + row, in_tier // BLOCK, mask=real)
    tl.store(PLAN + 2 * batch + row, in_dense, mask=real)
    tl.store(PLAN + 3 * batch + row, pinned, mask=real)


def plan_triton(state: Tensor, length: int, n: int, room: int, window: int, blocks: int) -> Tensor:
    """`plan` as a Triton kernel."""
    batch, rows = state.shape[0], 32
    plan = torch.empty(4, batch, dtype=torch.int32, device=state.device)
    _plan_kernel[(triton.cdiv(batch, rows),)](
        state, plan, length, n, room, window, blocks, batch, BLOCK=BLOCK, ROWS=rows, num_warps=1,
    )  # fmt: skip
    return plan


def plan(state: Tensor, length: int, n: int, room: int, window: int, blocks: int) -> Tensor:
    """Which rows flush, and how much; arguments and result as in `plan_reference`."""
    return (plan_triton if state.is_cuda else plan_reference)(state, length, n, room, window, blocks)


def move_up_reference(dense: Tensor, state: Tensor, plan: Tensor) -> None:
    """Drop the tokens that left a dense region, behind its pinned ones, and count them in the state. In place.

    Args:
        dense: [batch, kv_heads, capacity, head_dim]. state: int32 [batch, COLUMNS] (`state`). plan: of `plan`.
    """
    slot = torch.arange(dense.shape[2], device=dense.device)
    for row, (leaving, _, used, pinned) in enumerate(plan.T.tolist()):
        kept = slot[:used][(slot[:used] < pinned) | (slot[:used] >= pinned + leaving)]
        dense[row, :, : len(kept)] = dense[row, :, kept]
    state[:, OFFSET] += plan[0]
    state[:, IN_TIER] += plan[0]


@triton.jit
def move_head_up(base, gone, used, pinned, D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr):
    """Drop `gone` tokens behind the pinned ones of one head's dense region at `base`. A block's source lies at least a block
    behind its target, so that in ascending order no store reaches what is still to be loaded, whichever thread comes
    first."""
    channel = tl.arange(0, DP)
    for first in range(pinned, used - gone, BLOCK):
        for part in tl.static_range(0, BLOCK, PART):
            slot = first + part + tl.arange(0, PART)
            mask = (slot < used - gone)[:, None] & (channel < D)[None, :]
            moved = tl.load(base + (slot + gone)[:, None] * D + channel[None, :], mask=mask)
            tl.store(base + slot[:, None] * D + channel[None, :], moved, mask=mask)
        tl.debug_barrier()


@triton.jit(do_not_specialize=["batch", "capacity"])
def _move_up_kernel(
    DENSE, STATE, PLAN, batch, capacity, HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BLOCK: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """One program: one head of one row."""
    row, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    gone = tl.load(PLAN + row)
    if gone > 0:
        base = DENSE + (row.to(tl.int64) * HEADS + head) * capacity * D
        used, pinned = tl.load(PLAN + 2 * batch + row), tl.load(PLAN + 3 * batch + row)
        move_head_up(base, gone, used, pinned, D, DP, BLOCK, PART)
        if head == 0:
            state = STATE + row * STATE_COLUMNS
            tl.store(state, tl.load(state) + gone)
            tl.store(state + 2, tl.load(state + 2) + gone)


def move_up_triton(dense: Tensor, state: Tensor, plan: Tensor) -> None:
    """`move_up` as a Triton kernel."""
    if not dense.is_contiguous():
        raise ValueError("move_up writes into a contiguous dense region only.")
    batch, heads, capacity, dim = dense.shape
    _move_up_kernel[(batch * heads,)](
        dense, state, plan, batch, capacity, HEADS=heads, D=dim,
        DP=triton.next_power_of_2(dim), BLOCK=BLOCK, PART=PART, num_warps=4,
    )  # fmt: skip


def move_up(dense: Tensor, state: Tensor, plan: Tensor) -> None:
    """What is left of a dense region moves up; arguments as in `move_up_reference`."""
    (move_up_triton if dense.is_cuda else move_up_reference)(dense, state, plan)
