"""Graph breaks: each part is compiled by itself, and knows which layers of the model it holds."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from packaging.version import Version
from torch import nn
from transformers import StaticCache

from minikv_compile import KVTensor, explain
from minikv_compile.passes.layers import GRAPHS

from .helpers import VOCAB, PlainDecoder, captured, causal, compiled, greedy, make_backend, prompt, run_plain, tiny


def broken(layers, how, at=1, **changes):
    """A decoder with a break in its layer `at`: around the whole layer, which is then not compiled, or inside of it."""
    model = tiny(layers=layers, **changes)
    layer = model.model.layers[at]
    if how == "disabled":
        layer.forward = torch._dynamo.disable(layer.forward)
    else:
        forward = layer.mlp.forward

        def with_break(x):
            torch._dynamo.graph_break()
            return forward(x)

        layer.mlp.forward = with_break
    return model


def layers_of(backend):
    """The layers that graphs of each kind hold."""
    found = {}
    for graph in backend.graphs:
        for site in graph:
            found.setdefault(site.kind or site.reason, set()).add(site.layer)
            assert site.layer_known
    return found


SKIPPED = [("disabled", 2, 2), ("inside", -1, 2)]
if Version(torch.__version__) >= Version("2.12"):  # before, a part behind the break does not know its layer, and says so
    SKIPPED.append(("inside", -3, 0))


@pytest.mark.slow
@pytest.mark.parametrize("how, skip, skipped", SKIPPED)
def test_skipped_layers(how, skip, skipped):
    model, backend = broken(3, how), make_backend(skip_layers=(skip,))
    prompts = [prompt(20), prompt(12, 2)]  # the second recompiles
    expected = [greedy(model, ids, 2).sequences for ids in prompts]
    compiled(model, backend)
    for ids, tokens in zip(prompts, expected, strict=True):
        got = greedy(model, ids, 2)
        assert torch.equal(got.sequences, tokens) and captured()[1] >= 1
        for layer, kept in enumerate(got.past_key_values.layers):
            compiled_layer = layer != skipped and not (how == "disabled" and layer == 1)
            assert isinstance(kept.keys, KVTensor) == compiled_layer, layer
    taken = {0, 1, 2} - {skipped} - ({1} if how == "disabled" else set())
    found = layers_of(backend)
    assert (found["prefill"], found["decode"], found["listed in skip_layers"]) == (taken, taken, {skipped})


@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.12"), reason="the mask is another graph's there: policies that drop leave it alone"
)
def test_budgets_are_those_of_the_whole_model():
    ids, kept = prompt(1344), []
    for how in (None, "inside"):
        torch._dynamo.reset()
        torch.manual_seed(3)
        model = tiny(layers=4) if how is None else broken(4, how)
        with torch.no_grad():
            cache = compiled(model, make_backend("minikv"))(ids, use_cache=True).past_key_values
        kept.append([layer.keys.kept_mask().sum().item() for layer in cache.layers])
    assert kept[0] == kept[1] and kept[0] == sorted(kept[0], reverse=True) and len(set(kept[0])) == 4


def test_static_cache():
    """Its buffers are arguments of the later parts, where they can be taken as well."""
    model, backend = broken(3, "inside"), make_backend()
    ids = prompt(30)
    expected = greedy(model, ids).sequences
    cache = StaticCache(model.config, max_cache_len=64)
    got = greedy(compiled(model, backend), ids, past_key_values=cache, disable_compile=True)
    assert torch.equal(got.sequences, expected)


def test_layers_that_are_not_known_are_said_to_be(caplog):
    """A decoder whose attention is no module of its own."""

    def attend(q, k, v, past):
        torch._dynamo.graph_break()
        return causal(q, k, v, past)

    model, ids, backend = PlainDecoder(attend, layers=3), prompt(30), make_backend(skip_layers=(0,))
    expected, _ = run_plain(model, ids, 25)
    got, _ = run_plain(torch.compile(model, backend=backend), ids, 25)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    assert not any(site.layer_known for graph in backend.graphs for site in graph)
    assert "which of its layers these 1 are is not known" in caplog.text
    assert "0?" in str(explain(model, ids))


def test_a_function_around_the_model_is_whole():
    model, ids, backend = tiny(layers=3), prompt(30), make_backend(skip_layers=(-1,))

    @torch.compile(backend=backend)
    def step(ids):
        return model(ids, use_cache=True).past_key_values

    with torch.no_grad():
        cache = step(ids)
    assert [isinstance(layer.keys, KVTensor) for layer in cache.layers] == [True, True, False]
    assert all(site.layer_known for graph in backend.graphs for site in graph)


def outside(batch, n, length, first=0, additive=False):
    """A mask [batch, 1, n, length] as another graph makes it: causal, `first` tokens of padding in row 1."""
    mask = torch.arange(length) <= torch.arange(length - n, length)[:, None]
    mask = mask & (torch.arange(length) >= torch.tensor([0, first])[:batch, None, None])
    return torch.where(mask, 0.0, torch.finfo(torch.float32).min)[:, None] if additive else mask[:, None]


def masked(q, k, v, past, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("preset", ["lossless", "default"])
def test_masks_of_another_graph(preset, additive):
    model, ids, backend = PlainDecoder(masked), prompt(300, 2), make_backend(preset, strict=True)
    step, results = torch.compile(model, backend=backend), []
    with torch.no_grad():
        for call in (model, step):
            past, out, end = None, [], 0
            for n in (280, 1, 1, 9, 1):  # a prompt, steps, a second turn
                end += n
                logits, past = call(ids[:, end - n : end], past, mask=outside(2, n, end, 7, additive))
                out.append(logits)
            results.append(torch.cat(out, 1))
        assert all(isinstance(x, KVTensor) for pair in past for x in pair)
        assert past[0][0].kept_mask()[1, 0].tolist() == [False] * 7 + [True] * 285
        if preset == "lossless":
            for row, first in ((0, 0), (1, 7)):
                torch.testing.assert_close(results[1][row, first:], results[0][row, first:], rtol=0, atol=1e-4)
        assert results[1].isfinite().all()
        for _ in range(3):  # a graph that is there raises when it runs, a new one when it is made
            with pytest.raises(Exception, match="be causal|is not causal"):
                step(ids[:, :9], past, mask=outside(2, 9, 301, 7, additive).roll(1, 2))
        with pytest.raises(ValueError, match="does not fit"):
            step(ids[:, :1], past, mask=outside(2, 1, 293, 9, additive))


def test_a_mask_of_another_graph_that_is_not_causal_is_left_alone():
    model, ids, backend = PlainDecoder(masked), prompt(40, 2), make_backend()
    mask = outside(2, 40, 40) | (torch.arange(40) < 5)  # a prefix that all see
    with torch.no_grad():
        expected, _ = model(ids, mask=mask)
        actual, past = torch.compile(model, backend=backend)(ids, mask=mask)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
    assert all("from outside of the graph, is not causal" in site.reason for site in backend.graphs[0])
    assert type(past[0][0]) is torch.Tensor


def test_masks_of_another_graph_where_tokens_are_dropped():
    """A window that begins to hide tokens could not be told from padding: the sites stay the model's own."""
    model, ids, backend = PlainDecoder(masked), prompt(301), make_backend("minikv")
    step = torch.compile(model, backend=backend)
    hidden = outside(1, 1, 301) & (torch.arange(301) >= 296)
    with torch.no_grad():
        _, past = step(ids[:, :300], mask=outside(1, 300, 300))
        actual, _ = step(ids[:, 300:], past, mask=hidden)
        _, past = model(ids[:, :300], mask=outside(1, 300, 300))
        expected, _ = model(ids[:, 300:], past, mask=hidden)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
    assert not any(site.kind for graph in backend.graphs for site in graph)


