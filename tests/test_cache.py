"""`MiniKVCache`: fixed capacity, lengths on the device, one mechanism with the other idioms."""

import copy
import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import CompileConfig

from minikv_compile import MiniKVBackend, MiniKVCache, MiniKVConfig, cache_report, explain, is_active
from minikv_compile.cache import MiniKVLayer
from minikv_compile.fixed import allocate
from minikv_compile.ops import ROLES

from . import zoo
from .helpers import ARCHITECTURES, PAD, captured, compiled, greedy, kinds, logits_of, make_backend, prompt, tiny
from .test_ops import compress, left_padding

minikv = torch.ops.minikv
DECODE = ["decode", "decode"]


def generate(model, ids, cache, new=16, **inputs):
    return greedy(model, ids, new, past_key_values=cache, disable_compile=True, **inputs)


def padded(lengths, seq):
    """ids and attention_mask of a left-padded batch."""
    mask = left_padding(lengths, seq).long()
    return torch.where(mask.bool(), prompt(seq, len(lengths)), PAD), mask


@torch.no_grad()
def steps(model, ids, prompt_length, cache, chunk=1, **inputs):
    """Logits of the newest token after the prompt, and after each chunk of the other tokens: [batch, chunks, vocab]."""
    ends = [prompt_length, *range(prompt_length + chunk, ids.shape[1] + 1, chunk)]
    logits, start = [], 0
    for end in ends:
        out = model(ids[:, start:end], past_key_values=cache, use_cache=True, **inputs)
        logits.append(out.logits[:, -1])
        start, cache = end, out.past_key_values
    return torch.stack(logits, 1)


# ---- the same as without it


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tokens_equal_eagers(architecture):
    model, ids = tiny(architecture), prompt(40, batch=2)
    expected = greedy(model, ids, 24)
    backend = make_backend()
    got = generate(compiled(model, backend), ids, MiniKVCache(model, 64, 2, "lossless"), 24)
    assert torch.equal(got.sequences, expected.sequences)
    assert kinds(backend) == [["prefill", "prefill"], DECODE] and captured() == (2, 0)
    assert {site.idiom for graph in backend.graphs for site in graph} == {"MiniKVCache"} and is_active(model)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "falcon", "opt", "cohere2", "gptj", "codegen", "bamba"])
def test_families(family):
    """Also those of which something is left alone: the cache then serves the model's own attention."""
    model = zoo.build(family)
    ids, mask = padded([20, 13], 20)
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None)
    cache = MiniKVCache(model, 40, 2, "lossless")
    got = compiled(model, make_backend()).generate(
        ids, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None, past_key_values=cache,
        disable_compile=True,
    )  # fmt: skip
    assert torch.equal(got, expected)


def test_stores_what_a_dynamic_cache_stores(preset="minikv"):
    """Over several flushes. (Not to the bit: regions differ in their capacity, and some CPUs add up by its size.)"""
    model, ids = tiny(), prompt(480)
    expected = steps(compiled(model, make_backend(preset)), ids, 300, None)
    cache = MiniKVCache(model, 640, config=preset)
    before = captured()[0]
    torch.testing.assert_close(steps(model, ids, 300, cache), expected, atol=2e-5, rtol=1e-5)
    assert captured() == (before + 2, 0)
    assert int(cache.layers[0].key[-1][0, 2]) >= 256


def test_padded_batch(preset="minikv"):
    model = tiny()
    ids, mask = padded([300, 170, 260], 300)
    backend = make_backend(preset)
    expected = greedy(compiled(model, backend), ids, 40, attention_mask=mask)
    cache = MiniKVCache(model, 400, 3, preset)
    got = generate(model, ids, cache, 40, attention_mask=mask)
    assert torch.equal(logits_of(got), logits_of(expected))
    assert kinds(backend)[-2:] == [["prefill", "prefill"], DECODE]
    assert cache.layers[1].padding.tolist() == [0, 130, 40]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("with_mask", [False, True])
def test_own_loop(attention, with_mask):
    """Masks are then built in the graph, from the length on the device."""
    model = tiny(layers=1, attn_implementation=attention)
    ids, mask = (prompt(60, 2), None) if not with_mask else padded([60, 51], 60)
    positions = {} if mask is None else {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}

    def run(cache):
        out, logits, past = None, [], cache
        for start, end in [(0, 40), *((i, i + 1) for i in range(40, 60))]:
            inputs = {name: x[:, start:end] for name, x in positions.items()}
            if mask is not None:
                inputs["attention_mask"] = mask[:, :end]
            with torch.no_grad():
                out = model(ids[:, start:end], past_key_values=past, use_cache=True, **inputs)
            past = out.past_key_values
            logits.append(out.logits[:, -1])
        return torch.stack(logits, 1)

    expected, backend = run(None), make_backend()
    got = None
    compiled(model, backend)
    got = run(MiniKVCache(model, 64, 2, "lossless"))
    assert torch.allclose(got, expected, atol=1e-4)
    assert kinds(backend)[0] == ["prefill"] and all(kind == ["decode"] for kind in kinds(backend)[1:])


