"""A whole decoder with random weights, ours beside the fastest dense decoder of the same run.

    python benchmarks/end_to_end.py --shape llama-3.1-8b --cases 1x131072,16x32768 --json benchmarks/results/end_to_end.json

Per case (batch x prompt tokens) and method: time to the first token, time per output token (median and 99th percentile),
peak memory of prefill and of decode, and the cache's bytes. Prompts are read row by row by every method. Compilation
and capture are reported apart.
"""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import transformers
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from minikv_compile import MiniKVBackend, MiniKVCache, MiniKVConfig, cache_report
from minikv_compile.provenance import provenance

SHAPES = {
    "llama-3.1-8b": transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256, max_position_embeddings=262144,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
    ),
    "qwen3-4b": transformers.Qwen3Config(
        hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8,
        head_dim=128, vocab_size=151936, max_position_embeddings=262144, tie_word_embeddings=True,
    ),
    "mistral-7b": transformers.MistralConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=32768, max_position_embeddings=262144, sliding_window=None,
    ),
    "tiny": transformers.LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, vocab_size=512, max_position_embeddings=8192,
    ),
}  # fmt: skip


@dataclass
class Figures:
    """What one method took in one case; times in milliseconds, memory in bytes."""

    method: str
    batch: int
    prompt: int
    first_token: float
    """Of one row, the fastest of the rows: no compilation in it."""
    per_token: float
    per_token_p99: float
    prefill_peak: int
    decode_peak: int
    cache_bytes: int
    preparation: float
    """Compilation, warm-up and capture, in seconds."""


