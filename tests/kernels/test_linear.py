"""Products of few rows with several weights."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minikv_compile.kernels.linear import (
    MOST_ROWS,
    MOST_SPLITS,
    MOST_WEIGHTS,
    PROGRAMS,
    STEP,
    TILE,
    Launch,
    linear_reference,
    linear_triton,
    parts_of,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def check(rows, tiles, steps, splits, dtype, apart=0):
    inputs = steps * splits * STEP
    x = torch.randn(rows, inputs + apart, device=DEVICE).to(dtype)[:, :inputs]
    weights = [torch.randn(n * TILE, inputs, device=DEVICE).to(dtype) for n in tiles]
    got = linear_triton(x, weights, splits)
    assert got.shape == (splits, rows, sum(tiles) * TILE) and got.dtype == torch.float32
    exact = torch.cat([x.double() @ weight.double().mT for weight in weights], -1)
    assert (got.sum(0) - exact).norm() / exact.norm() < (1e-5 if x.is_cuda else 1e-6)  # a GPU's tensor cores cut sums off
    torch.testing.assert_close(got, linear_reference(x, weights, splits), atol=1e-3, rtol=1e-4)


@settings(deadline=None, max_examples=20)
@given(
    rows=st.integers(1, MOST_ROWS), tiles=st.lists(st.integers(1, 3), min_size=1, max_size=MOST_WEIGHTS), steps=st.integers(1, 3),
    splits=st.sampled_from([1, 2, 4]), dtype=st.sampled_from([torch.float16, torch.bfloat16]), apart=st.sampled_from([0, 8, 13]),
)  # fmt: skip
def test_equals_exact_products(rows, tiles, steps, splits, dtype, apart):
    check(rows, tiles, steps, splits, dtype, apart)


@pytest.mark.parametrize("odd", [0, 1])
def test_large_matrices_have_large_tiles(odd):
    """Where each weight has a whole number of them."""
    tiles = [2 * PROGRAMS - 10 - odd, 10 + odd]
    assert Launch.of(3, STEP, [n * TILE for n in tiles], 1).constants["TILE"] == (TILE if odd else 2 * TILE)
    check(3, tiles, 1, 1, torch.bfloat16)


@pytest.mark.parametrize(
    "outputs, inputs, parts", [(6144, 4096, 2), (4096, 4096, 4), (28672, 4096, 1), (4096, 14336, 4), (64, 4096, 8), (64, 384, 1)]
)
def test_parts(outputs, inputs, parts):
    """As many programs as an H200 has multiprocessors, where inputs can be split so."""
    assert parts_of(outputs, inputs) == parts <= MOST_SPLITS and inputs % (parts * STEP) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize(
    "sizes, inputs", [((4096, 1024, 1024), 4096), ((14336, 14336), 4096), ((4096,), 14336), ((2560, 512), 896)]
)
def test_on_a_gpu(rows, sizes, inputs):
    splits = parts_of(sum(sizes), inputs)
    check(rows, [size // TILE for size in sizes], inputs // splits // STEP, splits, torch.bfloat16)