@pytest.mark.parametrize(("preset", "chunk"), [("lossless", 2), ("default", 200)])
def test_many_tokens_on_a_past(preset, chunk):
    model, ids = tiny(layers=1), prompt(320 + 2 * max(chunk, 10) // chunk * chunk)
    expected = steps(compiled(model, make_backend(preset)), ids, 320, None, chunk)
    backend = make_backend(preset)
    got = steps(compiled(model, backend), ids, 320, MiniKVCache(model, 1024, config=preset), chunk)
    assert torch.allclose(got, expected, atol=1e-5)
    assert kinds(backend) == [["prefill"], ["extend"]]


def test_no_recompiles():
    """Two prompts, two turns, many steps: a prefill of any length, a decode step, an extension of any length."""
    model, backend = tiny(), make_backend("default")
    cache = MiniKVCache(model, 512, config="default")
    compiled(model, backend)
    counts = []
    for length in (100, 130, 150):
        cache.reset()
        steps(model, prompt(length + 30), length, cache)
        counts.append(captured()[0])
    assert counts == [2, 3, 3] and captured()[1] == 0
    assert [graph for graph in kinds(backend) if graph == DECODE] == [DECODE]


def test_generate_compiles_decode_by_name(monkeypatch):
    """The prefill then runs eagerly, so that its keys are rounded to nearest; decode through Inductor."""
    model, ids = tiny(layers=1), prompt(300)
    with monkeypatch.context() as patch:
        patch.setattr("minikv_compile.ops.feedback_factors", lambda *args: None)
        expected = greedy(compiled(copy.deepcopy(model), make_backend("default")), ids, 30)
    config = CompileConfig(backend="minikv", mode="default", fullgraph=True)
    config._compile_all_devices = True
    before = captured()[0]
    got = greedy(model, ids, 30, past_key_values=MiniKVCache(model, 400), compile_config=config)
    assert torch.allclose(logits_of(got), logits_of(expected), atol=1e-3)
    assert is_active(model) and captured() == (before + 1, 0)


@pytest.mark.parametrize("preset", ["lossless", "default"])
def test_without_the_backend(preset):
    """Eager: dense attention over what is stored, which knows of no correction."""
    model, ids = tiny(layers=1), prompt(340)
    config = MiniKVConfig.preset(preset, noise_correction=False, error_feedback=False)
    expected = steps(compiled(copy.deepcopy(model), MiniKVBackend(config, "eager")), ids, 300, None)
    got = steps(model, ids, 300, MiniKVCache(model, 480, config=config))
    assert torch.allclose(got, expected, atol=1e-3)


def test_sliding_layers_keep_transformers_own():
    model = zoo.build("gemma3_text") if "gemma3_text" in zoo.FAMILIES else zoo.build("gemma2")
    cache = MiniKVCache(model, 64, 1, "lossless")
    types = [type(layer).__name__ for layer in cache.layers]
    assert sorted(set(types)) == ["MiniKVLayer", "StaticSlidingWindowLayer"]
    ids = torch.randint(2, zoo.VOCAB, (1, 20))
    expected = model.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=None)
    got = compiled(model, make_backend()).generate(
        ids, max_new_tokens=20, do_sample=False, eos_token_id=None, past_key_values=cache, disable_compile=True
    )
    assert torch.equal(got, expected)


@pytest.mark.parametrize("skipped", [0, -1])
def test_skipped_layers(skipped):
    model = tiny(layers=2)
    ids, mask = padded([40, 33], 40)
    expected, backend = greedy(model, ids, attention_mask=mask), make_backend(skip_layers=(skipped,))
    cache = MiniKVCache(model, 64, 2, backend.config)
    types = [type(layer).__name__ for layer in cache.layers]
    assert types == (["DenseLayer", "MiniKVLayer"] if skipped == 0 else ["MiniKVLayer", "DenseLayer"])
    got = generate(compiled(model, backend), ids, cache, attention_mask=mask)
    assert torch.equal(got.sequences, expected.sequences)
    assert [sorted(graph) for graph in kinds(backend)] == [
        ["listed in skip_layers", "prefill"], ["decode", "listed in skip_layers"]
    ]  # fmt: skip
    cache.crop(-5)
    assert [int(layer.get_seq_length()) for layer in cache.layers] == [50, 50]


