"""`minikv capacity` but for the memory of a GPU."""

import json
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from minikv_compile import capacity, cli_bench, compat
from minikv_compile.bench import Settings
from minikv_compile.cli import app
from minikv_compile.shapes import load_config, random_model


def small(device="cpu"):
    torch.manual_seed(0)
    return random_model(load_config("tiny", 1), device, torch.float32)


@torch.no_grad()
def test_chunks_change_nothing():
    model, ids = small(), torch.randint(512, (1, 50))
    expected = model(ids).logits
    with capacity.chunked(model, 7):
        assert torch.allclose(model(ids).logits, expected, atol=1e-5)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert torch.allclose(compiled(ids).logits, expected, atol=1e-5)
    assert "forward" not in vars(model.model.layers[0].mlp)


@torch.no_grad()
def test_chunks_take_less_to_read():
    meta = random_model(load_config("llama-3.1-8b", 2), "meta", torch.bfloat16)
    planner = capacity.planner_of("dense", meta, Settings())
    whole = planner.reading_bytes(32768)
    with capacity.chunked(meta):
        assert planner.reading_bytes(32768) < whole / 2


@pytest.mark.parametrize(
    "limit, planned, tried, fits",
    [(100, 100, [100, 105], 100), (97, 100, [100, 95], 95), (120, 100, [100, 105, 110], 110), (0, 1, [1], 0), (1, 1, [1, 2], 1)],
)
def test_search(limit, planned, tried, fits):
    found = list(capacity.search(lambda n: n if n <= limit else None, planned, 1, 3))
    assert [trial for trial, _ in found] == tried
    assert max((n for n, fit in found if fit is not None), default=0) == fits


@torch.no_grad()
@pytest.mark.parametrize("method", ["dense", "default"])
def test_a_probe(method, monkeypatch):
    """On a CPU memory counts nothing; what is done is the same."""
    model = small()
    settings = Settings("eager", steps=2)
    assert capacity.probe(method, model, 3, 300, settings) == 0

    def out_of_memory(*args):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(capacity, "decoder_of", out_of_memory)
    assert capacity.probe(method, model, 3, 300, settings) is None


@torch.no_grad()
def test_measured_beside_the_plan(monkeypatch):
    """With a GPU that holds 90% of what the plan says."""
    model, meta = small(), small("meta")
    planner = capacity.planner_of("default", meta, Settings(steps=2))
    memory = planner.total_bytes(20, 256, planner.reading_bytes(256))
    monkeypatch.setattr(capacity, "probe", lambda method, model, batch, prompt, settings: 7 if batch <= 18 else None)
    found = capacity.measure_capacity("default", model, meta, "batch", 256, memory, Settings(steps=2), 4)
    assert (found.planned, found.fits, found.too_many, found.peak_bytes) == (20, 18, 19, 7)
    assert found.planned_bytes == planner.total_bytes(18, 256, planner.reading_bytes(256))
    assert "18" in [*capacity.capacity_table([found], "").columns[3].cells][0]


def test_needs_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    result = CliRunner().invoke(app, ["capacity", "--model", "tiny"])
    assert result.exit_code == 2 and "no GPU" in result.output


@pytest.mark.parametrize(
    "asked, set_to",
    [("", "expandable_segments:True"), ("max_split_size_mb:64", "max_split_size_mb:64,expandable_segments:True"),
     ("expandable_segments:False", "expandable_segments:False"), ("backend:cudaMallocAsync", "backend:cudaMallocAsync")],
)  # fmt: skip
def test_the_allocator_is_asked_beside_what_the_user_asked(monkeypatch, asked, set_to):
    settings = []
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", asked)
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", settings.append)
    assert compat.expandable_segments() == set_to and settings == [set_to]


def test_each_answer_is_written_when_it_comes(monkeypatch, tmp_path):
    """The command, with another's measurements: memory of a GPU is not at hand."""
    asked, file = [], tmp_path / "capacity.json"

    def measured(method, model, meta, question, prompt, memory, settings, probes):
        if asked:
            assert len(json.loads(file.read_text())["results"]) == len(asked)
        asked.append((question, method))
        return capacity.Capacity(method, question, prompt, memory, 9, 8, 9, 100, 99, 1.0)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda place: SimpleNamespace(total_memory=10**11))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share: None)
    monkeypatch.setattr(compat, "expandable_segments", lambda: "expandable_segments:True")
    monkeypatch.setattr(cli_bench, "provenance", lambda place: {})
    monkeypatch.setattr(cli_bench, "load_model", lambda *arguments: small())
    monkeypatch.setattr(capacity, "measure_capacity", measured)
    result = CliRunner().invoke(app, ["capacity", "--methods", "dense,default", "--memory", "24GB", "--json", str(file)])
    assert result.exit_code == 0, result.output
    assert asked == [(what, method) for what in ("batch", "prompt") for method in ("dense", "default")]
    written = json.loads(file.read_text())
    assert len(written["results"]) == 4 and written["allocator"] == "expandable_segments:True"
    assert {row["memory"] for row in written["results"]} == {24 * 10**9}
