"""Families of causal language models in transformers: tokens are those of the uncompiled model, every site is accounted
for. `MINIKV_WRITE_FAMILIES=1` writes what was found to docs/families.md, otherwise that file is checked.
"""

import os
from pathlib import Path

import pytest
import torch

from minikv_compile import cache_report

from .helpers import compiled, greedy, logits_of, make_backend
from .zoo import FAMILIES, build, known, padded_prompts

TABLE = Path(__file__).parents[1] / "docs" / "families.md"
WRITE = os.environ.get("MINIKV_WRITE_FAMILIES") == "1"
HEAD = """# Families of models

Each causal language model of transformers that `tests/test_zoo.py` runs: a tiny one with random weights, `lossless`,
float32, two rows with left padding. Its tokens are those of the uncompiled model. Written by
`MINIKV_WRITE_FAMILIES=1 pytest tests/test_zoo.py`; every run of the tests checks it. Sites are the attentions of a
forward pass. "Partly" is what models that mix layers with and without a window get: those without are compressed.

| family | attention | rewritten sites | status | why the others are left alone |
|---|---|---|---|---|
"""
rows = {}


def parameter(name):
    return pytest.param(name, marks=pytest.mark.skipif(not known(name), reason="not in this transformers"))


families = pytest.mark.parametrize("name", list(map(parameter, FAMILIES)))


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny matrices: threads only cost."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(model, backend, lengths, new):
    """What `generate` returns from a compiled model, and the sites of a prefill and of a decode step."""
    ids, mask = padded_prompts(*lengths)
    compiled(model, backend)
    phases = []
    for tokens in (1, 2, new):
        before = len(backend.graphs)
        out = greedy(model, ids, tokens, attention_mask=mask)
        phases.append([site for graph in backend.graphs[before:] for site in graph])
    prefill, decode, later = phases
    assert {(s.kind, s.reason) for s in later} <= {(s.kind, s.reason) for s in decode}, "graphs of dynamic sizes differ"
    return out, prefill, decode


def check_sites(name, sites):
    taken, others = [s for s in sites if s.rewritten], [s for s in sites if not s.rewritten]
    assert (len(taken), len(others)) == (FAMILIES[name].taken, FAMILIES[name].left), [s.reason for s in others]
    return others


def check_cache(name, out):
    """No layer's cache is dense for no reason; returns the report, if there is attention."""
    family = FAMILIES[name]
    if not family.taken + family.left:
        return []
    layers = cache_report(out.past_key_values).layers
    assert sum(layer.compressed for layer in layers) == family.taken
    assert sum(not layer.compressed for layer in layers) <= family.left
    return layers


def lossless(name, attention=None, inner="eager"):
    model = build(name, attention)
    lengths = (5, 9) if FAMILIES[name].unrolls else (23, 37)
    ids, mask = padded_prompts(*lengths)
    expected = greedy(model, ids, 32, attention_mask=mask)
    out, prefill, decode = run(model, make_backend(inner=inner), lengths, 32)
    assert torch.equal(out.sequences, expected.sequences)
    torch.testing.assert_close(logits_of(out), logits_of(expected), rtol=0, atol=1e-4)
    others = check_sites(name, prefill)
    assert all(FAMILIES[name].why in site.reason for site in others), [site.reason for site in others]
    check_sites(name, decode)
    check_cache(name, out)
    return others


@families
def test_lossless_is_eager(name):
    others, family = lossless(name), FAMILIES[name]
    status = ("compressed" if not others else "partly") if family.taken else "left alone"
    why = "; ".join(dict.fromkeys(site.reason for site in others))
    if not family.taken + family.left:
        status, why = "left alone", "no attention"
    sites = family.taken + family.left
    rows[name] = f"| {name} | {family.attention if sites else ''} | {family.taken} / {sites} | {status} | {why} |"
    # Of the reasons, `lossless` has checked the part that all versions of transformers share.
    assert WRITE or rows[name].rsplit("|", 2)[0] in [line.rsplit("|", 2)[0] for line in TABLE.read_text().splitlines()]


@pytest.mark.slow
@families
def test_default_is_finite_and_counted(name):
    if not FAMILIES[name].taken + FAMILIES[name].left:
        pytest.skip("no attention")
    lengths = (5, 9) if FAMILIES[name].unrolls else (450, 470)
    out, prefill, decode = run(build(name), make_backend("default"), lengths, 2)
    assert logits_of(out).isfinite().all()
    check_sites(name, prefill)
    check_sites(name, decode)
    for layer in check_cache(name, out):
        assert layer.bytes > 0
        if layer.compressed and not FAMILIES[name].unrolls:  # 256 tokens are packed
            assert layer.bytes < 0.8 * layer.dense_bytes


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma", "qwen3", "gpt_neox"])
def test_attention_written_out(name):
    lossless(name, "eager")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3"])
def test_through_inductor(name):
    lossless(name, inner="inductor")


def test_table_of_families():
    expected = list(FAMILIES)
    if WRITE and list(rows) == expected:
        TABLE.write_text(HEAD + "\n".join(rows.values()) + "\n")
    text = TABLE.read_text()
    assert text.startswith(HEAD)
    assert [line.split("|")[1].strip() for line in text[len(HEAD) :].splitlines()] == expected
