"""Flushes in Triton, of all layers at once, against plain PyTorch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minikv_compile import MiniKVConfig
from minikv_compile.fixed import allocate, least_pinned
from minikv_compile.fixed import room as space_behind
from minikv_compile.kernels import flush
from minikv_compile.kernels.packing import BLOCK, metadata
from minikv_compile.ops import ROLES, grouping
from minikv_compile.rotation import rotation_matrix

from .test_compress import assert_same_codes


def layers_of(config, used, dim, dtype, device, length=0):
    """Of layers with rows of so many dense tokens each: keys, values, as `flush` takes them."""
    made = {role: [] for role in ROLES}
    for i, rows in enumerate(used):
        for role in ROLES:
            # Tiers of different sizes.
            *tier, dense, state = allocate(config, role, len(rows), 2, 1000, dim, dtype, device, max(700 - 200 * i, 300))
            dense.copy_(torch.randn(dense.shape, device=device))
            state[:, 0] = length - torch.tensor(rows, dtype=torch.int32, device=device)
            state[:, 2] = torch.arange(len(rows), device=device) * BLOCK
            for t in tier[:3]:
                t.fill_(7)
            made[role].append([*tier[:3], dense, state, tier[-1]])
    return made.values()


def run(kind, config, keys, values, n=1, length=0, space=None, counted=0):
    """A flush by the reference, or in Triton."""
    dense = (keys or values)[0][3]
    groupings = [grouping(config, role, dense.shape[-1]) for role in ROLES]
    space = space or space_behind(config, dense.shape[2])
    return kind(
        keys, values, length, n, space, config.window, (space - config.window) // BLOCK, config.bits,
        *zip(*groupings, strict=True), rotation_matrix(config.rotation, dense.shape[-1], dense.device), config.balances,
        config.clip_of(config.bits), counted=counted,
    )  # fmt: skip


def copies(*layers):
    return [[[t.clone() for t in tensors] for tensors in held] for held in layers]


def alike(layers, expected, layout, length=0):
    """Whether two flushes have one result, where it is specified."""
    for tensors, others in zip(layers, expected, strict=True):
        *tier, dense, state, _ = tensors
        *tier_there, dense_there, state_there, _ = others
        assert torch.equal(state, state_there)
        assert_same_codes(tier[0], tier_there[0], 2, layout, most=2e-2)
        for got, there in zip(metadata(*tier[1:3], 2), metadata(*tier_there[1:3], 2), strict=True):
            torch.testing.assert_close(got, there, rtol=1e-2, atol=1e-3)
        for row, left in enumerate((length - state[:, 0]).tolist()):
            assert torch.equal(dense[row, :, :left].nan_to_num(), dense_there[row, :, :left].nan_to_num())


@pytest.mark.parametrize("preset", ["default", "minikv", "mikv"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [64, 80])
@pytest.mark.parametrize("length, counted", [(0, 1), (1000, 0)])
def test_like_the_reference(device, preset, dtype, dim, length, counted):
    config = MiniKVConfig.preset(preset)
    pinned = least_pinned(config)
    full = pinned + config.room
    keys, values = layers_of(config, [[full, full - 1], [full - 1, full - 1], [3, full]], dim, dtype, device, length)
    keys[0][3][0, 1, pinned + 5, 3] = torch.nan
    if config.balances:
        for tensors in keys:
            tensors[-1].uniform_(0.5, 2)
    expected = copies(keys, values)
    assert run(flush.flush_reference, config, *expected, 1, length, counted=counted).all()
    assert run(flush.flush_triton, config, keys, values, 1, length, counted=counted).all()
    alike(keys, expected[0], "key", length - counted)
    alike(values, expected[1], "value", length - counted)
    assert keys[0][4][0, 1] == 1 and keys[0][4][0, 2] == BLOCK


@settings(max_examples=10, deadline=None)
@given(
    held=st.lists(st.tuples(st.integers(0, 192), st.integers(0, 300)), min_size=1, max_size=5), n=st.integers(1, 300),
    length=st.integers(700, 5000), space=st.sampled_from([192, 256, 400]), roles=st.sampled_from([(1, 1), (1, 0), (0, 1)]),
)  # fmt: skip
def test_any_rows(device, held, n, length, space, roles):
    """Rows of any fill with any number of pinned tokens; keys alone, values alone."""
    config = MiniKVConfig.preset("default")
    layers = layers_of(config, [[0] * len(held)], 16, torch.float32, device, length)
    keys, values = (layer if wanted else [] for layer, wanted in zip(layers, roles, strict=True))
    for tensors in (*keys, *values):
        tensors[3] = torch.randn(len(held), 2, 500, 16, device=device)
        pinned, behind = torch.tensor(held, dtype=torch.int32, device=device).T
        tensors[4][:, 4], tensors[4][:, 0] = pinned, length - pinned - behind
    expected = copies(keys, values)
    same = run(flush.flush_reference, config, *expected, n, length, space)
    fits = run(flush.flush_triton, config, keys, values, n, length, space)
    assert fits.all() == same.all()
    alike(keys, expected[0], "key", length)
    alike(values, expected[1], "value", length)


def test_no_blocks_are_no_change(device):
    config = MiniKVConfig()
    keys, values = layers_of(config, [[least_pinned(config) + config.room, 20]] * 2, 64, torch.float32, device, 1000)
    expected = copies(keys, values)
    run(flush.flush_triton, config, keys, values, length=1000, space=config.window)
    for got, there in zip((*keys, *values), (*expected[0], *expected[1]), strict=True):
        assert all(map(torch.equal, got, there))


def test_three_launches_however_many_layers(device, monkeypatch):
    config, launched = MiniKVConfig(), []
    for name in ("_plan_kernel", "_flush_kernel"):
        kernel = getattr(flush, name)

        class Counted:
            def __init__(self, kernel):
                self.kernel = kernel

            def __getitem__(self, grid):
                launched.append(grid)
                return self.kernel[grid]

        monkeypatch.setattr(flush, name, Counted(kernel))
    keys, values = layers_of(config, [[10, 20]] * 5, 64, torch.float32, device)
    run(flush.flush_triton, config, keys, values)
    assert launched == [(10, 1), (10, 2), (10, 2)]


def test_a_table_goes_with_its_storages(device):
    made = layers_of(MiniKVConfig(), [[1]], 64, torch.float32, device)
    keys, values = ([tuple(tensors) for tensors in held] for held in made)
    del made
    before = len(flush._tables)
    table = flush.table_of(keys, values)
    assert len(flush._tables) == before  # nobody asked to keep it
    table = flush.table_of(keys, values, keep=True)
    assert flush.table_of(keys, values) is table and len(flush._tables) == before + 1
    del keys
    assert len(flush._tables) == before


def test_a_tier_without_room(device):
    config = MiniKVConfig.preset("minikv")
    full = least_pinned(config) + config.room
    keys, values = layers_of(config, [[10, full], [10, 10]], 64, torch.float32, device)
    sizes = [tensors[0].shape[2] for tensors in keys]
    assert sizes[1] < sizes[0]
    for tensors in (*keys, *values):
        tensors[4][1, 2] = sizes[1] * BLOCK - BLOCK
    keys[0][4][1, 2] = sizes[0] * BLOCK
    assert run(flush.flush_triton, config, *copies(keys, values)).flatten().tolist() == [False, True, True, True]
    keys[0][4][1, 2] -= 2 * BLOCK
    keys[1][4][0, 2] = sizes[1] * BLOCK  # room in the first layer's tier
    keys[1][4][0, 0] = -full
    assert run(flush.flush_triton, config, keys, values).flatten().tolist() == [True, False, True, True]
    with pytest.raises(ValueError, match="contiguous"):
        keys[0][3] = keys[0][3].transpose(0, 1)
        run(flush.flush_triton, config, keys, values)
