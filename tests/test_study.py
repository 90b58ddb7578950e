"""`minikv study`: the table of studies, what becomes of a method's number, and a run of each kind on a tiny model."""

import dataclasses
import json

import pytest
import torch
from typer.testing import CliRunner

from minikv_compile.cli import app
from minikv_compile.config import MiniKVConfig
from minikv_compile.measure import parse_method
from minikv_compile.persistence import STEPS, persistence
from minikv_compile.results import Cell, beside, read_cells
from minikv_compile.studies import (
    BYTES,
    H2O_LENGTHS,
    KIVI,
    PERSISTENCE,
    SCORES,
    STUDIES,
    TIMES,
    Study,
    at_fixed_bytes,
    h2o,
    is_other,
)  # fmt: skip
from minikv_compile.study import Settings, cannot, line_of, run_study, write_study, x_of

from .test_evaluate import OTHER, model  # noqa: F401


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_names_methods_that_there_are(name):
    study = STUDIES[name]
    assert len(set(study.methods)) == len(study.methods)
    for method in study.methods:
        if study.kind != PERSISTENCE:
            assert cannot(method) is None, method
            assert x_of(method, study.x, 4096, 0.2) >= 0
            assert line_of(method, study.x)
    assert study.needs_gpu == bool(study.shapes)


@pytest.mark.parametrize("name", [name for name, study in STUDIES.items() if study.kind == SCORES])
def test_lines_have_points_at_different_places(name):
    """Methods of one line differ in what is drawn over."""
    study = STUDIES[name]
    if study.x in MiniKVConfig.__dataclass_fields__:
        places = [(line_of(method, study.x), x_of(method, study.x, 4096, 0.2)) for method in study.methods]
        assert len(set(places)) == len(places) and len({line for line, _ in places}) < len(places)


def test_the_fixed_bytes_are_kept():
    for method in at_fixed_bytes(0.1, 64, (8, 4, 2)):
        assert parse_method(method).share_of_dense == pytest.approx(0.1, rel=0.01)


def test_h2o_quantizes_nothing():
    """Everything that is kept fits beside and in the window."""
    config = parse_method(h2o(300))
    assert config.heavy + config.recent == config.important + config.window == 600 and config.importance == config.policy


def test_who_is_other():
    assert is_other(KIVI) and is_other("hqq:bits=2") and all(is_other(h2o(n)) for n in H2O_LENGTHS)
    assert not is_other("default") and not is_other("full")


def cell(method, share, score, task="single", bpb=None):
    return Cell(method, "after", task, 4096, 100, "exact", score, 1e6, share, 1.0, bpb, None if bpb is None else 0.1)


def test_others_beside_the_best_of_ours_by_hand():
    cells = [
        cell("full", 1.0, 1.0), cell("default", 0.2, 0.9), cell("small", 0.1, 0.7), cell("quanto:bits=2", 0.16, 0.8),
        cell("quanto:bits=4", 0.3, 0.85), cell("kvpress-knorm:ratio=0.92", 0.08, 0.2), cell("kvpress-knorm:ratio=0.5", 0.5, 1.0),
        cell("default", 0.2, 0.9, "text", 2.0), cell("quanto:bits=4", 0.3, 0.85, "text", 1.9),
    ]  # fmt: skip
    rows = {row[1:3]: row[3:] for row in beside(cells, is_other)}
    assert rows == {
        ("after", "kvpress-knorm:ratio=0.92"): ("8.0%", "20.0", "none so small", "", "", ""),
        ("after", "quanto:bits=2"): ("16.0%", "80.0", "small", "10.0%", "70.0", "-10.0"),
        ("after", "quanto:bits=4"): ("30.0%", "85.0", "default", "20.0%", "90.0", "+5.0"),
        ("text", "quanto:bits=4"): ("30.0%", "1.900", "default", "20.0%", "2.000", "-0.100"),
    }  # fmt: skip
    assert read_cells({"cells": [c.figures() for c in cells]}) == cells


