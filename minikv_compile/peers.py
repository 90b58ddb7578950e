"""Other packages' caches as methods of `minikv eval`: kvpress' eviction, transformers' `QuantizedCache`.

    kvpress-snapkv:ratio=0.5            SnapKV, PyramidKV, Knorm or ExpectedAttention: half of the tokens are dropped
    kvpress-pyramidkv:ratio=0.8:beta=5  further settings are the press's own
    quanto:bits=2:group=64              optimum-quanto's or HQQ's quantization of everything but the newest 128 tokens
    hqq:bits=4

They run uncompiled, on equally long rows without padding. Bytes are counted from what their caches hold.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import wraps
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, QuantizedCache

from .report import CacheReport, LayerReport

PRESSES = {
    "snapkv": "SnapKVPress", "pyramidkv": "PyramidKVPress", "knorm": "KnormPress",
    "expected_attention": "ExpectedAttentionPress",
}  # fmt: skip
"""kvpress' classes, by the names of their modules."""
AXES = {"quanto": 0, "hqq": 1}
"""The axis that `QuantizedCache`'s documentation recommends for each backend."""
PEERS = (*(f"kvpress-{name}" for name in PRESSES), *AXES)


class PeerError(ValueError):
    """A peer's method that cannot run, with the reason."""


@dataclass(frozen=True)
class Peer:
    """A method of another package: its name, and what is changed of its settings."""

    name: str
    settings: dict[str, Any]

    def forward(self, model: Any) -> Callable[..., Any]:
        """The model's forward, as it is now, with this method. A cache that is passed to it again must be one that it
        made; it knows how many tokens went into it when some of them are gone.

        Raises:
            PeerError: what the method needs is not installed, or it has no such setting.
        """
        plain = model.forward
        try:
            press = self.press() if self.drops else None
            make = DynamicCache if press else self._quantized(model)
        except (ImportError, TypeError, ValueError, AssertionError) as error:
            raise PeerError(f"{self.name}: {error}") from error

        @wraps(plain)
        def read(input_ids: Tensor, past_key_values: Any = None, **kwargs: Any) -> Any:
            cache = make() if past_key_values is None else past_key_values
            past, n = getattr(cache, "tokens_read", 0), input_ids.shape[1]
            positions = torch.arange(past, past + n, device=input_ids.device).expand(len(input_ids), -1)
            with pressed(model, press) if press else nullcontext():
                out = plain(input_ids=input_ids, past_key_values=cache, position_ids=positions, **kwargs)
            cache.tokens_read = past + n
            return out

        return read

    @property
    def drops(self) -> bool:
        """Whether it is one of kvpress's."""
        return self.name not in AXES

    def press(self) -> Any:
        """kvpress's object."""
        module = _kvpress(self.name.removeprefix("kvpress-"))
        settings = dict(self.settings)
        ratio = settings.pop("ratio", 0.5)
        press = getattr(module, PRESSES[self.name.removeprefix("kvpress-")])
        return press(compression_ratio=ratio, **settings)

    def _quantized(self, model: Any) -> Callable[[], QuantizedCache]:
        settings = {"axis_key": AXES[self.name], "axis_value": AXES[self.name]} | {
            {"bits": "nbits", "group": "q_group_size"}.get(name, name): value for name, value in self.settings.items()
        }
        make = lambda: QuantizedCache(self.name, model.config, **settings)  # noqa: E731
        make()  # says now what it lacks
        return make


def parse_peer(text: str) -> Peer | None:
    """The peer of a method's text, or None: the method is ours.

    Raises:
        PeerError: a setting without a value.
    """
    name, *changes = text.split(":")
    if name not in PEERS:
        return None
    settings = {}
    for change in changes:
        key, _, value = change.partition("=")
        try:
            settings[key] = float(value) if "." in value else int(value)
        except ValueError:
            raise PeerError(f"{text!r}: {change!r} must be a name and a number, as in ratio=0.5") from None
    return Peer(name, settings)


