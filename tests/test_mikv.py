"""MiKV: important tokens at a higher precision, the others demoted, keys balanced."""

import copy
import runpy
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama import modeling_llama

from minikv_compile import MiniKVCache, MiniKVConfig, cache_report
from minikv_compile.balancer import balancer_of, query_range
from minikv_compile.kernels.state import IN_IMPORTANT, IN_TIER, PINNED
from minikv_compile.measure import parse_method
from minikv_compile.ops import slots
from minikv_compile.tasks import make_sample

from .helpers import all_compressed, compiled, greedy, kinds, logits_of, make_backend, prompt, tiny
from .test_ops import compress, left_padding

PAPER = dict(importance="heavy_hitter", rotation="none", error_feedback=False, clip=1.0)
PRESETS = ["mikv", "mikv4"]
EXAMPLE = Path(__file__).parent.parent / "examples" / "tiny_decoder"
MODEL = EXAMPLE / "model"
plant_outliers = runpy.run_path(str(EXAMPLE / "outliers.py"))["plant_outliers"]


def quantized(x, bits, group):
    """Each token's channels in groups of `group`."""
    groups = x.unflatten(-1, (-1, group))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    zero, step = low.half().float(), ((high - low) / (2**bits - 1)).half().float()
    return (((groups - zero) / step).round().clamp(0, 2**bits - 1) * step + zero).flatten(-2)


class Simulation:
    """MiKV with dense tensors, from the paper's description: column sums of the attention maps, and fake quantization.

    20% of the prompt are important: room for the 192 newest tokens, and heavy hitters; the others have 2 bits. What
    leaves the newest tokens is demoted, 128 at a time.
    """

    def __init__(self, model, ids, important_bits, sinks=0, window=64, buffer=128):
        self.model, self.window, self.buffer, self.sinks = model, window, buffer, sinks
        queries, rotary = [], modeling_llama.apply_rotary_pos_emb

        def watched(*args, **kwargs):
            q, k = rotary(*args, **kwargs)
            queries.append(q)
            return q, k

        modeling_llama.apply_rotary_pos_emb = watched
        with torch.no_grad():
            out = model(ids, use_cache=True)
        modeling_llama.apply_rotary_pos_emb = rotary
        self.cache, self.length = out.past_key_values, ids.shape[1]
        budget = round(0.2 * self.length) - sinks - window - buffer
        self.balancers, self.important = [], []
        for layer, q in enumerate(queries):
            slot = self.cache.layers[layer]
            heads, dim = slot.keys.shape[1], slot.keys.shape[3]
            ratio = q.shape[1] // heads
            # Of tokens in whole blocks that are neither sinks nor newest.
            if important_bits == 16:
                packed = (self.length - sinks - budget - window) // 128 * 128
                count, last = budget, sinks + budget + packed
            else:
                last = sinks + (self.length - sinks - window) // 128 * 128
                count = round(budget / 128) * 128
            self.rest = last
            of_layer = []
            for head in range(heads):
                mine = slice(head * ratio, (head + 1) * ratio)
                largest = q[0, mine].abs().amax((0, 1)), slot.keys[0, head].abs().amax(0)
                self.balancers.append((largest[0] / largest[1]).sqrt())
                future = torch.ones(self.length, self.length, dtype=torch.bool).triu(1)
                logits = q[0, mine].double() @ slot.keys[0, head].double().T * dim**-0.5
                scores = logits.masked_fill(future, -torch.inf).softmax(-1).sum((0, 1))[sinks:last]
                chosen = sorted((scores.topk(count).indices + sinks).tolist())
                of_layer.append(chosen)
                others = [t for t in range(sinks, last) if t not in set(chosen)]
                self.demote(layer, head, others, 2)
                if important_bits < 16:
                    self.demote(layer, head, chosen, important_bits)
            self.important.append(of_layer)

    def demote(self, layer, head, tokens, bits):
        slot, balancer = self.cache.layers[layer], self.balancers[layer * self.cache.layers[layer].keys.shape[1] + head]
        group = slot.keys.shape[3] // 2
        slot.keys[0, head, tokens] = quantized(slot.keys[0, head, tokens] * balancer, bits, group) / balancer
        slot.values[0, head, tokens] = quantized(slot.values[0, head, tokens], bits, group)

    def step(self, token):
        """Logits of one token, which joins the cache."""
        if self.length - self.rest == self.window + self.buffer:
            for layer, slot in enumerate(self.cache.layers):
                for head in range(slot.keys.shape[1]):
                    self.demote(layer, head, list(range(self.rest, self.rest + 128)), 2)
            self.rest += 128
        self.length += 1
        with torch.no_grad():
            return self.model(token, past_key_values=self.cache).logits[:, -1]


