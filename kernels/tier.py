"""Device functions of attention over a packed tier, whose codes enter matrix products as they are."""

from __future__ import annotations

import triton
import triton.language as tl

from .jit import (
    CODE_EXPONENT,
    INTERPRET,
    LOG2E,
    MOST_NOISE,
    code_position,
    codes_at,
    differ,
    entry,
    exp2i,
    exponent,
    first,
    length_of,
    log2,
    next_power_of_2,
    of_row,
    pinned,
    stored_scale,
    stored_zero,
    tile_rows,
    times,
    to_fp32,
    together,
    transposed,
    value_loads,
    value_tiles,
)

# Arithmetic of the tier, with c a code, s and z its group's scale and zero, t a token, d a channel:
#
#   logit_t = sum_d q_d (s c + z)   groups along tokens:   = sum_d (q_d s_d) c_td + sum_d q_d z_d
#                                   groups along channels: = sum_g s_tg (sum_{d in g} q_d c_td) + z_tg sum_{d in g} q_d
#   out_d   = sum_t p_t (s c + z)   groups along channels: = sum_t (p_t s_tg) c_td + sum_t p_t z_tg
#
# and, where NOISE is not 0, each logit less NOISE * scale^2 sum_d (q_d s_d)^2 (`MiniKVConfig.noise_correction`), but no more than
# MOST_NOISE.
#
# so that codes enter the matrix products as they are, and scales touch q and p only, which are far smaller. q comes
# normalised to at most 1 by a power of two, and p is kept as large as the running exponent of s allows: fp16 operands
# neither overflow nor lose their small values.

MOST_EXPONENT = tl.constexpr(14)
"""Probabilities and scales: 2**p * 2**s < 2**(MOST_EXPONENT + 1) of the largest p and the largest s, so that their product fits
in fp16."""

LEAST_SIZE = tl.constexpr(-1)
"""Exponents of all scales are taken as at least this, so that probabilities fit, too."""

