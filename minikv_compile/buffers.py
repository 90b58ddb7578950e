"""Static buffers of a model, or of its cache, whose tokens the backend holds compressed: what stands in their place, and who
fills it.

The compiled graph sees the tensors of a `MiniKVLayer`. The buffer itself stays the object that it was, for the module and
for Dynamo's guards, but becomes a `GivenBack`: the shape of the buffer, and none of its memory.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.library import custom_op
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary
from transformers import Cache

from . import compat, fixed, ops
from .balancer import query_range
from .cache import MiniKVLayer
from .config import MiniKVConfig
from .feedback import query_moments
from .kernels.state import IN_IMPORTANT, IN_TIER, OFFSET, PINNED
from .ops import READS_HOST

aten = torch.ops.aten
SEQ = 2

OPENED = ("order", "lengths", "start")
"""The last tensors that `Buffers.open` gives."""

left_alone = WeakIdKeyDictionary()
"""Buffers of which a site was left alone: what follows there is not compressed either."""

READ = (
    "This static buffer was given back: the minikv backend holds its tokens compressed, and frees its memory. Read it "
    "through the compiled model only; a prompt that starts at position 0 starts over. To run the model without the "
    "backend, set up its buffers anew, or call minikv_compile.buffers.make_dense(model), or (cache)."
)


class GivenBack(Tensor):
    """A buffer `[batch, kv_heads, max_length, head_dim]` without memory. Reading or writing it raises RuntimeError;
    `zero_()` forgets its tokens, and `index_select` gives other rows.

    Attributes:
        layer: who holds the tokens of this buffer and of its twin. role: "key" or "value". seq: the dimension of tokens, 2
            or 1.
    """

    __torch_function__ = compat.disabled_torch_function

    def __new__(
        cls, marker: Tensor, shape: Sequence[int], layer: MiniKVLayer | None = None, role: str = "", seq: int = SEQ
    ):  # fmt: skip
        return compat.wrapper_subclass(cls, shape, marker.dtype, marker.device)

    def __init__(
        self, marker: Tensor, shape: Sequence[int], layer: MiniKVLayer | None = None, role: str = "", seq: int = SEQ
    ):  # fmt: skip
        """`marker`: empty, of the buffer's dtype and device."""
        self.marker, self.layer, self.role, self.seq = marker, layer, role, seq

    def __tensor_flatten__(self):
        return ["marker"], None

    @classmethod
    def __tensor_unflatten__(cls, tensors, context, outer_size, outer_stride):
        return cls(tensors["marker"], outer_size)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (aten.detach.default, aten.alias.default):  # parts of `state_dict()`, and of tracing
            return GivenBack(args[0].marker, args[0].shape, args[0].layer, args[0].role, args[0].seq)
        if func is aten.zero_.default:
            if args[0].layer is not None:
                args[0].layer.reset()
            return args[0]
        if func is aten.index_select.default and args[1] == 0 and args[0].layer is not None:
            return args[0].rows(args[2])
        # An op, so that a graph of whatever backend raises too, when it runs.
        args, kwargs = tree_map_only(
            GivenBack, lambda x: torch.ops.minikv.given_back(x.marker, x.shape), (args, kwargs or {})
        )
        return func(*args, **kwargs)

    def rows(self, index: Tensor) -> GivenBack:
        """Rows of the batch, as beam search orders them: of the keys and then of the values, or the other way round."""
        (role, known, layer), self.layer.taken = self.layer.taken or (self.role, None, None), None
        if role == self.role or not torch.equal(known, index):
            layer = self.layer.selected(index)
            self.layer.taken = self.role, index, layer  # the twin comes next
        return GivenBack(self.marker, (len(index), *self.shape[1:]), layer, self.role, self.seq)

    def __deepcopy__(self, memo):
        layer = memo.get(id(self.layer))
        if layer is None:
            layer = memo[id(self.layer)] = copy.deepcopy(self.layer, memo)
        memo[id(self)] = copied = GivenBack(self.marker, self.shape, layer, self.role, self.seq)
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
    q: Tensor, k: Tensor, v: Tensor, start: Tensor, order: Tensor | None, lengths: Tensor | None, mask: Tensor | None,
    key: list[Tensor], value: list[Tensor], important: Tensor, kept: Tensor, length: Tensor, padding: Tensor, place: int,
    count: int, max_length: int, scale: float, config: str,
) -> Tensor:  # fmt: skip
    """Attention of several tokens, which are stored: a prompt, or a later turn.

    Args:
        start: int64 [] on the CPU: tokens that are there already. order, lengths: of `minikv::align_rows`, for a prompt.
            mask: [batch or 1, 1, n, max_length], what a later turn was to see: checked. Other arguments as of
            `minikv::store_prompt` and `minikv::extend_attention`.

    Returns:
        [batch, heads, n, head_dim].

    Raises:
        ValueError: a mask of a later turn that is not causal and the prompt's padding.
    """
    if int(start):
        limit = None if mask is None else max_length
        return fixed.extend_attention(q, k, v, key, value, length, padding, mask, limit, scale, config)
    settings = MiniKVConfig.from_json(config)
    observed = settings.observed_queries
    out, scores = ops.prefill_attention(q, k, v, order, lengths, scale, observed)
    scores = None if observed is None else scores
    fixed.store_prompt(
        k, v, scores, order, lengths, key, value, important, kept, length, padding, place, count, max_length, config,
        query_range(q, k, order, lengths) if settings.balances else None,
        query_moments(q, k, order, lengths) if settings.feeds_back else None,
    )  # fmt: skip
    return out