# ---- errors, none silent


@pytest.mark.parametrize("sizes", [(0, 1), (-5, 1), (40, 0)])
def test_no_room_at_all(sizes):
    with pytest.raises(ValueError, match="must be 1 or more"):
        MiniKVCache(tiny(layers=1), *sizes)


def test_too_many_tokens():
    model = compiled(tiny(layers=1), make_backend("default"))
    with pytest.raises(ValueError, match="prompt of 41 tokens, but room for 40"):
        generate(model, prompt(41), MiniKVCache(model, 40))
    with pytest.raises(ValueError, match="is full: it has room for 40 tokens"):
        generate(model, prompt(30), MiniKVCache(model, 40), 12)
    assert generate(model, prompt(30), MiniKVCache(model, 40), 11).sequences.shape[1] == 41


def test_too_many_tokens_without_the_backend():
    model = tiny(layers=1)
    with pytest.raises(ValueError, match="is full: it has room for 40 tokens"):
        generate(model, prompt(30), MiniKVCache(model, 40), 12)


def test_policies_need_the_backend():
    model, cache = tiny(layers=1), None
    with pytest.raises(ValueError, match="the prefill must run through the minikv backend"):
        generate(model, prompt(200), MiniKVCache(model, 300, config="minikv"))
    cache = MiniKVCache(model, 300, config=MiniKVConfig(policy="recent", recent=0.5, heavy=0.0))
    with pytest.raises(RuntimeError, match="would take dropped tokens for zeros"):
        generate(model, prompt(200), cache)


def test_another_configuration():
    model = compiled(tiny(layers=1), make_backend("default"))
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="made under another configuration"):
        generate(model, prompt(20), MiniKVCache(model, 64, config="lossless"))


def test_another_batch():
    model = compiled(tiny(), make_backend("default"))
    with pytest.raises(ValueError, match="storages for a batch of 1"):
        generate(model, prompt(20, 2), MiniKVCache(model, 64))


@pytest.mark.parametrize("policy", ["keep_all", "recent"])
def test_a_padded_prompt_that_ran_eagerly(policy):
    """The cache took its padding for tokens; a mask that says otherwise is not ignored."""
    model = tiny(layers=1)
    ids, mask = padded([200, 150], 200)
    cache = MiniKVCache(model, 300, 2, MiniKVConfig(policy=policy))
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
    compiled(model, MiniKVBackend(cache.config, "eager"))
    with pytest.raises(ValueError, match="mask does not fit the cache of fixed capacity"), torch.no_grad():
        model(ids[:, -1:], attention_mask=torch.nn.functional.pad(mask, (0, 1), value=1), past_key_values=cache)


def test_a_prompt_with_a_mask_of_its_own():
    model = compiled(tiny(layers=1), make_backend())
    mask = torch.ones(1, 1, 20, 20, dtype=torch.bool).tril()
    mask[..., 10:, :5] = False
    with pytest.raises(ValueError, match="must be causal, with padding at most"), torch.no_grad():
        model(prompt(20), attention_mask=mask, past_key_values=MiniKVCache(model, 64, config="lossless"))


# ---- what people do with a cache


def test_reset_keeps_the_storages():
    model, ids = compiled(tiny(layers=1), make_backend("default")), prompt(300)
    cache = MiniKVCache(model, 400)
    addresses = [t.data_ptr() for layer in cache.layers for t in layer.tensors()]
    assert not cache.is_initialized
    first = generate(model, ids, cache)
    assert cache.get_seq_length() == 315 and cache.is_initialized
    cache.reset()
    assert cache.get_seq_length() == 0 and not cache.is_initialized
    generate(model, prompt(150), cache)
    cache.reset()
    assert torch.equal(generate(model, ids, cache).sequences, first.sequences)
    assert [t.data_ptr() for layer in cache.layers for t in layer.tensors()] == addresses


def test_two_turns_of_generate():
    model, ids, more = tiny(layers=1), prompt(40, 2), prompt(9, 2)

    def talk(cache):
        inputs = {"past_key_values": cache, "disable_compile": True} if cache is not None else {}
        first = greedy(model, ids, 12, **inputs)
        inputs["past_key_values"] = first.past_key_values
        again = torch.cat([first.sequences, more], 1)  # the padding token may be among them, as a token
        return greedy(model, again, 12, attention_mask=torch.ones_like(again), **inputs).sequences

    expected, backend = talk(None), make_backend()
    compiled(model, backend)
    assert torch.equal(talk(MiniKVCache(model, 100, 2, "lossless")), expected)
    assert kinds(backend) == [["prefill"], ["decode"], ["extend"]]


