"""Flush: the oldest tokens of full dense regions are quantized into the tier, and what is left moves up. For all layers of a
cache at once, in three launches (head dimensions that are no power of two, or more than 128, take more).

A step in which no row is full, and that is nearly every one, should cost nothing: what grows with the number of layers
is not launches but programs that end at once. So the kernels take the addresses of all layers' tensors from a table in
device memory. The first plans (`_plan_kernel`), and two more, for keys and for values, quantize what leaves a full row's
dense region and move up what is left of it (`_flush_kernel`). (A launch for each chunk of channels: two in one program gave
wrong scales for the second on an H200, Triton 3.6, and right ones in the interpreter.) Nothing here depends on the host, so
that a CUDA graph can hold it.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .compress import _launches, _signs, compress_reference, pack_block
from .jit import dot_precision, operand_dtype
from .packing import BLOCK, WORD_BITS, GroupAxis, largest_metadata
from .state import IN_TIER, NOT_FINITE, OFFSET, PINNED, STATE_COLUMNS
from .tuning import compress_tuning

PART = 32
"""Tokens that a program moves at once."""

FIELDS = 7
"""Columns of a table: the addresses of codes, scale, zero, dense, state and balancer, and how many blocks the tier has room for:
budgets differ from layer to layer. A row per layer's keys, then per layer's values."""

_tables: dict[tuple[int, ...], Tensor] = {}
"""Kept tables, by what is in them. A captured graph reads its table for as long as it is replayed, so a table lives as
long as the first of the storages whose addresses it holds."""


def table_of(keys: Sequence[Sequence[Tensor]], values: Sequence[Sequence[Tensor]], keep: bool = False) -> Tensor:
    """int64, on the device: `FIELDS` of each of these. `keep`: and the next call with these tensors finds it.

    Raises:
        RuntimeError: a CUDA graph is being captured, and no table of these tensors was kept before.
    """
    name = tuple(x for tensors in (*keys, *values) for x in (*(t.data_ptr() for t in tensors), tensors[0].shape[2]))
    if name in _tables:
        return _tables[name]
    state = (*keys, *values)[0][4]
    if state.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "A CUDA graph can hold steps of one token only, after one that was not captured: run a step on this MiniKVCache first."
        )
    table = torch.tensor(name, dtype=torch.int64, device=state.device)
    if keep:
        _tables[name] = table
        weakref.finalize(state.untyped_storage(), _tables.pop, name, None)
    return table


def plan_reference(state: Tensor, length: int, n: int, room: int, window: int, blocks: int) -> Tensor:
    """What leaves each row's dense region: int32 [4, batch]: tokens that leave it, blocks in its tier so far, tokens in
    the region so far, and how many of those are pinned.

    Args:
        state: int32 [batch, COLUMNS] (`state`). length: logical tokens. n, room: rows that could not hold `n` more in
            `room` tokens behind the pinned ones are full, and give up whole blocks, at most `blocks`, of what is neither
            pinned nor window.
    """
    in_dense, pinned = length - state[:, OFFSET], state[:, PINNED]
    full = (in_dense - pinned + n > room).int()
    tokens = full * ((in_dense - pinned - window) // BLOCK).clamp(0, blocks) * BLOCK
    return torch.stack([tokens, state[:, IN_TIER] // BLOCK, in_dense, pinned]).int()


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


def flush_reference(
    keys: Sequence[Sequence[Tensor]], values: Sequence[Sequence[Tensor]], length: int, n: int, room: int, window: int,
    blocks: int, bits: int, groups: Sequence[int], axes: Sequence[GroupAxis], rotation: Tensor | None, balanced: bool,
    clip: float, counted: int = 0,
) -> Tensor:  # fmt: skip
    """Move the oldest tokens of full rows' dense regions that are neither pinned nor window into the tier, in whole blocks,
    in place.

    Args:
        keys, values: codes, scale, zero, dense, state and balancer of each layer, contiguous, and alike but for the tier's
            blocks. Where not `balanced`, and for values, the last is anything.
        length, n, room, window, blocks: as of `plan_reference`.
        bits, groups, axes, rotation, clip: as of `compress`; of the keys, and of the values.
        counted: how many new tokens the states count from then on, beside those that leave: where `length` is 0 for good,
            and an offset is minus the tokens of the dense region.

    Returns:
        bools, of which one is False where a tier has no room for what left a dense region: it is lost.
    """
    fits = []
    for held, group, axis, layout in zip((keys, values), groups, axes, ("key", "value"), strict=True):
        for *tier, dense, state, balancer in held:
            plan = plan_reference(state, length, n, room, window, blocks)
            seen = torch.zeros(dense.shape[0], dense.shape[2], dtype=torch.int32, device=dense.device)
            packed = compress_reference(
                dense, None, plan[3], plan[0], blocks, bits, group, axis, layout, rotation, clip,
                (seen, state[:, NOT_FINITE]), balancer if balanced and layout == "key" else None, 8 * tier[1].itemsize,
            )  # fmt: skip
            for row, (tokens, first, *_) in enumerate(plan.T.tolist()):
                for target, source in zip(tier, packed, strict=True):
                    place = target[row, :, first : first + tokens // BLOCK]  # of a tier that is full, what there is
                    place.copy_(source[row, :, : place.shape[1]])
            move_up_reference(dense, state, plan)
            state[:, OFFSET] -= counted
            fits.append(state[:, IN_TIER] <= tier[0].shape[2] * BLOCK)
    return torch.cat(fits)


@triton.jit
def leaving(in_dense, pinned, n, room, window, blocks, BLOCK: tl.constexpr):
    """Tokens that leave a dense region, as in `plan_reference`."""
    tokens = tl.minimum(tl.maximum(in_dense - pinned - window, 0) // BLOCK, blocks) * BLOCK
    return tl.where(in_dense - pinned + n > room, tokens, 0)


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


@triton.jit(do_not_specialize=["length", "n", "counted", "capacity", "room", "window", "blocks", "batch"])
def _plan_kernel(
    TABLE, PLAN, SEEN, FITS, length, n, counted, capacity, room, window, blocks, batch,
    FIELDS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: ROWS rows of one layer's keys or values. What will leave, and new tokens, count in the state.

    PLAN int32 [layers, 4, batch]: as of `plan_reference`. SEEN int32 [layers, batch, capacity]: zeros where a row flushes.
    FITS bool, of each program: whether the tier has room for what will leave. `layers` counts keys and values.
    """
    layer = tl.program_id(0)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    real = row < batch
    state = tl.load(TABLE + layer * FIELDS + 4).to(tl.pointer_type(tl.int32)) + row * STATE_COLUMNS
    offset = tl.load(state, mask=real, other=0)
    in_tier = tl.load(state + 2, mask=real, other=0)
    pinned = tl.load(state + 4, mask=real, other=0)
    gone = tl.where(real, leaving(length - offset, pinned, n, room, window, blocks, BLOCK), 0)
    plan = PLAN + layer * 4 * batch + row
    tl.store(plan, gone, mask=real)
    tl.store(plan + batch, in_tier // BLOCK, mask=real)
    tl.store(plan + 2 * batch, length - offset, mask=real)
    tl.store(plan + 3 * batch, pinned, mask=real)
    tl.store(state, offset + gone - counted, mask=real)
    tl.store(state + 2, in_tier + gone, mask=real)
    tier = tl.load(TABLE + layer * FIELDS + 6) * BLOCK
    tl.store(FITS + layer * tl.num_programs(1) + tl.program_id(1), tl.max(in_tier + gone, 0) <= tier)
    if tl.max(gone, 0) > 0:
        seen = SEEN + (layer * batch + row) * capacity
        for first in range(0, capacity, BLOCK):
            slot = first + tl.arange(0, BLOCK)
            mask = (real & (gone > 0))[:, None] & (slot < capacity)[None, :]
            tl.store(seen[:, None] + slot[None, :], tl.zeros([ROWS, BLOCK], tl.int32), mask=mask)


@triton.jit(do_not_specialize=["batch", "first_layer", "capacity"])
def _flush_kernel(
    TABLE, PLAN, SEEN, SIGNS, SIZES, batch, first_layer, capacity, inset,
    FIELDS: tl.constexpr, VALUE: tl.constexpr, META: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,
    DP: tl.constexpr, CHANNEL: tl.constexpr, CHANNELS: tl.constexpr, LAST: tl.constexpr, STEP: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr,
    TOKEN_AXIS: tl.constexpr, KEY_LAYOUT: tl.constexpr, ROTATE: tl.constexpr, BALANCE: tl.constexpr, LIMIT: tl.constexpr,
    BLOCK: tl.constexpr, SLICES: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """One program: one head of one row of one layer, CHANNELS of its channels from CHANNEL on. What is left of the dense region
    moves up after the LAST ones."""
    layer = first_layer + tl.program_id(0) // HEADS
    head = tl.program_id(0) % HEADS
    row = tl.program_id(1).to(tl.int64)
    plan = PLAN + layer * 4 * batch + row
    gone = tl.load(plan)
    if gone > 0:
        fields = TABLE + layer * FIELDS
        codes = tl.load(fields).to(tl.pointer_type(tl.int16))
        scale = tl.load(fields + 1).to(tl.pointer_type(META))
        zero = tl.load(fields + 2).to(tl.pointer_type(META))
        dense = tl.load(fields + 3).to(tl.pointer_type(VALUE))
        state = tl.load(fields + 4).to(tl.pointer_type(tl.int32))
        balancer = tl.load(fields + 5).to(tl.pointer_type(tl.float32))
        blocks = tl.load(fields + 6).to(tl.int32)
        first_block, pinned = tl.load(plan + batch), tl.load(plan + 3 * batch)
        for source in range(0, gone // BLOCK):
            filled = source >= 0
            written = first_block + source < blocks
            pack_block(
                dense, dense, balancer, SIGNS, SIZES, codes, scale, zero, SEEN + layer * batch * capacity, state + 1,
                source, first_block + source, head, CHANNEL, row, filled, written, HEADS * capacity * D, capacity * D,
                D, STATE_COLUMNS, capacity, pinned, 0, blocks, inset, HEADS, D, DP, CHANNELS, STEP, BITS, GROUP,
                TOKEN_AXIS, KEY_LAYOUT, False, ROTATE, BALANCE, True, LIMIT, BLOCK, SLICES, OPERAND, PRECISION,
            )  # fmt: skip
        if LAST:
            tl.debug_barrier()  # nothing moves before all threads have read
            base = dense + (row * HEADS + head) * capacity * D
            move_head_up(base, gone, tl.load(plan + 2 * batch), pinned, D, DP, BLOCK, PART)


def flush_triton(
    keys: Sequence[Sequence[Tensor]], values: Sequence[Sequence[Tensor]], length: int, n: int, room: int, window: int,
    blocks: int, bits: int, groups: Sequence[int], axes: Sequence[GroupAxis], rotation: Tensor | None, balanced: bool,
    clip: float, counted: int = 0, keep: bool = False,
) -> Tensor:  # fmt: skip
    """`flush` in Triton. `keep`: the table, for tensors that stay where they are."""
    if not all(t.is_contiguous() for tensors in (*keys, *values) for t in tensors[:5]):
        raise ValueError("flush writes into contiguous tensors only.")
    layers, (_, scale, _, dense, *_) = len(keys) + len(values), (*keys, *values)[0]
    batch, heads, capacity, dim = dense.shape
    table, device = table_of(keys, values, keep), dense.device
    plan = torch.empty(layers, 4, batch, dtype=torch.int32, device=device)
    seen = torch.empty(layers, batch, capacity, dtype=torch.int32, device=device)
    rows = min(32, triton.next_power_of_2(batch))
    fits = torch.empty(layers, triton.cdiv(batch, rows), dtype=torch.bool, device=device)
    _plan_kernel[tuple(fits.shape)](
        table, plan, seen, fits, length, n, counted, capacity, room, window, blocks, batch,
        FIELDS=FIELDS, ROWS=rows, BLOCK=BLOCK, num_warps=1,
    )  # fmt: skip
    tuning, padded = compress_tuning(dense.element_size()), triton.next_power_of_2(dim)
    signs, sizes = (table, table) if rotation is None else _signs(rotation, dense.dtype)
    for i, (layout, held) in enumerate((("key", keys), ("value", values))):
        chunks = [
            (first + part * channels, channels)
            for first, channels, parts in _launches(dim, layout) for part in range(parts)
        ]  # fmt: skip
        for chunk in chunks if held else ():
            _flush_kernel[len(held) * heads, batch](
                table, plan, seen, signs, sizes, batch, i * len(keys), capacity, (1 - clip) / 2,
                FIELDS=FIELDS, VALUE=_element(dense), META=_element(scale), HEADS=heads, D=dim, DP=padded,
                CHANNEL=chunk[0], CHANNELS=chunk[1], LAST=chunk == chunks[-1], STEP=min(padded, tuning.contracted),
                BITS=bits, GROUP=groups[i], TOKEN_AXIS=axes[i] == "token", KEY_LAYOUT=layout == "key",
                ROTATE=rotation is not None, BALANCE=balanced and layout == "key", LIMIT=largest_metadata(scale.dtype),
                BLOCK=BLOCK, SLICES=WORD_BITS // bits, OPERAND=operand_dtype(dense.dtype),
                PRECISION=dot_precision(dense.dtype), PART=PART, num_warps=tuning.warps, num_stages=1,
                maxnreg=tuning.registers,
            )  # fmt: skip
    return fits


def _element(x: Tensor) -> tl.dtype:
    return {
        torch.uint8: tl.uint8, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32
    }[x.dtype]  # fmt: skip


def flush(keys: Sequence[Sequence[Tensor]], values: Sequence[Sequence[Tensor]], *arguments, counted: int, keep: bool) -> Tensor:
    """Arguments and result as of `flush_triton`."""
    if (*keys, *values)[0][0].is_cuda:
        return flush_triton(keys, values, *arguments, counted=counted, keep=keep)
    return flush_reference(keys, values, *arguments, counted=counted)
