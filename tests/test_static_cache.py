"""transformers' `StaticCache` under the backend: its buffers are made in the prompt's graph, or before it, and never kept dense."""

import copy
import gc

import pytest
import torch
from transformers import CompileConfig, StaticCache
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

from minikv_compile import KVTensor, cache_report, explain, is_active
from minikv_compile.buffers import GivenBack, make_dense

from . import zoo
from .helpers import ARCHITECTURES, PAD, captured, compiled, greedy, kinds, logits_of, make_backend, prompt, tiny

pytestmark = pytest.mark.usefixtures("each_device")

BOTH = [["prefill"] * 2, ["decode"] * 2]


def static(model, capacity=64):
    return StaticCache(model.config, max_cache_len=capacity)


def generate(model, ids, cache, new=16, **inputs):
    return greedy(model, ids, new, past_key_values=cache, disable_compile=True, **inputs)


def same(actual, expected):
    assert torch.equal(actual.sequences, expected.sequences)
    torch.testing.assert_close(logits_of(actual), logits_of(expected), rtol=0, atol=1e-4)


def all_given_back(cache):
    return all(type(x) is GivenBack for layer in cache.layers for x in (layer.keys, layer.values))


def padded(*lengths):
    ids = torch.full((len(lengths), max(lengths)), PAD)
    for row, tokens in zip(ids, lengths, strict=True):
        row[len(row) - tokens :] = prompt(tokens)[0]
    return ids, (ids != PAD).long()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tokens_equal_eagers(architecture, attention):
    model, ids, backend = tiny(architecture, attn_implementation=attention), prompt(30), make_backend(strict=True)
    expected = greedy(model, ids)
    cache = static(model)
    same(generate(compiled(model, backend), ids, cache), expected)
    assert kinds(backend) == BOTH and captured() == (2, 0) and is_active(model)
    assert {site.idiom for graph in backend.graphs for site in graph} == {"static buffer"}
    assert all_given_back(cache) and [int(layer.cumulative_length) for layer in cache.layers] == [45, 45]


def test_by_name_of_the_implementation():
    """`generate` makes the cache."""
    model, ids = tiny(), prompt(30)
    expected = greedy(model, ids)
    got = greedy(compiled(model, make_backend(strict=True)), ids, cache_implementation="static", disable_compile=True)
    same(got, expected)
    assert all_given_back(got.past_key_values)


def test_no_dense_buffer_is_ever_made():
    """Of a capacity whose buffers would take far more than all else."""
    model, ids, room = tiny(), prompt(200), 20000
    cache, backend = static(model, room), make_backend("default", inner=lambda module, inputs: module.forward)
    generate(compiled(model, backend), ids, cache, 2)
    gc.collect()
    dense = 2 * room * 16 * 4  # bytes of one buffer
    alive = [x for x in gc.get_objects() if type(x) is torch.Tensor and x.untyped_storage().nbytes() >= dense]
    assert not alive
    assert cache_report(cache).bytes < 0.25 * 4 * dense


def test_padded_batch():
    """Rows of several lengths; the masks come from outside of the graph."""
    model, backend = tiny(), make_backend(strict=True)
    ids, mask = padded(30, 21, 7)
    expected = greedy(model, ids, attention_mask=mask)
    cache = static(model)
    same(generate(compiled(model, backend), ids, cache, attention_mask=mask), expected)
    assert kinds(backend) == BOTH and all_given_back(cache)
    assert cache.layers[0].keys.layer.padding.tolist() == [0, 9, 23]


@pytest.mark.parametrize("policy", ["default", "minikv"])
def test_stores_what_a_dynamic_cache_stores(policy):
    model = tiny()
    ids, mask = padded(300, 180)
    expected = greedy(compiled(copy.deepcopy(model), make_backend(policy)), ids, 40, attention_mask=mask)
    cache = static(model, 352)
    got = generate(compiled(model, make_backend(policy)), ids, cache, 40, attention_mask=mask)
    torch.testing.assert_close(logits_of(got), logits_of(expected), rtol=0, atol=1e-3)
    for layer, dynamic in zip(cache.layers, expected.past_key_values.layers, strict=True):
        held = layer.keys.layer.keys
        assert isinstance(held, KVTensor) and torch.equal(held.kept_mask(), dynamic.keys.kept_mask())
        torch.testing.assert_close(held.dequantize(), dynamic.keys.dequantize(), rtol=0, atol=1e-5)


