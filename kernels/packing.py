"""The packed format: how 2-, 4- and 8-bit codes and their metadata lie in memory.

Tokens are packed in blocks of `BLOCK` = 128. A block of codes is a matrix of 16-bit words, each of which holds
S = 16 / bits codes that are far apart along one axis, so that slice `i` of it, `(words >> i * bits) & mask`, is a
*contiguous* part of the block: a matrix operand as it stands.

    key    words [BLOCK / S, head_dim]   slice i: tokens i * BLOCK / S ..., all channels     (k @ q contracts channels)
    value  words [C / S, BLOCK]          slice i: channels i * C / S ..., all tokens         (v @ p contracts tokens)

Neighbours along the contracted axis are neighbours in memory, so a 32-bit register holds two of them. The axis that is
cut into slices is never the one that is contracted: what scales the codes along the contracted axis (a key's scale is
q's, a value's is p's) is folded once for all slices. Values are cut in chunks of C channels, powers of two, that make
up the head dimension (`value_chunks`), one matrix after the other; a rest of less than 16 channels, which no kernel
takes, is cut along tokens instead. Tensors of codes:

    key    [..., blocks, W, head_dim]    with W = BLOCK / S = words(bits)
    value  [..., blocks, head_dim, W]    as many words; in memory they are the chunks' matrices, one after the other

A group of `group` values shares one scale and one zero. Its values lie along tokens (one channel; KIVI's and MiniKV's
"sub-channel" keys) or along channels (one token; values, and MiKV's keys):

    token    scale, zero [..., blocks, BLOCK / group, head_dim]
    channel  scale, zero [..., blocks, head_dim / group, BLOCK]

A scale and a zero are fp16 numbers, whatever the values are: what products take them as, and three bits more of mantissa than
bf16. Values beyond their range saturate at a zero of 65504 on either side and a step of as much; below it a zero and a step are
multiples of 2**-24. Or they have 8 bits each: then a scale is the upper byte of a positive fp16 number without its sign, five
bits of exponent and three of mantissa, and a zero counts parts of a step, `scale * (byte - 128) / zero_parts(bits)`. Codes
are fitted to both as stored, and few of them fit a bell curve no worse for a range that is a few percent off: the error of
Gaussian values at 2 bits grows by 0.1 to 0.3%. Steps are from 2**-17 to 61440. Where values lie further than 15 steps from zero
(60 at 4 bits), the step is larger than their range asks for: at 2 bits, from means of about 20 standard deviations on.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

BLOCK = 128
"""Tokens in a block. Tiers hold whole blocks only, so no kernel masks the inside of one."""

WORD_BITS = 16

MAX_CHUNK = 128
"""Channels that one program of the compress kernel holds."""

Layout = Literal["key", "value"]
GroupAxis = Literal["token", "channel"]


def words(bits: int) -> int:
    """16-bit words per channel and block."""
    return BLOCK * bits // WORD_BITS


def metadata_dtype(bits: int, metadata_bits: int = 16) -> torch.dtype:
    """The dtype of scales and zeros. 8-bit codes, which a range a few percent off would hurt, always have 16 bits of it."""
    return torch.uint8 if metadata_bits == 8 and bits < 8 else torch.float16


FP16_MAX = 65504.0
ZERO_AT = 128
"""The byte that is a zero of 0."""

MOST_NOISE = 2.0
"""Nats, at most, that are taken off a logit for the noise in it. More than that is none: a mean far from zero makes a step of 8-bit
metadata larger than the errors are."""

ZERO_MOST = 119
"""Parts of a step that a zero may be away from 0 before its scale is rounded, to nearest; after, it may be 127."""


def zero_parts(bits: int) -> float:
    """Parts of a step that zeros of 8 bits count."""
    return 2.0 ** (5 - bits)


def largest_metadata(dtype: torch.dtype) -> float:
    """Of scales, and of zeros before they are rounded, stored in `dtype`."""
    return 61440.0 if dtype == torch.uint8 else FP16_MAX


def _scale_byte(scale: Tensor) -> Tensor:
    """No step becomes 0: in it, a mean is kept."""
    return torch.maximum((scale.half().view(torch.int16) + 64) >> 7, (scale > 0).to(torch.int16)).to(torch.uint8)


def _byte_scale(byte: Tensor) -> Tensor:
    """fp32, the inverse of `_scale_byte`."""
    # As an fp32 number, which Inductor's C++ has vectors of, and without subnormal ones, which a host may flush to 0.
    byte = byte.int()
    return torch.where(byte < 8, byte * 2.0**-17, ((byte << 20) + (112 << 23)).view(torch.float32))


def metadata(scale: Tensor, zero: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Stored scales and zeros as fp32."""
    if scale.dtype != torch.uint8:
        return scale.float(), zero.float()
    scale = _byte_scale(scale)
    return scale, scale * ((zero.float() - ZERO_AT) / zero_parts(bits))


