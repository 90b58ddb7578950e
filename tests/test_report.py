"""What the user can see: bytes counted from storages, and what became of each attention site."""

import pytest
import torch
from transformers import DynamicCache

from minikv_compile import KVTensor, cache_report, explain, is_active

from .helpers import PAD, PlainDecoder, compiled, greedy, make_backend, prompt, run_plain, tiny


def test_a_dense_cache():
    cache = DynamicCache()
    for layer in range(2):
        cache.update(*torch.randn(2, 3, 2, 10, 16, dtype=torch.bfloat16), layer)
    report = cache_report(cache)
    values = 2 * 2 * 3 * 2 * 10 * 16
    assert report.bytes == report.dense_bytes == values * 2
    assert (report.compression, report.bits_per_element) == (0.0, 16.0)
    assert [(x.layer, x.tokens, x.kept, x.compressed) for x in report.layers] == [
        (0, 10, [10] * 3, False), (1, 10, [10] * 3, False),
    ]  # fmt: skip


def test_storages_are_counted_once_and_whole():
    """A view holds all of its storage; keys and values that share one do not hold it twice."""
    storage = torch.zeros(2, 1, 2, 100, 16)
    report = cache_report(((storage[0][:, :, :10], storage[1][:, :, :10]),))
    assert report.bytes == 2 * 2 * 100 * 16 * 4
    assert report.dense_bytes == 2 * 2 * 10 * 16 * 4


def by_hand(kv):
    return sum(t.numel() * t.element_size() for t in kv.tensors().values())


@pytest.mark.parametrize("preset", ["lossless", "default", "minikv"])
def test_a_compressed_cache(preset):
    model, ids = PlainDecoder(layers=3), prompt(600)
    _, past = run_plain(torch.compile(model, backend=make_backend(preset, skip_layers=(1,))), ids, 598)
    report = cache_report(past)
    assert [x.compressed for x in report.layers] == [True, False, True]
    for layer, pair in zip(report.layers, past, strict=True):
        held = sum(by_hand(t) if isinstance(t, KVTensor) else t.untyped_storage().nbytes() for t in pair)
        assert layer.bytes == held
        assert layer.dense_bytes == 2 * 2 * 600 * 16 * 4 and layer.elements == 2 * 2 * 600 * 16
        assert layer.compression == 1 - held / layer.dense_bytes
        assert layer.tokens == 600
    total = sum(layer.bytes for layer in report.layers)
    assert (report.bytes, report.dense_bytes) == (total, 3 * 2 * 2 * 600 * 16 * 4)
    assert report.compression == 1 - total / report.dense_bytes
    assert report.bits_per_element == 8 * total / (3 * 2 * 2 * 600 * 16)
    # 598: 150 recent in every layer; 450 heavy hitters as 279, 150 and 21. Two tokens were generated.
    kept = [279 + 150 + 2, 600, 21 + 150 + 2] if preset == "minikv" else [600] * 3
    assert [layer.kept for layer in report.layers] == [[k] for k in kept]
    text = " ".join(str(report).split())  # a long title wraps
    assert f"{total:,} bytes" in text and f"{report.bits_per_element:.2f} bits per element" in text
    for layer in report.layers:
        assert f"{layer.bytes:,}" in text and str(layer.kept[0]) in text
    assert text.count("dense ") >= 1


def test_padding_is_not_kept():
    model = compiled(tiny(layers=1), make_backend("default"))
    ids = prompt(50, batch=2)
    ids[1, :20] = PAD
    out = greedy(model, ids, 3, attention_mask=(ids != PAD).long())
    [layer] = cache_report(out.past_key_values).layers
    assert layer.kept == [52, 32] and layer.tokens == 52
    assert "32-52" in str(cache_report(out.past_key_values))


@pytest.mark.parametrize("nothing", [None, (), DynamicCache(), "cache"])
def test_nothing_to_count(nothing):
    with pytest.raises(TypeError, match="No keys and values in"):
        cache_report(nothing)


def test_explain_lists_every_site():
    model = tiny(layers=2)
    explanation = explain(model, input_ids=prompt(20))
    assert [(s.layer, s.where, s.kind, s.idiom, s.reason) for s in explanation.sites] == [
        (i, f"model.layers.{i}.self_attn", kind, "cat", "") for kind in ("prefill", "decode") for i in range(2)
    ]
    assert explanation.rewritten == 4 and len(explanation.graphs) == 2
    text = str(explanation)
    assert "4 of 4 attention sites rewritten" in text and text.count("model.layers.1.self_attn") == 2
    assert not is_active(model)  # it looked, it did not switch anything on


def test_explain_says_why_not():
    explanation = explain(tiny("mistral", layers=1, sliding_window=8), input_ids=prompt(20))
    assert explanation.rewritten == 0
    assert explanation.sites[0].reason == "sliding window attention" and not explanation.sites[0].rewritten
    assert "0 of" in str(explanation) and "sliding window attention" in str(explanation)


def test_explain_of_a_padded_batch_and_of_a_module_without_a_cache():
    ids = prompt(12, batch=2)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    assert explain(tiny(layers=1), input_ids=ids, attention_mask=mask, config="small").rewritten == 2
    assert [s.kind for s in explain(PlainDecoder(layers=1), prompt(8)).sites] == ["prefill"]
    assert explain(torch.nn.Linear(4, 4), torch.zeros(1, 4)).sites == []


@pytest.mark.parametrize("tokens, share", [(256, 1.15), (320, 0.92), (1024, 0.35)])
def test_short_caches_take_what_the_readme_says(tokens, share):
    model = tiny(layers=1, heads=2, kv_heads=2, head_dim=128, dtype=torch.bfloat16)
    report = cache_report(greedy(compiled(model, make_backend("default")), prompt(tokens), 1).past_key_values)
    assert report.bytes / report.dense_bytes == pytest.approx(share, abs=0.006)
