"""Decode steps that are captured in a CUDA graph. Without a GPU, a replay runs what was captured once more: with the tensors
that there were then, as a CUDA graph does."""

import copy
import gc
import logging
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import triton
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import DynamicCache

from minikv_compile import KVTensor, stepgraph
from minikv_compile.passes import step

from .helpers import PAD, PlainDecoder, captured, compiled, greedy, logits_of, make_backend, prompt, run_plain, tiny


class Graph:
    """Stands in for a `torch.cuda.CUDAGraph`."""

    made, replayed = 0, 0

    def __init__(self, run, outputs):
        self.run, self.outputs = run, outputs
        Graph.made += 1

    def replay(self):
        Graph.replayed += 1
        for out, now in zip(self.outputs, self.run(), strict=True):
            out.copy_(now)


def capture(run, device, old):
    # What a capture returns is written by the replay. Tensors of the storages are only read, but for their newest tokens.
    outputs = [torch.full_like(out, torch.nan) for out in run()]
    return Graph(run, outputs), outputs


@pytest.fixture(autouse=True)
def graphs(request, monkeypatch):
    """Steps are captured; by the stand-in, but in tests of a GPU."""
    on_gpu = request.node.get_closest_marker("gpu") is not None
    monkeypatch.setattr(step, "DEVICES", {"cuda" if on_gpu else "cpu"})
    if not on_gpu:
        monkeypatch.setattr(stepgraph, "capture", capture)
    monkeypatch.setattr(Graph, "made", 0)
    monkeypatch.setattr(Graph, "replayed", 0)