def value_group(group: int, head_dim: int) -> int:
    """The largest power-of-two group of channels, at most `group`, that divides `head_dim`."""
    while head_dim % group:
        group //= 2
    return group


def value_chunks(head_dim: int) -> list[tuple[int, int]]:
    """(first channel, channels): powers of two from 16 to MAX_CHUNK that make up `head_dim` (80 = 64 + 16), but for a
    rest of less than 16."""
    chunks, first = [], 0
    while head_dim - first >= 16:
        channels = min(MAX_CHUNK, 1 << (head_dim - first).bit_length() - 1)
        chunks.append((first, channels))
        first += channels
    return chunks


def _grouped(x: Tensor, group: int, axis: GroupAxis) -> Tensor:
    """[..., n, BLOCK, D] with its group as a dimension: -2 for the token axis, -1 for the channel axis."""
    *lead, tokens, channels = x.shape
    if axis == "token":
        return x.reshape(*lead, tokens // group, group, channels)
    return x.reshape(*lead, tokens, channels // group, group)


def _stored(meta: Tensor, axis: GroupAxis) -> Tensor:
    """Per-group metadata in its memory order. For the channel axis the tokens go last, as in the codes of values."""
    # clone, not contiguous: that would keep odd strides on dimensions of size 1, which Dynamo guards.
    return meta if axis == "token" else meta.transpose(-1, -2).clone(memory_format=torch.contiguous_format)


def quantize(
    x: Tensor, bits: int, group: int, axis: GroupAxis, clip: float = 1.0, metadata_bits: int = 16
) -> tuple[Tensor, Tensor, Tensor]:
    """Asymmetric min/max quantization of whole blocks.

    Args:
        x: [..., blocks, BLOCK, head_dim], fp16, bf16 or fp32. Values that are not finite take no part in a group's
            range: inf takes the last code, -inf and NaN the first.
        clip: the share of a group's range that its codes span, about its middle; what lies outside takes the nearest
            code. Below 1 it trades the largest values' error for everyone's: few codes fit a bell curve better so.
        metadata_bits: of a scale, and of a zero: 16, or 8 (`metadata_dtype`).

    Returns:
        codes: int32 [..., blocks, BLOCK, head_dim], fitted to scale and zero *as stored*, so that their rounding adds
            no second error.
        scale, zero: [..., blocks, BLOCK / group, head_dim] or [..., blocks, head_dim / group, BLOCK].
    """
    dtype = metadata_dtype(bits, metadata_bits)
    dim = -2 if axis == "token" else -1
    top = 2**bits - 1
    values = _grouped(x.float(), group, axis)
    finite = torch.isfinite(values)
    low = torch.where(finite, values, torch.inf).amin(dim)
    high = torch.where(finite, values, -torch.inf).amax(dim)
    some = low <= high
    low, high = torch.where(some, low, 0.0), torch.where(some, high, 0.0)
    inset = (1 - clip) / 2
    shrink = high * inset - low * inset
    low, high = low + shrink, high - shrink
    # high - low could overflow fp32, the difference of the quotients cannot.
    scale = high / top - low / top
    most = largest_metadata(dtype)
    zero = low.clamp(-most, most)
    if dtype == torch.uint8:
        parts = zero_parts(bits)
        scale = _scale_byte(torch.maximum(scale, zero.abs() / (ZERO_MOST / parts)).clamp(max=most))
        step = _byte_scale(scale)
        step = torch.where(step > 0, step, 1.0)
        furthest = (FP16_MAX * parts / step - 0.5).round().clamp(max=127)  # so that no zero overflows fp16
        zero = (zero / step * parts).round().clamp(-furthest, furthest)
        zero = (zero + ZERO_AT).to(torch.uint8)
    else:
        zero = zero.to(dtype)
        scale = scale.clamp(max=most).to(dtype)
    step, base = (meta.unsqueeze(dim) for meta in metadata(scale, zero, bits))
    position = (values / torch.where(step > 0, step, 1.0) - base / torch.where(step > 0, step, 1.0)).nan_to_num(0.0)
    codes = torch.where(step > 0, position.round().clamp(0, top), 0.0)
    return codes.to(torch.int32).reshape(x.shape), _stored(scale, axis), _stored(zero, axis)


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor, bits: int, group: int, axis: GroupAxis) -> Tensor:
    """The inverse of `quantize`: float32 [..., blocks, BLOCK, head_dim]."""
    scale, zero = metadata(scale, zero, bits)
    if axis == "channel":
        scale, zero = scale.transpose(-1, -2), zero.transpose(-1, -2)
    dim = -2 if axis == "token" else -1
    return (_grouped(codes.float(), group, axis) * scale.unsqueeze(dim) + zero.unsqueeze(dim)).reshape(codes.shape)


def to_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in `dtype`, its largest values at the dtype's limit instead of inf."""
    limit = torch.finfo(dtype).max
    return x.clamp(-limit, limit).to(dtype)


def _or_shifted(slices: Tensor, bits: int) -> Tensor:
    """int32 codes [..., 16 / bits, n, m] -> int16 words [..., n, m]."""
    shifts = torch.arange(0, WORD_BITS, bits, device=slices.device, dtype=torch.int32).view(-1, 1, 1)
    packed = (slices << shifts).sum(-3)
    # The sum is at most 65535: wrap into the signed word without an out-of-range conversion.
    return (packed - ((packed >> 15) << 16)).to(torch.int16)


def _slices(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `_or_shifted`."""
    shifts = torch.arange(0, WORD_BITS, bits, device=packed.device, dtype=torch.int32).view(-1, 1, 1)
    return (packed.to(torch.int32).unsqueeze(-3) >> shifts) & (2**bits - 1)


def pack(codes: Tensor, bits: int, layout: Layout) -> Tensor:
    """int32 codes [..., blocks, BLOCK, head_dim] -> int16 words, in the order of `layout`."""
    slices = WORD_BITS // bits
    if layout == "key":
        return _or_shifted(codes.unflatten(-2, (slices, words(bits))), bits)
    codes = codes.transpose(-1, -2)
    channels = codes.shape[-2]
    chunks = [
        _or_shifted(codes[..., first : first + n, :].unflatten(-2, (slices, n // slices)), bits)
        for first, n in value_chunks(channels)
    ]
    rest = codes[..., channels - channels % 16 :, :].transpose(-1, -2).unflatten(-2, (slices, words(bits)))
    chunks.append(_or_shifted(rest, bits).transpose(-1, -2))
    # No view: Dynamo guards on what a tensor is a view of.
    return torch.cat([chunk.flatten(-2).unflatten(-1, (-1, words(bits))) for chunk in chunks], -2)


def value_matrices(packed: Tensor, bits: int) -> list[Tensor]:
    """The words of values, [..., blocks, head_dim, W], as the matrix of each chunk, [..., blocks, channels / S, BLOCK]."""
    *_, channels, width = packed.shape
    slices, flat = WORD_BITS // bits, packed.flatten(-2)
    return [
        flat[..., first * width : (first + n) * width].unflatten(-1, (n // slices, BLOCK))
        for first, n in value_chunks(channels)
    ]


def unpack(packed: Tensor, bits: int, layout: Layout) -> Tensor:
    """The inverse of `pack`: int32 [..., blocks, BLOCK, head_dim]."""
    if layout == "key":
        return _slices(packed, bits).flatten(-3, -2)
    channels = packed.shape[-2]
    chunks = [_slices(matrix, bits).flatten(-3, -2) for matrix in value_matrices(packed, bits)]
    rest = packed[..., channels - channels % 16 :, :].transpose(-1, -2)
    chunks.append(_slices(rest, bits).flatten(-3, -2).transpose(-1, -2))
    return torch.cat(chunks, -2).transpose(-1, -2)