@prompt_or_extend.register_fake
def _(
    q, k, v, start, order, lengths, mask, key, value, important, kept, length, padding, place, count, max_length, scale, config
):  # fmt: skip
    return q.new_empty(q.shape)


@custom_op("minikv::seek", mutates_args=("key_state", "value_state", "important", "kept", "length", "padding"))
def seek(
    position: Tensor, key_state: Tensor, value_state: Tensor, important: Tensor, kept: Tensor, length: Tensor,
    padding: Tensor, max_length: int, config: str,
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
    padding.mul_(~again)
    length.copy_(position)


@seek.register_fake
def _(position, key_state, value_state, important, kept, length, padding, max_length, config):
    return None


OUT_OF_PLACE = (
    "A compressed static buffer is written out of place: at the end of its tokens, at position 0, or within the newest "
    "unquantized tokens; and not past its end."
)


@dataclass(frozen=True)
class Pair:
    """The two buffers of one attention site, as arguments of a graph."""

    key: int | None
    """None: both are made for this call."""
    value: int | None
    sizes: tuple[int, ...]
    seq: int
    dtype: torch.dtype
    device: torch.device
    position: Callable[[Sequence[Any]], int | Tensor]
    """Where the new tokens are written: the first position, an int or [], or all of them, [n]."""
    new: Callable[[Sequence[Any]], int]
    on_device: bool
    """Whether the graph itself seeks: one token, whose position the host does not know."""
    prompt_only: bool
    """Whether the attention is among the new tokens only."""
    place: int
    count: int

    def given_back(self, layer: MiniKVLayer, role: str) -> GivenBack:
        """The buffer of keys or values, whose tokens `layer` holds."""
        marker = torch.empty(0, dtype=self.dtype, device=self.device)
        return GivenBack(marker, self.sizes, layer, role, self.seq)


class Buffers:
    """Of one compiled graph: its pairs of static buffers, and what it takes from the model to see them."""

    def __init__(self, config: MiniKVConfig):
        self.config = config
        self.pairs: list[Pair] = []
        self.densified: list[int] = []  # arguments that the graph takes dense
        self._masks: dict[int, tuple[weakref.ref[Tensor], int | None] | None] = {}
        self._counts: set[int] = set()
        self._padding: int | None = None

    def rely_on(self, triangles: Iterable[int], counts: Iterable[int], padding: int | None) -> None:
        """Check from now on that arguments are causal masks (`is_triangle`), and counts the first position that is written;
        and read the prompt's padding off an argument: [batch, keys], or a mask [batch or 1, 1, n, keys]."""
        for argument in triangles:
            self._masks.setdefault(argument, None)
        self._counts |= set(counts)
        self._padding = self._padding if padding is None else padding

    def open(self, args: Sequence[Any]) -> tuple[list[MiniKVLayer], list[Tensor]]:
        """Who holds the tokens of all pairs, brought to the positions that will be written; and their tensors, followed by
        those of `OPENED`: of `ops.align_rows`, if there may be padding, and the first position, int64 [] on the CPU.

        Raises:
            ValueError: a position that no compressed buffer can go to, or a mask that is not causal (any more).
        """
        self._check_masks(args)
        for i in self.densified:
            make_buffer_dense(args[i])
        opened = [self._open(pair, args) for pair in self.pairs]
        layers = [layer for layer, _ in opened]
        moves = [(layer, start, pair.new(args)) for pair, (layer, start) in zip(self.pairs, opened, strict=True)]
        starts = {start for _, start in opened if start is not None} | {int(args[i]) for i in self._counts}
        if len(starts) > 1:
            raise ValueError(f"The static buffers of one model are written at different positions: {sorted(starts)}.")
        for move in moves:  # all or none
            check_move(*move)
        for layer, start, _ in moves:
            move_to(layer, start)
            layer.filled = True
        first = next(iter(starts), 0)
        rows = self._rows(args, moves[0][2], first) if moves and self._padding is not None else [None, None]
        return layers, [*(tensor for layer in layers for tensor in layer.tensors()), *rows, torch.tensor(first)]

    def _rows(self, args: Sequence[Any], n: int, start: int) -> list[Tensor]:
        """`ops.align_rows` of a prompt of `n` tokens; anything of its shapes for a later turn, which has no padding."""
        batch, device = self.pairs[0].sizes[0], args[self._padding].device
        if start or n == 1:
            return [torch.zeros(batch, n, dtype=torch.int64, device=device), torch.zeros(batch, dtype=torch.int64)]
        mask = args[self._padding]
        valid = fixed.padding_of(mask) if mask.dim() == 4 else mask[:, :n].bool()
        return list(ops.align_rows(valid.expand(batch, -1)))

    def _open(self, pair: Pair, args: Sequence[Any]) -> tuple[MiniKVLayer, int | None]:
        """The layer of a pair, and the first position that will be written; None if the graph seeks it."""
        layer, start = None if pair.key is None else layer_of(args[pair.key], args[pair.value]), None
        if layer is None or not pair.on_device:
            start = first_of(pair.position(args), pair.new(args))
        if (pair.prompt_only or pair.key is None) and start:
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
        pair_of_args = () if pair.key is None else (args[pair.key], args[pair.value])
        layer = layer_of(*pair_of_args) if pair_of_args else None
        if layer is not None and layer.config == self.config:
            return layer
        new = layer_for(self.config, pair.sizes, pair.seq, pair.dtype, pair.device, pair.place, pair.count)
        if layer is not None:
            for buffer in pair_of_args:
                buffer.layer = new
        elif pair_of_args:
            if start:
                past = [buffer.transpose(SEQ, pair.seq)[:, :, :start] for buffer in pair_of_args]
                _store_past(new, *past, self._padding_of_past(args, pair.sizes[0], start))
            for buffer, role in zip(pair_of_args, ops.ROLES, strict=True):
                check_owner(buffer)
                compat.become(buffer, pair.given_back(new, role))
        return new

    def _padding_of_past(self, args: Sequence[Any], batch: int, start: int) -> Tensor | None:
        """bool [batch, start]: which tokens that are there are none of padding; None if there is no padding."""
        if self._padding is None:
            return None
        mask = args[self._padding]
        valid = fixed.seen_keys(mask)[0][:, 0] if mask.dim() == 4 else mask.bool()
        valid = valid[:, :start].expand(batch, -1)
        return None if valid.all() else valid

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


def layer_for(
    config: MiniKVConfig, sizes: Sequence[int], seq: int, dtype: torch.dtype, device: torch.device, place: int = 0,
    count: int = 1,
) -> MiniKVLayer:  # fmt: skip
    """An empty layer for what a pair of buffers of these sizes holds."""
    return MiniKVLayer(config, sizes[seq], sizes[0], sizes[3 - seq], sizes[3], dtype, device, place, count)


def _store_past(layer: MiniKVLayer, key: Tensor, value: Tensor, valid: Tensor | None) -> None:
    """Store tokens that the model wrote without the backend. `valid`: bool [batch, tokens], false for padding."""
    rows = (None, None) if valid is None else ops.align_rows(valid)
    try:
        layer.store(key.contiguous(), value.contiguous(), *rows)
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
    if not isinstance(position, Tensor) or not position.dim():
        return int(position)
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
def make_dense(owner: nn.Module | Cache) -> None:
    """Give the static buffers of a model, or of a transformers cache, their memory again, with the tokens as they are now
    (quantized ones as decoded)."""
    for buffer in buffers_of(owner):
        make_buffer_dense(buffer)


def buffers_of(owner: nn.Module | Cache) -> Iterator[Tensor]:
    """The buffers of a model, or the keys and values of a cache."""
    if isinstance(owner, nn.Module):
        yield from owner.buffers()
    else:
        yield from (buffer for layer in owner.layers for buffer in (layer.keys, layer.values))


def make_buffer_dense(buffer: Tensor) -> None:
    """`make_dense` of one buffer."""
    if not isinstance(buffer, GivenBack):
        return
    layer, dense = buffer.layer, torch.zeros(buffer.shape, dtype=buffer.dtype, device=buffer.device)
    if layer.filled:
        held = layer.keys if buffer.role == "key" else layer.values
        dense.transpose(SEQ, buffer.seq)[:, :, : held.shape[SEQ]] = held.dequantize()
    compat.become(buffer, dense)
