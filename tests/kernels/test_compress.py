"""The compress kernel against its reference: metadata bit by bit, codes but for ties."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minikv_compile.kernels.compress import (
    compress_reference,
    compress_triton,
    dense_region_reference,
    dense_region_triton,
)
from minikv_compile.kernels.packing import BLOCK, dequantize, metadata, unpack, value_group
from minikv_compile.rotation import hadamard

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
KINDS = ["normal", "constant", "large", "tiny", "not finite"]


def values(kind, shape, dtype, seed):
    """Random [batch, heads, seq, dim] on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    if kind == "constant":
        x = x[..., :1, :].expand(shape).clone()
    elif kind == "large":
        x = x * torch.finfo(dtype).max / 8
        x[..., ::7, ::5] = torch.finfo(dtype).max
        x[..., 3::7, ::5] = -torch.finfo(dtype).max
    elif kind == "tiny":
        x = x * torch.finfo(dtype).tiny * 4
    elif kind == "not finite":
        x[torch.rand(shape, generator=generator) < 0.1] = torch.nan
        x[torch.rand(shape, generator=generator) < 0.1] = torch.inf
        x[torch.rand(shape, generator=generator) < 0.1] = -torch.inf
    return x.to(dtype)


def assert_same_codes(actual, expected, bits, layout, most):
    """Codes differ by at most one, in at most a fraction `most` of the places: where a value lies between two codes."""
    difference = (unpack(actual, bits, layout) - unpack(expected, bits, layout)).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() <= most


def counters(x, device):
    return tuple(torch.zeros(n, dtype=torch.int32, device=device) for n in ((x.shape[0], x.shape[2]), x.shape[0]))


def check(device, x, index, start, tokens, blocks, bits, group, axis, layout, rotation, balancer=None, metadata_bits=16):
    counted, counted_reference = counters(x, device), counters(x, "cpu")
    expected = compress_reference(
        x, index, start, tokens, blocks, bits, group, axis, layout, rotation, counted=counted_reference, balancer=balancer,
        metadata_bits=metadata_bits,
    )  # fmt: skip
    index, start, tokens, rotation, balancer = (
        t.to(device) if isinstance(t, torch.Tensor) else t for t in (index, start, tokens, rotation, balancer)
    )
    actual = compress_triton(
        x.to(device), index, start, tokens, blocks, bits, group, axis, layout, rotation, counted=counted, balancer=balancer,
        metadata_bits=metadata_bits,
    )  # fmt: skip
    for ours, theirs in zip(counted, counted_reference, strict=True):
        assert torch.equal(ours.cpu(), theirs)
    codes, scale, zero = (t.cpu() for t in actual)
    assert codes.shape == expected[0].shape and scale.dtype == expected[1].dtype
    if rotation is None:
        assert torch.equal(scale, expected[1]) and torch.equal(zero, expected[2])
    elif scale.dtype == torch.uint8:
        # Here and there a rotated value that was rounded the other way changes a byte, and with it a group's codes.
        for ours, theirs in ((scale, expected[1]), (zero, expected[2])):
            away = (ours.int() - theirs.int()).abs()
            assert (away > 0).float().mean() <= 0.05 and away.max() <= (1 if theirs is expected[1] else 128)
        ours, theirs = (dequantize(unpack(t[0], bits, layout), *t[1:], bits, group, axis) for t in ((codes, scale, zero), expected))
        step = metadata(*expected[1:], bits)[0].max()
        assert (ours - theirs).abs().max() <= step * 1.1 and (ours != theirs).float().mean() <= 0.07
        return
    else:
        # One step of the dtype of x at the size of a value, where the rotated value was rounded the other way.
        step = max(torch.finfo(x.dtype).eps, torch.finfo(scale.dtype).eps) * 2
        torch.testing.assert_close(scale, expected[1], rtol=step, atol=step * 2)
        torch.testing.assert_close(zero, expected[2], rtol=step, atol=step)
    assert_same_codes(codes, expected[0], bits, layout, most=1e-3 if rotation is None else 2e-2)


