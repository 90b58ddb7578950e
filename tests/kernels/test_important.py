"""Distances of keys from their mean, and the order of storage, against the references."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minikv_compile.kernels.important import (
    NO_TOKEN,
    distance_from_mean_reference,
    distance_from_mean_triton,
    stored_order_reference,
    stored_order_triton,
)


@settings(max_examples=15, deadline=None)
@given(
    heads=st.integers(1, 3), n=st.sampled_from([1, 32, 33, 190, 2500]), dim=st.sampled_from([64, 80, 128, 256]),
    seed=st.integers(0, 99), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seq_first=st.booleans(),
)  # fmt: skip
def test_distance(device, heads, n, dim, seed, dtype, seq_first):
    torch.manual_seed(seed)
    keys = torch.randn(heads, n, dim, device=device).to(dtype) + 3
    keys = keys.transpose(0, 1).contiguous().transpose(0, 1) if seq_first else keys
    expected = distance_from_mean_reference(keys.double().float())
    torch.testing.assert_close(distance_from_mean_triton(keys), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("run", [distance_from_mean_reference, distance_from_mean_triton])
def test_not_finite(device, run):
    """A key that is not finite is not chosen, and does not change which others are."""
    keys = torch.randn(2, 40, 64, device=device)
    keys[0, 3, 5], keys[1, 7] = torch.nan, torch.inf
    keys[:, 20] += 9
    assert run(keys).isfinite().all() and (run(keys) >= 0).all()
    assert run(keys).argmax(-1).tolist() == [20, 20] and run(keys)[0, 3] == 0 == run(keys)[1, 7]


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 300), sinks=st.integers(0, 9), most=st.sampled_from([1, 2, 64, 70, 300]), heads=st.integers(1, 3),
    fewer=st.floats(0, 1), seed=st.integers(0, 99),
)  # fmt: skip
def test_order(device, n, sinks, most, heads, fewer, seed):
    """The second row has fewer important tokens."""
    torch.manual_seed(seed)
    n += sinks + most
    counts = torch.tensor([most, int(fewer * most)], dtype=torch.int32)
    important = torch.full((2, heads, most), NO_TOKEN)
    for row, count in zip(important, counts.tolist(), strict=True):
        for head in row:
            head[:count] = torch.randperm(n - sinks)[:count].sort().values + sinks
    important, counts = important.to(device), counts.to(device)
    order = stored_order_triton(important, counts, n, sinks)
    assert torch.equal(order, stored_order_reference(important, counts, n, sinks))
    for b, h in ((0, 0), (1, heads - 1)):
        apart = important[b, h, : counts[b]].tolist()
        rest = [token for token in range(sinks, n) if token not in apart]
        assert order[b, h].tolist() == [*range(sinks), *apart, *rest]
