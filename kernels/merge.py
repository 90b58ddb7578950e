"""The last launch of attention: an item's partial softmaxes become one, and the tier's part is rotated back."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from .attention import _row_offset, _share, _units
from .jit import round_to
from .state import SECOND
from .tier import finite_max


@triton.jit
def _add_parts(out, m, total, PARTS, first, count, channel, D: tl.constexpr, SLOT: tl.constexpr, STEP: tl.constexpr):
    """Adds parts `first ... first + STEP - 1` of `count` [rows], which lie SLOT apart from PARTS [rows] on, to (output
    [rows, channel], maximum [rows] base 2, sum of weights [rows])."""
    step = first + tl.arange(0, STEP)
    real = step[None, :] < count[:, None]
    part_ptr = PARTS[:, None] + step.to(tl.int64)[None, :] * SLOT
    part_m = tl.load(part_ptr + D, mask=real, other=-float("inf"))
    part_total = tl.load(part_ptr + D + 1, mask=real, other=0.0)
    mask = real[:, :, None] & (channel < D)[None, None, :]
    part = tl.load(part_ptr[:, :, None] + channel[None, None, :], mask=mask, other=0.0)
    m_new = tl.maximum(m, tl.max(part_m, 1))
    top = finite_max(m_new)
    decay = tl.exp2(m - top)
    weight = tl.exp2(part_m - top[:, None])
    out = out * decay[:, None] + tl.sum(part * weight[:, :, None], 1)
    return out, m_new, total * decay + tl.sum(part_total * weight, 1)


@triton.jit(do_not_specialize=["batch", "length", "programs", "slots"])
def _merge_kernel(
    PARTS, STATE, ROTATION, RESULT, batch, length, programs, slots, stride_ob, stride_oh, stride_on,
    KV_HEADS: tl.constexpr, RATIO: tl.constexpr, NEW: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    ROWS: tl.constexpr, TILES: tl.constexpr, BATCH: tl.constexpr, UNIT: tl.constexpr, HAS_TIER: tl.constexpr,
    HAS_IMPORTANT: tl.constexpr, BLOCK: tl.constexpr, MERGED: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
    ROTATE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: COLUMNS channels of MERGED query rows."""
    out, row, channel = _merged(
        PARTS, STATE, ROTATION, batch, length, programs, slots, KV_HEADS, RATIO, NEW, D, DP, ROWS, TILES, BATCH, UNIT,
        HAS_TIER, HAS_IMPORTANT, BLOCK, MERGED, COLUMNS, STEP, ROTATE, PDL,
    )  # fmt: skip
    real = row < batch * (KV_HEADS * RATIO * NEW)
    target = RESULT + _row_offset(row, KV_HEADS * RATIO, NEW, stride_ob, stride_oh, stride_on)
    out = round_to(out, RESULT.dtype.element_ty)
    tl.store(target[:, None] + channel[None, :], out, mask=real[:, None] & (channel < D)[None, :])


