"""What the pass takes, what it leaves alone and why; either way the answer is the model's own."""

import logging
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minikv_compile import KVTensor, MiniKVBackend, MiniKVConfig, cache_report
from minikv_compile.passes.rewrite import Rewriter

from .helpers import PlainDecoder, causal, compiled, greedy, kinds, make_backend, prompt, run_plain, tiny
from .test_masks import capture

sdpa = F.scaled_dot_product_attention
RATIO = 2  # query heads for each KV head of a `PlainDecoder`


def mask_of(q, k):
    """Positions of keys and queries, to compare."""
    n, length = q.shape[2], k.shape[2]
    return torch.arange(length)[None, None, None, :], torch.arange(length - n, length)[None, None, :, None]


# ---- attention that is taken


def expand_and_reshape(q, k, v, past):
    """transformers' repeat_kv."""
    k, v = (
        x[:, :, None].expand(*x.shape[:2], RATIO, *x.shape[2:]).reshape(x.shape[0], -1, *x.shape[2:]) for x in (k, v)
    )
    return sdpa(q, k, v, is_causal=not past)


def unsqueeze_and_reshape(q, k, v, past):
    k, v = (x.unsqueeze(2).expand(-1, -1, RATIO, -1, -1).reshape(*q.shape[:2], -1, q.shape[3]) for x in (k, v))
    return sdpa(q, k.contiguous(), v.contiguous(), is_causal=not past)


def repeat_interleave(q, k, v, past):
    return sdpa(q, k.repeat_interleave(RATIO, dim=1), torch.repeat_interleave(v, RATIO, 1), is_causal=not past)


def keywords_and_scale(q, k, v, past):
    return sdpa(query=q, key=k, value=v, attn_mask=None, dropout_p=0.0, is_causal=not past, scale=0.7, enable_gqa=True)


def positional(q, k, v, past):
    return sdpa(q, k, v, None, 0.0, not past, scale=0.1, enable_gqa=True)


def boolean_mask(q, k, v, past):
    key, query = mask_of(q, k)
    return sdpa(q, k, v, attn_mask=key <= query, enable_gqa=True)


TAKEN = [
    causal, expand_and_reshape, unsqueeze_and_reshape, repeat_interleave, keywords_and_scale, positional, boolean_mask,
]  # fmt: skip


@pytest.mark.parametrize("attend", TAKEN)
def test_forms_of_attention_that_are_taken(attend):
    model, ids = PlainDecoder(attend), prompt(50, batch=2)
    expected, _ = run_plain(model, ids, 40)
    backend = make_backend(strict=True)
    actual, past = run_plain(torch.compile(model, backend=backend), ids, 40)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    assert kinds(backend) == [["prefill"] * 2, ["decode"] * 2]
    assert past[1][1].shape == (2, 2, 50, 16)  # native heads, not the repeated ones


def test_one_kv_head_and_no_grouping():
    for kv_heads in (1, 4):
        torch._dynamo.reset()
        model, ids = PlainDecoder(kv_heads=kv_heads), prompt(30)
        expected, _ = run_plain(model, ids, 26)
        actual, past = run_plain(torch.compile(model, backend=make_backend(strict=True)), ids, 26)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
        assert isinstance(past[0][0], KVTensor) and past[0][0].shape[1] == kv_heads


# ---- attention that is left alone


def sliding_window(q, k, v, past):
    key, query = mask_of(q, k)
    return sdpa(q, k, v, attn_mask=(key <= query) & (key > query - 8), enable_gqa=True)


def prefix_lm(q, k, v, past):
    key, query = mask_of(q, k)
    return sdpa(q, k, v, attn_mask=(key <= query) | (key < 4), enable_gqa=True)


def first_keys_only(q, k, v, past):
    key, query = mask_of(q, k)
    return sdpa(q, k, v, attn_mask=(key <= 0).expand(1, 1, q.shape[2], -1), enable_gqa=True)


def pseudorandom_mask(q, k, v, past):
    key, query = mask_of(q, k)
    return sdpa(q, k, v, attn_mask=((key * 7 + query * 5) % 3 != 0) | (key == query), enable_gqa=True)


def bias(q, k, v, past):
    key, query = mask_of(q, k)
    return sdpa(q, k, v, attn_mask=torch.where(key <= query, (key - query) * 0.1, -torch.inf), enable_gqa=True)


def bidirectional(q, k, v, past):
    return sdpa(q, k, v, enable_gqa=True)


def causal_from_the_first_key(q, k, v, past):
    """is_causal in every call: a token on a past then sees the oldest key only."""
    return sdpa(q, k, v, is_causal=True, enable_gqa=True)


