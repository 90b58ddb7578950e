"""The first pass of the two-pass prefill: the vendor's attention, with its log-sum-exp."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten


def repeated(q: Tensor, x: Tensor) -> Tensor:
    """Keys or values with as many heads as the queries."""
    return x if q.shape[1] == x.shape[1] else x.repeat_interleave(q.shape[1] // x.shape[1], 1)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """SDPA, causal, grouped heads: [batch, heads, seq, head_dim]."""
    if q.is_cuda and (q.dtype == torch.float32 or q.shape[3] > 256):
        k, v = repeated(q, k), repeated(q, v)  # the one kernel without a [seq, seq] tensor knows no groups
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


def causal_attention_lse(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor | None]:
    """The same with the natural log-sum-exp, fp32 [batch, heads, seq]; on a CPU, where `scores` needs none, None.

    cuDNN's kernel, the fastest on Hopper, takes 16-bit inputs and head dimensions up to 128 (a multiple of 8);
    flash attention up to 256; fp32 goes to the memory-efficient kernel.
    """
    if not q.is_cuda:
        return causal_attention(q, k, v, scale), None
    seq, dim = q.shape[2:]
    if q.dtype == torch.float32:
        k, v = repeated(q, k), repeated(q, v)
        out, lse, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, True, scale=scale)
    elif dim <= 128 and torch.backends.cuda.cudnn_sdp_enabled():
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True, False, scale=scale)
    else:
        out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, False, scale=scale)
    return out, lse.reshape(*lse.shape[:2], -1)[..., :seq]