SETTINGS = Settings(prompts=2, batch=2, seed=0, inner="eager", steps=2)


@pytest.mark.slow
def test_scores_are_measured_and_written(model, tmp_path):  # noqa: F811
    methods = ("full", "default:group=32", "default:group=64", "nothing:group=64", "kvpress-knorm:none=1")
    study = Study("Which group?", methods, x="group", tasks=("single", "text"), lengths=(600,))
    points, cells, failures = run_study(study, model, OTHER, SETTINGS, say=lambda line: None)
    assert [c.method for c in cells[::3]] == list(methods[:3])
    assert {f.method for f in failures} == set(methods[3:])
    panels = {p.panel for p in points}
    assert panels == {
        "single, question inside: score, %", "single, question after: score, %", "text: bits per byte",
        "text: KL(full || method), nats", "bytes, % of dense",
    }  # fmt: skip
    assert {p.x for p in points if p.method == "default:group=32"} == {32}
    about = {
        "command": "minikv study", "versions": {"torch": "x"}, "date": "today", "device": "cpu", "dtype": "float32",
        "prompts": 2, "seed": 0,
    }  # fmt: skip
    write_study("group", study, points, cells, failures, about, tmp_path)
    page, figures = (tmp_path / "group.md").read_text(), json.loads((tmp_path / "group.json").read_text())
    assert "# Which group?" in page and "| `default:group=64` | 64 |" in page and "Could not run" in page
    assert len(figures["points"]) == len(points) and read_cells(figures) == cells
    assert (tmp_path / "group.png").stat().st_size > 5000


def test_no_time_is_left(model):  # noqa: F811
    study = Study("?", ("full", "default"), x=BYTES, tasks=("single",), lengths=(600,))
    _, cells, _ = run_study(study, model, OTHER, dataclasses.replace(SETTINGS, deadline=0.0), say=lambda line: None)
    assert len(cells) == 1


def test_times_are_measured(model):  # noqa: F811
    study = Study("?", ("full", "default"), x="length", kind=TIMES, lengths=(600, 700))
    points, _, failures = run_study(study, model, OTHER, SETTINGS, say=lambda line: None)
    assert not failures and all(p.y > 0 for p in points)
    assert {(p.method, p.x) for p in points} == {(m, n) for m in ("full", "default") for n in (600, 700)}
    assert {p.y for p in points if p.method == "full" and p.panel.startswith("bytes")} == {100.0}


@torch.no_grad()
def test_persistence_is_measured(model, monkeypatch):  # noqa: F811
    """Shares lie between nothing and the best choice's, and the model is what it was."""
    monkeypatch.setattr("minikv_compile.persistence.STEPS", (4, 16))
    rows = list(persistence(model, OTHER, ("heavy_hitter", "random"), 200, 2, 0))
    shares = {(name, step): share for name, step, share in rows}
    assert set(shares) == {(n, s) for n in ("heavy_hitter", "random", "best") for s in (4, 16)}
    assert all(0 < shares[n, s] <= shares["best", s] <= 1 for n, s in shares)
    assert model.config._attn_implementation == "sdpa" and len(STEPS) > 2


def test_the_command(model, tmp_path, monkeypatch):  # noqa: F811
    model.save_pretrained(tmp_path / "model")
    OTHER.save_pretrained(tmp_path / "model")
    monkeypatch.setattr("minikv_compile.persistence.STEPS", (4, 16))
    arguments = ["study", "persistence,context-times", "--model", str(tmp_path / "model"), "--prompts", "1", "--lengths", "300"]
    result = CliRunner().invoke(app, [*arguments, "--device", "cpu", "--out", str(tmp_path / "studies")])
    assert result.exit_code == 0, result.output
    assert "context-times: needs a GPU" in result.output
    written = sorted(path.name for path in (tmp_path / "studies").iterdir())
    assert written == ["persistence.json", "persistence.md", "persistence.png"]
    assert CliRunner().invoke(app, ["study", "best", "--model", "none"]).exit_code == 2