def tiled_heads(q, k, v, past):
    """Head h reads KV head h % kv_heads: not what grouped heads mean."""
    return sdpa(q, k.repeat(1, RATIO, 1, 1), v.repeat(1, RATIO, 1, 1), is_causal=not past)


def mask_edited_in_place(q, k, v, past):
    key, query = mask_of(q, k)
    mask = (key <= query).contiguous()
    mask[..., 1:3] = False
    return sdpa(q, k, v, attn_mask=mask, enable_gqa=True)


def bias_at_decode(q, k, v, past):
    if not past:
        return causal(q, k, v, past)
    rows = torch.ones(q.shape[0], 1) * (torch.arange(k.shape[2]) * 0.1)
    return sdpa(q, k, v, attn_mask=rows[:, None, None, :], enable_gqa=True)


def window_at_decode(q, k, v, past):
    """In two dimensions, as no padding is: it was computed here."""
    if not past:
        return causal(q, k, v, past)
    near = (torch.arange(k.shape[2]) - (k.shape[2] - 1)).abs()[None].expand(q.shape[0], -1) < 6
    return sdpa(q, k, v, attn_mask=near[:, None, None, :], enable_gqa=True)


def sliding_at_decode(q, k, v, past):
    return (sliding_window if past else causal)(q, k, v, past)


def shared_by_two_calls(q, k, v, past):
    """Keys and values that two attention calls read: in the second they are no new tokens of their own."""
    return causal(q, k, v, past) + causal(q.flip(1), k, v, past)


def repeats_changed_in_place(q, k, v, past):
    k, v = (x.repeat_interleave(RATIO, 1) for x in (k, v))
    k.mul_(2)
    return sdpa(q, k, v, is_causal=not past)


def keys_read_elsewhere(q, k, v, past):
    return causal(q, k, v, past) + k.mean((1, 2), keepdim=True)


def keys_repeated_elsewhere(q, k, v, past):
    return causal(q, k, v, past) + causal(q, v, k, past)


LEFT = {
    sliding_window: ["sliding window", "cache is dense"],
    prefix_lm: [r"is not understood \(built by or_\)", "cache is dense"],
    first_keys_only: ["mask", "cache is dense"],
    pseudorandom_mask: ["is not understood", "cache is dense"],
    bias: ["is not understood", "cache is dense"],
    bidirectional: ["not causal: every token sees every other", "cache is dense"],
    causal_from_the_first_key: ["prefill", "oldest keys only"],
    tiled_heads: ["", ""],
    mask_edited_in_place: ["mask", "cache is dense"],
    repeats_changed_in_place: ["changed in place", "changed in place"],
    bias_at_decode: ["prefill", "mask"],
    window_at_decode: ["prefill", "mask"],
    sliding_at_decode: ["prefill", "sliding window"],
    shared_by_two_calls: ["", ""],
    keys_read_elsewhere: ["", ""],
    keys_repeated_elsewhere: ["", ""],
}
"""For each attention, what becomes of its sites in prefill and decode; "" for anything."""



@pytest.mark.parametrize("attend", LEFT)
def test_a_missed_match_costs_speed_only(attend):
    """lossless, so that a cache that was compressed in the prefill comes back exactly."""
    model, ids = PlainDecoder(attend), prompt(40, batch=2)
    expected, _ = run_plain(model, ids, 30)
    backend = make_backend()
    actual, _ = run_plain(torch.compile(model, backend=backend), ids, 30)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    for sites, reason in zip(kinds(backend), LEFT[attend], strict=False):
        for kind in sites:
            assert re.search(reason, kind), kind


@pytest.mark.parametrize("attend", [sliding_window, bidirectional, bias])
def test_strict_raises_and_names_site_and_reason(attend):
    model = PlainDecoder(attend)
    with pytest.raises(Exception, match=r"site \d \(.*\) keeps the model's own attention, uncompressed: "):
        run_plain(torch.compile(model, backend=make_backend(strict=True)), prompt(20), 20)


def test_what_is_left_alone_is_logged_once_per_reason(caplog):
    model = PlainDecoder(sliding_window, layers=3)
    with caplog.at_level(logging.INFO, "minikv"):
        run_plain(torch.compile(model, backend=make_backend()), prompt(20), 20)
    messages = [r.getMessage() for r in caplog.records if r.name == "minikv" and "uncompressed" in r.getMessage()]
    assert len(messages) == 1 and messages[0].endswith("sliding window attention")
    counters = torch._dynamo.utils.counters["minikv"]
    assert (counters["rewritten"], counters["skipped"]) == (0, 3)


