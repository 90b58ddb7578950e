"""Attention's two products with packed keys and values, in plain PyTorch: two ways to the same numbers.

`DEQUANTIZED` makes keys and values, then multiplies. `FOLDED` is for a compiler, which makes one loop over the words of it:
scale and zero are folded into the other operand, as in the Triton kernels, so that codes are contracted as they are and
nothing dequantized is in memory. It reads words in pairs, as int32 (Inductor's C++ has no vectors of int16), and the other
operand's even and odd places from two tensors, so that all that its loop reads is contiguous. (Eager PyTorch would hold
the codes times every row of the operand.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .compress import Packed
from .packing import WORD_BITS, GroupAxis, Layout, dequantize, unpack


class Products(NamedTuple):
    """Both products; all in fp32."""

    keys: Callable[[Tensor, Packed, int, int, GroupAxis], Tensor]
    """(q [batch, kv_heads, rows, head_dim], keys, bits, group, axis) -> [batch, kv_heads, rows, blocks * BLOCK]"""
    values: Callable[[Tensor, Packed, int, int], Tensor]
    """(p [batch, kv_heads, rows, blocks * BLOCK], values, bits, group) -> [batch, kv_heads, rows, head_dim]"""


def _dequantized_keys(q: Tensor, keys: Packed, bits: int, group: int, axis: GroupAxis) -> Tensor:
    codes, scale, zero = keys
    return q @ dequantize(unpack(codes, bits, "key"), scale, zero, group, axis).flatten(2, 3).transpose(-1, -2)


def _dequantized_values(p: Tensor, values: Packed, bits: int, group: int) -> Tensor:
    codes, scale, zero = values
    return p @ dequantize(unpack(codes, bits, "value"), scale, zero, group, "channel").flatten(2, 3)


def _code_pairs(codes: Tensor, bits: int, layout: Layout) -> list[Tensor]:
    """The codes at even and at odd places of the contracted axis, which is the last: [..., blocks, BLOCK, head_dim / 2] of
    keys, [..., blocks, head_dim, BLOCK / 2] of values."""
    pairs = [unpack(codes.view(torch.int32), bits, layout, first_bit).float() for first_bit in (0, WORD_BITS)]
    return pairs if layout == "key" else [x.transpose(-1, -2) for x in pairs]


def _contract(codes: list[Tensor], operand: Tensor) -> Tensor:
    """Contract the last axis of an operand with pairs of codes."""
    # Stacked, because Inductor has what is stacked in memory before it is read.
    even, odd = torch.stack((operand[..., ::2], operand[..., 1::2]))
    return (codes[0] * even + codes[1] * odd).sum(-1)


def _folded_keys(q: Tensor, keys: Packed, bits: int, group: int, axis: GroupAxis) -> Tensor:
    codes = [c[:, :, None] for c in _code_pairs(keys[0], bits, "key")]
    scale, zero = (meta.float()[:, :, None] for meta in keys[1:])
    q = q[:, :, :, None, None]  # [batch, kv_heads, rows, 1, 1, head_dim]
    if axis == "token":
        codes = [c.unflatten(-2, (-1, group)) for c in codes]
        return (_contract(codes, (q * scale)[..., None, :]) + (q * zero).sum(-1, keepdim=True)).flatten(3)
    codes = [c.unflatten(-1, (-1, group // 2)) for c in codes]
    q = q.unflatten(-1, (-1, group))
    products = _contract(codes, q) * scale.transpose(-1, -2) + q.sum(-1) * zero.transpose(-1, -2)
    return products.sum(-1).flatten(3)


def _folded_values(p: Tensor, values: Packed, bits: int, group: int) -> Tensor:
    codes = [c[:, :, None].unflatten(-2, (-1, group)) for c in _code_pairs(values[0], bits, "value")]
    scale, zero = (meta.float()[:, :, None] for meta in values[1:])
    p = p.unflatten(-1, (-1, 1, scale.shape[-1]))  # [batch, kv_heads, rows, blocks, 1, BLOCK]
    products = _contract(codes, (p * scale)[..., None, :]).sum(3)
    return (products + (p * zero).sum((3, 5))[..., None]).flatten(3)


DEQUANTIZED = Products(_dequantized_keys, _dequantized_values)
FOLDED = Products(_folded_keys, _folded_values)
