"""The shipped decoder: trained weights, real text, its own tokenizer."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from minikv_compile.tasks import make_sample

from .helpers import all_compressed, compiled, greedy, kinds, make_backend

EXAMPLE = Path(__file__).parent.parent / "examples" / "tiny_decoder"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(EXAMPLE / "model")


@pytest.fixture
def decoder():
    model = AutoModelForCausalLM.from_pretrained(EXAMPLE / "model", dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    return model


def test_lossless_tokens_are_eager_tokens(decoder, tokenizer):
    sample = make_sample("multikey", 512, 3, tokenizer)
    ids = tokenizer(sample.prompt + sample.question, return_tensors="pt").input_ids
    expected, backend = greedy(decoder, ids, 64), make_backend()
    got = greedy(compiled(decoder, backend), ids, 64)
    assert torch.equal(got.sequences, expected.sequences)
    assert kinds(backend) == [["prefill"] * 8, ["decode"] * 8] and all_compressed(got.past_key_values)


@pytest.mark.parametrize("task", ["single", "multikey", "tracking"])
def test_default_finds_what_the_full_cache_finds(decoder, tokenizer, task):
    """A small share of the accuracy benchmark."""
    samples = [make_sample(task, 1024, seed, tokenizer) for seed in range(4)]
    texts = [sample.prompt + sample.question for sample in samples]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    compiled(decoder, make_backend("default"))
    out = greedy(decoder, new=24, ids=inputs.input_ids, attention_mask=inputs.attention_mask)
    answers = tokenizer.batch_decode(out.sequences[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    assert all_compressed(out.past_key_values)
    assert all(sample.score(answer) == 1 for sample, answer in zip(samples, answers, strict=True)), answers


def test_the_training_script_runs(tmp_path):
    """Seconds of training: what it needs of the package is there."""
    command = [
        sys.executable, EXAMPLE / "train.py", "train", "--tokenizer", EXAMPLE / "model", "--out", tmp_path, "--minutes", 0.25,
        "--reserve", 5, "--workers", 0, "--layers", 1, "--width", 192, "--eval-samples", 1, "--eval-lengths", 256,
        "--max-length", 256, "--batch-tokens", 512, "--extra-packages",
    ]  # fmt: skip
    subprocess.run([str(part) for part in command], check=True, capture_output=True, timeout=120)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["training_tokens"] > 0 and set(results["exact_match"]["256"]) >= {"single", "tracking"}
    assert 0 < results["bits_per_byte"] < 8