def test_a_prompt_that_is_cut():
    model, ids = tiny(layers=1), prompt(60)
    expected = steps(model, torch.cat([ids[:, :30], ids[:, 50:]], 1), 30, None)
    cache = MiniKVCache(model, 100, config="lossless")
    steps(model, ids[:, :50], 50, cache)
    cache.crop(-20)
    got = steps(model, ids[:, 50:], 1, cache)  # dense attention
    assert torch.allclose(got, expected[:, 1:], atol=1e-5)


def test_beam_search():
    model, ids = tiny(layers=1), prompt(30, batch=2)
    expected = model.generate(ids, max_new_tokens=12, num_beams=3, do_sample=False)
    cache = MiniKVCache(model, 64, 6, "lossless")
    got = compiled(model, make_backend()).generate(
        ids, max_new_tokens=12, num_beams=3, do_sample=False, past_key_values=cache, disable_compile=True
    )
    assert torch.equal(got, expected)


@pytest.mark.parametrize("change", ["select", "repeat", "reorder"])
def test_rows(change):
    model, ids = compiled(tiny(layers=1), make_backend("default")), prompt(300, 3)
    cache = MiniKVCache(model, 400, 3)
    generate(model, ids, cache, 20)
    before = cache.layers[0].keys.dequantize()
    rows = {"select": [2, 0], "repeat": [0, 0, 1, 1, 2, 2], "reorder": [1, 2, 0]}[change]
    if change == "select":
        cache.batch_select_indices(torch.tensor(rows))
    elif change == "repeat":
        cache.batch_repeat_interleave(2)
    else:
        cache.reorder_cache(torch.tensor(rows))
    assert cache.batch_size == len(rows)
    assert torch.equal(cache.layers[0].keys.dequantize(), before[rows])


def test_crop_and_go_on():
    model, ids = compiled(tiny(layers=1), make_backend()), prompt(60)
    expected = steps(model, ids, 40, MiniKVCache(model, 100, config="lossless"))
    cache = MiniKVCache(model, 100, config="lossless")
    steps(model, torch.cat([ids[:, :50], prompt(30)], 1), 40, cache)
    cache.crop(-30)
    assert cache.get_seq_length() == 50
    assert torch.allclose(steps(model, ids[:, 50:], 1, cache), expected[:, 11:], atol=1e-5)


def test_crop_gives_up_no_quantized_token():
    model = compiled(tiny(layers=1), make_backend("default"))
    cache = MiniKVCache(model, 400)
    steps(model, prompt(330), 300, cache)  # 256 of them in the tier
    before = cache.layers[0].keys.dequantize()
    cache.crop(-64)
    assert torch.equal(cache.layers[0].keys.dequantize(), before[:, :, :266])
    with pytest.raises(ValueError, match="Cannot roll back 200 tokens"):
        cache.crop(-200)


def test_a_copy_goes_its_own_way():
    model, ids = compiled(tiny(layers=1), make_backend("default")), prompt(330)
    cache = MiniKVCache(model, 400)
    steps(model, ids[:, :310], 300, cache)
    branch = copy.deepcopy(cache)
    expected = steps(model, ids[:, 310:], 1, branch)
    steps(model, prompt(20), 1, branch)
    assert torch.equal(steps(model, ids[:, 310:], 1, cache), expected)


def test_prefill_row_by_row_decode_together(preset="minikv"):
    """Against a padded batch; and the rows taken out again go on alone."""
    lengths, seq = [300, 170, 260], 300
    ids, mask = padded(lengths, seq)
    model = compiled(tiny(layers=1), make_backend(preset))
    together, row = MiniKVCache(model, 400, 3, preset), MiniKVCache(model, 400, 1, preset)
    for i in (1, 2, 0):  # the longest last: the others are moved
        row.reset()
        with torch.no_grad():
            model(ids[i : i + 1, seq - lengths[i] :], past_key_values=row)
        together.write_rows(i, row)
    batch = MiniKVCache(model, 400, 3, preset)
    with torch.no_grad():
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        model(ids, attention_mask=mask, position_ids=positions, past_key_values=batch)
    next_ids = prompt(1, 3)

    def step(cache, rows=slice(None)):
        with torch.no_grad():
            return model(
                next_ids[rows], attention_mask=torch.nn.functional.pad(mask, (0, 1), value=1)[rows],
                position_ids=torch.tensor(lengths)[rows, None], past_key_values=cache,
            ).logits  # fmt: skip

    alone = together.rows(1, 2)
    got = step(together)
    assert torch.allclose(got, step(batch), atol=1e-3)
    assert torch.allclose(step(alone, slice(1, 2)), got[1:2], atol=1e-5)
    for mine, theirs in zip(together.layers, batch.layers, strict=True):
        assert torch.equal(mine.padding, theirs.padding) and torch.equal(mine.keys.kept_mask(), theirs.keys.kept_mask())


