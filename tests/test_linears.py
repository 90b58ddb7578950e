"""Linear layers of a decode step that become one product."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._inductor import config as inductor
from torch._inductor.utils import run_and_get_code
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import DynamicCache
from triton.runtime import driver

from minikv_compile import MiniKVBackend, MiniKVCache, MiniKVConfig, compat, lowering
from minikv_compile.passes import linears

from .helpers import prompt, tiny
from .test_lowering import DEVICE, Hopper

minikv = torch.ops.minikv


def wide(architecture="llama", dtype=torch.bfloat16, **changes):
    """A model whose layers have sizes that the kernel takes."""
    changes = {"heads": 4, "kv_heads": 2, "head_dim": 32, "mlp": 128, **changes}
    return tiny(architecture, dtype=dtype, **changes).to(DEVICE)


@pytest.fixture(autouse=True)
def devices(monkeypatch):
    monkeypatch.setattr(lowering, "DEVICES", {DEVICE})


@torch.no_grad()
def step_of(model, monkeypatch, batch=1, inner=None):
    """(logits of a step, its graph)."""
    graphs = []

    def kept(module, inputs):
        graphs.append(module.graph)
        return module

    monkeypatch.setattr(compat, "inner_compiler", lambda *_: kept)
    run, cache = torch.compile(type(model).forward.__get__(model), backend=MiniKVBackend()), DynamicCache()
    for ids in (prompt(40, batch), torch.full((batch, 1), 7)):
        logits = run(ids.to(DEVICE), past_key_values=cache).logits
    return logits, graphs[-1]


def calls(graph):
    """The weights of each product of several, by their numbers of outputs; and how many layers are left."""
    merged = [[w.meta["example_value"].shape[0] for w in n.args[1]] for n in graph.nodes if n.target is minikv.linear_parts.default]
    return merged, sum(n.target is F.linear for n in graph.nodes)


@pytest.mark.parametrize(
    "architecture, changes", [("llama", {}), ("qwen3", {}), ("llama", {"attention_bias": True, "mlp_bias": True})]
)
def test_a_step(architecture, changes, monkeypatch):
    model = wide(architecture, **changes)
    torch.manual_seed(0)
    got, graph = step_of(model, monkeypatch)
    merged, left = calls(graph)
    assert merged == [[128, 64, 64], [128], [128, 128], [128]] * 2 and left == 1  # the logits: their number is odd
    torch.compiler.reset()
    monkeypatch.setattr("minikv_compile.passes.rewrite.merge_linears", lambda rewriter: None)
    torch.manual_seed(0)
    want, graph = step_of(model, monkeypatch)
    assert calls(graph) == ([], 15)
    assert (got - want).abs().max() < 0.02 * want.abs().max()


def test_not_in_prompts(monkeypatch):
    graphs, model = [], wide()
    monkeypatch.setattr(compat, "inner_compiler", lambda *_: lambda module, inputs: graphs.append(module.graph) or module)
    run = torch.compile(type(model).forward.__get__(model), backend=MiniKVBackend())
    with torch.no_grad():
        run(prompt(40).to(DEVICE), past_key_values=DynamicCache())
    assert calls(graphs[0]) == ([], 15)


@torch.no_grad()
def test_rows_of_a_cache(monkeypatch):
    """The rows of a `MiniKVCache` are known, though Dynamo has seen another number of them."""
    graphs, model = [], wide()
    monkeypatch.setattr(compat, "inner_compiler", lambda *_: lambda module, inputs: graphs.append(module.graph) or module)
    run = torch.compile(type(model).forward.__get__(model), backend=MiniKVBackend())
    for rows in (1, 5):
        cache = MiniKVCache(model, 200, rows)
        for ids in (prompt(40, rows), prompt(1, rows)):
            run(ids.to(DEVICE), past_key_values=cache)
        assert calls(graphs[-1])[0] == [[128, 64, 64], [128], [128, 128], [128]] * 2


@pytest.mark.parametrize("why", ["rows", "dtype", "sizes", "device", "weights"])
def test_left_alone(why, monkeypatch):
    model = wide(dtype=torch.float32 if why == "dtype" else torch.bfloat16, **({"head_dim": 24} if why == "sizes" else {}))
    if why == "device":
        monkeypatch.setattr(lowering, "DEVICES", set())
    if why == "weights":
        quantize_(model, Int8WeightOnlyConfig())
    _, graph = step_of(model, monkeypatch, batch=17 if why == "rows" else 2)
    merged, left = calls(graph)
    assert merged == [] and left == 15


class Headed(nn.Module):
    """Two layers read what a model returns, which is written to in between if it `writes`; one of them is returned as it is."""

    def __init__(self, writes):
        super().__init__()
        self.model, self.writes = wide(), writes
        self.first, self.second = (nn.Linear(128, n, dtype=torch.bfloat16, device=DEVICE) for n in (64, 192))

    def forward(self, ids, past_key_values):
        y = self.model.model(ids, past_key_values=past_key_values).last_hidden_state * 1
        x = y[:, -1:]
        first = self.first(x)
        if self.writes:
            y.mul_(2)
        return first, self.second(x).relu()


@torch.no_grad()
@pytest.mark.parametrize("writes", [False, True])
def test_outputs_of_the_graph(writes, monkeypatch):
    """And an input that is written to, whose layers stay."""
    graphs, model = [], Headed(writes)
    monkeypatch.setattr(compat, "inner_compiler", lambda *_: lambda module, inputs: graphs.append(module.graph) or module)
    ids, results = (prompt(40).to(DEVICE), prompt(1).to(DEVICE)), []
    for run in (torch.compile(model, backend=MiniKVBackend(MiniKVConfig.preset("lossless"))), model):
        cache = DynamicCache()
        results.append([run(x, cache) for x in ids][-1])
    merged, left = calls(graphs[-1])
    assert (len(merged), left) == ((8, 2) if writes else (9, 0)) and (writes or merged[-1] == [64, 192])
    for got, want in zip(*results, strict=True):
        assert (got - want).abs().max() < 0.02 * want.abs().max()


@torch.no_grad()
def test_inductor_calls_the_kernel(monkeypatch):
    """Not the op; and sums where the outputs are read."""
    x = torch.randn(2, 1, 256, device=DEVICE).bfloat16()
    weights = [torch.randn(n, 256, device=DEVICE).bfloat16() for n in (128, 64)]

    def run(x, *weights):
        parts = minikv.linear_parts(x, list(weights))
        first = linears._outputs(parts, 0, 128, x.dtype, None)
        return torch.relu(first), linears._outputs(parts, 128, 192, x.dtype, None) * 2

    lowering.register()
    if DEVICE == "cpu":
        monkeypatch.setattr(driver, "_active", Hopper())
    with inductor.patch(force_disable_caches=True, **({"cpu_backend": "triton"} if DEVICE == "cpu" else {})):
        got, (code,) = run_and_get_code(torch.compile(run), x, *weights)
    calls = "\n".join(line for line in code.split("def call")[1].splitlines() if not line.strip().startswith("#"))
    assert calls.count("triton_tem_fused") == 1 and calls.count("triton_poi_fused") == 2 and "minikv" not in calls
    want = [F.linear(x, weights[0]).relu(), F.linear(x, weights[1]) * 2]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=0.3, rtol=0.02)