@triton.jit
def _merged(
    PARTS, STATE, ROTATION, batch, length, programs, slots,
    KV_HEADS: tl.constexpr, RATIO: tl.constexpr, NEW: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    ROWS: tl.constexpr, TILES: tl.constexpr, BATCH: tl.constexpr, UNIT: tl.constexpr, HAS_TIER: tl.constexpr,
    HAS_IMPORTANT: tl.constexpr, BLOCK: tl.constexpr, MERGED: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
    ROTATE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """(fp32 [MERGED, COLUMNS], its rows, its channels): (tier @ R^T + dense) / sum of weights. Whoever calls it stores
    it: Inductor's template with what it has fused behind."""
    ITEMS: tl.constexpr = KV_HEADS * TILES
    SLOT: tl.constexpr = ROWS * (D + 4)
    row = tl.program_id(0) * MERGED + tl.arange(0, MERGED)
    real = row < batch * (KV_HEADS * RATIO * NEW)
    pair = row // (RATIO * NEW)
    in_pair = row % (RATIO * NEW)
    b = pair // KV_HEADS
    item = pair % KV_HEADS * TILES + in_pair // ROWS
    batch_row = tl.arange(0, BATCH)
    _, _, units = _units(STATE, batch_row, length, batch, UNIT, BLOCK, HAS_TIER)
    _, dense_units, units_here = _units(STATE, b, length, batch, UNIT, BLOCK, HAS_TIER)
    share = _share(units, ITEMS, programs)
    before = tl.sum(tl.where(batch_row[None, :] < b[:, None], units[None, :], 0), 1)
    start = before * ITEMS + item * units_here
    tier = start + dense_units
    end = start + units_here
    place = PARTS + (in_pair % ROWS) * (D + 4)
    slot = (b * ITEMS + item).to(tl.int64)
    channel = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    if ROTATE:
        matrix_ptr = ROTATION + channel[None, :] * D + tl.arange(0, DP)[:, None]
        matrix = tl.load(matrix_ptr, mask=(channel < D)[None, :] & (tl.arange(0, DP) < D)[:, None], other=0.0)
    if PDL:
        gdc_wait()
    first = start // share
    count = tl.where(real, (tier + share - 1) // share - first, 0)
    place += (slot + first) * SLOT
    m = tl.full([MERGED], -float("inf"), tl.float32)
    total = tl.zeros([MERGED], tl.float32)
    out = tl.zeros([MERGED, COLUMNS], tl.float32)
    if HAS_TIER:
        # Of few dense parts, so that both kinds load in one step.
        DENSE_STEP: tl.constexpr = max(STEP // 8, 1)
        tier_first = tier // share
        tier_count = tl.where(real & (tier < end), (end + share - 1) // share - tier_first, 0)
        tier_place = place + (slots + tier_first - first) * SLOT
        tier_m, tier_total = m, total
        if ROTATE:
            inner = tl.arange(0, DP)
            tier_out = tl.zeros([MERGED, DP], tl.float32)
        else:
            inner = channel
            tier_out = out
        steps = tl.maximum((count + DENSE_STEP - 1) // DENSE_STEP, (tier_count + STEP - 1) // STEP)
        for i in range(tl.max(steps, 0)):
            out, m, total = _add_parts(out, m, total, place, i * DENSE_STEP, count, channel, D, SLOT, DENSE_STEP)
            tier_out, tier_m, tier_total = _add_parts(
                tier_out, tier_m, tier_total, tier_place, i * STEP, tier_count, inner, D, SLOT, STEP
            )
        if HAS_IMPORTANT:
            # Stored alike, so that both are one sum before it is rotated back.
            _, _, units = _units(STATE + SECOND, batch_row, 0, batch, UNIT, BLOCK, HAS_TIER)
            _, _, units_here = _units(STATE + SECOND, b, 0, batch, UNIT, BLOCK, HAS_TIER)
            share = tl.maximum(_share(units, ITEMS, programs), 1)
            before = tl.sum(tl.where(batch_row[None, :] < b[:, None], units[None, :], 0), 1)
            start = before * ITEMS + item * units_here
            second = start // share
            count = tl.where(real & (units_here > 0), (start + units_here + share - 1) // share - second, 0)
            place += (2 * slots + second - first) * SLOT
            for i in range(0, tl.max(count, 0), STEP):
                tier_out, tier_m, tier_total = _add_parts(
                    tier_out, tier_m, tier_total, place, i, count, inner, D, SLOT, STEP
                )
        top = finite_max(tl.maximum(m, tier_m))
        weight = tl.exp2(m - top)
        tier_weight = tl.exp2(tier_m - top)
        total = total * weight + tier_total * tier_weight
        tier_out *= tier_weight[:, None]
        if ROTATE:
            tier_out = tl.dot(tier_out, matrix, input_precision="tf32x3")
        out = out * weight[:, None] + tier_out
    else:
        for i in range(0, tl.max(count, 0), STEP):
            out, m, total = _add_parts(out, m, total, place, i, count, channel, D, SLOT, STEP)
    return out / tl.where(real, total, 1.0)[:, None], row, channel
