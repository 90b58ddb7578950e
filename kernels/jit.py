"""Device functions that the kernels share, and what they need to know about the machine they run on."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import packing

INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)
"""Triton's interpreter runs the kernels (`TRITON_INTERPRET=1`): no inline assembly, and no arithmetic on bf16."""

LOG2E = tl.constexpr(1.4426950408889634)
FP16_MAX = tl.constexpr(65504.0)

_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def check_dtype(*tensors: Tensor) -> None:
    """Raises: ValueError, unless all tensors have one dtype that the kernels take."""
    dtypes = {t.dtype for t in tensors}
    if len(dtypes) > 1 or not dtypes <= set(_DTYPES):
        raise ValueError(f"The kernels take float16, bfloat16 or float32, one for all, not {dtypes}.")


def check_head_dim(head_dim: int) -> None:
    """Raises: ValueError, unless the kernels take this head dimension."""
    if head_dim % 16:
        raise ValueError(f"The kernels take head dimensions that are multiples of 16, not {head_dim}.")


def operand_dtype(dtype: torch.dtype) -> tl.dtype:
    """The dtype in which a tensor of `dtype` enters a matrix product."""
    return tl.float32 if INTERPRET and dtype == torch.bfloat16 else _DTYPES[dtype]


def dot_precision(dtype: torch.dtype) -> str | None:
    """How products of operands are formed. fp32: by three TF32 products, to about 2**-21; exact ones do not run on
    tensor cores and would spill registers by the kilobyte."""
    return "tf32x3" if dtype == torch.float32 else None


