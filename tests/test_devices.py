"""Models that accelerate spreads over devices, or keeps partly on a disk: its hooks break the graph at each module."""

import copy

import pytest
import torch

from minikv_compile import KVTensor
from minikv_compile.rotation import rotation_matrix

from .helpers import compiled, greedy, logits_of, make_backend, prompt, tiny

accelerate = pytest.importorskip("accelerate")


@pytest.mark.parametrize("second", ["cpu", "disk"])
def test_device_map(second, tmp_path):
    """The second layer's weights are on another device, and come when they are needed."""
    model, ids = tiny(), prompt(40)
    expected = greedy(copy.deepcopy(model), ids, 6)
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": second, "model.norm": "cpu"}
    model = accelerate.dispatch_model(
        model, {**places, "model.rotary_emb": "cpu", "lm_head": "cpu"}, main_device="cpu", offload_dir=tmp_path, force_hooks=True
    )
    backend = make_backend()
    got = greedy(compiled(model, backend), ids, 6)
    assert torch.equal(got.sequences, expected.sequences)
    torch.testing.assert_close(logits_of(got), logits_of(expected), rtol=0, atol=1e-4)
    for layer in got.past_key_values.layers:
        assert isinstance(layer.keys, KVTensor) and layer.keys.device.type == "cpu"
    assert {site.layer for graph in backend.graphs for site in graph if site.layer_known} <= {0, 1}


def test_what_a_graph_holds_is_on_the_device_of_its_layer():
    """The rotation is one matrix per device."""
    here, there = (rotation_matrix("hadamard", 64, torch.device(name)) for name in ("cpu", "meta"))
    assert (here.device.type, there.device.type) == ("cpu", "meta")