class Timer:
    """Times calls in milliseconds: by events on a GPU, by the clock elsewhere."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"

    def __call__(self, call: Callable[[], Any], repeats: int) -> list[float]:
        if not self.on_gpu:
            stamps = [time.perf_counter()]
            for _ in range(repeats):
                call()
                stamps.append(time.perf_counter())
            return [1e3 * (b - a) for a, b in zip(stamps, stamps[1:], strict=False)]
        events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        events[0].record()
        for event in events[1:]:
            call()
            event.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False)]

    def peak(self) -> int:
        """The most memory allocated since the last call."""
        if not self.on_gpu:
            return 0
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak


def captured(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """`step` as a replay of a CUDA graph; `step` itself where there is no GPU."""
    if device.type != "cuda":
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


class Dense:
    """The baseline: the model's own weights, plain PyTorch, no mask, grouped-query SDPA over exactly the tokens there
    are, everything between two attention calls compiled, the whole step in a CUDA graph."""

    def __init__(self, model: Any, batch: int, length: int, compiled: bool):
        config, self.model, self.length = model.config, model, length
        shape = (batch, config.num_key_value_heads, length + 1, model.model.layers[0].self_attn.head_dim)
        make = lambda: torch.empty(shape, dtype=model.dtype, device=model.device)  # noqa: E731
        self.cache = [(make(), make()) for _ in model.model.layers]
        self.ids = torch.zeros(batch, 1, dtype=torch.int64, device=model.device)
        wrap = torch.compile if compiled else lambda f: f
        self.before, self.after, self.last = wrap(before_attention), wrap(after_attention), wrap(last_token)

    def prefill(self, row: int, ids: Tensor) -> None:
        cache = DynamicCache()
        logits = self.model(ids, past_key_values=cache, logits_to_keep=1).logits
        for (k, v), layer in zip(self.cache, cache.layers, strict=True):
            k[row, :, : self.length], v[row, :, : self.length] = layer.keys[0], layer.values[0]
            layer.keys = layer.values = None
        self.ids[row] = logits.argmax(-1)[0]

    def step(self) -> None:
        """The token after the prompt, again and again: each call does all the work of a right step at this length."""
        decoder, eps = self.model.model, self.model.config.rms_norm_eps
        x = F.embedding(self.ids, decoder.embed_tokens.weight)
        cos, sin = decoder.rotary_emb(x, torch.full((1, 1), self.length, device=x.device))
        for layer, (keys, values) in zip(decoder.layers, self.cache, strict=True):
            a, mlp = layer.self_attn, layer.mlp
            norms = (a.q_norm.weight, a.k_norm.weight) if hasattr(a, "q_norm") else (None, None)
            q, k, v = self.before(
                x, cos, sin, layer.input_layernorm.weight, a.q_proj.weight, a.k_proj.weight, a.v_proj.weight, *norms,
                a.head_dim, eps,
            )  # fmt: skip
            keys[:, :, self.length :], values[:, :, self.length :] = k, v
            out = F.scaled_dot_product_attention(q, keys, values, enable_gqa=True)
            x = self.after(
                x, out, a.o_proj.weight, layer.post_attention_layernorm.weight, mlp.gate_proj.weight, mlp.up_proj.weight,
                mlp.down_proj.weight, eps,
            )  # fmt: skip
        self.ids.copy_(self.last(x, decoder.norm.weight, self.model.lm_head.weight, eps))

    def bytes(self) -> int:
        return sum(t.nbytes for pair in self.cache for t in pair)


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def before_attention(x, cos, sin, weight, wq, wk, wv, q_norm, k_norm, head_dim: int, eps: float):
    x = norm(x, weight, eps)
    q, k, v = (F.linear(x, w).unflatten(-1, (-1, head_dim)).transpose(1, 2) for w in (wq, wk, wv))
    if q_norm is not None:
        q, k = norm(q, q_norm, eps), norm(k, k_norm, eps)
    rotated = (y * cos[:, None] + torch.cat((-y.chunk(2, -1)[1], y.chunk(2, -1)[0]), -1) * sin[:, None] for y in (q, k))
    return *rotated, v


def after_attention(x, out, wo, weight, gate, up, down, eps: float):
    x = x + F.linear(out.transpose(1, 2).flatten(2), wo)
    y = norm(x, weight, eps)
    return x + F.linear(F.silu(F.linear(y, gate)) * F.linear(y, up), down)


def last_token(x, weight, head, eps: float):
    return F.linear(norm(x, weight, eps), head).argmax(-1)


class Ours:
    """The model as it is, compiled with the minikv backend, on a `MiniKVCache`; the step in a CUDA graph."""

    def __init__(self, model: Any, config: MiniKVConfig, batch: int, length: int, inner: str, room: int):
        self.model = model
        self.cache = MiniKVCache(model, length + room, batch, config)
        self.row = MiniKVCache(model, length + room, 1, config) if batch > 1 else self.cache
        forward = type(model).forward.__get__(model)
        # A prompt is long: nothing is gained there by fusing what is between matrix products.
        self.read = torch.compile(forward, backend=MiniKVBackend(config, "eager"))
        self.decode = torch.compile(forward, backend=MiniKVBackend(config, inner))
        self.ids = torch.zeros(batch, 1, dtype=torch.int64, device=model.device)

    def prefill(self, row: int, ids: Tensor) -> None:
        self.row.reset()
        logits = self.read(ids, past_key_values=self.row, logits_to_keep=1, use_cache=True).logits
        if self.row is not self.cache:
            self.cache.write_rows(row, self.row)
        self.ids[row] = logits.argmax(-1)[0]

    def step(self) -> None:
        logits = self.decode(self.ids, past_key_values=self.cache, use_cache=True).logits
        self.ids.copy_(logits.argmax(-1))

    def bytes(self) -> int:
        return sum(t.untyped_storage().nbytes() for layer in self.cache.layers for t in layer.tensors())


class Eager:
    """transformers alone: SDPA, `DynamicCache`, no compilation."""

    def __init__(self, model: Any, batch: int, length: int):
        self.model, self.cache, self.rows = model, None, []
        self.ids = torch.zeros(batch, 1, dtype=torch.int64, device=model.device)

    def prefill(self, row: int, ids: Tensor) -> None:
        cache = DynamicCache()
        self.ids[row] = self.model(ids, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)[0]
        self.rows.append(cache)
        if len(self.rows) == len(self.ids):
            self.cache = DynamicCache()
            for i, layers in enumerate(zip(*(c.layers for c in self.rows), strict=True)):
                self.cache.update(*(torch.cat([getattr(x, n) for x in layers]) for n in ("keys", "values")), i)
                for layer in layers:
                    layer.keys = layer.values = None
            self.rows = []

    def step(self) -> None:
        self.ids.copy_(self.model(self.ids, past_key_values=self.cache).logits.argmax(-1))

    def bytes(self) -> int:
        return cache_report(self.cache).bytes


def build(shape: str, layers: int | None, device: torch.device) -> Any:
    """A model of this shape with random weights, bf16, made on the device."""
    config = SHAPES[shape]
    if layers is not None:
        config.num_hidden_layers = layers
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.eval().requires_grad_(False)


def run(method: str, model: Any, batch: int, prompt: int, inner: str, steps: int) -> Figures:
    """One method in one case."""
    device, timer = model.device, Timer(model.device)
    gc.collect()
    timer.peak()
    if method == "dense":
        decoder: Any = Dense(model, batch, prompt, compiled=inner == "inductor")
    elif method == "transformers":
        decoder = Eager(model, batch, prompt)
    else:
        # Room for every step, the captured ones included, and for one to compile.
        decoder = Ours(model, MiniKVConfig.preset(method), batch, prompt, inner, room=steps + 8)
    generator = torch.Generator(device).manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (batch, prompt), device=device, generator=generator)
    begun = time.perf_counter()
    if not isinstance(decoder, Eager):  # compiles; its result is overwritten
        decoder.prefill(0, ids[:1])
    preparation = time.perf_counter() - begun
    rows = iter(range(batch))
    first = timer(lambda: decoder.prefill(row := next(rows), ids[row : row + 1]), batch)
    prefill_peak = timer.peak()
    begun = time.perf_counter()
    decoder.step()
    step = decoder.step if isinstance(decoder, Eager) else captured(decoder.step, device)
    preparation += time.perf_counter() - begun
    timer.peak()
    times = timer(step, steps)
    times.sort()
    return Figures(
        method, batch, prompt, min(first), statistics.median(times), times[int(0.99 * (len(times) - 1))], prefill_peak,
        timer.peak(), decoder.bytes(), preparation,
    )  # fmt: skip


def main(
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "llama-3.1-8b",
    cases: Annotated[str, typer.Option(help="Batch x prompt tokens, several with commas.")] = "1x131072,16x32768",
    methods: Annotated[str, typer.Option(help='"dense", "transformers", or presets.')] = "dense,transformers,default,minikv",
    layers: Annotated[int | None, typer.Option(help="Fewer layers than the shape has.")] = None,
    inner: Annotated[str, typer.Option(help='"inductor" or "eager", for the decode step of dense and ours.')] = "inductor",
    steps: Annotated[int, typer.Option(help="Decode steps that are timed.")] = 64,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    minutes: Annotated[float, typer.Option(help="Start nothing new after so long; what is done is written.")] = 1e9,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    started, results = time.time(), []
    model = build(shape, layers, torch.device(device))
    weights = sum(p.nbytes for p in model.parameters())
    with torch.no_grad():
        for case in cases.split(","):
            batch, prompt = map(int, case.split("x"))
            for method in methods.split(","):
                if time.time() - started > 60 * minutes:
                    continue
                try:
                    results.append(run(method, model, batch, prompt, inner, steps))
                except torch.OutOfMemoryError:
                    print(f"{case} {method}: out of memory", flush=True)
                else:
                    print(asdict(results[-1]), flush=True)
                torch.compiler.reset()
    Console().print(table(results, shape, model.config.num_hidden_layers))
    if json_file is not None:
        head = {**provenance(device), "shape": shape, "layers": model.config.num_hidden_layers, "weight_bytes": weights}
        json_file.write_text(json.dumps({**head, "results": [asdict(r) for r in results]}, indent=1) + "\n")


def table(results: list[Figures], shape: str, layers: int) -> Table:
    shown = Table(title=f"{shape}, {layers} layers, bf16, random weights; in brackets: against dense")
    for name in ("case", "method", "first token ms", "ms / token", "p99", "tokens / s", "prefill GiB", "decode GiB",
                 "cache GiB"):
        shown.add_column(name, justify="right")
    for r in results:
        dense = next((d for d in results if d.method == "dense" and (d.batch, d.prompt) == (r.batch, r.prompt)), None)

        def cell(value: float, base: float | None, digits: int = 2) -> str:
            return f"{value:.{digits}f}" + (f" ({value / base:.2f}x)" if base else "")

        gib = [(getattr(r, n) / 2**30, dense and getattr(dense, n) / 2**30) for n in ("prefill_peak", "decode_peak", "cache_bytes")]
        rate = 1e3 * r.batch / r.per_token
        shown.add_row(
            f"{r.batch}x{r.prompt}", r.method, cell(r.first_token, dense and dense.first_token, 0),
            cell(r.per_token, dense and dense.per_token), f"{r.per_token_p99:.2f}",
            cell(rate, dense and 1e3 * dense.batch / dense.per_token, 1), *(cell(*pair) for pair in gib),
        )  # fmt: skip
    return shown


if __name__ == "__main__":
    typer.run(main)
