"""What users do beside one plain generation, each once found broken."""

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache

from minikv_compile import KVTensor, MiniKVConfig, explain, is_active
from minikv_compile.config import ConfigError
from minikv_compile.policy import Policy, Recent

from .helpers import compiled, greedy, kinds, make_backend, prompt, tiny


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


@pytest.mark.parametrize("first, then", [(64, 64), (2, 120)])
def test_two_rollbacks_in_a_row(first, then):
    """The second may not reach behind what the first left unquantized."""
    model, ids = compiled(tiny(), make_backend("default", bits=8)), prompt(396)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        cache.crop(-first)
        with pytest.raises(ValueError, match=f"only the newest {72 - first} are unquantized"):
            cache.crop(-then)
        cache.crop(-(72 - first))
        length = cache.get_seq_length()
        actual = model(ids[:, length : length + 1], past_key_values=cache).logits
        expected = model(ids[:, : length + 1], use_cache=True).logits[:, -1:]
    assert length == 396 - 72
    torch.testing.assert_close(actual, expected, rtol=0, atol=0.05)


def test_a_row_without_a_tier_rolls_back_to_nothing():
    model, ids = compiled(tiny(), make_backend("default")), prompt(60)
    with torch.no_grad():
        expected = model(ids[:, :20], use_cache=True).logits[:, -1:]
        cache = model(ids, use_cache=True).past_key_values
        cache.crop(-60)
        for token in ids[:, :20].split(1, 1):
            actual = model(token, past_key_values=cache).logits
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


def test_batches_and_lengths_in_turn():
    model, plain, backend = tiny(layers=1), tiny(layers=1), make_backend()
    plain.load_state_dict(model.state_dict())
    compiled(model, backend)
    for batch, length in [(1, 30), (2, 30), (3, 30), (5, 5), (1, 1), (1, 16), (16, 16), (4, 2), (1, 64)]:
        ids = prompt(length, batch)
        assert torch.equal(greedy(model, ids, 4).sequences, greedy(plain, ids, 4).sequences), (batch, length)
    assert all(site.rewritten for graph in backend.graphs for site in graph)


def test_sizes_as_symbols_of_floats_too():
    """`dynamic=True` makes the scale of an attention a symbol."""
    model, ids = tiny(), prompt(30)
    expected, backend = greedy(model, ids, 4).sequences, make_backend()
    model.compile(backend=backend, dynamic=True)
    assert torch.equal(greedy(model, ids, 4).sequences, expected)
    assert kinds(backend)[0] == ["prefill"] * 2


def test_a_model_that_shares_a_parameter_is_not_active():
    first, second = tiny(layers=1), tiny(layers=1)
    second.model.embed_tokens = first.model.embed_tokens
    greedy(compiled(first, make_backend()), prompt(20), 3)
    assert is_active(first) and not is_active(second)


def test_a_graph_that_is_left_alone_may_have_gradients():
    model = tiny(layers=1)
    compiled(model, make_backend(skip_layers=(0,)))
    ids = prompt(20)
    model(ids, labels=ids, use_cache=False).loss.backward()
    assert model.lm_head.weight.grad is not None


def test_shared_memory_is_refused():
    model = compiled(tiny(layers=1), make_backend())
    with torch.no_grad():
        cache = model(prompt(20), use_cache=True).past_key_values
    with pytest.raises(RuntimeError, match="shared memory"):
        cache.layers[0].keys.share_memory_()


def test_what_is_not_finite_names_its_layer():
    model, ids = tiny(layers=3), prompt(300)
    model.compile(backend=make_backend("default", skip_layers=(0,)))
    with torch.no_grad():
        model.model.layers[2].self_attn.k_proj.weight[0, 0] = float("nan")
        with pytest.warns(UserWarning, match=r"300 tokens in the keys of layer 2:"):
            model(ids, use_cache=True)


def test_the_name_of_a_policy_is_taken():
    class Mine(Recent):
        name = "test_the_name"

        def __init__(self, sign):
            self.sign = sign

    def other(**attributes):
        return type("Other", (Policy,), {"score": Recent.score, **attributes})()

    assert MiniKVConfig(policy=Mine(1)) == MiniKVConfig(policy=Mine(1))
    with pytest.raises(ConfigError, match="'test_the_name' is taken"):
        MiniKVConfig(policy=Mine(-1))
    with pytest.raises(ConfigError, match="'keep_all' is taken"):
        MiniKVConfig(policy=other(name="keep_all"))
    with pytest.raises(ConfigError, match="needs a `name`"):
        MiniKVConfig(policy=other())
    with pytest.raises(ConfigError, match="`observes` is 'some'"):
        MiniKVConfig(policy=other(name="other", observes="some"))


def test_a_configuration_that_fails_takes_no_name():
    def policy():
        return type("Other", (Recent,), {"name": "test_no_name"})()

    with pytest.raises(ConfigError, match="observed"):
        MiniKVConfig(policy=policy(), observed=-1)
    MiniKVConfig(policy=policy())


def test_a_second_model_that_shares_its_first_parameter_is_active_once_it_ran():
    first, second, backend = tiny(layers=1), tiny(layers=1), make_backend()
    second.model.embed_tokens.weight = first.model.embed_tokens.weight
    for model in (first, second):
        greedy(compiled(model, backend), prompt(20), 3)
    assert is_active(first) and is_active(second)


@pytest.mark.parametrize("taken", [True, False])
def test_a_graph_that_returns_the_attention_itself(taken):
    """As where a graph breaks right behind it, or only the attention is compiled."""
    backend = make_backend(skip_layers=() if taken else (0,))

    @torch.compile(backend=backend)
    def attend(q, k, v, keys=None, values=None):
        k, v = 2 * k, 2 * v
        if keys is not None:
            k, v = torch.cat([keys, k], 2), torch.cat([values, v], 2)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=keys is None)
        return out, k, v

    q, k, v = torch.randn(3, 1, 2, 41, 16)
    expected = F.scaled_dot_product_attention(q, 2 * k, 2 * v, is_causal=True)
    out, keys, values = attend(*(x[:, :, :40] for x in (q, k, v)))
    torch.testing.assert_close(out, expected[:, :, :40], rtol=0, atol=1e-5)
    out, keys, values = attend(*(x[:, :, 40:] for x in (q, k, v)), keys, values)
    torch.testing.assert_close(out, expected[:, :, 40:], rtol=0, atol=1e-5)
    assert isinstance(keys, KVTensor) == isinstance(values, KVTensor) == taken
    torch.testing.assert_close(keys.dequantize() if taken else keys, 2 * k, rtol=0, atol=1e-5)


def test_a_compressed_cache_that_is_made_dense_and_returned():
    """A second backend call whose attention cannot be taken, and that returns the cache: it comes back dense."""
    backend = make_backend()

    @torch.compile(backend=backend)
    def attend(q, k, v, keys=None, values=None):
        if keys is not None:
            return F.scaled_dot_product_attention(q, keys, values).tanh(), keys, values
        k, v = 2 * k, 2 * v
        return F.scaled_dot_product_attention(q, k, v, is_causal=True), k, v

    q, k, v = torch.randn(3, 1, 2, 40, 16)
    _, keys, values = attend(q, k, v)
    assert isinstance(keys, KVTensor)
    out, keys, _ = attend(q[:, :, :1], None, None, keys, values)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q[:, :, :1], 2 * k, 2 * v).tanh(), rtol=0, atol=1e-5)
    torch.testing.assert_close(keys.dequantize() if isinstance(keys, KVTensor) else keys, 2 * k, rtol=0, atol=1e-5)
