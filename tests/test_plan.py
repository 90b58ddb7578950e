"""`minikv plan`: its bytes are those of the caches, its estimate is what was measured, its answers are the largest."""

import json
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache
from typer.testing import CliRunner

from minikv_compile import MiniKVBackend, MiniKVCache, cache_report, compat
from minikv_compile.cli import app
from minikv_compile.measure import parse_method
from minikv_compile.plan import Planner, held_bytes, most, parse_bytes, parse_tokens
from minikv_compile.shapes import SHAPES, load_config, random_model

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
METHODS = ["default", "minikv", "lossless", "default:bits=4:skip_layers=[0]:min_prompt=200", "default:important=0"]
PROMPT, ROOM = 700, 30


def planner(method, shape="tiny", layers=None, new_tokens=ROOM):
    return Planner(random_model(load_config(shape, layers), "meta", torch.bfloat16), method, new_tokens)


@pytest.fixture(scope="module")
def model():
    return random_model(load_config("tiny"), "cpu", torch.bfloat16)


def storages(tensors):
    return sum(n for _, n in {(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) for t in tensors})


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_bytes_are_those_of_the_storages(model, method, batch):
    config = parse_method(method)
    cache = MiniKVCache(model, PROMPT + ROOM, batch, config, ROOM)
    planned = planner(method).cache_bytes(batch, PROMPT)
    assert planned == held_bytes(cache)
    ours = [layer for layer in cache.layers if hasattr(layer, "important")]
    assert planned >= storages(t for layer in ours for t in layer.tensors()) > 0
    if "skip" in method:
        return
    assert planned == storages(t for layer in ours for t in layer.tensors())
    read = torch.compile(model.forward, backend=MiniKVBackend(config, "eager"))
    read(torch.randint(512, (batch, PROMPT)), past_key_values=cache, use_cache=True)
    # The report does not have a layer's length and padding, 8 bytes each.
    assert planned == cache_report(cache).bytes + len(cache.layers) * 8 * (1 + batch)


@torch.no_grad()
def test_bytes_of_the_dense_cache(model):
    cache = DynamicCache()
    model(torch.randint(512, (2, PROMPT)), past_key_values=cache)
    dense = cache_report(cache).bytes
    planned = planner("full", new_tokens=1).cache_bytes(2, PROMPT - 1)
    assert dense <= planned <= dense + 8 * len(cache.layers)  # a length on the device


@pytest.mark.parametrize("limit", [0, 9, 10, 57, 58, 10**6])
def test_most(limit):
    total = lambda n: 7 * n + n // 3 + 3  # noqa: E731
    assert most(total, limit, 40) == max((n for n in range(1, 41) if total(n) <= limit), default=0)


@pytest.mark.parametrize("method", ["full", "default"])
def test_one_more_does_not_fit(method):
    memory, made = 40_000_000, planner(method)
    fit = made.fit(memory, PROMPT)

    def total(batch, prompt):
        row = made.cache_bytes(1, prompt) if batch > 1 and method != "full" else 0
        return made.weights + made.cache_bytes(batch, prompt) + row + fit.reading_bytes * prompt / PROMPT

    assert fit.total_bytes == total(1, PROMPT) and fit.cache_bytes == made.cache_bytes(1, PROMPT)
    rows, tokens = fit.largest_batch, fit.longest_prompt
    assert rows > 1 and total(rows, PROMPT) <= memory < total(rows + 1, PROMPT)
    assert tokens > PROMPT and tokens % 128 == 0 and total(1, tokens) <= memory < total(1, tokens + 128)
    nothing = made.fit(made.weights, PROMPT)
    assert nothing.largest_batch == nothing.longest_prompt == 0


def test_the_compressed_cache_holds_more():
    dense, ours = (planner(method).fit(40_000_000, 4096) for method in ("full", "default"))
    assert ours.largest_batch > 2 * dense.largest_batch and ours.longest_prompt > dense.longest_prompt