def peer_report(model: Any, cache: Any, batch: int, tokens: int) -> CacheReport:
    """What a peer's cache holds, beside a dense cache of all `tokens` that went into each of its rows."""
    kv_heads = model.config.get_text_config().num_key_value_heads
    elements = 2 * batch * kv_heads * tokens * _attentions(model)[0].head_dim

    def layer(index: int, held: Any) -> LayerReport:
        tensors = [getattr(held, name, None) for name in ("keys", "values", "_quantized_keys", "_quantized_values")]
        dense, stored = elements * model.dtype.itemsize, [layer_length(held)] * batch
        return LayerReport(index, held_bytes(tensors), dense, elements, tokens, stored, compressed=True)

    return CacheReport([layer(index, held) for index, held in enumerate(cache.layers)])


def layer_length(layer: Any) -> int:
    """Tokens that one layer of a cache holds."""
    return layer.cumulative_length if hasattr(layer, "_quantized_keys") else layer.keys.shape[2]


def held_bytes(x: Any) -> int:
    """Bytes of the storages of a tensor, of the tensors that a subclass is made of, or of all in a nest of those. A
    storage counts once."""
    return sum({storage.data_ptr(): storage.nbytes() for storage in _storages(x)}.values())


def _storages(x: Any) -> Iterator[Any]:
    if isinstance(x, Tensor) and hasattr(x, "__tensor_flatten__"):
        for name in x.__tensor_flatten__()[0]:
            yield from _storages(getattr(x, name))
    elif isinstance(x, Tensor):
        yield x.untyped_storage()
    elif isinstance(x, (tuple, list, dict)):
        for part in x.values() if isinstance(x, dict) else x:
            yield from _storages(part)


@contextmanager
def own_masks(model: nn.Module) -> Iterator[None]:
    """Let each layer attend causally from new tokens over what its own cache holds: caches that drop tokens differ in
    length by layer, while transformers makes one mask for all."""

    def mask(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        cache, new = _cache_of(kwargs), kwargs["hidden_states"]
        n, layers = new.shape[1], getattr(cache, "layers", ())
        held = layers[module.layer_idx] if len(layers) > module.layer_idx else None
        past = layer_length(held) if held is not None and held.is_initialized else 0
        own = torch.ones(n, past + n, dtype=torch.bool, device=new.device).tril(past)[None, None] if past else None
        return args, kwargs | {"attention_mask": own}

    with ExitStack() as stack:
        for attention in _attentions(model):
            stack.callback(attention.register_forward_pre_hook(mask, with_kwargs=True).remove)
        yield


def _attentions(model: nn.Module) -> list[nn.Module]:
    return [layer.self_attn for layer in model.model.layers]


def _cache_of(kwargs: dict) -> Any:
    """The cache that an attention module was given; transformers renamed the argument."""
    return kwargs["cache"] if "cache" in kwargs else kwargs["past_key_values"]


@contextmanager
def pressed(model: Any, press: Any) -> Iterator[None]:
    """What `press(model)` does, for transformers that pass neither `cache_position` nor `past_key_values` to attention."""

    def compress(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        first, new = kwargs["position_ids"][0, :1], kwargs["hidden_states"].shape[1]
        given = kwargs | {"past_key_values": _cache_of(kwargs), "cache_position": first + torch.arange(new, device=first.device)}
        return press.forward_hook(module, args, given, output)

    press.post_init_from_model(model)
    with ExitStack() as stack:
        stack.enter_context(own_masks(model))
        for attention in _attentions(model):
            attention.rotary_emb = model.model.rotary_emb
            stack.callback(delattr, attention, "rotary_emb")
            stack.callback(attention.register_forward_hook(compress, with_kwargs=True).remove)
        yield


def _kvpress(name: str) -> ModuleType:
    """kvpress' module of one press. Its package, imported as a whole, replaces transformers' attention functions and needs
    packages that no press here needs: it is entered without its `__init__`.

    Raises:
        ImportError: it is not installed.
    """
    if "kvpress" not in sys.modules:
        spec = find_spec("kvpress")
        if spec is None:
            raise ImportError("it is not installed: pip install --no-deps kvpress")
        package = ModuleType("kvpress")
        package.__spec__, package.__path__ = spec, list(spec.submodule_search_locations)
        sys.modules["kvpress"] = package
    return importlib.import_module(f"kvpress.presses.{name}_press")
