"""A whole decoder, decoding from each kind of cache: ours beside the fastest dense decoder of the same run.

Prompts are read row by row, where a method's caches can be put together; each row's cache has room for the timed steps.
Compilation and capture are reported apart.
"""

from __future__ import annotations

import gc
import math
import re
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor
from transformers import DynamicCache, QuantizedCache

from .backend import MiniKVBackend
from .cache import MiniKVCache
from .config import MiniKVConfig
from .measure import parse_method
from .plan import held_bytes, parse_tokens
from .report import cache_report

DENSE, TRANSFORMERS, QUANTO = "dense", "transformers", "quanto"
"""Methods that are not ours: `Dense`, `Eager`, `Quanto`."""
ARCHITECTURES = "llama", "mistral", "qwen3"
"""What `Dense` can decode."""


@dataclass
class Figures:
    """What one method took in one case; times in milliseconds, memory in bytes."""

    method: str
    batch: int
    prompt: int
    first_token: float
    """Of one row, the fastest of the rows: no compilation in it. Where a batch is read at once, its share."""
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


class Decoder:
    """A model and a cache for one case."""

    whole = False
    """Whether the prompts of a batch are read together."""

    def prefill(self, row: int, ids: Tensor) -> None:
        """Read the prompt [rows, tokens] of the rows from `row` on."""
        raise NotImplementedError

    def step(self) -> None:
        """Decode one token of each row."""
        raise NotImplementedError

    def bytes(self) -> int:
        """Bytes of the cache's storages."""
        raise NotImplementedError


class Dense(Decoder):
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


class Ours(Decoder):
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
        return held_bytes(self.cache)


class Eager(Decoder):
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


class Quanto(Eager):
    """transformers' `QuantizedCache` with optimum-quanto's 2 bits (KIVI's, per its documentation), in groups of 64. Its rows
    cannot be put together, so that it reads a whole batch at once."""

    whole = True

    def prefill(self, row: int, ids: Tensor) -> None:
        self.cache = QuantizedCache("quanto", self.model.config, nbits=2)
        self.ids.copy_(self.model(ids, past_key_values=self.cache, logits_to_keep=1).logits.argmax(-1))

    def bytes(self) -> int:
        names = "_quantized_keys", "_quantized_values", "keys", "values"
        return sum(_bytes_of(getattr(layer, name)) for layer in self.cache.layers for name in names)


def _bytes_of(x: Tensor) -> int:
    """Bytes of a tensor, or of the tensors that a subclass is made of."""
    if not hasattr(x, "__tensor_flatten__"):
        return x.untyped_storage().nbytes()
    return sum(_bytes_of(getattr(x, name)) for name in x.__tensor_flatten__()[0])


def check_method(method: str) -> None:
    """
    Raises:
        ConfigError: no method, or a preset that cannot be changed so.
        ImportError: what the method needs is not installed.
    """
    if method == QUANTO and find_spec("optimum") is None:
        raise ImportError(f"the method {QUANTO!r} needs optimum-quanto: pip install 'minikv-compile[benchmark]'")
    if method not in (DENSE, TRANSFORMERS, QUANTO):
        parse_method(method)


def check_model(model: Any, methods: list[str]) -> None:
    """
    Raises:
        ValueError: `Dense` does not know the architecture.
    """
    kind = model.config.model_type
    if DENSE in methods and kind not in ARCHITECTURES:
        raise ValueError(f"the method {DENSE!r} knows {', '.join(ARCHITECTURES)}, not {kind!r}")


def decoder_of(method: str, model: Any, batch: int, prompt: int, inner: str, steps: int) -> Decoder:
    """What one method decodes with."""
    if method == DENSE:
        return Dense(model, batch, prompt, compiled=inner == "inductor")
    if method in (TRANSFORMERS, QUANTO):
        return (Eager if method == TRANSFORMERS else Quanto)(model, batch, prompt)
    # Room for every step, the captured ones included, and for one to compile.
    return Ours(model, parse_method(method), batch, prompt, inner, room=steps + 8)


