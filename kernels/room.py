"""Room for the next tokens in all layers of a cache of fixed capacity, in three launches a step (head dimensions that are no
power of two, or more than 128, take more).

A step in which no row is full, and that is nearly every one, should cost nothing: what grows with the number of layers
is not launches but programs that end at once. So the kernels take the addresses of all layers' tensors from a table in
device memory. The first counts and plans (`_count_kernel`), and two more, for keys and for values, quantize what leaves a
full row's dense region and move up what is left of it (`_flush_kernel`), as `compress` and `flush` do for one layer. (A launch
for each chunk of channels: two in one program gave wrong scales for the second on an H200, Triton 3.6, and right ones in the
interpreter.)
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .compress import _launches, _signs, pack_block
from .flush import PART, leaving, move_head_up
from .jit import dot_precision, operand_dtype
from .packing import BLOCK, WORD_BITS, GroupAxis
from .state import STATE_COLUMNS
from .tuning import compress_tuning

FIELDS = 6
"""Columns of a table: the addresses of codes, scale, zero, dense, state and balancer. A row per layer's keys, then per
layer's values."""

_tables: dict[tuple[int, ...], Tensor] = {}
"""Tables by the addresses in them. A captured graph reads its table for as long as it is replayed, so a table lives as
long as the first of the storages whose addresses it holds."""


def table_of(keys: Sequence[Sequence[Tensor]], values: Sequence[Sequence[Tensor]]) -> Tensor:
    """int64, on the device: the addresses of these tensors.

    Raises:
        RuntimeError: a CUDA graph is being captured, and no step ran before with these tensors.
    """
    name = tuple(t.data_ptr() for tensors in (*keys, *values) for t in tensors)
    if name in _tables:
        return _tables[name]
    state = keys[0][4]
    if state.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("Run one decode step on this MiniKVCache before a step is captured in a CUDA graph.")
    table = torch.tensor(name, dtype=torch.int64, device=state.device)
    _tables[name] = table
    weakref.finalize(state.untyped_storage(), _tables.pop, name, None)
    return table


