"""The packed format and `PackedInt`."""

import copy
import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minikv_compile import PackedInt
from minikv_compile.kernels.packing import (
    BLOCK,
    dequantize,
    metadata,
    pack,
    quantize,
    unpack,
    value_group,
    words,
)

BITS = st.sampled_from([2, 4, 8])
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
LAYOUTS = st.sampled_from(["key", "value"])
DIMS = st.sampled_from([16, 48, 64, 80, 96, 112, 128, 256])
LEAD = st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 3))  # batch, heads, blocks


@given(bits=BITS, layout=LAYOUTS, lead=LEAD, dim=st.one_of(DIMS, st.integers(1, 256)), seed=st.integers(0, 99))
def test_pack_and_unpack(bits, layout, lead, dim, seed):
    codes = torch.randint(0, 2**bits, (*lead, BLOCK, dim), generator=torch.Generator().manual_seed(seed)).int()
    packed = pack(codes, bits, layout)
    assert packed.dtype == torch.int16 and packed.is_contiguous()
    assert packed.numel() * 16 == codes.numel() * bits  # no bit is wasted
    assert packed.shape == ((*lead, words(bits), dim) if layout == "key" else (*lead, dim, words(bits)))
    assert torch.equal(unpack(packed, bits, layout), codes)


def test_words_hold_strided_tokens():
    """What the kernels rely on: slice i of a word is token word + i * words, least significant first."""
    codes = torch.zeros(1, 1, 1, BLOCK, 16, dtype=torch.int32)
    codes[..., 5 + 3 * 16, 7] = 2  # word 5, slice 3
    packed = pack(codes, 2, "key")
    assert packed[0, 0, 0, 5, 7] == 2 << 6 and packed.count_nonzero() == 1
    codes[..., 5 + 7 * 16, 7] = 3  # the topmost slice, in the sign bit
    assert pack(codes, 2, "key")[0, 0, 0, 5, 7].item() & 0xFFFF == (2 << 6) | (3 << 14)
    # Words of values hold strided channels instead: of 16, channel 7 is slice 3 of row 1.
    flat = pack(codes, 2, "value").flatten()
    assert flat[128 + 53] == 2 << 6 and flat[128 + 117] == 3 << 6 and flat.count_nonzero() == 2


@given(group=st.sampled_from([16, 32, 64, 128]), dim=st.integers(1, 32).map(lambda n: 16 * n))
def test_value_group_divides_and_is_the_largest(group, dim):
    chosen = value_group(group, dim)
    assert dim % chosen == 0 and chosen <= group and chosen & (chosen - 1) == 0
    assert 2 * chosen > group or dim % (2 * chosen)


