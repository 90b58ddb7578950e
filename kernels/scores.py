"""Scores: the column sums of the causal attention map, without the map."""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .jit import LOG2E, check_dtype, check_head_dim, dot_precision, operand_dtype, to_operand, unit_last
from .tuning import WIDE_BYTES, ScoresTuning, scores_tuning


def column_scores_reference(
    q: Tensor, k: Tensor, scale: float, lengths: Tensor | None = None, last: int | None = None, stride: int = 1,
    chunk: int = 256,
) -> Tensor:  # fmt: skip
    """Attention probabilities summed over the queries and over the query heads of each KV head, in plain PyTorch.

    Args:
        q: [batch, heads, seq, head_dim]; k: [batch, kv_heads, seq, head_dim].
        lengths: int [batch], valid tokens of each row, which come first; None for all. Queries past a row's length do
            not count, keys past it score 0.
        last: count only the last `last` valid queries of each row (SnapKV's observation window); None for all
            (H2O's and MiniKV's cumulative score, MiniKV section 3.1).
        stride: a sample: of every `stride` queries the last one counts, `stride` times. At most `seq`.
        chunk: queries at a time: memory is linear in `seq`.

    Returns:
        fp32 (fp64 for fp64 input) [batch, kv_heads, seq].
    """
    batch, _, seq, dim = q.shape
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
        counts = (rows >= first[:, None]) & (rows < lengths[:, None]) & (rows % stride == stride - 1)  # [batch, rows]
        # The sum over queries of exps / their sum, as one product.
        weights = counts[:, None, None] * stride / exps.sum(-1)
        scores[..., :high] += (weights.view(batch, kv_heads, 1, -1) @ exps.view(batch, kv_heads, -1, high))[..., 0, :]
    return scores


