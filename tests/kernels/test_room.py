"""All layers' room at once, against one layer after the other in plain PyTorch."""

import pytest
import torch

from minikv_compile import MiniKVConfig
from minikv_compile.fixed import DENSE, STATE, allocate, least_pinned, make_room_reference
from minikv_compile.fixed import room as space_behind
from minikv_compile.kernels import room
from minikv_compile.kernels.packing import BLOCK
from minikv_compile.ops import ROLES, grouping
from minikv_compile.rotation import rotation_matrix


def layers_of(config, used, dim, dtype, device):
    """Of layers with rows of so many dense tokens each: keys, values."""
    made = {role: [] for role in ROLES}
    for rows in used:
        for role in ROLES:
            *tier, dense, state = allocate(config, role, len(rows), 2, 1000, dim, dtype, device)
            dense.copy_(torch.randn(dense.shape, device=device))
            state[:, 0] = -torch.tensor(rows, dtype=torch.int32, device=device)
            state[:, 2] = torch.arange(len(rows), device=device) * BLOCK
            made[role].append([*tier, dense, state])
    return made.values()


def make_room(config, keys, values, n):
    """As `fixed.make_room`, in Triton."""
    dim = keys[0][DENSE].shape[-1]
    axes = [grouping(config, role, dim) for role in ROLES]
    parts = ([(*t[:3], t[DENSE], t[STATE], t[DENSE - 1]) for t in held] for held in (keys, values))
    return room.make_room(
        *parts, n, space_behind(config, keys[0][DENSE].shape[2]), config.window, config.bits, *zip(*axes, strict=True),
        rotation_matrix(config.rotation, dim, keys[0][0].device), config.balances, config.clip,
    )  # fmt: skip


@pytest.mark.parametrize("preset", ["default", "minikv", "mikv"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [64, 80])
def test_like_layer_by_layer(device, preset, dtype, dim):
    config = MiniKVConfig.preset(preset)
    pinned = least_pinned(config)
    full = pinned + config.room
    keys, values = layers_of(config, [[full, full - 1], [full - 1, full - 1], [3, full]], dim, dtype, device)
    keys[0][DENSE][0, 1, pinned + 5, 3] = torch.nan
    if config.balances:
        for tensors in keys:
            tensors[DENSE - 1].uniform_(0.5, 2)
    expected = [[[t.clone() for t in tensors] for tensors in held] for held in (keys, values)]
    length = torch.tensor(900)
    for layer in range(3):
        make_room_reference(expected[0][layer], expected[1][layer], length, 1, config)
    fits = make_room(config, keys, values, 1)
    assert length == 903 and fits.all()
    for held, wanted in zip((keys, values), expected, strict=True):
        for tensors, others in zip(held, wanted, strict=True):
            *tier, dense, state = tensors
            *tier_there, dense_there, state_there = others
            assert torch.equal(state, state_there)
            for got, there in zip(tier[1:3], tier_there[1:3], strict=True):  # scales and zeros
                torch.testing.assert_close(got.float(), there.float(), rtol=1e-2, atol=1e-3)
            for row, left in enumerate((-state[:, 0] - 1).tolist()):
                assert torch.equal(dense[row, :, :left].nan_to_num(), dense_there[row, :, :left].nan_to_num())
    assert keys[0][STATE][0, 1] == 1 and keys[0][STATE][0, 2] == BLOCK


def test_three_launches_however_many_layers(device, monkeypatch):
    config, launched = MiniKVConfig(), []
    for name in ("_count_kernel", "_flush_kernel"):
        kernel = getattr(room, name)

        class Counted:
            def __init__(self, kernel):
                self.kernel = kernel

            def __getitem__(self, grid):
                launched.append(grid)
                return self.kernel[grid]

        monkeypatch.setattr(room, name, Counted(kernel))
    keys, values = layers_of(config, [[10, 20]] * 5, 64, torch.float32, device)
    make_room(config, keys, values, 1)
    assert launched == [(10, 1), (10, 2), (10, 2)]


def test_a_table_goes_with_its_storages(device):
    made = layers_of(MiniKVConfig(), [[1]], 64, torch.float32, device)
    keys, values = ([(*t[:3], t[DENSE], t[STATE]) for t in held] for held in made)
    del made
    before = len(room._tables)
    table = room.table_of(keys, values)
    assert room.table_of(keys, values) is table and len(room._tables) == before + 1
    del keys
    assert len(room._tables) == before


def test_a_tier_without_room(device):
    config = MiniKVConfig.preset("minikv")
    full = least_pinned(config) + config.room
    keys, values = layers_of(config, [[10, full], [10, 10]], 64, torch.float32, device)
    keys[0][STATE][1, 2] = keys[0][0].shape[2] * BLOCK
    assert make_room(config, keys, values, 1).flatten().tolist() == [False, True, True, True]
