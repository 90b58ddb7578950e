"""Error feedback: keys are rounded channel by channel, and each code makes up for the errors of those before it in what the
prompt's queries see of them.

GPTQ (arXiv 2210.17323, section 3) for keys: the second moments M of the queries are its Hessian. The error e of a key costs
`e M e`, the mean square of what it changes in a logit. With M = W D W^T, W of unit diagonal and lower triangular, that is a sum
over channels of D_i r_i^2, where r = e W is what rounding leaves of each channel if its target has the errors of the channels
behind it added: `target_i = key_i + sum_{j > i} r_j (W^-1)_ji`. It costs nothing where the codes are read.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.library import custom_op

OBSERVED = 1024
"""Tokens of a row, at most, whose queries are looked at: evenly spaced."""

WIDEST = 256
"""Channels, at most, of heads whose keys are fed back: the kernel grows with their square."""

DAMPING = 0.01
"""Of the mean of the diagonal, added to it: directions that few queries have count for something too."""


@custom_op("minikv::query_moments", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def query_moments(q: Tensor, k: Tensor, order: Tensor | None, lengths: Tensor | None) -> Tensor:
    """The mean of `q^T q` over tokens of a row and the query heads of a KV head.

    Args:
        q: [batch, heads, seq, head_dim]. k: of the keys only their heads matter.
        order, lengths: of `align_rows`; None for no padding.

    Returns:
        fp32 [batch, kv_heads, head_dim, head_dim].
    """
    counts = [q.shape[2]] * q.shape[0] if lengths is None else lengths.tolist()
    moments = q.new_empty(q.shape[0], k.shape[1], q.shape[3], q.shape[3], dtype=torch.float32)
    for b, n in enumerate(counts):
        x = q[b, :, :n] if order is None else q[b]
        if order is not None or n > OBSERVED:
            places = torch.linspace(0, n - 1, min(n, OBSERVED), device=q.device).long()
            x = x.index_select(1, places if order is None else order[b].to(q.device)[places])
        # fp64, here and below: sums in TF32, which the caller may have allowed, are no longer positive definite.
        x = x.double().unflatten(0, (k.shape[1], -1)).flatten(1, 2)
        moments[b] = (x.mT @ x).div_(x.shape[1])
    return moments


@query_moments.register_fake
def _(q, k, order, lengths):
    return q.new_empty((q.shape[0], k.shape[1], q.shape[3], q.shape[3]), dtype=torch.float32)


def feedback_factors(moments: Tensor, rotation: Tensor | None, balancer: Tensor | None) -> Tensor:
    """How much of what rounding leaves of channel j is added to the target of channel i < j: `(W^-1)_ji`, fp32 like `moments`,
    zero elsewhere; all zero where the moments are not those of anything finite.

    Args:
        moments: of `query_moments`. rotation, balancer: of the tier, as of `kernels.compress`.
    """
    moments = moments.to(torch.float64, copy=True)
    if balancer is not None:
        balancer = balancer.double()
        moments /= balancer[..., :, None] * balancer[..., None, :]
    if rotation is not None:
        rotation = _in_fp64(rotation)
        moments = rotation.mT @ moments @ rotation
    diagonal = moments.diagonal(dim1=-2, dim2=-1)
    diagonal.add_(diagonal.mean(-1, keepdim=True), alpha=DAMPING)
    lower, failed = torch.linalg.cholesky_ex(moments)  # no look at the outcome, which would wait for the device
    unit = lower / lower.diagonal(dim1=-2, dim2=-1).unsqueeze(-2)
    identity = _identity(moments.shape[-1], moments.device).expand_as(moments)
    factors = torch.linalg.solve_triangular(unit, identity, upper=False, unitriangular=True).tril(-1)
    usable = factors.sum((-2, -1)) * 0 == failed  # 0, of what is finite, and no failure
    return torch.where(usable[..., None, None], factors, 0.0).float()


# A prompt of a few hundred tokens waits for the host, so that what does not change is made once.


@lru_cache
def _in_fp64(rotation: Tensor) -> Tensor:
    return rotation.double()


@lru_cache
def _identity(size: int, device: torch.device) -> Tensor:
    return torch.eye(size, dtype=torch.float64, device=device)
