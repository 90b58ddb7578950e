"""Every kernel against float64 or its reference."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import _path  # noqa: F401
import torch
import triton
import triton.language as tl
from kernel_cases import Case, tensors, tuning_of

from minikv_compile.kernels.attend import attend_triton
from minikv_compile.kernels.compress import compress_reference, compress_triton
from minikv_compile.kernels.jit import CODE_EXPONENT, code_position, codes_at
from minikv_compile.kernels.packing import BLOCK, MOST_NOISE, dequantize, metadata, unpack, value_group
from minikv_compile.kernels.prefill import causal_attention_lse
from minikv_compile.kernels.scores import column_scores_reference, column_scores_triton
from minikv_compile.kernels.tuning import MANY_KEYS, scores_tuning
from minikv_compile.rotation import hadamard

TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float32: 4e-5}
"""Of attention. fp32: operands have 22 bits, tensor cores truncate sums, and the sums over codes and over zeros, each
far larger than the output, nearly cancel; 1.8e-5 was measured."""


def exact(arguments: list) -> torch.Tensor:
    """What `attend_triton` computes, in float64; its dense regions hold the new tokens already."""
    q, _, _, k_tier, v_tier, k_dense, v_dense, state, length, scale, bits, *rest = arguments
    k_group, k_axis, v_group, rotation, _, _, noise = rest
    batch, heads, n, dim = q.shape
    ratio = heads // k_dense.shape[1]
    out = torch.empty(q.shape, dtype=torch.float64, device=q.device)
    matrix = torch.eye(dim) if rotation is None else rotation
    matrix = matrix.to(q.device, torch.float64)
    for row in range(batch):
        blocks, dense = int(state[row, 2]) // BLOCK, length - int(state[row, 0])

        def values(tier, layout, group, axis, row=row, blocks=blocks):
            codes, *stored = (t[row, :, :blocks] for t in tier)
            scales, zeros = metadata(*stored, bits)
            if axis == "channel":
                scales, zeros = scales.mT, zeros.mT
            dim_of_group = -2 if axis == "token" else -1
            scales, zeros = (t.double().repeat_interleave(group, dim_of_group) for t in (scales, zeros))
            return (unpack(codes, bits, layout) * scales + zeros).flatten(1, 2) @ matrix.T, scales.flatten(1, 2)

        keys, steps = values(k_tier, "key", k_group, k_axis)
        k = torch.cat([keys, k_dense[row, :, :dense].double()], 1)
        v = torch.cat([values(v_tier, "value", v_group, "channel")[0], v_dense[row, :, :dense].double()], 1)
        k, v, steps = (x.repeat_interleave(ratio, 0) for x in (k, v, steps))
        logits = q[row].double() @ k.mT * scale
        if k_axis == "token":
            noises = noise * scale**2 * ((q[row].double() @ matrix) ** 2 @ steps.mT**2)
            logits[..., : steps.shape[1]] -= noises.clamp(max=MOST_NOISE)
        later = torch.arange(k.shape[1], device=q.device) > k.shape[1] - n + torch.arange(n, device=q.device)[:, None]
        out[row] = logits.masked_fill(later, -torch.inf).softmax(-1) @ v
    return out


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Of the norms; NaN counts as infinite."""
    error = float((actual.double() - expected).norm() / expected.norm())
    return math.inf if math.isnan(error) else error


def poison(device: torch.device) -> None:
    """Fill the memory that the next allocations get with NaN."""
    kept = [torch.full((n,), torch.nan, device=device) for n in (2**26, *[2**17] * 16)] if device.type == "cuda" else []
    del kept


def check_attend(case: Case, seed: int, device: torch.device) -> dict:
    """Error of one small step, and whether a second run gives the same bits."""
    small = replace(case, batch=3, length=4 * BLOCK + 100, dense=100, ragged=True) if not case.ragged else case
    arguments = tensors(small, device, seed)
    poison(device)
    out = attend_triton(*arguments, tuning=tuning_of(case))
    same = torch.equal(out, attend_triton(*arguments, tuning=tuning_of(case)))
    error = relative_error(out, exact(arguments))
    tolerance = TOLERANCE[case.dtype]
    what = f"{case.name}{' ' + case.variant if case.variant else ''} {case.heads}/{case.kv_heads} D{case.dim}"
    what += f" {case.bits} bit, metadata {case.metadata_bits}, g{case.k_group}/{case.v_group} {case.k_axis} n{case.new}"
    what += f" {str(case.dtype)[6:]}"
    return dict(what=f"attend {what}", error=error, limit=tolerance, ok=error <= tolerance and same, repeats=same)


@triton.jit
def _codes_kernel(WORDS, X, OUT, POSITION: tl.constexpr, BITS: tl.constexpr):
    row, inner, column = tl.arange(0, 16), tl.arange(0, 32), tl.arange(0, 8)
    codes = codes_at(tl.load(WORDS + row[:, None] * 32 + inner[None, :]), POSITION, BITS)
    out = tl.dot(codes, tl.load(X + inner[:, None] * 8 + column[None, :]))
    tl.store(OUT + row[:, None] * 8 + column[None, :], out)


