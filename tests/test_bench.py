"""`minikv bench`, in small, on the CPU."""

import json

import pytest
import torch
from typer.testing import CliRunner

from minikv_compile import bench
from minikv_compile.cli import app
from minikv_compile.plan import Planner
from minikv_compile.shapes import load_config, random_model

from .helpers import captured

ALL = "dense,transformers,static,default,minikv:heavy=0.25:recent=0.25,default@dynamic"


def run(*arguments):
    return CliRunner().invoke(
        app, ["bench", "--model", "tiny", "--device", "cpu", "--inner", "eager", *map(str, arguments)]
    )


@pytest.mark.slow
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
        assert row["decode_rate"] == pytest.approx(1e3 * row["batch"] / row["per_token"]) and row["host"] is None
        assert 0 < row["total_rate"] and 0 < row["roofline"]
    meta = random_model(load_config("tiny", 1), "meta", torch.bfloat16)
    for row in rows:
        if row["method"] == "default":  # as `minikv plan` says, with room for the steps
            assert row["cache_bytes"] == Planner(meta, "default", new_tokens=3 + 24).cache_bytes(
                row["batch"], row["prompt"]
            )


def small(dtype=torch.float32, layers=2):
    torch.manual_seed(0)
    return random_model(load_config("tiny", layers), "cpu", dtype)


EAGER = bench.Settings("eager", steps=2)


@torch.no_grad()
@pytest.mark.parametrize("rows", [None, 1])
def test_all_decode_the_same_token(rows):
    """Each of its kind of cache, with rows that are read or copies."""
    model, tokens = small(), []
    settings = bench.Settings("eager", steps=2, rows=rows)
    ids = bench.prompts_of(model, 2, 40)
    for method in ("dense", "transformers", "static", "lossless", "lossless@dynamic"):
        decoder = bench.decoder_of(method, model, 2, 60, settings)
        bench.read(decoder, ids if rows is None else ids[:1].repeat(2, 1), settings, bench.Timer(model.device))
        first = decoder.ids.clone()
        decoder.step()
        tokens.append(torch.cat([first, decoder.ids], 1))
    for others in tokens[1:]:
        assert torch.equal(others, tokens[0])


def test_lengths_that_share_a_cache(tmp_path):
    out, plot = tmp_path / "bench.json", tmp_path / "bench.png"
    result = run(
        "--cases", "1x300+200", "--methods", "dense,default", "--steps", 2, "--layers", 1, "--json", out, "--plot", plot
    )
    assert result.exit_code == 0, result.output
    rows = json.loads(out.read_text())["results"]
    assert [(r["method"], r["prompt"], r["capacity"]) for r in rows] == [
        (method, prompt, 300) for method in ("dense", "default") for prompt in (200, 300)
    ]
    assert rows[2]["cache_bytes"] == rows[3]["cache_bytes"] and rows[3]["preparation"] < rows[2]["preparation"] and plot.exists()
    assert "default breaks even" in result.output or "default is at least as fast" in result.output


@torch.no_grad()
@pytest.mark.parametrize("method", ["default", "minikv", "default@dynamic"])
def test_a_short_prompt_compiles_for_long_ones(method):
    """Nothing is compiled while a prompt's time is taken."""
    decoder = bench.decoder_of(method, small(layers=1), 1, 900, EAGER)
    for length in (300, 900):
        decoder.begin(length)
        decoder.prefill(0, bench.prompts_of(decoder.model, 1, length))
    assert captured()[0] == 1


def test_what_fails_is_a_row_that_says_why(monkeypatch):
    real = bench.run

    def failing(method, *args):
        if method == "dense":
            raise torch.OutOfMemoryError
        if method == "static":
            raise TypeError("no such thing\nat all")
        return real(method, *args)

    monkeypatch.setattr(bench, "run", failing)
    model, cases = small(layers=1), [bench.Case(1, [30])]
    found = list(bench.run_cases(model, cases, ["dense", "static", "transformers"], EAGER))
    assert [getattr(row, "failed", "") for row in found] == ["out of memory", "TypeError: no such thing", ""]
    assert list(bench.run_cases(model, cases, ["dense"], bench.Settings(minutes=0.0))) == []
    assert "out of memory" in [*bench.bench_table(found, "").columns[2].cells]


@torch.no_grad()
def test_quanto():
    pytest.importorskip("optimum.quanto")
    (figures,) = bench.run("quanto", small(), bench.Case(2, [512]), EAGER)
    dense = 2 * 2 * 2 * 2 * 512 * 32 * 4  # layers, keys and values, rows, heads
    assert 1 / 16 < figures.cache_bytes / dense < 0.25


@torch.no_grad()
@pytest.mark.parametrize("method", ["kvpress-snapkv", "kvpress-pyramidkv"])
def test_kvpress_keeps_its_share(method):
    pytest.importorskip("kvpress")
    (figures,) = bench.run(f"{method}:ratio=0.75", small(), bench.Case(2, [512]), EAGER)
    dense = 2 * 2 * 2 * 2 * 512 * 32 * 4
    assert figures.cache_bytes / dense == pytest.approx(0.25, rel=0.15)


@pytest.mark.parametrize("method", ["full", "full@dynamic", "hqq:bits=4", "kvpress-snapkv:ratio", "best"])
def test_what_is_no_method(method):
    with pytest.raises(ValueError, match=method.partition(":")[0].partition("@")[0]):
        bench.check_method(method)


def test_host_time_is_of_an_idle_device(monkeypatch):
    """The device is waited for before each call, and not before its return is timed."""
    events, now = [], iter(range(100))
    timer = bench.Timer(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: events.append("wait"))
    monkeypatch.setattr(bench.time, "perf_counter", lambda: events.append("clock") or float(next(now)))
    assert timer.host(lambda: events.append("call"), 3) == 1e3
    assert events == ["wait", "clock", "call", "clock"] * 3 + ["wait"]


def test_break_even():
    def row(method, prompt, per_token):
        return bench.Figures(method, 1, prompt, 1.0, per_token, 1.0, 1.0, 1.0, 1, 1.0, 1, 1, 1, 1, 1, 1.0, 1.0)

    dense = [row("dense", n, 2.0) for n in (1, 2, 4)]
    assert "between 1 and 2" in bench.break_even([*dense, row("x", 1, 2.1), row("x", 2, 1.9), row("x", 4, 1.0)], "x")
    assert "between 4 and more" in bench.break_even([*dense, row("x", 4, 2.5)], "x")
    assert "at least as fast" in bench.break_even([*dense, row("x", 1, 1.5)], "x")


@pytest.mark.parametrize(
    "option, value, word",
    [
        ("--cases", "4", "4"), ("--cases", "1x4+", "1x4+"), ("--cases", "0x5", "0x5"), ("--methods", "best", "best"),
        ("--model", "/no/such", "such"),
    ],  # fmt: skip
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
