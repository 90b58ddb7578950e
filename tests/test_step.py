"""Decode steps that are captured in a CUDA graph. Without a GPU, a replay runs what was captured once more: with the tensors
that there were then, as a CUDA graph does."""

import copy
import gc
import logging
import weakref

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from minikv_compile import KVTensor, stepgraph
from minikv_compile.passes import step

from .helpers import PAD, PlainDecoder, captured, compiled, greedy, logits_of, make_backend, prompt, run_plain, tiny

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NEW = 300  # a flush in every 128


class Graph:
    """Stands in for a `torch.cuda.CUDAGraph`."""

    made, replayed = 0, 0

    def __init__(self, run, outputs):
        self.run, self.outputs = run, outputs
        Graph.made += 1

    def replay(self):
        Graph.replayed += 1
        for out, now in zip(self.outputs, self.run(), strict=True):
            out.copy_(now)


def capture(run, device, old):
    # What a capture returns is written by the replay. Tensors of the storages are only read, but for their newest tokens.
    outputs = [torch.full_like(out, torch.nan) for out in run()]
    return Graph(run, outputs), outputs


@pytest.fixture(autouse=True)
def graphs(monkeypatch):
    """Steps on this device are captured."""
    monkeypatch.setattr(step, "DEVICES", {DEVICE})
    if DEVICE == "cpu":
        monkeypatch.setattr(stepgraph, "capture", capture)
    monkeypatch.setattr(Graph, "made", 0)
    monkeypatch.setattr(Graph, "replayed", 0)


def without(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(step, "DEVICES", set())


def tokens(model, preset, ids, new=NEW, inner="eager", **inputs):
    result = greedy(compiled(model, make_backend(preset, inner)), ids, new, **inputs)
    return result.sequences, logits_of(result)


@pytest.mark.parametrize("preset", ["default", "minikv", "mikv4", "lossless"])
def test_the_same_tokens(preset, monkeypatch):
    model, ids = tiny(), prompt(200)
    got, logits = tokens(model, preset, ids)
    # All steps but those in the first places and in each after a storage has grown.
    assert Graph.replayed > NEW * 0.8 and Graph.made <= 6
    without(monkeypatch)
    want, expected = tokens(model, preset, ids)
    assert torch.equal(got, want)
    torch.testing.assert_close(logits, expected)