class Attention(nn.Module):
    """Between two breaks, and without a number of its own: all layers' graphs are alike."""

    def __init__(self, width=64, heads=4):
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x, past):
        torch._dynamo.graph_break()
        q, k, v = self.qkv(x).unflatten(-1, (3 * self.heads, -1)).transpose(1, 2).split(self.heads, 1)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        out = causal(q, k, v, past is not None)
        torch._dynamo.graph_break()
        return self.out(out.transpose(1, 2).flatten(2)), (k, v)


class AlikeDecoder(nn.Module):
    def __init__(self, layers=4):
        super().__init__()
        self.tokens, self.layers = nn.Embedding(VOCAB, 64), nn.ModuleList(Attention() for _ in range(layers))

    def forward(self, ids, past=None):
        x, kept = self.tokens(ids), []
        for i, layer in enumerate(self.layers):
            out, pair = layer(x, None if past is None else past[i])
            x, kept = x + out, [*kept, pair]
        return x, tuple(kept)


class InnerDecoder(nn.Module):
    """All layers in one method, with a break in front of each: no part is of one module."""

    def __init__(self, layers=4, width=64, heads=4):
        super().__init__()
        self.heads, self.qkv = heads, nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(layers))

    def attend(self, heads):
        q, k, v = heads.split([self.heads] * 3, 1)
        return causal(q, k, v, False), (k, v)

    def forward(self, x):
        kept = []
        for qkv in self.qkv:
            torch._dynamo.graph_break()
            out, pair = self.attend(qkv(x).unflatten(-1, (3 * self.heads, -1)).transpose(1, 2))
            x, kept = x + out.transpose(1, 2).flatten(2), [*kept, pair]
        return x, tuple(kept)


class OuterDecoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.model = nn.Embedding(VOCAB, 64), InnerDecoder()

    def forward(self, ids):
        return self.model(self.tokens(ids))


def test_a_method_of_all_layers_is_of_none(caplog):
    backend = make_backend("minikv")
    with torch.no_grad():
        torch.compile(OuterDecoder().eval(), backend=backend)(prompt(300))
    for graph in backend.graphs:
        known = {site.layer for site in graph if site.layer_known}
        assert len(known) in (0, sum(site.layer_known for site in graph))
    sites = [site for graph in backend.graphs for site in graph]
    known = [site.layer for site in sites if site.layer_known]
    assert len(known) == len(set(known))
    assert all(site.layer_known for site in sites) or "which of its layers" in caplog.text


def test_a_module_in_several_layers_places_is_of_none(caplog):
    model, backend = AlikeDecoder(), make_backend("minikv")
    model.layers = nn.ModuleList([model.layers[0]] * 3)
    with torch.no_grad():
        _, past = torch.compile(model.eval(), backend=backend)(prompt(300))
    assert len(past) == 3 and all(isinstance(k, KVTensor) for k, _ in past)
    assert not any(site.layer_known for graph in backend.graphs for site in graph)
    assert "which of its layers" in caplog.text


def test_another_name_for_the_layers_is_no_other_place():
    model, backend = AlikeDecoder(), make_backend("minikv", skip_layers=(2,))
    model.blocks, model.first = model.layers, model.layers[0]
    with torch.no_grad():
        _, past = torch.compile(model.eval(), backend=backend)(prompt(300))
    assert [isinstance(k, KVTensor) for k, _ in past] == [True, True, False, True]
    assert all(site.layer_known for graph in backend.graphs for site in graph)


def test_one_shared_layer_makes_all_unknown(caplog):
    """The layers behind it would be counted too low."""
    model, backend = AlikeDecoder(), make_backend("minikv", skip_layers=(3,))
    model.layers[2] = model.layers[0]
    with torch.no_grad():
        torch.compile(model.eval(), backend=backend)(prompt(300))
    sites = [site for graph in backend.graphs for site in graph]
    assert sites and not any(site.layer_known for site in sites)
    assert "which of its layers" in caplog.text


def test_parts_without_attention():
    """Of a function, which is no module."""

    def double_and_more(x):
        y = x * 2
        torch._dynamo.graph_break()
        return y + 1

    assert torch.compile(double_and_more, backend=make_backend("minikv"))(torch.ones(3)).tolist() == [3.0, 3.0, 3.0]


def test_many_layers_that_are_alike():
    """Each has graphs of its own, past Dynamo's limits, if the configuration tells layers apart; else all share one."""
    limits = dict(recompile_limit=8, accumulated_recompile_limit=16)
    for preset, graphs in (("minikv", 40), ("default", 2)):
        torch._dynamo.reset()
        backend = make_backend(preset)
        with torch.no_grad(), torch._dynamo.config.patch(limits):
            model = torch.compile(AlikeDecoder(20).eval(), backend=backend)
            _, past = model(prompt(300))
            _, past = model(prompt(1), past)
        assert all(isinstance(k, KVTensor) for k, _ in past)
        assert sum(len(graph) > 0 for graph in backend.graphs) == graphs


def test_other_threads_have_dynamos_limits_raised_too():
    """torch keeps what is set for the thread that set it: the others would run uncompressed past 8 graphs."""
    model = torch.compile(PlainDecoder(), backend=make_backend())
    with torch.no_grad():
        model(prompt(20))
    with ThreadPoolExecutor(1) as pool:
        limits = pool.submit(lambda: (torch._dynamo.config.recompile_limit, torch._dynamo.config.accumulated_recompile_limit))
    one, all_together = limits.result()
    assert one >= GRAPHS and all_together >= 4 * GRAPHS


@pytest.mark.parametrize("changes", [dict(), dict(skip_layers=(2,))])
def test_graphs_that_are_alike_are_of_one_layer_each(changes):
    """Dynamo would take the first layer's graph for all of them, and so its budget."""
    torch.manual_seed(0)
    backend = make_backend("minikv", **changes)
    with torch.no_grad():
        _, past = torch.compile(AlikeDecoder().eval(), backend=backend)(prompt(1344))
    kept = [k.kept_mask().sum().item() if isinstance(k, KVTensor) else None for k, _ in past]
    assert [i for i, count in enumerate(kept) if count is None] == list(changes.get("skip_layers", ()))
    counts = [count for count in kept if count is not None]
    assert counts == sorted(set(counts), reverse=True)
    assert [site.layer for graph in backend.graphs for site in graph] == [0, 1, 2, 3]
