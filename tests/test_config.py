"""`MiniKVConfig`: what is out of range says so, by name."""

import dataclasses
import math

import pytest

from minikv_compile import ConfigError, MiniKVConfig
from minikv_compile.config import PRESETS

WRONG = {
    "bits": [0, 1, 3, 5, 32, 2.0, "2", None],
    "group": [0, 8, 48, 256, 64.0, "64"],
    "key_axis": ["", "tokens", None],
    "balancer": ["", "geometric", None],
    "important_bits": [0, 2, 3, 4.0, 32, None],
    "clip": [0, 0.0, -0.5, 1.01, 2, math.nan, "1", True],
    "metadata_bits": [0, 4, 32, 8.0, True, None],
    "noise_correction": [0, 1, "yes", None],
    "error_feedback": [0, 1, "yes", None],
    "rotation": ["Hadamard", "", None],
    "sinks": [-1, 1.5, True, None],
    "important": [-1, -0.5, 1.5, 65537, True, None],
    "importance": ["", "keep_all", "outlier", None],
    "window": [-1, 0.5, "64"],
    "buffer": [0, -128, 64, 200, 128.0],
    "policy": ["h2o", "", ["keep_all"], 3, None],
    "observed": [0, -1, 2.0, None],
    "pool": [0, 4, -1, 7.0, None],
    "heavy": [-0.1, 1.1, -1, math.nan, math.inf, True, "half", None],
    "recent": [-0.1, 1.1, -1, math.nan, False, None],
    "layer_budget": ["cone", (), (-1.0, 2.0), (0, 0), ("1",), None],
    "pyramid_depth": [0, 0.5, -1, math.nan, "7"],
    "coverage": [0, 0.0, 1.01, math.nan, "0.9", None],
    "skip_layers": [(1.0,), ("0",), (True,), (None,)],
    "min_prompt": [-1, 2.0, None],
    "strict": [1, "yes", None],
}


def test_every_field_is_checked():
    assert set(WRONG) == {field.name for field in dataclasses.fields(MiniKVConfig)}


@pytest.mark.parametrize("field, value", [(field, value) for field, values in WRONG.items() for value in values])
def test_out_of_range(field, value):
    with pytest.raises(ConfigError, match=rf"MiniKVConfig\.{field} = .*must be"):
        MiniKVConfig(**{field: value})


def test_sixteen_bits_keep_everything():
    with pytest.raises(ConfigError, match=r"MiniKVConfig\.policy = 'heavy_hitter': must be .*when bits is 16"):
        MiniKVConfig.preset("lossless", policy="heavy_hitter")


def test_skip_layers_takes_any_sequence_but_no_number():
    assert MiniKVConfig(skip_layers=[0, -1]).skip_layers == (0, -1)
    with pytest.raises(ConfigError, match=r"MiniKVConfig\.skip_layers"):
        MiniKVConfig(skip_layers=3)


def test_presets():
    assert MiniKVConfig.preset("default") == MiniKVConfig()
    assert (MiniKVConfig().bits, MiniKVConfig().group, MiniKVConfig().rotation) == (2, 128, "hadamard")
    assert (MiniKVConfig().clip_of(2), MiniKVConfig().clip_of(4), MiniKVConfig(clip=0.7).clip_of(8)) == (0.85, 1.0, 0.7)
    assert MiniKVConfig(error_feedback=False).noise == 2 * MiniKVConfig().noise == 2 * MiniKVConfig(bits=4).noise == 1 / 24
    for preset in (
        MiniKVConfig.preset("minikv"), MiniKVConfig.preset("mikv", rotation="none", error_feedback=False, clip=1.0),
    ):  # as in the papers
        assert (preset.clip, preset.metadata_bits, preset.noise, preset.feeds_back) == (1.0, 16, 0.0, False)
    assert MiniKVConfig(key_axis="channel").noise == MiniKVConfig(bits=16, rotation="none").noise == 0.0
    assert not MiniKVConfig().drops and not MiniKVConfig.preset("lossless").drops
    paper = MiniKVConfig.preset("minikv")
    assert (paper.bits, paper.group, paper.rotation, paper.heavy, paper.recent) == (2, 16, "none", 0.25, 0.25)
    assert (paper.layer_budget, paper.pyramid_depth, paper.room, paper.drops) == ("pyramid", None, 128, True)
    assert MiniKVConfig.preset("minikv", heavy=64).heavy == 64
    with pytest.raises(ConfigError, match=rf"preset\('best'\): must be one of {', '.join(PRESETS)}"):
        MiniKVConfig.preset("best")
    with pytest.raises(ConfigError, match="group"):
        MiniKVConfig.preset("minikv", group=7)


@pytest.mark.parametrize("preset", list(PRESETS))
def test_json_round_trip(preset):
    config = MiniKVConfig.preset(preset, skip_layers=(0, -1), observed=9)
    again = MiniKVConfig.from_json(config.to_json())
    assert again == config and hash(again) == hash(config)
    assert "\n" not in config.to_json()
    with pytest.raises(ConfigError, match="bits"):
        MiniKVConfig.from_json(config.to_json().replace(f'"bits":{config.bits}', '"bits":3'))


def test_a_share_of_all_is_not_one_token():
    """1 == 1.0 in Python, but not as a budget: a round trip may not confuse them."""
    share, token = MiniKVConfig(heavy=1.0), MiniKVConfig(heavy=1)
    assert isinstance(MiniKVConfig.from_json(share.to_json()).heavy, float)
    assert isinstance(MiniKVConfig.from_json(token.to_json()).heavy, int)


def test_frozen_and_hashable():
    config = MiniKVConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.bits = 4
    assert {config: 1}[MiniKVConfig()] == 1
    assert dataclasses.replace(config, bits=4).bits == 4


def test_repr_and_differences_name_what_differs():
    paper = MiniKVConfig.preset("minikv")
    assert repr(MiniKVConfig()) == "MiniKVConfig()"
    assert eval(repr(paper)) == paper
    assert MiniKVConfig(bits=4, window=0).differences(MiniKVConfig()) == "bits: 4 / 2, window: 0 / 64"


@pytest.mark.parametrize("preset, share", [("default", 0.1328125), ("small", 0.099609375), ("minikv", 0.125), ("lossless", 1.0)])
def test_share_of_dense(preset, share):
    """2 bits and 16 bits of metadata per group; 32 bits, of half the tokens, in `minikv`."""
    assert MiniKVConfig.preset(preset).share_of_dense == share


def test_policies_that_observe_different_queries():
    """One pass over the attention serves both."""
    with pytest.raises(ConfigError, match=r"MiniKVConfig\.importance = 'observation_window': must be .*'heavy_hitter'"):
        MiniKVConfig.preset("minikv", important=8, importance="observation_window")
    assert MiniKVConfig(importance="observation_window").observed_queries == 64
    assert MiniKVConfig(importance="heavy_hitter").observed_queries == 0
    assert MiniKVConfig.preset("minikv", important=8).observed_queries == 0 and MiniKVConfig().observed_queries is None
