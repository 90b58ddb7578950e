"""Device functions of attention over packed tier + dense region: the split kernel. `prepare` and `merge` are the launches before
and behind it, `attend` has the host's side and the reference."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .jit import LOG2E, next_power_of_2, to_operand
from .state import STATE_COLUMNS
from .tier import attend_tier, finite_max

# The kernels. Three launches: prepare (append the new tokens; rotate and normalise q), split (a softmax per program and
# item), merge (combine the parts; rotate the tier's back).
#
# An *item* is one KV head and up to ROWS of its query rows, which share what is read. Its work is a line of *units*,
# UNIT tokens of its dense region or one block of its tier. All items' units, one after another, are cut into equally
# long shares, one for each program: as many programs as run at once, so that all end together. Lengths are those on the
# device, in split and merge alike (`_units`). Where program i works on item j, its part has slot i + j: both only grow
# along the line, so no two parts share a slot.
#
# An important tier of other bits is a line of its own, without a dense region: another launch of split, which reads the
# second triple of a state. Its parts merge takes as the tier's.


@triton.jit
def _row_offset(row, HEADS: tl.constexpr, NEW: tl.constexpr, stride_b, stride_h, stride_n):
    """Where row `row` of [batch, HEADS, NEW, channels] starts."""
    head = row // NEW
    offset = (head // HEADS).to(tl.int64) * stride_b + (head % HEADS).to(tl.int64) * stride_h
    return offset + (row % NEW).to(tl.int64) * stride_n


@triton.jit
def _units(STATE, row, length, batch, UNIT: tl.constexpr, BLOCK: tl.constexpr, HAS_TIER: tl.constexpr):
    """(dense tokens, units of the dense region, units in all) of an item of batch row `row`; 0 past the batch."""
    real = row < batch
    dense = tl.where(real, length - tl.load(STATE + row * STATE_COLUMNS, mask=real, other=0), 0)
    dense_units = (dense + UNIT - 1) // UNIT
    units = dense_units
    if HAS_TIER:
        units += tl.load(STATE + row * STATE_COLUMNS + 2, mask=real, other=0) // BLOCK
    return dense, dense_units, units


@triton.jit
def _share(units, ITEMS: tl.constexpr, programs):
    """Units per program; `units` are those of an item of each batch row, which has ITEMS."""
    return (tl.sum(units, 0) * ITEMS + programs - 1) // programs


@triton.jit
def _attend_dense(
    q_ptr, q_mask, K, V, factor, first, last, seen, stride_ks, stride_vs, D: tl.constexpr, DP: tl.constexpr,
    ROWS: tl.constexpr, STEP: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Tokens `first ... last - 1` of the dense region; row r sees those before `seen[r]`.

    Returns (output not divided by its sum [DP, ROWS], maximum [ROWS] base 2, sum [ROWS]).
    """
    channel = tl.arange(0, DP)
    real = channel < D
    q = to_operand(tl.load(q_ptr[None, :] + channel[:, None], mask=q_mask[None, :] & real[:, None], other=0.0), OPERAND)
    m = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([DP, ROWS], tl.float32)
    for token0 in range(first, last, STEP):
        token = token0 + tl.arange(0, STEP)
        mask = (token < last)[:, None] & real[None, :]
        offset = token.to(tl.int64)[:, None]
        k = to_operand(tl.load(K + offset * stride_ks + channel[None, :], mask=mask, other=0.0), OPERAND)
        v = to_operand(tl.load(V + offset * stride_vs + channel[None, :], mask=mask, other=0.0), OPERAND)
        logits = tl.dot(k, q, input_precision=PRECISION) * factor
        logits = tl.where((token < last)[:, None] & (token[:, None] < seen[None, :]), logits, -float("inf"))
        m_new = tl.maximum(m, tl.max(logits, 0))
        top = finite_max(m_new)
        decay = tl.exp2(m - top)
        probs = tl.exp2(logits - top[None, :])
        total = total * decay + tl.sum(probs, 0)
        out = tl.dot(tl.trans(v), probs.to(OPERAND), out * decay[None, :], input_precision=PRECISION)
        m = m_new
    return out, m, total


