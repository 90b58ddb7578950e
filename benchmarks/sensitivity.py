"""Which keys and values the shipped decoder cannot spare: exact match with parts of its cache quantized.

    python benchmarks/sensitivity.py --prompts 100 --json benchmarks/results/sensitivity.json

The prompt's keys and values are quantized and put back (the arithmetic and the format of the presets; sinks, window
and the first answer token in full precision), then the answer is fed at once: it counts if each of its tokens was the
likeliest one. Minutes on a CPU, and the same prompts for every variant, so that small differences show.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import DynamicCache

from minikv_compile.cli import load
from minikv_compile.config import MiniKVConfig
from minikv_compile.kernels.packing import BLOCK, dequantize, quantize
from minikv_compile.ops import grouping
from minikv_compile.provenance import provenance
from minikv_compile.rotation import rotation_matrix
from minikv_compile.tasks import make_sample

ROOT = Path(__file__).resolve().parent.parent
SEED = 500_000
"""First seed of the prompts: not those of accuracy.py."""


@dataclass(frozen=True)
class Variant:
    """What is quantized, and how."""

    name: str
    config: MiniKVConfig = MiniKVConfig()
    roles: tuple[str, ...] = ("key", "value")
    layers: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Prompt:
    """A prompt that the model has read."""

    cache: list[tuple[torch.Tensor, torch.Tensor]]
    """Keys and values of all tokens but the last, fp32 [1, kv_heads, n, head_dim], of each layer."""
    tokens: torch.Tensor
    """The last token and the answer, int64 [1, n]."""


def variants(layers: int) -> list[Variant]:
    base = MiniKVConfig()
    keys = [Variant(f"keys of layer {i}", layers=(i,), roles=("key",)) for i in range(layers)]
    changes = [("group", 16), ("group", 32), ("group", 128), ("bits", 4), ("clip", 0.9), ("clip", 0.75)]
    changed = [Variant(f"{name}={value}", replace(base, **{name: value})) for name, value in changes]
    return [
        Variant("nothing", layers=()), Variant("default"), Variant("keys", roles=("key",)),
        Variant("values", roles=("value",)), *keys, *changed, Variant("rotation=none", replace(base, rotation="none")),
        Variant("values, clip=0.75", replace(base, clip=0.75), roles=("value",)),
    ]  # fmt: skip


def stored(x: torch.Tensor, role: str, config: MiniKVConfig) -> torch.Tensor:
    """[1, kv_heads, n, head_dim] after quantization and back, in bf16's precision like the cache."""
    n, dim = x.shape[2:]
    first = config.sinks
    last = first + max(0, n - first - config.window) // BLOCK * BLOCK
    rotation = rotation_matrix(config.rotation, dim, x.device)
    rotation = torch.eye(dim) if rotation is None else rotation
    blocks = (x[:, :, first:last] @ rotation).bfloat16().unflatten(2, (-1, BLOCK))
    group, axis = grouping(config, role, dim)
    back = dequantize(*quantize(blocks, config.bits, group, axis, config.clip), group, axis).flatten(2, 3) @ rotation.T
    return torch.cat([x[:, :, :first], back, x[:, :, last:]], 2)


def prepare(model, tokenizer, task: str, length: int, seed: int) -> Prompt:
    sample = make_sample(task, length, seed, tokenizer)
    ids = tokenizer(sample.prompt + sample.question, return_tensors="pt").input_ids
    answer = tokenizer(sample.completion, return_tensors="pt", add_special_tokens=False).input_ids
    cache = model.model(ids[:, :-1], use_cache=True).past_key_values
    return Prompt([(layer.keys, layer.values) for layer in cache.layers], torch.cat([ids[:, -1:], answer], 1))


def is_exact(model, prompt: Prompt, variant: Variant) -> bool:
    cache = DynamicCache()
    for i, pair in enumerate(prompt.cache):
        chosen = variant.layers is None or i in variant.layers
        cache.update(*(
            stored(x, role, variant.config) if chosen and role in variant.roles else x
            for role, x in zip(("key", "value"), pair, strict=True)
        ), i)  # fmt: skip
    likeliest = model(prompt.tokens[:, :-1], past_key_values=cache).logits.argmax(-1)
    return bool((likeliest[:, 1:] == prompt.tokens[:, 2:]).all())


def main(
    model: str = str(ROOT / "examples" / "tiny_decoder" / "model"),
    task: str = "tracking",
    length: int = 4096,
    prompts: int = 100,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    lm, tokenizer = load(model, "cpu", "float32")
    chosen = variants(lm.config.num_hidden_layers)
    right = dict.fromkeys((variant.name for variant in chosen), 0)
    with torch.no_grad():
        for i in track(range(prompts), "prompts"):
            prompt = prepare(lm, tokenizer, task, length, SEED + i)
            for variant in chosen:
                right[variant.name] += is_exact(lm, prompt, variant)
    table = Table("quantized", "exact match", title=f"{task}, {length} tokens, {prompts} prompts")
    for name, count in right.items():
        table.add_row(name, f"{count / prompts:.1%}")
    Console().print(table)
    if json_file is not None:
        rows = {name: count / prompts for name, count in right.items()}
        result = {**provenance("cpu"), "task": task, "length": length, "prompts": prompts, "exact_match": rows}
        json_file.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