def test_buffers_that_are_there_before_the_prompt():
    model, ids, backend = tiny(), prompt(30), make_backend(strict=True)
    expected = greedy(model, ids)
    cache = static(model)
    cache.early_initialization(1, 2, 16, torch.float32, torch.get_default_device())
    same(generate(compiled(model, backend), ids, cache), expected)
    assert all_given_back(cache) and kinds(backend) == BOTH


def test_own_loop_makes_its_masks_in_the_graph():
    model, ids = tiny(), prompt(60)
    with torch.no_grad():
        expected = model(ids).logits
        for mask in (None, torch.ones(1, 64, dtype=torch.long)):
            torch._dynamo.reset()
            backend, cache = make_backend(strict=True), static(model)
            step = torch.compile(model, backend=backend)
            logits, start = [], 0
            for n in (30, 1, 1, 9, 1, 12, 6):  # a prompt, steps, later turns
                inputs = {} if mask is None else {"attention_mask": mask[:, : start + n]}
                logits.append(step(ids[:, start : start + n], past_key_values=cache, **inputs).logits)
                start += n
            torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=0, atol=1e-4)
            assert all_given_back(cache)


def test_decode_compiled_by_generate_takes_over_an_eager_prompt():
    """What `generate` does on an accelerator. The first step frees the buffers."""
    model = tiny()
    ids, mask = padded(60, 41)
    expected = greedy(model, ids, attention_mask=mask)
    config = CompileConfig(backend=make_backend(strict=True), mode=None, fullgraph=True)
    config._compile_all_devices = True
    cache = static(model, 80)
    got = greedy(model, ids, past_key_values=cache, compile_config=config, attention_mask=mask)
    same(got, expected)
    assert all_given_back(cache) and is_active(model)
    assert cache.layers[0].keys.layer.padding.tolist() == [0, 19]


def test_reset_and_another_prompt():
    model, backend = tiny(), make_backend(strict=True)
    prompts = [prompt(n) for n in (30, 25, 40)]
    expected = [greedy(model, ids) for ids in prompts]
    cache = static(model)
    compiled(model, backend)
    for ids, out in zip(prompts, expected, strict=True):
        same(generate(model, ids, cache), out)
        cache.reset()
        assert not cache.layers[0].keys.layer.filled and int(cache.layers[0].cumulative_length) == 0
    assert captured()[0] <= 4 and captured()[1] == 0


def test_several_caches_batches_and_capacities():
    model, backend = tiny(), make_backend(strict=True)
    cases = [(1, 30, 64), (2, 20, 64), (3, 33, 96), (1, 12, 50)]
    inputs = [prompt(n, batch) for batch, n, _ in cases]
    expected = [greedy(model, ids) for ids in inputs]
    compiled(model, backend)
    for ids, out, (_, _, capacity) in zip(inputs, expected, cases, strict=True):
        cache = static(model, capacity)
        same(generate(model, ids, cache), out)
        assert all_given_back(cache)


def test_beam_search():
    ids, model = prompt(20, batch=2), tiny()
    settings = dict(max_new_tokens=12, num_beams=3, do_sample=False, return_dict_in_generate=True)
    expected = model.generate(ids, **settings)
    backend = make_backend(strict=True)
    got = compiled(model, backend).generate(ids, past_key_values=static(model), disable_compile=True, **settings)
    assert torch.equal(got.sequences, expected.sequences) and all_given_back(got.past_key_values)


def test_rows_of_one_buffer_alone_do_not_pair_up():
    model = tiny()
    cache = generate(compiled(model, make_backend()), prompt(20, batch=2), static(model)).past_key_values
    layer, index = cache.layers[0], torch.tensor([1, 0])
    first, again = layer.keys.index_select(0, index), layer.keys.index_select(0, index)
    other = layer.values.index_select(0, torch.tensor([1, 1]))
    assert len({id(x.layer) for x in (first, again, other)}) == 3
    assert layer.keys.index_select(0, index).layer is layer.values.index_select(0, index).layer


