"""Attention of new tokens over a compressed past: packed tier + dense region, one softmax."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

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
    round_to,
    to_fp16,
    to_fp32,
    to_operand,
    unit_last,
    value_loads,
    value_tiles,
)
from .packing import BLOCK, WORD_BITS, GroupAxis, dequantize, unpack, value_chunks, words
from .tuning import AttendTuning, attend_blocks_per_split, attend_tuning

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


# The kernels. Three launches: prepare (append the new tokens; rotate and normalise q), split (one softmax per split of the
# tier, and per split of the dense region), merge (combine the splits; rotate the tier's part back).
#
# Arithmetic of the tier, with c a code, s and z its group's scale and zero, t a token, d a channel:
#
#   logit_t = sum_d q_d (s c + z)     groups along tokens:   = sum_d (q_d s_d) c_td + sum_d q_d z_d
#                                     groups along channels: = sum_g s_tg (sum_{d in g} q_d c_td) + z_tg sum_{d in g} q_d
#   out_d   = sum_t p_t (s c + z)     groups along channels: = sum_t (p_t s_tg) c_td + sum_t p_t z_tg
#
# so that codes enter the matrix products as they are, and scales touch q and p only, which are far smaller. q comes
# normalised to at most 1 by a power of two and p s is kept near 2**15, by the running exponent of s: fp16 operands neither
# overflow nor lose their small values.

P_EXPONENT = tl.constexpr(7)
"""p <= 2**P_EXPONENT as an operand."""

S_EXPONENT = tl.constexpr(7)
"""scale < 2**(S_EXPONENT + 1) where it is folded into p, so that the product fits in fp16."""

LEAST = tl.constexpr(-100)
"""Exponents of all scales are taken as at least this."""


@triton.jit
def _row_pointers(pair, row, RATIO: tl.constexpr, NEW: tl.constexpr, stride_b, stride_h, stride_n, KV_HEADS: tl.constexpr):
    """Offsets of query rows: row r of a KV head is new token r % NEW of its query head r // NEW."""
    batch = (pair // KV_HEADS).to(tl.int64)
    head = pair % KV_HEADS * RATIO + row // NEW
    return batch * stride_b + head.to(tl.int64) * stride_h + (row % NEW).to(tl.int64) * stride_n


@triton.jit
def _append(NEW_TOKENS, DENSE, pair, slot0, channel, stride_nb, stride_nh, stride_nn, stride_db, stride_dh, stride_ds,
            KV_HEADS: tl.constexpr, NEW: tl.constexpr, NEW_PADDED: tl.constexpr, D: tl.constexpr):  # fmt: skip
    batch = (pair // KV_HEADS).to(tl.int64)
    head = (pair % KV_HEADS).to(tl.int64)
    token = tl.arange(0, NEW_PADDED)
    mask = (token < NEW)[:, None] & (channel < D)[None, :]
    source = NEW_TOKENS + batch * stride_nb + head * stride_nh
    x = tl.load(source + token.to(tl.int64)[:, None] * stride_nn + channel[None, :], mask=mask, other=0.0)
    target = DENSE + batch * stride_db + head * stride_dh
    tl.store(target + (slot0 + token).to(tl.int64)[:, None] * stride_ds + channel[None, :], x, mask=mask)


@triton.jit(do_not_specialize=["length"])
def _prepare_kernel(
    Q, K_NEW, V_NEW, K_DENSE, V_DENSE, STATE, ROTATION, Q_OUT, FACTOR, length, scale,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_kdb, stride_kdh, stride_kds, stride_vdb, stride_vdh, stride_vds,
    KV_HEADS: tl.constexpr, RATIO: tl.constexpr, NEW: tl.constexpr, NEW_PADDED: tl.constexpr, ROWS: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, COLUMNS: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """One program: COLUMNS channels of one KV head; ROWS of its query rows.

    Q_OUT [pairs, rows, DP]: q rotated, times a power of two that makes it at most 1, zero in the padding.
    FACTOR fp32 [pairs, rows]: what turns its products with keys into logits to the base of 2.
    """
    pair = tl.program_id(0)
    channel = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    rows = tl.num_programs(2) * ROWS
    if tl.program_id(2) == 0:
        slot0 = length - NEW - tl.load(STATE + pair // KV_HEADS * 3)
        _append(K_NEW, K_DENSE, pair, slot0, channel, stride_kb, stride_kh, stride_kn, stride_kdb, stride_kdh, stride_kds,
                KV_HEADS, NEW, NEW_PADDED, D)  # fmt: skip
        _append(V_NEW, V_DENSE, pair, slot0, channel, stride_vb, stride_vh, stride_vn, stride_vdb, stride_vdh, stride_vds,
                KV_HEADS, NEW, NEW_PADDED, D)  # fmt: skip

    q_ptr = Q + _row_pointers(pair, row, RATIO, NEW, stride_qb, stride_qh, stride_qn, KV_HEADS)
    real = row < RATIO * NEW
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
        q = tl.dot(q * exp2i(-bound)[:, None], matrix, input_precision="ieee")
    else:
        q = tl.load(q_ptr[:, None] + channel[None, :], mask=real[:, None] & (channel < D)[None, :], other=0.0)
        q = to_fp32(q) * exp2i(-bound)[:, None]
    place = pair.to(tl.int64) * rows + row
    tl.store(Q_OUT + place[:, None] * DP + channel[None, :], round_to(q, Q_OUT.dtype.element_ty))
    if tl.program_id(1) == 0:
        tl.store(FACTOR + place, exp2i(bound) * (scale * LOG2E))


@triton.jit
def _dot_codes(codes, x, acc):
    """acc + codes @ x. Codes are fp16; an fp32 `x` enters as the sum of two fp16 numbers, so with 22 bits."""
    if x.dtype == tl.float32:
        high = x.to(tl.float16)
        acc = tl.dot(codes, (x - high.to(tl.float32)).to(tl.float16), acc)
        return tl.dot(codes, high, acc)
    else:
        return tl.dot(codes, x, acc)


@triton.jit
def _row(x, i):
    """Row i of a tile."""
    return tl.sum(tl.where(tl.arange(0, x.shape[0])[:, None] == i, x, 0.0), 0)


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
def _stack(tiles):
    """A tuple of 2**n tiles [T, ROWS], one below the other."""
    for _ in tl.static_range(log2(len(tiles))):
        pairs = ()
        for i in tl.static_range(0, len(tiles), 2):
            both = tl.permute(tl.join(tiles[i], tiles[i + 1]), (2, 0, 1))
            pairs = pairs + (tl.reshape(both, [2 * both.shape[1], both.shape[2]]),)
        tiles = pairs
    return tiles[0]


@triton.jit
def _finite_max(m):
    """`m`, or 0 where nothing was seen yet, so that exp2(-inf - m) is 0 and not NaN."""
    return tl.where(m == -float("inf"), 0.0, m)


@triton.jit
def _fold(p, scale, weight):
    """p [BLOCK, ROWS] times the tokens' scale [BLOCK] times a power of two."""
    if p.dtype == tl.float32:
        return p * (to_fp32(scale) * weight)[:, None]
    else:
        return p * (to_fp32(scale) * weight).to(tl.float16)[:, None]


@triton.jit
def _store_tile(OUT, out, offset, size, CHANNEL: tl.constexpr, POSITION: tl.constexpr, BITS: tl.constexpr):
    # Two factors: their product could overflow.
    codes_part = out * (2.0 ** (CODE_EXPONENT - code_position(POSITION, BITS) - P_EXPONENT - S_EXPONENT)) * exp2i(size)
    result = codes_part + (offset * 2.0**-P_EXPONENT)[None, :]
    tl.store(OUT[None, :] + (CHANNEL + tl.arange(0, out.shape[0]))[:, None], result)


@triton.jit
def _attend_tier(
    q_ptr, factor, K_CODES, K_SCALE, K_ZERO, V_CODES, V_SCALE, V_ZERO, OUT, place, first, last,
    D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, BITS: tl.constexpr, K_GROUP: tl.constexpr,
    K_TOKEN_AXIS: tl.constexpr, V_GROUP: tl.constexpr, BLOCK: tl.constexpr, WORDS: tl.constexpr,
    SLICES: tl.constexpr, CHUNKS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Blocks `first ... last - 1` of the tier that starts at block `place`.

    Stores the output, not divided by its sum, in OUT [D, ROWS]. Returns (maximum [ROWS] base 2, sum [ROWS]).
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
        q = tl.load(q_ptr[None, :] + tl.arange(0, DP)[:, None])
    else:
        inner = tl.arange(0, DP // K_GROUP)[:, None, None] * K_GROUP + tl.arange(0, K_GROUP)[None, :, None]
        q = tl.load(q_ptr[None, None, :] + inner)

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
        z = tl.load(z_ptr, mask=(z_row < GROUPS)[:, None], other=0.0)

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
            probs = probs + (p if EXACT else p.to(tl.float16),)
        probs = _stack(probs)
        # A row of ones: the product sums p, too.
        z = tl.where((z_row < GROUPS)[:, None], to_fp16(z), 1.0)
        zeros = _dot_codes(z, probs, zeros * decay[None, :])
        weight = exp2i(-size + S_EXPONENT)
        v_words = V_CODES + at * (WORDS * D)
        loads = ()
        for i in tl.static_range(length_of(LOADS)):
            word = entry(LOADS, i, 0) + tl.arange(0, entry(LOADS, i, 1))
            loads = loads + (tl.load(v_words + word[:, None] * BLOCK + token[None, :]),)
        added = ()
        for i in tl.static_range(length_of(TILES)):
            if i == 0 or entry(TILES, i, 0) // V_GROUP != entry(TILES, i - 1, 0) // V_GROUP:
                folded = _fold(probs, scales[entry(TILES, i, 0) // V_GROUP], weight)
            codes = codes_at(loads[entry(TILES, i, 2)], entry(TILES, i, 1) * BITS, BITS)
            added = added + (_dot_codes(codes, folded, out[i] * out_decay[None, :]),)
        out = added

    for i in tl.static_range(length_of(TILES)):
        offset = _row(zeros, entry(TILES, i, 0) // V_GROUP)
        _store_tile(OUT, out[i], offset, size, entry(TILES, i, 0), entry(TILES, i, 1) * BITS, BITS)
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


@triton.jit(do_not_specialize=["length", "capacity", "blocks_per_split", "dense_splits"])
def _split_kernel(
    Q, Q_TIER, FACTOR, K_CODES, K_SCALE, K_ZERO, V_CODES, V_SCALE, V_ZERO, K_DENSE, V_DENSE, STATE, OUT, MAXIMUM, TOTAL,
    length, scale, capacity, blocks_per_split, dense_splits,
    stride_qb, stride_qh, stride_qn, stride_kdb, stride_kdh, stride_kds, stride_vdb, stride_vdh, stride_vds,
    KV_HEADS: tl.constexpr, RATIO: tl.constexpr, NEW: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr,
    DP: tl.constexpr, BITS: tl.constexpr, K_GROUP: tl.constexpr, K_TOKEN_AXIS: tl.constexpr, V_GROUP: tl.constexpr,
    BLOCK: tl.constexpr, WORDS: tl.constexpr, SLICES: tl.constexpr, CHUNKS: tl.constexpr, HAS_TIER: tl.constexpr,
    DENSE_TOKENS: tl.constexpr, DENSE_STEP: tl.constexpr, DENSE_OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: one split, for ROWS query rows of one KV head, which share what is read.

    The first `dense_splits` splits are parts of the dense region, the others of the tier. A split past the row's tokens
    reports a sum of 0 and no output.

    OUT fp32 [pairs, splits, rows, D]; MAXIMUM, TOTAL fp32 [pairs, splits, rows].
    """
    split = tl.program_id(0)
    pair = tl.program_id(1)
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    rows = tl.num_programs(2) * ROWS
    batch = (pair // KV_HEADS).to(tl.int64)
    kv_head = (pair % KV_HEADS).to(tl.int64)
    result = (pair.to(tl.int64) * tl.num_programs(0) + split) * rows + row
    channel = tl.arange(0, DP)
    in_dense = length - tl.load(STATE + batch * 3)
    in_tier = tl.load(STATE + batch * 3 + 2) // BLOCK

    m = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if split < dense_splits:
        first = split * DENSE_TOKENS
        if first < in_dense:
            q_ptr = Q + _row_pointers(pair, row, RATIO, NEW, stride_qb, stride_qh, stride_qn, KV_HEADS)
            out, m, total = _attend_dense(
                q_ptr, row < RATIO * NEW, K_DENSE + batch * stride_kdb + kv_head * stride_kdh,
                V_DENSE + batch * stride_vdb + kv_head * stride_vdh, scale * LOG2E, first,
                tl.minimum(first + DENSE_TOKENS, in_dense), in_dense - (NEW - 1) + row % NEW, stride_kds, stride_vds,
                D, DP, ROWS, DENSE_STEP, DENSE_OPERAND, PRECISION,
            )  # fmt: skip
            tl.store(OUT + result[None, :] * D + channel[:, None], out, mask=(channel < D)[:, None])
    elif HAS_TIER:
        first = (split - dense_splits) * blocks_per_split
        if first < in_tier:
            place = pair.to(tl.int64) * rows + row
            m, total = _attend_tier(
                Q_TIER + place * DP, tl.load(FACTOR + place), K_CODES, K_SCALE, K_ZERO, V_CODES, V_SCALE, V_ZERO,
                OUT + result * D, pair.to(tl.int64) * capacity, first, tl.minimum(first + blocks_per_split, in_tier),
                D, DP, ROWS, BITS, K_GROUP, K_TOKEN_AXIS, V_GROUP, BLOCK, WORDS, SLICES, CHUNKS,
                Q_TIER.dtype.element_ty == tl.float32,
            )  # fmt: skip
    tl.store(MAXIMUM + result, m)
    tl.store(TOTAL + result, total)


@triton.jit
def _weighted(OUT, MAXIMUM, TOTAL, at, stride, first, last, top, channel, D: tl.constexpr, STEP: tl.constexpr):
    """Sum of splits `first ... last - 1`, relative to the maximum `top`: (output like `channel`, sum of weights)."""
    out = tl.zeros([channel.shape[0]], tl.float32)
    total = 0.0
    for split0 in range(first, last, STEP):
        split = split0 + tl.arange(0, STEP)
        place = at + split.to(tl.int64) * stride
        m = tl.load(MAXIMUM + place, mask=split < last, other=-float("inf"))
        weight = tl.exp2(m - top)
        # A split without tokens has written no output: what is there may be NaN.
        part_ptr = OUT + place[:, None] * D + channel[None, :]
        part = tl.load(part_ptr, mask=(weight > 0)[:, None] & (channel < D)[None, :], other=0.0)
        out += tl.sum(part * weight[:, None], 0)
        total += tl.sum(tl.load(TOTAL + place, mask=split < last, other=0.0) * weight, 0)
    return out, total


@triton.jit(do_not_specialize=["splits", "dense_splits", "rows"])
def _merge_kernel(
    OUT, MAXIMUM, TOTAL, ROTATION, RESULT, splits, dense_splits, rows, stride_ob, stride_oh, stride_on,
    KV_HEADS: tl.constexpr, RATIO: tl.constexpr, NEW: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    COLUMNS: tl.constexpr, STEP: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """One program: COLUMNS channels of one query row. out = tier @ R^T + dense, over the sum of weights."""
    pair = tl.program_id(0)
    row = tl.program_id(1)
    channel = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    at = pair.to(tl.int64) * splits * rows + row
    top = -float("inf")
    for split0 in range(0, splits, STEP):
        split = split0 + tl.arange(0, STEP)
        place = MAXIMUM + at + split.to(tl.int64) * rows
        top = tl.maximum(top, tl.max(tl.load(place, mask=split < splits, other=-float("inf")), 0))
    out, total = _weighted(OUT, MAXIMUM, TOTAL, at, rows, 0, dense_splits, top, channel, D, STEP)
    if ROTATE:
        inner = tl.arange(0, DP)
        tier, tier_total = _weighted(OUT, MAXIMUM, TOTAL, at, rows, dense_splits, splits, top, inner, D, STEP)
        matrix_ptr = ROTATION + channel[:, None] * D + inner[None, :]
        matrix = tl.load(matrix_ptr, mask=(channel < D)[:, None] & (inner < D)[None, :], other=0.0)
        out += tl.sum(matrix * tier[None, :], 1)
    else:
        tier, tier_total = _weighted(OUT, MAXIMUM, TOTAL, at, rows, dense_splits, splits, top, channel, D, STEP)
        out += tier
    out = round_to(out / (total + tier_total), RESULT.dtype.element_ty)
    target = RESULT + _row_pointers(pair, row, RATIO, NEW, stride_ob, stride_oh, stride_on, KV_HEADS)
    tl.store(target + channel, out, mask=channel < D)


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


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
    ratio, pairs, padded = heads // kv_heads, batch * kv_heads, triton.next_power_of_2(dim)
    tuning = tuning or attend_tuning(padded, q.element_size())
    row_tile = min(tuning.rows, max(tuning.min_rows, triton.next_power_of_2(ratio * n)))
    row_tiles = triton.cdiv(ratio * n, row_tile)
    rows = row_tiles * row_tile

    capacity = blocks_per_split = tier_splits = 0
    if tier:
        capacity = tier[0].shape[2]
        blocks_per_split = attend_blocks_per_split(capacity, pairs * row_tiles, _multiprocessors(q.device), tuning)
        tier_splits = triton.cdiv(capacity, blocks_per_split)
    dense_splits = triton.cdiv(dense_capacity, tuning.dense_tokens)
    splits = dense_splits + tier_splits

    fp32 = dict(dtype=torch.float32, device=q.device)
    tier_dtype = torch.float32 if q.dtype == torch.float32 else torch.float16
    q_tier = torch.empty(pairs, rows, padded, dtype=tier_dtype, device=q.device)
    factor = torch.empty(pairs, rows, **fp32)
    partial = torch.empty(pairs, splits, rows, dim, **fp32)
    maximum, total = torch.empty(2, pairs, splits, rows, **fp32).unbind()
    out = torch.empty(batch, heads, n, dim, dtype=q.dtype, device=q.device)
    matrix = factor if rotation is None else rotation.to(torch.float32).contiguous()
    sizes = dict(KV_HEADS=kv_heads, RATIO=ratio, NEW=n, D=dim, DP=padded)
    columns = min(padded, tuning.merge_columns)
    dense_strides = (*k_dense.stride()[:3], *v_dense.stride()[:3])

    _prepare_kernel[pairs, padded // columns, row_tiles](
        q, k_new, v_new, k_dense, v_dense, state, matrix, q_tier, factor, length, scale, *q.stride()[:3],
        *k_new.stride()[:3], *v_new.stride()[:3], *dense_strides, **sizes, NEW_PADDED=triton.next_power_of_2(n),
        ROWS=row_tile, COLUMNS=columns, ROTATE=rotation is not None and bool(tier),
    )  # fmt: skip
    _split_kernel[splits, pairs, row_tiles](
        q, q_tier, factor, *(tier or [factor] * 6), k_dense, v_dense, state, partial, maximum, total, length, scale,
        capacity, blocks_per_split, dense_splits, *q.stride()[:3], *dense_strides, **sizes, ROWS=row_tile, BITS=bits,
        K_GROUP=k_group, K_TOKEN_AXIS=k_axis == "token", V_GROUP=v_group, BLOCK=BLOCK, WORDS=words(bits),
        SLICES=WORD_BITS // bits, CHUNKS=tuple(value_chunks(dim)), HAS_TIER=bool(tier),
        DENSE_TOKENS=tuning.dense_tokens, DENSE_STEP=tuning.dense_step, DENSE_OPERAND=operand_dtype(q.dtype),
        PRECISION=dot_precision(q.dtype), num_warps=tuning.warps, num_stages=tuning.stages, maxnreg=tuning.registers,
    )  # fmt: skip
    _merge_kernel[pairs, ratio * n, padded // columns](
        partial, maximum, total, matrix, out, splits, dense_splits, rows, *out.stride()[:3], **sizes, COLUMNS=columns,
        STEP=tuning.merge_splits, ROTATE=rotation is not None and bool(tier),
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
