"""Scores: the column sums of the causal attention map, without the map."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .jit import LOG2E, check_dtype, dot_precision, operand_dtype, to_operand, unit_last
from .tuning import scores_tuning


def column_scores_reference(
    q: Tensor, k: Tensor, scale: float, lengths: Tensor | None = None, last: int | None = None, chunk: int = 256
) -> Tensor:
    """Attention probabilities summed over the queries and over the query heads of each KV head, in plain PyTorch.

    Args:
        q: [batch, heads, seq, head_dim]; k: [batch, kv_heads, seq, head_dim].
        lengths: int [batch], valid tokens of each row, which come first; None for all. Queries past a row's length do
            not count, keys past it score 0.
        last: count only the last `last` valid queries of each row (SnapKV's observation window); None for all
            (H2O's and MiniKV's cumulative score, MiniKV section 3.1).
        chunk: queries at a time: memory is linear in `seq`.

    Returns:
        fp32 (fp64 for fp64 input) [batch, kv_heads, seq].
    """
    batch, heads, seq, dim = q.shape
    kv_heads = k.shape[1]
    dtype = torch.promote_types(q.dtype, torch.float32)
    lengths = torch.full((batch,), seq, device=q.device) if lengths is None else lengths.to(q.device)
    first = torch.zeros_like(lengths) if last is None else lengths - last
    keys = k.to(dtype).transpose(-1, -2)
    position = torch.arange(seq, device=q.device)
    scores = torch.zeros(batch, kv_heads, seq, dtype=dtype, device=q.device)
    for low in range(0, seq, chunk):
        rows = position[low : low + chunk]
        high = min(low + chunk, seq)  # causal: later keys are not seen
        query = q[:, :, low:high].to(dtype).reshape(batch, kv_heads, -1, dim) * scale
        logits = (query @ keys[..., :high]).view(batch, kv_heads, -1, len(rows), high)
        logits[..., low:].masked_fill_(position[low:high] > rows[:, None], -torch.inf)
        exps = logits.sub_(logits.amax(-1, keepdim=True)).exp_()
        counts = (rows >= first[:, None]) & (rows < lengths[:, None])  # [batch, rows]
        # The sum over queries of exps / their sum, as one product.
        weights = counts[:, None, None] / exps.sum(-1)
        scores[..., :high] += (weights.view(batch, kv_heads, 1, -1) @ exps.view(batch, kv_heads, -1, high))[..., 0, :]
    return scores


@triton.jit
def _column_sums(
    k, k_rows, q_base, lse_base, query0, stride_q, first, length, scale2,
    D: tl.constexpr, DP: tl.constexpr, QUERIES: tl.constexpr, MASKED: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Probabilities of QUERIES queries from `query0` on, summed per key: fp32 [keys]."""
    row = query0 + tl.arange(0, QUERIES)
    channel = tl.arange(0, DP)
    q_ptr = q_base + row.to(tl.int64)[None, :] * stride_q + channel[:, None]
    # What lies past the row's length may be NaN: it is not read. exp2(0 - inf) = 0 leaves it out of the sum.
    q = tl.load(q_ptr, mask=(row < length)[None, :] & (channel < D)[:, None], other=0.0)
    lse = tl.load(lse_base + row, mask=(row >= first) & (row < length), other=float("inf"))
    logits = tl.dot(k, to_operand(q, OPERAND), input_precision=PRECISION)  # [keys, queries]
    probs = tl.exp2(logits * scale2 - (lse * LOG2E)[None, :])
    if MASKED:
        probs = tl.where(row[None, :] >= k_rows[:, None], probs, 0.0)
    return tl.sum(probs, 1)


@triton.jit(do_not_specialize=["seq", "last"])
def _column_scores_kernel(
    Q, K, LSE, LENGTHS, OUT, stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, seq, last, scale,
    KV_HEADS: tl.constexpr, RATIO: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, KEYS: tl.constexpr,
    QUERIES: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_LAST: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: KEYS keys of one KV head, against all the queries that see them, of all its query heads.

    Keys are the rows of the product, so that the sum over queries stays inside a thread. Each key belongs to one
    program: no atomics, the same bits every time. The first programs, which see the most queries, start first.
    """
    pair = tl.program_id(1)
    batch = (pair // KV_HEADS).to(tl.int64)
    kv_head = pair % KV_HEADS
    length = seq
    if HAS_LENGTHS:
        length = tl.load(LENGTHS + batch).to(tl.int32)
    first = 0
    if HAS_LAST:
        first = tl.maximum(length - last, 0)

    key0 = tl.program_id(0) * KEYS
    k_rows = key0 + tl.arange(0, KEYS)
    channel = tl.arange(0, DP)
    k_ptr = K + batch * stride_kb + kv_head.to(tl.int64) * stride_kh
    k_ptr += k_rows.to(tl.int64)[:, None] * stride_ks + channel[None, :]
    k = tl.load(k_ptr, mask=(k_rows < length)[:, None] & (channel < D)[None, :], other=0.0)
    k = to_operand(k, OPERAND)

    # Queries from the diagonal on; those that see every key of this program need no mask.
    start = tl.maximum(key0, first // QUERIES * QUERIES)
    unmasked = tl.maximum(start, key0 + tl.cdiv(KEYS - 1, QUERIES) * QUERIES)
    scale2 = scale * LOG2E
    sums = tl.zeros([KEYS], tl.float32)
    for head in range(RATIO):
        q_head = (kv_head * RATIO + head).to(tl.int64)
        q_base = Q + batch * stride_qb + q_head * stride_qh
        lse_base = LSE + (batch * KV_HEADS * RATIO + q_head) * seq
        for query0 in range(start, tl.minimum(unmasked, length), QUERIES):
            sums += _column_sums(
                k, k_rows, q_base, lse_base, query0, stride_qs, first, length, scale2, D, DP, QUERIES, True, OPERAND,
                PRECISION,
            )  # fmt: skip
        for query0 in range(unmasked, length, QUERIES):
            sums += _column_sums(
                k, k_rows, q_base, lse_base, query0, stride_qs, first, length, scale2, D, DP, QUERIES, False, OPERAND,
                PRECISION,
            )  # fmt: skip
    sums = tl.where(k_rows < length, sums, 0.0)
    tl.store(OUT + pair.to(tl.int64) * seq + k_rows, sums, mask=k_rows < seq)


def column_scores_triton(
    q: Tensor, k: Tensor, lse: Tensor, scale: float, lengths: Tensor | None = None, last: int | None = None
) -> Tensor:
    """`column_scores` as a Triton kernel."""
    check_dtype(q, k)
    batch, heads, seq, dim = q.shape
    kv_heads = k.shape[1]
    q, k, lse = unit_last(q), unit_last(k), lse.contiguous()
    tuning = scores_tuning(triton.next_power_of_2(dim), q.element_size())
    out = torch.empty(batch, kv_heads, seq, dtype=torch.float32, device=q.device)
    _column_scores_kernel[triton.cdiv(seq, tuning.columns), batch * kv_heads](
        q, k, lse, lse if lengths is None else lengths, out, *q.stride()[:3], *k.stride()[:3], seq, last or 0, scale,
        KV_HEADS=kv_heads, RATIO=heads // kv_heads, D=dim, DP=triton.next_power_of_2(dim), KEYS=tuning.columns,
        QUERIES=tuning.queries, HAS_LENGTHS=lengths is not None, HAS_LAST=last is not None,
        OPERAND=operand_dtype(q.dtype), PRECISION=dot_precision(q.dtype),
        num_warps=tuning.warps, num_stages=tuning.stages,
    )  # fmt: skip
    return out


def column_scores(
    q: Tensor, k: Tensor, lse: Tensor | None, scale: float, lengths: Tensor | None = None, last: int | None = None
) -> Tensor:
    """The second pass of a two-pass prefill: only q @ k^T is computed again, the softmax is known from `lse`.

    Args:
        q: [batch, heads, seq, head_dim]; k: [batch, kv_heads, seq, head_dim]; fp16, bf16 or fp32, any strides.
        lse: fp32 [batch, heads, seq], natural log-sum-exp of each query's logits, from the attention kernel; on a CPU it may be
            None.
        scale: of the logits.
        lengths, last: see `column_scores_reference`, which needs no `lse`.

    Returns:
        fp32 [batch, kv_heads, seq].
    """
    if not q.is_cuda:
        return column_scores_reference(q, k, scale, lengths, last)
    return column_scores_triton(q, k, lse, scale, lengths, last)