def test_rows_that_do_not_fit():
    model = tiny(layers=1)
    cache = MiniKVCache(model, 64, 2)
    with pytest.raises(ValueError, match="Rows 1 to 3, but this cache has 2"):
        cache.write_rows(1, MiniKVCache(model, 64, 2))
    with pytest.raises(ValueError, match="differ in configuration"):
        cache.write_rows(0, MiniKVCache(model, 65, 2))


@pytest.mark.parametrize("preset", ["lossless", "minikv"])
def test_save_and_load(preset):
    model, ids = compiled(tiny(layers=1), make_backend(preset)), prompt(330)
    cache, file = MiniKVCache(model, 400, config=preset), io.BytesIO()
    steps(model, ids[:, :310], 300, cache)
    torch.save(cache.state_dict(), file)
    file.seek(0)
    loaded = MiniKVCache(model, 400, config=preset)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(steps(model, ids[:, 310:], 1, loaded), steps(model, ids[:, 310:], 1, cache))


def test_load_what_does_not_fit():
    model = tiny(layers=1)
    state = MiniKVCache(model, 64).state_dict()
    with pytest.raises(ValueError, match="of format 99: this version reads 5"):
        MiniKVCache(model, 64).load_state_dict({**state, "format": 99})
    with pytest.raises(ValueError, match="another configuration"):
        MiniKVCache(model, 64, config="minikv").load_state_dict(state)
    with pytest.raises(ValueError, match="Saved for max_cache_len 64 and batch_size 1"):
        MiniKVCache(model, 64, 2).load_state_dict(state)


def test_report_counts_all_bytes():
    model = compiled(tiny(layers=1), make_backend("default"))
    cache = MiniKVCache(model, 2000)
    generate(model, prompt(1900), cache)
    report = cache_report(cache)
    held = {t.data_ptr(): t.untyped_storage().nbytes() for layer in cache.layers for t in layer.tensors()}
    assert 0 <= sum(held.values()) - report.bytes <= 32 * len(cache)  # but for the counters
    assert report.layers[0].tokens == 1915 and report.layers[0].kept == [1915]
    assert report.compression > 0.5


def test_explain():
    model = tiny()
    cache = MiniKVCache(model, 64)
    found = explain(model, input_ids=prompt(20), past_key_values=cache)
    assert [(site.kind, site.idiom) for site in found.sites] == [
        (kind, "MiniKVCache") for kind in ("prefill",) * 2 + ("decode",) * 2
    ]


# ---- the ops


def test_padding_of_a_mask():
    valid = left_padding([7, 3], 7)
    mask = valid[:, None, None] & torch.ones(7, 7, dtype=torch.bool).tril()
    assert torch.equal(minikv.padding_of(mask), valid)
    assert torch.equal(minikv.padding_of(torch.where(mask, 0.0, torch.finfo(torch.float32).min)), valid)
    for wrong in (torch.ones(1, 1, 5, 5, dtype=torch.bool), torch.randn(1, 1, 5, 5)):
        with pytest.raises(ValueError, match="causal"):
            minikv.padding_of(wrong)


@given(
    preset=st.sampled_from(["lossless", "default", "minikv", "mikv", "mikv4"]), prompt_length=st.integers(1, 300),
    chunks=st.lists(st.sampled_from([1, 1, 2, 3, 60, 130, 200]), max_size=6), dim=st.sampled_from([16, 80]),
    batch=st.integers(1, 2), seed=st.integers(0, 9),
)  # fmt: skip
def test_any_chunks_store_what_a_kv_tensor_stores(preset, prompt_length, chunks, dim, batch, seed):
    torch.manual_seed(seed)
    config = MiniKVConfig.preset(preset, **({"important": 0.9} if preset in ("mikv", "mikv4") else {}))
    layer = MiniKVLayer(config, 1600, batch, 2, dim, torch.float32, torch.device("cpu"))
    k, v = torch.randn(2, batch, 2, prompt_length, dim)
    scores = None if config.observed_queries is None else torch.rand(batch, 2, prompt_length)
    q_range = torch.rand(batch, 2, dim) + 0.1
    lengths = torch.randint(1, prompt_length + 1, (batch,)).tolist()
    valid = left_padding(lengths, prompt_length)
    rows = minikv.align_rows(valid)
    minikv.store_prompt(
        k,
        v,
        scores,
        *rows,
        layer.key,
        layer.value,
        layer.important,
        layer.kept,
        layer.length,
        layer.padding,
        0,
        1,
        1600,
        config.to_json(),
        q_range,
    )
    layer.filled = True
    tensors = list(compress(config, k, v, scores, valid, q_range=q_range))
    q_heads, out = 4, None
    for n in [*chunks, 1]:  # a `KVTensor` flushes when it needs the room, so before the last
        q, (k, v) = torch.randn(batch, q_heads, n, dim), torch.randn(2, batch, 2, n, dim)
        kv = [t.reserve(n) for t in tensors]
        expected = minikv.decode_attention(
            q, k, v, kv[0].packed, kv[1].packed, kv[0].dense, kv[1].dense,
            kv[0].state, kv[0].shape[2], 0.3, config.to_json(),
        )  # fmt: skip
        tensors = [x.longer(n) for x in kv]
        out = minikv.extend_attention(
            q, k, v, layer.key, layer.value, layer.length, layer.padding, None, 1600, 0.3, config.to_json()
        )
        assert torch.allclose(out, expected, atol=1e-5)
    for mine, theirs in zip((layer.keys, layer.values), tensors, strict=True):
        assert mine.shape == theirs.shape
        assert torch.equal(mine.dequantize(), theirs.dequantize())
        assert torch.equal(mine.kept_mask(), theirs.kept_mask())


