"""Decode attention on a CPU: one token over the packed caches of some layers, through the backend and Inductor's C++, beside SDPA
over dense caches in the same dtype, compiled by Inductor too. Several layers, as a step has them: so that no layer finds its cache
where the step before left it, and what a call costs on the host is shared. Every ratio is against the faster of SDPA's two
spellings in the same run; methods take turns, so that a busy machine slows all of them.

python benchmarks/cpu.py --json benchmarks/results/cpu.json
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from provenance import provenance
from rich.console import Console
from rich.table import Table
from torch import Tensor

from minikv_compile import KVTensor, MiniKVBackend, MiniKVConfig, cache_report, ops
from minikv_compile.measure import parse_method
from minikv_compile.plan import parse_tokens
from minikv_compile.tensor import wrap_prompt

DENSE = "sdpa", "sdpa-grouped"
"""SDPA with `enable_gqa`, and with the queries of a KV head as the rows of one matrix."""
HEADS = (32, 8), (8, 2)
"""Query and KV heads."""
HEAD_DIM = 128
WARM_UP = 3


@dataclass
class Figures:
    """One method: the median of a decode step's time for a layer in milliseconds, and what its keys and values take, in bytes."""

    method: str
    heads: int
    kv_heads: int
    dtype: str
    tokens: int
    per_token: float
    cache_bytes: int
    of_dense: float = 0.0
    """Times the step of the faster dense spelling."""


Layer = tuple[Tensor, Tensor]
"""Keys and values."""


def split(qkv: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, ...]:
    qkv = qkv.unflatten(-1, (heads + 2 * kv_heads, HEAD_DIM)).transpose(1, 2)
    return qkv.split([heads, kv_heads, kv_heads], 1)


def attend(tokens: list[Tensor], past: list[Layer], heads: int) -> tuple[list[Tensor], list[Layer]]:
    """Each layer's attention behind its projection, as a decoder without a cache class has it."""
    outs, new = [], []
    for token, (keys, values) in zip(tokens, past, strict=True):
        q, k, v = split(token, heads, keys.shape[1])
        k, v = torch.cat([keys, k], 2), torch.cat([values, v], 2)
        outs.append(F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2))
        new.append((k, v))
    return outs, new


def attend_dense(tokens: list[Tensor], past: list[Layer], heads: int, grouped: bool) -> list[Tensor]:
    """The same over dense caches, whose last place the new token takes."""
    outs = []
    for token, (keys, values) in zip(tokens, past, strict=True):
        q, keys[:, :, -1:], values[:, :, -1:] = split(token, heads, keys.shape[1])
        if grouped:
            out = F.scaled_dot_product_attention(q.unflatten(1, (keys.shape[1], -1)).squeeze(3), keys, values)
            outs.append(out.reshape(1, 1, -1))
        else:
            outs.append(F.scaled_dot_product_attention(q, keys, values, enable_gqa=True).transpose(1, 2).flatten(2))
    return outs


class Packed:
    """A step over compressed caches, which grow by a token each."""

    def __init__(self, config: MiniKVConfig, prompts: list[Layer], tokens: list[Tensor], heads: int, inner: str):
        self.attend = torch.compile(attend, backend=MiniKVBackend(config, inner))
        self.tokens, self.heads, self.caches = tokens, heads, [compressed(config, prompt) for prompt in prompts]

    def __call__(self) -> list[Tensor]:
        outs, self.caches = self.attend(self.tokens, self.caches, self.heads)
        return outs

    def bytes(self) -> int:
        return cache_report(self.caches[:1]).bytes


class Dense:
    """A step over dense caches with room for the new token."""

    def __init__(self, prompts: list[Layer], tokens: list[Tensor], heads: int, grouped: bool, inner: str):
        self.attend = torch.compile(attend_dense, backend=inner)
        self.caches = [tuple(F.pad(x, (0, 0, 0, 1)) for x in prompt) for prompt in prompts]
        self.arguments = tokens, self.caches, heads, grouped

    def __call__(self) -> list[Tensor]:
        return self.attend(*self.arguments)

    def bytes(self) -> int:
        return sum(x.nbytes for x in self.caches[0])