def check_codes(device: torch.device) -> dict:
    """Codes are fp16 subnormal numbers: products with integers must be exact."""
    wrong = 0
    for bits in (2, 4, 8):
        for position in range(0, 16, bits):
            packed = torch.randint(-(2**15), 2**15, (16, 32), device=device, dtype=torch.int16)
            x = torch.randint(-8, 9, (32, 8), device=device).half()
            out = torch.full((16, 8), torch.nan, device=device)
            _codes_kernel[(1,)](packed, x, out, POSITION=position, BITS=bits, num_warps=1)
            expected = ((packed.int() >> position) & (2**bits - 1)).double() @ x.double()
            # Functions for constants: plain ones outside of a kernel.
            unit = 2.0 ** (int(CODE_EXPONENT.value) - int(code_position(position, bits)))
            wrong += int((out.double() * unit != expected).sum())
    return dict(what="codes as subnormal operands: values that differ", error=wrong, limit=0, ok=wrong == 0)


def check_compress(
    dim: int, dtype: torch.dtype, bits: int, group: int, metadata_bits: int, device: torch.device
) -> list[dict]:
    """Relative error of dequantized values against the reference's, keys and values, gathered and rotated."""
    rows = []
    torch.manual_seed(1)
    seq, blocks = 700, 4
    x = torch.randn(2, 2, seq, dim).to(dtype)
    index = torch.stack([torch.randperm(seq) for _ in range(4)]).view(2, 2, seq)
    tokens = torch.tensor([blocks * BLOCK, 2 * BLOCK], dtype=torch.int32)
    v_group = value_group(group, dim)
    for layout, axis, g in (("key", "token", group), ("value", "channel", v_group), ("key", "channel", v_group)):
        arguments = (4, tokens, blocks, bits, g, axis, layout, hadamard(dim), 1.0, None, None, metadata_bits)
        moved = [t.to(device) if isinstance(t, torch.Tensor) else t for t in arguments]
        poison(device)
        ours = [t.cpu() for t in compress_triton(x.to(device), index.to(device), *moved)]
        theirs = compress_reference(x, index, *arguments)
        (a, b) = (dequantize(unpack(p[0], bits, layout), p[1], p[2], bits, g, axis).double() for p in (ours, theirs))
        error, limit = relative_error(a, b), 3e-2 if bits == 2 else 1e-2  # few codes next to a tie differ by one
        what = f"compress {layout} {axis} D{dim} {bits} bit g{g} metadata {metadata_bits} {str(dtype)[6:]}"
        rows.append(dict(what=what, error=error, limit=limit, ok=error <= limit))
    return rows


def check_scores(dim: int, dtype: torch.dtype, last: int | None, device: torch.device) -> list[dict]:
    """Output, log-sum-exp and column sums of a prefill."""
    torch.manual_seed(2)
    seq, scale = 700, dim**-0.5
    q, k, v = (torch.randn(2, h, seq, dim, device=device).to(dtype) for h in (8, 2, 2))
    keys, values = (x.double().repeat_interleave(4, 1) for x in (k, v))
    later = torch.ones(seq, seq, dtype=torch.bool, device=device).triu(1)
    logits = (q.double() @ keys.mT * scale).masked_fill(later, -torch.inf)
    what, rows = f"D{dim} {str(dtype)[6:]}", []
    lse = logits.logsumexp(-1)
    if device.type == "cuda":
        out, lse = causal_attention_lse(q, k, v, scale)
        first_pass = (("output", out, logits.softmax(-1) @ values), ("lse", lse, logits.logsumexp(-1)))
        for name, actual, expected in first_pass:
            assert actual.shape == expected.shape
            error = relative_error(actual, expected)
            rows.append(dict(what=f"prefill {name} {what}", error=error, limit=1e-2, ok=error <= 1e-2))
    lengths = torch.tensor([seq, 401], device=device)
    expected = column_scores_reference(q.double(), k.double(), scale, lengths, last)
    poison(device)
    for tuning in dict.fromkeys(scores_tuning(triton.next_power_of_2(dim), q.element_size(), n) for n in (0, MANY_KEYS)):
        error = relative_error(column_scores_triton(q, k, lse.float(), scale, lengths, last, tuning=tuning), expected)
        what_tiles = f"scores last={last} {what}, {tuning.columns} keys"
        rows.append(dict(what=what_tiles, error=error, limit=2e-3, ok=error <= 2e-3))
    return rows


def run_check(name: str, *arguments) -> list[dict]:
    """One check, in a worker process: so compilations run in parallel, and what they compile is cached for all."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check = dict(attend=check_attend, codes=check_codes, compress=check_compress, scores=check_scores)[name]
    start = time.perf_counter()
    try:
        rows = check(*arguments, device)
    except Exception as error:  # a check that crashes is a failed check
        rows = [dict(what=f"{name} {arguments}", ok=False, error=math.inf, limit=0, failure=repr(error)[:500])]
    rows = rows if isinstance(rows, list) else [rows]
    rows[0]["seconds"] = round(time.perf_counter() - start, 1)
    return rows
