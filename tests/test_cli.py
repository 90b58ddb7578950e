"""The command line, on the shipped model."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from minikv_compile.cli import app

MODEL = str(Path(__file__).parent.parent / "examples" / "tiny_decoder" / "model")


def run(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_help_lists_the_commands():
    assert "generate" in run("--help") and "explain" in run("--help")


@pytest.mark.slow
def test_generate_writes_figures_and_a_picture(tmp_path):
    text = tmp_path / "prompt.txt"
    text.write_text("import os\n" * 600)
    figures, picture = tmp_path / "figures.json", tmp_path / "kept.png"
    run("generate", "--model", MODEL, "--prompt-file", text, "--max-new-tokens", 4, "--device", "cpu", "--inner", "eager",
        "--json", figures, "--picture", picture)  # fmt: skip
    full, default, minikv = json.loads(figures.read_text())
    assert [r["method"] for r in (full, default, minikv)] == ["full", "default", "minikv"]
    assert full["compression"] == 0 and full["new_tokens"] == default["new_tokens"] == 4
    assert default["bits_per_element"] < 16 and minikv["cache_bytes"] < full["cache_bytes"]
    assert len(minikv["layers"]) == 8 and picture.stat().st_size > 1000


def test_an_unknown_method_is_named(tmp_path):
    text = tmp_path / "prompt.txt"
    text.write_text("x")
    result = CliRunner().invoke(app, ["generate", "--model", MODEL, "--prompt-file", str(text), "--method", "best"])
    assert result.exit_code != 0 and "best" in result.output


@pytest.mark.parametrize("command", ["bench", "long"])
def test_a_device_that_is_not_there_is_named(command):
    result = CliRunner().invoke(app, [command, "--model", "tiny", "--methods", "default", "--device", "nowhere"])
    assert result.exit_code == 2 and "nowhere" in result.output


def test_explain_prints_every_site():
    assert "16 of 16 attention sites" in run("explain", "--model", MODEL, "--tokens", 8, "--device", "cpu")


@pytest.mark.parametrize(
    "wrong, said",
    [
        (["--dtype", "int8"], "bfloat16"),
        (["--inner", "gcc"], "inductor"),
        (["--json", "/no/such/folder/x.json"], "no folder /no/such/folder"),
        (["--model", "/no/such/model"], "cannot load '/no/such/model'"),
        (["--device", "nowhere"], "nowhere"),
        (["--method", "quanto:bits=2"], "another package's: `minikv eval --feed` and `minikv bench` run it"),
    ],
)
def test_wrong_arguments_are_named(tmp_path, wrong, said):
    """In one line, not in a traceback."""
    text = tmp_path / "prompt.txt"
    text.write_text("x")
    result = CliRunner().invoke(app, ["generate", "--model", MODEL, "--prompt-file", str(text), *wrong])
    assert result.exit_code == 2 and said in " ".join(result.output.replace("│", " ").split())
