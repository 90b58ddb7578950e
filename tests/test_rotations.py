"""benchmarks/rotations.py."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def rotations(monkeypatch):
    """The module. Its folder stays off the path: it has a `kernels` of its own."""
    made = None
    for name in ("simulate", "rotations"):
        spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
        made = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, made)
        spec.loader.exec_module(made)
    return made


def test_what_is_turned_is_turned_back(rotations):
    """Where nothing is quantized all variants hold the same; where it is, none does."""
    heads, n, dim = 2, 300, 32
    keys, values = torch.randn(2, 2, heads, n, dim)
    queries = torch.randn(2, 2 * heads, n, dim) * torch.linspace(0.1, 3, dim)
    prompt = rotations.Prompt(keys, values, queries, torch.zeros(1, 1, dtype=torch.int64))
    for method, same in (("lossless", True), ("default", False)):
        found = rotations.variants(prompt, method)
        assert len(found) == 7
        for kept in found.values():
            errors = [(torch.cat(got) - want).abs().max() for got, want in ((kept.keys, keys), (kept.values, values))]
            assert (max(errors) < 0.05) == same
    basis = rotations.bases(prompt, rotations.KEYS)
    turned = rotations.rotated(prompt, rotations.KEYS, basis)
    assert torch.allclose(basis @ basis.mT, torch.eye(dim).expand_as(basis), atol=1e-4)
    moments = turned.queries.unflatten(1, (heads, 2)).flatten(2, 3).square().mean(2)
    assert (moments.diff(dim=-1) <= 1e-4).all()  # largest first
    logits = [x.queries[:, ::2] @ x.keys.mT for x in (prompt, turned)]
    torch.testing.assert_close(*logits, atol=1e-3, rtol=1e-3)