@triton.jit(do_not_specialize=["n", "batch"])
def _count_kernel(
    TABLE, PLAN, SEEN, FITS, n, capacity, room, window, blocks, batch, tier_blocks,
    FIELDS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: ROWS rows of one layer's keys or values. It counts `n` more tokens, and what will leave, in the state.

    PLAN int32 [2 * layers, 4, batch]: as of `flush.plan`. SEEN int32 [2 * layers, batch, capacity]: zeros where a row
    flushes. FITS bool, of each program: whether the tiers, of `tier_blocks`, have room for what will leave.
    """
    layer = tl.program_id(0)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    real = row < batch
    state = tl.load(TABLE + layer * FIELDS + 4).to(tl.pointer_type(tl.int32)) + row * STATE_COLUMNS
    in_dense = -tl.load(state, mask=real, other=0)
    in_tier = tl.load(state + 2, mask=real, other=0)
    pinned = tl.load(state + 4, mask=real, other=0)
    gone = leaving(in_dense, pinned, n, room, window, blocks, BLOCK)
    plan = PLAN + layer * 4 * batch + row
    tl.store(plan, gone, mask=real)
    tl.store(plan + batch, in_tier // BLOCK, mask=real)
    tl.store(plan + 2 * batch, in_dense, mask=real)
    tl.store(plan + 3 * batch, pinned, mask=real)
    tl.store(state, gone - in_dense - n, mask=real)
    tl.store(state + 2, in_tier + gone, mask=real)
    fits = tl.min((in_tier + gone <= tier_blocks * BLOCK).to(tl.int32), 0) == 1
    tl.store(FITS + layer * tl.num_programs(1) + tl.program_id(1), fits)
    if tl.max(gone, 0) > 0:
        seen = SEEN + (layer * batch + row) * capacity
        for first in range(0, capacity, BLOCK):
            slot = first + tl.arange(0, BLOCK)
            mask = (real & (gone > 0))[:, None] & (slot < capacity)[None, :]
            tl.store(seen[:, None] + slot[None, :], tl.zeros([ROWS, BLOCK], tl.int32), mask=mask)


@triton.jit(do_not_specialize=["batch", "first_layer", "capacity", "blocks"])
def _flush_kernel(
    TABLE, PLAN, SEEN, SIGNS, SIZES, batch, first_layer, capacity, blocks, inset,
    FIELDS: tl.constexpr, VALUE: tl.constexpr, META: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,
    DP: tl.constexpr, CHANNEL: tl.constexpr, CHANNELS: tl.constexpr, LAST: tl.constexpr, STEP: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr,
    TOKEN_AXIS: tl.constexpr, KEY_LAYOUT: tl.constexpr, ROTATE: tl.constexpr, BALANCE: tl.constexpr, LIMIT: tl.constexpr,
    BLOCK: tl.constexpr, SLICES: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """One program: one head of one row of one layer, CHANNELS of its channels from CHANNEL on. What is left of the dense region
    moves up after the LAST ones. `blocks`: capacity of the tiers."""
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


def make_room(
    keys: Sequence[Sequence[Tensor]], values: Sequence[Sequence[Tensor]], n: int, room: int, window: int, bits: int,
    groups: tuple[int, int], axes: tuple[GroupAxis, GroupAxis], rotation: Tensor | None, balanced: bool, clip: float,
) -> Tensor:  # fmt: skip
    """Count `n` more tokens in the states of every layer, and flush the rows that could not hold them, in place.

    Args:
        keys, values: codes, scale, zero, dense, state and balancer of each layer, contiguous and alike, the offset in a
            state minus the tokens of its dense region. Where not `balanced`, and for values, the last is anything.
        room: tokens of a dense region behind the pinned ones.
        groups, axes: of the keys and of the values.

    Returns:
        bools, of which one is False where a tier has no room for what had to leave a dense region: it is lost.
    """
    dense = keys[0][3]
    layers, (batch, heads, capacity, dim) = len(keys), dense.shape
    table, device = table_of(keys, values), dense.device
    plan = torch.empty(2 * layers, 4, batch, dtype=torch.int32, device=device)
    seen = torch.empty(2 * layers, batch, capacity, dtype=torch.int32, device=device)
    rows = min(32, triton.next_power_of_2(batch))
    codes, scale = keys[0][:2]
    fits = torch.empty(2 * layers, triton.cdiv(batch, rows), dtype=torch.bool, device=device)
    _count_kernel[tuple(fits.shape)](
        table, plan, seen, fits, n, capacity, room, window, (room - window) // BLOCK, batch, codes.shape[2],
        FIELDS=FIELDS, ROWS=rows, BLOCK=BLOCK, num_warps=1,
    )  # fmt: skip
    tuning, padded = compress_tuning(dense.element_size()), triton.next_power_of_2(dim)
    signs, sizes = (table, table) if rotation is None else _signs(rotation, dense.dtype)
    for i, layout in enumerate(("key", "value")):
        chunks = [
            (first + part * channels, channels)
            for first, channels, parts in _launches(dim, layout) for part in range(parts)
        ]  # fmt: skip
        for chunk in chunks:
            _flush_kernel[layers * heads, batch](
                table, plan, seen, signs, sizes, batch, i * layers, capacity, codes.shape[2], (1 - clip) / 2,
                FIELDS=FIELDS, VALUE=_element(dense), META=_element(scale), HEADS=heads, D=dim, DP=padded,
                CHANNEL=chunk[0], CHANNELS=chunk[1], LAST=chunk == chunks[-1], STEP=min(padded, tuning.contracted),
                BITS=bits, GROUP=groups[i], TOKEN_AXIS=axes[i] == "token", KEY_LAYOUT=layout == "key",
                ROTATE=rotation is not None, BALANCE=balanced and layout == "key", LIMIT=torch.finfo(scale.dtype).max,
                BLOCK=BLOCK, SLICES=WORD_BITS // bits, OPERAND=operand_dtype(dense.dtype),
                PRECISION=dot_precision(dense.dtype), PART=PART, num_warps=tuning.warps, num_stages=1,
                maxnreg=tuning.registers,
            )  # fmt: skip
    return fits


def _element(x: Tensor) -> tl.dtype:
    return {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}[x.dtype]
