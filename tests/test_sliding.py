"""Models with sliding-window layers beside full ones, over a plain `DynamicCache`: the full ones are compressed, the others
keep transformers' own cache, and the tokens are the model's own."""

import copy

import pytest
import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from minikv_compile import KVTensor

from . import zoo
from .helpers import compiled, greedy, kinds, logits_of, make_backend, prompt, tiny

WINDOW = 8  # of the zoo's models
FAMILIES = ["cohere2", "exaone4", "gemma3_text", "modernbert-decoder"]


def check_layers(cache, length):
    """Full layers are compressed, whole; sliding ones are dense, no longer than their window."""
    compressed = 0
    for layer in cache.layers:
        if type(layer) is DynamicSlidingWindowLayer:
            assert type(layer.keys) is type(layer.values) is torch.Tensor
            assert layer.keys.shape[2] == min(length, layer.sliding_window - 1)
        else:
            assert type(layer) is DynamicLayer and layer.keys.shape[2] == length
            assert isinstance(layer.keys, KVTensor) and isinstance(layer.values, KVTensor)
            compressed += 1
    return compressed


@pytest.mark.slow
@pytest.mark.parametrize("length", [3, WINDOW - 1, WINDOW, WINDOW + 1, 40])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_equal_eagers_around_the_window(family, length):
    model, backend = zoo.build(family), make_backend()
    ids = torch.randint(2, zoo.VOCAB, (2, length))
    expected = greedy(copy.deepcopy(model), ids, 2 * WINDOW + 2)
    actual = greedy(compiled(model, backend), ids, 2 * WINDOW + 2)
    assert torch.equal(actual.sequences, expected.sequences)
    torch.testing.assert_close(logits_of(actual), logits_of(expected), rtol=0, atol=1e-4)
    assert check_layers(actual.past_key_values, length + 2 * WINDOW + 1) == zoo.FAMILIES[family].taken
    for graph in kinds(backend):
        assert sum(kind in ("prefill", "decode") for kind in graph) == zoo.FAMILIES[family].taken
        assert all(kind in ("prefill", "decode") or "sliding" in kind or "dense" in kind or "cache" in kind for kind in graph)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gpt_oss"])
def test_models_of_which_nothing_is_taken(family):
    """Sliding layers alone, or beside full ones with soft caps and attention sinks: from before the window is full to after."""
    model, backend = zoo.build(family), make_backend()
    ids = torch.randint(2, zoo.VOCAB, (2, WINDOW - 3))
    expected = greedy(copy.deepcopy(model), ids, WINDOW + 6)
    actual = greedy(compiled(model, backend), ids, WINDOW + 6)
    assert torch.equal(actual.sequences, expected.sequences)
    torch.testing.assert_close(logits_of(actual), logits_of(expected), rtol=0, atol=1e-4)
    assert not any(site.rewritten for graph in backend.graphs for site in graph)
    assert not any(isinstance(layer.keys, KVTensor) for layer in actual.past_key_values.layers)


@pytest.mark.slow
@pytest.mark.parametrize("first, second", [(3, 3), (3, 20), (20, 1), (20, 5), (20, 20)])
def test_two_turns(first, second):
    """The second prompt meets a sliding cache that is full, or not yet."""
    model = zoo.build("cohere2")
    turns = torch.randint(2, zoo.VOCAB, (1, first)), torch.randint(2, zoo.VOCAB, (1, second))

    def talk(model):
        out, ids, logits = None, turns[0][:, :0], []
        for turn in turns:
            ids = torch.cat([ids, turn], 1)
            past = {} if out is None else {"past_key_values": out.past_key_values}
            out = greedy(model, ids, 6, **past)
            ids = out.sequences
            logits.append(logits_of(out))
        return ids, torch.cat(logits, 1), out.past_key_values

    expected, expected_logits, _ = talk(copy.deepcopy(model))
    ids, logits, cache = talk(compiled(model, make_backend()))
    assert torch.equal(ids, expected)
    torch.testing.assert_close(logits, expected_logits, rtol=0, atol=1e-4)
    assert check_layers(cache, first + second + 11) == 1


def test_padding():
    model = zoo.build("exaone4")
    ids, mask = zoo.padded_prompts(20, 6)
    expected = greedy(copy.deepcopy(model), ids, 20, attention_mask=mask)
    actual = greedy(compiled(model, make_backend()), ids, 20, attention_mask=mask)
    assert torch.equal(actual.sequences, expected.sequences)
    check_layers(actual.past_key_values, 39)


def test_all_layers_sliding_under_default():
    """Nothing to compress: what the same graphs give without this backend, to the bit."""
    model = tiny("mistral", sliding_window=WINDOW)
    ids = prompt(300)
    expected = greedy(compiled(copy.deepcopy(model), "eager"), ids, 8)
    actual = greedy(compiled(model, make_backend("default")), ids, 8)
    assert torch.equal(logits_of(actual), logits_of(expected))


def test_default_compresses_the_full_layers_only():
    model, backend = zoo.build("cohere2"), make_backend("default")
    actual = greedy(compiled(model, backend), torch.randint(2, zoo.VOCAB, (1, 400)), 8)
    assert logits_of(actual).isfinite().all() and check_layers(actual.past_key_values, 407) == 1
    held = [layer.keys for layer in actual.past_key_values.layers if isinstance(layer.keys, KVTensor)]
    assert held[0].state[0, 2] > 0  # quantized tokens
