"""`KVTensor`: the compressed keys or values of one layer, in the slot where the model keeps the dense ones."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from . import compat, ops
from .config import MiniKVConfig
from .finite import report_not_finite
from .kernels.attend import append
from .kernels.packing import BLOCK
from .occupancy import Occupancy, read_states
from .ops import dense_capacity
from .packed import DenseOnUse, PackedInt
from .tiers import grouping, tier_names

aten = torch.ops.aten
SEQ = 2  # dimension of tokens, and of blocks

FORMAT = 5
"""Version of the tensors and of what they mean, in files that hold a cache."""


class KVTensor(DenseOnUse):
    """Keys or values, logically `[batch, kv_heads, length, head_dim]`, held compressed; `SeqFirst` is the other order.

    Tensors:
        codes, scale, zero: the tier (`.tier`, a `PackedInt`), balanced and rotated; absent at 16 bits. Row b's first
            `state[b, IN_TIER]` tokens are valid.
        important_codes, important_scale, important_zero: the important tier (`.important_tier`), of `config.important_bits`:
            `state[b, IN_IMPORTANT]` tokens; absent if those are 16.
        balancer: fp32 `[batch, kv_heads, head_dim]`: by what the tiers' keys were multiplied; absent if by nothing.
        dense: `[batch, kv_heads, capacity, head_dim]`: sinks, important tokens of 16 bits, window and buffer, neither balanced
            nor rotated. Row b's first `length - state[b, OFFSET]` tokens are valid.
        state: int32 `[batch, COLUMNS]`: see `kernels.state`.
        important: int32 `[batch, kv_heads, most]`, ascending, then NO_TOKEN: which of the prompt's stored tokens lie behind
            the sinks, or in the important tier; absent if none can.
        kept: uint8 `[batch, kv_heads, ceil(prompt / 8)]`, one bit per prompt token; absent if none was dropped and
            none was padding.
    Attributes:
        config: `MiniKVConfig`. role: "key" or "value".

    `torch.cat([kv, new], kv.seq)` appends in place to the same storage and returns a longer tensor. Tensors that share a
    storage see their own length of it; a write that another living one would see copies first. `clone`, `to`, indexing
    and `repeat_interleave` along the batch keep the type; any other op runs on `dequantize()`.
    """

    tensor_data_names = ["dense", "state"]
    optional_tensor_data_names = [
        "codes", "scale", "zero", "important_codes", "important_scale", "important_zero", "balancer", "important", "kept",
    ]  # fmt: skip
    tensor_attribute_names = ["config", "role"]
    seq = SEQ
    """The dimension of tokens."""

    def __new__(cls, tensors, config, role, length, occupancy=None):
        batch, heads, _, dim = tensors["dense"].shape
        dense = tensors["dense"]
        shape = (batch, heads, length, dim) if cls.seq == SEQ else (batch, length, heads, dim)
        return compat.wrapper_subclass(cls, shape, dense.dtype, dense.device)

    def __init__(
        self, tensors: dict[str, Tensor], config: MiniKVConfig, role: str, length: int,
        occupancy: Occupancy | None = None,
    ):  # fmt: skip
        """`occupancy` None: the storage is this tensor's own; its bounds are read from the state when first needed."""
        super().__init__()
        names = self.tensor_data_names + self.optional_tensor_data_names
        for name in names:
            setattr(self, name, tensors.get(name))
        self._names = [name for name in names if tensors.get(name) is not None]
        self.config, self.role = config, role
        self._context: dict[str, Any] | None = None
        self._occupancy = occupancy
        if occupancy is not None:
            occupancy.add(self)

    # ---- what torch.compile and torch.save see

    def tensors(self) -> dict[str, Tensor]:
        """The tensors held, by name."""
        held = self.__dict__
        return {name: held[name] for name in self._names}

    def __tensor_flatten__(self):
        return list(self._names), self.context

    @classmethod
    def __tensor_unflatten__(cls, tensors, context, outer_size, outer_stride):
        kv = cls(tensors, context["config"], context["role"], outer_size[cls.seq])
        kv._context = context
        return kv

    @property
    def context(self) -> dict[str, Any]:
        """What Dynamo guards on, beside shape, dtype and device: constants that say all that a graph assumes of the tensors held,
        if they are regular: strides as of a new tensor, elements that 32 bits can count, and no growing size that it would take for
        a constant."""
        if self._context is None:
            tensors = self.tensors()
            regular = all(
                x.stride() == x.new_empty(x.shape, device="meta").stride() and x.numel() <= compat.INT32 for x in tensors.values()
            ) and all(tensors[name].shape[SEQ] >= ops.MIN_BLOCKS for name in self._growing)
            names = tuple(self._names)
            self._context = {"config": self.config, "role": self.role, "names": names, "regular": regular}
        return self._context

    def sizes_inside(self) -> tuple[list[Any], list[Any], list[Any]]:
        """Sizes of the tensors held: those that grow, those that are the batch, and all others."""
        held, growing = self.tensors(), {(name, SEQ) for name in self._growing}
        others = [size for name, x in held.items() for dim, size in enumerate(x.shape) if dim and (name, dim) not in growing]
        return [held[name].shape[dim] for name, dim in growing], [x.shape[0] for x in held.values()], others

    def hide(self) -> None:
        """Show Dynamo, whose fake tensor this is, none of the tensors held any more, only the outer sizes and the context."""
        self._names = []

    def __reduce_ex__(self, protocol):
        kv = self.clone() if self.occupancy.shared else self  # who loads it would not know of a storage with two owners
        return _rebuild, (kv.tensors(), self.config.to_json(), self.role, self.length, FORMAT, self.seq)

    def __copy__(self):
        with compat.outside_inference_mode():
            return self._of_length(self.length)

    def __deepcopy__(self, memo):
        memo[id(self)] = copied = self.clone()
        return copied

    def _with(self, tensors: dict[str, Tensor], occupancy: Occupancy | None = None) -> KVTensor:
        return type(self)(tensors, self.config, self.role, self.length, occupancy)

    def _of_length(self, length: int) -> KVTensor:
        """This tensor with so many tokens, in the same storage. Each step makes one of each: what is known is copied, marks too."""
        if not compat.is_marked(self):
            self.mark_dynamic()
        self.occupancy.add(kv := type(self).__new__(type(self), self.__dict__, self.config, self.role, length))
        kv.__dict__.update(self.__dict__)
        return kv

    def _apply_fn_to_data(self, fn) -> KVTensor:
        """A tensor with a storage of its own: `fn` of every tensor held."""
        own = self._occupancy and self._occupancy.copy()
        return self._with({name: fn(t) for name, t in self.tensors().items()}, own)

    def mark_dynamic(self) -> KVTensor:
        """Tell Dynamo which sizes change from call to call, so that none is specialised."""
        compat.mark_dynamic(self, self.seq)
        for name in self._growing:
            compat.mark_dynamic(getattr(self, name), SEQ)
        return self

    @property
    def _growing(self) -> list[str]:
        """Names of the tensors whose size at `SEQ` changes from call to call, or from prompt to prompt."""
        fixed = {"state", "balancer"} if self.config.counts_vary else {"state", "balancer", "important"}
        return [name for name in self._names if name not in fixed]

    # ---- what is stored

    @property
    def length(self) -> int:
        """Logical tokens."""
        return self.shape[self.seq]

    @property
    def occupancy(self) -> Occupancy:
        if self._occupancy is None:
            self._occupancy = Occupancy.read(self.state.tolist())
            self._occupancy.add(self)
        return self._occupancy

    @property
    def tier(self) -> PackedInt | None:
        """The quantized tokens, balanced and rotated as stored; None at 16 bits."""
        return None if self.codes is None else self._packed(self.codes, self.scale, self.zero, self.config.bits)

    @property
    def important_tier(self) -> PackedInt | None:
        """The same of the important ones; None where they are not quantized."""
        if self.important_codes is None:
            return None
        return self._packed(self.important_codes, self.important_scale, self.important_zero, self.config.important_bits)

    def _packed(self, codes: Tensor, scale: Tensor, zero: Tensor, bits: int) -> PackedInt:
        group, axis = grouping(self.config, self.role, self.shape[-1])
        return PackedInt(codes, scale, zero, bits, group, axis, self.role, self.dtype)

    @property
    def packed(self) -> list[Tensor]:
        """The tensors of `ops.tier_names`."""
        return [getattr(self, name) for name in tier_names(self.config, self.role)]

    @property
    def nbytes_held(self) -> int:
        """Bytes of the real storages: codes, metadata, dense region, counters and bit mask."""
        return sum(t.untyped_storage().nbytes() for t in self.tensors().values())

    def kept_mask(self) -> Tensor:
        """bool [batch, kv_heads, length]: which logical tokens are stored. The others were padding or dropped."""
        if self.kept is None:
            return torch.ones(*self.dense.shape[:2], self.length, dtype=torch.bool, device=self.device)
        return ops.kept_mask(self.kept, self.state, self.length)

    def dequantize(self) -> Tensor:
        """The dense tensor; zeros for what is not stored."""
        dense = torch.ops.minikv.dequantize(
            self.packed, self.dense, self.state, self.important, self.kept, self.length, self.role, self.config.to_json()
        )
        return dense.transpose(SEQ, self.seq)

    def as_operand(self, func) -> Tensor:
        if compat.is_fake(self.dense):
            return self.dense.new_empty(self.shape)
        if self.config.drops and self.kept is not None:
            raise RuntimeError(
                f"{func} on a compressed cache that has dropped tokens would take them for zeros. Run the model that "
                "made the cache through the minikv backend, or call .dequantize() if zeros are what you want."
            )
        return self.dequantize()

    def __repr__(self, *, tensor_contents=None) -> str:
        held = "?" if compat.is_fake(self.dense) else f"{self.nbytes_held:,} bytes"
        return (
            f"KVTensor({self.role}, shape={list(self.shape)}, dtype={self.dtype}, device={self.device}, "
            f"bits={self.config.bits}, {held})"
        )

    # ---- growth

    def reserve(self, n: int) -> KVTensor:
        """`make_room` in this tensor alone."""
        return make_room([self], [n])[0]

    def _fits(self, n: int) -> bool:
        """Whether `n` more tokens can be written as it is."""
        known = self.occupancy
        if known.full is None:
            known.full = -1 if known.oversized else self._room() - max(known.behind_pinned(0))
        return self.length + n <= known.full and not known.shared

    def _room(self) -> int:
        """Tokens that the dense region may hold behind the pinned ones. Where rows differ in these, not all that there is
        space for: a row flushes when it would alone."""
        alike = not self.config.counts_vary or self.occupancy.oversized
        return self.occupancy.room(self.dense.shape[SEQ]) if alike else self.config.room

    def _blocks_to_flush(self, n: int, room: int) -> list[int]:
        """Of each row, for a tier that has grown for them: blocks of what is older than the window, in rows whose dense region
        could not hold `n` more in `room` tokens behind the pinned ones. Each row flushes at the same length as it would alone."""
        if self.config.bits == 16:
            return [0]
        used = self.occupancy.behind_pinned(self.length)
        blocks = [ops.blocks_to_flush(tokens, n, room, self.config) for tokens in used]
        needed = max(known + new for known, new in zip(self.occupancy.blocks, blocks, strict=True))
        for name in ("codes", "scale", "zero"):
            if needed > getattr(self, name).shape[SEQ]:
                self._resize(name, needed + needed // 64)
        return blocks

    def _resize(self, name: str, size: int) -> None:
        setattr(self, name, _resized(getattr(self, name), size))
        self._context = None

    def _count_flushed(self, blocks: list[int]) -> None:
        """Know of a flush that has been launched."""
        known = self.occupancy
        known.offsets = [offset + new * BLOCK for offset, new in zip(known.offsets, blocks, strict=True)]
        known.blocks = [before + new for before, new in zip(known.blocks, blocks, strict=True)]
        known.full = None

    def _kind(self) -> tuple:
        """What tensors that are flushed together have alike."""
        return self.config, self.dense.dtype, self.dense.device, self.dense.shape

    def _resize_dense(self, n: int) -> None:
        """Fit the dense region to its tokens and `n` more."""
        pinned = max(self.occupancy.pinned)
        used = pinned + max(self.occupancy.behind_pinned(self.length + n))
        capacity = dense_capacity(self.config, used, pinned)
        self.occupancy.oversized = self.config.bits < 16 and capacity > dense_capacity(self.config, 0, pinned)
        if capacity != self.dense.shape[SEQ]:
            self._resize("dense", capacity)
        self.occupancy.full = None

    def longer(self, n: int) -> KVTensor:
        """This tensor after `n` tokens were written behind its last, in the same storage."""
        return self._of_length(self.length + n)

    def append(self, new: Tensor) -> KVTensor:
        """`torch.cat([self, new], self.seq)`."""
        self.check_new(new)
        n = new.shape[self.seq]
        length = self.length + n
        if compat.is_fake(self.dense):
            kv = type(self)(self.tensors(), self.config, self.role, length)
            kv._context = self._context
            return kv
        kv = self.reserve(n)
        with compat.outside_inference_mode():
            append(kv.dense, new.transpose(SEQ, self.seq), kv.state, length)
        return kv.longer(n)

    def check_new(self, new: Tensor) -> None:
        """Raise ValueError unless `new` can follow these tokens."""
        mine, theirs = ([size for d, size in enumerate(x.shape) if d != self.seq] for x in (self, new))
        if mine != theirs:
            order = "kv_heads, seq" if self.seq == SEQ else "seq, kv_heads"
            raise ValueError(
                f"New {self.role}s {list(new.shape)} do not fit the compressed cache {list(self.shape)} (batch, "
                f"{order}, head_dim): use a cache for the batch it was made with, or select its rows first."
            )
        if new.dtype != self.dtype or new.device != self.device:
            raise ValueError(
                f"New {self.role}s are {new.dtype} on {new.device}, the compressed cache is {self.dtype} on "
                f"{self.device}: move the cache with .to(...) or start a new one."
            )

    def share_memory_(self):
        """Not possible: its storages are several.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("A compressed cache cannot be moved to shared memory: share the tensors in .tensors().")

    def __getitem__(self, index):
        result = super().__getitem__(index)
        if not isinstance(result, KVTensor) or compat.is_fake(self.dense):
            return result
        # Without autograd's note that it is a view, which Dynamo cannot trace.
        with compat.outside_inference_mode():
            return type(self)(result.tensors(), self.config, self.role, result.length, result.occupancy).mark_dynamic()

    def repeat_interleave(self, repeats, dim=None, *, output_size=None):
        """Rows of the batch keep the type; anything else is dense."""
        if dim not in (0, -4) or not isinstance(repeats, int):
            return self.as_operand("repeat_interleave").repeat_interleave(repeats, dim, output_size=output_size)
        rows = torch.arange(self.shape[0], device=self.device).repeat_interleave(repeats)
        return self.index_select(0, rows)

    def crop(self, length: int) -> KVTensor:
        """The first `length` tokens, in the same storage: a rollback, exact while no quantized token is given up.

        Raises:
            ValueError: the rollback reaches further back than the unquantized window.
        """
        removed, known = self.length - length, self.occupancy
        # The dense region holds the newest tokens behind the pinned ones, or all of a row without a tier.
        dense = min(
            self.length - offset - (pinned if blocks or important else 0)
            for offset, blocks, pinned, important in zip(*known.rows, strict=True)
        )
        if removed > dense:
            raise ValueError(
                f"Cannot roll back {removed} tokens of a compressed cache: only the newest {dense} are unquantized. Raise "
                "MiniKVConfig.window, keep a deepcopy of the cache from before, or slice `.dequantize()` to read them."
            )
        if self.kept is not None and not self.kept_mask()[..., length:].all():
            raise ValueError(f"Cannot roll back {removed} tokens: some of them are padding or dropped prompt tokens.")
        with compat.outside_inference_mode():
            return self._of_length(length)


def make_room(tensors: list[KVTensor], counts: list[int]) -> list[KVTensor]:
    """Tensors with the same contents and room for so many more tokens each in their dense regions: these, where they can be.

    Flushes whole blocks into the tiers, of all tensors at once, grows tiers or dense regions in steps, and copies a storage
    first if another living tensor looks into it.
    """
    result, full, flushed = list(tensors), [], defaultdict(list)
    with compat.outside_inference_mode():
        for i, (kv, n) in enumerate(zip(tensors, counts, strict=True)):
            if kv._fits(n):
                continue
            result[i] = kv = kv.clone() if kv.occupancy.shared else kv
            room = kv.config.room if kv.occupancy.oversized else kv._room()
            if kv.occupancy.oversized or max(kv.occupancy.behind_pinned(kv.length + n)) > room:
                full.append((kv, n, room))
                if any(blocks := kv._blocks_to_flush(n, room)):
                    flushed[kv._kind(), kv.length, n, room, max(blocks)].append((kv, blocks))
        for (_, *bounds), alike in flushed.items():
            _flush([kv for kv, _ in alike], *bounds)
            for kv, blocks in alike:
                kv._count_flushed(blocks)
        for kv, n, room in full:
            if kv.occupancy.oversized or max(kv.occupancy.behind_pinned(kv.length + n)) > room:
                kv._resize_dense(n)
    return result


def _flush(alike: list[KVTensor], *bounds: int) -> None:
    """`ops.flush` of keys and values of one kind."""
    parts = [
        [
            (kv.codes, kv.scale, kv.zero, kv.dense, kv.state, kv.dense if kv.balancer is None else kv.balancer)
            for kv in alike if kv.role == role
        ]
        for role in ops.ROLES
    ]  # fmt: skip
    ops.flush(*parts, *bounds, alike[0].config)


def wrap_prompt(
    parts: list[tuple[dict[str, Tensor], str, int, int]], config: MiniKVConfig, seqs: list[int] | None = None
) -> list[KVTensor]:
    """`KVTensor`s of what `ops.compress_prompt` made: (tensors, role, length, layer) each. Reads the device
    once. `seqs`: their dimensions of tokens."""
    states = read_states([tensors["state"] for tensors, *_ in parts])
    wrapped = [
        BY_SEQ[seq](tensors, config, role, length, Occupancy.read(state)).mark_dynamic()
        for (tensors, role, length, _), state, seq in zip(parts, states, seqs or [SEQ] * len(parts), strict=True)
    ]
    report_not_finite(wrapped, [layer for *_, layer in parts], states, prompt=True)
    if wrapped and wrapped[0].dense.is_cuda:
        compile_flush(wrapped)
    return wrapped


_compiled: set[tuple] = set()
"""Of what a flush has been launched."""


def compile_flush(tensors: list[KVTensor]) -> None:
    """Flush no block, where nothing like these tensors has been flushed: Triton compiles for seconds then, for which no step of
    theirs has to wait."""
    kinds = defaultdict(list)
    for kv in tensors:
        if kv.config.bits < 16:
            kinds[kv._kind()].append(kv)
    for (config, dtype, device, shape), alike in kinds.items():
        like = config, dtype, device, shape[:SEQ], shape[SEQ + 1 :]
        if like not in _compiled:
            with compat.outside_inference_mode():
                _flush(alike, alike[0].length, 0, config.room, 0)
            _compiled.add(like)


def _resized(x: Tensor, size: int) -> Tensor:
    """`x` with `size` entries along `SEQ`: one tensor at a time, so that no two copies of a cache ever exist."""
    new = x.new_empty(*x.shape[:SEQ], size, *x.shape[SEQ + 1 :])
    shared = min(size, x.shape[SEQ])
    new[:, :, :shared] = x[:, :, :shared]
    compat.mark_dynamic(new, SEQ)
    return new


def _rebuild(tensors: dict[str, Tensor], config: str, role: str, length: int, version: int, seq: int = SEQ) -> KVTensor:
    if version != FORMAT:
        raise ValueError(f"A compressed cache saved in format {version}: this version of minikv_compile reads {FORMAT}.")
    with compat.outside_inference_mode():  # where it was loaded must not matter to steps, which write into it
        own = {name: x.clone() if x.is_inference() else x for name, x in tensors.items()}
        return BY_SEQ[seq](own, MiniKVConfig.from_json(config), role, length).mark_dynamic()


torch.serialization.add_safe_globals([_rebuild])


# ---- rules of __torch_dispatch__; NotImplemented falls back to dequantize()


def _batch_rule(func, kv: KVTensor, *args) -> KVTensor:
    """Apply `func(tensor, *args)`, which selects or repeats rows, to every tensor held."""
    tensors = {name: func(t, *args) for name, t in kv.tensors().items()}
    known, batch, occupancy = kv.occupancy, tensors["state"].shape[0], None
    if all(len(set(of_rows)) == 1 for of_rows in known.rows):
        occupancy = Occupancy(*(of_rows[:1] * batch for of_rows in known.rows))
        occupancy.oversized, occupancy.not_finite = known.oversized, [max(known.not_finite)] * batch
    return type(kv)(tensors, kv.config, kv.role, kv.length, occupancy).mark_dynamic()


@KVTensor.implements(aten.cat.default)
def _(func, types, args, kwargs):
    tensors, dim = args[0], args[1] if len(args) > 1 else 0
    # `DynamicCache` starts by appending to an empty tensor.
    first, *rest = [t for t in tensors if isinstance(t, KVTensor) or t.numel()]
    if not isinstance(first, KVTensor) or dim % 4 != first.seq or any(isinstance(t, KVTensor) for t in rest):
        return NotImplemented
    for new in rest:
        first = first.append(new)
    return first


@KVTensor.implements([aten.detach.default, aten.alias.default])
def _(func, types, args, kwargs):
    kv = args[0]
    shared = None if compat.is_fake(kv.dense) else kv.occupancy
    return type(kv)(kv.tensors(), kv.config, kv.role, kv.length, shared)


@KVTensor.implements(aten.clone.default)
def _(func, types, args, kwargs):
    return args[0]._apply_fn_to_data(torch.clone).mark_dynamic()


@KVTensor.implements(aten._to_copy.default)
def _(func, types, args, kwargs):
    kv, dtype, device = args[0], kwargs.get("dtype"), kwargs.get("device")
    if dtype not in (None, kv.dtype):
        return NotImplemented
    return kv._apply_fn_to_data(lambda t: t.to(device, copy=True)).mark_dynamic()


@KVTensor.implements(aten.index_select.default)
def _(func, types, args, kwargs):
    kv, dim, index = args
    return _batch_rule(func, kv, 0, index) if dim == 0 else NotImplemented


@KVTensor.implements(aten.index.Tensor)
def _(func, types, args, kwargs):
    kv, (rows, *others) = args
    of_rows = rows is not None and rows.dim() == 1 and not any(index is not None for index in others)
    return _batch_rule(func, kv, [rows]) if of_rows else NotImplemented


@KVTensor.implements(aten.slice.Tensor)
def _(func, types, args, kwargs):
    kv, dim, start, end, step = (*args, *(0, None, None, 1)[len(args) - 1 :])
    size = kv.shape[dim]
    if compat.is_fake(kv.dense) or step != 1:
        return NotImplemented
    start, end, _ = slice(start, end).indices(size)
    if (start, end) == (0, size):
        return aten.alias.default(kv)
    if dim == 0:
        return _batch_rule(lambda t: t[start:end].clone(), kv)
    return kv.crop(end) if dim == kv.seq and start == 0 else NotImplemented


class SeqFirst(KVTensor):
    """A `KVTensor` of logical shape `[batch, length, kv_heads, head_dim]`."""

    seq = 1


BY_SEQ = {kind.seq: kind for kind in (KVTensor, SeqFirst)}
