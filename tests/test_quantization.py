"""What `default` does about the error of 2 bits pays on the shipped decoder: each part lowers the divergence."""

import functools

import pytest
import torch
from transformers import AutoTokenizer

from minikv_compile.tasks import make_sample

from .helpers import compiled, make_backend
from .test_mikv import MODEL, shipped

PREFIX, PREDICTED = 1500, 64
PARTS = [
    {"noise_correction": False}, {"error_feedback": False}, {"clip": 1.0}, {"important": 0}, {"rotation": "none"},
]  # fmt: skip


@functools.cache
def ids():
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    return tokenizer(make_sample("single", 1700, 7, tokenizer).prompt, return_tensors="pt").input_ids[:, : PREFIX + PREDICTED]


@functools.cache
def divergence(**changes):
    """KL(full || `default` with these changes), nats per token, after a compressed prefix."""
    torch._dynamo.reset()
    full = shipped()
    with torch.no_grad():
        expected = full(ids()).logits[:, PREFIX:].log_softmax(-1)
        model = shipped()
        compiled(model, make_backend("default", **changes))
        past = model(ids()[:, :PREFIX], use_cache=True).past_key_values
        got = model(ids()[:, PREFIX:], past_key_values=past).logits.log_softmax(-1)
    return (expected.exp() * (expected - got)).sum(-1).mean().item()


@pytest.mark.slow
@pytest.mark.parametrize("without", PARTS, ids=str)
def test_each_part_pays(without):
    assert divergence() < divergence(**without)


def test_metadata_of_eight_bits_costs_nothing_measurable():
    assert divergence() < 1.1 * divergence(metadata_bits=16)
