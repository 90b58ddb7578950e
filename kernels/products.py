"""Attention's two products with packed keys and values, in plain PyTorch: two ways to the same numbers.

`DEQUANTIZED` makes keys and values, then multiplies. `FOLDED` is for a compiler, which makes one loop over the words of it:
scale and zero are folded into the other operand, as in the Triton kernels, so that codes are contracted as they are and
nothing dequantized is in memory. What Inductor's C++ needs for that loop to be vectors: words in pairs, as int32 (it has no
vectors of int16), the operand's even and odd places from two tensors (it has no strided loads), and slices and words as two
axes (it would divide in the loop). Eager PyTorch would hold the codes times every row of the operand. Head dimensions are
multiples of 16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .compress import Packed
from .packing import WORD_BITS, GroupAxis, dequantize, metadata, unpack, value_matrices


class Products(NamedTuple):
    """Both products; all in fp32."""

    keys: Callable[[Tensor, Packed, int, int, GroupAxis, Tensor | None], Tensor]
    """(q [batch, kv_heads, rows, head_dim], keys, bits, group, axis, less [batch, kv_heads, rows, groups of tokens] or None) ->
    [batch, kv_heads, rows, blocks * BLOCK], less by `less` in each group."""
    values: Callable[[Tensor, Packed, int, int], Tensor]
    """(p [batch, kv_heads, rows, blocks * BLOCK], values, bits, group) -> [batch, kv_heads, rows, head_dim]"""


def _dequantized_keys(q: Tensor, keys: Packed, bits: int, group: int, axis: GroupAxis, less: Tensor | None) -> Tensor:
    codes, scale, zero = keys
    products = q @ dequantize(unpack(codes, bits, "key"), scale, zero, bits, group, axis).flatten(2, 3).transpose(-1, -2)
    return products if less is None else products - less.repeat_interleave(group, -1)


def _dequantized_values(p: Tensor, values: Packed, bits: int, group: int) -> Tensor:
    codes, scale, zero = values
    return p @ dequantize(unpack(codes, bits, "value"), scale, zero, bits, group, "channel").flatten(2, 3)


def _contract(words: Tensor, bits: int, operand: Tensor) -> Tensor:
    """Contract the codes of matrices of words with fp32 operands, over the words' last axis.

    Args:
        words: [batch, kv_heads, ..., n, m]: S slices of n places each.
        operand: [batch, kv_heads, rows, ..., groups, m]: one for as many neighbouring places each.

    Returns:
        [batch, kv_heads, rows, ..., S * n].
    """
    shifts = torch.arange(0, WORD_BITS, bits, dtype=torch.int32, device=words.device).view(-1, 1, 1)
    places = shifts.shape[0] * words.shape[-2]
    pairs = words.view(torch.int32)[:, :, None].unsqueeze(-3)  # [..., 1, n, m / 2]
    # Codes where they lie in a word: times 2 ** shift, which the sum is divided by.
    codes = [(pair & (2**bits - 1 << shifts)).float() for pair in (pairs, pairs >> WORD_BITS)]
    # Stacked, because Inductor has what is stacked in memory before it is read.
    even, odd = (
        x.unsqueeze(-2).expand(*x.shape[:-1], places // x.shape[-2], -1).flatten(-3, -2).unflatten(-2, (shifts.shape[0], -1))
        for x in torch.stack((operand[..., ::2], operand[..., 1::2]))
    )
    return ((codes[0] * even + codes[1] * odd).sum(-1) / (1 << shifts[..., 0])).flatten(-2)


def _read_often(scale: Tensor, zero: Tensor, bits: int) -> tuple[Tensor, ...]:
    """`metadata`, with a dimension of query rows, each of which reads it: made of bytes once, not in each row's loop."""
    both = metadata(scale, zero, bits)
    both = torch.stack(both).unbind() if scale.dtype == torch.uint8 else both
    return tuple(meta[:, :, None] for meta in both)


def _folded_keys(q: Tensor, keys: Packed, bits: int, group: int, axis: GroupAxis, less: Tensor | None) -> Tensor:
    words, *stored = keys
    scale, zero = _read_often(*stored, bits)
    if axis == "token":
        q = q[:, :, :, None, None]  # [batch, kv_heads, rows, 1, 1, head_dim]
        zeros = (q * zero).sum(-1)  # [batch, kv_heads, rows, blocks, groups]
        if less is not None:
            zeros = zeros - less.view(zeros.shape)
        return (_contract(words, bits, q * scale) + zeros.repeat_interleave(group, -1)).flatten(3)
    words = words.unflatten(-1, (-1, group)).movedim(-2, 3)
    q = q.unflatten(-1, (-1, group))[:, :, :, None, :, None]  # [batch, kv_heads, rows, 1, groups, 1, group]
    return (_contract(words, bits, q) * scale + q.sum(-1) * zero).sum(-2).flatten(3)


def _folded_values(p: Tensor, values: Packed, bits: int, group: int) -> Tensor:
    words, *stored = values
    scale, zero = _read_often(*stored, bits)
    p = p.unflatten(-1, (-1, 1, scale.shape[-1]))  # [batch, kv_heads, rows, blocks, 1, BLOCK]
    matrices = value_matrices(words, bits)
    slices = WORD_BITS // bits
    operands = (p * scale).split([slices * matrix.shape[-2] // group for matrix in matrices], -2)
    products = [_contract(x, bits, operand).sum(3) for x, operand in zip(matrices, operands, strict=True)]
    return torch.cat(products, -1) + (p * zero).sum((3, 5)).repeat_interleave(group, -1)


DEQUANTIZED = Products(_dequantized_keys, _dequantized_values)
FOLDED = Products(_folded_keys, _folded_values)
