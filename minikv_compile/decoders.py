"""What `minikv bench` decodes with: each a model and a cache, read into by rows, decoding one token of all rows a step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache, QuantizedCache, StaticCache

from . import compat
from .backend import MiniKVBackend
from .cache import MiniKVCache
from .config import MiniKVConfig
from .peers import Peer, pressed
from .plan import held_bytes
from .report import cache_report
from .stepgraph import TRIALS


def captured(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """`step` as a replay of a CUDA graph; `step` itself where there is no GPU. It runs three times."""
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


class Decoder(ABC):
    """A model and a cache for prompts of up to `capacity - room` tokens in `batch` rows."""

    whole = False
    """Whether the prompts of a batch are read together."""
    recaptured = False
    """Whether a captured step holds for one length only."""
    captures = True
    """Whether its step can be captured in a CUDA graph."""
    shared = True
    """Whether prompts of all lengths are read into one cache, which has room for the longest."""
    warm_up = 1
    """Steps after a prompt before any is timed."""

    def __init__(self, model: Any, batch: int):
        self.model, self.batch = model, batch
        self.ids = torch.zeros(batch, 1, dtype=torch.int64, device=model.device)

    def begin(self, length: int) -> None:  # noqa: B027 (not every decoder has to)
        """Forget the tokens; prompts of `length` tokens follow."""

    @abstractmethod
    def prefill(self, row: int, ids: Tensor) -> None:
        """Read the prompt [rows, tokens] of the rows from `row` on."""

    @abstractmethod
    def copy_row(self, source: int, row: int) -> None:
        """Let a row be what another one is, which has been read."""

    def ready(self, last: bool) -> None:  # noqa: B027 (nor this)
        """All rows have been read; `last`: of the last prompts."""

    @abstractmethod
    def step(self) -> None:
        """Decode one token of each row."""

    @abstractmethod
    def bytes(self) -> int:
        """Bytes of the cache's storages."""


class Dense(Decoder):
    """The baseline: the model's own weights, plain PyTorch, no mask, grouped-query SDPA over exactly the tokens there
    are, everything between two attention calls compiled, the whole step in a CUDA graph."""

    recaptured = True

    def __init__(self, model: Any, batch: int, longest: int, options: dict[str, Any] | None, compiled: bool):
        super().__init__(model, batch)
        config = model.config
        shape = (batch, config.num_key_value_heads, longest + 1, model.model.layers[0].self_attn.head_dim)
        make = lambda: torch.empty(shape, dtype=model.dtype, device=model.device)  # noqa: E731
        self.tensors, self.length = [(make(), make()) for _ in model.model.layers], longest
        wrap = (lambda f: torch.compile(f, options=options)) if compiled else lambda f: f
        self.before, self.after, self.last = wrap(before_attention), wrap(after_attention), wrap(last_token)

    def begin(self, length: int) -> None:
        self.length = length

    def prefill(self, row: int, ids: Tensor) -> None:
        cache = _PerLayer(self.tensors, row)
        self.ids[row] = self.model(ids, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)[0]

    def copy_row(self, source: int, row: int) -> None:
        for pair in (*self.tensors, (self.ids,)):
            for x in pair:
                x[row] = x[source]

    def step(self) -> None:
        """The token after the prompt, again and again: each call does all the work of a right step at this length."""
        decoder, eps, length = self.model.model, self.model.config.rms_norm_eps, self.length
        x = F.embedding(self.ids, decoder.embed_tokens.weight)
        cos, sin = decoder.rotary_emb(x, torch.full((1, 1), length, device=x.device))
        for layer, (keys, values) in zip(decoder.layers, self.tensors, strict=True):
            a, mlp = layer.self_attn, layer.mlp
            norms = (a.q_norm.weight, a.k_norm.weight) if hasattr(a, "q_norm") else (None, None)
            q, k, v = self.before(
                x, cos, sin, layer.input_layernorm.weight, a.q_proj.weight, a.k_proj.weight, a.v_proj.weight, *norms,
                a.head_dim, eps,
            )  # fmt: skip
            keys[:, :, length : length + 1], values[:, :, length : length + 1] = k, v
            out = F.scaled_dot_product_attention(
                q, keys[:, :, : length + 1], values[:, :, : length + 1], enable_gqa=True
            )
            x = self.after(
                x, out, a.o_proj.weight, layer.post_attention_layernorm.weight, mlp.gate_proj.weight, mlp.up_proj.weight,
                mlp.down_proj.weight, eps,
            )  # fmt: skip
        self.ids.copy_(self.last(x, decoder.norm.weight, self.model.lm_head.weight, eps))

    def bytes(self) -> int:
        return sum(t.nbytes for pair in self.tensors for t in pair)