@pytest.mark.parametrize("preset, bits", [("mikv", 16), ("mikv4", 4), ("mikv:important_bits=8", 8)])
def test_equals_a_naive_simulation(preset, bits):
    model = tiny(layers=2, head_dim=32)
    ids = prompt(1900)  # 188 heavy hitters
    simulation = Simulation(model, ids, bits)
    config = parse_method(preset)
    assert config.important_bits == bits
    compiled(model, make_backend("mikv", important_bits=bits, **PAPER))
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    run, model._compiled_call_impl = model._compiled_call_impl, None
    for layer, chosen in zip(cache.layers, simulation.important, strict=True):
        assert layer.keys.important[0].tolist() == layer.values.important[0].tolist() == chosen
    before = cache.layers[0].keys.state[0, IN_TIER].item()
    for token in prompt(150)[0]:
        token = token.view(1, 1)
        expected = simulation.step(token)
        with torch.no_grad():
            out = run(token, past_key_values=cache)
        cache = out.past_key_values
        # 1e-5, but where a value next to a tie got another code.
        torch.testing.assert_close(out.logits[:, -1], expected, rtol=0, atol=4e-3)
    assert cache.layers[0].keys.state[0, IN_TIER] >= before + 128 and all_compressed(cache)


# ---- who is where


