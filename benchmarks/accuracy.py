"""Exact match of the shipped decoder on long-context tasks: full cache against presets, in one run.

    python benchmarks/accuracy.py --prompts 50 --lengths 4096,8192 --json benchmarks/results/accuracy.json

The question stands at the end of the prompt that is compressed ("inside"), or is fed after it as a second turn
("after"). Prompts come from source text that the decoder was not trained on.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples" / "tiny_decoder"))
sys.path.insert(0, str(ROOT / "benchmarks"))

from provenance import provenance  # noqa: E402
from tasks import is_correct, make_sample  # noqa: E402

from minikv_compile import cache_report  # noqa: E402
from minikv_compile.cli import inner_for, load  # noqa: E402
from minikv_compile.config import MiniKVConfig  # noqa: E402
from minikv_compile.measure import FULL, compiled_forward  # noqa: E402

SEED = 1_000_000
"""First seed of the prompts: far from those that any tuning has looked at."""


def answer(model, tokenizer, samples, place: str, new_tokens: int) -> tuple[list[str], float]:
    """Greedy answers to a batch of samples, and the cache's share of dense bytes after it."""
    prompts = [s.prompt + (s.question if place == "inside" else "") for s in samples]
    ids = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left").to(model.device)
    settings = dict(max_new_tokens=new_tokens, do_sample=False, return_dict_in_generate=True,
                    pad_token_id=tokenizer.pad_token_id, eos_token_id=None)  # fmt: skip
    if place == "inside":
        out = model.generate(**ids, **settings)
        new = out.sequences[:, ids["input_ids"].shape[1] :]
        report = cache_report(out.past_key_values)
        return tokenizer.batch_decode(new, skip_special_tokens=True), report.bytes / report.dense_bytes
    assert len(samples) == 1, "questions after the prompt differ in length: one prompt at a time"
    cache = model(**ids, use_cache=True, logits_to_keep=1).past_key_values
    question = tokenizer(samples[0].question, return_tensors="pt", add_special_tokens=False).to(model.device)
    both = torch.cat([ids["input_ids"], question["input_ids"]], -1)
    out = model.generate(both, attention_mask=torch.ones_like(both), past_key_values=cache, **settings)
    report = cache_report(out.past_key_values)
    text = tokenizer.batch_decode(out.sequences[:, both.shape[1] :], skip_special_tokens=True)
    return text, report.bytes / report.dense_bytes


def main(
    model: str = str(ROOT / "examples" / "tiny_decoder" / "model"),
    tasks: str = "single,multikey,tracking",
    lengths: str = "4096,8192",
    methods: str = f"{FULL},default,minikv",
    places: str = "inside",
    prompts: Annotated[int, typer.Option(help="Prompts per task and length.")] = 50,
    batch: int = 10,
    new_tokens: int = 28,
    device: str = "auto",
    dtype: str = "bfloat16",
    inner: str = "auto",
    minutes: Annotated[float, typer.Option(help="Start no new cell after so long; what is done is written.")] = 1e9,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    started, console = time.time(), Console()
    lm, tokenizer = load(model, device, dtype)
    samples = {
        (task, int(length)): [make_sample(task, int(length), SEED + i, tokenizer) for i in range(prompts)]
        for task in tasks.split(",") for length in lengths.split(",")
    }  # fmt: skip
    cells = []
    with Progress(console=console, transient=True) as progress, torch.no_grad():
        bar = progress.add_task("prompts", total=len(samples) * prompts * len(methods.split(",")) * len(places.split(",")))
        for method in methods.split(","):
            config = None if method == FULL else parse_method(method)
            with compiled_forward(lm, config, inner_for(lm, inner)):
                for place in places.split(","):
                    size = batch if place == "inside" else 1
                    for (task, length), cell in samples.items():
                        if time.time() - started > 60 * minutes:
                            continue
                        right, share, begun = 0, 0.0, time.time()
                        for i in range(0, prompts, size):
                            texts, share = answer(lm, tokenizer, cell[i : i + size], place, new_tokens)
                            right += sum(map(is_correct, cell[i : i + size], texts))
                            progress.advance(bar, len(texts))
                        cells.append({"method": method, "place": place, "task": task, "length": length, "prompts": prompts,
                                      "exact_match": right / prompts, "share_of_dense_bytes": share,
                                      "seconds": time.time() - begun})  # fmt: skip
                        print({k: v for k, v in cells[-1].items()}, flush=True)
    print_table(console, cells)
    if json_file is not None:
        json_file.write_text(json.dumps({**provenance(lm.device), "dtype": dtype, "cells": cells}, indent=1) + "\n")


def parse_method(text: str) -> MiniKVConfig:
    """A preset, with changes to single fields: "default:group=32:policy=observation_window"."""
    preset, *changes = text.split(":")
    pairs = (change.split("=") for change in changes)
    return MiniKVConfig.preset(preset, **{n: json.loads(v) if v[0] in "-0123456789[" else v for n, v in pairs})


def print_table(console: Console, cells: list[dict]) -> None:
    table = Table(title="Exact match, as a share of the full cache's")
    for name in ("method", "question", "task", "length", "exact match", "of full", "bytes of dense"):
        table.add_column(name, justify="right")
    full = {(c["place"], c["task"], c["length"]): c["exact_match"] for c in cells if c["method"] == FULL}
    for c in cells:
        base = full.get((c["place"], c["task"], c["length"]))
        table.add_row(c["method"], c["place"], c["task"], str(c["length"]), f"{c['exact_match']:.1%}",
                      f"{c['exact_match'] / base:.1%}" if base else "-", f"{c['share_of_dense_bytes']:.1%}")  # fmt: skip
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