def test_storages_hold_the_capacity_exactly():
    """As many whole blocks as could ever be quantized."""
    config = MiniKVConfig.preset("default")
    for length in (50, 196, 197, 1000, 8192):
        key = allocate(config, ROLES[0], 1, 2, length, 32, torch.float32, torch.device("cpu"))
        assert key[0].shape[2] == max(1, (length - 132) // 128)


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("preset", ["default", "minikv"])
def test_one_captured_step_serves_a_thousand_tokens(preset):
    """Captured once by the user, replayed with nothing of ours running on the host."""
    model = tiny(head_dim=64, dtype=torch.bfloat16).cuda()
    backend = make_backend(preset, inner="inductor")
    compiled(model, backend)
    ids = prompt(300, 2).cuda()
    cache, twin = (MiniKVCache(model, 1400, 2, preset) for _ in range(2))
    token = torch.ones(2, 1, dtype=torch.int64, device="cuda")

    @torch.no_grad()
    def step(cache):
        return model(token, past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1, keepdim=True)

    with torch.no_grad():
        for each in (cache, twin):
            token.copy_(model(ids, past_key_values=each, use_cache=True).logits[:, -1].argmax(-1, keepdim=True))
    first = token.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(cache)
    torch.cuda.current_stream().wait_stream(stream)
    cache.crop(-3)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        token.copy_(step(cache))
    graphs = captured()
    token.copy_(first)
    replayed = []
    for _ in range(1000):
        graph.replay()
        replayed.append(token.clone())
    assert captured() == graphs and int(cache.get_seq_length()) == 1300
    token.copy_(first)
    for i in range(1000):
        token.copy_(step(twin))
        assert torch.equal(token, replayed[i]), f"step {i}"
    assert captured() == graphs


@pytest.mark.gpu
def test_reduce_overhead_records_one_graph():
    """Inductor's own CUDA graphs: written storages are at static addresses, so nothing is skipped or recorded again."""
    model = tiny(head_dim=64, dtype=torch.bfloat16).cuda()
    ids = prompt(300).cuda()
    expected = generate(compiled(model, make_backend("default", inner="inductor")), ids, MiniKVCache(model, 600), 200)
    model.compile(backend=make_backend("default", inner="inductor"), mode="reduce-overhead")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    got = generate(model, ids, MiniKVCache(model, 600), 200)
    assert torch.equal(got.sequences, expected.sequences)
    assert captured()[0] <= 3
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] <= 1  # the prefill reads the host


