"""`benchmarks/cpu.py`, in small."""

import importlib
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture
def cpu(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("cpu")


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_attend_to_the_same(cpu, dtype):
    """The dense spellings, and a cache of the model's dtype; one of 2 bits comes near."""
    steps = cpu.make_steps(["lossless", "default"], 8, 2, dtype, 512, 2, "eager")
    first, *others, packed = (torch.cat(step()) for step in steps.values())
    tolerance = 2e-5 if dtype == torch.float32 else 1e-2
    for out in others:
        torch.testing.assert_close(out, first, rtol=tolerance, atol=tolerance)
    assert 0 < (packed - first).norm() / first.norm() < 0.6


def test_figures(cpu):
    rows = list(cpu.run(["default"], 8, 2, torch.float32, 1000, layers=2, rounds=2, repeats=2, inner="eager"))
    assert [r.method for r in rows] == ["sdpa", "sdpa-grouped", "default"]
    assert min(r.of_dense for r in rows[:2]) == 1.0 and all(r.per_token > 0 for r in rows)
    assert rows[0].cache_bytes == 2 * 2 * 1001 * 128 * 4 and rows[2].cache_bytes < rows[0].cache_bytes / 2