@triton.jit(do_not_specialize=["seq", "last", "padded"])
def _prepare_kernel(
    LSE, LENGTHS, OUT, stride_b, stride_h, seq, last, padded,
    HEADS: tl.constexpr, STRIDE: tl.constexpr, SHIFT: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_LAST: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Log-sum-exps of the queries that count, in base 2, less the logarithm of their weight; inf for all others, so
    that the loop over queries needs no mask."""
    pair = tl.program_id(1).to(tl.int64)
    head = pair % HEADS
    batch = pair // HEADS
    length = seq
    if HAS_LENGTHS:
        length = tl.load(LENGTHS + batch).to(tl.int32)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    query = row * STRIDE + STRIDE - 1
    counts = row < length // STRIDE
    if HAS_LAST:
        counts &= query >= length - last
    lse = tl.load(LSE + batch * stride_b + head * stride_h + query, mask=counts, other=float("inf"))
    tl.store(OUT + pair * padded + row, lse * LOG2E - SHIFT, mask=row < padded)


@triton.jit
def _column_sums(
    sums, k, k_rows, Q, lse_ptr, batch, head, tile, rows, scale2,
    DP: tl.constexpr, KEYS: tl.constexpr, QUERIES: tl.constexpr, STRIDE: tl.constexpr, MASKED: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`sums` plus the probabilities of one tile of queries: [QUERIES / 16, 8, KEYS]."""
    q = tl.reshape(Q.load([batch, head, tile * QUERIES, 0]), [QUERIES, DP])
    row = tile * QUERIES + tl.arange(0, QUERIES)
    logits = tl.dot(to_operand(q, OPERAND), k, input_precision=PRECISION)
    probs = tl.exp2(logits * scale2 - tl.load(lse_ptr + row)[:, None])
    if MASKED:
        # Rows past the end may be NaN.
        seen = ((row * STRIDE + STRIDE - 1)[:, None] >= k_rows[None, :]) & (row < rows)[:, None]
        probs = tl.where(seen, probs, 0.0)
    # A thread has rows 8 apart: what it adds up itself needs no shuffles until the end.
    return sums + tl.sum(tl.reshape(probs, [QUERIES // 16, 2, 8, KEYS]), 1)


@triton.jit(do_not_specialize=["seq", "last", "padded"])
def _column_scores_kernel(
    Q, K, LSE, LENGTHS, OUT, stride_kb, stride_kh, stride_ks, seq, last, padded, scale, pairs,
    KV_HEADS: tl.constexpr, RATIO: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, KEYS: tl.constexpr,
    QUERIES: tl.constexpr, STRIDE: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_LAST: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: KEYS keys of one KV head, against all the queries that see them, of all its query heads.

    Each key belongs to one program: no atomics, the same bits every time. The programs that see the most queries start
    first.
    """
    pair = tl.program_id(0) % pairs
    batch = pair // KV_HEADS
    kv_head = pair % KV_HEADS
    length = seq
    if HAS_LENGTHS:
        length = tl.load(LENGTHS + batch).to(tl.int32)
    first = 0
    if HAS_LAST:
        first = tl.maximum(length - last, 0)

    key0 = tl.program_id(0) // pairs * KEYS
    k_rows = key0 + tl.arange(0, KEYS)
    channel = tl.arange(0, DP)
    k_ptr = K + batch.to(tl.int64) * stride_kb + kv_head.to(tl.int64) * stride_kh
    k_ptr += k_rows.to(tl.int64)[:, None] * stride_ks + channel[None, :]
    k = tl.load(k_ptr, mask=(k_rows < length)[:, None] & (channel < D)[None, :], other=0.0)
    k = tl.trans(to_operand(k, OPERAND))

    # Tiles of queries: first those on the diagonal and the last, partial one, which need a mask; then the others.
    SPAN: tl.constexpr = QUERIES * STRIDE
    rows = length // STRIDE
    tiles = tl.cdiv(rows, QUERIES)
    whole = rows // QUERIES
    start = tl.minimum(tl.maximum(key0, first) // SPAN, tiles)
    low = tl.minimum(tl.maximum(start, tl.cdiv(key0 + KEYS - 1, SPAN)), tiles)
    diagonal = low - start
    masked = diagonal + tl.where((whole < tiles) & (low < tiles), 1, 0)
    scale2 = scale * LOG2E
    sums = tl.zeros([QUERIES // 16, 8, KEYS], tl.float32)
    head0 = kv_head * RATIO
    lse_ptr = LSE + (batch * KV_HEADS * RATIO + head0).to(tl.int64) * padded
    for i in tl.range(0, RATIO * masked, num_stages=STAGES):
        head = i // masked
        tile = i - head * masked
        tile = tl.where(tile < diagonal, start + tile, whole)
        sums = _column_sums(
            sums, k, k_rows, Q, lse_ptr + head * padded, batch, head0 + head, tile, rows, scale2, DP, KEYS, QUERIES,
            STRIDE, True, OPERAND, PRECISION,
        )  # fmt: skip
    # One loop over all heads, so that loads run ahead across them; from the last queries, which all programs read at
    # about the same time, so that they come from the cache.
    head = 0
    tile = whole - 1
    for _ in tl.range(0, RATIO * tl.maximum(whole - low, 0), num_stages=STAGES):
        sums = _column_sums(
            sums, k, k_rows, Q, lse_ptr + head * padded, batch, head0 + head, tile, rows, scale2, DP, KEYS, QUERIES,
            STRIDE, False, OPERAND, PRECISION,
        )  # fmt: skip
        tile -= 1
        head = tl.where(tile < low, head + 1, head)
        tile = tl.where(tile < low, whole - 1, tile)
    total = tl.where(k_rows < length, tl.sum(tl.sum(sums, 1), 0), 0.0)
    tl.store(OUT + pair.to(tl.int64) * seq + k_rows, total, mask=k_rows < seq)


@functools.cache
def _holds_wide_tiles(device: torch.device) -> bool:
    """Whether a multiprocessor has the shared memory for two wide tiles (Hopper's 228 KiB)."""
    if device.type != "cuda":
        return True
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_multiprocessor", 0) >= 2 * WIDE_BYTES  # ROCm says nothing


def _described(q: Tensor, queries: int, padded_dim: int) -> TensorDescriptor:
    """For bulk loads, which need strides of 16 bytes."""
    if q.data_ptr() % 16 or q.stride(-1) != 1 or any(n * q.element_size() % 16 for n in q.stride()[:-1]):
        q = q.clone(memory_format=torch.contiguous_format)
    return TensorDescriptor(q, list(q.shape), list(q.stride()), [1, 1, queries, padded_dim])


def column_scores_triton(
    q: Tensor, k: Tensor, lse: Tensor, scale: float, lengths: Tensor | None = None, last: int | None = None,
    stride: int = 1, tuning: ScoresTuning | None = None,
) -> Tensor:  # fmt: skip
    """`column_scores` as two Triton kernels."""
    check_dtype(q, k)
    check_head_dim(q.shape[-1])
    batch, heads, seq, dim = q.shape
    kv_heads = k.shape[1]
    k, lse = unit_last(k), unit_last(lse)
    padded_dim = triton.next_power_of_2(dim)
    if tuning is None:  # of the last queries there are a few tiles only: nothing to gain by wide ones
        wide = last is None and _holds_wide_tiles(q.device)
        tuning = scores_tuning(padded_dim, q.element_size(), batch * kv_heads * seq if wide else 0)
    counted = lse if lengths is None else lengths
    kinds = {"STRIDE": stride, "HAS_LENGTHS": lengths is not None, "HAS_LAST": last is not None}
    padded = triton.cdiv(seq // stride, tuning.queries) * tuning.queries
    base2 = torch.empty(batch, heads, padded, dtype=torch.float32, device=q.device)
    _prepare_kernel[triton.cdiv(padded, 1024), batch * heads](
        lse, counted, base2, *lse.stride()[:2], seq, last or 0, padded, HEADS=heads, SHIFT=math.log2(stride), ROWS=1024,
        **kinds,
    )  # fmt: skip
    out = torch.empty(batch, kv_heads, seq, dtype=torch.float32, device=q.device)
    _column_scores_kernel[triton.cdiv(seq, tuning.columns) * batch * kv_heads,](
        _described(q[:, :, stride - 1 :: stride], tuning.queries, padded_dim), k, base2, counted, out, *k.stride()[:3],
        seq, last or 0, padded, scale, batch * kv_heads, KV_HEADS=kv_heads, RATIO=heads // kv_heads, D=dim,
        DP=padded_dim, KEYS=tuning.columns, QUERIES=tuning.queries, OPERAND=operand_dtype(q.dtype),
        PRECISION=dot_precision(q.dtype), STAGES=tuning.stages, num_warps=tuning.warps, **kinds,
    )  # fmt: skip
    return out


def column_scores(
    q: Tensor, k: Tensor, lse: Tensor | None, scale: float, lengths: Tensor | None = None, last: int | None = None,
    stride: int = 1,
) -> Tensor:  # fmt: skip
    """The second pass of a two-pass prefill: only q @ k^T is computed again, the softmax is known from `lse`.

    Args:
        q: [batch, heads, seq, head_dim]; k: [batch, kv_heads, seq, head_dim]; fp16, bf16 or fp32, any strides.
        lse: fp32 [batch, heads, seq], natural log-sum-exp of each query's logits, from the attention kernel; None on a
            CPU.
        scale: of the logits.
        lengths, last, stride: see `column_scores_reference`, which needs no `lse`.

    Returns:
        fp32 [batch, kv_heads, seq].
    """
    if not q.is_cuda:
        return column_scores_reference(q, k, scale, lengths, last, stride)
    return column_scores_triton(q, k, lse, scale, lengths, last, stride)
