"""MiKV's outlier balancer (arXiv 2402.18096, section 3.3): key channels that are large meet queries that are small.

A key channel that is `b` times larger, and a query channel `b` times smaller, give the same logits: but the codes of a group
of channels then span what the large ones need. So keys are multiplied by `sqrt(max |q| / max |k|)` of each channel before
they are quantized, and queries divided by it. It is of the prompt, and constant from then on.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import custom_op

from .kernels.packing import BLOCK


def channel_range(x: Tensor, order: Tensor | None, lengths: Sequence[int]) -> Tensor:
    """max |x| of each channel, fp32 [batch, heads, head_dim], over a row's valid tokens.

    Args:
        x: [batch, heads, seq, head_dim]. order: of `align_rows`, None for no padding; lengths: of all rows.
    """
    rows = [x] if order is None else [x[b : b + 1, :, order[b, :n]] for b, n in enumerate(lengths)]
    # Both ends in one pass: |x| would be a tensor of its size.
    ends = [row.aminmax(dim=2) for row in rows]
    return torch.cat([torch.maximum(-low, high) for low, high in ends]).float()


@custom_op("minikv::query_range", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def query_range(q: Tensor, k: Tensor, order: Tensor | None, lengths: Tensor | None) -> Tensor:
    """max |q| of each channel, over the tokens of a row and the query heads of a KV head.

    Args:
        q: [batch, heads, seq, head_dim]. k: of the keys only their heads matter.
        order, lengths: of `align_rows`; None for no padding.

    Returns:
        fp32 [batch, kv_heads, head_dim].
    """
    of_heads = channel_range(q, order, () if lengths is None else lengths.tolist())
    return of_heads.unflatten(1, (k.shape[1], -1)).amax(2)


@query_range.register_fake
def _(q, k, order, lengths):
    return q.new_empty((q.shape[0], k.shape[1], q.shape[3]), dtype=torch.float32)


def balancer_of(q_range: Tensor, k: Tensor, order: Tensor | None, lengths: Sequence[int]) -> Tensor:
    """sqrt(max |q| / max |k|) of each channel (MiKV, section 3.3), 1 where that is no positive number, and in rows of less than
    a block, which say little of what will come: fp32 [batch, kv_heads, head_dim]. Arguments as of `minikv::compress`,
    `lengths` of all rows."""
    balancer = (q_range / channel_range(k, order, lengths)).sqrt()
    for row, n in zip(balancer, lengths, strict=True):
        if n < BLOCK:
            row.fill_(1.0)
    return torch.where((balancer > 0) & (balancer < torch.inf), balancer, 1.0)
