"""Attention's two products with packed keys and values, in plain PyTorch: two ways to the same numbers.

`DEQUANTIZED` makes keys and values, then multiplies. `folded` is for a compiler, which makes one loop over the words of it:
scale and zero are folded into the other operand, as in the Triton kernels, so that codes are contracted as they are and
nothing dequantized is in memory. What Inductor's C++ needs for that loop to be vectors: words in pairs, as int32 (it has no
vectors of int16), the operand's even and odd places apart (it has no strided loads), slices and words as two axes (it would
divide in the loop), and a sum of its own for each of up to `MOST_AT_ONCE` queries of a KV head, which one loop makes: a code is
unpacked once for them. Eager PyTorch would hold the codes times every row of the operand. Head dimensions are multiples of 16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .compress import Packed
from .packing import WORD_BITS, GroupAxis, dequantize, metadata, unpack, value_matrices

MOST_AT_ONCE = 8
"""Sums in one loop: each needs a vector register, of which AVX2 has 16."""


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


def _halved(x: Tensor) -> Tensor:
    """[..., m] -> [..., 2, m / 2]: even and odd places. What is stacked Inductor has in memory before it is read."""
    return torch.stack((x[..., ::2], x[..., 1::2]), -2)


def _in_turn(x: Tensor, queries: int) -> tuple[Tensor, ...]:
    """[batch, kv_heads, rows, ...], whose rows are `queries` times the new tokens, in as many parts as one loop has sums for."""
    at_once = max(d for d in range(1, MOST_AT_ONCE + 1) if queries % d == 0)
    return x.unflatten(2, (at_once, -1)).unbind(2)


def _contract(words: Tensor, bits: int, rows: Sequence[Tensor]) -> Tensor:
    """Contract the codes of matrices of words with fp32 operands, over the words' last axis.

    Args:
        words: [batch, kv_heads, ..., n, m]: S slices of n places each.
        rows: `_in_turn`, [batch, kv_heads, rows, ..., groups, 2, m / 2] each: one operand, halved, for as many neighbouring places.

    Returns:
        [batch, kv_heads, rows, ..., S * n].
    """
    shifts = torch.arange(0, WORD_BITS, bits, dtype=torch.int32, device=words.device)
    halves = torch.arange(0, 2 * WORD_BITS, WORD_BITS, dtype=torch.int32, device=words.device)
    slices, n = shifts.shape[0], words.shape[-2]
    pairs = words.view(torch.int32)[:, :, None, ..., None, :, None, :]  # [batch, kv_heads, 1, ..., 1, n, 1, m / 2]
    # Codes where they lie in a word: times 2 ** shift, which the sum is divided by. (To shift by what varies costs more.)
    codes = (pairs >> halves[:, None] & (2**bits - 1 << shifts[:, None, None, None])).float()
    sums = []
    for row in rows:
        each = row.unsqueeze(-3).expand(*row.shape[:-2], slices * n // row.shape[-3], *row.shape[-2:]).flatten(-4, -3)
        sums.append((codes * each.unflatten(-3, (slices, n))).sum((-2, -1)))
    return (torch.stack(sums, 2).flatten(2, 3) * (1.0 / (1 << shifts[:, None]))).flatten(-2)


def _read_often(scale: Tensor, zero: Tensor, bits: int) -> tuple[Tensor, ...]:
    """`metadata`, with a dimension of query rows, each of which reads it: made of bytes once, not in each row's loop."""
    both = metadata(scale, zero, bits)
    both = torch.stack(both).unbind() if scale.dtype == torch.uint8 else both
    return tuple(meta[:, :, None] for meta in both)


def _folded_keys(
    queries: int, q: Tensor, keys: Packed, bits: int, group: int, axis: GroupAxis, less: Tensor | None
) -> Tensor:
    words, *stored = keys
    scale, zero = _read_often(*stored, bits)
    if axis == "token":
        q = q[:, :, :, None, None]  # [batch, kv_heads, rows, 1, 1, head_dim]
        zeros = (q * zero).sum(-1)  # [batch, kv_heads, rows, blocks, groups]
        if less is not None:
            zeros = zeros - less.view(zeros.shape)
        halved = _halved(scale)
        rows = torch.stack([row * halved for row in _in_turn(_halved(q), queries)]).unbind()
        return (_contract(words, bits, rows) + zeros.repeat_interleave(group, -1)).flatten(3)
    words = words.unflatten(-1, (-1, group)).movedim(-2, 3)
    q = q.unflatten(-1, (-1, group))[:, :, :, None, :, None]  # [batch, kv_heads, rows, 1, groups, 1, group]
    return (_contract(words, bits, _in_turn(_halved(q), queries)) * scale + q.sum(-1) * zero).sum(-2).flatten(3)


def _folded_values(queries: int, p: Tensor, values: Packed, bits: int, group: int) -> Tensor:
    words, *stored = values
    scale, zero = _read_often(*stored, bits)
    zeros = p @ zero[:, :, 0].transpose(2, 3).flatten(3).mT  # [batch, kv_heads, rows, groups]
    p = p.unflatten(-1, (-1, 1, scale.shape[-1]))  # [batch, kv_heads, rows, blocks, 1, BLOCK]
    matrices = value_matrices(words, bits)
    slices = WORD_BITS // bits
    operands = _halved(p * scale).split([slices * matrix.shape[-2] // group for matrix in matrices], -3)
    products = [
        _contract(x, bits, _in_turn(operand, queries)).sum(3) for x, operand in zip(matrices, operands, strict=True)
    ]  # fmt: skip
    return torch.cat(products, -1) + zeros.repeat_interleave(group, -1)


DEQUANTIZED = Products(_dequantized_keys, _dequantized_values)


def folded(queries: int) -> Products:
    """For `queries` of each KV head, times any number of new tokens."""
    return Products(partial(_folded_keys, queries), partial(_folded_values, queries))
