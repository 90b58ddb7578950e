"""Codes of keys with error feedback (`minikv_compile.feedback`): the codes that `compress` made are replaced, for the same
scales and zeros."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .jit import (
    ZERO_AT,
    byte_scale,
    dot_precision,
    operand_dtype,
    round_to,
    to_fp32,
    to_operand,
    unit_last,
    zero_parts,
)
from .packing import BLOCK, WORD_BITS, GroupAxis, metadata


def feedback_reference(
    x: Tensor, scale: Tensor, zero: Tensor, bits: int, group: int, axis: GroupAxis, factors: Tensor
) -> Tensor:
    """Codes of keys as they are in the tier, for stored scales and zeros (`packing`).

    Args:
        x: [batch, kv_heads, blocks, BLOCK, head_dim]; what is not finite takes the code that it has without feedback, and gives
            none.
        factors: fp32 [batch, kv_heads, head_dim, head_dim], of `feedback_factors`.

    Returns:
        int32 like `x`.
    """
    step, base = (
        meta.repeat_interleave(group, -2) if axis == "token" else meta.mT.repeat_interleave(group, -1)
        for meta in metadata(scale, zero, bits)
    )
    codes, usable = torch.zeros(x.shape, device=x.device), step > 0
    targets = torch.where(usable, (x.float() - base) / step, 0.0)  # in steps
    for i in reversed(range(x.shape[-1])):
        value = targets[..., i]
        codes[..., i] = value.nan_to_num(0.0).clamp(0, 2**bits - 1).round()
        left = torch.where(torch.isfinite(value), codes[..., i] - value, 0.0) * step[..., i]
        ahead = left[..., None] * factors[:, :, None, None, i, :i]
        targets[..., :i] += torch.where(usable[..., :i], ahead / step[..., :i], 0.0)
    return codes.int()


@triton.jit
def _metadata(SCALE, ZERO, place, BITS: tl.constexpr):
    """Stored scales and zeros as fp32."""
    scale = tl.load(SCALE + place)
    zero = tl.load(ZERO + place)
    if SCALE.dtype.element_ty == tl.uint8:
        step = to_fp32(byte_scale(scale))
        return step, step * ((zero.to(tl.float32) - ZERO_AT) / zero_parts(BITS))
    else:
        return to_fp32(scale), to_fp32(zero)


@triton.jit(do_not_specialize=["kept", "capacity"])
def _feedback_kernel(
    X, INDEX, START, TOKENS, BALANCER, SIGNS, SIZES, FACTORS, CODES, SCALE, ZERO, stride_xb, stride_xh, stride_xs, stride_start,
    stride_tokens, kept, capacity,
    HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, STEP: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    TOKEN_AXIS: tl.constexpr, HAS_INDEX: tl.constexpr, ROTATE: tl.constexpr, BALANCE: tl.constexpr, BLOCK: tl.constexpr,
    SLICES: tl.constexpr, CHUNK: tl.constexpr, OPERAND: tl.constexpr, LEFT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: one block of one head, CHUNK channels after the other. What the channels of a chunk leave reaches those of
    chunks to come as a product of matrices, of the dtype LEFT; those of its own one by one."""
    block = tl.program_id(0)
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    if block * BLOCK < tl.load(TOKENS + batch * stride_tokens):
        TOP: tl.constexpr = 2**BITS - 1
        WORDS: tl.constexpr = BLOCK // SLICES
        row = batch * HEADS + head
        place = row * capacity + block
        token = tl.arange(0, BLOCK)
        column = tl.arange(0, CHUNK)[None, :]
        slot = tl.load(START + batch * stride_start) + block * BLOCK + token.to(tl.int64)
        if HAS_INDEX:
            slot = tl.load(INDEX + row * kept + slot, mask=slot < kept, other=0)
        x_ptr = (X + batch * stride_xb + head.to(tl.int64) * stride_xh + slot * stride_xs)[:, None]
        factors_ptr = FACTORS + row * (D * D)
        lefts = ()
        for k in tl.static_range(D // CHUNK):
            channel0 = D - (k + 1) * CHUNK
            channel = channel0 + column
            # Of channels to come it holds the targets, of those that are done the codes.
            targets = tl.zeros([BLOCK, CHUNK], tl.float32)
            if ROTATE:
                for low in tl.static_range(0, DP, STEP):
                    inner = low + tl.arange(0, STEP)
                    part = tl.load(x_ptr + inner[None, :], mask=(inner < D)[None, :], other=0.0)
                    if BALANCE:
                        balancer = tl.load(BALANCER + row * D + inner, mask=inner < D, other=0.0)
                        part = round_to(to_fp32(part) * balancer[None, :], X.dtype.element_ty)
                    signs = tl.load(SIGNS + inner[:, None] * D + channel, mask=(inner < D)[:, None], other=0.0)
                    part, signs = to_operand(part, OPERAND), to_operand(signs, OPERAND)
                    targets = tl.dot(part, signs, targets, input_precision=PRECISION)
                targets = to_fp32(round_to(targets * tl.load(SIZES + channel), X.dtype.element_ty))
            else:
                targets += to_fp32(tl.load(x_ptr + channel))
                if BALANCE:
                    targets = to_fp32(round_to(targets * tl.load(BALANCER + row * D + channel), X.dtype.element_ty))
            for done in tl.static_range(k):
                behind = D - (done + 1) * CHUNK + tl.arange(0, CHUNK)[:, None]
                targets = tl.dot(lefts[done], tl.load(factors_ptr + behind * D + channel).to(LEFT), targets)
            if TOKEN_AXIS:
                meta = place * (BLOCK // GROUP * D) + (token // GROUP * D)[:, None] + channel
            else:
                meta = place * (D // GROUP * BLOCK) + channel // GROUP * BLOCK + token[:, None]
            step, base = _metadata(SCALE, ZERO, meta, BITS)
            # In steps from here on: whatever a channel's turn needs is in registers, and of the thread's own tokens.
            inverse = tl.where(step > 0, 1.0 / step, 0.0)
            targets = tl.where(step > 0, (targets - base) / step, 0.0)
            left = tl.zeros([BLOCK, CHUNK], tl.float32)
            for n in range(CHUNK):
                i = CHUNK - 1 - n
                here = column == i
                value = tl.sum(tl.where(here, targets, 0.0), 1, keep_dims=True)
                code = tl.minimum(tl.maximum(tl.where(value == value, value, 0.0), 0.0), TOP * 1.0)
                code = (code + 12582912.0) - 12582912.0  # to nearest, ties to even
                residual = tl.where(tl.abs(value) < float("inf"), code - value, 0.0)
                residual *= tl.sum(tl.where(here, step, 0.0), 1, keep_dims=True)
                left = tl.where(here, residual, left)
                ahead = tl.load(factors_ptr + (channel0 + i) * D + channel, mask=column < i, other=0.0)
                targets = tl.where(here, code, targets + residual * ahead * inverse)
            lefts = lefts + (left.to(LEFT),)
            codes = tl.reshape(targets.to(tl.int32), [SLICES, WORDS, CHUNK])
            packed = tl.sum(codes << (tl.arange(0, SLICES) * BITS)[:, None, None], 0).to(tl.int16)
            tl.store(CODES + place * (WORDS * D) + tl.arange(0, WORDS)[:, None] * D + channel, packed)


def feedback_triton(
    x: Tensor, index: Tensor | None, start: Tensor, tokens: Tensor, packed: tuple[Tensor, Tensor, Tensor], bits: int, group: int,
    axis: GroupAxis, rotation: tuple[Tensor, Tensor] | None, balancer: Tensor | None, factors: Tensor,
) -> None:  # fmt: skip
    """Replace the codes in `packed`, in place; arguments as of `compress_triton`, `start` of each row, the rotation as signs and
    the sizes of columns. One launch."""
    x = unit_last(x)
    batch, heads, _, dim = x.shape
    codes, scale, zero = packed
    padded = triton.next_power_of_2(dim)
    wide = x.element_size() == 4
    _feedback_kernel[codes.shape[2], heads, batch](
        x, x if index is None else index.contiguous(), start, tokens, x if balancer is None else balancer.contiguous(),
        *(rotation or (x, x)), factors.contiguous(), codes, scale, zero, *x.stride()[:3],
        start.stride(0), tokens.stride(0), 0 if index is None else index.shape[2], codes.shape[2],
        HEADS=heads, D=dim, DP=padded, STEP=min(padded, 32 if wide else 128), BITS=bits, GROUP=group,
        TOKEN_AXIS=axis == "token", HAS_INDEX=index is not None, ROTATE=rotation is not None, BALANCE=balancer is not None,
        BLOCK=BLOCK, SLICES=WORD_BITS // bits, CHUNK=32 if padded > 128 and dim % 32 == 0 else 16, OPERAND=operand_dtype(x.dtype),
        LEFT=operand_dtype(torch.bfloat16), PRECISION=dot_precision(x.dtype), num_warps=4 if padded <= 128 else 8, num_stages=1,
    )  # fmt: skip
