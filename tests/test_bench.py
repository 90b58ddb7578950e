"""`minikv bench`, in small, on the CPU."""

import json

import pytest
import torch
from typer.testing import CliRunner

from minikv_compile import bench
from minikv_compile.cli import app
from minikv_compile.plan import Planner
from minikv_compile.shapes import load_config, random_model

ALL = "dense,transformers,default,minikv:heavy=0.25:recent=0.25"


def run(*arguments):
    return CliRunner().invoke(
        app, ["bench", "--model", "tiny", "--device", "cpu", "--inner", "eager", *map(str, arguments)]
    )


def test_the_command(tmp_path):
    out = tmp_path / "bench.json"
    result = run("--cases", "2x300,1x1k", "--methods", ALL, "--steps", 3, "--layers", 1, "--json", out)
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    assert found["layers"] == 1 and found["shape"] == "tiny" and found["versions"]["torch"] == torch.__version__
    rows = found["results"]
    assert [(r["batch"], r["prompt"], r["method"]) for r in rows] == [
        (batch, prompt, method) for batch, prompt in ((2, 300), (1, 1024)) for method in ALL.split(",")
    ]
    for row in rows:
        assert 0 < row["per_token"] <= row["per_token_p99"] and row["first_token"] > 0 and row["preparation"] > 0
    meta = random_model(load_config("tiny", 1), "meta", torch.bfloat16)
    for row in rows:
        if row["method"] == "default":  # as `minikv plan` says, with room for the steps
            assert row["cache_bytes"] == Planner(meta, "default", new_tokens=3 + 8).cache_bytes(
                row["batch"], row["prompt"]
            )


@torch.no_grad()
def test_dense_and_transformers_decode_the_same_token():
    torch.manual_seed(0)
    model = random_model(load_config("tiny"), "cpu", torch.float32)
    ids, tokens = torch.randint(512, (2, 40)), []
    for method in ("dense", "transformers"):
        decoder = bench.decoder_of(method, model, 2, 40, "eager", 2)
        for row in range(2):
            decoder.prefill(row, ids[row : row + 1])
        decoder.step()
        tokens.append(decoder.ids)
    assert torch.equal(*tokens)


def test_no_memory_is_said_and_the_rest_runs(monkeypatch):
    real = bench.run

    def out_of_memory(method, *args):
        if method == "dense":
            raise torch.OutOfMemoryError
        return real(method, *args)

    monkeypatch.setattr(bench, "run", out_of_memory)
    model = random_model(load_config("tiny", 1), "cpu")
    cases = [(1, 30)], ["dense", "transformers"], "eager", 1
    said, figures = bench.run_cases(model, *cases, float("inf"))
    assert said == "1x30 dense: out of memory" and figures.method == "transformers"
    assert list(bench.run_cases(model, *cases, 0.0)) == []


@torch.no_grad()
def test_quanto():
    pytest.importorskip("optimum.quanto")
    model = random_model(load_config("tiny"), "cpu", torch.float32)
    figures = bench.run("quanto", model, 2, 512, "eager", 2)
    dense = 2 * 2 * 2 * 2 * 512 * 32 * 4  # layers, keys and values, rows, heads
    assert 1 / 16 < figures.cache_bytes / dense < 0.25


@pytest.mark.parametrize(
    "option, value, word",
    [("--cases", "4", "4"), ("--cases", "0x5", "0x5"), ("--methods", "best", "best"), ("--model", "/no/such", "such")],
)
def test_what_is_wrong_is_named(option, value, word):
    result = run(option, value)
    assert result.exit_code == 2 and word in result.output and option in result.output


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    result = run("--methods", "quanto")
    assert result.exit_code == 2 and "optimum-quanto" in result.output


def test_dense_knows_its_architectures():
    model = random_model(load_config("tiny", 1), "cpu")
    model.config.model_type = "another"
    with pytest.raises(ValueError, match="another"):
        bench.check_model(model, ["default", "dense"])
    bench.check_model(model, ["default"])