LOWEST = tl.constexpr(-1e30)
"""Stands for the maximum of no logits."""


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
def _spread(x, ROW: tl.constexpr, T: tl.constexpr):
    """Row ROW of a product [8, ROWS], or of one with fewer rows, as a tile [T, ROWS], or as one row."""
    if x.shape[0] == 1:
        return x
    elif INTERPRET:
        return _row(x, ROW)[None, :]
    else:
        rows = tl.broadcast_to(of_row(x, ROW)[None, :, :], [T // x.shape[0], x.shape[0], x.shape[1]])
        return tl.reshape(rows, [T, x.shape[1]])


@triton.jit
def _side(ROWS: tl.constexpr, SIDES: tl.constexpr):
    """The side of each column of ROWS."""
    return tl.arange(0, ROWS) // (ROWS // SIDES)


@triton.jit
def _sides_added(x, SIDES: tl.constexpr):
    """[..., ROWS] -> [..., ROWS / SIDES]"""
    if SIDES == 1:
        return x
    elif len(x.shape) == 1:
        return tl.sum(tl.reshape(x, [SIDES, x.shape[0] // SIDES]), 0)
    else:
        return tl.sum(tl.reshape(x, [x.shape[0], SIDES, x.shape[1] // SIDES]), 1)


@triton.jit
def _squares(x):
    """The sums of squares of a tile's columns, [1, R], by a product with ones: of fp16 numbers, so that above 255 all
    count as inf, or, in fp32, as 255."""
    if x.dtype == tl.float32:
        x = tl.minimum(tl.maximum(x, -255.0), 255.0)
    return _sums(x * x, tl.zeros([1, x.shape[1]], tl.float32))


@triton.jit
def _sums(x, acc):
    """acc [1, R] + the sums of a tile's columns, by a product with ones."""
    return _dot_codes(tl.full([1, x.shape[0]], 1.0, tl.float16), x, acc)


@triton.jit
def _scales_at(SCALE, N: tl.constexpr, REAL: tl.constexpr, SIDES: tl.constexpr, STRIDE: tl.constexpr):
    """fp16 [N, SIDES]: the scales of N contracted places, of which REAL are there; a side's are STRIDE behind the last one's."""
    side = tl.arange(0, SIDES) * STRIDE
    if SCALE.dtype.element_ty != tl.uint8:
        # An operand's thread has pairs of places, eight apart. Loaded in an order in which its pairs are neighbours, so that
        # it gets four of them by one instruction, and none that is not its own.
        PAIRS: tl.constexpr = min(4, N // 8)
        place = tl.arange(0, N // (8 * PAIRS))[:, None, None, None] * (8 * PAIRS) + tl.arange(0, 4)[None, :, None, None] * 2
        place += tl.arange(0, PAIRS)[None, None, :, None] * 8 + tl.arange(0, 2)[None, None, None, :]
        place = place[None, :, :, :, :]
        scale = tl.load(SCALE + place + side[:, None, None, None, None], mask=place < REAL, other=0)
        return tl.reshape(tl.permute(scale, (1, 3, 2, 4, 0)), [N, SIDES])
    else:
        # Rows of less than 128 bytes are loaded as copies of themselves: what is copied to shared memory while others compute
        # are four bytes of each thread, at least, and all else would be waited for.
        place = tl.arange(0, N)[None, None, :]
        copy = tl.arange(0, max(128 // (N * SIDES), 1))[:, None, None] * 0
        scale = stored_scale(tl.load(SCALE + place + copy + side[None, :, None], mask=place < REAL, other=0))
        return tl.trans(tl.reduce(scale, 0, first))


@triton.jit
def _scaled(x, scale):
    """An operand [N, ROWS] times the scales [N, SIDES] of its places and its columns' sides."""
    shape: tl.constexpr = [scale.shape[0], scale.shape[1], x.shape[1] // scale.shape[1]]
    return tl.reshape(times(tl.reshape(x, shape), scale[:, :, None]), x.shape)


@triton.jit
def _by_side(tiles, ROWS: tl.constexpr):
    """Of each column of tiles [T, ROWS] that of its side's tile."""
    out = tiles[0]
    for side in tl.static_range(1, len(tiles)):
        out = tl.where((_side(ROWS, len(tiles)) == side)[None, :], tiles[side], out)
    return out


@triton.jit
def _logits_token_groups(
    q, CODES, SCALE, ZERO, factor, D: tl.constexpr, DP: tl.constexpr, WORDS: tl.constexpr, TILE: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, SLICES: tl.constexpr, ROWS: tl.constexpr, SIDES: tl.constexpr,
    BLOCK: tl.constexpr, NOISE: tl.constexpr,
):  # fmt: skip
    """Logits of one block, base 2: a tuple of tiles [TILE, ROWS], tokens of each side ascending. `q` is [DP, ROWS]."""
    STEPS: tl.constexpr = SLICES // SIDES  # slices of a side
    GROUPS: tl.constexpr = BLOCK // GROUP
    APART: tl.constexpr = STEPS * WORDS // GROUP  # groups from one side to the next
    COPIES: tl.constexpr = max(128 // DP, 1) if SCALE.dtype.element_ty == tl.uint8 else 1
    channel = tl.arange(0, DP)
    token = tl.arange(0, TILE)
    real = channel < D
    tiles = ()
    for part in tl.static_range(WORDS // TILE):
        word_ptr = CODES + (part * TILE + token)[:, None] * D + channel[None, :]
        tiles = tiles + (tl.load(word_ptr, mask=real[None, :], other=0),)
    place = tl.minimum(tl.arange(0, max(GROUPS, COPIES)), GROUPS - 1)[:, None] * D + channel[None, :]
    zero = tl.load(ZERO + place, mask=real[None, :], other=0)
    if ZERO.dtype.element_ty == tl.uint8:
        zero = stored_zero(zero, tl.load(SCALE + place, mask=real[None, :], other=0), BITS)
    offsets = _dot_codes(zero, q, tl.zeros([zero.shape[0], ROWS], tl.float32)) * factor[None, :]
    logits = ()
    for i in tl.static_range(STEPS):
        unit = factor * (2.0 ** (CODE_EXPONENT - code_position(i * BITS, BITS)))
        for side in tl.static_range(1, SIDES):
            power = 2.0 ** (CODE_EXPONENT - code_position((side * STEPS + i) * BITS, BITS))
            unit = tl.where(_side(ROWS, SIDES) == side, factor * power, unit)
        for part in tl.static_range(WORDS // TILE):
            if (i * WORDS + part * TILE) % GROUP == 0:
                scale = SCALE + (i * WORDS + part * TILE) // GROUP * D
                folded = _scaled(q, _scales_at(scale, DP, D, SIDES if APART > 0 else 1, APART * D))
                offset = ()
                for side in tl.static_range(SIDES):
                    offset = offset + (_spread(offsets, (i * WORDS + part * TILE) // GROUP + side * APART, TILE),)
                offset = _by_side(offset, ROWS)
                if NOISE > 0:
                    noise = _squares(folded) * (factor * factor * (NOISE / LOG2E))[None, :]
                    offset -= tl.minimum(noise, MOST_NOISE * LOG2E)
            products = ()
            for side in tl.static_range(SIDES):
                codes = codes_at(tiles[part], (side * STEPS + i) * BITS, BITS)
                products = products + (_dot_codes(codes, folded, tl.zeros([TILE, ROWS], tl.float32)),)
            logits = logits + (_by_side(products, ROWS) * unit[None, :] + offset,)
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
            scale = tl.load(SCALE + place, mask=real[:, None], other=0)
            zero = to_fp32(stored_zero(tl.load(ZERO + place, mask=real[:, None], other=0), scale, BITS))
            scale = to_fp32(stored_scale(scale))
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
def _operand(tiles):
    """Tiles [ROWS, T], side by side, as the second operand of a product: [columns, ROWS]."""
    even, odd = _halves(tiles)
    both = tl.reshape(tl.join(even, odd), [even.shape[0], 2 * even.shape[1]])
    return pinned(tl.trans(both))


@triton.jit
def _query(q_ptr, mask, DP: tl.constexpr):
    """fp16 [DP, ROWS], where the threads of a product's second operand have it, before the loop: by products with ones."""
    inner = tl.arange(0, 16)
    one = (inner[:, None] == inner[None, :]).to(tl.float16)
    tiles = ()
    for i in tl.static_range(0, DP, 16):
        part = tl.load(q_ptr[None, :] + (i + inner)[:, None], mask=mask[None, :], other=0.0)
        tiles = tiles + (transposed(tl.dot(one, part).to(tl.float16)),)
    return _operand(tiles)


@triton.jit
def finite_max(m):
    """`m`, or something finite where nothing was seen yet, so that exp2(-inf - m) is 0 and not NaN."""
    return tl.maximum(m, LOWEST)


@triton.jit
def _value_words(
    CODES, SIDE: tl.constexpr, SIDES: tl.constexpr, FIRST: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Rows FIRST ... FIRST + ROWS - 1 of the words of a side's tokens, or below one another those of all sides."""
    # Rows are multiplied where they are tiles: else each load computes addresses of its own (20 instructions in the loop).
    token = tl.arange(0, BLOCK // SIDES)
    if together(ROWS, SIDES):
        row = tl.arange(0, ROWS * SIDES)
        place = FIRST + row % ROWS
        CODES += row[:, None] // ROWS * (BLOCK // SIDES)
    else:
        place = FIRST + tl.arange(0, ROWS)
        CODES += SIDE * (BLOCK // SIDES)
    return tl.load(CODES + place[:, None] * BLOCK + token[None, :])


@triton.jit
def _own_side(out, SIDES: tl.constexpr, TOGETHER: tl.constexpr):
    """Of the output [channels, ROWS] of values of all sides, below one another, that of the column's side."""
    if SIDES == 1 or not TOGETHER:
        return out
    else:
        channels: tl.constexpr = out.shape[0] // SIDES
        of_row = tl.arange(0, out.shape[0]) // channels
        of_column = _side(out.shape[1], SIDES)
        out = tl.where(of_row[:, None] == of_column[None, :], out, 0.0)
        return tl.sum(tl.reshape(out, [SIDES, channels, out.shape[1]]), 0)


@triton.jit
def _sums_of_group(zeros, group, SIDES: tl.constexpr, GROUPS: tl.constexpr):
    """sum_t p_t z_tg of each column, from the row of its side."""
    sums = _row(zeros, group)
    for side in tl.static_range(1, SIDES):
        sums = tl.where(_side(sums.shape[0], SIDES) == side, _row(zeros, side * GROUPS + group), sums)
    return sums


@triton.jit
def attend_tier(
    q_ptr, real, factor, K_CODES, K_SCALE, K_ZERO, V_CODES, V_SCALE, V_ZERO, OUT, place, first, last, count,
    D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, SIDES: tl.constexpr, BITS: tl.constexpr,
    K_GROUP: tl.constexpr, K_TOKEN_AXIS: tl.constexpr, V_GROUP: tl.constexpr, BLOCK: tl.constexpr,
    WORDS: tl.constexpr, SLICES: tl.constexpr, CHUNKS: tl.constexpr, NOISE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Blocks `first ... last - 1` of the tier that starts at block `place`; each in SIDES parts of its tokens, at once.

    The columns of `q_ptr`, `real` and `factor` [ROWS] are the same query rows for each side. Stores the output of the
    first `count` of them, not divided by its sum, at OUT [ROWS / SIDES], and behind its channels (maximum base 2, sum).
    """
    # Tokens per tile: a slice of a word tile, or a part of one so that no tile spans two token groups.
    K_TILE: tl.constexpr = min(K_GROUP if K_TOKEN_AXIS else 16, WORDS)
    GROUPS: tl.constexpr = D // V_GROUP
    Z_ROWS: tl.constexpr = next_power_of_2(SIDES * GROUPS)
    LOADS: tl.constexpr = value_loads(CHUNKS, V_GROUP, SLICES)
    TILES: tl.constexpr = value_tiles(CHUNKS, V_GROUP, SLICES)
    z_row = tl.arange(0, Z_ROWS)
    if not K_TOKEN_AXIS:
        inner = tl.arange(0, DP // K_GROUP)[:, None, None] * K_GROUP + tl.arange(0, K_GROUP)[None, :, None]
        q = tl.load(q_ptr[None, None, :] + inner, mask=real[None, None, :], other=0.0)
    elif EXACT:
        q = tl.load(q_ptr[None, :] + tl.arange(0, DP)[:, None], mask=real[None, :], other=0.0)
    else:
        q = _query(q_ptr, real, DP)

    m = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([1, ROWS], tl.float32)  # sum_t p_t
    # sum_t p_t z_tg of a side's group g in row (side * GROUPS + g)
    zeros = tl.zeros([Z_ROWS, ROWS], tl.float32)
    size = tl.full([], LEAST_SIZE, tl.int32)  # the largest exponent of a value scale yet
    out = ()
    for i in tl.static_range(length_of(TILES)):
        out = out + (tl.zeros([tile_rows(entry(LOADS, entry(TILES, i, 2), 1), SIDES), ROWS], tl.float32),)

    # So that the loop's offsets have 32 bits: 15 registers less.
    K_META: tl.constexpr = BLOCK // K_GROUP * D if K_TOKEN_AXIS else D // K_GROUP * BLOCK
    K_CODES += place * (WORDS * D)
    K_SCALE += place * K_META
    K_ZERO += place * K_META
    V_CODES += place * (WORDS * D)
    V_SCALE += place * (GROUPS * BLOCK)
    V_ZERO += place * (GROUPS * BLOCK)
    for at in range(first, last):
        k_codes = K_CODES + at * (WORDS * D)
        k_scale = K_SCALE + at * K_META
        k_zero = K_ZERO + at * K_META
        if K_TOKEN_AXIS:
            logits = _logits_token_groups(
                q, k_codes, k_scale, k_zero, factor, D, DP, WORDS, K_TILE, BITS, K_GROUP, SLICES, ROWS, SIDES, BLOCK, NOISE
            )
        else:
            logits = _logits_channel_groups(
                q, k_codes, k_scale, k_zero, factor, D, DP, WORDS, K_TILE, BITS, K_GROUP, SLICES, ROWS, BLOCK
            )
        v_scale = V_SCALE + at * (GROUPS * BLOCK)
        scales = ()
        for group in tl.static_range(GROUPS):
            scales = scales + (_scales_at(v_scale + group * BLOCK, BLOCK // SIDES, BLOCK, SIDES, BLOCK // SIDES),)

        z_group = tl.minimum(z_row, SIDES * GROUPS - 1)
        z_place = z_group % GROUPS * BLOCK + z_group // GROUPS * (BLOCK // SIDES)
        z_place = z_place[:, None] + tl.arange(0, BLOCK // SIDES)[None, :]
        z = tl.load(V_ZERO + at * (GROUPS * BLOCK) + z_place)
        if V_ZERO.dtype.element_ty == tl.uint8:
            z = stored_zero(z, tl.load(v_scale + z_place), BITS)
        m_new = tl.maximum(m, tl.max(_largest(logits), 0))
        top = finite_max(m_new)
        size_new = tl.maximum(size, exponent(tl.max(to_fp32(_largest(scales)))))
        decay = tl.exp2(m - top) * exp2i(size - size_new)
        m = m_new
        size = size_new
        lift = (-size + MOST_EXPONENT).to(tl.float32)
        probs = ()
        for i in tl.static_range(len(logits)):
            p = tl.exp2(logits[i] - (top - lift)[None, :])
            probs = probs + (tl.trans(pinned(p)) if EXACT else transposed(p.to(tl.float16)),)
        p = _operand(probs)
        total = _sums(p, total * decay[None, :])
        zeros = _dot_codes(z, p, zeros * decay[None, :])
        v_words = V_CODES + at * (WORDS * D)
        loads = ()
        for i in tl.static_range(length_of(LOADS)):
            for side in tl.static_range(SIDES):
                loads = loads + (_value_words(v_words, side, SIDES, entry(LOADS, i, 0), entry(LOADS, i, 1), BLOCK),)
        added = ()
        for i in tl.static_range(length_of(TILES)):
            if differ(TILES, i, 0, V_GROUP):
                folded = _scaled(p, scales[entry(TILES, i, 0) // V_GROUP])
            sums = out[i] * decay[None, :]
            if SIDES == 1 or together(entry(LOADS, entry(TILES, i, 2), 1), SIDES):
                codes = codes_at(loads[entry(TILES, i, 2) * SIDES], entry(TILES, i, 1) * BITS, BITS)
                sums = _dot_codes(codes, folded, sums)
            else:
                products = ()
                for side in tl.static_range(SIDES):
                    codes = codes_at(loads[entry(TILES, i, 2) * SIDES + side], entry(TILES, i, 1) * BITS, BITS)
                    products = products + (_dot_codes(codes, folded, tl.zeros(sums.shape, tl.float32)),)
                sums += _by_side(products, ROWS)
            added = added + (sums,)
        out = added

    real = tl.arange(0, ROWS // SIDES) < count
    top = m
    weight = tl.full([ROWS], 1.0, tl.float32)  # of a side, beside the others
    if SIDES > 1:
        top = tl.max(tl.reshape(m, [SIDES, ROWS // SIDES]), 0)
        of_each = tl.broadcast_to(finite_max(top)[None, :], [SIDES, ROWS // SIDES])
        weight = tl.exp2(m - tl.reshape(of_each, [ROWS]))
    down = exp2i(size - MOST_EXPONENT)
    for i in tl.static_range(length_of(TILES)):
        part = out[i] * (2.0 ** (CODE_EXPONENT - code_position(entry(TILES, i, 1) * BITS, BITS)))
        part = _own_side(part, SIDES, together(entry(LOADS, entry(TILES, i, 2), 1), SIDES))
        part += _sums_of_group(zeros, entry(TILES, i, 0) // V_GROUP, SIDES, GROUPS)[None, :]
        channel = entry(TILES, i, 0) + tl.arange(0, part.shape[0])
        tl.store(OUT[None, :] + channel[:, None], _sides_added(part * down * weight[None, :], SIDES), mask=real[None, :])
    total = _sides_added(_row(total, 0) * down * weight, SIDES)
    tl.store(OUT + D, top, mask=real)
    tl.store(OUT + D + 1, total, mask=real)
