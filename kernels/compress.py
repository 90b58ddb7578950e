"""Select, rotate, quantize and pack tokens into whole blocks."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .jit import check_dtype, check_head_dim, round_to, to_fp32, unit_last
from .packing import BLOCK, MAX_CHUNK, WORD_BITS, GroupAxis, Layout, metadata_dtype, pack, quantize, value_chunks, words
from .tuning import COMPRESS, CompressTuning

Packed = tuple[Tensor, Tensor, Tensor]
"""codes, scale, zero (`packing`)."""


def compress_reference(
    x: Tensor,
    index: Tensor | None,
    start: int,
    tokens: Tensor,
    blocks: int,
    bits: int,
    group: int,
    axis: GroupAxis,
    layout: Layout,
    rotation: Tensor | None,
    clip: float = 1.0,
    out: Packed | None = None,
    first_block: Tensor | None = None,
) -> Packed:
    """Pack tokens `start ... start + tokens[b] - 1` of row b, in plain PyTorch.

    Args:
        x: [batch, kv_heads, seq, head_dim], keys or values, any strides.
        index: int64 [batch, kv_heads, kept]: token j is `x[..., index[..., j], :]`; None for token j itself.
        tokens: int [batch], each a multiple of BLOCK, at most `blocks * BLOCK`.
        blocks: capacity in blocks. What lies past a row's tokens is zero.
        rotation: orthogonal fp32 [head_dim, head_dim], applied before quantizing, or None.
        clip: as in `packing.quantize`.
        out: write into these instead, whatever their capacity: only blocks `first_block[b] ... first_block[b] +
            tokens[b] / BLOCK - 1` of row b. `blocks` then only bounds the tokens of a row.
        first_block: int [batch], with `out`.

    Returns:
        codes, scale, zero (`packing`), with `blocks` blocks; or `out`.
    """
    batch, heads, _, dim = x.shape
    slots = torch.arange(blocks * BLOCK, device=x.device)
    filled = slots < tokens[:, None]  # [batch, slots]
    source = torch.where(filled, slots + start, 0)[:, None].expand(-1, heads, -1)
    if index is not None:
        source = index.gather(2, source)
    picked = x.gather(2, source[..., None].expand(-1, -1, -1, dim)).masked_fill(~filled[:, None, :, None], 0.0)
    if rotation is not None:
        picked = (picked.float() @ rotation).to(x.dtype)
    codes, scale, zero = quantize(picked.view(batch, heads, blocks, BLOCK, dim), bits, group, axis, clip)
    packed = pack(codes, bits, layout), scale, zero
    if out is None:
        return packed
    row, block = filled[:, ::BLOCK].nonzero(as_tuple=True)
    for target, source in zip(out, packed, strict=True):
        target[row, :, first_block.long()[row] + block] = source[row, :, block]
    return out


@triton.jit
def _rotated(x_ptr, x_mask, ROTATION, channel, D: tl.constexpr, DP: tl.constexpr, STEP: tl.constexpr):
    """Rows of x times columns `channel` of the rotation, in fp32.

    Products of three TF32 numbers: x is exact in one, so the error of an output is about 2**-21 of the row's norm,
    below what rounding to 16 bits takes next.
    """
    acc = tl.zeros([x_mask.shape[0], channel.shape[0]], tl.float32)
    for low in range(0, DP, STEP):
        inner = low + tl.arange(0, STEP)
        x = tl.load(x_ptr + inner[None, :], mask=x_mask & (inner < D)[None, :], other=0.0)
        columns = ROTATION + inner[:, None] * D + channel[None, :]
        matrix = tl.load(columns, mask=(inner < D)[:, None] & (channel < D)[None, :], other=0.0)
        acc = tl.dot(to_fp32(x), matrix, acc, input_precision="tf32x3")
    return acc


@triton.jit(do_not_specialize=["start", "kept", "capacity", "first_channel"])
def _compress_kernel(
    X, INDEX, TOKENS, FIRST, ROTATION, CODES, SCALE, ZERO, stride_xb, stride_xh, stride_xs, start, kept, capacity,
    first_channel, inset,
    HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, CHANNELS: tl.constexpr, STEP: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, TOKEN_AXIS: tl.constexpr, KEY_LAYOUT: tl.constexpr,
    HAS_INDEX: tl.constexpr, ROTATE: tl.constexpr, IN_PLACE: tl.constexpr, LIMIT: tl.constexpr, BLOCK: tl.constexpr,
    WORDS: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """One program: one block of one head, CHANNELS of its channels."""
    source_block = tl.program_id(0)
    head = tl.program_id(1) % HEADS
    channel0 = first_channel + tl.program_id(1) // HEADS * CHANNELS
    batch = tl.program_id(2).to(tl.int64)
    filled = source_block * BLOCK < tl.load(TOKENS + batch)
    block = source_block
    written = filled | (not IN_PLACE)
    if IN_PLACE:
        block += tl.load(FIRST + batch).to(tl.int32)
        written = filled & (block < capacity)
    if written:
        slot = start + source_block * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
        if HAS_INDEX:
            slot = tl.load(INDEX + (batch * HEADS + head) * kept + slot, mask=filled & (slot < kept), other=0)
        channel = channel0 + tl.arange(0, CHANNELS)
        x_ptr = X + batch * stride_xb + head.to(tl.int64) * stride_xh + slot[:, None] * stride_xs
        x_mask = tl.full([BLOCK, 1], 1, tl.int1) & filled
        if ROTATE:
            x = _rotated(x_ptr, x_mask, ROTATION, channel, D, DP, STEP)
            x = to_fp32(round_to(x, X.dtype.element_ty))
        else:
            x = to_fp32(tl.load(x_ptr + channel[None, :], mask=x_mask & (channel < D)[None, :], other=0.0))

        # From here on as in `packing.quantize`, in its order of operations.
        DIM: tl.constexpr = 1 if TOKEN_AXIS else 2
        if TOKEN_AXIS:
            values = tl.reshape(x, [BLOCK // GROUP, GROUP, CHANNELS])
        else:
            values = tl.reshape(x, [BLOCK, CHANNELS // GROUP, GROUP])
        finite = tl.abs(values) < float("inf")
        low = tl.min(tl.where(finite, values, float("inf")), DIM)
        high = tl.max(tl.where(finite, values, -float("inf")), DIM)
        some = low <= high
        low = tl.where(some, low, 0.0)
        high = tl.where(some, high, 0.0)
        shrink = high * inset - low * inset
        low += shrink
        high -= shrink
        TOP: tl.constexpr = 2**BITS - 1
        span = tl.div_rn(high, tl.full(high.shape, TOP, tl.float32)) - tl.div_rn(
            low, tl.full(low.shape, TOP, tl.float32)
        )
        zero = round_to(tl.minimum(tl.maximum(low, -LIMIT), LIMIT), ZERO.dtype.element_ty)
        scale = round_to(tl.minimum(span, LIMIT), SCALE.dtype.element_ty)

        step = tl.expand_dims(to_fp32(scale), DIM)
        usable = step > 0
        step = tl.where(usable, step, 1.0)
        position = values / step - tl.expand_dims(to_fp32(zero), DIM) / step
        position = tl.where((position == position) & usable, position, 0.0)
        position = tl.minimum(tl.maximum(position, 0.0), TOP * 1.0)
        # Adding 1.5 * 2**23 leaves no bits below one: rounds to nearest, ties to even.
        codes = ((position + 12582912.0) - 12582912.0).to(tl.int32)

        place = (batch * HEADS + head) * capacity + block
        shift = tl.arange(0, SLICES) * BITS
        if KEY_LAYOUT:
            packed = tl.sum(tl.reshape(codes, [SLICES, WORDS, CHANNELS]) << shift[:, None, None], 0)
            inner = tl.arange(0, WORDS)[:, None] * D + channel[None, :]
            tl.store(CODES + place * (WORDS * D) + inner, packed.to(tl.int16), mask=(channel < D)[None, :])
        else:
            packed = tl.sum(tl.reshape(codes, [BLOCK, SLICES, CHANNELS // SLICES]) << shift[None, :, None], 1)
            row = channel0 // SLICES + tl.arange(0, CHANNELS // SLICES)
            inner = row[None, :] * BLOCK + tl.arange(0, BLOCK)[:, None]
            tl.store(CODES + place * (WORDS * D) + inner, packed.to(tl.int16))

        if TOKEN_AXIS:
            inner = tl.arange(0, BLOCK // GROUP)[:, None] * D + channel[None, :]
            real = (channel < D)[None, :]
        else:
            groups = channel0 // GROUP + tl.arange(0, CHANNELS // GROUP)
            inner = groups[None, :] * BLOCK + tl.arange(0, BLOCK)[:, None]
            real = (groups < D // GROUP)[None, :]
        inner += place * (BLOCK // GROUP * D if TOKEN_AXIS else D // GROUP * BLOCK)
        tl.store(SCALE + inner, scale, mask=real)
        tl.store(ZERO + inner, zero, mask=real)


def empty_packed(
    batch: int, heads: int, blocks: int, dim: int, bits: int, group: int, axis: GroupAxis, layout: Layout,
    dtype: torch.dtype, device: torch.device,
) -> Packed:  # fmt: skip
    """Uninitialised codes, scale and zero for tensors of `dtype`."""
    lead = (batch, heads, blocks)
    code_shape = (words(bits), dim) if layout == "key" else (dim, words(bits))
    meta_shape = (BLOCK // group, dim) if axis == "token" else (dim // group, BLOCK)
    codes = torch.empty(*lead, *code_shape, dtype=torch.int16, device=device)
    scale = torch.empty(*lead, *meta_shape, dtype=metadata_dtype(dtype), device=device)
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


def compress_triton(
    x: Tensor,
    index: Tensor | None,
    start: int,
    tokens: Tensor,
    blocks: int,
    bits: int,
    group: int,
    axis: GroupAxis,
    layout: Layout,
    rotation: Tensor | None,
    clip: float = 1.0,
    out: Packed | None = None,
    first_block: Tensor | None = None,
    tuning: CompressTuning = COMPRESS,
) -> Packed:
    """`compress` as a Triton kernel: one launch, or two for a head dimension that is no power of two."""
    check_dtype(x)
    check_head_dim(x.shape[-1])
    x = unit_last(x)
    batch, heads, _, dim = x.shape
    in_place = out is not None
    if out is None:
        out = empty_packed(batch, heads, blocks, dim, bits, group, axis, layout, x.dtype, x.device)
    elif not all(t.is_contiguous() for t in out):
        raise ValueError("compress writes into contiguous tensors only.")
    padded = triton.next_power_of_2(dim)
    matrix = x if rotation is None else rotation.to(torch.float32).contiguous()
    for first, channels, programs in _launches(dim, layout):
        _compress_kernel[blocks, heads * programs, batch](
            x, x if index is None else index.contiguous(), tokens, tokens if first_block is None else first_block,
            matrix, *out, *x.stride()[:3], start, 0 if index is None else index.shape[2], out[0].shape[2],
            first, (1 - clip) / 2, HEADS=heads, D=dim, DP=padded, CHANNELS=channels, STEP=min(padded, tuning.contracted), BITS=bits,
            GROUP=group, TOKEN_AXIS=axis == "token", KEY_LAYOUT=layout == "key", HAS_INDEX=index is not None,
            ROTATE=rotation is not None, IN_PLACE=in_place, LIMIT=torch.finfo(out[1].dtype).max, BLOCK=BLOCK,
            WORDS=words(bits), SLICES=WORD_BITS // bits, num_warps=tuning.warps, num_stages=tuning.stages,
        )  # fmt: skip
    return out


def compress(
    x: Tensor,
    index: Tensor | None,
    start: int,
    tokens: Tensor,
    blocks: int,
    bits: int,
    group: int,
    axis: GroupAxis,
    layout: Layout,
    rotation: Tensor | None,
    clip: float = 1.0,
    out: Packed | None = None,
    first_block: Tensor | None = None,
) -> Packed:
    """Gather, rotate, quantize and pack; arguments and result as in `compress_reference`.

    Metadata has the reference's bits where nothing is rotated; a code may differ by one where a value lies within float
    rounding of the middle between two codes. A rotation agrees to about 2**-21 of a token's norm before its result is
    rounded to the dtype of `x`; a token that holds inf rotates to NaN (code 0) throughout.
    """
    run = compress_triton if x.is_cuda else compress_reference
    return run(x, index, start, tokens, blocks, bits, group, axis, layout, rotation, clip, out, first_block)