def run(method: str, model: Any, batch: int, prompt: int, inner: str, steps: int) -> Figures:
    """One method in one case. `inner`: "inductor" or "eager", for the decode step of dense and ours."""
    device, timer = model.device, Timer(model.device)
    gc.collect()
    timer.peak()
    decoder = decoder_of(method, model, batch, prompt, inner, steps)
    generator = torch.Generator(device).manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (batch, prompt), device=device, generator=generator)
    begun = time.perf_counter()
    if not isinstance(decoder, Eager):  # compiles; its result is overwritten
        decoder.prefill(0, ids[:1])
    preparation = time.perf_counter() - begun
    rows = batch if decoder.whole else 1
    starts = iter(range(0, batch, rows))
    first = timer(lambda: decoder.prefill(row := next(starts), ids[row : row + rows]), batch // rows)
    prefill_peak = timer.peak()
    begun = time.perf_counter()
    decoder.step()
    step = decoder.step if isinstance(decoder, Eager) else captured(decoder.step, device)
    preparation += time.perf_counter() - begun
    timer.peak()
    times = timer(step, steps)
    times.sort()
    return Figures(
        method, batch, prompt, min(first) / rows, statistics.median(times), times[math.ceil(0.99 * len(times)) - 1],
        prefill_peak, timer.peak(), decoder.bytes(), preparation,
    )  # fmt: skip


def parse_cases(text: str) -> list[tuple[int, int]]:
    """(batch, prompt tokens) of each part of "1x128k,16x32768".

    Raises:
        ValueError: anything else.
    """
    parts = text.lower().split(",")
    for part in parts:
        if not re.fullmatch(r"\s*[1-9]\d*x[1-9]\d*[km]?\s*", part):
            raise ValueError(f"{part!r}: must be batch x prompt tokens, as in 16x32768 or 1x128k")
    return [(int(batch), parse_tokens(prompt)) for batch, _, prompt in (part.partition("x") for part in parts)]


def run_cases(
    model: Any, cases: list[tuple[int, int]], methods: list[str], inner: str, steps: int, minutes: float
) -> Iterator[Figures | str]:
    """The figures of each case and method, in this order, or what to say where it does not fit.

    Args:
        cases: (batch, prompt tokens).
        minutes: nothing new is started after so long.
    """
    begun = time.monotonic()
    for batch, prompt in cases:
        for method in methods:
            if time.monotonic() - begun > 60 * minutes:
                return
            result: Figures | str = f"{batch}x{prompt} {method}: out of memory"
            with suppress(torch.OutOfMemoryError), torch.no_grad():
                result = run(method, model, batch, prompt, inner, steps)
            torch.compiler.reset()
            yield result


def bench_table(results: list[Figures], head: str) -> Table:
    """A row per case and method, beside the dense decoder of the same case."""
    shown = Table(title=f"{head}; in brackets: against {DENSE}")
    times, memory = ("first token ms", "ms / token", "p99", "tokens / s"), ("prefill GiB", "decode GiB", "cache GiB")
    for name in ("case", "method", *times, *memory):
        shown.add_column(name, justify="right")
    for r in results:
        dense = next((d for d in results if d.method == DENSE and (d.batch, d.prompt) == (r.batch, r.prompt)), None)

        def cell(value: float, base: float | None, digits: int = 2) -> str:
            return f"{value:.{digits}f}" + (f" ({value / base:.2f}x)" if base else "")

        measured = "prefill_peak", "decode_peak", "cache_bytes"
        gib = [(getattr(r, name) / 2**30, dense and getattr(dense, name) / 2**30) for name in measured]
        rate = 1e3 * r.batch / r.per_token
        shown.add_row(
            f"{r.batch}x{r.prompt}", r.method, cell(r.first_token, dense and dense.first_token, 0),
            cell(r.per_token, dense and dense.per_token), f"{r.per_token_p99:.2f}",
            cell(rate, dense and 1e3 * dense.batch / dense.per_token, 1), *(cell(*pair) for pair in gib),
        )  # fmt: skip
    return shown
