"""The first launch of attention: the new tokens are appended, queries balanced, rotated and normalised."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from .attention import _row_offset
from .jit import LOG2E, exp2i, exponent, round_to, to_fp32
from .state import STATE_COLUMNS

LEAST = tl.constexpr(-100)
"""A query's exponent is taken as at least this."""


@triton.jit(do_not_specialize=["batch", "rotated", "length"])
def _prepare_kernel(
    Q, K_NEW, V_NEW, K_DENSE, V_DENSE, STATE, ROTATION, BALANCER, Q_OUT, FACTOR, batch, rotated, length, scale,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_kdb, stride_kdh, stride_kds, stride_vdb, stride_vdh, stride_vds,
    KV_HEADS: tl.constexpr, RATIO: tl.constexpr, NEW: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ROTATE: tl.constexpr, BALANCE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program: COLUMNS channels of ROWS rows; of q in the first `rotated` programs, then of the new K and V.

    Q_OUT [rows, DP]: q over BALANCER [batch, KV_HEADS, D], rotated, times a power of two that makes it at most 1.
    FACTOR fp32 [rows]: what turns its products with keys into logits to the base of 2.
    """
    if PDL:
        gdc_launch_dependents()
    channel = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    program = tl.program_id(0)
    if program < rotated:
        row = program * ROWS + tl.arange(0, ROWS)
        real = row < batch * (KV_HEADS * RATIO * NEW)
        q_ptr = Q + _row_offset(row, KV_HEADS * RATIO, NEW, stride_qb, stride_qh, stride_qn)
        inner = tl.arange(0, DP)
        q = to_fp32(tl.load(q_ptr[:, None] + inner[None, :], mask=real[:, None] & (inner < D)[None, :], other=0.0))
        if BALANCE:
            balancer_ptr = BALANCER + (row // (RATIO * NEW)).to(tl.int64)[:, None] * D
            q /= tl.load(balancer_ptr + inner[None, :], mask=real[:, None] & (inner < D)[None, :], other=1.0)
        # |q R| <= |q|_2 <= sqrt(DP) max |q|.
        bound = exponent(tl.max(tl.abs(q), 1)) + 1
        if ROTATE:
            bound += (exponent(tl.full([ROWS], DP, tl.float32)) + 1) // 2
        bound = tl.minimum(tl.maximum(bound, LEAST), 126)
        if ROTATE:
            columns = ROTATION + inner[:, None] * D + channel[None, :]
            matrix = tl.load(columns, mask=(inner < D)[:, None] & (channel < D)[None, :], other=0.0)
            q = tl.dot(q * exp2i(-bound)[:, None], matrix, input_precision="tf32x3")
        else:
            q = tl.load(q_ptr[:, None] + channel[None, :], mask=real[:, None] & (channel < D)[None, :], other=0.0)
            q = to_fp32(q)
            if BALANCE:
                q /= tl.load(balancer_ptr + channel[None, :], mask=real[:, None] & (channel < D)[None, :], other=1.0)
            q *= exp2i(-bound)[:, None]
        target = Q_OUT + row.to(tl.int64)[:, None] * DP + channel[None, :]
        tl.store(target, round_to(q, Q_OUT.dtype.element_ty), mask=real[:, None])
        if tl.program_id(1) == 0:
            tl.store(FACTOR + row, exp2i(bound) * (scale * LOG2E), mask=real)
    else:
        row = (program - rotated) * ROWS + tl.arange(0, ROWS)
        real = row < batch * (KV_HEADS * NEW)
        mask = real[:, None] & (channel < D)[None, :]
        # From each row's first new token to its slot.
        shift = length - NEW - tl.load(STATE + row // (KV_HEADS * NEW) * STATE_COLUMNS, mask=real, other=0).to(tl.int64)
        k_ptr = K_NEW + _row_offset(row, KV_HEADS, NEW, stride_kb, stride_kh, stride_kn)
        v_ptr = V_NEW + _row_offset(row, KV_HEADS, NEW, stride_vb, stride_vh, stride_vn)
        k = tl.load(k_ptr[:, None] + channel[None, :], mask=mask)
        v = tl.load(v_ptr[:, None] + channel[None, :], mask=mask)
        k_ptr = K_DENSE + _row_offset(row, KV_HEADS, NEW, stride_kdb, stride_kdh, stride_kds) + shift * stride_kds
        v_ptr = V_DENSE + _row_offset(row, KV_HEADS, NEW, stride_vdb, stride_vdh, stride_vds) + shift * stride_vds
        tl.store(k_ptr[:, None] + channel[None, :], k, mask=mask)
        tl.store(v_ptr[:, None] + channel[None, :], v, mask=mask)