def test_most_memory():
    held = torch.empty(1000, device="meta")

    def call():
        x = held + 1  # 4000 bytes
        y = x.view(10, 100) * 2  # 8000
        del x
        return y.to(torch.float64)  # 4000 + 8000

    assert compat.most_memory(call, (), [held]) == 12_000
    assert compat.most_memory(lambda: held.view(10, 100), (), [held]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("file", ["end_to_end.json", "one_row.json"])
def test_as_measured(file):
    """Within 5%: the most memory of the prefills of a committed benchmark, with the caches that it had."""
    found = json.loads((RESULTS / file).read_text())
    reading = {}
    for row in found["results"]:
        method, batch, prompt = {"dense": "full"}.get(row["method"], row["method"]), row["batch"], row["prompt"]
        if method not in ("full", "default", "minikv") or "failed" in row or row.get("capacity", prompt) != prompt:
            continue
        if method not in reading:
            reading[method] = planner(method, found["shape"], found["layers"]).reading_bytes(prompt) / prompt
        # A row is copied into its place; results of before say no capacity, and there the dense one copied every row.
        copied = "capacity" not in row if method == "full" else batch > 1
        copies = 1 + copied / batch
        planned = found["weight_bytes"] + row["cache_bytes"] * copies + reading[method] * prompt
        assert abs(planned / row["prefill_peak"] - 1) < 0.05, row


@pytest.mark.parametrize(
    "text, value",
    [("80GB", 80 * 10**9), ("24 GiB", 24 * 2**30), ("1.5e9", 1_500_000_000), ("512", 512), ("0.5tb", 5 * 10**11)],
)
def test_bytes(text, value):
    assert parse_bytes(text) == value


@pytest.mark.parametrize("text, value", [("8192", 8192), ("128k", 131072), ("1M", 2**20), (" 32K ", 32768)])
def test_tokens(text, value):
    assert parse_tokens(text) == value


@pytest.mark.parametrize(
    "parse, text", [(parse_bytes, "80 apples"), (parse_bytes, ""), (parse_tokens, "0"), (parse_tokens, "1.5k")]
)
def test_no_number(parse, text):
    with pytest.raises(ValueError, match="must be"):
        parse(text)


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape):
    one = load_config(shape, 1)
    assert one.num_hidden_layers == 1 < load_config(shape).num_hidden_layers
    assert not any(p.requires_grad for p in random_model(one, "meta").parameters())


def run(*arguments):
    return CliRunner().invoke(app, ["plan", *map(str, arguments)])


def test_the_command(tmp_path):
    load_config("tiny").save_pretrained(tmp_path / "model")
    out = tmp_path / "plan.json"
    arguments = "--gpu-memory", "40MB", "--reserve", "1MB", "--prompt", "1k", "--dtype", "bfloat16"
    result = run("--model", tmp_path / "model", *arguments, "--methods", "full,minikv", "--json", out)
    assert result.exit_code == 0, result.output
    assert "largest" in result.output and "positions end at 8,192" in " ".join(result.output.split())
    found = json.loads(out.read_text())
    assert found["gpu_memory"] == 40_000_000 and found["reserve"] == 1_000_000 and found["prompt"] == 1024
    full, minikv = found["fits"]
    assert (full["method"], minikv["method"]) == ("full", "minikv") and minikv["cache_bytes"] < full["cache_bytes"]
    assert minikv["cache_bytes"] == planner("minikv", new_tokens=256).cache_bytes(1, 1024)
    assert found["weight_bytes"] == planner("full").weights


@pytest.mark.parametrize(
    "option, value",
    [
        ("--model", "/no/such"),
        ("--gpu-memory", "much"),
        ("--gpu-memory", "80"),
        ("--prompt", "long"),
        ("--methods", "best"),
        ("--reserve", "-1"),
    ],
)
def test_what_is_wrong_is_named(option, value):
    good = {"--model": "tiny", "--gpu-memory": "1GB", "--prompt": "1k"}
    result = run(*(x for pair in (good | {option: value}).items() for x in pair))
    assert result.exit_code == 2 and option in result.output