def without(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(step, "DEVICES", set())


def tokens(model, preset, ids, new, inner="eager", **inputs):
    result = greedy(compiled(model, make_backend(preset, inner)), ids, new, **inputs)
    return result.sequences, logits_of(result)


@pytest.mark.parametrize(("preset", "new"), [("default", 300), ("minikv", 140), ("mikv4", 300), ("lossless", 140)])
def test_the_same_tokens(preset, new, monkeypatch):
    """Through flushes, of which there is one in 128 tokens."""
    model, ids = tiny(), prompt(200)
    got, logits = tokens(model, preset, ids, new)
    # All steps but those in the first places, and in the places after a storage has grown.
    assert Graph.replayed > new * 0.9 and Graph.made <= 4
    without(monkeypatch)
    want, expected = tokens(model, preset, ids, new)
    assert torch.equal(got, want)
    torch.testing.assert_close(logits, expected)


def test_rows_with_padding(monkeypatch):
    model, ids = tiny(), prompt(180, 2)
    ids[0, :9], mask = PAD, torch.ones_like(ids)
    mask[0, :9] = 0
    got, logits = tokens(model, "mikv", ids, 150, attention_mask=mask)
    assert Graph.replayed > 130
    without(monkeypatch)
    want, expected = tokens(model, "mikv", ids, 150, attention_mask=mask)
    assert torch.equal(got, want)
    torch.testing.assert_close(logits, expected)


@torch.no_grad()
def test_a_mask_that_does_not_fit_is_still_seen():
    model, ids = compiled(tiny(), make_backend("default")), prompt(40, 2)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    cache = DynamicCache()
    model(ids, attention_mask=mask, past_key_values=cache)
    longer = torch.ones(2, 41, dtype=torch.int64)
    longer[1, :5] = 0
    with pytest.raises(ValueError, match="does not fit"):
        model(ids[:, :1], attention_mask=longer, past_key_values=cache)


def steps(model, cache, ids, **inputs):
    """Logits of tokens one by one, without a word on their positions."""
    return torch.cat([model(ids[:, i : i + 1], past_key_values=cache, **inputs).logits for i in range(ids.shape[1])], 1)


def read(model, ids):
    cache = DynamicCache()
    model(ids, past_key_values=cache)
    return cache


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_positions_from_the_length(inner, monkeypatch):
    model, ids, new = tiny(), prompt(150), prompt(20)
    model.compile(backend=make_backend("default", inner))
    got = steps(model, read(model, ids), new)
    assert Graph.replayed > 10
    without(monkeypatch)
    torch.testing.assert_close(got, steps(model, read(model, ids), new), atol=2e-4, rtol=2e-4)


@torch.no_grad()
def test_arguments_that_are_views(monkeypatch):
    """Tokens far apart, and one position for all rows."""
    model, ids, new, position = tiny(), prompt(150, 2), prompt(20, 2), torch.tensor([[7]]).expand(2, 1)
    model.compile(backend=make_backend("default"))
    got = steps(model, read(model, ids), new, position_ids=position)
    assert Graph.replayed > 10
    without(monkeypatch)
    torch.testing.assert_close(got, steps(model, read(model, ids), new, position_ids=position))


def test_a_hand_written_decoder(monkeypatch):
    model, ids = PlainDecoder(), prompt(240, 2)
    run = torch.compile(model, backend=make_backend("default"))
    got, _ = run_plain(run, ids, 200)
    assert Graph.replayed > 30
    without(monkeypatch)
    torch.testing.assert_close(got, run_plain(run, ids, 200)[0])


def test_beams():
    # Each step selects rows: no cache lies where it lay.
    model, ids = tiny(), prompt(60)
    want = model.generate(ids, max_new_tokens=12, num_beams=3, do_sample=False)
    got = compiled(model, make_backend()).generate(ids, max_new_tokens=12, num_beams=3, do_sample=False)
    assert torch.equal(got, want) and Graph.made == 0


@torch.no_grad()
def test_crop_and_copies(monkeypatch):
    """A rollback keeps the storages, a copy has its own; what one appends the other does not see."""

    def run(model):
        cache = read(model, ids)
        first = steps(model, cache, new[:, :30])
        other = copy.deepcopy(cache)
        cache.crop(-10)
        return [first, steps(model, cache, new[:, 30:50]), steps(model, other, new[:, 50:])]

    model, ids, new = tiny(), prompt(150), prompt(80)
    model.compile(backend=make_backend("default"))
    got = run(model)
    assert Graph.made == 2
    without(monkeypatch)
    torch.testing.assert_close(got, run(model))


@torch.no_grad()
@pytest.mark.parametrize(("turn", "made"), [(1, 0), (20, 4)])
def test_caches_in_turn(turn, made, monkeypatch):
    def run(model):
        caches, out = [read(model, ids) for ids in prompts], []
        for i in range(0, 40, turn):
            out += [steps(model, cache, new[:, i : i + turn]) for cache in caches]
        return out

    model, prompts, new = tiny(), [prompt(150), prompt(90)], prompt(40)
    model.compile(backend=make_backend("default"))
    got = run(model)
    assert Graph.made == made
    without(monkeypatch)
    torch.testing.assert_close(got, run(model))


@torch.no_grad()
def test_models_in_turn(monkeypatch):
    def run(models):
        caches, out = [read(model, ids) for model in models], []
        for i in range(0, 40, 10):
            out += [steps(*pair, new[:, i : i + 10]) for pair in zip(models, caches, strict=True)]
        return out

    backend, ids, new = make_backend("default"), prompt(150), prompt(40)
    models = [compiled(tiny(), backend) for _ in range(2)]
    got = run(models)
    assert Graph.replayed > 20
    without(monkeypatch)
    torch.testing.assert_close(got, run(models))


@torch.no_grad()
def test_weights_that_move_and_logits_that_are_kept():
    model, ids, one = tiny(), prompt(100), prompt(1)
    model.compile(backend=make_backend("lossless"))
    cache = read(model, ids)
    kept = [model(one, past_key_values=cache).logits for _ in range(10)]
    assert Graph.replayed and len({x.data_ptr() for x in kept}) == len(kept)
    assert not torch.equal(kept[-1], kept[-2])
    before, weight = Graph.replayed, model.lm_head.weight
    weight.data = weight.data * 0  # the same parameter
    assert not model(one, past_key_values=cache).logits.any() and Graph.replayed == before


@torch.no_grad()
def test_a_capture_that_fails(monkeypatch, caplog):
    def fail(run, device, old):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(stepgraph, "capture", fail)
    model, ids, new = tiny(), prompt(100), prompt(20)
    want = steps(model, read(model, ids), new)
    model.compile(backend=make_backend())
    cache = read(model, ids)
    with caplog.at_level(logging.WARNING, "minikv"):
        got = steps(model, cache, new)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert sum("without a CUDA graph" in r.message for r in caplog.records) == 1


@torch.no_grad()
def test_inside_a_capture_of_the_caller(monkeypatch):
    """His graph is of his step alone, and ours is good afterwards."""
    model = compiled(tiny(), make_backend())
    cache, new = read(model, prompt(100)), prompt(10)
    other = copy.deepcopy(cache)
    want = steps(model, cache, new)
    made, replayed = Graph.made, Graph.replayed
    with monkeypatch.context() as within:
        within.setattr(stepgraph, "is_capturing", lambda device: True)
        torch.testing.assert_close(steps(model, other, new), want)
        assert (Graph.made, Graph.replayed) == (made, replayed)
    steps(model, cache, prompt(3))
    assert made == Graph.made and Graph.replayed == replayed + 3


@torch.no_grad()
def test_nothing_is_captured_while_another_thread_decodes():
    model = compiled(tiny(), make_backend())
    cache = read(model, prompt(100))
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(stepgraph.is_alone).result() in (True, False)
        steps(model, cache, prompt(10))
        assert Graph.made == 0
    steps(model, cache, prompt(3))
    assert Graph.made == 1


@torch.no_grad()
@pytest.mark.parametrize("asked", [{"mode": "max-autotune-no-cudagraphs"}, {"options": {"triton.cudagraphs": False}}])
def test_who_wants_none_gets_none(asked):
    model = tiny()
    model.compile(backend=make_backend(), **asked)
    steps(model, read(model, prompt(100)), prompt(10))
    assert Graph.made == 0 and captured() == (2, 0)


@torch.no_grad()
def test_holds_nothing(monkeypatch):
    """A cache is freed though its step was captured, and a model is."""
    monkeypatch.setattr(stepgraph, "capture", lambda run, device, old: (Replays(), run()))
    model = tiny()
    run = torch.compile(model, backend=make_backend())
    cache = read(run, prompt(100))
    steps(run, cache, prompt(10))
    held = [weakref.ref(cache.layers[0].keys.dense), weakref.ref(model.lm_head.weight)]
    del cache
    gc.collect()
    assert held[0]() is None and held[1]() is not None
    del run, model
    torch._dynamo.reset()
    gc.collect()
    assert held[1]() is None


class Replays:
    def replay(self):
        pass


class Noisy(nn.Module):
    """A decoder whose steps are none to replay."""

    def __init__(self, kind):
        super().__init__()
        self.inner, self.kind = PlainDecoder(), kind

    def forward(self, ids, past=None, **inputs):
        logits, kept = self.inner(ids, past, **inputs)
        if self.kind == "random":
            logits = logits + torch.rand_like(logits)
        elif self.kind == "sizes":
            logits = logits * kept[0][0].shape[2]
        elif self.kind == "views":
            return (logits, ids[:, -1:]), kept
        return logits, kept


@torch.no_grad()
@pytest.mark.parametrize("kind", ["", "random", "sizes", "views"])
def test_which_graphs_are_steps(kind):
    run, ids = torch.compile(Noisy(kind), backend=make_backend()), prompt(60)
    _, past = run(ids)
    for _ in range(8):
        _, past = run(prompt(1), past)
    assert Graph.made == (not kind) and captured() == (2, 0)


@torch.no_grad()
def test_a_compiler_of_the_users_is_called_each_time():
    calls = []

    def inner(module, inputs):
        return lambda *args: calls.append(1) or module(*args)

    model = compiled(tiny(), make_backend(inner=inner))
    steps(model, read(model, prompt(60)), prompt(10))
    assert len(calls) == 11 and Graph.made == 0


@torch.no_grad()
def test_what_the_graph_takes():
    model = compiled(tiny(), make_backend("default"))
    cache = read(model, prompt(60))
    taken = []
    init = stepgraph.StepGraph.__init__

    def spy(self, compiled, layout):
        taken.append((compiled, layout))
        init(self, compiled, layout)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stepgraph.StepGraph, "__init__", spy)
        steps(model, cache, prompt(2))
    ((_, layout),) = taken
    assert len(layout.states) == 2 and len(layout.fed) == 1  # a state for each layer; the token
    assert not layout.strided and not {*layout.fed} & {*layout.held}
    assert len(layout.sized) == 16  # tiers and dense regions, of keys and values
    assert isinstance(cache.layers[0].keys, KVTensor)


