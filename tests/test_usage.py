"""What people do with a cache, through transformers' own `generate` or their own loop."""

import copy
import threading

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn

from minikv_compile import KVTensor, MiniKVBackend, MiniKVConfig

from .helpers import (
    PAD,
    VOCAB,
    PlainDecoder,
    all_compressed,
    captured,
    compiled,
    greedy,
    kinds,
    make_backend,
    prompt,
    run_plain,
    tiny,
)


def both(model, run, preset="lossless", **changes):
    """`run(model)` before and after compiling it."""
    expected, backend = run(model), make_backend(preset, **changes)
    return expected, run(compiled(model, backend)), backend


def test_beam_search_keeps_the_beams_apart():
    ids = prompt(30, batch=2)

    def run(model):
        return model.generate(ids, max_new_tokens=12, num_beams=3, do_sample=False, return_dict_in_generate=True)

    expected, got, _ = both(tiny(), run)
    assert torch.equal(got.sequences, expected.sequences)
    assert all_compressed(got.past_key_values)


@pytest.mark.parametrize("settings", [dict(num_return_sequences=3, do_sample=True), dict(do_sample=True, top_k=5)])
def test_sampling(settings):
    ids = prompt(30)

    def run(model):
        torch.manual_seed(3)
        return model.generate(ids, max_new_tokens=12, **settings)

    expected, got, _ = both(tiny(), run)
    assert torch.equal(got, expected)


def test_streaming():
    ids, streamed = prompt(20), []

    class Streamer(transformers.generation.streamers.BaseStreamer):
        def put(self, value):
            streamed.extend(value.flatten().tolist())

        def end(self):
            streamed.append(None)

    out = compiled(tiny(), make_backend()).generate(ids, max_new_tokens=8, do_sample=False, streamer=Streamer())
    assert streamed == [*out[0].tolist(), None]


def test_prompt_lookup_crops_what_was_not_accepted():
    ids = prompt(20).repeat(1, 4)

    def run(model):
        return greedy(model, ids, new=40, prompt_lookup_num_tokens=4)

    expected, got, _ = both(tiny(), run)
    assert torch.equal(got.sequences, expected.sequences)


def test_assisted_by_another_model():
    ids, assistant = prompt(40), tiny(layers=1)

    def run(model):
        return greedy(model, ids, new=20, assistant_model=assistant)

    expected, got, _ = both(tiny(), run)
    assert torch.equal(got.sequences, expected.sequences)


def test_a_prefix_is_continued_twice():
    """By a deep copy of its cache, and by the cache itself afterwards."""
    prefix, ends = prompt(300), [prompt(10), prompt(20)]
    model = compiled(tiny(), make_backend("default"))
    with torch.no_grad():
        cache = model(prefix, use_cache=True).past_key_values
    first = [greedy(model, torch.cat([prefix, end], 1), past_key_values=copy.deepcopy(cache)).sequences for end in ends]
    again = [greedy(model, torch.cat([prefix, end], 1), past_key_values=copy.deepcopy(cache)).sequences for end in ends]
    last = greedy(model, torch.cat([prefix, ends[0]], 1), past_key_values=cache).sequences
    assert all(map(torch.equal, first, again)) and torch.equal(first[0], last)


