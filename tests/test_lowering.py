"""Inductor's templates of decode attention: on the GPU where there is one, else in Triton's interpreter, for which
tensors on the CPU must look to Inductor as if Triton could run them."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor import config as inductor
from torch._inductor.utils import run_and_get_code
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.torch_version import TorchVersion
from transformers import DynamicCache
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from minikv_compile import MiniKVBackend, MiniKVConfig, compat, lowering, ops
from minikv_compile.kernels.linear import parts_of
from minikv_compile.passes import linears
from minikv_compile.passes.graph import callee
from minikv_compile.passes.rewrite import Rewriter

from .helpers import VOCAB, prompt, tiny

minikv = torch.ops.minikv
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PRESETS = ["default", "minikv", "mikv", "lossless"]
HEADS, KV_HEADS, DIM, BATCH = 4, 2, 32, 2
FUSES = DEVICE == "cpu" or TorchVersion(torch.__version__) >= (2, 13)
"""On a GPU Inductor of torch 2.11 compares loops that it has not merged yet, and sees no data shared with a template."""


class Hopper:
    """A driver for what only asks what there is."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self):
        return torch.device("cpu")


@pytest.fixture(autouse=True)
def templates(monkeypatch):
    lowering.register()
    monkeypatch.setattr(lowering, "DEVICES", {DEVICE})
    with inductor.patch(force_disable_caches=True):
        if DEVICE == "cuda":
            yield
            return
        monkeypatch.setattr(driver, "_active", Hopper())
        with inductor.patch(cpu_backend="triton"):
            yield


def cache(preset, seq, dtype=torch.float32):
    """(arguments of the op from the tier on, its configuration) for a compressed prompt with room for a token."""
    config = MiniKVConfig.preset(preset)
    k, v = torch.randn(2, BATCH, KV_HEADS, seq, DIM, device=DEVICE).to(dtype)
    scores = None if config.observed_queries is None else torch.rand(BATCH, KV_HEADS, seq, device=DEVICE)
    q_range = torch.rand(BATCH, KV_HEADS, DIM, device=DEVICE) + 0.1
    made = iter(minikv.compress(k, v, scores, None, None, 0, 1, config.to_json(), q_range))
    k, v = ({name: next(made) for name in ops.fields(config, role, False)} for role in ops.ROLES)
    tiers = [
        [part[name] for name in ops.tier_names(config, role)] for part, role in zip((k, v), ops.ROLES, strict=True)
    ]
    for x in (*tiers[0][:3], *tiers[1][:3], k["dense"], v["dense"]):
        compat.mark_dynamic(x, 2)
    return [*tiers, k["dense"], v["dense"], k["state"], seq], config.to_json()


def queries(dtype=torch.float32):
    shapes = (BATCH, HEADS, 1, DIM), (BATCH, KV_HEADS, 1, DIM), (BATCH, KV_HEADS, 1, DIM)
    return [torch.randn(shape, device=DEVICE).to(dtype) for shape in shapes]


def close(got, want):
    """The op's reference, on a CPU, adds up in another order."""
    torch.testing.assert_close(got, want, atol=5e-5, rtol=5e-5)


def copied(held):
    k_tier, v_tier, k_dense, v_dense, *rest = held
    return [k_tier, v_tier, k_dense.clone(), v_dense.clone(), *rest]


def attend(config, padding=None):
    """Decode attention with something in front and behind, as in a model."""

    def run(q, k, v, *held):
        out = minikv.decode_attention(q * 2, k, v, *held, DIM**-0.5, config, padding)
        return out.transpose(1, 2).flatten(2) + 1

    return run


@torch.no_grad()
def compile_and_run(function, *args):
    """(result, generated code)."""
    result, (code,) = run_and_get_code(torch.compile(function), *args)
    return result, "\n".join(line for line in code.splitlines() if not line.startswith("#"))


