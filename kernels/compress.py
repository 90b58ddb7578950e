"""Select, rotate, quantize and pack tokens into whole blocks."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .feedback import feedback_reference, feedback_triton
from .jit import (
    FP16_MAX,
    INTERPRET,
    ZERO_AT,
    ZERO_MOST,
    byte_scale,
    check_dtype,
    check_head_dim,
    dot_precision,
    operand_dtype,
    round_to,
    scale_byte,
    to_fp32,
    to_operand,
    unit_last,
    zero_parts,
)
from .packing import (
    BLOCK,
    MAX_CHUNK,
    WORD_BITS,
    GroupAxis,
    Layout,
    largest_metadata,
    metadata_dtype,
    pack,
    quantize,
    value_chunks,
    words,
)
from .tuning import CompressTuning, compress_tuning

Packed = tuple[Tensor, Tensor, Tensor]
"""codes, scale, zero (`packing`)."""

Counted = tuple[Tensor, Tensor]
"""What counts tokens that hold NaN or inf, in place: seen, int32 [batch, seq], zero but for those found so far, in
whichever head; count, int32 [batch]."""


def _pick(x: Tensor, index: Tensor | None, source: Tensor, filled: Tensor, counted: Counted | None) -> Tensor:
    """Tokens `source` [batch, slots], of `index` if given, where `filled`, else zeros: [batch, heads, slots, dim]."""
    heads, dim = x.shape[1], x.shape[3]
    source = torch.where(filled, source, 0)[:, None].expand(-1, heads, -1)
    if index is not None:
        source = index.gather(2, source)
    picked = x.gather(2, source[..., None].expand(-1, -1, -1, dim)).masked_fill(~filled[:, None, :, None], 0.0)
    if counted is not None:
        seen, count = counted
        bad = (~torch.isfinite(picked).all(-1)).to(seen.dtype)
        held = torch.zeros_like(seen).scatter_add_(1, source.flatten(1), bad.flatten(1)) > 0
        count += (held & (seen == 0)).sum(-1)
        seen |= held
    return picked


def _of_rows(start: Tensor | int, tokens: Tensor) -> Tensor:
    """`start` of each row, int [batch]."""
    return torch.full_like(tokens, start) if isinstance(start, int) else start


def compress_reference(
    x: Tensor,
    index: Tensor | None,
    start: Tensor | int,
    tokens: Tensor,
    blocks: int,
    bits: int,
    group: int,
    axis: GroupAxis,
    layout: Layout,
    rotation: Tensor | None,
    clip: float = 1.0,
    counted: Counted | None = None,
    balancer: Tensor | None = None,
    metadata_bits: int = 16,
    factors: Tensor | None = None,
) -> Packed:
    """Pack tokens `start[b] ... start[b] + tokens[b] - 1` of row b, in plain PyTorch.

    Args:
        start: int [batch], or one number for all rows.
        x: [batch, kv_heads, seq, head_dim], keys or values, any strides.
        index: int64 [batch, kv_heads, kept]: token j is `x[..., index[..., j], :]`; None for token j itself.
        tokens: int [batch], each a multiple of BLOCK, at most `blocks * BLOCK`.
        blocks: capacity in blocks. What lies past a row's tokens is zero.
        rotation: orthogonal fp32 [head_dim, head_dim], applied before quantizing, or None. Its columns hold one number,
            that number's negative, and 0 (Hadamard matrices do).
        clip, metadata_bits: as in `packing.quantize`.
        counted: what counts the packed tokens that hold NaN or inf.
        balancer: fp32 [batch, kv_heads, head_dim], by which tokens are multiplied first (and rounded to the dtype of `x`),
            or None.
        factors: fp32 [batch, kv_heads, head_dim, head_dim] (`minikv_compile.feedback`): codes are rounded with error feedback,
            for the scales and zeros that they have without. Of keys; None for none.

    Returns:
        codes, scale, zero (`packing`), with `blocks` blocks.
    """
    batch, heads, _, dim = x.shape
    slots = torch.arange(blocks * BLOCK, device=x.device)
    filled = slots < tokens[:, None]  # [batch, slots]
    picked = _pick(x, index, slots + _of_rows(start, tokens)[:, None], filled, counted)
    if balancer is not None:
        picked = (picked.float() * balancer[:, :, None]).to(x.dtype)
    if rotation is not None:
        picked = (picked.float() @ rotation).to(x.dtype)
    picked = picked.view(batch, heads, blocks, BLOCK, dim)
    codes, scale, zero = quantize(picked, bits, group, axis, clip, metadata_bits)
    if factors is not None:
        codes = feedback_reference(picked, scale, zero, bits, group, axis, factors)
    return pack(codes, bits, layout), scale, zero


@triton.jit
def _count_not_finite(x, slot, SEEN, COUNT, DIMS: tl.constexpr):
    """Adds to COUNT the tokens of x that hold NaN or inf and that no program has seen before.

    Args:
        slot: the tokens, of the shape of x with 1 for `DIMS`, the dimensions along which channels lie.
    """
    # inf and NaN times 0 are NaN. Almost never is there one: only then is it asked which token holds it.
    if not tl.sum(x * 0.0) == 0.0:  # noqa: SIM201
        bad = (tl.abs(x) < float("inf")).to(tl.int32)
        for i in tl.static_range(len(DIMS)):
            bad = tl.min(bad, DIMS[i], keep_dims=True)
        first = (tl.atomic_or(SEEN + slot, 1, mask=bad == 0) == 0) & (bad == 0)
        tl.atomic_add(COUNT, tl.sum(first.to(tl.int32)))


@triton.jit
def _quotient(x, divisor, inverse):
    """x / divisor, correctly rounded, for `inverse` = 1 / divisor, correctly rounded, and no overflow."""
    if INTERPRET:
        return x / divisor
    else:
        guess = x * inverse
        return tl.fma(tl.fma(-guess, divisor, x), inverse, guess)


@triton.jit
def _rounded(x):
    """To nearest, ties to even, |x| < 2**22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def pack_block(
    X, INDEX, BALANCER, SIGNS, SIZES, CODES, SCALE, ZERO, SEEN, COUNT, source_block, block, head, channel0, batch, filled,
    written, stride_xb, stride_xh, stride_xs, stride_count, seq, start, kept, capacity, inset,
    HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, CHANNELS: tl.constexpr, STEP: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, TOKEN_AXIS: tl.constexpr, KEY_LAYOUT: tl.constexpr,
    HAS_INDEX: tl.constexpr, ROTATE: tl.constexpr, BALANCE: tl.constexpr, COUNTED: tl.constexpr, LIMIT: tl.constexpr,
    BLOCK: tl.constexpr, SLICES: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Where `written`: one block of one head, CHANNELS of its channels, of tokens `start + source_block * BLOCK ...` where
    `filled`, else of zeros.

    Values are [SLICES, M, WORDS]: M is the axis that is not cut into slices (channels of keys, tokens of values), so
    that words [WORDS, M] are a sum over the first dimension, which each thread holds whole.
    """
    if written:
        M: tl.constexpr = CHANNELS if KEY_LAYOUT else BLOCK
        N: tl.constexpr = BLOCK if KEY_LAYOUT else CHANNELS
        WORDS: tl.constexpr = N // SLICES
        # The compiler gives threads the dimension that is contiguous in memory first, then the others in their order:
        # few threads share a group, so that few compute its scale.
        m = tl.arange(0, M)[:, None, None]
        n = tl.arange(0, SLICES)[None, :, None] * WORDS + tl.arange(0, WORDS)[None, None, :]
        channel = channel0 + (m if KEY_LAYOUT else n)
        real = channel < D

        token = tl.arange(0, BLOCK) if ROTATE else (n if KEY_LAYOUT else m)
        slot = start + source_block * BLOCK + token.to(tl.int64)
        if HAS_INDEX:
            slot = tl.load(INDEX + (batch * HEADS + head) * kept + slot, mask=filled & (slot < kept), other=0)
        x_ptr = X + batch * stride_xb + head.to(tl.int64) * stride_xh + slot * stride_xs
        count = COUNT + batch * stride_count
        balancer = BALANCER + (batch * HEADS + head) * D
        if ROTATE:
            column = channel0 + tl.arange(0, CHANNELS)
            product = tl.zeros([M, N], tl.float32)
            for low in tl.static_range(0, DP, STEP):
                inner = low + tl.arange(0, STEP)
                part_mask = (tl.full([BLOCK, 1], 1, tl.int1) & filled) & (inner < D)[None, :]
                part = tl.load(x_ptr[:, None] + inner[None, :], mask=part_mask, other=0.0)
                signs_mask = (inner < D)[:, None] & (column < D)[None, :]
                signs = tl.load(SIGNS + inner[:, None] * D + column[None, :], mask=signs_mask, other=0.0)
                if COUNTED:
                    _count_not_finite(to_fp32(part), slot[:, None], SEEN + batch * seq, count, (1,))
                if BALANCE:
                    factors = tl.load(balancer + inner, mask=inner < D, other=0.0)
                    part = round_to(to_fp32(part) * factors[None, :], X.dtype.element_ty)
                # Signs are 0, 1 or -1: what the tensor cores add up is exact.
                part, signs = to_operand(part, OPERAND), to_operand(signs, OPERAND)
                if KEY_LAYOUT:
                    product = tl.dot(tl.trans(signs), tl.trans(part), product, input_precision=PRECISION)
                else:
                    product = tl.dot(part, signs, product, input_precision=PRECISION)
            if KEY_LAYOUT:
                product *= tl.load(SIZES + column, mask=column < D, other=0.0)[:, None]
            else:
                product *= tl.load(SIZES + column, mask=column < D, other=0.0)[None, :]
            values = to_fp32(round_to(product, X.dtype.element_ty))
            values = tl.permute(tl.reshape(values, [M, SLICES, WORDS]), [1, 0, 2])
        else:
            values = to_fp32(tl.load(x_ptr + channel, mask=real & filled, other=0.0))
            if COUNTED:
                DIMS: tl.constexpr = (0,) if KEY_LAYOUT else (1, 2)
                _count_not_finite(values, slot, SEEN + batch * seq, count, DIMS)
            if BALANCE:
                values *= tl.load(balancer + channel, mask=real, other=0.0)
                values = to_fp32(round_to(values, X.dtype.element_ty))
            values = tl.permute(values, [1, 0, 2])

        # From here on as in `packing.quantize`: [GA, GB, M, WA, WB] or [SLICES, MA, MB, WORDS], groups along the B.
        ALONG_N: tl.constexpr = TOKEN_AXIS == KEY_LAYOUT
        if ALONG_N:
            GB: tl.constexpr = max(GROUP // WORDS, 1)
            WB: tl.constexpr = min(GROUP, WORDS)
            values = tl.reshape(values, [SLICES // GB, GB, M, WORDS // WB, WB])
        else:
            values = tl.reshape(values, [SLICES, M // GROUP, GROUP, WORDS])
        finite = tl.abs(values) < float("inf")
        low = tl.where(finite, values, float("inf"))
        high = tl.where(finite, values, -float("inf"))
        if ALONG_N:
            low = tl.min(tl.min(low, 1, keep_dims=True), 4, keep_dims=True)
            high = tl.max(tl.max(high, 1, keep_dims=True), 4, keep_dims=True)
        else:
            low = tl.min(low, 2, keep_dims=True)
            high = tl.max(high, 2, keep_dims=True)
        some = low <= high
        low = tl.where(some, low, 0.0)
        high = tl.where(some, high, 0.0)
        shrink = high * inset - low * inset
        low += shrink
        high -= shrink
        TOP: tl.constexpr = 2**BITS - 1
        EIGHT: tl.constexpr = SCALE.dtype.element_ty == tl.uint8
        span = _quotient(high, TOP, 1 / TOP) - _quotient(low, TOP, 1 / TOP)
        low = tl.minimum(tl.maximum(low, -LIMIT), LIMIT)
        if EIGHT:
            FURTHEST: tl.constexpr = ZERO_MOST / zero_parts(BITS)
            span = tl.maximum(span, _quotient(tl.abs(low), FURTHEST, 1 / FURTHEST))
            scale = scale_byte(tl.minimum(span, LIMIT))
            step = byte_scale(scale).to(tl.float32)
        else:
            scale = tl.minimum(span, LIMIT).to(tl.float16)
            step = scale.to(tl.float32)
        usable = step > 0
        step = tl.where(usable, step, 1.0)
        inverse = 1.0 / step
        inverse = tl.fma(tl.fma(-inverse, step, 1.0), inverse, inverse)
        if EIGHT:
            PARTS: tl.constexpr = zero_parts(BITS)
            furthest = _rounded(tl.minimum(inverse * (FP16_MAX * PARTS) - 0.5, 127.0))  # so that no zero overflows fp16
            away = tl.where(usable, _quotient(low, step, inverse), 0.0) * PARTS
            away = tl.minimum(tl.maximum(_rounded(away), -furthest), furthest)
            base = away * (1 / PARTS)
            zero = (away + ZERO_AT).to(tl.uint8)
        else:
            zero = low.to(tl.float16)
            base = _quotient(zero.to(tl.float32), step, inverse)
        position = _quotient(values, step, inverse) - base
        position = tl.where(finite, position, tl.where(values > 0, TOP * 1.0, 0.0))
        position = tl.where(usable, tl.minimum(tl.maximum(position, 0.0), TOP * 1.0), 0.0)
        # Adding 1.5 * 2**23 rounds to nearest, ties to even, and leaves the code in the low bits; the high ones are
        # cut off with the rest of the sum.
        codes = tl.reshape((position + 12582912.0).to(tl.int32, bitcast=True), [SLICES, M, WORDS])
        packed = tl.sum(codes << (tl.arange(0, SLICES) * BITS)[:, None, None], 0).to(tl.int16)
        place = (batch * HEADS + head) * capacity + block
        channels = tl.arange(0, M)[:, None]
        word = tl.arange(0, WORDS)[None, :]
        if KEY_LAYOUT:
            tl.store(CODES + place * (WORDS * D) + word * D + channel0 + channels, packed, mask=channel0 + channels < D)
        else:
            tl.store(CODES + (place * D + channel0) * (BLOCK // SLICES) + word * BLOCK + channels, packed)

        if ALONG_N:  # [groups, M]
            group = tl.arange(0, SLICES // GB)[:, None, None] * (WORDS // WB) + tl.arange(0, WORDS // WB)[None, None, :]
            along = tl.arange(0, M)[None, :, None]
            scale = tl.reshape(scale, [SLICES // GB, M, WORDS // WB])
            zero = tl.reshape(zero, [SLICES // GB, M, WORDS // WB])
        else:  # [groups, N]
            group = tl.arange(0, M // GROUP)[None, :, None]
            along = tl.arange(0, SLICES)[:, None, None] * WORDS + tl.arange(0, WORDS)[None, None, :]
            scale = tl.reshape(scale, [SLICES, M // GROUP, WORDS])
            zero = tl.reshape(zero, [SLICES, M // GROUP, WORDS])
        if TOKEN_AXIS:
            inner = group * D + channel0 + along
            real = channel0 + along < D
        else:
            group += channel0 // GROUP
            inner = group * BLOCK + along
            real = group < D // GROUP
        inner += place * (BLOCK // GROUP * D if TOKEN_AXIS else D // GROUP * BLOCK)
        tl.store(SCALE + inner, scale, mask=real)
        tl.store(ZERO + inner, zero, mask=real)


@triton.jit(do_not_specialize=["kept", "capacity"])
def _compress_kernel(
    X, INDEX, START, TOKENS, BALANCER, SIGNS, SIZES, CODES, SCALE, ZERO, SEEN, COUNT, stride_xb, stride_xh,
    stride_xs, stride_start, stride_tokens, stride_count, seq, kept, capacity, inset,
    HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, FIRST_CHANNEL: tl.constexpr, CHANNELS: tl.constexpr,
    STEP: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, TOKEN_AXIS: tl.constexpr, KEY_LAYOUT: tl.constexpr,
    HAS_INDEX: tl.constexpr, ROTATE: tl.constexpr, BALANCE: tl.constexpr, COUNTED: tl.constexpr,
    LIMIT: tl.constexpr, BLOCK: tl.constexpr, SLICES: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: one block of one head, CHANNELS of its channels."""
    block = tl.program_id(0)
    head = tl.program_id(1) % HEADS
    channel0 = FIRST_CHANNEL + tl.program_id(1) // HEADS * CHANNELS
    batch = tl.program_id(2).to(tl.int64)
    filled = block * BLOCK < tl.load(TOKENS + batch * stride_tokens)
    pack_block(
        X, INDEX, BALANCER, SIGNS, SIZES, CODES, SCALE, ZERO, SEEN, COUNT, block, block, head, channel0, batch,
        filled, block < capacity, stride_xb, stride_xh, stride_xs, stride_count, seq, tl.load(START + batch * stride_start), kept,
        capacity, inset, HEADS, D, DP, CHANNELS, STEP, BITS, GROUP, TOKEN_AXIS, KEY_LAYOUT, HAS_INDEX, ROTATE, BALANCE,
        COUNTED, LIMIT, BLOCK, SLICES, OPERAND, PRECISION,
    )  # fmt: skip


def empty_packed(
    batch: int, heads: int, blocks: int, dim: int, bits: int, group: int, axis: GroupAxis, layout: Layout,
    device: torch.device, metadata_bits: int = 16,
) -> Packed:  # fmt: skip
    """Uninitialised codes, scale and zero."""
    lead = (batch, heads, blocks)
    code_shape = (words(bits), dim) if layout == "key" else (dim, words(bits))
    meta_shape = (BLOCK // group, dim) if axis == "token" else (dim // group, BLOCK)
    codes = torch.empty(*lead, *code_shape, dtype=torch.int16, device=device)
    scale = torch.empty(*lead, *meta_shape, dtype=metadata_dtype(bits, metadata_bits), device=device)
    return codes, scale, torch.empty_like(scale)


def _launches(dim: int, layout: Layout) -> list[tuple[int, int, int]]:
    """(first channel, channels per program, programs): one launch, but for values whose chunks differ in size."""
    if layout == "value":
        chunks = value_chunks(dim)
        if len({channels for _, channels in chunks}) > 1:
            return [(first, channels, 1) for first, channels in chunks]
        return [(0, chunks[0][1], len(chunks))]
    padded = triton.next_power_of_2(dim)
    channels = min(padded, MAX_CHUNK)
    return [(0, channels, padded // channels)]


@lru_cache
def _signs(rotation: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A rotation as signs (0, 1, -1) and the size of each column."""
    signs, sizes = rotation.sign(), rotation.abs().amax(0)
    if not torch.equal(signs * sizes, rotation):
        raise ValueError("The compress kernel takes rotations of one size per column, such as Hadamard matrices.")
    return signs.to(dtype), sizes


def compress_triton(
    x: Tensor,
    index: Tensor | None,
    start: Tensor | int,
    tokens: Tensor,
    blocks: int,
    bits: int,
    group: int,
    axis: GroupAxis,
    layout: Layout,
    rotation: Tensor | None,
    clip: float = 1.0,
    counted: Counted | None = None,
    balancer: Tensor | None = None,
    metadata_bits: int = 16,
    factors: Tensor | None = None,
    tuning: CompressTuning | None = None,
) -> Packed:
    """`compress` as a Triton kernel: one launch, or two for a head dimension that is no power of two; and one for feedback."""
    check_dtype(x)
    check_head_dim(x.shape[-1])
    x = unit_last(x)
    batch, heads, seq, dim = x.shape
    tuning = tuning or compress_tuning(x.element_size())
    out = empty_packed(batch, heads, blocks, dim, bits, group, axis, layout, x.device, metadata_bits)
    padded = triton.next_power_of_2(dim)
    signs, sizes = (x, x) if rotation is None else _signs(rotation, x.dtype)
    seen, count = (tokens, tokens) if counted is None else counted
    balance = x if balancer is None else balancer.contiguous()
    start = _of_rows(start, tokens)
    for first, channels, programs in _launches(dim, layout):
        _compress_kernel[blocks, heads * programs, batch](
            x, x if index is None else index.contiguous(), start, tokens, balance, signs, sizes, *out, seen,
            count, *x.stride()[:3], start.stride(0), tokens.stride(0), count.stride(0), seq,
            0 if index is None else index.shape[2], out[0].shape[2], (1 - clip) / 2,
            HEADS=heads, D=dim, DP=padded, FIRST_CHANNEL=first, CHANNELS=channels, STEP=min(padded, tuning.contracted),
            BITS=bits, GROUP=group, TOKEN_AXIS=axis == "token", KEY_LAYOUT=layout == "key", HAS_INDEX=index is not None,
            ROTATE=rotation is not None, BALANCE=balancer is not None, COUNTED=counted is not None,
            LIMIT=largest_metadata(out[1].dtype), BLOCK=BLOCK, SLICES=WORD_BITS // bits, OPERAND=operand_dtype(x.dtype),
            PRECISION=dot_precision(x.dtype), num_warps=tuning.warps, num_stages=1, maxnreg=tuning.registers,
        )  # fmt: skip
    if factors is not None:
        turned = None if rotation is None else (signs, sizes)
        feedback_triton(x, index, start, tokens, out, bits, group, axis, turned, balancer, factors)
    return out


def compress(
    x: Tensor,
    index: Tensor | None,
    start: Tensor | int,
    tokens: Tensor,
    blocks: int,
    bits: int,
    group: int,
    axis: GroupAxis,
    layout: Layout,
    rotation: Tensor | None,
    clip: float = 1.0,
    counted: Counted | None = None,
    balancer: Tensor | None = None,
    metadata_bits: int = 16,
    factors: Tensor | None = None,
) -> Packed:
    """Gather, balance, rotate, quantize and pack; arguments and result as in `compress_reference`.

    Metadata has the reference's bits where nothing is rotated; a code may differ by one where a value lies within float
    rounding of the middle between two codes. A rotation agrees to about 2**-21 of a token's norm before its result is
    rounded to the dtype of `x`; a token that holds inf rotates to NaN (code 0) throughout.
    """
    run = compress_triton if x.is_cuda else compress_reference
    return run(
        x, index, start, tokens, blocks, bits, group, axis, layout, rotation, clip, counted, balancer, metadata_bits, factors
    )


def dense_region_reference(
    x: Tensor, index: Tensor | None, pinned: Tensor | int, tokens: Tensor, used: Tensor, capacity: int, counted: Counted
) -> Tensor:
    """What `compress` leaves out of a row: its first `pinned[b]` tokens, and those after the `tokens[b]` packed ones.

    Args:
        x, index, counted: as in `compress_reference`. tokens: int [batch]. pinned: as `start` there.
        used: int [batch], how many they are, at most `capacity`. The rest is zeros.

    Returns:
        [batch, kv_heads, capacity, head_dim].
    """
    slot = torch.arange(capacity, device=x.device).expand(x.shape[0], -1)
    source = torch.where(slot < _of_rows(pinned, tokens)[:, None], slot, slot + tokens[:, None])
    return _pick(x, index, source, slot < used[:, None], counted)


@triton.jit(do_not_specialize=["seq", "kept", "capacity"])
def _dense_region_kernel(
    X, INDEX, PINNED, TOKENS, USED, OUT, SEEN, COUNT, stride_xb, stride_xh, stride_xs, stride_pinned, stride_tokens,
    stride_used, stride_count, seq, kept, capacity,
    HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SLOTS: tl.constexpr, HAS_INDEX: tl.constexpr,
):  # fmt: skip
    """One program: SLOTS tokens of one head."""
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    slot = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    filled = slot < tl.load(USED + batch * stride_used)
    pinned = tl.load(PINNED + batch * stride_pinned)
    token = tl.where(slot < pinned, slot, slot + tl.load(TOKENS + batch * stride_tokens)).to(tl.int64)
    if HAS_INDEX:
        token = tl.load(INDEX + (batch * HEADS + head) * kept + token, mask=filled, other=0)
    channel = tl.arange(0, DP)[None, :]
    x_ptr = X + batch * stride_xb + head.to(tl.int64) * stride_xh + token[:, None] * stride_xs + channel
    x = tl.load(x_ptr, mask=filled[:, None] & (channel < D), other=0.0)
    _count_not_finite(to_fp32(x), token[:, None], SEEN + batch * seq, COUNT + batch * stride_count, (1,))
    out_ptr = OUT + ((batch * HEADS + head) * capacity + slot[:, None]) * D + channel
    tl.store(out_ptr, x, mask=(slot < capacity)[:, None] & (channel < D))


def dense_region_triton(
    x: Tensor, index: Tensor | None, pinned: Tensor | int, tokens: Tensor, used: Tensor, capacity: int, counted: Counted
) -> Tensor:
    """`dense_region` as a Triton kernel."""
    check_dtype(x)
    x = unit_last(x)
    batch, heads, seq, dim = x.shape
    seen, count = counted
    out = x.new_empty(batch, heads, capacity, dim)
    slots, pinned = 16, _of_rows(pinned, tokens)
    _dense_region_kernel[triton.cdiv(capacity, slots), heads, batch](
        x, x if index is None else index.contiguous(), pinned, tokens, used, out, seen, count, *x.stride()[:3],
        pinned.stride(0), tokens.stride(0), used.stride(0), count.stride(0), seq, 0 if index is None else index.shape[2],
        capacity,
        HEADS=heads, D=dim, DP=triton.next_power_of_2(dim), SLOTS=slots, HAS_INDEX=index is not None, num_warps=4,
    )  # fmt: skip
    return out


def dense_region(
    x: Tensor, index: Tensor | None, pinned: Tensor | int, tokens: Tensor, used: Tensor, capacity: int, counted: Counted
) -> Tensor:
    """Arguments and result as in `dense_region_reference`."""
    run = dense_region_triton if x.is_cuda else dense_region_reference
    return run(x, index, pinned, tokens, used, capacity, counted)
