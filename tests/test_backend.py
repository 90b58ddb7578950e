"""The whole path: an unmodified model, its own cache, and what `generate` answers from the compressed one."""

import warnings

import pytest
import torch
from torch import nn
from transformers import DynamicCache

import minikv_compile
from minikv_compile import ConfigError, KVTensor, MiniKVBackend, MiniKVConfig, cache_report, is_active

from .helpers import (
    ARCHITECTURES,
    PAD,
    PlainDecoder,
    all_compressed,
    captured,
    compiled,
    greedy,
    kinds,
    logits_of,
    make_backend,
    prompt,
    run_plain,
    tiny,
)

PRESETS = ["lossless", "default", "minikv"]
BOTH = [["prefill", "prefill"], ["decode", "decode"]]  # every site of two layers rewritten, in two graphs


# ---- lossless is eager


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_lossless_tokens_are_eager_tokens(architecture):
    model, ids = tiny(architecture), prompt(40)
    expected = greedy(model, ids, 64)
    backend = make_backend()
    actual = greedy(compiled(model, backend), ids, 64)
    assert torch.equal(actual.sequences, expected.sequences)
    torch.testing.assert_close(logits_of(actual), logits_of(expected), rtol=0, atol=1e-4)
    assert kinds(backend) == BOTH
    assert all_compressed(actual.past_key_values)
    assert captured() == (2, 0)
    assert is_active(model)


@pytest.mark.slow
def test_through_inductor_by_name():
    """`backend="minikv"` needs no import. Nothing is quantized in this prompt, so the tokens are eager's."""
    model, ids = tiny(layers=1), prompt(40)
    expected = greedy(model, ids, 64)
    actual = greedy(compiled(model, "minikv"), ids, 64)
    assert torch.equal(actual.sequences, expected.sequences)
    assert captured() == (2, 0)
    assert all_compressed(actual.past_key_values) and is_active(model)


def test_mode_and_options_reach_inductor(monkeypatch):
    """The user's go before ours."""
    seen, contract = [], "cpp.enable_floating_point_contract_flag"

    class Wrapper:
        def __init__(self, mode, options, dynamic):
            seen.append((mode, options))

        def __call__(self, module, inputs):
            return module

    monkeypatch.setattr(torch, "_TorchCompileInductorWrapper", Wrapper)
    model = PlainDecoder(layers=1)
    with torch.no_grad():
        torch.compile(model, backend=MiniKVBackend(), mode="reduce-overhead")(prompt(8))
        torch._dynamo.reset()
        torch.compile(model, backend=MiniKVBackend(), options={"max_autotune": True, contract: "off"})(prompt(8))
    asked = {"max_autotune": True, contract: "off"}  # a graph that is not rewritten gets what was asked for, too
    assert seen == [("reduce-overhead", None), ("reduce-overhead", {contract: "fast"}), (None, asked), (None, asked)]


def test_the_inner_compiler_may_be_a_function():
    graphs = []

    def inner(module, inputs):
        graphs.append((module, len(inputs), len(list(module.graph.find_nodes(op="placeholder")))))
        return module.forward

    model = PlainDecoder()
    run_plain(torch.compile(model, backend=MiniKVBackend(inner=inner)), prompt(12), 10)
    assert len(graphs) == 2
    for module, inputs, placeholders in graphs:
        assert inputs == placeholders
        # Whatever compiles the rewritten graph must meet plain tensors only.
        for node in module.graph.find_nodes(op="placeholder"):
            assert not isinstance(node.meta["example_value"], KVTensor)


# ---- the ways to switch it on


def user_loop(call, ids, new, cache):
    """Greedy decoding as users write it."""
    tokens = ids
    with torch.inference_mode():
        out = call(ids, past_key_values=cache, use_cache=True)
        for _ in range(new):
            token = out.logits[:, -1:].argmax(-1)
            tokens = torch.cat([tokens, token], 1)
            out = call(token, past_key_values=out.past_key_values, use_cache=True)
    return tokens, out.past_key_values


@pytest.mark.parametrize("way", ["forward", "wrapper", "no cache passed", "one line"])
def test_ways_to_switch_it_on(way):
    model, ids = tiny(), prompt(30)
    expected = greedy(model, ids, 12).sequences
    backend = make_backend()
    if way == "forward":
        model.forward = torch.compile(model.forward, backend=backend)
        out = greedy(model, ids, 12)
        tokens, cache = out.sequences, out.past_key_values
    elif way == "one line":
        assert minikv_compile.compile(model, "lossless", inner="eager") is model
        out = greedy(model, ids, 12)
        tokens, cache = out.sequences, out.past_key_values
    else:
        cache = DynamicCache(config=model.config) if way == "wrapper" else None
        tokens, cache = user_loop(torch.compile(model, backend=backend), ids, 12, cache)
    assert torch.equal(tokens, expected)
    assert all_compressed(cache) and is_active(model)
    assert captured() == (2, 0)


