"""What users do beside one plain generation, each once found broken."""

import pytest
import torch
from transformers import DynamicCache

from minikv_compile import KVTensor, explain, is_active

from .helpers import compiled, greedy, make_backend, prompt, tiny


def test_cropping_a_cache_then_decoding():
    """The cropped tensors must be no autograd views: Dynamo cannot trace those."""
    model, ids = tiny(), prompt(60)
    with torch.no_grad():
        expected = model(ids).logits[:, -1]
        compiled(model, make_backend())
        cache = DynamicCache()
        model(ids, past_key_values=cache)
        cache.crop(-1)
        actual = model(ids[:, -1:], past_key_values=cache).logits[:, -1]
    assert isinstance(cache.layers[0].keys, KVTensor)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


def test_more_kinds_of_inputs_than_dynamo_compiles_by_default():
    model, backend = tiny(layers=1), make_backend()
    compiled(model, backend)
    for batch in range(1, 8):
        out = greedy(model, prompt(20 + batch, batch), 3)
        assert isinstance(out.past_key_values.layers[0].keys, KVTensor), batch


def test_explain_works_again_and_again():
    model = tiny(layers=1)
    for _ in range(6):
        assert explain(model, input_ids=prompt(20)).rewritten == 2
    assert not is_active(model)


@pytest.mark.parametrize("tokens", [1, 2, 127])
def test_minikv_keeps_all_of_a_prompt_that_fills_no_block(tokens):
    model = compiled(tiny(), make_backend("minikv"))
    keys = greedy(model, prompt(tokens), 3).past_key_values.layers[0].keys
    assert keys.kept_mask().all()


def test_a_mask_that_contradicts_the_prompts_is_an_error():
    model, ids = compiled(tiny(), make_backend()), prompt(60, 2)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with torch.no_grad():
        cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
        other = torch.ones(2, 61, dtype=torch.long)
        other[:, :20] = 0
        with pytest.raises(Exception, match="does not fit the compressed cache"):
            model(ids[:, -1:], attention_mask=other, past_key_values=cache)


def test_a_second_model_of_the_same_class_is_active_too():
    first, second, backend = tiny(layers=1), tiny(layers=1), make_backend()
    for model in (compiled(first, backend), compiled(second, backend)):
        greedy(model, prompt(20), 3)
    assert is_active(first) and is_active(second)


def test_autocast_does_not_reach_the_codes():
    k, config = torch.randn(1, 2, 400, 16), make_backend("default").config.to_json()
    plain = torch.ops.minikv.compress(k, k, None, None, None, 0, 1, config)
    with torch.autocast("cpu", torch.bfloat16):
        cast = torch.ops.minikv.compress(k, k, None, None, None, 0, 1, config)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))