@settings(max_examples=40)
@given(
    dim=st.sampled_from([64, 80, 96, 128, 256]),
    dtype=st.sampled_from(DTYPES),
    bits=st.sampled_from([2, 4, 8]),
    group=st.sampled_from([16, 32, 64, 128]),
    metadata_bits=st.sampled_from([8, 16]),
    axis=st.sampled_from(["token", "channel"]),
    layout=st.sampled_from(["key", "value"]),
    filled=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    start=st.integers(0, 5),
    kind=st.sampled_from(KINDS),
    rotate=st.booleans(),
    gather=st.booleans(),
    seed=st.integers(0, 9),
)
def test_matches_reference(
    device, dim, dtype, bits, group, metadata_bits, axis, layout, filled, start, kind, rotate, gather, seed
):  # fmt: skip
    rotate = rotate and kind in ("normal", "constant")
    group = group if axis == "token" else value_group(group, dim)
    seq = 2 * BLOCK + 5
    x = values(kind, (2, 1, seq, dim), dtype, seed)
    index = torch.stack([torch.randperm(seq), torch.randperm(seq)])[:, None] if gather else None
    tokens = torch.tensor(filled, dtype=torch.int32) * BLOCK
    rotation = hadamard(dim) if rotate else None
    check(device, x, index, start, tokens, 2, bits, group, axis, layout, rotation, metadata_bits=metadata_bits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("axis, dim", [("channel", 80), ("token", 64)])
def test_balanced_keys_from_where_each_row_starts(device, axis, dim, rotate, dtype):
    x = values("normal", (2, 2, 2 * BLOCK + 5, dim), dtype, 3)
    start, tokens = torch.tensor([5, 2], dtype=torch.int32), torch.tensor([2, 1], dtype=torch.int32) * BLOCK
    balancer = torch.rand(2, 2, dim, generator=torch.Generator().manual_seed(0)) * 3 + 0.1
    check(device, x, None, start, tokens, 2, 2, 16, axis, "key", hadamard(dim) if rotate else None, balancer)
    # And it is the keys' product that is packed.
    moved = torch.stack([row[:, first : first + 2 * BLOCK] for row, first in zip(x, start.tolist(), strict=True)])
    multiplied = (moved.float() * balancer[:, :, None]).to(dtype)
    rotation = hadamard(dim) if rotate else None
    ours = compress_reference(x, None, start, tokens, 2, 2, 16, axis, "key", rotation, balancer=balancer)
    plain = compress_reference(multiplied, None, 0, tokens, 2, 2, 16, axis, "key", rotation)
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


def test_strided_heads(device):
    x = values("normal", (2, 140, 3, 64), torch.bfloat16, 0).transpose(1, 2)
    tokens = torch.full((2,), BLOCK, dtype=torch.int32)
    check(device, x, None, 4, tokens, 1, 2, 64, "token", "key", None)


def test_refuses_rotations_that_are_no_signs(device):
    x = torch.zeros(1, 1, BLOCK, 64, device=device)
    tokens = torch.full((1,), BLOCK, dtype=torch.int32, device=device)
    rotation = torch.linalg.qr(torch.randn(64, 64))[0].to(device)
    with pytest.raises(ValueError, match="Hadamard"):
        compress_triton(x, None, 0, tokens, 1, 2, 64, "token", "key", rotation)


@pytest.mark.parametrize("gather", [False, True])
def test_dense_region(device, gather):
    """Sinks and the tokens after the packed ones; of two heads with NaN in one token, it counts once."""
    x = values("normal", (2, 3, 300, 80), torch.bfloat16, 0)
    x[0, :2, 1, 3], x[0, 0, 290], x[1, 0, 200] = torch.nan, torch.inf, torch.nan  # the last one is packed
    index = torch.stack([torch.arange(300).roll(7 * i) for i in range(6)]).view(2, 3, 300) if gather else None
    tokens, used = torch.tensor([128, 256], dtype=torch.int32), torch.tensor([172, 30], dtype=torch.int32)
    ours, theirs = counters(x, device), counters(x, "cpu")
    expected = dense_region_reference(x, index, 4, tokens, used, 180, theirs)
    on_device = [t if t is None else t.to(device) for t in (x, index, tokens, used)]
    actual = dense_region_triton(*on_device[:2], 4, *on_device[2:], 180, ours)
    torch.testing.assert_close(actual.cpu(), expected, rtol=0, atol=0, equal_nan=True)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(ours, theirs, strict=True))
    assert gather or theirs[1].tolist() == [2, 0]
