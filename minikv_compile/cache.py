"""`MiniKVCache`: a transformers cache of fixed capacity, whose decode step holds in a CUDA graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from . import compat, fixed
from .budget import most_kept
from .config import MiniKVConfig
from .kernels.state import OFFSET
from .ops import ROLES
from .tensor import FORMAT, KVTensor

minikv = torch.ops.minikv


class MiniKVLayer(CacheLayerMixin):
    """One layer's keys and values, for up to `max_cache_len` tokens.

    Tensors, at addresses that stay:
        key, value: those of a `KVTensor`, see `fixed.names`.
        important: int32 [batch, kv_heads, most], as in a `KVTensor`.
        kept: uint8 [batch, kv_heads, ceil(max_cache_len / 8)], one bit per prompt token.
        length: int64 []. padding: int64 [batch], tokens of `length` that are padding.
    """

    is_compileable = True
    is_croppable = True
    is_sliding = False

    def __init__(
        self, config: MiniKVConfig, max_cache_len: int, batch_size: int, kv_heads: int, head_dim: int,
        dtype: torch.dtype, device: torch.device, place: int = 0, count: int = 1, max_new_tokens: int | None = None,
    ):  # fmt: skip
        """`place`, `count`: of the layer among those that share a budget, and their number. `max_new_tokens`: as of
        `MiniKVCache`."""
        self.config, self.max_cache_len, self.batch_size = config, max_cache_len, batch_size
        self.place, self.count = place, count
        self._settings = config.to_json()  # as ops take it; computing it is nothing for Dynamo
        self.taken: tuple[str, Tensor, MiniKVLayer] | None = None  # rows that one of two static buffers was asked for
        self.filled = False  # whether a prompt is in it; of all that changes, the one thing the host knows
        stored = None
        if max_new_tokens is not None:
            stored = most_kept(max_cache_len - max_new_tokens, place, count, config) + max_new_tokens
        with compat.outside_inference_mode():
            self.key, self.value = (
                fixed.allocate(config, role, batch_size, kv_heads, max_cache_len, head_dim, dtype, device, stored)
                for role in ROLES
            )
            self.important = fixed.first_tokens(config, max_cache_len, device).repeat(batch_size, kv_heads, 1)
            self.kept = torch.zeros(batch_size, kv_heads, -(-max_cache_len // 8), dtype=torch.uint8, device=device)
            self.length = torch.zeros((), dtype=torch.int64, device=device)
            self.padding = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self._mark_static()

    def _mark_static(self) -> None:
        for tensor in self.tensors():
            compat.mark_static(tensor)

    def tensors(self) -> list[Tensor]:
        """All tensors held."""
        return [*self.key, *self.value, self.important, self.kept, self.length, self.padding]

    @property
    def is_initialized(self) -> bool:
        return self.filled

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Storages exist from the start: a compiled prefill could not make any that stay."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store new tokens; `[batch, kv_heads, n, head_dim]` each.

        Returns:
            what to attend to, dense: the prompt as it is; later, `max_cache_len` tokens, of which a mask of
            `get_mask_sizes` lets those be seen that are there.

        Raises:
            ValueError: wrong shape or dtype, no room, or a policy that needs the prefill to be rewritten.
            RuntimeError: a policy that drops tokens, decoded without the backend.
        """
        if not self.filled:
            self.store(key_states, value_states)
            return key_states, value_states
        return minikv.update(
            key_states, value_states, self.key, self.value, self.important, self.kept, self.length, self.padding,
            self.max_cache_len, self._settings,
        )  # fmt: skip

    def store(
        self, key_states: Tensor, value_states: Tensor, order: Tensor | None = None, lengths: Tensor | None = None
    ) -> None:  # fmt: skip
        """Store a prompt. `order`, `lengths`: of `ops.align_rows`, if some of its tokens are padding."""
        minikv.store_prompt(
            key_states, value_states, None, order, lengths, self.key, self.value, self.important, self.kept, self.length,
            self.padding, self.place, self.count, self.max_cache_len, self._settings,
        )  # fmt: skip
        self.filled = True
        if not torch.compiler.is_compiling():  # else the boundary of the graph looks
            self.report(prompt=True)

    def report(self, prompt: bool = False) -> None:
        """`fixed.report` of this layer. In a captured graph nobody looks: call it, or whatever reads the device."""
        if self.filled:
            pairs = zip(ROLES, (self.key, self.value), strict=True)
            held = [(role, self.place, tensors[fixed.DENSE], tensors[fixed.STATE]) for role, tensors in pairs]
            fixed.report(held, self.config, prompt)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that a mask is about, and the first of them."""
        return (self.max_cache_len if self.filled else query_length), 0

    def get_seq_length(self) -> Tensor | int:
        """Logical tokens: int64 [] on the device; 0 before the first."""
        return self.length if self.filled else 0

    def get_max_length(self) -> int:
        return self.max_cache_len

    get_max_cache_shape = get_max_length  # its name in transformers 5.17

    @property
    def keys(self) -> KVTensor | None:
        """The keys as they are now, sharing the storages; reads the device."""
        self.report()
        return self._view("key") if self.filled else None

    @property
    def values(self) -> KVTensor | None:
        return self._view("value") if self.filled else None

    def _view(self, role: str) -> KVTensor:
        tensors = dict(zip(fixed.names(self.config, role), getattr(self, role), strict=True), kept=self.kept)
        if self.config.pins:
            tensors["important"] = self.important
        tensors["state"] = tensors["state"].clone()
        tensors["state"][:, OFFSET] += self.length
        return KVTensor(tensors, self.config, role, int(self.length))

    # ---- what people do with a cache; none of it belongs in a captured graph

    @torch.no_grad()
    def reset(self) -> None:
        """Forget the tokens and keep the storages: what was captured on them can be replayed."""
        self.report()
        self.filled = False
        for state in (self.key[fixed.STATE], self.value[fixed.STATE]):
            state.copy_(fixed.empty_state(self.config, self.batch_size, state.device))
        for tensor in (self.length, self.padding):
            tensor.zero_()
        self.important.copy_(fixed.first_tokens(self.config, self.max_cache_len, self.important.device))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in another order, in place."""
        for tensor in self._by_row():
            tensor.copy_(tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these rows, in storages of their own: graphs captured on the old ones do not see them."""
        rows = torch.arange(self.batch_size, device=self.length.device)[indices.to(self.length.device)]
        with compat.outside_inference_mode():
            self.key, self.value = ([t.index_select(0, rows) for t in held] for held in (self.key, self.value))
            self.important, self.kept, self.padding = (
                t.index_select(0, rows) for t in (self.important, self.kept, self.padding)
            )
        self.batch_size = len(rows)
        self._mark_static()

    def selected(self, indices: Tensor) -> MiniKVLayer:
        """A copy of these rows, with storages of its own."""
        part = object.__new__(MiniKVLayer)
        part.__dict__.update(self.__dict__)
        with compat.outside_inference_mode():
            part.length = self.length.clone()
        part.batch_select_indices(indices)
        return part

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    def _by_row(self) -> list[Tensor]:
        return [tensor for tensor in self.tensors() if tensor is not self.length]

    def crop(self, tokens_to_remove: int) -> None:
        """Give up the newest `-tokens_to_remove` tokens; a positive number is a length to cut to (transformers 5.17).

        Raises:
            ValueError: some of them are quantized already, or belong to the prompt's padding or its dropped tokens.
        """
        removed = self.check_crop(tokens_to_remove)
        for tensor in (self.key[fixed.STATE], self.value[fixed.STATE]):
            tensor[:, OFFSET] += removed
        self.length -= removed

    def check_crop(self, tokens_to_remove: int) -> int:
        """How many tokens `crop` would give up; it raises what `crop` would."""
        removed = _removed(int(self.length), tokens_to_remove)
        if not self.filled or not removed:
            return 0
        self.keys.crop(int(self.length) - removed)
        return removed

    def write_rows(self, start: int, other: MiniKVLayer) -> None:
        """Copy the rows of `other` here, from row `start` on. The shorter side is padded on the left, logically."""
        mine, theirs = (int(layer.length) if layer.filled else 0 for layer in (self, other))
        rows, length = slice(start, start + other.batch_size), max(mine, theirs)
        for target, source in zip((*self.key, *self.value), (*other.key, *other.value), strict=True):
            target[rows] = source
        self.important[rows] = other.important
        self.kept.copy_(_shifted(self.kept, length - mine))
        self.kept[rows] = _shifted(other.kept, length - theirs)
        self.padding += length - mine
        self.padding[rows] = other.padding + length - theirs
        self.length.fill_(length)
        self.filled = True

    def state_dict(self) -> dict[str, Any]:
        self.report()
        return {"filled": self.filled, "tensors": self.tensors()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for tensor, saved in zip(self.tensors(), state["tensors"], strict=True):
            tensor.copy_(saved)
        self.filled = state["filled"]


def _shifted(kept: Tensor, tokens: int) -> Tensor:
    """A bit mask of which every token stands `tokens` further right."""
    if not tokens:
        return kept
    bits = (kept[..., None] >> torch.arange(8, dtype=torch.uint8, device=kept.device) & 1).flatten(2).bool()
    return fixed.bits_of(torch.nn.functional.pad(bits, (tokens, 0))[..., : bits.shape[-1]])


class DenseLayer(StaticLayer):
    """A layer that is not compressed, beside those that are: its prompt, too, is attended to as it is, so that one mask
    serves all."""

    is_croppable = True

    def __init__(self, max_cache_len: int):
        super().__init__(max_cache_len=max_cache_len)
        self.filled = False

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As `MiniKVLayer.update`."""
        everything = super().update(key_states, value_states)
        if self.filled:
            return everything
        self.filled = True
        return key_states, value_states

    get_mask_sizes = MiniKVLayer.get_mask_sizes

    def get_seq_length(self) -> Tensor | int:
        return self.cumulative_length if self.filled else 0

    def reset(self) -> None:
        super().reset()
        self.filled = False

    def crop(self, tokens_to_remove: int) -> None:
        """As `MiniKVLayer.crop`: what lies past the length is not seen."""
        self.cumulative_length -= self.check_crop(tokens_to_remove)

    def check_crop(self, tokens_to_remove: int) -> int:
        """As `MiniKVLayer.check_crop`."""
        return _removed(int(self.cumulative_length), tokens_to_remove)


def _removed(length: int, tokens_to_remove: int) -> int:
    """Tokens that a `crop` of `length` tokens gives up.

    Raises:
        ValueError: more than there are.
    """
    removed = -tokens_to_remove if tokens_to_remove <= 0 else max(length - tokens_to_remove, 0)
    if removed > length:
        raise ValueError(f"Cannot roll back {removed} tokens of a cache of {length}.")
    return removed


class MiniKVCache(Cache):
    """A compressed cache of fixed capacity for `model.generate(past_key_values=...)` or a loop of your own.

    Storages are allocated at once and stay where they are; lengths are on the device, and so is the decision to flush.
    So one decode step, captured in a CUDA graph, can be replayed for every token, and nothing recompiles. The step must
    run through the minikv backend of the same configuration: anywhere else the cache is right but slow (or an error,
    where the policy drops tokens).

    ```python
    cache = MiniKVCache(model, max_cache_len=8192)
    model.compile(backend=minikv_backend)
    model.generate(**inputs, past_key_values=cache, disable_compile=True)  # generate's own compilation is Inductor's
    ```

    Sliding-window layers and layers without attention get transformers' own static layers; `skip_layers`, and layers
    whose keys and values cannot be compressed, are dense.
    """

    def __init__(
        self, model: torch.nn.Module | list[Any], max_cache_len: int, batch_size: int = 1,
        config: MiniKVConfig | str | None = None, max_new_tokens: int | None = None,
    ):  # fmt: skip
        """
        Args:
            model: a transformers model; one token is run through it, to see what each layer keeps, and where. Or what
                `what_layers_keep` said of it.
            max_cache_len: tokens of a row, prompt and padding included. One more is an error.
            batch_size: rows; beams and returned sequences count.
            config: of the backend; a `MiniKVConfig`, the name of a preset, or None for `default`.
            max_new_tokens: of `max_cache_len`, how many come after the first prompt, at most. With it, layers of a policy
                that drops prompt tokens have room only for those that they keep of a prompt, and for so many new ones. A
                token that finds no room is an error. None: any share of `max_cache_len` may be new.

        Raises:
            ValueError: no capacity or no rows; `max_new_tokens` that leave no room for a prompt; a layer that is neither
                attention with a dynamic cache nor linear attention, or a model that does not use the cache.
        """
        self.config, self.capacity = MiniKVConfig.of(config), max_cache_len
        if max_cache_len < 1 or batch_size < 1:
            raise ValueError(f"MiniKVCache: max_cache_len {max_cache_len} and batch_size {batch_size} must be 1 or more.")
        if max_new_tokens is not None and not 0 <= max_new_tokens < max_cache_len:
            raise ValueError(f"MiniKVCache: {max_new_tokens} new tokens of {max_cache_len} leave no room for a prompt.")
        seen = model if isinstance(model, list) else what_layers_keep(model)
        attention = [layer for layer in seen if isinstance(layer, DynamicLayer)]
        skipped = [attention[i] for i in self.config.skip_layers if -len(attention) <= i < len(attention)]
        taken = [layer for layer in attention if layer not in skipped and _fits(layer)]
        layers = []
        for index, layer in enumerate(seen):
            if layer in taken:
                _, heads, _, dim = layer.keys.shape
                place = taken.index(layer), len(taken)
                layers.append(
                    MiniKVLayer(
                        self.config, max_cache_len, batch_size, heads, dim, layer.keys.dtype, layer.keys.device, *place,
                        max_new_tokens,
                    )  # fmt: skip
                )
            else:
                layers.append(_static_twin(index, layer, max_cache_len, batch_size))
        super().__init__(layers=layers)

    def crop(self, tokens_to_remove: int) -> None:
        """As `MiniKVLayer.crop`, in all layers or, where one cannot, in none."""
        for layer in self.layers:
            if isinstance(layer, (MiniKVLayer, DenseLayer)):
                layer.check_crop(tokens_to_remove)
        super().crop(tokens_to_remove)

    def write_rows(self, start: int, other: MiniKVCache) -> None:
        """Copy all rows of `other`, from row `start` of this cache on, in place: prefill row by row, decode together.

        Where lengths differ, the shorter rows count as left-padded from then on: pass an `attention_mask`, or
        `position_ids`, that say so.

        Raises:
            ValueError: another configuration or capacity, rows outside of the batch, or layers of transformers' own.
        """
        self._check_like(other)
        if not 0 <= start <= self.batch_size - other.batch_size:
            raise ValueError(f"Rows {start} to {start + other.batch_size}, but this cache has {self.batch_size}.")
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            mine.write_rows(start, theirs)

    def rows(self, start: int, stop: int) -> MiniKVCache:
        """Rows `start` to `stop - 1` as a cache of their own, a copy.

        Raises:
            ValueError: layers of transformers' own.
        """
        self._check_like(self)
        copy = object.__new__(MiniKVCache)
        Cache.__init__(copy, layers=[])
        copy.config, copy.capacity = self.config, self.capacity
        copy.layers += [layer.selected(torch.arange(start, stop)) for layer in self.layers]
        return copy

    def _check_like(self, other: MiniKVCache) -> None:
        if other.config != self.config or other.capacity != self.capacity or len(other) != len(self):
            raise ValueError("Caches differ in configuration, max_cache_len or layers.")
        strange = [type(layer).__name__ for layer in self.layers if not isinstance(layer, MiniKVLayer)]
        if strange:
            raise ValueError(
                f"Rows of a {strange[0]} cannot be copied: only caches of MiniKVLayers can be put together."
            )
        mine, theirs = ([[t.shape[1:] for t in layer.tensors()] for layer in cache.layers] for cache in (self, other))
        if mine != theirs:
            raise ValueError("Caches differ in their model, or in max_new_tokens: rows of one do not fit the other.")

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and text only: `torch.save` it, and `torch.load(weights_only=True)`.

        Raises:
            ValueError: layers of transformers' own.
        """
        self._check_like(self)
        return {
            "format": FORMAT, "config": self.config.to_json(), "max_cache_len": self.capacity,
            "batch_size": self.batch_size, "layers": [layer.state_dict() for layer in self.layers],
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave, into the storages of this cache.

        Raises:
            ValueError: another format; a cache of another model, batch, capacity or configuration; layers of
                transformers' own.
        """
        self._check_like(self)
        if state.get("format") != FORMAT:
            raise ValueError(f"A saved MiniKVCache of format {state.get('format')}: this version reads {FORMAT}.")
        saved = MiniKVConfig.from_json(state["config"])
        if saved != self.config:
            raise ValueError(f"Saved under another configuration ({self.config.differences(saved)} there).")
        shapes = [[tuple(t.shape) for t in layer.tensors()] for layer in self.layers]
        if shapes != [[tuple(t.shape) for t in layer["tensors"]] for layer in state["layers"]]:
            raise ValueError(
                f"Saved for max_cache_len {state['max_cache_len']} and batch_size {state['batch_size']}, or for "
                f"another model; this cache has {self.capacity} and {self.batch_size}."
            )
        for layer, part in zip(self.layers, state["layers"], strict=True):
            layer.load_state_dict(part)


def what_layers_keep(model: torch.nn.Module) -> list[Any]:
    """The layers of a dynamic cache after one token."""
    model = getattr(model, "_orig_mod", model)  # of `torch.compile(model)`
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    with torch.no_grad():
        # Not `model(...)`, which may be compiled.
        type(model).forward(model, torch.ones(1, 1, dtype=torch.int64, device=model.device), past_key_values=cache)
    if any(isinstance(layer, DynamicLayer) and not layer.is_initialized for layer in cache.layers):
        raise ValueError(f"MiniKVCache: {type(model).__name__} does not keep its keys and values in past_key_values.")
    return cache.layers


def _fits(layer: DynamicLayer) -> bool:
    """Whether what a layer keeps can be compressed."""
    return (
        type(layer) is DynamicLayer and layer.keys.shape == layer.values.shape and layer.keys.shape[-1] % 16 == 0
        and layer.keys.shape[-1] <= 512
    )  # fmt: skip


def _static_twin(index: int, layer: Any, max_cache_len: int, batch_size: int) -> Any:
    """An uncompressed layer of fixed capacity for what `layer`, of a dynamic cache, holds."""
    if type(layer) is DynamicSlidingWindowLayer:
        twin = StaticSlidingWindowLayer(max_cache_len=max_cache_len, sliding_window=layer.sliding_window)
    elif type(layer) is DynamicLayer:
        twin = DenseLayer(max_cache_len)
    elif not isinstance(layer, DynamicLayer) and layer.is_compileable:
        return type(layer)(
            **({"number_of_states": layer.number_of_states} if hasattr(layer, "number_of_states") else {})
        )
    else:
        raise ValueError(f"MiniKVCache: layer {index} keeps a {type(layer).__name__}, which has no static form here.")
    with compat.outside_inference_mode():
        twin.lazy_initialization(*(x[:, :, :0].repeat(batch_size, 1, 1, 1) for x in (layer.keys, layer.values)))
    return twin
