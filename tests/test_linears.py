"""Linear layers of a decode step that become one product. (What Inductor makes of it: test_lowering.py.)"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import DynamicCache

from minikv_compile import MiniKVBackend, MiniKVCache, MiniKVConfig, compat, lowering

from .helpers import prompt, tiny

minikv = torch.ops.minikv
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def wide(architecture="llama", dtype=torch.bfloat16, **changes):
    """A model whose layers have sizes that the kernel takes."""
    changes = {"heads": 4, "kv_heads": 2, "head_dim": 32, "mlp": 128, **changes}
    return tiny(architecture, dtype=dtype, **changes).to(DEVICE)


@pytest.fixture(autouse=True)
def devices(monkeypatch):
    monkeypatch.setattr(lowering, "DEVICES", {DEVICE})


@pytest.fixture
def graphs(monkeypatch):
    """What the backend makes of the graphs that it gets; they run as they are."""
    made = []
    monkeypatch.setattr(compat, "inner_compiler", lambda *_: lambda module, inputs: made.append(module.graph) or module)
    return made


@torch.no_grad()
def step_of(model, batch=1):
    """Logits of a step behind a prompt."""
    run, cache = torch.compile(type(model).forward.__get__(model), backend=MiniKVBackend()), DynamicCache()
    for ids in (prompt(40, batch), torch.full((batch, 1), 7)):
        logits = run(ids.to(DEVICE), past_key_values=cache).logits
    return logits


def calls(graph):
    """The weights of each product of several, by their numbers of outputs; and how many layers are left."""
    merged = [[w.meta["example_value"].shape[0] for w in n.args[1]] for n in graph.nodes if n.target is minikv.linear_parts.default]
    return merged, sum(n.target is F.linear for n in graph.nodes)


@pytest.mark.parametrize(
    "architecture, changes", [("llama", {}), ("qwen3", {}), ("llama", {"attention_bias": True, "mlp_bias": True})]
)
def test_a_step(architecture, changes, graphs, monkeypatch):
    model = wide(architecture, **changes)
    torch.manual_seed(0)
    got = step_of(model)
    merged, left = calls(graphs[-1])
    assert merged == [[128, 64, 64], [128], [128, 128], [128]] * 2 and left == 1  # the logits: 97 are no multiple of 64
    torch.compiler.reset()
    monkeypatch.setattr("minikv_compile.passes.rewrite.merge_linears", lambda rewriter: None)
    torch.manual_seed(0)
    want = step_of(model)
    assert calls(graphs[-1]) == ([], 15)
    assert (got - want).abs().max() < 0.02 * want.abs().max()


def test_not_in_prompts(graphs):
    model = wide()
    run = torch.compile(type(model).forward.__get__(model), backend=MiniKVBackend())
    with torch.no_grad():
        run(prompt(40).to(DEVICE), past_key_values=DynamicCache())
    assert calls(graphs[0]) == ([], 15)


@torch.no_grad()
def test_rows_of_a_cache(graphs):
    """The rows of a `MiniKVCache` are known, though Dynamo has seen another number of them."""
    model = wide()
    run = torch.compile(type(model).forward.__get__(model), backend=MiniKVBackend())
    for rows in (1, 5):
        cache = MiniKVCache(model, 200, rows)
        for ids in (prompt(40, rows), prompt(1, rows)):
            run(ids.to(DEVICE), past_key_values=cache)
        assert calls(graphs[-1])[0] == [[128, 64, 64], [128], [128, 128], [128]] * 2


@pytest.mark.parametrize("why", ["rows", "dtype", "sizes", "device", "weights"])
def test_left_alone(why, graphs, monkeypatch):
    model = wide(dtype=torch.float32 if why == "dtype" else torch.bfloat16, **({"head_dim": 24} if why == "sizes" else {}))
    if why == "device":
        monkeypatch.setattr(lowering, "DEVICES", set())
    if why == "weights":
        quantize_(model, Int8WeightOnlyConfig())
    step_of(model, batch=17 if why == "rows" else 2)
    assert calls(graphs[-1]) == ([], 15)


@torch.library.custom_op("minikv_tests::double", mutates_args=("x",))
def double(factor: float, x: torch.Tensor) -> None:
    x.mul_(factor)


WRITES = {
    "nothing": lambda x: x.mul(2), "method": lambda x: x.mul_(2), "view": lambda x: x.mT.mul_(2),
    "ravel": lambda x: x.ravel().mul_(2),
    "list": lambda x: torch._foreach_mul_([x], 2.0), "item": lambda x: torch._foreach_mul_(x.split([64, 64], -1), 2.0),
    "operator": lambda x: torch.ops.minikv_tests.double(2.0, x), "out": lambda x: torch.add(x, x, out=x),
    "inplace": lambda x: F.relu(x, inplace=True),
}  # fmt: skip


class Headed(nn.Module):
    """Two layers read what a model returns, which may be written to in between; the first's output is returned as it is."""

    def __init__(self, write):
        super().__init__()
        self.model, self.write = wide(), write
        self.first, self.second = (nn.Linear(128, n, dtype=torch.bfloat16, device=DEVICE) for n in (64, 192))

    def forward(self, ids, past_key_values):
        y = self.model.model(ids, past_key_values=past_key_values).last_hidden_state * 1
        x = y[:, -1:]
        first = self.first(x)
        self.write(y)
        return first, self.second(x).relu()


@torch.no_grad()
@pytest.mark.parametrize("what", WRITES)
def test_what_is_written_in_between(what, graphs):
    """Layers stay behind it. And outputs of the graph."""
    model = Headed(WRITES[what])
    ids, results = (prompt(40).to(DEVICE), prompt(1).to(DEVICE)), []
    for run in (torch.compile(model, backend=MiniKVBackend(MiniKVConfig.preset("lossless"))), model):
        cache = DynamicCache()
        results.append([run(x, cache) for x in ids][-1])
    merged, left = calls(graphs[-1])
    assert left == 0 and merged[8:] == ([[64, 192]] if what == "nothing" else [[64], [192]])
    for got, want in zip(*results, strict=True):
        assert (got - want).abs().max() < 0.02 * want.abs().max()
