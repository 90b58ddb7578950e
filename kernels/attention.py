"""Attention of new tokens over a compressed past: packed tier + dense region, one softmax."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .jit import (
    CODE_EXPONENT,
    LOG2E,
    check_dtype,
    check_head_dim,
    code_position,
    codes_at,
    dot_precision,
    entry,
    exp2i,
    exponent,
    length_of,
    log2,
    next_power_of_2,
    operand_dtype,
    pinned,
    round_to,
    times_scale,
    to_fp16,
    to_fp32,
    to_operand,
    transposed,
    unit_last,
    value_loads,
    value_tiles,
)
from .packing import BLOCK, WORD_BITS, GroupAxis, dequantize, unpack, value_chunks, words
from .tuning import AttendTuning, attend_tuning, merge_tuning

Packed = tuple[Tensor, Tensor, Tensor]


def append(dense: Tensor, new: Tensor, state: Tensor, length: int) -> None:
    """Write `new` [batch, kv_heads, n, head_dim] into `dense` [batch, kv_heads, capacity, head_dim], in place.

    `length` counts the tokens *with* the new ones; row b's new tokens land at `length - n - state[b, 0]`.
    """
    n = new.shape[-2]
    batch = torch.arange(new.shape[0], device=new.device)[:, None]
    slots = length - n - state[:, :1] + torch.arange(n, device=new.device)
    dense[batch, :, slots.long()] = new.transpose(1, 2)


def attend_reference(
    q: Tensor,
    k_tier: Packed | None,
    v_tier: Packed | None,
    k_dense: Tensor,
    v_dense: Tensor,
    state: Tensor,
    length: int,
    scale: float,
    bits: int,
    k_group: int,
    k_axis: GroupAxis,
    v_group: int,
    rotation: Tensor | None,
) -> Tensor:
    """Attention of the newest `n` tokens of each row, causal among themselves, in plain PyTorch.

    Args:
        q: [batch, heads, n, head_dim].
        k_tier, v_tier: codes, scale and zero (`packing`) of [batch, kv_heads, blocks * BLOCK, head_dim], rotated. Row
            b's first `state[b, 2]` tokens are valid. None where there is no tier.
        k_dense, v_dense: [batch, kv_heads, capacity, head_dim], not rotated. Row b's first `length - state[b, 0]`
            tokens are valid, the new ones (already appended) last.
        state: int32 [batch, 3]: offset, count of tokens that are not finite, tokens in the tier.
        length: logical tokens, with the new ones.
        rotation: orthogonal [head_dim, head_dim], or None.

    Returns:
        [batch, heads, n, head_dim] in the dtype of `q`.
    """
    batch, heads, n, dim = q.shape
    kv_heads = k_dense.shape[1]
    query = q.float().reshape(batch, kv_heads, heads // kv_heads * n, dim)
    rotated = query if rotation is None else query @ rotation.float()

    k_packed = v_packed = query.new_empty(batch, kv_heads, 0, dim)
    if k_tier is not None:
        k_codes, k_scale, k_zero = k_tier
        v_codes, v_scale, v_zero = v_tier
        k_packed = dequantize(unpack(k_codes, bits, "key"), k_scale, k_zero, k_group, k_axis).flatten(2, 3)
        v_packed = dequantize(unpack(v_codes, bits, "value"), v_scale, v_zero, v_group, "channel").flatten(2, 3)
    packed_slots, dense_slots = k_packed.shape[2], k_dense.shape[2]

    logits = torch.cat([rotated @ k_packed.transpose(-1, -2), query @ k_dense.float().transpose(-1, -2)], -1) * scale
    in_tier = torch.arange(packed_slots, device=q.device) < state[:, 2, None]  # [batch, packed]
    ages = torch.arange(n - 1, -1, -1, device=q.device)  # how many new tokens are newer than query i
    seen = length - state[:, 0, None] - ages  # [batch, n] dense tokens that query i sees
    in_dense = torch.arange(dense_slots, device=q.device) < seen[..., None]  # [batch, n, dense]
    valid = torch.cat([in_tier[:, None].expand(-1, n, -1), in_dense], -1)[:, None, None]
    logits = logits.view(batch, kv_heads, heads // kv_heads, n, -1).masked_fill(~valid, -torch.inf)
    probs = logits.softmax(-1).view(batch, kv_heads, -1, packed_slots + dense_slots)

    # What lies past the valid length may be anything, NaN too: 0 * NaN must not reach the output.
    v_packed = v_packed.masked_fill(~in_tier[:, None, :, None], 0.0)
    v_recent = v_dense.float().masked_fill(~in_dense[:, -1][:, None, :, None], 0.0)
    out = probs[..., :packed_slots] @ v_packed
    if rotation is not None:
        out = out @ rotation.float().T
    out = out + probs[..., packed_slots:] @ v_recent
    return out.view(batch, heads, n, dim).to(q.dtype)


# The kernels. Three launches: prepare (append the new tokens; rotate and normalise q), split (a softmax per program and
# item), merge (combine the parts; rotate the tier's back).
#
# An *item* is one KV head and up to ROWS of its query rows, which share what is read. Its work is a line of *units*,
# UNIT tokens of its dense region or one block of its tier. All items' units, one after another, are cut into equally
# long shares, one for each program: as many programs as run at once, so that all end together. Lengths are those on the
# device, in split and merge alike (`_units`). Where program i works on item j, its part has slot i + j: both only grow
# along the line, so no two parts share a slot.
#
# Arithmetic of the tier, with c a code, s and z its group's scale and zero, t a token, d a channel:
#
#   logit_t = sum_d q_d (s c + z)   groups along tokens:   = sum_d (q_d s_d) c_td + sum_d q_d z_d
#                                   groups along channels: = sum_g s_tg (sum_{d in g} q_d c_td) + z_tg sum_{d in g} q_d
#   out_d   = sum_t p_t (s c + z)   groups along channels: = sum_t (p_t s_tg) c_td + sum_t p_t z_tg
#
# so that codes enter the matrix products as they are, and scales touch q and p only, which are far smaller. q comes
# normalised to at most 1 by a power of two and p s is kept near 2**15, by the running exponent of s: fp16 operands
# neither overflow nor lose their small values.

P_EXPONENT = tl.constexpr(7)
"""p <= 2**P_EXPONENT as an operand."""

S_EXPONENT = tl.constexpr(7)
"""scale < 2**(S_EXPONENT + 1) where it is folded into p, so that the product fits in fp16."""

LOWEST = tl.constexpr(-1e30)
"""Stands for the maximum of no logits."""

LEAST = tl.constexpr(-100)
"""Exponents of all scales are taken as at least this."""


@triton.jit
def _row_offset(row, HEADS: tl.constexpr, NEW: tl.constexpr, stride_b, stride_h, stride_n):
    """Where row `row` of [batch, HEADS, NEW, channels] starts."""
    head = row // NEW
    offset = (head // HEADS).to(tl.int64) * stride_b + (head % HEADS).to(tl.int64) * stride_h
    return offset + (row % NEW).to(tl.int64) * stride_n


@triton.jit(do_not_specialize=["batch", "rotated", "length"])
def _prepare_kernel(
    Q, K_NEW, V_NEW, K_DENSE, V_DENSE, STATE, ROTATION, Q_OUT, FACTOR, batch, rotated, length, scale,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_kdb, stride_kdh, stride_kds, stride_vdb, stride_vdh, stride_vds,
    KV_HEADS: tl.constexpr, RATIO: tl.constexpr, NEW: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ROTATE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: COLUMNS channels of ROWS rows; of q in the first `rotated` programs, then of the new K and V.

    Q_OUT [rows, DP]: q rotated, times a power of two that makes it at most 1.
    FACTOR fp32 [rows]: what turns its products with keys into logits to the base of 2.
    """
    if PDL:
        gdc_launch_dependents()
    channel = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    program = tl.program_id(0)
    if program < rotated:
        row = program * ROWS + tl.arange(0, ROWS)
        real = row < batch * (KV_HEADS * RATIO * NEW)
        q_ptr = Q + _row_offset(row, KV_HEADS * RATIO, NEW, stride_qb, stride_qh, stride_qn)
        inner = tl.arange(0, DP)
        q = to_fp32(tl.load(q_ptr[:, None] + inner[None, :], mask=real[:, None] & (inner < D)[None, :], other=0.0))
        # |q R| <= |q|_2 <= sqrt(DP) max |q|.
        bound = exponent(tl.max(tl.abs(q), 1)) + 1
        if ROTATE:
            bound += (exponent(tl.full([ROWS], DP, tl.float32)) + 1) // 2
        bound = tl.minimum(tl.maximum(bound, LEAST), 126)
        if ROTATE:
            columns = ROTATION + inner[:, None] * D + channel[None, :]
            matrix = tl.load(columns, mask=(inner < D)[:, None] & (channel < D)[None, :], other=0.0)
            q = tl.dot(q * exp2i(-bound)[:, None], matrix, input_precision="tf32x3")
        else:
            q = tl.load(q_ptr[:, None] + channel[None, :], mask=real[:, None] & (channel < D)[None, :], other=0.0)
            q = to_fp32(q) * exp2i(-bound)[:, None]
        target = Q_OUT + row.to(tl.int64)[:, None] * DP + channel[None, :]
        tl.store(target, round_to(q, Q_OUT.dtype.element_ty), mask=real[:, None])
        if tl.program_id(1) == 0:
            tl.store(FACTOR + row, exp2i(bound) * (scale * LOG2E), mask=real)
    else:
        row = (program - rotated) * ROWS + tl.arange(0, ROWS)
        real = row < batch * (KV_HEADS * NEW)
        mask = real[:, None] & (channel < D)[None, :]
        # From each row's first new token to its slot.
        shift = length - NEW - tl.load(STATE + row // (KV_HEADS * NEW) * 3, mask=real, other=0).to(tl.int64)
        k_ptr = K_NEW + _row_offset(row, KV_HEADS, NEW, stride_kb, stride_kh, stride_kn)
        v_ptr = V_NEW + _row_offset(row, KV_HEADS, NEW, stride_vb, stride_vh, stride_vn)
        k = tl.load(k_ptr[:, None] + channel[None, :], mask=mask)
        v = tl.load(v_ptr[:, None] + channel[None, :], mask=mask)
        k_ptr = K_DENSE + _row_offset(row, KV_HEADS, NEW, stride_kdb, stride_kdh, stride_kds) + shift * stride_kds
        v_ptr = V_DENSE + _row_offset(row, KV_HEADS, NEW, stride_vdb, stride_vdh, stride_vds) + shift * stride_vds
        tl.store(k_ptr[:, None] + channel[None, :], k, mask=mask)
        tl.store(v_ptr[:, None] + channel[None, :], v, mask=mask)


@triton.jit
def _units(STATE, row, length, batch, UNIT: tl.constexpr, BLOCK: tl.constexpr, HAS_TIER: tl.constexpr):
    """(dense tokens, units of the dense region, units in all) of an item of batch row `row`; 0 past the batch."""
    real = row < batch
    dense = tl.where(real, length - tl.load(STATE + row * 3, mask=real, other=0), 0)
    dense_units = (dense + UNIT - 1) // UNIT
    units = dense_units
    if HAS_TIER:
        units += tl.load(STATE + row * 3 + 2, mask=real, other=0) // BLOCK
    return dense, dense_units, units


@triton.jit
def _share(units, ITEMS: tl.constexpr, programs):
    """Units per program; `units` are those of an item of each batch row, which has ITEMS."""
    return (tl.sum(units, 0) * ITEMS + programs - 1) // programs


@triton.jit
def _dot_codes(codes, x, acc):
    """acc + codes @ x. Codes are fp16; an fp32 `x` enters as the sum of two fp16 numbers, so with 22 bits: the second
    times 2**11, lest it be subnormal and have fewer."""
    if x.dtype == tl.float32:
        high = x.to(tl.float16)
        low = ((x - high.to(tl.float32)) * 2.0**11).to(tl.float16)
        acc += tl.dot(codes, low) * 2.0**-11
        return tl.dot(codes, high, acc)
    else:
        return tl.dot(codes, x, acc)


@triton.jit
def _row(x, i):
    """Row i of a tile."""
    is_i = tl.maximum(1 - tl.abs(tl.arange(0, x.shape[0]) - i), 0).to(tl.float32)
    return tl.sum(x * is_i[:, None], 0)


@triton.jit
def _logits_token_groups(
    q, CODES, SCALE, ZERO, factor, D: tl.constexpr, DP: tl.constexpr, WORDS: tl.constexpr, TILE: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, SLICES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Logits of one block, base 2: a tuple of BLOCK / TILE tiles [TILE, ROWS], tokens ascending. `q` is [DP, ROWS]."""
    channel = tl.arange(0, DP)
    token = tl.arange(0, TILE)
    real = channel < D
    tiles = ()
    for part in tl.static_range(WORDS // TILE):
        word_ptr = CODES + (part * TILE + token)[:, None] * D + channel[None, :]
        tiles = tiles + (tl.load(word_ptr, mask=real[None, :], other=0),)
    zero_ptr = ZERO + tl.arange(0, BLOCK // GROUP)[:, None] * D + channel[None, :]
    zero = to_fp16(tl.load(zero_ptr, mask=real[None, :], other=0.0))
    offsets = _dot_codes(zero, q, tl.zeros([BLOCK // GROUP, ROWS], tl.float32)) * factor[None, :]
    logits = ()
    for i in tl.static_range(SLICES):
        for part in tl.static_range(WORDS // TILE):
            if (i * WORDS + part * TILE) % GROUP == 0:
                place = (i * WORDS + part * TILE) // GROUP * D + channel
                scale = to_fp16(tl.load(SCALE + place, mask=real, other=0.0))
                folded = q * scale.to(q.dtype)[:, None]
                offset = _row(offsets, (i * WORDS + part * TILE) // GROUP)
            codes = codes_at(tiles[part], i * BITS, BITS)
            products = _dot_codes(codes, folded, tl.zeros([TILE, ROWS], tl.float32))
            unit = factor * (2.0 ** (CODE_EXPONENT - code_position(i * BITS, BITS)))
            logits = logits + (products * unit[None, :] + offset[None, :],)
    return logits


@triton.jit
def _logits_channel_groups(
    q, CODES, SCALE, ZERO, factor, D: tl.constexpr, DP: tl.constexpr, WORDS: tl.constexpr, TILE: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, SLICES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The same where keys are grouped along channels. `q` is [DP / GROUP, GROUP, ROWS]."""
    group = tl.arange(0, DP // GROUP)
    channel = group[:, None, None] * GROUP + tl.arange(0, GROUP)[None, None, :]
    real = group * GROUP < D
    token = tl.arange(0, TILE)
    total = tl.sum(q.to(tl.float32), 1)  # [groups, ROWS]
    tiles = ()
    for part in tl.static_range(WORDS // TILE):
        word_ptr = CODES + (part * TILE + token)[None, :, None] * D + channel
        tiles = tiles + (tl.load(word_ptr, mask=real[:, None, None], other=0),)
    logits = ()
    for i in tl.static_range(SLICES):
        for part in tl.static_range(WORDS // TILE):
            codes = codes_at(tiles[part], i * BITS, BITS)
            products = _dot_codes(codes, q, tl.zeros([DP // GROUP, TILE, ROWS], tl.float32))
            products *= 2.0 ** (CODE_EXPONENT - code_position(i * BITS, BITS))
            place = group[:, None] * BLOCK + i * WORDS + part * TILE + token[None, :]
            scale = to_fp32(tl.load(SCALE + place, mask=real[:, None], other=0.0))
            zero = to_fp32(tl.load(ZERO + place, mask=real[:, None], other=0.0))
            parts = products * scale[:, :, None] + zero[:, :, None] * total[:, None, :]
            logits = logits + (tl.sum(parts, 0) * factor[None, :],)
    return logits


@triton.jit
def _largest(tiles):
    """Elementwise maximum of a tuple of tensors."""
    top = tiles[0]
    for i in tl.static_range(1, len(tiles)):
        top = tl.maximum(top, tiles[i])
    return top


@triton.jit
def _joined(tiles):
    """A tuple of 2**n tiles [ROWS, T], side by side."""
    for _ in tl.static_range(log2(len(tiles))):
        pairs = ()
        for i in tl.static_range(0, len(tiles), 2):
            both = tl.permute(tl.join(tiles[i], tiles[i + 1]), (0, 2, 1))
            pairs = pairs + (tl.reshape(both, [both.shape[0], 2 * both.shape[2]]),)
        tiles = pairs
    return tiles[0]


@triton.jit
def _halves(tiles):
    """A tuple of 2**n tiles [ROWS, T], side by side: (their even columns, their odd ones)."""
    evens = ()
    odds = ()
    for i in tl.static_range(len(tiles)):
        even, odd = tl.split(tl.reshape(tiles[i], [tiles[i].shape[0], tiles[i].shape[1] // 2, 2]))
        evens = evens + (even,)
        odds = odds + (odd,)
    return _joined(evens), _joined(odds)


@triton.jit
def _operand(even, odd):
    """Even and odd columns as the second operand of a product: [columns, ROWS]."""
    both = tl.reshape(tl.join(even, odd), [even.shape[0], 2 * even.shape[1]])
    return pinned(tl.trans(both))


@triton.jit
def _finite_max(m):
    """`m`, or something finite where nothing was seen yet, so that exp2(-inf - m) is 0 and not NaN."""
    return tl.maximum(m, LOWEST)


@triton.jit
def _fold(even, odd, scale, weight):
    """Probabilities [ROWS, BLOCK / 2] of even and odd tokens, times the tokens' scale [BLOCK] times a power of two, as
    an operand [BLOCK, ROWS]."""
    if even.dtype == tl.float32:
        scale_even, scale_odd = tl.split(tl.reshape(to_fp32(scale) * weight, [scale.shape[0] // 2, 2]))
        return _operand(even * scale_even[None, :], odd * scale_odd[None, :])
    else:
        even, odd = times_scale(even, odd, scale, weight)
        return _operand(even, odd)


@triton.jit
def _store_tile(OUT, real, out, offset, size, CHANNEL: tl.constexpr, POSITION: tl.constexpr, BITS: tl.constexpr):
    # Two factors: their product could overflow.
    codes_part = out * (2.0 ** (CODE_EXPONENT - code_position(POSITION, BITS) - P_EXPONENT - S_EXPONENT)) * exp2i(size)
    result = codes_part + (offset * 2.0**-P_EXPONENT)[None, :]
    tl.store(OUT[None, :] + (CHANNEL + tl.arange(0, out.shape[0]))[:, None], result, mask=real[None, :])


@triton.jit
def _attend_tier(
    q_ptr, real, factor, K_CODES, K_SCALE, K_ZERO, V_CODES, V_SCALE, V_ZERO, OUT, place, first, last,
    D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, BITS: tl.constexpr, K_GROUP: tl.constexpr,
    K_TOKEN_AXIS: tl.constexpr, V_GROUP: tl.constexpr, BLOCK: tl.constexpr, WORDS: tl.constexpr,
    SLICES: tl.constexpr, CHUNKS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Blocks `first ... last - 1` of the tier that starts at block `place`.

    Stores the output of `real` rows, not divided by its sum, in OUT [D, ROWS]. Returns (maximum [ROWS] base 2, sum
    [ROWS]).
    """
    # Tokens per tile: a slice of a word tile, or a part of one so that no tile spans two token groups.
    K_TILE: tl.constexpr = min(K_GROUP if K_TOKEN_AXIS else 16, WORDS)
    K_META: tl.constexpr = BLOCK // K_GROUP * D if K_TOKEN_AXIS else D // K_GROUP * BLOCK
    GROUPS: tl.constexpr = D // V_GROUP
    Z_ROWS: tl.constexpr = next_power_of_2(GROUPS + 1)
    LOADS: tl.constexpr = value_loads(CHUNKS, V_GROUP, SLICES)
    TILES: tl.constexpr = value_tiles(CHUNKS, V_GROUP, SLICES)
    token = tl.arange(0, BLOCK)
    z_row = tl.arange(0, Z_ROWS)
    if K_TOKEN_AXIS:
        q = tl.load(q_ptr[None, :] + tl.arange(0, DP)[:, None], mask=real[None, :], other=0.0)
    else:
        inner = tl.arange(0, DP // K_GROUP)[:, None, None] * K_GROUP + tl.arange(0, K_GROUP)[None, :, None]
        q = tl.load(q_ptr[None, None, :] + inner, mask=real[None, None, :], other=0.0)

    m = tl.full([ROWS], -float("inf"), tl.float32)
    zeros = tl.zeros([Z_ROWS, ROWS], tl.float32)  # sum_t p_t z_tg in row g, sum_t p_t in the next
    size = tl.full([], LEAST, tl.int32)  # the largest exponent of a value scale yet
    out = ()
    for i in tl.static_range(length_of(TILES)):
        out = out + (tl.zeros([entry(LOADS, entry(TILES, i, 2), 1), ROWS], tl.float32),)

    for block in range(first, last):
        at = place + block
        k_codes = K_CODES + at * (WORDS * D)
        k_scale = K_SCALE + at * K_META
        k_zero = K_ZERO + at * K_META
        if K_TOKEN_AXIS:
            logits = _logits_token_groups(
                q, k_codes, k_scale, k_zero, factor, D, DP, WORDS, K_TILE, BITS, K_GROUP, SLICES, ROWS, BLOCK
            )
        else:
            logits = _logits_channel_groups(
                q, k_codes, k_scale, k_zero, factor, D, DP, WORDS, K_TILE, BITS, K_GROUP, SLICES, ROWS, BLOCK
            )
        v_scale = V_SCALE + at * (GROUPS * BLOCK)
        scales = ()
        for group in tl.static_range(GROUPS):
            scales = scales + (tl.load(v_scale + group * BLOCK + token),)

        z_ptr = V_ZERO + at * (GROUPS * BLOCK) + z_row[:, None] * BLOCK + token[None, :]
        z = tl.load(z_ptr, mask=(z_row < GROUPS)[:, None], other=1.0)

        m_new = tl.maximum(m, tl.max(_largest(logits), 0))
        top = _finite_max(m_new)
        decay = tl.exp2(m - top)
        m = m_new
        size_new = tl.maximum(size, exponent(tl.max(to_fp32(_largest(scales)), 0)))
        out_decay = decay * exp2i(size - size_new)
        size = size_new
        probs = ()
        for i in tl.static_range(len(logits)):
            p = tl.exp2(logits[i] - (top - P_EXPONENT)[None, :])
            probs = probs + (tl.trans(pinned(p)) if EXACT else transposed(p.to(tl.float16)),)
        even, odd = _halves(probs)
        zeros = _dot_codes(to_fp16(z), _operand(even, odd), zeros * decay[None, :])
        weight = exp2i(-size + S_EXPONENT)
        v_words = V_CODES + at * (WORDS * D)
        loads = ()
        for i in tl.static_range(length_of(LOADS)):
            word = entry(LOADS, i, 0) + tl.arange(0, entry(LOADS, i, 1))
            loads = loads + (tl.load(v_words + word[:, None] * BLOCK + token[None, :]),)
        added = ()
        for i in tl.static_range(length_of(TILES)):
            if i == 0 or entry(TILES, i, 0) // V_GROUP != entry(TILES, i - 1, 0) // V_GROUP:
                folded = _fold(even, odd, scales[entry(TILES, i, 0) // V_GROUP], weight)
            codes = codes_at(loads[entry(TILES, i, 2)], entry(TILES, i, 1) * BITS, BITS)
            added = added + (_dot_codes(codes, folded, out[i] * out_decay[None, :]),)
        out = added

    for i in tl.static_range(length_of(TILES)):
        offset = _row(zeros, entry(TILES, i, 0) // V_GROUP)
        _store_tile(OUT, real, out[i], offset, size, entry(TILES, i, 0), entry(TILES, i, 1) * BITS, BITS)
    return m, _row(zeros, GROUPS) * (2.0**-P_EXPONENT)


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
        top = _finite_max(m_new)
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
    line = tl.arange(0, next_power_of_2(2 * BYTES // 128)) * 128
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
    WORDS: tl.constexpr, SLICES: tl.constexpr, CHUNKS: tl.constexpr, DENSE_OPERAND: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr,
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
                part += slots.to(tl.int64) * (ROWS * (D + 4))
                m, total = _attend_tier(
                    Q_TIER + q_row.to(tl.int64) * DP, real, tl.load(FACTOR + q_row, mask=real, other=0.0),
                    K_CODES, K_SCALE, K_ZERO, V_CODES, V_SCALE, V_ZERO, part, pair.to(tl.int64) * capacity,
                    tl.maximum(first - dense_units, 0), stop - dense_units, D, DP, ROWS, BITS, K_GROUP, K_TOKEN_AXIS,
                    V_GROUP, BLOCK, WORDS, SLICES, CHUNKS, Q_TIER.dtype.element_ty == tl.float32,
                )  # fmt: skip
                tl.store(part + D, m, mask=real)
                tl.store(part + D + 1, total, mask=real)


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
    top = _finite_max(m_new)
    decay = tl.exp2(m - top)
    weight = tl.exp2(part_m - top[:, None])
    out = out * decay[:, None] + tl.sum(part * weight[:, :, None], 1)
    return out, m_new, total * decay + tl.sum(part_total * weight, 1)


@triton.jit(do_not_specialize=["batch", "length", "programs", "slots"])
def _merge_kernel(
    PARTS, STATE, ROTATION, RESULT, batch, length, programs, slots, stride_ob, stride_oh, stride_on,
    KV_HEADS: tl.constexpr, RATIO: tl.constexpr, NEW: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    ROWS: tl.constexpr, TILES: tl.constexpr, BATCH: tl.constexpr, UNIT: tl.constexpr, HAS_TIER: tl.constexpr,
    BLOCK: tl.constexpr, MERGED: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, ROTATE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program: COLUMNS channels of MERGED query rows."""
    out, row, channel = _merged(
        PARTS, STATE, ROTATION, batch, length, programs, slots, KV_HEADS, RATIO, NEW, D, DP, ROWS, TILES, BATCH, UNIT,
        HAS_TIER, BLOCK, MERGED, COLUMNS, STEP, ROTATE, PDL,
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
    BLOCK: tl.constexpr, MERGED: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, ROTATE: tl.constexpr,
    PDL: tl.constexpr,
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
        top = _finite_max(tl.maximum(m, tier_m))
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


@functools.cache
def _device_properties(device: torch.device) -> tuple[int, bool]:
    """(multiprocessors, whether a kernel can be launched while the one before it runs)."""
    if device.type != "cuda":
        return 1, False
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, torch.version.hip is None and properties.major >= 9


def block_bytes(dim: int, bits: int, k_group: int, v_group: int) -> float:
    """Of one tier block, keys and values."""
    return BLOCK * dim * (bits / 4 + 4 / k_group + 4 / v_group)


MERGE_WARPS = 8


@dataclass(frozen=True)
class Launches:
    """What the three launches need besides tensors, lengths, capacities and strides: shared by `attend_triton` and
    Inductor's templates (`minikv_compile.lowering`)."""

    rows: int
    """Query rows, of all heads and batch rows."""
    items: int
    programs: int
    """Of split, at most."""
    slots: int
    """Of parts, enough for so many programs."""
    rotated: int
    """Programs of prepare that rotate q."""
    prepare_grid: tuple[int, int]
    merge_grid: tuple[int, int]
    tier_dtype: torch.dtype
    """Of q where it meets the tier."""
    sizes: dict[str, int]
    """Constants of all kernels; then those of split and merge, and of each."""
    line: dict[str, int]
    prepare: dict[str, int]
    split: dict[str, object]
    merge: dict[str, int]
    stages: int
    registers: int | None
    pdl: bool

    @property
    def q_tier_shape(self) -> tuple[int, int]:
        return self.rows, self.sizes["DP"]

    @property
    def parts_shape(self) -> tuple[int, int, int, int]:
        return 2, self.slots, self.line["ROWS"], self.sizes["D"] + 4


def launches(
    batch: int, heads: int, n: int, dim: int, kv_heads: int, dtype: torch.dtype, tier: bool, bits: int, k_group: int,
    k_axis: GroupAxis, v_group: int, rotate: bool, device: torch.device, tuning: AttendTuning | None = None,
) -> Launches:  # fmt: skip
    """The launches for so many queries; `tier`: whether there is one."""
    padded, ratio = triton.next_power_of_2(dim), heads // kv_heads
    if tuning is None:
        size = block_bytes(dim, bits, k_group, v_group) if tier else 0
        tuning = attend_tuning(padded, dtype.itemsize, size, batch * heads * n)
    row_tile = min(tuning.rows, max(tuning.min_rows, triton.next_power_of_2(ratio * n)))
    tiles = triton.cdiv(ratio * n, row_tile)
    items, rows = batch * kv_heads * tiles, batch * heads * n
    multiprocessors, pdl = _device_properties(device)
    programs = multiprocessors * tuning.programs
    merged, columns, step = merge_tuning(rows, tuning)
    rotated = triton.cdiv(rows, 16) if tier else 0
    return Launches(
        rows=rows, items=items, programs=programs, slots=programs + items, rotated=rotated,
        prepare_grid=(rotated + triton.cdiv(batch * kv_heads * n, 16), triton.cdiv(padded, tuning.prepare_columns)),
        merge_grid=(triton.cdiv(rows, merged), triton.cdiv(padded, columns)),
        tier_dtype=torch.float32 if dtype == torch.float32 else torch.float16,
        sizes=dict(KV_HEADS=kv_heads, RATIO=ratio, NEW=n, D=dim, DP=padded, PDL=pdl),
        line=dict(ROWS=row_tile, TILES=tiles, BATCH=triton.next_power_of_2(batch), UNIT=tuning.unit, HAS_TIER=tier,
                  BLOCK=BLOCK),
        prepare=dict(ROWS=16, COLUMNS=min(padded, tuning.prepare_columns), ROTATE=rotate),
        split=dict(BITS=bits, K_GROUP=k_group, K_TOKEN_AXIS=k_axis == "token", V_GROUP=v_group, WORDS=words(bits),
                   SLICES=WORD_BITS // bits, CHUNKS=tuple(value_chunks(dim)), DENSE_OPERAND=operand_dtype(dtype),
                   PRECISION=dot_precision(dtype)),
        merge=dict(MERGED=merged, COLUMNS=min(padded, columns), STEP=step, ROTATE=rotate),
        stages=tuning.stages, registers=tuning.registers, pdl=pdl,
    )  # fmt: skip


def attend_triton(
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    k_tier: Packed | None,
    v_tier: Packed | None,
    k_dense: Tensor,
    v_dense: Tensor,
    state: Tensor,
    length: int,
    scale: float,
    bits: int,
    k_group: int,
    k_axis: GroupAxis,
    v_group: int,
    rotation: Tensor | None,
    tuning: AttendTuning | None = None,
) -> Tensor:
    """`attend` as Triton kernels, in three launches. Nothing that it does on the host depends on device data."""
    check_dtype(q, k_new, v_new, k_dense, v_dense)
    check_head_dim(q.shape[-1])
    tier = (*k_tier, *v_tier) if k_tier is not None else ()
    if not all(t.is_contiguous() for t in (*tier, state)) or k_dense.stride(-1) != 1 or v_dense.stride(-1) != 1:
        raise ValueError("attend needs a contiguous tier and state, and dense regions with contiguous channels.")
    q, k_new, v_new = unit_last(q), unit_last(k_new), unit_last(v_new)
    batch, heads, n, dim = q.shape
    kv_heads, dense_capacity = k_dense.shape[1:3]
    rotate = rotation is not None and bool(tier)
    to = launches(batch, heads, n, dim, kv_heads, q.dtype, bool(tier), bits, k_group, k_axis, v_group, rotate, q.device,
                  tuning)  # fmt: skip
    capacity = tier[0].shape[2] if tier else 0
    # From capacities, never from lengths, which are on the device.
    units = to.items * (triton.cdiv(dense_capacity, to.line["UNIT"]) + capacity)
    programs = min(to.programs, units)

    q_tier = torch.empty(to.q_tier_shape, dtype=to.tier_dtype, device=q.device)
    factor = torch.empty(to.rows, dtype=torch.float32, device=q.device)
    parts = torch.empty(to.parts_shape, dtype=torch.float32, device=q.device)
    out = torch.empty(batch, heads, n, dim, dtype=q.dtype, device=q.device)
    matrix = factor if rotation is None else rotation.to(torch.float32).contiguous()
    dense_strides = (*k_dense.stride()[:3], *v_dense.stride()[:3])

    _prepare_kernel[to.prepare_grid](
        q, k_new, v_new, k_dense, v_dense, state, matrix, q_tier, factor, batch, to.rotated, length, scale,
        *q.stride()[:3], *k_new.stride()[:3], *v_new.stride()[:3], *dense_strides, **to.sizes, **to.prepare,
    )  # fmt: skip
    _split_kernel[(programs,)](
        q, q_tier, factor, *(tier or [factor] * 6), k_dense, v_dense, state, parts, batch, length, scale, capacity,
        to.slots, *q.stride()[:3], *dense_strides, **to.sizes, **to.line, **to.split, num_warps=1,
        num_stages=to.stages, maxnreg=to.registers, launch_pdl=to.pdl,
    )  # fmt: skip
    _merge_kernel[to.merge_grid](
        parts, state, matrix, out, batch, length, programs, to.slots, *out.stride()[:3], **to.sizes, **to.line,
        **to.merge, num_warps=MERGE_WARPS, num_stages=1, launch_pdl=to.pdl,
    )  # fmt: skip
    return out


def attend(
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    k_tier: Packed | None,
    v_tier: Packed | None,
    k_dense: Tensor,
    v_dense: Tensor,
    state: Tensor,
    length: int,
    scale: float,
    bits: int,
    k_group: int,
    k_axis: GroupAxis,
    v_group: int,
    rotation: Tensor | None,
) -> Tensor:
    """Append the new tokens to the dense regions, in place, and attend from them over the tier and the dense region.

    Args:
        k_new, v_new: [batch, kv_heads, n, head_dim]. The dense regions have room for them.
        The others as in `attend_reference`; `length` counts the new tokens, and `state[b, 2]` is a multiple of BLOCK.

    Returns:
        [batch, heads, n, head_dim] in the dtype of `q`.
    """
    if q.is_cuda:
        return attend_triton(
            q, k_new, v_new, k_tier, v_tier, k_dense, v_dense, state, length, scale, bits, k_group, k_axis, v_group,
            rotation,
        )  # fmt: skip
    append(k_dense, k_new, state, length)
    append(v_dense, v_new, state, length)
    return attend_reference(
        q, k_tier, v_tier, k_dense, v_dense, state, length, scale, bits, k_group, k_axis, v_group, rotation
    )