@pytest.mark.parametrize("preset", PRESETS)
def test_equals_the_op(preset):
    held, config = cache(preset, 300)
    new, twin = queries(), copied(held)
    want = attend(config)(*new, *twin)
    got, code = compile_and_run(attend(config), *new, *held)
    close(got, want)
    assert torch.equal(held[2], twin[2]) and torch.equal(held[3], twin[3])
    # Three launches, what follows is in the last one (or nothing is), and the op is not called.
    calls = code.split("def call")[1].split("def get_args")[0]
    assert len(re.findall(r"triton_tem_fused\w*\.run\(", calls)) == 3
    assert bool(re.search(r"triton_tem_fused_add\w*\.run\(", code)) == FUSES
    assert len(re.findall(r"triton_poi_fused\w*\.run\(", calls)) == (1 if FUSES else 2)
    assert not re.search(r"minikv\.decode_attention\S*\(", code)
    # Sizes of the cache are symbols: nothing that large is made or copied.
    assert re.search(r"\bs\d+ = arg", code)
    assert not re.search(r"empty_strided\w*\(\([^)]*\bs\d+|clone|copy_\(", calls)


def test_a_new_length_compiles_and_measures_nothing():
    held, config = cache("default", 300)
    function = torch.compile(attend(config))
    with torch.no_grad():
        function(*queries(), *copied(held))
        held, _ = cache("default", 301)  # the length turns into a symbol
        function(*queries(), *held)
        measured = counters["inductor"]["select_algorithm_autotune"]
        for seq in (430, 700):
            held, _ = cache("default", seq)
            new, twin = queries(), copied(held)
            with torch._dynamo.config.patch(error_on_recompile=True):
                got = function(*new, *held)
            close(got, attend(config)(*new, *twin))
    assert counters["inductor"]["select_algorithm_autotune"] == measured


def test_inductor_chooses(monkeypatch):
    """Each configuration may win; the launch after it knows which one did."""
    from torch._inductor.select_algorithm import AlgorithmSelectorCache

    held, config = cache("default", 900)
    new, seen = queries(), []
    for place in range(3):
        torch._dynamo.reset()

        def benchmark(self, choices, nodes, layout, make, *args, place=place, **kwargs):
            state = make[len(nodes) - 1](nodes[-1])
            seen.append((place, len(choices), state.tolist()))
            return {choice: float(i != place) for i, choice in enumerate(choices)}

        monkeypatch.setattr(AlgorithmSelectorCache, "benchmark", benchmark)
        twin, mine = copied(held), copied(held)
        with inductor.patch(max_autotune=True, precompilation_timeout_seconds=0):
            got, code = compile_and_run(attend(config), *new, *mine)
        seen[-1] += re.search(r"num_stages=(\d+),\s+num_warps=1,", code).groups()
        seen[-1] += re.search(r"PROGRAMS : \S+ = (\d+)", code).groups()
        close(got, attend(config)(*new, *twin))
    assert [choices for _, choices, *_ in seen] == [3, 3, 3]
    assert len({tuple(row[3:]) for row in seen}) == 3
    # What is measured: full regions of the sizes that the graph is compiled with.
    offset, _, in_tier, *_ = seen[0][2][0]
    assert 901 - offset == held[2].shape[2] and in_tier == held[0][0].shape[2] * 128


def test_the_op_runs_where_the_templates_do_not_apply(monkeypatch):
    held, config = cache("lossless", 20)
    padding = torch.ones(BATCH, 21, dtype=torch.bool, device=DEVICE)
    _, code = compile_and_run(attend(config, padding), *queries(), *copied(held))
    assert "minikv.decode_attention.default(" in code and "triton_tem" not in code
    torch._dynamo.reset()
    monkeypatch.setattr(lowering, "DEVICES", set())
    _, code = compile_and_run(attend(config), *queries(), *held)
    assert "minikv.decode_attention.default(" in code and "triton_tem" not in code