def messages_of(caplog, **changes):
    """Levels and texts of what the logger `minikv` says while a decoder of three layers is compiled, for its prompt only."""
    caplog.clear()
    torch._dynamo.reset()
    with caplog.at_level(logging.INFO, "minikv"), torch.no_grad():
        torch.compile(PlainDecoder(changes.pop("attend", causal), layers=3), backend=make_backend("default", **changes))(prompt(20))
    return [(r.levelname, r.getMessage()) for r in caplog.records if r.name == "minikv"]


def test_one_line_at_the_first_compilation(caplog):
    line = "3 attention sites, {} rewritten ({}; their long caches take 13.3% of dense), {} left alone"
    assert messages_of(caplog) == [("INFO", line.format(3, "prefill", 0))]
    some = messages_of(caplog, skip_layers=(0,))
    assert some[0] == ("INFO", line.format(2, "prefill", 1)) and [level for level, _ in some] == ["INFO"] * 2


def test_a_graph_of_which_nothing_is_rewritten_is_a_warning(caplog):
    first, second = messages_of(caplog, attend=sliding_window)
    assert first == ("INFO", "3 attention sites, 0 rewritten, 3 left alone")
    assert second[0] == "WARNING" and "uncompressed" in second[1]
    assert "WARNING" not in [level for level, _ in messages_of(caplog, skip_layers=(0, 1, 2))]  # that was asked for


def reason_of(model, *args, **inputs):
    """Why the first graph's sites were left alone, and whether the answer is right."""
    with torch.no_grad():
        expected = model(*args, **inputs)
        backend = make_backend()
        actual = torch.compile(model, backend=backend)(*args, **inputs)
    torch.testing.assert_close(actual[0], expected[0])
    [sites] = kinds(backend)
    assert len(set(sites)) == 1
    return sites[0]


def test_head_dim_that_is_not_supported():
    assert "head_dim 24: must be a multiple of 16" in reason_of(PlainDecoder(head_dim=24), prompt(9))


def test_dtype_that_is_not_supported():
    assert "dtype torch.float64" in reason_of(PlainDecoder().double(), prompt(9))


def test_keys_that_are_not_kept():
    assert "use_cache=False" in reason_of(PlainDecoder(), prompt(9), keep=False)


def test_use_cache_false_of_transformers():
    model, ids = tiny(layers=1), prompt(9)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        backend = make_backend()
        model.compile(backend=backend)
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected)
    assert "use_cache=False" in kinds(backend)[0][0]


def test_dropout():
    def dropping(q, k, v, past):
        return sdpa(q, k, v, dropout_p=0.5, is_causal=True, enable_gqa=True)

    backend = make_backend()
    with torch.no_grad():
        torch.compile(PlainDecoder(dropping), backend=backend)(prompt(9))
    assert kinds(backend) == [["attention dropout: call model.eval()"] * 2]


def test_cross_attention():
    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.key, self.value = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x, memory):
            k, v = (p(memory).unflatten(2, (2, 16)).transpose(1, 2) for p in (self.key, self.value))
            q = x.unflatten(2, (2, 16)).transpose(1, 2)
            return sdpa(q, k, v), (k, v)

    reason = reason_of(Cross(), torch.randn(1, 7, 32), torch.randn(1, 11, 32))
    assert "7 queries for 11 new keys: cross-attention" in reason


@pytest.mark.parametrize("skip, compressed", [((0,), [False, True, True]), ((-1,), [True, True, False]),
                                              ((0, -1), [False, True, False]), ((7,), [True] * 3)])  # fmt: skip
def test_skip_layers(skip, compressed):
    model, ids = PlainDecoder(layers=3), prompt(40)
    expected, _ = run_plain(model, ids, 30)
    backend = make_backend("lossless", skip_layers=skip, strict=True)  # what the user asked for is no failure
    actual, past = run_plain(torch.compile(model, backend=backend), ids, 30)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    assert [isinstance(k, KVTensor) for k, _ in past] == compressed
    assert [kind == "prefill" for kind in kinds(backend)[0]] == compressed


def test_skipped_layers_of_transformers_go_on_dense():
    model, ids = tiny(layers=3), prompt(30)
    expected = greedy(model, ids, 8)
    model.compile(backend=make_backend(skip_layers=(0, -1)))
    actual = greedy(model, ids, 8)
    assert torch.equal(actual.sequences, expected.sequences)
    assert [isinstance(layer.keys, KVTensor) for layer in actual.past_key_values.layers] == [False, True, False]


def test_sliding_window_model_of_transformers():
    """Every second model has one: it runs as before."""
    model, ids = tiny("mistral", sliding_window=16), prompt(30)
    expected = greedy(model, ids, 8)
    backend = make_backend()
    model.compile(backend=backend)
    actual = greedy(model, ids, 8)
    assert torch.equal(actual.sequences, expected.sequences)
    assert all("sliding window" in kind or "dense" in kind or "cache" in kind for g in kinds(backend) for kind in g)


