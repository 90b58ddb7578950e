"""The selection kernel against torch's topk."""

import pytest
import torch

from minikv_compile.kernels.select import bitmask_reference, bitmask_triton, highest_reference, highest_triton

SIZES = [(1, 1), (7, 0), (700, 200), (5000, 4999), (9000, 1), (40000, 3000), (4097, 64), (16384, 64), (9000, 7)]


@pytest.mark.parametrize("n, count", SIZES)
def test_matches_reference(device, n, count):
    """Few of many are chosen in two launches."""
    scores = torch.rand(3, n + 9, device=device)[:, 4 : n + 4]
    assert torch.equal(highest_triton(scores, count), highest_reference(scores, count))


@pytest.mark.parametrize("kinds, count", [(4, 2000), (400, 64), (1, 64)])
def test_equal_scores(device, kinds, count):
    """Of equal scores, the first ones."""
    scores = torch.randint(0, kinds, (2, 5000), device=device).float()
    chosen = highest_triton(scores, count)
    for row, taken in zip(scores, chosen, strict=True):
        assert (taken.diff() > 0).all()
        assert torch.equal(row[taken].sort().values, row.topk(count).values.sort().values)
        threshold = row[taken].min()
        at = (row == threshold).nonzero().flatten()
        assert torch.equal(taken[row[taken] == threshold], at[: (row[taken] == threshold).sum()])


@pytest.mark.parametrize("n", [1, 8, 31, 300, 4096])
@pytest.mark.parametrize("expanded", [False, True])
def test_bitmask(device, n, expanded):
    kept = max(1, n // 2)
    if expanded:
        index = torch.arange(kept, device=device).expand(3, 2, -1)
    else:
        index = torch.stack([torch.randperm(n, device=device)[:kept] for _ in range(6)]).view(3, 2, -1)
    counts = torch.tensor([[7, kept], [7, kept // 2], [7, 0]], dtype=torch.int32, device=device)[:, 1]
    bits = bitmask_triton(index, counts, n)
    assert torch.equal(bits, bitmask_reference(index, counts, n)) and bits.is_contiguous()
    for row, count in enumerate(counts.tolist()):
        tokens = index[row, 1, :count].tolist()
        assert [s for s in range(n) if bits[row, 1, s // 8] >> s % 8 & 1] == sorted(tokens)