class Decoder(nn.Module):
    """Two layers of attention that keep keys and values; Dynamo of torch 2.11 cannot trace `helpers.PlainDecoder`."""

    def __init__(self):
        super().__init__()
        self.tokens, self.out = nn.Embedding(VOCAB, HEADS * DIM), nn.Linear(HEADS * DIM, HEADS * DIM)
        self.qkv = nn.ModuleList(nn.Linear(HEADS * DIM, (HEADS + 2 * KV_HEADS) * DIM) for _ in range(2))

    def forward(self, ids, past=None):
        x, kept = self.tokens(ids), []
        for i, layer in enumerate(self.qkv):
            heads = layer(x).unflatten(2, (-1, DIM)).transpose(1, 2)
            q, k, v = heads.split([HEADS, KV_HEADS, KV_HEADS], 1)
            if past is not None:
                k, v = torch.cat([past[i][0], k], 2), torch.cat([past[i][1], v], 2)
            kept.append((k, v))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=past is None, enable_gqa=True)
            x = x + self.out(out.transpose(1, 2).flatten(2))
        return x, kept


def decode_in_both(preset, dtype=torch.float32, compare=close):
    """A model's decode graph, compiled by Inductor, against the same graph run op by op.

    Attention as plain products, which is what a GPU has for grouped heads in float32: they find that a layer's values
    are as long as its keys, so that one length goes by the other's symbol, and of the two only one is an input.
    """
    model, config = Decoder().to(DEVICE, dtype), MiniKVConfig.preset(preset)
    results = []
    for inner in ("eager", "inductor"):
        torch._dynamo.reset()
        backends = (MiniKVBackend(config, i) for i in ("eager", inner))
        prefill, decode = (torch.compile(model, backend=backend, fullgraph=True) for backend in backends)
        torch.manual_seed(1)
        steps = []
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            _, past = prefill(prompt(300, BATCH).to(DEVICE))
            for _ in range(3):
                step, past = decode(prompt(1, BATCH).to(DEVICE), past)
                steps.append(step)
        results.append(torch.cat(steps))
    compare(*results)


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_through_the_backend(preset, monkeypatch):
    """On the CPU the pass would take the op's plain PyTorch. Templates ask nothing about the sizes of the tensors inside."""
    init, call, called, is_free, free = Rewriter.__init__, lowering._call, [], compat._is_free, []

    def outside_the_graph(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.fused = False

    monkeypatch.setattr(Rewriter, "__init__", outside_the_graph)
    monkeypatch.setattr(lowering, "_call", lambda name, *args, **more: called.append(name) or call(name, *args, **more))
    monkeypatch.setattr(compat, "_is_free", lambda *args: free.append(is_free(*args)) or free[-1])
    decode_in_both(preset)
    assert free and all(free)
    assert called == ["prepare", "split", "merge"] * 2


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["default", "lossless"])
def test_products_through_the_backend(preset, monkeypatch):
    """Products of one layer in one part, which have as many elements as what reads them. On the CPU attention would be in plain
    PyTorch, which the interpreter does not run."""
    init, densify, call, called = Rewriter.__init__, Rewriter._densify_rest, lowering._call, []

    def attention_outside(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.merges, self.fused = self.fused, False

    def merged_all_the_same(self):
        densify(self)
        if self.merges:
            linears.merge_linears(self)

    def compare(want, got):
        assert (got - want).abs().max() < 0.02 * want.abs().max()

    monkeypatch.setattr(Rewriter, "__init__", attention_outside)
    monkeypatch.setattr(Rewriter, "_densify_rest", merged_all_the_same)
    monkeypatch.setattr(lowering, "_call", lambda name, *args, **more: called.append(name) or call(name, *args, **more))
    decode_in_both(preset, torch.bfloat16, compare)
    assert called == ["linear", "prepare", "split", "merge", "linear"] * 2


@pytest.mark.slow
def test_through_the_backend_without_templates(monkeypatch):
    monkeypatch.setattr(lowering, "DEVICES", set())
    monkeypatch.setattr(lowering, "_call", None)
    with inductor.patch(cpu_backend="cpp"):
        decode_in_both("default")


@pytest.mark.parametrize(
    "outputs, inputs, parts", [((128, 64), 256, 2), ((128,), 128, 1), ((64,), 512, 4), ((64, 64, 128), 384, 1), ((64, 64), 128, 1)]
)
def test_products_of_several_layers(outputs, inputs, parts):
    """Not the op. Parts are summed where the outputs are read: in the kernel itself, where it is one layer's and there is one."""
    x = torch.randn(2, 1, inputs, device=DEVICE).bfloat16()
    weights = [torch.randn(n, inputs, device=DEVICE).bfloat16() for n in outputs]
    assert parts_of(sum(outputs), inputs) == parts

    def run(x, *weights):
        found, begin = minikv.linear_parts(x, list(weights)), 0
        results = []
        for weight in weights:
            results.append(linears._outputs(found, begin, begin + weight.shape[0], x.dtype, None).relu() * 2)
            begin += weight.shape[0]
        return results

    got, code = compile_and_run(run, x, *weights)
    calls = code.split("def call")[1].split("def get_args")[0]
    assert len(re.findall(r"triton_tem_fused\w*\.run\(", calls)) == 1 and not re.search(r"minikv\.linear_parts\S*\(", calls)
    for result, weight in zip(got, weights, strict=True):
        torch.testing.assert_close(result, F.linear(x, weight).relu() * 2, atol=0.5, rtol=0.02)


@pytest.mark.parametrize("computed", [1, 2])
def test_once(computed):
    """What several kernels read is computed by each, or by one."""
    position, few, many = torch.randn(1, DIM, device=DEVICE), torch.randn(3, DIM, device=DEVICE), torch.randn(5, DIM, device=DEVICE)

    def run(position, *read):
        turned = position.cos()
        turned = minikv.once(turned) if computed == 1 else turned
        return [(x * turned).sum(1) for x in read]

    got, code = compile_and_run(run, position, few, many)
    torch.testing.assert_close(got, run(position, few, many))
    assert code.count("math.cos(") == computed and not re.search(r"minikv\.once", code)


def test_positions_of_a_step_are_turned_once(monkeypatch):
    """In the graph of a decode step: its cosine and its sine; of a prompt nothing."""
    found, model = [], tiny().to(DEVICE)

    def kept(module, inputs):
        found.append([node.args[0] for node in module.graph.nodes if node.target is minikv.once.default])
        return module

    monkeypatch.setattr(compat, "inner_compiler", lambda *_: kept)
    run = torch.compile(type(model).forward.__get__(model), backend=MiniKVBackend())
    caches = DynamicCache()
    with torch.no_grad():
        for ids in (prompt(40), prompt(1)):
            run(ids.to(DEVICE), past_key_values=caches)
    assert [len(nodes) for nodes in found] == [0, 2] and {callee(node) for node in found[1]} == {"cos", "sin"}


def test_caches_know_the_text(monkeypatch, tmp_path):
    sources = lowering._SOURCES
    for file in sources.glob("*.jinja"):
        (tmp_path / file.name).write_text(file.read_text())
    known = lowering.fingerprint()
    monkeypatch.setattr(lowering, "_SOURCES", tmp_path)
    assert lowering.fingerprint.__wrapped__() == known
    (tmp_path / "merge.py.jinja").write_text("another")
    assert lowering.fingerprint.__wrapped__() != known
    tags = []
    monkeypatch.setattr(
        torch._TorchCompileInductorWrapper, "__call__", lambda *_: tags.append(torch.compiler.config.cache_key_tag)
    )
    compiler = compat.inner_compiler("inductor", None, None)
    compiler(None, [3, torch.empty(1, device=DEVICE)])
    assert known in tags[0] and known not in torch.compiler.config.cache_key_tag
    # Graphs of other devices are cached as ever.
    monkeypatch.setattr(lowering, "DEVICES", {"another"})
    compiler(None, [3, torch.empty(1, device=DEVICE)])
    assert len(tags) == 2 and "minikv" not in tags[1]
