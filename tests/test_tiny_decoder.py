"""The shipped decoder: trained weights, real text, its own tokenizer."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from minikv_compile import MiniKVConfig
from minikv_compile.budget import in_tokens
from minikv_compile.config import PRESETS
from minikv_compile.evaluate import ask_inside, feed, running
from minikv_compile.tasks import make_sample

from .helpers import VOCAB, all_compressed, compiled, greedy, kinds, make_backend, tiny

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
    """A small share of the accuracy benchmark. Of tracking, where 98 to 99 of 100 prompts are right, one of four may be wrong."""
    samples = [make_sample(task, 1024, seed, tokenizer) for seed in range(4)]
    texts = [sample.prompt + sample.question for sample in samples]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    compiled(decoder, make_backend("default"))
    out = greedy(decoder, new=24, ids=inputs.input_ids, attention_mask=inputs.attention_mask)
    answers = tokenizer.batch_decode(out.sequences[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    assert all_compressed(out.past_key_values)
    right = [sample.score(answer) == 1 for sample, answer in zip(samples, answers, strict=True)]
    assert sum(right) >= len(samples) - (task == "tracking"), answers


@pytest.mark.slow
@pytest.mark.parametrize("preset", list(PRESETS))
def test_every_preset_runs(decoder, tokenizer, preset):
    """On the shipped decoder and on a random Qwen3: the budget is kept, and nothing is left alone."""
    config = MiniKVConfig.preset(preset)
    ids = tokenizer(make_sample("single", 800, 0, tokenizer).prompt, return_tensors="pt").input_ids[:, :700]
    for model, tokens in ((decoder, ids), (tiny("qwen3"), ids % (VOCAB - 1) + 1)):
        backend = make_backend(preset)
        cache = greedy(compiled(model, backend), tokens, 3).past_key_values
        assert all_compressed(cache) and {kind for graph in kinds(backend) for kind in graph} == {"prefill", "decode"}
        kept = [int(layer.keys.kept_mask()[0, 0, :700].sum()) for layer in cache.layers]
        heavy, recent = (in_tokens(amount, 700) for amount in (config.heavy, config.recent))
        assert sum(kept) == len(kept) * (min(heavy + recent + config.sinks, 700) if config.drops else 700)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("method", ["full", "minikv"])
def test_fed_answers_are_right_where_greedy_ones_are(decoder, tokenizer, method):
    """Some are wrong with `minikv`: they are the same ones."""
    samples = [make_sample("single", 700, seed, tokenizer) for seed in range(4)]
    for i, sample in enumerate(samples):  # the lines that `feed` would put before it
        missing = -len(tokenizer(sample.prompt + sample.question).input_ids) % 8
        samples[i] = dataclasses.replace(sample, prompt="\n" * missing + sample.prompt)
    with running(decoder, method, "eager") as runner:
        fed = [s.score(feed(decoder, runner, tokenizer, [s], "inside")[0][0]) for s in samples]
        greedy_ones = [s.score(ask_inside(decoder, tokenizer, [s])[0][0]) for s in samples]
    assert fed == greedy_ones and (method == "minikv" or set(fed) == {1.0})


@pytest.mark.slow
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