def random(shape, dtype, kind, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    if kind == "offset":
        x = x + 100 * torch.randn(*shape[:-2], 1, shape[-1], generator=generator)
    elif kind == "outliers":
        x = x * 10 ** (3 * torch.rand(*shape[:-2], 1, shape[-1], generator=generator))
    elif kind == "tiny":
        x = x * 1e-4
    return x.to(dtype)


def in_groups(x, group, axis):
    """[..., tokens, channels] -> groups last."""
    return x.unflatten(-2, (-1, group)).movedim(-2, -1) if axis == "token" else x.unflatten(-1, (-1, group))


@given(
    bits=BITS, group=st.sampled_from([16, 32, 64, 128]), axis=st.sampled_from(["token", "channel"]), layout=LAYOUTS,
    dtype=st.sampled_from(DTYPES), lead=LEAD, dim=DIMS, kind=st.sampled_from(["normal", "offset", "outliers", "tiny"]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_error_is_half_a_step_and_the_rounding_of_metadata(bits, group, axis, layout, dtype, lead, dim, kind, seed):
    group = group if axis == "token" else value_group(group, dim)
    x = random((lead[0], lead[1], lead[2] * BLOCK, dim), dtype, kind, seed)
    packed = PackedInt.from_dense(x, bits, group, axis, layout)
    assert packed.shape == x.shape and packed.dtype == dtype
    values, back = (in_groups(t.double(), group, axis) for t in (x, packed.dequantize()))
    low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    # Scale and zero are stored in 16 bits; the result is rounded to the dtype of x. Below the smallest normal number
    # rounding is absolute.
    meta = torch.finfo(torch.float16)
    tiny = meta.tiny * meta.eps * 2**bits
    rounding = meta.eps / 2 * low.abs() + meta.eps / 2 * (high - low) + tiny
    # A zero that was rounded up leaves the lowest value below code 0, a scale that was rounded down the highest above
    # the last code: then the distance is the rounding alone; else half a (rounded) step.
    bound = step * (1 + meta.eps) / 2 + rounding
    bound = bound + torch.finfo(dtype).eps * torch.maximum(low.abs(), high.abs()) + tiny
    error = (values - back).abs()
    assert (error <= bound).all(), (error - bound).max()


@given(
    bits=st.sampled_from([2, 4]), group=st.sampled_from([16, 32, 64, 128]), axis=st.sampled_from(["token", "channel"]),
    dtype=st.sampled_from(DTYPES), kind=st.sampled_from(["normal", "offset", "outliers", "tiny"]), seed=st.integers(0, 99),
)  # fmt: skip
def test_error_with_eight_bits_of_metadata(bits, group, axis, dtype, kind, seed):
    """Half a step and half a part of it; and what a scale that was rounded down, by a 17th at most, leaves outside."""
    x = random((1, 2, 2 * BLOCK, 128), dtype, kind, seed)
    packed = PackedInt.from_dense(x, bits, group, axis, "key", metadata_bits=8)
    assert packed.scale.dtype == packed.zero.dtype == torch.uint8
    values, back = (in_groups(t.double(), group, axis) for t in (x, packed.dequantize()))
    low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
    top, parts = 2**bits - 1, {2: 8, 4: 2}[bits]
    step = torch.maximum((high - low) / top, low.abs() / (119 / parts))
    below_normal = 2**-18 * (119 / parts + top)
    bound = step * 17 / 16 / 2 * (1 + 1 / parts) + top * step / 17 + below_normal
    bound = bound + torch.finfo(dtype).eps * torch.maximum(low.abs(), high.abs())
    error = (values - back).abs()
    assert (error <= bound).all(), (error - bound).max()
    # No other code is nearer.
    codes, stored = unpack(packed.codes, bits, "key"), (packed.scale, packed.zero, bits, group, axis)
    chosen, x = (x.float() - dequantize(codes, *stored).flatten(2, 3)).abs(), x.float()
    for step in (-1, 1):
        other = (x - dequantize((codes + step).clamp(0, top), *stored).flatten(2, 3)).abs()
        assert (chosen <= other + 1e-6 * (1 + x.abs())).all()


def test_the_bytes_of_metadata():
    """A scale of 1.3 is stored as 1.25, a zero of -0.9 as seven eighths of a step less than none."""
    x = torch.linspace(-0.9, 3.0, BLOCK).repeat(16, 1).T[None, None].contiguous()
    packed = PackedInt.from_dense(x, 2, BLOCK, "token", "key", metadata_bits=8)
    assert (packed.scale == 0b01111_010).all()  # 2**0 * 1.25
    assert (packed.zero == 128 - 6).all()  # -0.9 / 1.25 * 8 = -5.76
    assert sorted(packed.dequantize().unique().tolist()) == [-0.9375, 0.3125, 1.5625, 2.8125]


def test_eight_bit_codes_keep_sixteen_bits_of_metadata():
    assert PackedInt.from_dense(torch.randn(1, 1, BLOCK, 32), 8, 32, "channel", "value", 8).scale.dtype == torch.float16


@given(
    value=st.one_of(st.floats(-60000, 60000, width=16), st.sampled_from([0.0, -0.0, 1e-7, 65504.0])), bits=BITS,
    dtype=st.sampled_from(DTYPES), axis=st.sampled_from(["token", "channel"]),
)  # fmt: skip
def test_constant_groups_give_their_constant_back(value, bits, dtype, axis):
    x = torch.full((1, 1, BLOCK, 32), value, dtype=dtype)
    back = PackedInt.from_dense(x, bits, 32, axis, "key").dequantize()
    assert torch.equal(back, x.float().clamp(-65504, 65504).half().to(dtype))


@pytest.mark.parametrize("axis", ["token", "channel"])
@pytest.mark.parametrize("bits", [2, 4])
def test_the_end_of_the_range_with_eight_bits_of_metadata(axis, bits):
    """Of fp16, and beyond it, where bf16 values saturate: what comes back is finite, and no further away than they are."""
    for dtype, top in ((torch.float16, 65504.0), (torch.bfloat16, 1e5), (torch.bfloat16, 3e38)):
        x = torch.randn(1, 2, BLOCK, 64).clamp(-3, 3).div(3.0).mul(top).to(dtype)
        x[..., ::3, ::2], x[..., 1::3, ::2] = top, -top
        back = PackedInt.from_dense(x, bits, 64, axis, "value", metadata_bits=8).dequantize()
        assert metadata(*quantize(x[:, :, None], bits, 64, axis, metadata_bits=8)[1:], bits)[1].half().isfinite().all()
        assert back.isfinite().all() and (back.float().sign() * x.float().sign() >= 0)[x.abs() > top / 2].all()
        if dtype == torch.float16:
            error = (back.double() - x.double()).abs()
            assert error.max() <= 2 * top / (2**bits - 1) * (0.5 * 17 / 16 * 1.5) + 2 * top / 17


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", ["token", "channel"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_values_at_the_end_of_the_range(dtype, axis, bits):
    """high - low overflows the dtype; codes, metadata and what comes back stay finite, beyond the range of fp16, too, where
    they saturate: no value that comes back is larger than it was."""
    top = torch.finfo(dtype).max
    x = torch.randn(1, 2, BLOCK, 64).clamp(-3, 3).div(3.0).mul(top).to(dtype)
    x[..., ::3, ::2], x[..., 1::3, ::2] = top, -top
    packed = PackedInt.from_dense(x, bits, 64, axis, "value")
    assert packed.scale.isfinite().all() and packed.zero.isfinite().all()
    back = packed.dequantize()
    if dtype == torch.float16:
        error = (back.double() - x.double()).abs()
        assert error.max() <= 2 * top / (2**bits - 1) * (0.5 + 2**-6) + 2 * top * 2**-7
    else:
        large = x.abs() > top / 2
        assert back.isfinite().all() and (back.sign() == x.sign())[large].all() and (back.abs() <= x.abs())[large].all()
        assert (back[large].abs() >= 65504).all()


@pytest.mark.parametrize("axis", ["token", "channel"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("bits", [2, 8])
def test_values_that_are_not_finite_disturb_no_others(axis, bad, bits):
    x = torch.randn(1, 2, BLOCK, 64)
    spoilt = x.clone()
    spoilt[0, 1, 17, 5] = bad
    spoilt[0, 0, 40] = bad  # a whole token
    packed, reference = (PackedInt.from_dense(t, bits, 32, axis, "key") for t in (spoilt, x))
    back = packed.dequantize()
    assert back.isfinite().all()
    changed = in_groups((spoilt != x), 32, axis)
    groups = changed.any(-1, keepdim=True).expand_as(changed)
    # Groups without a bad value have the same bits; the others obey the bound of what is finite in them.
    assert torch.equal(in_groups(back, 32, axis)[~groups], in_groups(reference.dequantize(), 32, axis)[~groups])
    values = in_groups(spoilt, 32, axis)
    finite = values.isfinite()
    low = torch.where(finite, values, torch.inf).amin(-1, keepdim=True)
    high = torch.where(finite, values, -torch.inf).amax(-1, keepdim=True)
    error = (in_groups(back, 32, axis) - values).abs()
    bound = ((high - low) / (2**bits - 1) * 0.51 + (high.abs() + low.abs()) * 2**-7).expand_as(error)
    assert (error[finite] <= bound[finite]).all()


@given(
    bits=BITS, group=st.sampled_from([16, 64, 128]), axis=st.sampled_from(["token", "channel"]),
    clip=st.floats(0.2, 1), seed=st.integers(0, 99),
)  # fmt: skip
def test_a_clipped_range(bits, group, axis, clip, seed):
    """Codes span the middle of a group's range; what lies outside takes the nearest end."""
    x = random((1, 1, 2, BLOCK, 128), torch.float32, "normal", seed)
    codes, scale, zero = quantize(x, bits, group, axis, clip)
    values, back = (in_groups(t, group, axis) for t in (x, dequantize(codes, scale, zero, bits, group, axis)))
    low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
    middle, half = (low + high) / 2, (high - low) / 2 * clip
    nearest = values.clamp(middle - half, middle + half)
    bound = 2 * half / (2**bits - 1) / 2 + (half + middle.abs()) * 2**-7
    assert ((back - nearest).abs() <= bound).all()


def test_codes_are_fitted_to_metadata_as_stored():
    """A zero of 1000.3 is stored as 1000.5 in fp16: codes that were fitted to 1000.3 would all be a fifth of a unit off."""
    x = 1000.3 + torch.arange(BLOCK).float()[:, None].expand(-1, 16) / 64
    x = x[None, None].contiguous()
    codes, scale, zero = quantize(x[:, :, None], 8, 128, "token")
    assert (zero.float() - 1000.3).abs().max() > 0.1
    back = dequantize(codes, scale, zero, 8, 128, "token").flatten(2, 3)
    above = x >= zero.max().float()
    assert (back - x)[above].abs().max() < 0.02


# ---- the subclass


def packed_and_dense(**changes):
    x = torch.randn(2, 3, 2 * BLOCK, 48)
    arguments = {"bits": 4, "group": 16, "axis": "channel", "order": "value", **changes}
    return PackedInt.from_dense(x, **arguments), x


@pytest.mark.parametrize(
    "shape, dtype, group, axis, message",
    [
        ((1, 1, 128, 64), torch.float64, 64, "token", "float16, bfloat16 or float32, not torch.float64"),
        ((1, 1, 128, 64), torch.int32, 64, "token", "not torch.int32"),
        ((1, 1, 100, 64), torch.float32, 64, "token", r"multiple of 128 tokens, not \[1, 1, 100, 64\]"),
        ((1, 1, 0, 64), torch.float32, 64, "token", "positive multiple"),
        ((1, 128, 64), torch.float32, 64, "token", r"\[batch, kv_heads, tokens, head_dim\]"),
        ((1, 1, 128, 80), torch.float32, 64, "channel", "group of 64 does not divide 80 channels"),
        ((1, 1, 128, 80), torch.float32, 96, "token", "group of 96 does not divide 128 tokens"),
    ],
)
def test_from_dense_refuses(shape, dtype, group, axis, message):
    with pytest.raises(ValueError, match=message):
        PackedInt.from_dense(torch.zeros(shape, dtype=dtype), 2, group, axis, "key")


def test_repr_and_bytes():
    packed, x = packed_and_dense()
    assert repr(packed) == (
        "PackedInt(shape=[2, 3, 256, 48], bits=4, group=16, axis='channel', dtype=torch.float32, device=cpu)"
    )
    values = x.numel()
    assert packed.nbytes_held == values // 2 + 2 * (values // 16) * 2


@pytest.mark.parametrize(
    "copied",
    [
        torch.clone, copy.deepcopy, lambda t: t.to("cpu", copy=True), lambda t: reload(t, False),
        pytest.param(
            lambda t: reload(t, True)
        ),
    ],
    ids=["clone", "deepcopy", "to", "load", "load weights only"],
)  # fmt: skip
def test_copies_keep_the_type_and_share_nothing(copied):
    packed, _ = packed_and_dense()
    other = copied(packed)
    assert isinstance(other, PackedInt) and repr(other) == repr(packed)
    for name in PackedInt.tensor_data_names:
        assert torch.equal(getattr(other, name), getattr(packed, name))
        assert getattr(other, name).data_ptr() != getattr(packed, name).data_ptr()


def reload(t, weights_only):
    file = io.BytesIO()
    torch.save(t, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


def test_detach_shares_and_to_dtype_is_logical():
    packed, _ = packed_and_dense()
    other = packed.detach()
    assert isinstance(other, PackedInt) and other.codes.data_ptr() == packed.codes.data_ptr()
    half = packed.to(torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half.dequantize() if isinstance(half, PackedInt) else half, packed.dequantize().bfloat16())


def test_any_other_operation_dequantizes():
    packed, x = packed_and_dense()
    dense = packed.dequantize()
    assert torch.equal(packed + 1, dense + 1) and not isinstance(packed + 1, PackedInt)
    assert torch.equal(x - packed, x - dense)
    assert torch.equal(packed @ x.mT, dense @ x.mT)
    assert torch.equal(torch.cat([packed, x], 2), torch.cat([dense, x], 2))
    assert torch.equal(packed[:, :, 3:5], dense[:, :, 3:5])


@pytest.mark.parametrize(
    "write",
    [
        lambda t: t.add_(1),
        lambda t: t.zero_(),
        lambda t: t.copy_(torch.ones(t.shape)),
    ],
    ids=["add_", "zero_", "copy_"],
)
def test_writing_in_place_raises(write):
    packed, _ = packed_and_dense()
    before = packed.dequantize()
    with pytest.raises(RuntimeError, match=r"would write into a PackedInt.*write into \.dequantize\(\)"):
        write(packed)
    assert torch.equal(packed.dequantize(), before)