@triton.jit
def _prefetch(BLOCKS, first, count, SIZE: tl.constexpr):
    """Ask the L2 cache for the first two of `count` blocks of SIZE elements from block `first` on."""
    BYTES: tl.constexpr = SIZE * BLOCKS.dtype.element_ty.primitive_bitwidth // 8
    line = tl.arange(0, next_power_of_2(max(2 * BYTES // 128, 1))) * 128
    address = (BLOCKS + first * SIZE).to(tl.int64) + tl.minimum(line, count * BYTES - 1)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit(do_not_specialize=["batch", "length", "capacity", "slots"])
def _split_kernel(
    Q, Q_TIER, FACTOR, K_CODES, K_SCALE, K_ZERO, V_CODES, V_SCALE, V_ZERO, K_DENSE, V_DENSE, STATE, PARTS,
    batch, length, scale, capacity, slots,
    stride_qb, stride_qh, stride_qn, stride_kdb, stride_kdh, stride_kds, stride_vdb, stride_vdh, stride_vds,
    KV_HEADS: tl.constexpr, RATIO: tl.constexpr, NEW: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    ROWS: tl.constexpr, TILES: tl.constexpr, BATCH: tl.constexpr, UNIT: tl.constexpr, HAS_TIER: tl.constexpr,
    BITS: tl.constexpr, K_GROUP: tl.constexpr, K_TOKEN_AXIS: tl.constexpr, V_GROUP: tl.constexpr, BLOCK: tl.constexpr,
    WORDS: tl.constexpr, SLICES: tl.constexpr, CHUNKS: tl.constexpr, SIDES: tl.constexpr, DENSE_OPERAND: tl.constexpr,
    PRECISION: tl.constexpr, NOISE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: one share of the units, item by item.

    PARTS fp32 [2, slots, ROWS, D + 4]: output not divided by its sum, maximum (base 2), sum, and two unused; first of
    the dense region, then of the tier. Rows past the query's are not written, nor slots without units.
    """
    if PDL:
        gdc_launch_dependents()
    ITEMS: tl.constexpr = KV_HEADS * TILES
    K_META: tl.constexpr = BLOCK // K_GROUP * D if K_TOKEN_AXIS else D // K_GROUP * BLOCK
    program = tl.program_id(0)
    batch_row = tl.arange(0, BATCH)
    _, _, units = _units(STATE, batch_row, length, batch, UNIT, BLOCK, HAS_TIER)
    ends = tl.cumsum(units, 0) * ITEMS
    share = _share(units, ITEMS, tl.num_programs(0))
    unit = program * share
    last = tl.minimum(unit + share, tl.max(ends, 0))
    while unit < last:
        b = tl.sum((ends <= unit).to(tl.int32), 0)
        dense, dense_units, units_here = _units(STATE, b, length, batch, UNIT, BLOCK, HAS_TIER)
        place = unit - (tl.sum(tl.where(batch_row == b, ends, 0), 0) - units_here * ITEMS)
        item = place // units_here
        first = place % units_here
        stop = tl.minimum(first + last - unit, units_here)
        unit += stop - first

        pair = b * KV_HEADS + item // TILES
        row = item % TILES * ROWS + tl.arange(0, ROWS)
        real = row < RATIO * NEW
        q_row = pair * (RATIO * NEW) + row
        slot = (program + b * ITEMS + item).to(tl.int64)
        part = PARTS + (slot * ROWS + tl.arange(0, ROWS)) * (D + 4)
        if PDL:
            if HAS_TIER:
                if stop > dense_units:
                    # Nothing of this is prepare's: it may come while that still runs.
                    at = pair.to(tl.int64) * capacity + tl.maximum(first - dense_units, 0)
                    count = stop - tl.maximum(first, dense_units)
                    _prefetch(K_CODES, at, count, WORDS * D)
                    _prefetch(K_SCALE, at, count, K_META)
                    _prefetch(K_ZERO, at, count, K_META)
                    _prefetch(V_CODES, at, count, WORDS * D)
                    _prefetch(V_SCALE, at, count, D // V_GROUP * BLOCK)
                    _prefetch(V_ZERO, at, count, D // V_GROUP * BLOCK)
            gdc_wait()
        if first < dense_units:
            head = (pair % KV_HEADS).to(tl.int64)
            out, m, total = _attend_dense(
                Q + _row_offset(q_row, KV_HEADS * RATIO, NEW, stride_qb, stride_qh, stride_qn), real,
                K_DENSE + b.to(tl.int64) * stride_kdb + head * stride_kdh,
                V_DENSE + b.to(tl.int64) * stride_vdb + head * stride_vdh,
                scale * LOG2E, first * UNIT, tl.minimum(stop * UNIT, dense), dense - (NEW - 1) + row % NEW,
                stride_kds, stride_vds, D, DP, ROWS, UNIT, DENSE_OPERAND, PRECISION,
            )  # fmt: skip
            channel = tl.arange(0, DP)
            tl.store(part[None, :] + channel[:, None], out, mask=(channel < D)[:, None] & real[None, :])
            tl.store(part + D, m, mask=real)
            tl.store(part + D + 1, total, mask=real)
        if HAS_TIER:
            if stop > dense_units:
                tier_row = item % TILES * ROWS + tl.arange(0, ROWS) % (ROWS // SIDES)  # the same query rows for each side
                tier_real = tier_row < RATIO * NEW
                tier_q = pair * (RATIO * NEW) + tier_row
                # `slots` comes last: an index with it in would be kept beside `part`, in registers that the loop needs.
                tier_part = PARTS + (slot * ROWS + tl.arange(0, ROWS // SIDES)) * (D + 4)
                tier_part += slots.to(tl.int64) * (ROWS * (D + 4))
                attend_tier(
                    Q_TIER + tier_q.to(tl.int64) * DP, tier_real, tl.load(FACTOR + tier_q, mask=tier_real, other=0.0),
                    K_CODES, K_SCALE, K_ZERO, V_CODES, V_SCALE, V_ZERO, tier_part, pair.to(tl.int64) * capacity,
                    tl.maximum(first - dense_units, 0), stop - dense_units, RATIO * NEW - item % TILES * ROWS,
                    D, DP, ROWS, SIDES, BITS, K_GROUP, K_TOKEN_AXIS, V_GROUP, BLOCK, WORDS, SLICES, CHUNKS, NOISE,
                    Q_TIER.dtype.element_ty == tl.float32,
                )  # fmt: skip