def test_compiling_only_the_module_does_nothing_for_generate():
    """`generate` runs on the inner module: `is_active` is how a user finds out."""
    model = tiny(layers=1)
    out = greedy(torch.compile(model, backend=make_backend()), prompt(20), 4)
    assert not is_active(model)
    assert not any(isinstance(layer.keys, KVTensor) for layer in out.past_key_values.layers)
    assert captured() == (0, 0)


def test_hand_written_decoder_with_tuples():
    model, ids = PlainDecoder(), prompt(60, batch=2)
    expected, _ = run_plain(model, ids, 40)
    backend = make_backend()
    call = torch.compile(model, backend=backend, fullgraph=True)
    actual, past = run_plain(call, ids, 40)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    assert kinds(backend) == BOTH
    assert all(isinstance(t, KVTensor) and t.shape == (2, 2, 60, 16) for pair in past for t in pair)
    assert is_active(model) and not is_active(PlainDecoder())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_cache_outlives_the_mode_it_was_made_in(context):
    """Tensors born under inference mode could not be written in place outside of it."""
    model, ids = PlainDecoder(layers=1), prompt(230)
    expected, _ = run_plain(model, ids, 100)
    call = torch.compile(model, backend=make_backend("default", window=0, sinks=0, bits=8, group=16))
    with context():
        first, past = call(ids[:, :100])
    # 130 more tokens: at least one flush writes into what the prefill allocated.
    rest = [first]
    for t in range(100, 230):
        with torch.no_grad() if context is torch.inference_mode else torch.inference_mode():
            step, past = call(ids[:, t : t + 1], past)
        rest.append(step)
    assert past[0][0].tier.shape[2] >= 128 and past[0][0].state[0, 2] == 128
    torch.testing.assert_close(torch.cat(rest, 1), expected, rtol=0, atol=0.05)


def test_gradients_are_refused():
    model = compiled(PlainDecoder(layers=1), make_backend())
    with pytest.raises(Exception, match=r"torch\.no_grad\(\) or torch\.inference_mode\(\)"):
        model(prompt(8))


def test_disabled_by_the_environment(monkeypatch):
    monkeypatch.setenv("MINIKV_DISABLE", "1")
    model, ids = PlainDecoder(), prompt(20)
    expected, _ = run_plain(model, ids, 16)
    backend = make_backend("minikv")
    actual, past = run_plain(torch.compile(model, backend=backend), ids, 16)
    assert torch.equal(actual, expected)
    assert not isinstance(past[0][0], KVTensor) and backend.graphs == [] and not is_active(model)


# ---- graphs


@pytest.mark.parametrize(
    "preset, lengths, in_tier", [("default", (619, 624, 614), 512), ("minikv", (500, 510, 505), 384)]
)
def test_two_graphs_and_no_break(preset, lengths, in_tier):
    """Lengths change with every token and every flush, none may recompile. One more graph makes the prompt dynamic.

    The prompts of several blocks leave room for fewer than 40 tokens in some layer: it flushes once in each run.
    """
    model, backend = tiny(), make_backend(preset)
    compiled(model, backend)
    for length, graphs in zip(lengths, (2, 3, 3), strict=True):
        out = greedy(model, prompt(length), 40)
        assert max(layer.keys.state[0, 2] for layer in out.past_key_values.layers) == in_tier
        assert captured()[0] <= graphs, f"at a prompt of {length} tokens"
    assert captured()[1] == 0
    assert all(kind in ("prefill", "decode") for graph in kinds(backend) for kind in graph)


def test_one_token_prompt_and_prompt_shorter_than_the_window():
    """Everything stays dense and exact."""
    model = PlainDecoder()
    call = torch.compile(model, backend=make_backend("default"))
    for length in (1, 3, 40):
        ids = prompt(length + 6)
        actual, past = run_plain(call, ids, length)
        torch.testing.assert_close(actual, run_plain(model, ids, length)[0], rtol=0, atol=1e-5)
        assert isinstance(past[0][0], KVTensor) and past[0][0].state[0, 2] == 0


