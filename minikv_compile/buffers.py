"""Static buffers of a model whose tokens the backend holds compressed: what stands in their place, and who fills it.

The compiled graph sees the tensors of a `MiniKVLayer`. The buffer itself stays the object that it was, for the module and
for Dynamo's guards, but becomes a `GivenBack`: the shape of the buffer, and none of its memory.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.library import custom_op
from torch.utils._pytree import tree_map_only

from . import compat, fixed, ops
from .balancer import query_range
from .cache import MiniKVLayer
from .config import MiniKVConfig
from .kernels.state import IN_IMPORTANT, IN_TIER, OFFSET, PINNED
from .ops import READS_HOST

aten = torch.ops.aten
SEQ = 2

READ = (
    "This static buffer was given back: the minikv backend holds its tokens compressed, and frees its memory. Read it "
    "through the compiled model only; a prompt that starts at position 0 starts over. To run the model without the "
    "backend, set up its buffers anew, or call minikv_compile.buffers.make_dense(model)."
)


class GivenBack(Tensor):
    """A buffer `[batch, kv_heads, max_length, head_dim]` without memory. Reading or writing it raises RuntimeError;
    `zero_()` forgets its tokens.

    Attributes:
        layer: who holds the tokens of this buffer and of its twin. role: "key" or "value".
    """

    __torch_function__ = compat.disabled_torch_function

    def __new__(cls, marker: Tensor, shape: Sequence[int], layer: MiniKVLayer | None = None, role: str = ""):
        return compat.wrapper_subclass(cls, shape, marker.dtype, marker.device)

    def __init__(self, marker: Tensor, shape: Sequence[int], layer: MiniKVLayer | None = None, role: str = ""):
        """`marker`: empty, of the buffer's dtype and device."""
        self.marker, self.layer, self.role = marker, layer, role

    def __tensor_flatten__(self):
        return ["marker"], None

    @classmethod
    def __tensor_unflatten__(cls, tensors, context, outer_size, outer_stride):
        return cls(tensors["marker"], outer_size)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (aten.detach.default, aten.alias.default):  # parts of `state_dict()`, and of tracing
            return GivenBack(args[0].marker, args[0].shape, args[0].layer, args[0].role)
        if func is aten.zero_.default:
            if args[0].layer is not None:
                args[0].layer.reset()
            return args[0]
        # An op, so that a graph of whatever backend raises too, when it runs.
        args, kwargs = tree_map_only(
            GivenBack, lambda x: torch.ops.minikv.given_back(x.marker, x.shape), (args, kwargs or {})
        )
        return func(*args, **kwargs)

    def __deepcopy__(self, memo):
        layer = memo.get(id(self.layer))
        if layer is None:
            layer = memo[id(self.layer)] = copy.deepcopy(self.layer, memo)
        memo[id(self)] = copied = GivenBack(self.marker, self.shape, layer, self.role)
        return copied

    def __reduce_ex__(self, protocol):
        raise RuntimeError(READ)

    def __repr__(self, *, tensor_contents=None) -> str:
        return f"GivenBack({self.role}, shape={list(self.shape)}, dtype={self.dtype}, device={self.device})"


