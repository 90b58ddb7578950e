"""Which rotation 2 bits want: the KL on text of rotations that are made from the prompt's own queries and values (OSCAR, arXiv
2605.17757), alone and before the Hadamard matrix.

    python benchmarks/rotations.py --json benchmarks/results/rotations.json

A rotation turns keys (and queries) or values before the cache is stored as the method says, and back after it is read, so that
only the rounding differs. The bytes of the rotation itself are not counted.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from simulate import ROOT, Prompt, Stored, stored, text_kl
from torch import Tensor

from minikv_compile.cli import load
from minikv_compile.cli_options import split_methods
from minikv_compile.measure import parse_method
from minikv_compile.provenance import provenance
from minikv_compile.rotation import hadamard

KEYS, VALUES, WEIGHTED = "keys, by queries", "values", "values, by attention"
"""What is rotated, by the eigenvectors of whose second moments; of values also weighted by the attention that tokens got."""


def eigenvectors(x: Tensor, weights: Tensor) -> Tensor:
    """Those of the second moments of `x` [heads, n, head_dim], largest first, with tokens weighted [heads, n]: [heads, head_dim,
    head_dim]."""
    x, weights = x.double(), (weights / weights.sum(-1, keepdim=True)).double()
    return torch.linalg.eigh(torch.einsum("hnd,hn,hne->hde", x, weights, x))[1].flip(-1).float()


def bases(prompt: Prompt, kind: str) -> Tensor:
    """One for each KV head of each layer: [layers, kv_heads, head_dim, head_dim]."""
    layers, heads, n, _ = prompt.keys.shape
    if kind == KEYS:  # of all query heads of a KV head together
        x = prompt.queries.unflatten(1, (heads, -1)).flatten(2, 3)
        return torch.stack([eigenvectors(x[i], x.new_ones(x.shape[1:3])) for i in range(layers)])
    ones = [prompt.values.new_ones(heads, n)] * layers
    weights = [scores[0] for scores in prompt.scores(0)] if kind == WEIGHTED else ones
    return torch.stack([eigenvectors(prompt.values[i], weights[i]) for i in range(layers)])


def rotated(prompt: Prompt, kind: str, basis: Tensor) -> Prompt:
    if kind != KEYS:
        return replace(prompt, values=prompt.values @ basis)
    ratio = prompt.queries.shape[1] // prompt.keys.shape[1]
    return replace(prompt, keys=prompt.keys @ basis, queries=prompt.queries @ basis.repeat_interleave(ratio, 1))


def turned_back(cache: Stored, kind: str, basis: Tensor) -> Stored:
    back = [x @ turn.mT for x, turn in zip(cache.keys if kind == KEYS else cache.values, basis, strict=True)]
    return replace(cache, keys=back) if kind == KEYS else replace(cache, values=back)


def variants(prompt: Prompt, method: str) -> dict[str, Stored]:
    """By name, the cache as it is read back."""
    config = parse_method(method)
    turn = hadamard(prompt.keys.shape[3]).to(prompt.keys)
    found = {"Hadamard": stored(prompt, config)}
    for kind in (KEYS, VALUES, WEIGHTED):
        basis = bases(prompt, kind)
        for name, each in ((f"{kind}, then Hadamard", basis), (f"{kind}, alone", basis @ turn.mT)):  # which undoes the method's own
            found[name] = turned_back(stored(rotated(prompt, kind, each), config), kind, each)
    return found


def main(
    model: str = str(ROOT / "examples" / "tiny_decoder" / "model"),
    methods: Annotated[str, typer.Option(help="Rotated by Hadamard.")] = "default,default:error_feedback=False",
    length: int = 4096,
    texts: int = 12,
    seed: int = 5_000_000,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lm, tokenizer = load(model, device, "bfloat16" if device == "cuda" else "float32")
    names = split_methods(methods)
    sums: dict[str, dict[str, float]] = {}

    def caches(prompt: Prompt) -> dict[tuple[str, str], Stored]:
        return {(what, name): cache for name in names for what, cache in variants(prompt, name).items()}

    with torch.no_grad():
        for i in track(range(texts), "texts"):
            found = text_kl(lm, tokenizer, length, seed + i, caches)
            for (what, name), kl in found.items():
                sums.setdefault(what, dict.fromkeys(names, 0.0))[name] += kl / texts
    table = Table("rotation", *names, title=f"KL(full || stored) of text, nats: {texts} texts of {length:,} tokens")
    for what, row in sums.items():
        table.add_row(what, *(f"{kl:.4f}" for kl in row.values()))
    Console(width=120).print(table)
    if json_file is not None:
        about = {**provenance(device), "texts": texts, "length": length, "seed": seed}
        json_file.write_text(json.dumps({**about, "kl": sums}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