def test_min_prompt_keeps_short_prompts_whole():
    model, ids = PlainDecoder(), prompt(400)
    expected, _ = run_plain(model, ids, 390)
    for min_prompt in (0, 391):
        torch._dynamo.reset()
        actual, past = run_plain(torch.compile(model, backend=make_backend("minikv", min_prompt=min_prompt)), ids, 390)
        exact = torch.allclose(actual, expected, rtol=0, atol=1e-5)
        assert exact == (min_prompt == 391)
        assert past[0][0].kept_mask().all() == exact


# ---- padding


@pytest.mark.parametrize("preset", PRESETS)
def test_left_padded_rows_equal_their_own_runs(preset):
    """Rows of 290, 150 and 7 tokens, with flushes on the way: they happen at each row's own length."""
    model, lengths, new = tiny(), (290, 150, 7), 60
    rows = [prompt(n) for n in lengths]
    ids = torch.full((3, max(lengths)), PAD)
    for row, tokens in zip(ids, rows, strict=True):
        row[len(row) - tokens.shape[1] :] = tokens
    backend = make_backend(preset)
    compiled(model, backend)
    together = greedy(model, ids, new, attention_mask=(ids != PAD).long())
    assert kinds(backend) == BOTH
    assert all_compressed(together.past_key_values)
    for i, tokens in enumerate(rows):
        alone = greedy(model, tokens, new, attention_mask=torch.ones_like(tokens))
        assert torch.equal(together.sequences[i, max(lengths) :], alone.sequences[0, tokens.shape[1] :])
        torch.testing.assert_close(logits_of(together)[i], logits_of(alone)[0], rtol=0, atol=2e-3)
        for padded, own in zip(together.past_key_values.layers, alone.past_key_values.layers, strict=True):
            assert padded.keys.state[i, 2] == own.keys.state[0, 2]
    if preset == "lossless":
        model._compiled_call_impl = None
        torch.testing.assert_close(
            logits_of(together), logits_of(greedy(model, ids, new, attention_mask=(ids != PAD).long())),
            rtol=0, atol=1e-4,
        )  # fmt: skip


def test_a_row_of_nothing_but_padding():
    model = compiled(tiny(layers=1), make_backend())
    ids = prompt(6, batch=2)
    mask = torch.ones_like(ids)
    mask[1] = 0
    with pytest.raises(ValueError, match="Row 1 .*no tokens"), torch.no_grad():
        model(ids, attention_mask=mask)


# ---- the arithmetic of the paper


