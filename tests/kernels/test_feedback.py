"""Error feedback: codes of keys that make up for each other's errors in what queries see."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minikv_compile import MiniKVConfig
from minikv_compile.feedback import feedback_factors, query_moments
from minikv_compile.kernels.compress import compress_reference, compress_triton
from minikv_compile.kernels.packing import BLOCK, dequantize, unpack, value_group
from minikv_compile.rotation import hadamard

minikv = torch.ops.minikv


def queries(batch, heads, seq, dim, seed=0):
    """Of few directions, as attention's are."""
    generator = torch.Generator().manual_seed(seed)
    few = torch.randn(batch, heads, seq, dim // 8, generator=generator) @ torch.randn(dim // 8, dim, generator=generator)
    return few + 0.3 * torch.randn(batch, heads, seq, dim, generator=generator)


def packed(x, factors, rotation=None, bits=2, group=128, axis="token", run=compress_reference, **more):
    """`x` [batch, heads, seq, dim], all of it in blocks."""
    batch, _, seq, _ = x.shape
    tokens = torch.full((batch,), seq, dtype=torch.int32, device=x.device)
    return run(x, more.pop("index", None), 0, tokens, seq // BLOCK, bits, group, axis, "key", rotation, factors=factors, **more)


def read(tier, bits, group, axis):
    codes, scale, zero = tier
    return dequantize(unpack(codes, bits, "key"), scale, zero, bits, group, axis).flatten(2, 3)


def logit_error(x, tier, q, rotation, bits=2, group=128, axis="token"):
    """Mean square of the error of logits."""
    if rotation is not None:
        x, q = x @ rotation, q @ rotation
    q = q.unflatten(1, (x.shape[1], -1)).flatten(2, 3)
    return ((read(tier, bits, group, axis) - x) @ q.mT).square().mean().item()


@pytest.mark.parametrize("rotation", [None, hadamard(64)], ids=["plain", "hadamard"])
@pytest.mark.parametrize("bits, group, axis", [(2, 128, "token"), (2, 16, "token"), (4, 64, "token"), (2, 32, "channel")])
def test_logits_are_closer_to_those_of_the_keys(bits, group, axis, rotation):
    q, x = queries(2, 4, 300, 64), torch.randn(2, 2, 2 * BLOCK, 64, generator=torch.Generator().manual_seed(1))
    factors = feedback_factors(query_moments(q, x, None, None), rotation, None)
    plain, fed = (packed(x, f, rotation, bits, group, axis) for f in (None, factors))
    assert all(torch.equal(a, b) for a, b in zip(plain[1:], fed[1:], strict=True))  # the same scales and zeros
    error = [logit_error(x, tier, q, rotation, bits, group, axis) for tier in (plain, fed)]
    assert error[1] < 0.5 * error[0]


def test_without_correlation_it_rounds_to_nearest():
    x = torch.randn(1, 2, BLOCK, 32, generator=torch.Generator().manual_seed(0))
    factors = feedback_factors(torch.eye(32).expand(1, 2, 32, 32), None, None)
    assert torch.equal(packed(x, factors)[0], packed(x, None)[0])


@pytest.mark.parametrize("moments", [torch.full((1, 1, 16, 16), torch.nan), torch.zeros(1, 1, 16, 16)], ids=["nan", "zero"])
def test_moments_without_use_give_no_feedback(moments):
    assert not feedback_factors(moments, None, None).any()


def test_a_token_that_is_not_finite_leaves_others_alone():
    q, x = queries(1, 2, 300, 64), torch.randn(1, 1, BLOCK, 64, generator=torch.Generator().manual_seed(2))
    factors = feedback_factors(query_moments(q, x, None, None), None, None)
    codes = [unpack(packed(y, factors)[0], 2, "key") for y in (x, x.clone().index_fill_(2, torch.tensor([5]), torch.nan))]
    others = torch.arange(BLOCK) != 5
    # The range of a group is that of its finite values: without token 5's, some groups have another one.
    assert (codes[0][..., others, :] == codes[1][..., others, :]).float().mean() > 0.9
    assert not codes[1][..., 5, :].any()


def test_moments_are_of_valid_tokens():
    q, k = torch.randn(2, 4, 20, 16), torch.randn(2, 2, 20, 16)
    valid = torch.arange(20) >= torch.tensor([[0], [13]])
    order, lengths = minikv.align_rows(valid)
    garbage = q.masked_fill(~valid[:, None, :, None], torch.nan)
    moments = query_moments(garbage, k, order, lengths)
    for row, first in enumerate((0, 13)):
        own = q[row, :, first:].unflatten(0, (2, -1)).flatten(1, 2)
        torch.testing.assert_close(moments[row], own.mT @ own / own.shape[1])


def test_moments_that_are_not_positive_definite_give_no_feedback():
    moments = torch.eye(16).expand(1, 2, 16, 16).clone()
    moments[0, 1, 3, 3] = -5.0
    moments[0, 0, 2, 9] = moments[0, 0, 9, 2] = 0.5
    factors = feedback_factors(moments, None, None)
    assert factors[0, 0].any() and not factors[0, 1].any()


def test_blocks_behind_a_rows_tokens_stay_as_they_are(device):
    """Rows that start at different tokens, and hold different numbers of blocks, of a strided tensor."""
    x = torch.randn(2, 400, 2, 96, generator=torch.Generator().manual_seed(3)).transpose(1, 2)
    factors = feedback_factors(query_moments(queries(2, 4, 50, 96), x, None, None), hadamard(96), None)
    start, tokens = torch.tensor([5, 0], dtype=torch.int32), torch.tensor([2, 1], dtype=torch.int32) * BLOCK
    arguments = (3, 2, 128, "token", "key")
    expected = compress_reference(x, None, start, tokens, *arguments, hadamard(96), factors=factors)
    on = [t.to(device) for t in (start, tokens, hadamard(96), factors)]
    actual = compress_triton(x.to(device), None, *on[:2], *arguments, on[2], factors=on[3])
    codes = [unpack(tier[0].cpu(), 2, "key") for tier in (actual, expected)]
    assert (codes[0] == codes[1]).float().mean() > 0.98
    assert not codes[0][0, :, 2:].any() and not codes[0][1, :, 1:].any() and codes[0][1, :, 0].any()


@settings(max_examples=25)
@given(
    dim=st.sampled_from([64, 80, 128]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    bits=st.sampled_from([2, 4]),
    group=st.sampled_from([16, 64, 128]),
    metadata_bits=st.sampled_from([8, 16]),
    axis=st.sampled_from(["token", "channel"]),
    rotate=st.booleans(),
    gather=st.booleans(),
    balance=st.booleans(),
    seed=st.integers(0, 9),
)
def test_kernel_matches_reference(device, dim, dtype, bits, group, metadata_bits, axis, rotate, gather, balance, seed):
    group = group if axis == "token" else value_group(group, dim)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 2, 2 * BLOCK, dim, generator=generator).to(dtype)
    x[0, 0, 3, 5], x[0, 1, 7, 0] = torch.inf, torch.nan
    if rotate:
        x = x.nan_to_num(0.0, 0.0, 0.0)
    more = dict(
        index=torch.stack([torch.randperm(2 * BLOCK, generator=generator) for _ in range(2)])[None] if gather else None,
        balancer=torch.rand(1, 2, dim, generator=generator) + 0.5 if balance else None, metadata_bits=metadata_bits,
    )  # fmt: skip
    rotation, q = hadamard(dim) if rotate else None, queries(1, 4, 100, dim, seed)
    factors = feedback_factors(query_moments(q, x, None, None), rotation, more["balancer"])
    expected = packed(x, factors, rotation, bits, group, axis, **more)
    given = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in more.items()}
    turned = rotation if rotation is None else rotation.to(device)
    actual = packed(x.to(device), factors.to(device), turned, bits, group, axis, compress_triton, **given)
    # A code that was rounded the other way, by a target between two codes, changes those behind it.
    same = unpack(actual[0].cpu(), bits, "key") == unpack(expected[0], bits, "key")
    assert same.float().mean() > (0.999 if device.type == "cpu" and dtype == torch.float32 else 0.9)
    if not rotate:
        return
    whole = x.float() if more["index"] is None else x.float().gather(2, more["index"][..., None].expand(-1, -1, -1, dim))
    whole = whole if more["balancer"] is None else whole * more["balancer"][:, :, None]
    q = q if more["balancer"] is None else (q.unflatten(1, (2, -1)) / more["balancer"][:, :, None, None]).flatten(1, 2)
    ours, theirs = (logit_error(whole, [t.cpu() for t in tier], q, rotation, bits, group, axis) for tier in (actual, expected))
    assert abs(ours - theirs) < 0.05 * theirs


@pytest.mark.parametrize("changes", [{}, {"error_feedback": False}, {"bits": 8}], ids=str)
def test_only_prompts_that_are_packed_are_fed_back(changes):
    config = MiniKVConfig(important=0, **changes)
    q, k = queries(1, 4, 400, 32), torch.randn(1, 2, 400, 32, generator=torch.Generator().manual_seed(0))
    moments = query_moments(q, k, None, None)
    made = [minikv.compress(k, k, None, None, None, 0, 1, config.to_json(), None, m) for m in (None, moments)]
    keys_differ = not torch.equal(made[0][0], made[1][0])
    assert keys_differ == config.feeds_back
    assert all(torch.equal(a, b) for a, b in zip(made[0][1:], made[1][1:], strict=True))