class _PerLayer(DynamicCache):
    """Takes a prompt layer by layer into one row of dense tensors: no second copy of the whole cache ever exists."""

    def __init__(self, cache: list[tuple[Tensor, Tensor]], row: int):
        super().__init__()
        self.targets, self.row = cache, row

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        for target, new in zip(self.targets[layer_idx], (key_states, value_states), strict=True):
            target[self.row, :, : new.shape[2]] = new[0]
        return key_states, value_states


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


class Fixed(Decoder):
    """The model as it is, compiled with the minikv backend, on a `MiniKVCache`; the step in a CUDA graph."""

    def __init__(
        self, model: Any, config: MiniKVConfig, batch: int, longest: int, room: int, inner: str,
        options: dict[str, Any] | None,
    ):  # fmt: skip
        super().__init__(model, batch)
        self.cache = MiniKVCache(model, longest + room, batch, config, room)
        self.row = MiniKVCache(model, longest + room, 1, config, room) if batch > 1 else self.cache
        forward = type(model).forward.__get__(model)
        # A prompt is long: nothing is gained there by fusing what is between matrix products.
        self.read = torch.compile(forward, backend=MiniKVBackend(config, "eager"))
        options = {"options": options} if options and inner == "inductor" else {}
        self.decode = torch.compile(forward, backend=MiniKVBackend(config, inner), **options)

    def begin(self, length: int) -> None:
        self.cache.reset()

    def prefill(self, row: int, ids: Tensor) -> None:
        if self.row.layers[0].filled:  # not right after `begin`
            self.row.reset()
        compat.mark_dynamic(ids, 1)
        logits = self.read(ids, past_key_values=self.row, logits_to_keep=1, use_cache=True).logits
        if self.row is not self.cache:
            self.cache.write_rows(row, self.row)
        self.ids[row] = logits.argmax(-1)[0]

    def copy_row(self, source: int, row: int) -> None:
        self.cache.write_rows(row, self.row)  # the row that was read last
        self.ids[row] = self.ids[source]

    def ready(self, last: bool) -> None:
        if last:
            self.row = self.cache

    def step(self) -> None:
        logits = self.decode(self.ids, past_key_values=self.cache, use_cache=True).logits
        self.ids.copy_(logits.argmax(-1))

    def bytes(self) -> int:
        return held_bytes(self.cache)


class Eager(Decoder):
    """transformers alone: SDPA, `DynamicCache`, no compilation."""

    captures = shared = False
    attention = staticmethod(partial(sdpa_kernel, [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]))
    """What a step attends with: anything but cuDNN, torch's own choice on an H200, which makes a plan for each new length: in some
    43 ms, for a layer each where layers differ (`benchmarks/results/peers_8k.json` of commit 5c036b3)."""

    def __init__(self, model: Any, batch: int):
        super().__init__(model, batch)
        self.cache: Any = None
        self.rows: list[Any] = []

    def begin(self, length: int) -> None:
        self.cache, self.rows, self.position = None, [None] * self.batch, length

    def prefill(self, row: int, ids: Tensor) -> None:
        cache = DynamicCache()
        self.ids[row] = self.model(ids, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)[0]
        self.rows[row] = cache

    def copy_row(self, source: int, row: int) -> None:
        self.rows[row], self.ids[row] = self.rows[source], self.ids[source]

    def ready(self, last: bool) -> None:
        self.cache = DynamicCache()
        for i, layers in enumerate(zip(*(c.layers for c in self.rows), strict=True)):
            self.cache.update(*(torch.cat([getattr(x, n) for x in layers]) for n in ("keys", "values")), i)
            for layer in layers:
                layer.keys = layer.values = None
        self.rows = []

    def step(self) -> None:
        places = torch.full((1, 1), self.position, device=self.ids.device)  # a press leaves fewer tokens than there were
        self.position += 1
        with self.attention():
            logits = self.model(self.ids, past_key_values=self.cache, position_ids=places).logits
        self.ids.copy_(logits.argmax(-1))

    def bytes(self) -> int:
        return cache_report(self.cache).bytes