@custom_op("minikv::given_back", mutates_args=())
def given_back(marker: Tensor, shape: Sequence[int]) -> Tensor:
    """The contents of a `GivenBack`, of which there are none.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError(READ)


@given_back.register_fake
def _(marker, shape):
    return marker.new_empty(shape)


@custom_op(
    "minikv::prompt_or_extend", mutates_args=("key", "value", "important", "kept", "length", "padding"), tags=READS_HOST
)  # fmt: skip
def prompt_or_extend(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor, key: list[Tensor], value: list[Tensor],
    important: Tensor, kept: Tensor, length: Tensor, padding: Tensor, place: int, count: int, max_length: int,
    scale: float, config: str,
) -> Tensor:  # fmt: skip
    """Attention of several tokens, which are stored: a prompt, or a later turn.

    Args:
        start: int64 [] on the CPU: tokens that are there already. Other arguments as of `minikv::store_prompt` and
            `minikv::extend_attention`.

    Returns:
        [batch, heads, n, head_dim].
    """
    if int(start):
        return fixed.extend_attention(q, k, v, key, value, length, padding, None, None, scale, config)
    settings = MiniKVConfig.from_json(config)
    observed = settings.observed_queries
    out, scores = ops.prefill_attention(q, k, v, None, None, scale, observed)
    scores = None if observed is None else scores
    fixed.store_prompt(
        k, v, scores, None, None, key, value, important, kept, length, padding, place, count, max_length, config,
        query_range(q, k, None, None) if settings.balances else None,
    )  # fmt: skip
    return out


@prompt_or_extend.register_fake
def _(q, k, v, start, key, value, important, kept, length, padding, place, count, max_length, scale, config):
    return q.new_empty(q.shape)


@custom_op("minikv::seek", mutates_args=("key_state", "value_state", "important", "kept", "length"))
def seek(
    position: Tensor, key_state: Tensor, value_state: Tensor, important: Tensor, kept: Tensor, length: Tensor,
    max_length: int, config: str,
) -> None:  # fmt: skip
    """Bring a layer's length to the position of the one token that comes, without waiting for the device: what `move_to`
    does on the host.

    Args:
        position: whole number of one element, on the device. Others: as of `minikv::store_prompt`.

    Raises:
        ValueError: as `move_to`. On a GPU, an assertion of the device.
    """
    settings = MiniKVConfig.from_json(config)
    position = position.reshape(())
    removed, again = length - position, position == 0
    packed = key_state[:, IN_TIER] + key_state[:, IN_IMPORTANT] > 0
    unquantized = (fixed.used(key_state) - key_state[:, PINNED] * packed).min()
    if settings.drops:  # how many of them belong to the prompt, the device would have to count
        unquantized = torch.zeros_like(unquantized)
    fits = (removed >= 0) & (again | (removed <= unquantized)) & (position < max_length)
    fixed.require(fits, OUT_OF_PLACE)
    for state in (key_state, value_state):
        state[:, OFFSET] += removed.to(state.dtype)
        state.copy_(torch.where(again, fixed.empty_state(settings, state.shape[0], state.device), state))
    first = fixed.first_tokens(settings, max_length, important.device)
    important.copy_(torch.where(again, first, important))
    kept.mul_(~again)
    length.copy_(position)


@seek.register_fake
def _(position, key_state, value_state, important, kept, length, max_length, config):
    return None


OUT_OF_PLACE = (
    "A compressed static buffer is written out of place: at the end of its tokens, at position 0, or within the newest "
    "unquantized tokens; and not past its end."
)


@dataclass(frozen=True)
class Pair:
    """The two buffers of one attention site, as arguments of a graph."""

    key: int
    value: int
    position: Callable[[Sequence[Any]], int | Tensor]
    """Where the new tokens are written: the first position, or all of them, [n]."""
    new: Callable[[Sequence[Any]], int]
    on_device: bool
    """Whether the graph itself seeks: one token, whose position the host does not know."""
    direct: bool
    """Whether the attention is among the new tokens only, so that they must be a prompt."""
    place: int
    count: int


class Buffers:
    """Of one compiled graph: its pairs of static buffers, and the causal masks that it takes from the model."""

    def __init__(self, config: MiniKVConfig):
        self.config = config
        self.pairs: list[Pair] = []
        self.densified: list[int] = []  # arguments that the graph takes dense
        self._masks: dict[int, tuple[weakref.ref[Tensor], int | None] | None] = {}

    def rely_on_mask(self, argument: int) -> None:
        """Check from now on that this argument is a causal mask (`is_triangle`)."""
        self._masks.setdefault(argument, None)

    def open(self, args: Sequence[Any]) -> list[Tensor]:
        """The tensors that hold the tokens of all pairs, brought to the positions that will be written; last, the first
        of these, int64 [] on the CPU.

        Raises:
            ValueError: a position that no compressed buffer can go to, or a mask that is no longer causal.
        """
        self._check_masks(args)
        for i in self.densified:
            make_buffer_dense(args[i])
        opened = [self._open(pair, args) for pair in self.pairs]
        moves = [(layer, start, pair.new(args)) for pair, (layer, start) in zip(self.pairs, opened, strict=True)]
        starts = {start for _, start in opened if start is not None}
        if len(starts) > 1:
            raise ValueError(f"The static buffers of one model are written at different positions: {sorted(starts)}.")
        for move in moves:  # all or none
            check_move(*move)
        for layer, start, _ in moves:
            move_to(layer, start)
            layer.filled = True
        tensors = [tensor for layer, _ in opened for tensor in layer.tensors()]
        return [*tensors, torch.tensor(next(iter(starts), 0))]

    def _open(self, pair: Pair, args: Sequence[Any]) -> tuple[MiniKVLayer, int | None]:
        """The layer of a pair, and the first position that will be written; None if the graph seeks it."""
        layer, start = layer_of(args[pair.key], args[pair.value]), None
        if layer is None or not pair.on_device:
            start = first_of(pair.position(args), pair.new(args))
        if pair.direct and start:
            raise ValueError(
                f"Attention among new tokens only, but they are written to a compressed static buffer at position {start}: "
                "a prompt must start at position 0."
            )
        if layer is None or start == 0:
            layer = self._taken(pair, args, start)
        if layer.config != self.config:
            raise ValueError(
                f"A static buffer was filled under another configuration ({layer.config.differences(self.config)} here). "
                "Use one backend, or start over at position 0."
            )
        return layer, start

    def _taken(self, pair: Pair, args: Sequence[Any], start: int) -> MiniKVLayer:
        """The layer of a pair that is dense, or starts over."""
        key, value = args[pair.key], args[pair.value]
        layer = layer_of(key, value)
        if layer is not None and layer.config == self.config:
            return layer
        batch, heads, size, dim = key.shape
        new = MiniKVLayer(self.config, size, batch, heads, dim, key.dtype, key.device, pair.place, pair.count)
        if layer is None:
            if start:
                _store_past(new, key[:, :, :start], value[:, :, :start])
            for buffer, role in ((key, "key"), (value, "value")):
                check_owner(buffer)
                compat.become(buffer, GivenBack(buffer.new_empty(0), buffer.shape, new, role))
        else:
            key.layer = value.layer = new
        return new

    def _check_masks(self, args: Sequence[Any]) -> None:
        for i, known in self._masks.items():
            version = compat.version_of(args[i])
            if known is not None and known[0]() is args[i] and known[1] == version is not None:
                continue
            if not is_triangle(args[i]):
                raise ValueError(
                    "The model's mask buffer is not causal any more, and its tokens are held compressed: call "
                    "torch.compiler.reset() and start over with new buffers."
                )
            self._masks[i] = weakref.ref(args[i]), version


def _store_past(layer: MiniKVLayer, key: Tensor, value: Tensor) -> None:
    """Store tokens that the model wrote without the backend."""
    try:
        layer.update(key.contiguous(), value.contiguous())
    except ValueError as error:
        raise ValueError(
            f"Static buffers hold {key.shape[SEQ]} tokens that were written without the minikv backend, and its policy "
            "would have to see their attention: run the prompt through the backend too."
        ) from error


def first_of(position: int | Tensor, n: int) -> int:
    """The first of `n` positions.

    Raises:
        ValueError: they are not one after the other.
    """
    if not isinstance(position, Tensor):
        return position
    rows = position.flatten().tolist()
    if rows != list(range(rows[0], rows[0] + n)):
        raise ValueError(f"A compressed static buffer is written at {n} positions that are not one after the other.")
    return rows[0]


def check_move(layer: MiniKVLayer, start: int | None, n: int) -> None:
    """Raise what keeps a layer from going to `start` tokens, and holding `n` more.

    Raises:
        ValueError: there are fewer, some that would be forgotten are quantized, or the new ones do not fit.
    """
    if start is None:
        return
    if start + n > layer.max_cache_len:
        raise ValueError(f"{n} tokens at position {start} do not fit a static buffer of {layer.max_cache_len} tokens.")
    length = int(layer.length)
    if start > length:
        raise ValueError(f"A static buffer of {length} tokens is written at position {start}: tokens are missing between.")
    if start:
        layer.check_crop(start - length)


def move_to(layer: MiniKVLayer, start: int | None) -> None:
    """Bring a layer to `start` tokens, after `check_move`: those behind are forgotten. None: it stays."""
    if start == 0:
        start_over(layer)
    elif start is not None:
        layer.crop(start - int(layer.length))


def start_over(layer: MiniKVLayer) -> None:
    """Forget the tokens, and bring all tensors to what one token after another can follow."""
    layer.reset()
    dense = layer.key[fixed.DENSE]
    nothing = dense.new_zeros(*dense.shape[:2], 1, dense.shape[3])
    layer.update(nothing, nothing)
    layer.crop(-1)


def layer_of(key: Tensor, value: Tensor) -> MiniKVLayer | None:
    """Who holds the tokens of two buffers; None if they are dense.

    Raises:
        ValueError: they belong to different layers.
    """
    layers = [x.layer if isinstance(x, GivenBack) else None for x in (key, value)]
    if layers[0] is layers[1]:
        return layers[0]
    if None not in layers:
        raise ValueError("The static buffers of keys and of values do not belong together: make both anew.")
    for buffer in (key, value):  # one of them had to become dense
        make_buffer_dense(buffer)
    return None


def check_owner(buffer: Tensor) -> None:
    """Raise unless `buffer` is all there is of its storage."""
    if not owns_storage(buffer):
        raise ValueError("A static buffer is a view of another tensor, whose memory cannot be given back: make it anew.")


def owns_storage(x: Tensor) -> bool:
    """Whether `x` is a whole storage, and no view."""
    return type(x) is Tensor and not x._is_view() and x.untyped_storage().nbytes() == x.numel() * x.element_size()


def is_triangle(mask: Tensor) -> bool:
    """Whether a mask `[..., n, m]` (leading sizes of 1) lets query i see the keys up to i, and no other."""
    if mask.dim() < 2 or mask.numel() != mask.shape[-1] * mask.shape[-2]:
        return False
    mask = mask.reshape(mask.shape[-2:])
    if mask.dtype != torch.bool:
        if not (mask.is_floating_point() and ((mask == 0) | (mask <= fixed.VERY_NEGATIVE)).all()):
            return False
        mask = mask == 0
    return torch.equal(mask, torch.ones_like(mask).tril())


def layers_of(model: nn.Module) -> list[MiniKVLayer]:
    """Who holds the tokens of a model's static buffers, in the order of its modules."""
    found = {id(x.layer): x.layer for x in model.buffers() if isinstance(x, GivenBack)}
    return list(found.values())


@torch.no_grad()
def make_dense(model: nn.Module) -> None:
    """Give a model's static buffers their memory again, with the tokens as they are now (quantized ones as decoded)."""
    for buffer in model.buffers():
        make_buffer_dense(buffer)


def make_buffer_dense(buffer: Tensor) -> None:
    """`make_dense` of one buffer."""
    if not isinstance(buffer, GivenBack):
        return
    layer, dense = buffer.layer, torch.zeros(buffer.shape, dtype=buffer.dtype, device=buffer.device)
    if layer.filled:
        held = layer.keys if buffer.role == "key" else layer.values
        dense[:, :, : held.shape[SEQ]] = held.dequantize()
    compat.become(buffer, dense)
