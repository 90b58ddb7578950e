"""What the user can see: which sites were rewritten, and the bytes that a cache really holds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import Cache

from .backend import MiniKVBackend
from .buffers import GivenBack, layers_of, make_dense
from .config import MiniKVConfig
from .passes.rewrite import SiteReport
from .tensor import SEQ, KVTensor


@dataclass(frozen=True)
class LayerReport:
    """Keys and values of one layer."""

    layer: int
    bytes: int
    """Bytes of the real storages."""
    dense_bytes: int
    """Bytes of a dense cache of the same logical shape and dtype, with the model's native KV heads."""
    elements: int
    """Numbers represented: batch * kv_heads * length * head_dim, keys and values."""
    tokens: int
    """Logical length of the cache."""
    kept: list[int]
    """Tokens stored of each row, per KV head; the others were padding or dropped."""
    compressed: bool

    @property
    def compression(self) -> float:
        return 1 - self.bytes / self.dense_bytes


@dataclass(frozen=True)
class CacheReport:
    """Bytes of a cache, counted from its storages: codes, metadata, window, counters and unused capacity included."""

    layers: list[LayerReport]

    @property
    def bytes(self) -> int:
        return sum(layer.bytes for layer in self.layers)

    @property
    def dense_bytes(self) -> int:
        return sum(layer.dense_bytes for layer in self.layers)

    @property
    def compression(self) -> float:
        """1 - bytes / dense bytes."""
        return 1 - self.bytes / self.dense_bytes if self.dense_bytes else 0.0

    @property
    def bits_per_element(self) -> float:
        """Bytes held / elements represented * 8."""
        elements = sum(layer.elements for layer in self.layers)
        return 8 * self.bytes / elements if elements else 0.0

    def __str__(self) -> str:
        share = self.bytes / max(self.dense_bytes, 1)
        table = Table(title=f"{self.bytes:,} bytes, {share:.1%} of dense\n{self.bits_per_element:.2f} bits per element")
        for name in ("layer", "tokens", "kept", "bytes", "dense bytes", "share"):
            table.add_column(name, justify="right")
        for layer in self.layers:
            kept = str(layer.kept[0]) if len(set(layer.kept)) == 1 else f"{min(layer.kept)}-{max(layer.kept)}"
            table.add_row(
                str(layer.layer), str(layer.tokens), kept, f"{layer.bytes:,}", f"{layer.dense_bytes:,}",
                f"{layer.bytes / layer.dense_bytes:.1%}" if layer.compressed else "dense",
            )  # fmt: skip
        return _rendered(table)


def cache_report(past_key_values: Any) -> CacheReport:
    """Count a cache: a transformers `Cache`, `((keys, values), ...)` with one pair of tensors per layer, or a model whose
    static buffers were taken over.

    Raises:
        TypeError: no keys and values were found in it.
    """
    layers = [_layer(i, pair) for i, pair in enumerate(_pairs(past_key_values)) if pair is not None]
    if not layers:
        raise TypeError(f"No keys and values in {type(past_key_values).__name__}: pass the cache of a finished forward.")
    return CacheReport(layers)


def _pairs(cache: Any) -> Iterator[tuple[Tensor, Tensor] | None]:
    if isinstance(cache, torch.nn.Module):
        cache = layers_of(cache)
    for layer in cache.layers if hasattr(cache, "layers") else cache or ():
        if isinstance(getattr(layer, "keys", None), GivenBack):
            layer = layer.keys.layer
        pair = (layer.keys, layer.values) if hasattr(layer, "keys") and hasattr(layer, "values") else layer
        is_pair = isinstance(pair, (tuple, list)) and len(pair) >= 2
        yield tuple(pair[:2]) if is_pair and all(isinstance(t, Tensor) and t.dim() == 4 for t in pair[:2]) else None


def _layer(index: int, pair: tuple[Tensor, Tensor]) -> LayerReport:
    storages: dict[int, int] = {}
    for tensor in pair:
        for held in tensor.tensors().values() if isinstance(tensor, KVTensor) else (tensor,):
            storage = held.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    keys = pair[0]
    compressed = isinstance(keys, KVTensor)
    length = keys.length if compressed else keys.shape[SEQ]
    kept = [length] * keys.shape[0]
    if compressed:
        kept = keys.kept_mask().sum(-1).amax(-1).tolist()
    elements = sum(t.numel() for t in pair)
    return LayerReport(
        index, sum(storages.values()), elements * keys.element_size(), elements, length, kept, compressed
    )


@dataclass(frozen=True)
class Explanation:
    """The attention sites of a model, and what the pass does to each."""

    graphs: list[list[SiteReport]]

    @property
    def sites(self) -> list[SiteReport]:
        return [site for graph in self.graphs for site in graph]

    @property
    def rewritten(self) -> int:
        return sum(site.rewritten for site in self.sites)

    def __str__(self) -> str:
        table = Table(title=f"{self.rewritten} of {len(self.sites)} attention sites rewritten")
        for name in ("graph", "site", "module", "idiom", "rewritten, or why not"):
            table.add_column(name)
        for i, graph in enumerate(self.graphs):
            for site in graph:
                layer = str(site.layer) if site.layer_known else f"{site.layer}?"
                table.add_row(str(i), layer, site.where, site.idiom, site.reason or site.kind)
        return _rendered(table)


def explain(model: torch.nn.Module, *args: Any, config: MiniKVConfig | str | None = None, **inputs: Any) -> Explanation:
    """Run a prefill and, where the model returns a cache, one decode step, and say what became of each site.

    Args:
        args, inputs: of `model.forward`. A transformers model gets `use_cache=True`.
        config: a `MiniKVConfig`, the name of a preset, or None for `default`.
    """
    backend = MiniKVBackend(config, inner="eager")
    backend.records = False
    forward = torch.compile(model.forward, backend=backend)
    if hasattr(model, "config") and not args:
        inputs.setdefault("use_cache", True)
    with torch.no_grad():
        out = forward(*args, **inputs)
        cache, logits = getattr(out, "past_key_values", None), getattr(out, "logits", None)
        if cache is not None and logits is not None and not args:
            step = {k: v for k, v in inputs.items() if k not in ("inputs_embeds", "position_ids", "past_key_values")}
            step["input_ids"] = logits[:, -1:].argmax(-1)
            if step.get("attention_mask") is not None:
                mask = step["attention_mask"]
                step["attention_mask"] = torch.cat([mask, mask.new_ones(mask.shape[0], 1)], -1)
            forward(**step, past_key_values=cache)
    for owner in (model, *(x for x in inputs.values() if isinstance(x, Cache))):
        make_dense(owner)
    return Explanation(backend.graphs)


def _rendered(table: Table) -> str:
    console = Console(width=120)
    with console.capture() as capture:
        console.print(table)
    return capture.get().rstrip()


