"""The column-sum kernel against a float64 softmax."""

import pytest
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st

from minikv_compile.kernels import scores, tuning
from minikv_compile.kernels.scores import column_scores, column_scores_reference, column_scores_triton
from minikv_compile.kernels.tuning import MANY_KEYS, scores_tuning

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def natural_lse(q, k, scale):
    """fp32 [batch, heads, seq], causal."""
    keys = k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    later = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
    return (q.double() @ keys.mT * scale).masked_fill(later, -torch.inf).logsumexp(-1).float()


def inputs(device, batch, kv_heads, ratio, seq, dim, dtype, seed=0, seq_first=False):
    """q and k; with `seq_first`, as projections leave them: views of [batch, seq, heads, head_dim]."""
    generator = torch.Generator().manual_seed(seed)

    def random(heads):
        shape = (batch, seq, heads, dim) if seq_first else (batch, heads, seq, dim)
        x = torch.randn(shape, generator=generator).to(device, dtype)
        return x.transpose(1, 2) if seq_first else x

    return random(kv_heads * ratio), random(kv_heads)


def check(q, k, scale, lengths=None, last=None, stride=1, keys=0):
    """`keys`: how many the tiles are chosen for."""
    tiles = scores_tuning(triton.next_power_of_2(q.shape[-1]), q.element_size(), keys)
    lse = natural_lse(q, k, scale)
    expected = column_scores_reference(q.double(), k.double(), scale, lengths, last, stride)
    if lengths is not None:
        for row, length in enumerate(lengths.tolist()):
            for x in (q, k, lse):
                x[row, :, length:] = torch.nan
    actual = column_scores_triton(q, k, lse, scale, lengths, last, stride, tiles)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)


@settings(max_examples=12)
@given(
    kv_heads=st.sampled_from([1, 2]),
    ratio=st.integers(1, 7),
    seq=st.integers(1, 270),
    dim=st.sampled_from([64, 80, 96, 128, 256]),
    dtype=st.sampled_from(DTYPES),
    last=st.one_of(st.none(), st.integers(1, 300)),
    stride=st.integers(1, 3),
    fill=st.floats(0, 1),
    seq_first=st.booleans(),
    keys=st.sampled_from([0, MANY_KEYS]),
)
def test_matches_reference(device, kv_heads, ratio, seq, dim, dtype, last, stride, fill, seq_first, keys):
    q, k = inputs(device, 2, kv_heads, ratio, seq, dim, dtype, seq, seq_first)
    lengths = torch.tensor([seq, max(1, round(fill * seq))], device=device)
    check(q, k, dim**-0.5, lengths, last, min(stride, seq), keys)


@pytest.mark.parametrize("keys", [0, MANY_KEYS])
@pytest.mark.parametrize("seq", [64, 127, 128, 129, 193, 255, 257])
def test_tile_borders(device, seq, keys):
    check(*inputs(device, 1, 1, 2, seq, 64, torch.float16), scale=0.2, keys=keys)


def test_ratio_of_seven(device):
    check(*inputs(device, 1, 1, 7, 140, 128, torch.bfloat16), scale=128**-0.5)


def test_sums_to_the_number_of_queries_and_repeats_its_bits(device):
    q, k = inputs(device, 1, 2, 2, 150, 64, torch.float16)
    lse = natural_lse(q, k, 0.125)
    first, second = (column_scores_triton(q, k, lse, 0.125) for _ in range(2))
    assert torch.equal(first, second)
    torch.testing.assert_close(first.sum(-1), torch.full((1, 2), 2 * 150.0, device=device), rtol=1e-4, atol=0)


def test_sample():
    """Every third query, three times."""
    q, k = inputs("cpu", 1, 1, 2, 50, 64, torch.float32)
    probs = (q[0] @ k[0].mT * 0.1).masked_fill(torch.ones(50, 50).triu(1) > 0, -torch.inf).softmax(-1)
    torch.testing.assert_close(column_scores_reference(q, k, 0.1, stride=3)[0, 0], 3 * probs[:, 2::3].sum((0, 1)))


@pytest.mark.parametrize("odd", ["offset", "stride", "last"])
def test_queries_that_bulk_loads_cannot_take(device, odd):
    q, k = inputs(device, 1, 1, 2, 70, 64, torch.float16)
    wide = torch.zeros(1, 2, 70, 2 * 66, dtype=q.dtype, device=device)
    views = {"offset": wide[..., 1:65], "stride": wide.view(1, 2, 140, 66)[:, :, ::2, :64], "last": wide[..., :128:2]}
    view = views[odd]
    check(view.copy_(q), k, 0.125)


def test_cpu_tensors_take_the_reference():
    q, k = inputs("cpu", 1, 1, 2, 33, 64, torch.float32)
    assert torch.equal(column_scores(q, k, natural_lse(q, k, 0.1), 0.1), column_scores_reference(q, k, 0.1))


@pytest.mark.parametrize("last, columns", [(None, 256), (8, 128)])
def test_wide_tiles_where_there_are_many_keys(device, monkeypatch, last, columns):
    used = []

    def recorded(*arguments):
        used.append(scores_tuning(*arguments))
        return used[-1]

    monkeypatch.setattr(tuning, "MANY_KEYS", 600)
    monkeypatch.setattr(scores, "scores_tuning", recorded)
    q, k = inputs(device, 1, 2, 2, 320, 64, torch.bfloat16)
    expected = column_scores_reference(q.double(), k.double(), 0.1, None, last)
    actual = column_scores_triton(q, k, natural_lse(q, k, 0.1), 0.1, None, last)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)
    assert [t.columns for t in used] == [columns]