def test_strides_that_sizes_do_not_tell():
    seen = []
    x = torch.randn(9, 11)
    torch.compile(lambda x: x + 1, backend=lambda module, inputs: seen.append(module) or module, dynamic=True)(x[:, :5])
    [node] = [node for node in seen[0].graph.find_nodes(op="placeholder") if isinstance(node.meta["example_value"], torch.Tensor)]
    layout = stepgraph.Layout.of(SimpleNamespace(states=(), fed=(), lengths=None), [node])
    assert layout.held == layout.sized == layout.strided == (0,)
    assert layout.now([x[:, :5]]) != layout.now([x.flatten()[:45].view(9, 5)])


@torch.no_grad()
def test_weights_that_have_no_address():
    """Of a weight that is made of other tensors, nothing tells where those lie."""
    quantize_(model := tiny(), Int8WeightOnlyConfig())
    model = compiled(model, make_backend("default"))
    steps(model, read(model, prompt(60)), prompt(10))
    assert Graph.made == 0


@torch.no_grad()
def test_threads_share_a_model():
    """Each with a cache of its own, step by step in turn: no length is another's."""
    model = compiled(tiny(), make_backend("default"))
    caches, token = [read(model, prompt(n)) for n in (60, 90)], prompt(1)
    alone = [model(token, past_key_values=copy.deepcopy(cache)).logits for cache in caches]

    def one(cache):
        with torch.no_grad():
            return model(token, past_key_values=cache).logits

    with ThreadPoolExecutor(2) as pool:
        got = list(pool.map(one, caches))
    for ours, theirs in zip(got, alone, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.gpu
@torch.no_grad()
def test_a_capture_that_fails_leaves_the_allocator_alone():
    def run():
        torch.zeros(1, device="cuda").item()  # waits for the device, which no graph can hold

    with pytest.raises(RuntimeError):
        stepgraph.capture(run, torch.device("cuda", 0), None)
    torch.cuda.empty_cache()
    assert torch.rand(1, device="cuda") < 1


@pytest.mark.gpu
@torch.no_grad()
def test_on_a_gpu(monkeypatch):
    """With real CUDA graphs: the same tokens as without, through flushes and growth; a dropped cache gives its memory back."""
    model, ids = tiny(head_dim=64).to("cuda", torch.bfloat16), prompt(300, 2).cuda()
    got, logits = tokens(model, "default", ids, 300, inner="inductor")
    graphs = [x for x in gc.get_objects() if type(x) is stepgraph.StepGraph]  # not isinstance: weak proxies may be dead
    assert any(x._outputs is not None for x in graphs) and not any(x._fails for x in graphs)
    cache = read(model, ids)
    steps(model, cache, prompt(10, 2).cuda())
    held = sum(t.nbytes_held for layer in cache.layers for t in (layer.keys, layer.values))
    before = torch.cuda.memory_allocated()
    del cache
    assert before - torch.cuda.memory_allocated() >= held
    without(monkeypatch)
    want, expected = tokens(model, "default", ids, 300, inner="inductor")
    assert torch.equal(got, want)
    torch.testing.assert_close(logits, expected)


@pytest.mark.gpu
@torch.no_grad()
def test_no_step_waits_for_triton(monkeypatch):
    """What a flush needs is compiled with the prompt; of heads that no other test here has."""
    model, compiled_now = tiny(head_dim=48).to("cuda", torch.bfloat16), []
    model.compile(backend=make_backend("default"))
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda **kwargs: compiled_now.append(kwargs["repr"]))
    cache = read(model, prompt(300, 3).cuda())
    assert any("flush" in kernel for kernel in compiled_now)
    steps(model, cache, prompt(2, 3).cuda())
    compiled_now.clear()
    before = cache.layers[0].keys.state.clone()
    steps(model, cache, prompt(200, 3).cuda())
    assert not torch.equal(cache.layers[0].keys.state, before)  # there was a flush
    assert not compiled_now