class Pressed(Eager):
    """kvpress: drops tokens at the end of the prompt, in the model's dtype."""

    def __init__(self, model: Any, batch: int, peer: Peer):
        super().__init__(model, batch)
        self.press = peer.press()

    def prefill(self, row: int, ids: Tensor) -> None:
        with pressed(self.model, self.press):
            super().prefill(row, ids)


class Whole(Eager):
    """Reads all rows of a batch together: caches whose rows cannot be put together."""

    whole = True

    @abstractmethod
    def make_cache(self) -> Any:
        """An empty cache of its kind."""

    def prefill(self, row: int, ids: Tensor) -> None:
        self.cache = self.make_cache()
        self.ids.copy_(self.model(ids, past_key_values=self.cache, logits_to_keep=1).logits.argmax(-1))

    def ready(self, last: bool) -> None:
        pass


class Quanto(Whole):
    """transformers' `QuantizedCache` with optimum-quanto's 2 bits (KIVI's, per its documentation), in groups of 64."""

    def make_cache(self) -> Any:
        return QuantizedCache("quanto", self.model.config, nbits=2)

    def bytes(self) -> int:
        names = "_quantized_keys", "_quantized_values", "keys", "values"
        return sum(_bytes_of(getattr(layer, name)) for layer in self.cache.layers for name in names)


class Dynamic(Whole):
    """The model compiled with the minikv backend, on its own `DynamicCache`."""

    warm_up = TRIALS + 2
    """Until it has been captured, and replayed once."""
    attention = staticmethod(nullcontext)

    def __init__(self, model: Any, config: MiniKVConfig, batch: int, inner: str):
        forward = type(model).forward.__get__(model)
        super().__init__(_Forward(model, torch.compile(forward, backend=MiniKVBackend(config, inner))), batch)

    def make_cache(self) -> Any:
        return DynamicCache()

    def prefill(self, row: int, ids: Tensor) -> None:
        compat.mark_dynamic(ids, 1)
        super().prefill(row, ids)


class _Forward:
    """A model with another forward."""

    def __init__(self, model: Any, forward: Callable):
        self.device, self.config, self.forward = model.device, model.config, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, use_cache=True, **kwargs)


class Static(Decoder):
    """transformers' `StaticCache` under torch.compile, the step in a CUDA graph. Prompts are read into dynamic caches: the
    static one would need a mask of a prompt's square."""

    def __init__(self, model: Any, batch: int, longest: int, room: int, inner: str, options: dict[str, Any] | None):
        super().__init__(model, batch)
        self.capacity, options = longest + room, {"options": options} if options and inner == "inductor" else {}
        self.cache = StaticCache(config=model.config, max_cache_len=self.capacity)
        config = model.config
        for layer in self.cache.layers:
            with compat.outside_inference_mode():
                shape = (batch, config.num_key_value_heads, 0, model.model.layers[0].self_attn.head_dim)
                layer.lazy_initialization(*(torch.empty(shape, dtype=model.dtype, device=model.device),) * 2)
        self.tensors = [(layer.keys, layer.values) for layer in self.cache.layers]
        self.decode = torch.compile(type(model).forward.__get__(model), backend=inner, **options)

    def begin(self, length: int) -> None:
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(length)

    def prefill(self, row: int, ids: Tensor) -> None:
        cache = _PerLayer(self.tensors, row)
        self.ids[row] = self.model(ids, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)[0]

    copy_row = Dense.copy_row

    def step(self) -> None:
        logits = self.decode(self.ids, past_key_values=self.cache, use_cache=True).logits
        self.ids.copy_(logits.argmax(-1))

    def bytes(self) -> int:
        return sum(t.nbytes for pair in self.tensors for t in pair)


def _bytes_of(x: Tensor) -> int:
    """Bytes of a tensor, or of the tensors that a subclass is made of."""
    if not hasattr(x, "__tensor_flatten__"):
        return x.untyped_storage().nbytes()
    return sum(_bytes_of(getattr(x, name)) for name in x.__tensor_flatten__()[0])