class Simulation:
    """MiniKV with dense tensors: attention maps, a mask per layer and KV head, and fake quantization.

    Written from the paper's description: 2 bits, K in groups of 16 tokens of a channel, V in groups of 16 channels of a
    token, 25% heavy hitters under a pyramid of depth 7 plus the newest 25%; whole blocks of 128 tokens are quantized.
    """

    def __init__(self, model, ids):
        self.model, self.layers = model, model.config.num_hidden_layers
        self.kv_heads = model.config.num_key_value_heads
        length = ids.shape[1]
        with torch.no_grad():
            out = model(ids, use_cache=True, output_attentions=True)
        self.logits, self.cache = out.logits, out.past_key_values
        heavy, recent = round(length * 0.25), round(length * 0.25)
        depth = [13 / 7 + (1 / 7 - 13 / 7) * i / (self.layers - 1) for i in range(self.layers)]
        self.stored = []  # for each layer and KV head, positions in order
        for layer, share in enumerate(depth):
            columns = out.attentions[layer].double().sum(2).view(1, self.kv_heads, -1, length).sum(2)[0]
            budget = heavy * share
            assert abs(budget - round(budget)) < 1e-9, "choose a prompt whose budgets are whole numbers"
            chosen = columns[:, : length - recent].topk(round(budget)).indices
            self.stored.append([sorted(row.tolist()) + list(range(length - recent, length)) for row in chosen])
        self.packed = [0] * self.layers
        for layer in range(self.layers):
            self.quantize(layer, len(self.stored[layer][0]) // 128 * 128)

    def quantize(self, layer, tokens):
        slot = self.cache.layers[layer]
        for head, positions in enumerate(self.stored[layer]):
            index = positions[self.packed[layer] : self.packed[layer] + tokens]
            for name, axis in (("keys", 0), ("values", 1)):
                dense = getattr(slot, name)
                x = dense[0, head, index]
                dense[0, head, index] = fake_quantize(x.T if axis == 0 else x, axis)
        self.packed[layer] += tokens

    def step(self, token):
        """Logits of one token, which joins the cache."""
        past = self.cache.layers[0].keys.shape[2]
        hooks = []
        for layer, block in enumerate(self.model.model.layers):
            in_dense = len(self.stored[layer][0]) - self.packed[layer]
            if in_dense == 128:
                self.quantize(layer, 128)
            mask = torch.full((self.kv_heads, past + 1), -torch.inf)
            for head, positions in enumerate(self.stored[layer]):
                positions.append(past)
                mask[head, positions] = 0
            mask = mask.repeat_interleave(self.model.config.num_attention_heads // self.kv_heads, 0)[None, :, None]

            def put_mask(module, args, kwargs, mask=mask):
                return args, {**kwargs, "attention_mask": mask}

            hooks.append(block.self_attn.register_forward_pre_hook(put_mask, with_kwargs=True))
        with torch.no_grad():
            out = self.model(token, past_key_values=self.cache)
        for hook in hooks:
            hook.remove()
        return out.logits[:, -1]


def fake_quantize(x, axis):
    """Two bits in groups of 16 along the last dimension; `axis` 0 means that `x` came transposed."""
    groups = x.unflatten(-1, (-1, 16))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step, zero = ((high - low) / 3).half().float(), low.half().float()
    result = (((groups - zero) / step).round().clamp(0, 3) * step + zero).flatten(-2)
    return result.T if axis == 0 else result


def test_minikv_equals_a_naive_simulation():
    model = tiny(layers=3, head_dim=32, attn_implementation="eager")
    ids = prompt(672)  # 168 heavy hitters on average: 312, 168 and 24
    simulation = Simulation(model, ids)
    model.set_attn_implementation("sdpa")
    backend = make_backend("minikv")
    compiled(model, backend)
    dense_answer = simulation.logits[:, -1]
    with torch.no_grad():
        out = model(ids, use_cache=True)
    model._compiled_call_impl, run = None, model._compiled_call_impl
    torch.testing.assert_close(out.logits[:, -1], dense_answer, rtol=0, atol=1e-3)
    kept = [layer.keys.kept_mask()[0].sum(-1).tolist() for layer in out.past_key_values.layers]
    assert kept == [[480, 480], [336, 336], [192, 192]]
    for layer, stored in zip(out.past_key_values.layers, simulation.stored, strict=True):
        mask = layer.keys.kept_mask()[0]
        assert [mask[head].nonzero().flatten().tolist() for head in range(2)] == stored
    flushes, errors = sum(simulation.packed), []
    cache = out.past_key_values
    for token in prompt(70)[0]:  # until the first layer, with 96 dense tokens, has flushed
        token = token.view(1, 1)
        model.set_attn_implementation("eager")
        expected = simulation.step(token)
        model.set_attn_implementation("sdpa")
        with torch.no_grad():
            out = run(token, past_key_values=cache)
        cache = out.past_key_values
        errors.append((out.logits[:, -1] - expected).abs().max())
    # Of logits that spread by 2.5: 1e-4, up to 2e-2 where a value next to a tie got another code, as another order of sums gives.
    errors = torch.stack(errors).sort().values
    assert errors[-4] < 4e-3 and errors[-1] < 3e-2
    assert sum(simulation.packed) > flushes


@pytest.mark.parametrize("preset, share", [("minikv", 0.145), ("default", 0.18)])
def test_cache_bytes_at_8k(preset, share):
    model = compiled(tiny(heads=2, kv_heads=1, head_dim=64, dtype=torch.bfloat16), make_backend(preset))
    out = greedy(model, prompt(8192), 2)
    cache = out.past_key_values
    held = sum(t.untyped_storage().nbytes() for layer in cache.layers for kv in (layer.keys, layer.values)
               for t in kv.tensors().values())  # fmt: skip
    dense = 2 * 2 * 8193 * 64 * 2  # keys and values of two layers, 8193 tokens of 64 bf16
    assert held / dense <= share
    report = cache_report(cache)
    assert (report.bytes, report.dense_bytes) == (held, dense)


# ---- second turns


def test_second_turn_lossless_equals_reencoding():
    model = tiny()
    first, second = prompt(50), prompt(30)
    with torch.no_grad():
        expected = model(torch.cat([first, second], 1)).logits[:, 50:]
    backend = make_backend()
    compiled(model, backend)
    with torch.no_grad():
        past = model(first, use_cache=True).past_key_values
        actual = model(second, past_key_values=past)
    torch.testing.assert_close(actual.logits, expected, rtol=0, atol=1e-4)
    assert kinds(backend) == [["prefill"] * 2, ["extend"] * 2]
    assert actual.past_key_values.layers[0].keys.shape[2] == 80


@pytest.mark.parametrize("preset, turn", [("default", 20), ("minikv", 20), ("default", 500)])
def test_second_turn_equals_token_by_token(preset, turn):
    """Several tokens at once: causal among themselves. A turn larger than the buffer is flushed at its end."""
    model = PlainDecoder(causal_with_past)
    ids = prompt(300 + turn + 3)
    backend = make_backend(preset)
    call = torch.compile(model, backend=backend)
    with torch.no_grad():
        _, start = call(ids[:, :300])
        logits, past = call(ids[:, 300 : 300 + turn], tuple((k.clone(), v.clone()) for k, v in start))
    assert kinds(backend)[1] == ["extend"] * 2
    one_by_one, single = run_plain(call, ids[:, 300 : 300 + turn], 1, start)
    if turn == 20:
        torch.testing.assert_close(logits, one_by_one, rtol=0, atol=1e-4)
    # One token later both caches hold the same numbers of tokens at each precision, and no room for the whole turn.
    (_, past), (_, single) = (run_plain(call, ids[:, 300 + turn :], 1, cache) for cache in (past, single))
    for a, b in zip(past, single, strict=True):
        assert a[0].shape == b[0].shape and torch.equal(a[0].state, b[0].state)
        assert a[0].dense.shape == b[0].dense.shape


def causal_with_past(q, k, v, past):
    """A mask that says "causal" for several tokens on a past, as transformers writes it."""
    keys, queries = torch.arange(k.shape[2]), torch.arange(k.shape[2] - q.shape[2], k.shape[2])
    mask = keys[None, None, None, :] <= queries[None, None, :, None]
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


# ---- bad input


def test_a_cache_of_another_configuration():
    model, ids = PlainDecoder(layers=1), prompt(20)
    with torch.no_grad():
        _, past = torch.compile(model, backend=make_backend("default"))(ids)
        torch._dynamo.reset()
        with pytest.raises(Exception, match=r"RewriteError: .*another configuration \(group: 128 / 16, "):
            torch.compile(model, backend=make_backend("minikv"))(ids[:, :1], past)


def test_another_batch_size_on_a_live_cache():
    model = PlainDecoder(layers=1)
    call = torch.compile(model, backend=make_backend())
    with torch.no_grad():
        _, past = call(prompt(20, batch=2))
        with pytest.raises(Exception, match=r"do not fit the compressed cache \[2, 2, .*use a cache for the batch"):
            call(prompt(1, batch=3), past)


def test_empty_prompt():
    model = PlainDecoder(layers=1)
    with pytest.raises(Exception, match="prompt is empty"), torch.no_grad():
        torch.compile(model, backend=make_backend())(prompt(0))


@pytest.mark.parametrize("strict", [False, True])
def test_not_finite_values_are_reported(strict):
    model = PlainDecoder(layers=1)
    with torch.no_grad():
        model.tokens.weight[5] = torch.nan
    ids = torch.randint(6, 90, (1, 200))
    ids[0, [3, 77]] = 5
    call = torch.compile(model, backend=make_backend("default", strict=strict))
    if strict:
        with pytest.raises(ValueError, match="NaN or inf in 2 tokens in the keys of layer 0"), torch.no_grad():
            call(ids)
        return
    with pytest.warns(UserWarning, match="NaN or inf in 2 tokens in the keys of layer 0"), torch.no_grad():
        _, past = call(ids)
    assert past[0][0].dequantize()[0, :, 78:].isfinite().all()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        call(ids[:, :1], past)  # reported once


def test_arguments_of_the_backend():
    with pytest.raises(TypeError, match="a MiniKVConfig or the name of a preset, not int"):
        MiniKVBackend(4)
    with pytest.raises(ConfigError, match="'best'"):
        MiniKVBackend("best")
    with pytest.raises(Exception, match=r"backend=MiniKVBackend\(\), not the class"), torch.no_grad():
        torch.compile(PlainDecoder(layers=1), backend=MiniKVBackend)(prompt(4))
    assert MiniKVBackend().config == MiniKVBackend("default").config == MiniKVConfig()
    assert MiniKVBackend("minikv").config == MiniKVConfig.preset("minikv")
    with pytest.raises(Exception, match="no_such"), torch.no_grad():
        torch.compile(PlainDecoder(layers=1), backend=MiniKVBackend(inner="no_such"))(prompt(4))


def test_a_graph_without_attention_is_left_to_the_inner_compiler():
    backend = make_backend(strict=True)
    model = nn.Linear(4, 4)
    x = torch.randn(2, 4)
    torch.testing.assert_close(torch.compile(model, backend=backend)(x), model(x))  # gradients are fine here
    assert backend.graphs == [] and not is_active(model)