@pytest.mark.gpu
def test_a_step_too_many_stops_the_device():
    """In a process of its own: after a device assertion nothing else runs."""
    import subprocess
    import sys

    code = (
        "import torch; from minikv_compile.cache import MiniKVLayer; from minikv_compile import MiniKVConfig\n"
        "layer = MiniKVLayer(MiniKVConfig(), 40, 1, 2, 64, torch.bfloat16, torch.device('cuda'))\n"
        "x = torch.randn(1, 2, 41, 64, device='cuda', dtype=torch.bfloat16)\n"
        "layer.update(x[:, :, :40], x[:, :, :40]); layer.update(x[:, :, :1], x[:, :, :1]); torch.cuda.synchronize()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "assert" in done.stderr


def test_a_crop_that_one_layer_refuses_changes_none():
    model, ids = tiny(layers=2), prompt(1100)
    config = MiniKVConfig(policy="heavy_hitter", layer_budget="pyramid", important=0)
    compiled(model, MiniKVBackend(config, "eager"))
    cache = MiniKVCache(model, 1400, config=config)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        for _ in range(120):
            model(ids[:, :1], past_key_values=cache)
        with pytest.raises(ValueError, match="Cannot roll back 90 tokens"):
            cache.crop(-90)
    assert [int(layer.length) for layer in cache.layers] == [1220, 1220]


def test_a_causal_mask_from_outside_for_all_rows_at_once():
    model, ids = tiny(), prompt(40, 2)
    mask = torch.ones(40, 40).bool().tril()[None, None]
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        compiled(model, make_backend())
        actual = model(ids, attention_mask=mask, past_key_values=MiniKVCache(model, 64, 2, "lossless")).logits
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("how", ["rewritten", "eager", "strict"])
def test_nan_in_a_prompt_is_reported(how):
    model, ids = tiny(), prompt(40, 2)
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[3] = torch.inf
    config = MiniKVConfig(strict=how == "strict")
    if how != "eager":
        compiled(model, MiniKVBackend(config, "eager"))
    message = r"NaN or inf in 80 tokens in the values of layer 1: "
    with torch.no_grad(), (pytest.raises(ValueError, match=message) if how == "strict" else pytest.warns(match=message)):
        model(ids, past_key_values=MiniKVCache(model, 64, 2, config))


def test_finite_prompts_warn_of_nothing(recwarn):
    model, ids = tiny(), prompt(40, 2)
    generate(compiled(model, make_backend("default")), ids, MiniKVCache(model, 64, 2))
    assert not [warning for warning in recwarn if "NaN" in str(warning.message)]


@pytest.mark.parametrize("used_before", [False, True])
def test_rows_without_a_prompt_are_read_in_order(used_before):
    """Beside a row that has one: its important tokens are its own."""
    layers = [MiniKVLayer(MiniKVConfig(), 600, rows, 2, 16, torch.float32, torch.device("cpu")) for rows in (2, 1)]
    two, one = layers
    if used_before:
        two.update(*torch.randn(2, 2, 2, 400, 16))
        two.reset()
    one.update(*torch.randn(2, 1, 2, 400, 16))
    two.write_rows(0, one)
    new = torch.randn(100, 2, 2, 2, 1, 16)
    for k, v in new:
        two.update(k, v)
    assert torch.equal(two.keys.dequantize()[1, :, 400:], torch.cat([k[1] for k, _ in new], 1))


@pytest.mark.parametrize("preset", ["default", "minikv"])
def test_layers_that_are_alike_make_room_together(preset):
    """In one op a step, which checks the mask too; also where their budgets differ."""
    ops = []

    def inner(module, inputs):
        ops.append([node for node in module.graph.nodes if node.target is minikv.make_room.default])
        return module

    model = tiny(layers=3)
    config = MiniKVConfig.preset(preset)
    compiled(model, MiniKVBackend(config, inner))
    cache = MiniKVCache(model, 2000, 1, config, 100)
    steps(model, prompt(310), 300, cache)
    tiers = {layer.key[0].shape[2] for layer in cache.layers}
    assert len(tiers) == (3 if preset == "minikv" else 1)
    assert [len(found) for found in ops] == [0, 1]
    assert len(ops[1][0].args[2]) == 3 and ops[1][0].args[5] is not None


def poisoned(length, *bad):
    """Keys and values of `length` tokens, of which these hold NaN."""
    k, v = torch.randn(2, 1, 2, length, 16)
    k[0, 1, list(bad), 3] = torch.nan
    return k, v


def messages(recwarn):
    found = [str(w.message).split(":")[0] for w in recwarn.list if "NaN" in str(w.message)]
    recwarn.clear()
    return found


def test_nan_in_generated_tokens_is_reported(recwarn):
    """In the 128 calls after its flush; and wherever the host reads the device."""
    model, config = tiny(), MiniKVConfig(strict=False)
    cache = MiniKVCache(model, 700, 1, config)
    compiled(model, MiniKVBackend(config, "eager"))
    ids = prompt(300)
    steps(model, ids, 290, cache)
    assert not messages(recwarn)
    weight = model.model.layers[1].self_attn.v_proj.weight
    good = weight[3].clone()
    with torch.no_grad():
        weight[3] = torch.inf
        for _ in range(3):
            model(prompt(1), past_key_values=cache)
        weight[3] = good
        for _ in range(380):
            model(prompt(1), past_key_values=cache)
    assert messages(recwarn) == ["NaN or inf in 3 tokens in the values of layer 1"]
    cache.reset()
    assert not messages(recwarn)


def test_nan_is_reported_where_a_layer_is_read(recwarn):
    layer = MiniKVCache(tiny(layers=1), 700, 1, "default").layers[0]
    layer.update(*poisoned(300))
    for i in range(200):
        layer.update(*poisoned(1, *[0] * (i == 5)))
    assert not messages(recwarn)
    assert layer.keys is not None and messages(recwarn) == ["NaN or inf in 1 tokens in the keys of layer 0"]
    layer.reset()
    assert not messages(recwarn)


def test_nan_in_a_prompts_window_is_counted_once(recwarn):
    """It waits in the dense region, and is counted in the prefill; again, when it is flushed, it is no news. What is generated
    afterwards is."""
    layer = MiniKVCache(tiny(layers=1), 900, 1, "default").layers[0]
    layer.update(*poisoned(300, 2, 100, 270, 290))
    assert messages(recwarn) == ["NaN or inf in 4 tokens in the keys of layer 0"]
    for i in range(500):
        layer.update(*poisoned(1, *[0] * (i == 300)))
        layer.report()
    assert messages(recwarn) == ["NaN or inf in 1 tokens in the keys of layer 0"]


# ---- room for what is kept only

DROPS = {"share": {}, "tokens": {"heavy": 100, "recent": 60}}


@pytest.mark.slow
@pytest.mark.parametrize("budget", DROPS)
def test_room_for_what_is_kept(budget):
    """The same as with room for all, in fewer bytes, for prompts of any length up to the longest."""
    config = MiniKVConfig.preset("minikv", **DROPS[budget])
    model = compiled(tiny(), make_backend("minikv", **DROPS[budget]))
    whole, kept = MiniKVCache(model, 1300, config=config), MiniKVCache(model, 1300, config=config, max_new_tokens=100)
    assert [a.key[0].shape[2] > b.key[0].shape[2] for a, b in zip(whole.layers, kept.layers, strict=True)] == [True] * 2
    for length in (1200, 500, 40):
        ids = prompt(length + 100)
        whole.reset()
        kept.reset()
        torch.testing.assert_close(steps(model, ids, length, kept), steps(model, ids, length, whole), atol=2e-5, rtol=1e-5)


def test_what_was_not_to_come_is_an_error():
    model = compiled(tiny(layers=1), make_backend("minikv"))
    cache = MiniKVCache(model, 1300, config="minikv", max_new_tokens=100)
    with pytest.raises(ValueError, match="no room for another block of tokens.* raise max_new_tokens"):
        steps(model, prompt(1300), 300, cache)
    small = MiniKVCache(model, 1300, config="minikv", max_new_tokens=1200)
    for tensors in (small.layers[0].key, small.layers[0].value):
        tensors[:3] = [t[:, :, :1].clone() for t in tensors[:3]]
    with pytest.raises(ValueError, match="no room for a prompt of 1290 tokens"):
        steps(model, prompt(1291), 1290, small)
    with pytest.raises(ValueError, match="leave no room for a prompt"):
        MiniKVCache(model, 100, max_new_tokens=100)


def test_new_tokens_change_nothing_where_none_is_dropped():
    model = tiny(layers=1)
    sizes = [[t.shape for t in MiniKVCache(model, 1300, max_new_tokens=n).layers[0].tensors()] for n in (None, 10)]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("length, new, heavy, window, min_prompt", [(1000, 300, 0.1, 64, 1024), (400, 600, 0.02, 256, 0)])
def test_room_for_short_prompts_that_are_kept_whole(length, new, heavy, window, min_prompt):
    config = MiniKVConfig(policy="recent", heavy=heavy, window=window, min_prompt=min_prompt)
    layer = MiniKVLayer(config, 2300, 1, 2, 16, torch.float32, torch.device("cpu"), max_new_tokens=new)
    layer.update(*torch.randn(2, 1, 2, length, 16))
    for _ in range(new):
        minikv.make_room(layer.key, layer.value, [layer.length], layer.padding, 1, None, None, config.to_json())
    assert int(layer.length) == length + new


def test_rows_of_caches_with_other_room():
    model = tiny(layers=1)
    one, other = (MiniKVCache(model, 1300, config="minikv", max_new_tokens=n) for n in (None, 100))
    with pytest.raises(ValueError, match="max_new_tokens"):
        one.write_rows(0, other)


def test_the_boundary_knows_what_makes_room():
    """Also where the mask is made in the graph, not given to it."""
    model, boundaries = tiny(), []
    backend = MiniKVBackend(MiniKVConfig(), "eager")
    compile_graph = backend.__call__

    def watched(module, inputs, **kwargs):
        boundaries.append(compile_graph(module, inputs, **kwargs))
        return boundaries[-1]

    model.forward = torch.compile(model.forward, backend=watched)
    steps(model, prompt(310), 300, MiniKVCache(model, 400))
    assert [len(boundary.rooms) for boundary in boundaries] == [0, 1]