def test_dropped_tokens_never_reach_an_attention_that_is_not_rewritten():
    model, ids = PlainDecoder(sliding_at_decode), prompt(300)
    call = torch.compile(model, backend=make_backend("minikv"))
    with torch.no_grad():
        _, past = call(ids)
        with pytest.raises(Exception, match=r"dropped tokens meets an attention that cannot be rewritten \(sliding"):
            call(ids[:, :1], past)


# ---- the graphs themselves


class Counting(nn.Module):
    """In-place methods whose results nobody reads."""

    def __init__(self):
        super().__init__()
        self.decoder = PlainDecoder(layers=1)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, ids, past=None):
        self.calls.add_(1)
        self.seen[1] = ids.sum()
        logits, past = self.decoder(ids, past)
        scratch = logits[:, -1].clone()
        scratch.mul_(2).clamp_(min=0)
        self.seen[2:].copy_(scratch.sum())
        return logits, past


def test_in_place_operations_survive():
    model, ids = Counting(), prompt(20)
    expected, _ = run_plain(model, ids, 17)
    seen = model.seen.clone()
    model.calls.zero_(), model.seen.zero_()
    actual, _ = run_plain(torch.compile(model, backend=make_backend()), ids, 17)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    assert model.calls == 4
    torch.testing.assert_close(model.seen, seen)


def test_the_graph_of_dynamo_is_not_edited_and_only_dead_nodes_go():
    model, ids = Counting(), prompt(12)
    with torch.no_grad():
        module, _ = capture(model, ids)
    code = module.code
    before = {node: (dict(node.meta), tuple(node.users)) for node in module.graph.nodes}
    rewritten = Rewriter(module, MiniKVConfig.preset("minikv")).run()
    assert rewritten.sites[0].kind == "prefill" and rewritten.module.code != code
    assert module.code == code
    assert {node: (dict(node.meta), tuple(node.users)) for node in module.graph.nodes} == before
    copied = {node.name for node in rewritten.module.graph.nodes}
    gone = [node for node in module.graph.nodes if node.name not in copied and node.op != "output"]
    assert [node.target.__name__ for node in gone] == ["scaled_dot_product_attention"]
    for node in rewritten.module.graph.nodes:
        if node.op == "placeholder":
            assert hasattr(node, "_dynamo_source")  # AOTAutograd reads it


def test_no_mask_is_left_in_a_padded_graph():
    """Once the padding became lengths, nothing of size [seq, seq] may be computed."""
    model, ids = tiny(layers=2), prompt(23, batch=2)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    graphs = []

    def inner(module, inputs):
        graphs.append(module.graph)
        return module.forward

    model.compile(backend=MiniKVBackend(MiniKVConfig.preset("default"), inner))
    with torch.no_grad():
        model(ids, attention_mask=mask, use_cache=True)
    [graph] = graphs
    for node in graph.nodes:
        value = node.meta.get("example_value")
        if isinstance(value, torch.Tensor) and not node.target == "capture":
            assert sum(size == 23 for size in value.shape) < 2, node.format_node()
    # One alignment of rows for all layers.
    assert sum(node.target is torch.ops.minikv.align_rows.default for node in graph.nodes) == 1


def test_budgets_are_shared_by_the_sites_that_are_taken():
    """Two of four layers skipped: the pyramid of the other two is that of a model of two layers."""
    backend = make_backend("minikv", skip_layers=(0, -1), min_prompt=0)
    cache = greedy(compiled(tiny(layers=4), backend), prompt(1024), new=1).past_key_values
    kept = [layer.kept[0] for layer in cache_report(cache).layers]
    two = greedy(compiled(tiny(layers=2), make_backend("minikv")), prompt(1024), new=1).past_key_values
    assert kept[1:3] == [layer.kept[0] for layer in cache_report(two).layers]
    assert kept[0] == kept[3] == 1024


def test_skipped_layers_that_do_not_exist(caplog):
    with caplog.at_level("WARNING", "minikv"):
        greedy(compiled(tiny(), make_backend(skip_layers=(7,))), prompt(20), new=2)
    assert "skip_layers: [7], but this graph has 2 attention sites" in caplog.text


@pytest.mark.parametrize("first, then", [(220, 300), (220, 200), (320, 200)])
def test_a_chunk_on_layers_whose_lengths_are_symbols_of_their_own(first, then):
    model, ids = tiny(), prompt(first + then)
    with torch.no_grad():
        expected = model(ids).logits[:, first:]
        backend = make_backend()
        model.compile(backend=backend)
        cache = model(ids[:, :first], use_cache=True).past_key_values
        actual = model(ids[:, first:], past_key_values=cache).logits
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
    assert kinds(backend) == [["prefill"] * 2, ["extend"] * 2]
