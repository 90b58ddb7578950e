"""`minikv long`, in small, on the CPU."""

import json

import pytest
import torch
from typer.testing import CliRunner

from minikv_compile import bench, long
from minikv_compile.cli import app
from minikv_compile.shapes import load_config, random_model


def run(*arguments):
    return CliRunner().invoke(
        app, ["long", "--model", "tiny", "--layers", "1", "--device", "cpu", "--inner", "eager", *map(str, arguments)]
    )


def test_the_command(tmp_path):
    out = tmp_path / "long.json"
    result = run("--tokens", 500, "--batch", 2, "--prompt", 200, "--every", 240, "--methods",
                 "default,default@dynamic,transformers", "--json", out)  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    assert found["shape"] == "tiny" and found["layers"] == 1 and found["versions"]["torch"] == torch.__version__
    rows = {name: [r for r in found["results"] if r["method"] == name] for name in ("default", "default@dynamic", "transformers")}
    for checkpoints in rows.values():
        assert [r["tokens"] for r in checkpoints] == [0, 240, 480, 500]
        assert all(r["graphs"] == 0 for r in checkpoints), "a longer cache compiled again"
        assert [r["per_token"] > 0 for r in checkpoints] == [False, True, True, True]
        assert all(r["allocated"] == r["beyond_cache"] == 0 for r in checkpoints)
    fixed, dynamic, dense = ([r["cache_bytes"] for r in checkpoints] for checkpoints in rows.values())
    assert len(set(fixed)) == 1 and dynamic[0] < dynamic[-1]
    per_token = 2 * 2 * 2 * 32 * 2  # keys and values, rows, heads, channels, bytes
    assert [b - a for a, b in zip(dense, dense[1:], strict=False)] == [per_token * n for n in (240, 240, 20)]


def generated(monkeypatch, step, allocated, sizes):
    """The checkpoints of one method whose step, memory and cache are made up."""

    class Made(bench.Eager):
        def bytes(self):
            return next(sizes)

    Made.step = step
    monkeypatch.setattr(long, "decoder_of", lambda method, model, batch, *_: Made(model, batch))
    monkeypatch.setattr(long, "allocated", lambda device: next(allocated))
    model = random_model(load_config("tiny", 1), "cpu", torch.float32)
    return list(long.run_long(model, ["made"], 1, 20, 10, bench.Settings("eager", steps=20)))


def test_what_grows_beside_the_cache_is_told(monkeypatch):
    found = generated(monkeypatch, lambda self: None, iter([1000, 1300, 1400]), iter([100, 150, 200]))
    assert [r.beyond_cache for r in found] == [0, 250, 300]
    assert "300" in [*long.long_table(found, "").columns[5].cells]


def test_what_compiles_again_is_told(monkeypatch):
    """A function that takes a longer tensor of static shape each time."""
    lengths = iter(range(2, 100))

    def step(self):
        compiled(torch.zeros(next(lengths)))

    compiled = torch.compile(lambda x: x + 1, backend="eager", dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=100):
        found = generated(monkeypatch, step, iter([0] * 3), iter([0] * 3))
    assert [r.graphs for r in found] == [0, 10, 20]


def test_what_fails_is_a_row(monkeypatch):
    def step(self):
        raise torch.OutOfMemoryError

    (row,) = generated(monkeypatch, step, iter([]), iter([]))
    assert row.failed == "out of memory" and "out of memory" in [*long.long_table([row], "").columns[1].cells]


@pytest.mark.parametrize("option, value", [("--methods", "dense"), ("--methods", "best"), ("--tokens", "0"), ("--prompt", "x")])
def test_what_is_wrong_is_named(option, value):
    result = run(option, value)
    assert result.exit_code == 2 and value in result.output and option in result.output
