"""Which rows flush, and what is left of their dense regions, against the references."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minikv_compile.kernels import flush
from minikv_compile.kernels.packing import BLOCK


def rows(used, tier, pinned, length, device):
    state = [[length - u, 7, t * BLOCK, 0, p, BLOCK] for u, t, p in zip(used, tier, pinned, strict=True)]
    return torch.tensor(state, dtype=torch.int32, device=device)


@settings(max_examples=15, deadline=None)
@given(
    held=st.lists(st.tuples(st.integers(0, 700), st.integers(0, 300)), min_size=1, max_size=40), n=st.integers(1, 300),
    window=st.integers(0, 130), blocks=st.integers(0, 5), length=st.integers(0, 5000),
)  # fmt: skip
def test_plan(device, held, n, window, blocks, length):
    used, pinned = zip(*held, strict=True)
    state = rows(used, range(len(used)), pinned, length, device)
    arguments = (length, n, window + BLOCK, window, blocks)
    assert torch.equal(flush.plan_triton(state, *arguments), flush.plan_reference(state, *arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [64, 80])
@pytest.mark.parametrize("sinks, window, capacity", [(4, 64, 196), (0, 0, 128), (3, 5, 700)])
def test_move_up(device, dtype, dim, sinks, window, capacity):
    used = [capacity, capacity - 1, sinks, 0, min(capacity, sinks + window + BLOCK)]
    pinned = [sinks, sinks + 1, sinks, sinks, 0]
    dense = torch.randn(len(used), 2, capacity, dim, device=device).to(dtype)
    state = rows(used, range(len(used)), pinned, 1000, device)
    plan = flush.plan_reference(state, 1000, 1, capacity - sinks, window, 5)
    assert plan[0, 0] > 0 and plan[0, 3] == 0
    expected, expected_state = dense.clone(), state.clone()
    flush.move_up_reference(expected, expected_state, plan)
    flush.move_up_triton(dense, state, plan)
    assert torch.equal(state, expected_state)
    for row, left in enumerate((plan[2] - plan[0]).tolist()):
        assert torch.equal(dense[row, :, :left], expected[row, :, :left])