@given(
    lengths=st.lists(st.integers(1, 1500), min_size=1, max_size=3), sinks=st.integers(0, 5), window=st.integers(0, 70),
    important=st.one_of(st.floats(0, 1), st.integers(0, 400)), bits=st.sampled_from([4, 16]), drops=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_each_token_is_in_one_place(lengths, sinks, window, important, bits, drops, seed):
    """Stored tokens have slots of their own, in a tier or in the dense region, as many as there are; the others are padding
    or dropped."""
    torch.manual_seed(seed)
    policy = dict(policy="heavy_hitter", heavy=0.4, recent=0.2) if drops else {}
    config = MiniKVConfig.preset(
        "mikv", important=important, important_bits=bits, sinks=sinks, window=window, **policy
    )
    seq = max(lengths)
    k, v = torch.randn(2, len(lengths), 2, seq, 16)
    kt, vt = compress(config, k, v, torch.rand(len(lengths), 2, seq), left_padding(lengths, seq))
    assert torch.equal(kt.state, vt.state) and torch.equal(kt.kept_mask(), vt.kept_mask())
    for b, n in enumerate(lengths):
        offset, _, in_tier, zero, pinned, in_important = kt.state[b].tolist()
        dense, stored = seq - offset, int(kt.kept_mask()[b, 0].sum())
        assert zero == 0 and stored == dense + in_tier + in_important <= n
        assert drops or stored == n
        assert in_tier % 128 == in_important % 128 == 0 and in_tier <= kt.tier.shape[2]
        assert not in_important or (bits == 4 and pinned == sinks and in_important <= kt.important_tier.shape[2])
        # Behind the pinned ones there is the window, less than a block more, and nothing else.
        assert dense - pinned < window + 128 and (dense - pinned >= window or not in_tier + in_important)
        if kt.important is not None:
            assert (slots(kt.important[b : b + 1], stored, sinks).sort(-1).values == torch.arange(stored)).all()
            assert (kt.important[b] < 2**31 - 1).sum(-1).tolist() == [max(pinned - sinks, in_important)] * 2


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_padded_rows_are_what_they_are_alone(preset):
    model = tiny(head_dim=32)
    lengths, seq = [1500, 1100, 9], 1500
    ids = prompt(seq, 3) * left_padding(lengths, seq)
    compiled(model, make_backend(preset))
    together = greedy(model, ids, 140, attention_mask=(ids > 0).long())
    rows = together.past_key_values.layers[0].keys.state[:, [PINNED, IN_IMPORTANT][preset == "mikv4"]].tolist()
    assert len(set(rows)) > 1
    for row, n in enumerate(lengths):
        alone = greedy(model, ids[row : row + 1, seq - n :], 140)
        torch.testing.assert_close(logits_of(together)[row], logits_of(alone)[0], rtol=0, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_fixed_cache_is_the_dynamic_one(preset):
    """Also as it was, after another prompt."""
    model = tiny(head_dim=32)
    compiled(model, make_backend(preset))
    cache = MiniKVCache(model, 1700, 1, MiniKVConfig.preset(preset))
    for length in (1200, 1500):
        ids = prompt(length)
        expected = greedy(model, ids, 140)
        got = greedy(model, ids, 140, past_key_values=cache, disable_compile=True)
        assert torch.equal(got.sequences, expected.sequences)
        torch.testing.assert_close(logits_of(got), logits_of(expected), rtol=0, atol=1e-4)
        held = expected.past_key_values.layers[0]
        assert torch.equal(cache.layers[0].keys.dequantize(), held.keys.dequantize())
        cache.reset()


def test_eager_prefills_of_a_fixed_cache_raise():
    """Neither scores nor the range of queries reach them."""
    model = tiny(head_dim=32)
    for config, what in ((MiniKVConfig.preset("mikv"), "policy 'heavy_outlier'"), (MiniKVConfig(balancer="mikv"), "balancer")):
        with pytest.raises(ValueError, match=what), torch.no_grad():
            model(prompt(1200), past_key_values=MiniKVCache(model, 1700, 1, config))


# ---- the balancer


def test_balancer_by_hand():
    q, k = torch.randn(2, 6, 200, 16), torch.randn(2, 2, 200, 16)
    q[..., 3], k[..., 5] = 0.0, torch.nan  # no range: not balanced
    valid = left_padding([200, 140], 200)
    q[1, :, :60], k[1, :, :60] = 1e4, 1e4  # padding does not count
    order, lengths = torch.ops.minikv.align_rows(valid)
    b = balancer_of(query_range(q, k, order, lengths), k, order, lengths.tolist())
    for row in range(2):
        for head in range(2):
            largest = q[row, 3 * head : 3 * head + 3, valid[row]].abs().amax((0, 1)), k[row, head, valid[row]].abs().amax(0)
            expected = (largest[0] / largest[1]).sqrt()
            expected[3] = expected[5] = 1.0
            torch.testing.assert_close(b[row, head], expected)


def shipped():
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    return model


def test_planted_outliers_leave_the_function_as_it_is():
    model, ids = tiny(head_dim=32), prompt(50)
    with torch.no_grad():
        before = model(ids).logits
        keys = [layer.keys for layer in model(ids, use_cache=True).past_key_values.layers]
        plant_outliers(model, factor=8.0, pairs=2)
        planted = model(ids, use_cache=True)
    torch.testing.assert_close(planted.logits, before, rtol=1e-4, atol=1e-4)
    for old, layer in zip(keys, planted.past_key_values.layers, strict=True):
        changed = (layer.keys / old).median(2).values
        assert sorted(changed[0, 0].round().tolist()) == [1.0] * 28 + [8.0] * 4


def last_logits(model, ids, **changes):
    """Of the last 8 tokens, over a prompt that is all demoted."""
    compiled(model, make_backend("mikv", important=0, window=0, **PAPER, **changes))
    with torch.no_grad():
        past = model(ids[:, :-8], use_cache=True).past_key_values
        logits = model(ids[:, -8:], past_key_values=past).logits
    torch._dynamo.reset()
    return logits


@pytest.mark.slow
def test_the_balancer_recovers_what_outliers_cost():
    """KL from the full cache on the shipped decoder: with planted outliers 2 bits are far off, but not if balanced."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    text = make_sample("multikey", 1024, 5, tokenizer).prompt
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        full = shipped()(ids).logits[:, -8:].log_softmax(-1)

    def divergence(model, balancer):
        return (full.exp() * (full - last_logits(model, ids, balancer=balancer).log_softmax(-1))).sum(-1).mean().item()

    clean = divergence(shipped(), "none")
    planted = {balancer: divergence(plant_outliers(shipped(), 8.0, 4), balancer) for balancer in ("none", "mikv")}
    assert planted["none"] > 2 * clean
    assert planted["none"] - planted["mikv"] >= 0.95 * (planted["none"] - clean)


# ---- the presets on models


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("task", ["single", "multikey", "tracking"])
def test_the_shipped_decoder_finds_what_the_full_cache_finds(preset, task):
    tokenizer, model = AutoTokenizer.from_pretrained(MODEL), shipped()
    samples = [make_sample(task, 1500, seed, tokenizer) for seed in range(2)]
    texts = [sample.prompt + sample.question for sample in samples]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    compiled(model, make_backend(preset))
    out = greedy(model, new=24, ids=inputs.input_ids, attention_mask=inputs.attention_mask)
    answers = tokenizer.batch_decode(out.sequences[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    assert all_compressed(out.past_key_values)
    assert all(sample.score(answer) == 1 for sample, answer in zip(samples, answers, strict=True)), answers


@pytest.mark.parametrize("preset", PRESETS)
def test_a_random_qwen3(preset):
    """Two turns and a rollback."""
    model, backend = tiny("qwen3", head_dim=32), make_backend(preset)
    compiled(model, backend)
    with torch.no_grad():
        cache = model(prompt(1300), use_cache=True).past_key_values
        for n in (1, 1, 300, 1):
            out = model(prompt(n), past_key_values=cache)
            cache = out.past_key_values
            assert out.logits.isfinite().all()
    cache.crop(-20)
    assert cache.get_seq_length() == 1583 and all_compressed(cache)
    assert kinds(backend) == [["prefill"] * 2, ["decode"] * 2, ["extend"] * 2]


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_through_inductor(preset):
    """A CPU's decode attention is traced into the graph. From one cache: Inductor's rounding of a prompt's keys would move a
    code here and there."""
    model, new = tiny(layers=1, head_dim=32), prompt(1)
    with torch.no_grad():
        cache = compiled(model, make_backend(preset))(prompt(1300), use_cache=True).past_key_values
        twin = copy.deepcopy(cache)
        expected = model(new, past_key_values=cache).logits
        torch._dynamo.reset()
        got = compiled(model, make_backend(preset, inner="inductor"))(new, past_key_values=twin).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    assert all_compressed(twin)


@pytest.mark.parametrize(
    "preset, dim, share", [("mikv", 64, 0.36), ("mikv", 128, 0.335), ("mikv4", 64, 0.2145), ("mikv4", 128, 0.195)]
)
def test_cache_bytes_at_8k(preset, dim, share):
    """The presets' arithmetic, and what sinks, window and buffer take of a prompt of 8K."""
    model = compiled(tiny(layers=1, heads=2, kv_heads=1, head_dim=dim, dtype=torch.bfloat16), make_backend(preset))
    with torch.no_grad():
        report = cache_report(model(prompt(8192), use_cache=True, logits_to_keep=1).past_key_values)
    assert report.bytes / report.dense_bytes <= share


def test_the_presets_arithmetic():
    """MiKV, section 4: at head_dim 128, 20% at 16 bits and 80% at 2 are 32.5% of dense; with 4 bits, 18%, with scales and zeros
    of 16 bits."""
    assert MiniKVConfig.preset("mikv").share_of_dense == pytest.approx(0.325)
    assert MiniKVConfig.preset("mikv4", important=0.2, metadata_bits=16).share_of_dense == pytest.approx(0.18125)
    assert MiniKVConfig.preset("mikv4").share_of_dense == pytest.approx(0.171875)
    assert [MiniKVConfig.preset("mikv").value_group(dim) for dim in (16, 64, 80, 128, 256)] == [16, 32, 16, 64, 128]


def test_methods():
    assert parse_method("mikv4") == parse_method("mikv:important=0.25:important_bits=4:metadata_bits=8")
    assert parse_method("mikv:important=0.1:balancer=none:rotation=hadamard").important == 0.1
    assert parse_method("default:key_axis=channel:group=0.5").group == 0.5
