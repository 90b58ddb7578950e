"""Other packages' caches beside ours: the parts that need none of them, and each of them where it is installed."""

from importlib.util import find_spec

import pytest
import torch
from transformers import DynamicCache

from minikv_compile import peers
from minikv_compile.evaluate import Runner
from minikv_compile.peers import PEERS, PeerError, held_bytes, own_masks, parse_peer, peer_report

from .helpers import prompt, tiny

NEEDED = {"quanto": "optimum", "hqq": "hqq"}


def test_a_peer_is_a_name_with_settings():
    assert parse_peer("default:bits=4") is None and parse_peer("quantos") is None
    peer = parse_peer("kvpress-pyramidkv:ratio=0.75:beta=5")
    assert (peer.name, peer.settings) == ("kvpress-pyramidkv", {"ratio": 0.75, "beta": 5})
    with pytest.raises(PeerError, match="'ratio'"):
        parse_peer("kvpress-snapkv:ratio")


@pytest.mark.parametrize("name", PEERS)
def test_what_is_not_installed_is_named(name, monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda package: None)
    monkeypatch.delitem(peers.sys.modules, "kvpress", raising=False)
    if find_spec(NEEDED.get(name, "no such package")) is not None:
        pytest.skip("it is installed")
    with pytest.raises(PeerError, match=f"^{name}: .*install"):
        parse_peer(name).forward(tiny())


def test_bytes_of_a_nest_count_once():
    x = torch.zeros(10)
    assert held_bytes([x, (x[2:], {"a": torch.zeros(3, dtype=torch.uint8), "b": "text"}, None)]) == 43


@torch.no_grad()
def test_each_layer_attends_over_what_it_holds():
    """New tokens after layers of other lengths: the same as one after the other, which needs no mask."""
    model, ids = tiny(), prompt(40, 2)

    def cut():
        cache = DynamicCache()
        model(ids[:, :30], past_key_values=cache)
        for layer, kept in zip(cache.layers, (7, 19), strict=True):
            layer.keys, layer.values = layer.keys[:, :, -kept:], layer.values[:, :, -kept:]
        return cache

    positions = torch.arange(30, 40).expand(2, -1)
    with own_masks(model):
        together = model(ids[:, 30:], past_key_values=cut(), position_ids=positions).logits
        cache = cut()
        one_by_one = [
            model(ids[:, 30 + i, None], past_key_values=cache, position_ids=positions[:, i, None]).logits for i in range(10)
        ]
    torch.testing.assert_close(together, torch.cat(one_by_one, 1), rtol=1e-4, atol=1e-4)
    report = peer_report(model, cache, 2, 40)
    assert [layer.kept for layer in report.layers] == [[17, 17], [29, 29]]
    assert report.bytes == 2 * 2 * 2 * (17 + 29) * 16 * 4 and report.dense_bytes == 2 * 2 * 2 * 2 * 40 * 16 * 4


METHODS = {
    "kvpress-snapkv:ratio=0.5": 0.5, "kvpress-pyramidkv:ratio=0.5:beta=4": 0.5, "kvpress-knorm:ratio=0.75": 0.25,
    "kvpress-expected_attention:ratio=0.5": 0.5, "quanto:bits=2:group=32": 0.09375, "quanto:bits=4:group=32": 0.15625,
    "hqq:bits=2:group=32": 0.09375, "hqq:bits=4:group=32": 0.15625,
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_a_peer_takes_the_bytes_that_it_says(method):
    """fp32 model: codes of `bits`, and scale and zero of 32 bits each for 32 values."""
    peer = parse_peer(method)
    if find_spec(NEEDED.get(peer.name, "kvpress")) is None:
        pytest.skip("not installed")
    model, ids = tiny(), prompt(400, 2)
    plain = model(ids, use_cache=True).logits
    runner = Runner(model.forward, peer.forward(model), lambda *about: peer_report(model, *about))
    out = runner.forward(input_ids=ids[:, :380], use_cache=True)
    torch.testing.assert_close(out.logits, plain[:, :380], rtol=1e-3, atol=1e-3)
    report = runner.report(out.past_key_values, 2, 380)
    assert report.bytes / report.dense_bytes == pytest.approx(METHODS[method] + (0.0 if "ratio" in method else 1 / 32), rel=0.15)
    after = runner.forward(input_ids=ids[:, 380:], past_key_values=out.past_key_values, use_cache=True).logits
    assert after.isfinite().all() and not torch.allclose(after, plain[:, 380:], atol=1e-3)
    torch.testing.assert_close(model(ids, use_cache=True).logits, plain)  # nothing stays behind


@torch.no_grad()
def test_nothing_dropped_is_the_full_cache():
    if find_spec("kvpress") is None:
        pytest.skip("not installed")
    model, ids = tiny(), prompt(200)
    forward = parse_peer("kvpress-snapkv:ratio=0.0").forward(model)
    cache = forward(input_ids=ids[:, :150], use_cache=True).past_key_values
    after = forward(input_ids=ids[:, 150:], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(after, model(ids).logits[:, 150:], rtol=1e-3, atol=1e-3)