def unit_last(x: Tensor) -> Tensor:
    """`x`, or a copy where its last dimension is not contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


@triton.jit
def to_fp32(x):
    """Exact, also for bf16 in the interpreter."""
    if INTERPRET and x.dtype == tl.bfloat16:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def to_operand(x, OPERAND: tl.constexpr):
    """A stored value as an operand."""
    return x if x.dtype == OPERAND else to_fp32(x).to(OPERAND)


@triton.jit
def pinned(x):
    """`x`, fp16 or fp32. When Triton chooses the layout of a product's operands, it does not look behind this: a join
    there has it give each thread four neighbours, where the tensor core takes two, so all go through shared memory."""
    if INTERPRET:
        return x
    elif x.dtype == tl.float16:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=tl.float16, is_pure=False, pack=2)
    else:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=False, pack=1)


@triton.jit
def transposed(x):
    """`x` [T, R], fp16 and the result of a product, T and R multiples of 8, as [R, T], by one instruction for each 8x8
    block. It relies on the layout that the product gives it: nothing but elementwise operations may lie between."""
    if INTERPRET:
        return tl.trans(x)
    else:
        T: tl.constexpr = x.shape[0]
        R: tl.constexpr = x.shape[1]
        y = tl.inline_asm_elementwise(
            "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", "=r,r", [x], dtype=tl.float16, is_pure=False, pack=2
        )
        # y[8 a + i, 8 b + j] = x[8 a + j, 8 b + i]
        return tl.reshape(tl.permute(tl.reshape(y, [T // 8, 8, R // 8, 8]), (2, 1, 0, 3)), [R, T])


@triton.jit
def first(a, b):
    return a


@triton.jit
def times(x, y):
    """x times fp16 `y`, which is broadcast."""
    if INTERPRET or x.dtype == tl.float32:
        return x * y.to(x.dtype)
    else:
        return tl.inline_asm_elementwise(
            "mul.rn.f16x2 $0, $1, $2;", "=r,r,r", [x, y], dtype=tl.float16, is_pure=True, pack=2
        )


@triton.constexpr_function
def _shuffle_asm(row):
    # The lanes of a row are four; 0x31f: each lane takes from that with its own two lowest bits.
    return f"shfl.sync.idx.b32 $0, $1, {4 * row}, 0x31f, -1;"


@triton.jit
def of_row(x, ROW: tl.constexpr):
    """`x` [T, R], T <= 8, fp32 and the result of a product, with its row ROW in all rows. As `transposed` does, it relies on
    the layout that the product gives it."""
    return tl.inline_asm_elementwise(_shuffle_asm(ROW), "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def round_to(x, DTYPE: tl.constexpr):
    """fp32 -> DTYPE, to nearest, ties to even. (The interpreter truncates to bf16.)"""
    if INTERPRET and DTYPE == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)
        return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(DTYPE)


MOST_NOISE = tl.constexpr(packing.MOST_NOISE)
ZERO_AT = tl.constexpr(packing.ZERO_AT)
ZERO_MOST = tl.constexpr(packing.ZERO_MOST)


@triton.constexpr_function
def zero_parts(bits):
    """As in `packing`: Triton takes no other functions."""
    return 2.0 ** (5 - bits)


@triton.jit
def scale_byte(x):
    """fp32 -> uint8, as `packing` stores scales."""
    byte = (x.to(tl.float16).to(tl.int16, bitcast=True) + 64) >> 7
    return tl.maximum(byte, (x > 0).to(tl.int16)).to(tl.uint8)


@triton.jit
def byte_scale(x):
    """uint8 -> fp16, the inverse."""
    return (x.to(tl.int16) << 7).to(tl.float16, bitcast=True)


_SCALES_ASM = tl.constexpr(
    "{ .reg .b32 s; prmt.b32 s, $2, 0, 0x1404; shr.u32 $0, s, 1; prmt.b32 s, $2, 0, 0x3424; shr.u32 $1, s, 1; }"
)
"""Four bytes to the numbers whose upper bytes, but for their signs, they are."""


@triton.constexpr_function
def _zeros_asm(bits):
    # A byte in the low bits of 2**(5 + bits) counts parts of a step; subtracted is what ZERO_AT of them make of it.
    base, minus = 20 + bits << 2, 0x8080 | 20 + bits << 10
    one_pair = (
        "prmt.b32 s, $2, 0, %s; shr.u32 s, s, 1; prmt.b32 z, $3, " + str(base) + ", %s;"
        "add.rn.f16x2 z, z, m; mul.rn.f16x2 %s, z, s;"
    )
    both = one_pair % ("0x1404", "0x4140", "$0") + one_pair % ("0x3424", "0x4342", "$1")
    return f"{{ .reg .b32 s, z, m; mov.b32 m, {minus << 16 | minus}; {both} }}"


@triton.jit
def stored_scale(scale):
    """Scales as they were loaded, but bytes as fp16."""
    if scale.dtype != tl.uint8:
        return scale
    elif INTERPRET:
        return byte_scale(scale)
    else:
        return tl.inline_asm_elementwise(_SCALES_ASM, "=&r,=r,r", [scale], dtype=tl.float16, is_pure=False, pack=4)


@triton.jit
def stored_zero(zero, scale, BITS: tl.constexpr):
    """Zeros as they were loaded, but bytes, with the scales that stand beside them, as fp16, exactly."""
    if zero.dtype != tl.uint8:
        return zero
    elif INTERPRET:
        return byte_scale(scale) * ((zero.to(tl.float32) - ZERO_AT) / zero_parts(BITS)).to(tl.float16)
    else:
        return tl.inline_asm_elementwise(
            _zeros_asm(BITS), "=&r,=&r,r,r", [scale, zero], dtype=tl.float16, is_pure=False, pack=4
        )


@triton.jit
def exponent(x):
    """floor(log2(x)) for normal x > 0, -127 for 0 and subnormal x."""
    return ((x.to(tl.int32, bitcast=True) >> 23) & 255) - 127


@triton.jit
def exp2i(e):
    """2**e in fp32 for an integer -127 < e < 128; 0 for e <= -127."""
    return ((tl.maximum(e, -127) + 127) << 23).to(tl.float32, bitcast=True)


# How codes become matrix operands. A code in the low 10 bits of an fp16 value, all else zero, is a subnormal number:
# code * 2**position * 2**-24, exactly, and tensor cores multiply subnormal numbers like any others. So one AND turns
# the two codes of a 32-bit register into two operands, without a conversion and without the offset that the usual
# trick (OR in the exponent of 1024) has to subtract again.

CODE_EXPONENT = tl.constexpr(24)


@triton.constexpr_function
def code_shift(position, bits):
    """How far right a word must move so that the code at bit `position` lies in the low 10 bits."""
    return 8 if position + bits > 10 else 0


@triton.constexpr_function
def code_position(position, bits):
    """The operand that stands for a code is `code * 2**(code_position - CODE_EXPONENT)`."""
    return position - code_shift(position, bits)


@triton.constexpr_function
def next_power_of_2(n):
    return triton.next_power_of_2(n)


@triton.constexpr_function
def log2(n):
    return n.bit_length() - 1


@triton.constexpr_function
def value_loads(chunks, group, slices):
    """How a value block's words are loaded: (first row, rows) of the matrix [head_dim / slices, BLOCK] of words.

    `chunks` as from `packing.value_chunks`. A load that becomes several tiles of channels (`value_tiles`) stands once.
    """
    return tuple(
        (first // slices + part, min(channels // slices, group))
        for first, channels in chunks
        for part in range(0, channels // slices, min(channels // slices, group))
    )


@triton.constexpr_function
def value_tiles(chunks, group, slices):
    """The tiles of channels that a value block's words hold: (first channel, slice, index in `value_loads`).

    A tile has as many channels as its load has rows; they share one group.
    """
    tiles, load = (), 0
    for first, channels in chunks:
        rows = channels // slices
        parts = rows // min(rows, group)
        for i in range(slices):
            for part in range(parts):
                tiles += ((first + i * rows + part * (rows // parts), i, load + part),)
        load += parts
    return tiles


@triton.constexpr_function
def together(rows, sides):
    """Whether the value codes of all sides, `rows` rows of words each, are one operand of 16 rows."""
    return sides > 1 and rows * sides <= 16


@triton.constexpr_function
def tile_rows(rows, sides):
    """Of a tile of outputs."""
    return rows * sides if together(rows, sides) else rows


@triton.constexpr_function
def differ(tiles, i, j, part):
    """Whether this is the first tile, or its `entry` j, in units of `part`, is not that of the tile before."""
    return i == 0 or tiles[i][j] // part != tiles[i - 1][j] // part


@triton.constexpr_function
def length_of(table):
    return len(table)


@triton.constexpr_function
def entry(table, i, j):
    return table[i][j]


@triton.constexpr_function
def _extract_asm(shift, mask):
    both = f"0x{mask << 16 | mask:08x}"
    if shift == 0:
        return f"and.b32 $0, $1, {both};"
    return f"{{ .reg .b32 t; shr.u32 t, $1, {shift}; and.b32 $0, t, {both}; }}"


@triton.jit
def codes_at(words, POSITION: tl.constexpr, BITS: tl.constexpr):
    """The codes at bit POSITION of int16 words, as fp16 operands: `code * 2**(code_position - CODE_EXPONENT)`."""
    SHIFT: tl.constexpr = code_shift(POSITION, BITS)
    MASK: tl.constexpr = ((1 << BITS) - 1) << (POSITION - SHIFT)
    if INTERPRET:
        return ((words >> SHIFT) & MASK).to(tl.float16, bitcast=True)
    else:
        return tl.inline_asm_elementwise(
            _extract_asm(SHIFT, MASK), "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2
        )