@torch.no_grad()
@pytest.mark.parametrize("preset", ["lossless", "default"])
def test_a_reference_to_a_prefix_is_continued_twice(preset):
    """By tuples of keys and values, which nobody copies."""
    prefix, ends = prompt(300), [prompt(10), prompt(150)]
    plain = PlainDecoder()
    model = torch.compile(plain, backend=make_backend(preset))
    fresh = [run_plain(model, end, 1, past=model(prefix)[1])[0] for end in ends]
    _, past = model(prefix)
    for _ in range(2):
        assert all(torch.equal(run_plain(model, end, 1, past=past)[0], one) for end, one in zip(ends, fresh, strict=True))
    if preset == "lossless":
        whole = [plain(torch.cat([prefix, end], 1))[0][:, prefix.shape[1] :] for end in ends]
        for one, other in zip(fresh, whole, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


def test_several_sequences_of_a_padded_batch():
    ids = prompt(30, batch=2)
    ids[0, :9] = PAD

    def run(model):
        torch.manual_seed(3)
        mask = (ids != PAD).long()
        return model.generate(ids, attention_mask=mask, max_new_tokens=12, num_return_sequences=3, do_sample=True)

    expected, got, backend = both(tiny(), run)
    assert torch.equal(got, expected) and got.shape == (6, 42)
    assert {kind for graph in kinds(backend) for kind in graph} == {"prefill", "decode"}


def test_flex_attention_is_left_alone():
    model, ids = tiny(), prompt(60)
    model.set_attn_implementation("flex_attention")
    expected, got, backend = both(model, lambda model: greedy(model, ids).sequences)
    assert torch.equal(got, expected)
    assert not any(site.rewritten for graph in backend.graphs for site in graph)
    assert any("flex_attention" in site.reason for graph in backend.graphs for site in graph), kinds(backend)


def test_an_encoder_is_left_alone():
    config = transformers.BertConfig(
        vocab_size=VOCAB, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    model, backend = transformers.BertModel(config).eval(), make_backend()
    with torch.no_grad():
        expected, got = (m(prompt_ids)[0] for prompt_ids in [prompt(20)] for m in (model, torch.compile(model, backend=backend)))
    torch.testing.assert_close(got, expected)
    assert any(backend.graphs) and not any(site.rewritten for graph in backend.graphs for site in graph)


def test_encoder_and_decoder():
    """Attention to the encoder is left alone, the decoder's own is compressed."""
    config = transformers.BartConfig(
        vocab_size=VOCAB, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=64, decoder_ffn_dim=64, pad_token_id=PAD, bos_token_id=1, eos_token_id=None, decoder_start_token_id=1,
        forced_eos_token_id=None, init_std=0.2,
    )  # fmt: skip
    model, ids = transformers.BartForConditionalGeneration(config).eval(), prompt(20)
    model.generation_config.forced_eos_token_id = None
    expected, got, backend = both(model, lambda model: model.generate(ids, max_new_tokens=8, do_sample=False))
    assert torch.equal(got, expected)
    sites = [site for graph in backend.graphs for site in graph]
    own = [site for site in sites if "encoder_attn" not in site.where and ".encoder." not in f".{site.where}"]
    assert own and all(site.rewritten for site in own), kinds(backend)
    assert not any(site.rewritten for site in sites if site not in own) and len(sites) > len(own)


@pytest.mark.parametrize("chunk", [64, 300])
def test_chunked_prefill(chunk):
    ids = prompt(700)

    def run(model):
        return greedy(model, ids, new=16, prefill_chunk_size=chunk)

    expected, got, backend = both(tiny(), run)
    assert torch.equal(got.sequences, expected.sequences)
    assert all_compressed(got.past_key_values)
    assert {"prefill", "extend", "decode"} == {kind for graph in kinds(backend) for kind in graph}


def test_two_long_turns_are_one_conversation():
    first, second, model = prompt(2048), prompt(2048), tiny()
    expected = greedy(model, torch.cat([first, second], 1), new=16).sequences
    compiled(model, make_backend())
    with torch.no_grad():
        cache = model(first, use_cache=True).past_key_values
    got = greedy(model, torch.cat([first, second], 1), new=16, past_key_values=cache)
    assert torch.equal(got.sequences, expected)


def test_few_graphs_for_many_prompts():
    model = compiled(tiny(), make_backend("default"))
    for length in (33, 150, 401, 77, 260):
        greedy(model, prompt(length), new=100)
    assert captured() == (3, 0) or captured() == (2, 0), captured()


def test_batch_select_and_repeat():
    model, ids = compiled(tiny(), make_backend()), prompt(300, batch=3)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        alone = greedy(model, ids[1:2], new=8).sequences
        cache.batch_select_indices(torch.tensor([1]))
        assert cache.layers[0].keys.shape[0] == 1 and isinstance(cache.layers[0].keys, KVTensor)
        cache.crop(-1)
        got = greedy(model, ids[1:2], new=8, past_key_values=cache).sequences
    assert torch.equal(got, alone)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_weights_of_torchao(bits):
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_

    model, ids = tiny(heads=4, kv_heads=2, head_dim=32), prompt(60)
    # torchao's int4 kernels are for GPUs, and some CPUs; this is its format that runs everywhere.
    quantize_(model, Int8WeightOnlyConfig() if bits == 8 else IntxWeightOnlyConfig(torch.int4, PerGroup(32)))
    expected, got, backend = both(model, lambda m: greedy(m, ids))
    assert torch.equal(got.sequences, expected.sequences)
    assert kinds(backend) == [["prefill"] * 2, ["decode"] * 2]


def test_graph_breaks_inside_of_the_model():
    """Each part is compiled by itself; every site is still rewritten, but where another part made its mask."""
    model, ids = tiny(layers=3), prompt(60)
    expected = greedy(model, ids).sequences
    inner = model.model.layers[1].forward
    model.model.layers[1].forward = torch._dynamo.disable(inner)
    backend = make_backend()
    got = greedy(compiled(model, backend), ids)
    assert torch.equal(got.sequences, expected)
    assert captured()[1] >= 1
    reasons = {site.reason for graph in backend.graphs for site in graph}
    masked = any("its mask is not understood (built by L_" in reason for reason in reasons)
    # transformers made masks in every traced graph before it learned to leave out causal ones there.
    assert masked == (Version(transformers.__version__) < Version("5.20")) and (masked or reasons == {""})
    for layer in (0, 2):
        assert isinstance(got.past_key_values.layers[layer].keys, KVTensor) != masked


def test_two_models_and_two_configurations_in_one_process():
    ids = prompt(300)
    one, two = tiny(), tiny("qwen3", layers=3)
    expected = [greedy(model, ids).sequences for model in (one, two)]
    backends = make_backend(), make_backend("default")
    compiled(one, backends[0]), compiled(two, backends[1])
    assert torch.equal(greedy(one, ids).sequences, expected[0])
    assert greedy(two, ids).past_key_values.layers[0].keys.config == MiniKVConfig.preset("default")
    assert torch.equal(greedy(one, ids).sequences, expected[0])
    assert [len(graph) for backend in backends for graph in backend.graphs] == [2, 2, 3, 3]


def test_two_threads():
    models = [compiled(tiny(layers=n), MiniKVBackend(MiniKVConfig.preset("lossless"), "eager")) for n in (1, 2)]
    ids = prompt(60)
    expected = []
    for model in models:
        plain = copy.deepcopy(model)
        plain._compiled_call_impl = None
        expected.append(greedy(plain, ids).sequences)
    results = [None, None]

    def run(i):
        results[i] = greedy(models[i], ids).sequences

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(map(torch.equal, results, expected))


class Wrapped(nn.Module):
    """A model inside of another: what reward models and adapters do."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, ids, past=None):
        out = self.inner(ids, past_key_values=past, use_cache=True)
        return out.logits, out.past_key_values


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_own_loop_around_a_wrapped_model(context):
    model, ids = Wrapped(tiny()), prompt(40)
    step = torch.compile(model, backend=make_backend())
    with context():
        expected = greedy(model.inner, ids, new=10).sequences[:, 40:]
        logits, past = step(ids)
        tokens = [logits[:, -1:].argmax(-1)]
        for _ in range(9):
            logits, past = step(tokens[-1], past)
            tokens.append(logits[:, -1:].argmax(-1))
    assert torch.equal(torch.cat(tokens, 1), expected)
    assert int(tokens[0]) < VOCAB and all_compressed(past)