def test_a_copy_of_the_cache_goes_its_own_way():
    model, prefix, ends = tiny(), prompt(30), [prompt(8), prompt(5)]
    expected = [greedy(model, torch.cat([prefix, end], 1)) for end in ends]
    compiled(model, make_backend(strict=True))
    cache = static(model)
    with torch.no_grad():
        model(prefix, past_key_values=cache)
    for end, out in zip(ends, expected, strict=True):
        same(generate(model, torch.cat([prefix, end], 1), copy.deepcopy(cache)), out)
    assert int(cache.layers[0].keys.layer.length) == 30


def test_rollback():
    model, ids = tiny(), prompt(50)
    with torch.no_grad():
        expected = model(ids).logits
        step, cache = torch.compile(model, backend=make_backend("default", strict=True)), static(model)
        step(ids[:, :40], past_key_values=cache)
        step(prompt(5), past_key_values=cache)
        for layer in cache.layers:
            layer.cumulative_length.sub_(5)  # `crop`, of transformers 5.24
        got = step(ids[:, 40:], past_key_values=cache).logits
    torch.testing.assert_close(got, expected[:, 40:], rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["gemma3_text", "cohere2", "gpt2", "gptj", "qwen3_moe"])
@pytest.mark.parametrize("length", [5, 20])
def test_families(family, length):
    """Sliding layers keep transformers' own buffers, before they are full and afterwards."""
    model, backend = zoo.build(family), make_backend()
    ids = torch.randint(2, zoo.VOCAB, (2, length))
    expected = generate(copy.deepcopy(model), ids, static(model))
    cache = static(model)
    same(generate(compiled(model, backend), ids, cache), expected)
    for layer in cache.layers:
        assert type(layer.keys) is (torch.Tensor if type(layer) is StaticSlidingWindowLayer else GivenBack)
        assert isinstance(layer, StaticLayer)
    assert sum(type(layer.keys) is GivenBack for layer in cache.layers) == zoo.FAMILIES[family].taken
    others = {kind for graph in kinds(backend) for kind in graph} - {"prefill", "decode"}
    # A prompt that is longer than the window is attended to as it is, and its end is kept.
    assert all("sliding" in kind or "not what the model keeps" in kind for kind in others), others


def test_skipped_layers_stay_dense():
    model, ids, backend = tiny(), prompt(30), make_backend(skip_layers=(0,))
    expected = greedy(model, ids)
    cache = static(model)
    same(generate(compiled(model, backend), ids, cache), expected)
    assert [type(layer.keys) for layer in cache.layers] == [torch.Tensor, GivenBack]


def test_reports_and_a_way_back():
    model, ids = tiny(), prompt(40)
    expected = greedy(model, ids, 20)
    cache = static(model)
    first = generate(compiled(model, make_backend()), ids, cache, 10)
    report = cache_report(cache)
    assert [layer.tokens for layer in report.layers] == [49, 49] and all(layer.compressed for layer in report.layers)
    model._compiled_call_impl = None
    with pytest.raises(RuntimeError, match=r"given back.*make_dense\(model\), or \(cache\)"), torch.no_grad():
        model(first.sequences[:, -1:], past_key_values=cache)
    cache = generate(compiled(model, make_backend()), ids, static(model), 10).past_key_values
    model._compiled_call_impl = None
    make_dense(cache)
    assert not any(isinstance(layer.keys, GivenBack) for layer in cache.layers)
    assert torch.equal(generate(model, first.sequences, cache, 10).sequences, expected.sequences)


def test_explain_leaves_the_cache_dense():
    model = tiny()
    cache = static(model)
    result = explain(model, input_ids=prompt(30), past_key_values=cache)
    assert result.rewritten == len(result.sites) == 4, str(result)
    assert not any(isinstance(layer.keys, GivenBack) for layer in cache.layers)


@pytest.mark.parametrize("preset", ["lossless", "default"])
def test_through_inductor(preset):
    model = tiny(layers=1)
    ids, mask = padded(40, 28)
    expected = greedy(model, ids, attention_mask=mask)
    backend = make_backend(preset, inner="inductor", strict=True)
    got = generate(compiled(model, backend), ids, static(model), attention_mask=mask)
    same(got, expected)  # nothing is quantized yet
    assert all_given_back(got.past_key_values)