def compressed(config: MiniKVConfig, prompt: Layer) -> tuple[KVTensor, ...]:
    """What a prefill makes of a prompt's keys and values, under a policy that observes no attention."""
    made = iter(torch.ops.minikv.compress(*prompt, None, None, None, 0, 1, config.to_json()))
    parts = [
        ({name: next(made) for name in ops.fields(config, role, False)}, role, x.shape[2], 0)
        for role, x in zip(ops.ROLES, prompt, strict=True)
    ]
    return tuple(wrap_prompt(parts, config))


def make_steps(
    methods: list[str], heads: int, kv_heads: int, dtype: torch.dtype, tokens: int, layers: int, inner: str
) -> dict[str, Packed | Dense]:
    """A decode step of each method after the same random prompt."""
    torch.manual_seed(0)
    prompts = [tuple(torch.randn(1, kv_heads, tokens, HEAD_DIM, dtype=dtype) for _ in range(2)) for _ in range(layers)]
    new = [torch.randn(1, 1, (heads + 2 * kv_heads) * HEAD_DIM, dtype=dtype) for _ in range(layers)]
    steps: dict[str, Packed | Dense] = {name: Dense(prompts, new, heads, name != DENSE[0], inner) for name in DENSE}
    return steps | {
        method: Packed(replace(parse_method(method), strict=True), prompts, new, heads, inner) for method in methods
    }


def medians(steps: dict[str, Callable[[], Any]], rounds: int, repeats: int) -> dict[str, float]:
    """Milliseconds of each; they take turns, `repeats` calls a turn."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        for _ in range(WARM_UP):
            step()
    for _ in range(rounds):
        for name, step in steps.items():
            for _ in range(repeats):
                begun = time.perf_counter()
                step()
                times[name].append(1e3 * (time.perf_counter() - begun))
    return {name: statistics.median(found) for name, found in times.items()}


@torch.no_grad()
def run(
    methods: list[str], heads: int, kv_heads: int, dtype: torch.dtype, tokens: int, layers: int, rounds: int, repeats: int,
    inner: str = "inductor",
) -> Iterator[Figures]:  # fmt: skip
    """The figures of the dense spellings and of each method."""
    torch.compiler.reset()
    steps = make_steps(methods, heads, kv_heads, dtype, tokens, layers, inner)
    found = {name: time / layers for name, time in medians(steps, rounds, repeats).items()}
    dense = min(found[name] for name in DENSE)
    for name, step in steps.items():
        kind = str(dtype).removeprefix("torch.")
        yield Figures(name, heads, kv_heads, kind, tokens, found[name], step.bytes(), found[name] / dense)


def table_of(results: list[Figures], head: str) -> Table:
    shown = Table(title=head)
    for name in ("heads", "dtype", "method", "ms per token", "of the faster SDPA", "cache MiB"):
        shown.add_column(name, justify="right")
    for r in results:
        shown.add_row(
            f"{r.heads}/{r.kv_heads}", r.dtype, r.method, f"{r.per_token:.2f}", f"{r.of_dense:.2f}x",
            f"{r.cache_bytes / 2**20:.1f}",
        )  # fmt: skip
    return shown


def main(
    methods: Annotated[str, typer.Option(help="Presets, comma-separated, changed or not.")] = "default,default:bits=4",
    tokens: str = "16k",
    layers: int = 4,
    threads: int = 1,
    rounds: int = 9,
    repeats: int = 5,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    torch.set_num_threads(threads)
    results: list[Figures] = []
    for heads, kv_heads in HEADS:
        for dtype in (torch.float32, torch.bfloat16):
            results += run(methods.split(","), heads, kv_heads, dtype, parse_tokens(tokens), layers, rounds, repeats)
    Console().print(table_of(results, f"Attention of one of {layers} layers in a decode step, {tokens} tokens, {threads} threads"))
    if json_file is not None:
        about = {**provenance("cpu"), "vectors": torch.backends.cpu.get_cpu_capability(), "threads": threads}
        about |= {"head_dim": HEAD_DIM, "layers": layers}
        json_file.write_text(json.dumps({**about, "results": [asdict(r) for r in results]}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
