"""Decode attention on a CPU: one token over a packed cache, through the backend and Inductor's C++, beside SDPA over the
dense cache in the same dtype, compiled by Inductor too. Every ratio is against the faster of SDPA's two spellings in the same
run; methods take turns, so that a busy machine slows all of them.

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
    """One method: the median of a decode step in milliseconds, and what its keys and values take, in bytes."""

    method: str
    heads: int
    kv_heads: int
    dtype: str
    tokens: int
    per_token: float
    cache_bytes: int
    of_dense: float = 0.0
    """Times the step of the faster dense spelling."""


def attend(qkv: Tensor, past: tuple[Tensor, Tensor], heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """One layer's attention behind its projection, as a decoder without a cache class has it."""
    qkv = qkv.unflatten(-1, (heads + 2 * kv_heads, HEAD_DIM)).transpose(1, 2)
    q, k, v = qkv.split([heads, kv_heads, kv_heads], 1)
    k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2), k, v


def attend_dense(qkv: Tensor, past: tuple[Tensor, Tensor], heads: int, grouped: bool) -> Tensor:
    """The same over a dense cache, whose last place the new token takes."""
    keys, values = past
    kv_heads = keys.shape[1]
    qkv = qkv.unflatten(-1, (heads + 2 * kv_heads, HEAD_DIM)).transpose(1, 2)
    q, keys[:, :, -1:], values[:, :, -1:] = qkv.split([heads, kv_heads, kv_heads], 1)
    if grouped:
        out = F.scaled_dot_product_attention(q.unflatten(1, (kv_heads, -1)).squeeze(3), keys, values)
        return out.reshape(1, 1, -1)
    return F.scaled_dot_product_attention(q, keys, values, enable_gqa=True).transpose(1, 2).flatten(2)


class Packed:
    """A step over a compressed cache, which grows by a token each."""

    def __init__(self, config: MiniKVConfig, prompt: list[Tensor], token: Tensor, heads: int, inner: str):
        self.attend = torch.compile(attend, backend=MiniKVBackend(config, inner))
        self.token, self.heads, self.cache = token, (heads, prompt[0].shape[1]), compressed(config, prompt)

    def __call__(self) -> Tensor:
        out, *self.cache = self.attend(self.token, tuple(self.cache), *self.heads)
        return out

    def bytes(self) -> int:
        return cache_report([tuple(self.cache)]).bytes


class Dense:
    """A step over a dense cache with room for the new token."""

    def __init__(self, prompt: list[Tensor], token: Tensor, heads: int, grouped: bool, inner: str):
        self.attend = torch.compile(attend_dense, backend=inner)
        self.cache = tuple(F.pad(x, (0, 0, 0, 1)) for x in prompt)
        self.arguments = token, self.cache, heads, grouped

    def __call__(self) -> Tensor:
        return self.attend(*self.arguments)

    def bytes(self) -> int:
        return sum(x.nbytes for x in self.cache)


def compressed(config: MiniKVConfig, prompt: list[Tensor]) -> list[KVTensor]:
    """What a prefill makes of a prompt's keys and values, under a policy that observes no attention."""
    made = iter(torch.ops.minikv.compress(*prompt, None, None, None, 0, 1, config.to_json()))
    parts = [
        ({name: next(made) for name in ops.fields(config, role, False)}, role, x.shape[2], 0)
        for role, x in zip(ops.ROLES, prompt, strict=True)
    ]
    return wrap_prompt(parts, config)


def make_steps(
    methods: list[str], heads: int, kv_heads: int, dtype: torch.dtype, tokens: int, inner: str
) -> dict[str, Packed | Dense]:
    """A decode step of each method after the same random prompt."""
    torch.manual_seed(0)
    prompt = [torch.randn(1, kv_heads, tokens, HEAD_DIM, dtype=dtype) for _ in range(2)]
    token = torch.randn(1, 1, (heads + 2 * kv_heads) * HEAD_DIM, dtype=dtype)
    steps: dict[str, Packed | Dense] = {name: Dense(prompt, token, heads, name != DENSE[0], inner) for name in DENSE}
    return steps | {
        method: Packed(replace(parse_method(method), strict=True), prompt, token, heads, inner) for method in methods
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
    methods: list[str], heads: int, kv_heads: int, dtype: torch.dtype, tokens: int, rounds: int, repeats: int,
    inner: str = "inductor",
) -> Iterator[Figures]:  # fmt: skip
    """The figures of the dense spellings and of each method."""
    torch.compiler.reset()
    steps = make_steps(methods, heads, kv_heads, dtype, tokens, inner)
    found = medians(steps, rounds, repeats)
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
    threads: int = 1,
    rounds: int = 9,
    repeats: int = 5,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    torch.set_num_threads(threads)
    results: list[Figures] = []
    for heads, kv_heads in HEADS:
        for dtype in (torch.float32, torch.bfloat16):
            results += run(methods.split(","), heads, kv_heads, dtype, parse_tokens(tokens), rounds, repeats)
    Console().print(table_of(results, f"One decode step of attention, {tokens} tokens, {threads} threads"))
    if json_file is not None:
        about = {**provenance("cpu"), "vectors": torch.backends.cpu.get_cpu_capability(), "threads": threads}
        about |= {"head_dim": HEAD_DIM}
        json_file.write_text(json.dumps({**about, "results": [asdict(r) for r in results]}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
