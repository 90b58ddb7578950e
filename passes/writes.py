"""How a graph writes new tokens into static buffers, and where: of the idiom in `static.py`."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import reduce
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch import Tensor
from torch.fx import Graph, Node

from .. import compat
from ..buffers import GivenBack, owns_storage
from ..tensor import SEQ, KVTensor
from .functional import swapped
from .graph import (
    CASTS,
    argument,
    example,
    inputs_beside,
    is_call,
    is_getitem,
    is_written,
    memory,
    same,
    shape,
    written,
)
from .masks import VIEWS, Grid, read_value
from .sites import NotTaken

if TYPE_CHECKING:
    from .rewrite import Rewriter

WRITERS = ("index_copy_", "index_put_", "copy_")
MAKERS = ("zeros", "new_zeros", "zeros_like", "empty", "full")

COUNT = sympy.Symbol("count")
"""How many tokens a cache holds, where it counts them on the device. Each layer of a `StaticCache` has a count of its own:
where one stands for another, the boundary compares them."""


@dataclass(frozen=True)
class Position:
    """Where new tokens are written."""

    source: Node | None
    """The placeholder that holds the positions, [n], or the first of them, []; None if they follow from `start`."""
    start: Any
    """The first: a number, or a symbol that stands for it."""
    index: Node | None = field(default=None, compare=False)
    """The positions, [n], where the graph has them as a tensor."""

    @property
    def is_count(self) -> bool:
        """Whether they follow from how many tokens there are, as a tensor that the graph may count up."""
        return self.source is not None and shape(self.source) == ()


@dataclass(frozen=True, eq=False)
class Write:
    """How the keys, or the values, of one site are written."""

    buffer: Node
    """The placeholder; or, of what is made here and returned, the call that makes it."""
    nodes: tuple[Node, ...]
    """The call that writes; before it, the slice that it writes to."""
    new: Node
    position: Position
    seq: int
    """The buffer's dimension of tokens: 2, or 1 where heads come after them."""

    @property
    def aliases(self) -> tuple[Node, ...]:
        """What stands for the buffer after the write: a call like `index_copy_` returns it."""
        return (self.buffer,) if len(self.nodes) > 1 else (self.buffer, *self.nodes)

    @property
    def is_born(self) -> bool:
        """Whether the buffer is made in this graph."""
        return self.buffer.op != "placeholder"


def root(node: Node) -> Node | None:
    """What `node` is a slice or a view of, if it is a static buffer."""
    while is_getitem(node) or is_call(node, *VIEWS, *CASTS, "narrow", "transpose", "permute", "select", *WRITERS):
        node = node.args[0]
    if not isinstance(node, Node) or not isinstance(example(node), Tensor) or isinstance(example(node), KVTensor):
        return None
    is_source = node.op in ("placeholder", "get_attr") or is_call(node, *MAKERS)
    return node if is_source and (isinstance(example(node), GivenBack) or is_written(node)) else None


def find_buffer(operand: Node) -> tuple[Node, int] | None:
    """The static buffer that an attention reads, or that the new tokens it reads are written to; and the buffer's
    dimension of tokens."""
    if (buffer := root(operand)) is not None:
        while is_getitem(operand) or is_call(operand, "narrow"):
            operand = operand.args[0]
        return buffer, SEQ if swapped(operand) is None else 1
    exchanged = [swapped(operand), *(user for user in operand.users if swapped(user) is operand)]
    for new, seq in ((operand, SEQ), *((node, 1) for node in exchanged if node is not None)):
        for write in new.users:
            if is_call(write, "setitem", *WRITERS) and write.args[0] is not new and (buffer := root(write.args[0])) is not None:
                return buffer, seq
    return None


def read_write(rewriter: Rewriter, buffer: Node, new: Any, seq: int) -> Write:
    """The one write into `buffer`, of `new` tokens."""
    if buffer.op == "placeholder":
        _check_owner(buffer)
        _check_buffer(rewriter, buffer)
    elif buffer not in rewriter.kept or not is_call(buffer, "zeros"):
        raise NotTaken("its static buffers are made in this graph, and not kept")
    into = sizes_of(buffer)
    found = [write for user in buffer.users for write in _writes(user)]
    if len(found) != 1:
        raise NotTaken(f"the graph writes {len(found)} times into its static buffer, in a way that is understood")
    *_, call = nodes = found[0]
    index, tokens = _index_and_new(nodes, seq)
    position = _position(index, new)
    sizes = list(shape(tokens)) if isinstance(tokens, Node) else []
    if len(sizes) != 4 or not all(same(a, b) or a == b for a, b in zip(sizes, [*into[:seq], new, *into[seq + 1 :]], strict=True)):
        raise NotTaken(f"the graph writes {sizes} into a static buffer {list(into)}, for {new} queries")
    if example(tokens).dtype != example(buffer).dtype:
        raise NotTaken(f"its new tokens are cast to the static buffer's {example(buffer).dtype}")
    _check_owner(position.source)
    return Write(buffer, tuple(nodes), tokens, position, seq)


def _check_owner(node: Node | None) -> None:
    """Raise if a placeholder belongs to a layer of a cache that will roll, once its window is full."""
    if getattr(compat.owner_of(node), "is_sliding", False):
        raise NotTaken("sliding window attention")


def sizes_of(buffer: Node) -> tuple[int, ...]:
    """The sizes of a buffer, for which the graph is specialised.

    Raises:
        NotTaken: they are not four.
    """
    sizes = shape(buffer)
    if len(sizes) != 4:
        raise NotTaken(f"its static buffer is {list(sizes)}, not [batch, kv_heads, seq, head_dim]")
    return tuple(map(int, sizes))


def _check_buffer(rewriter: Rewriter, buffer: Node) -> None:
    value = rewriter.value_of(buffer)
    if not compat.is_attribute(buffer):
        raise NotTaken("its static buffer is an argument, not a buffer of the model or of an object")
    if value is None or not (isinstance(value, GivenBack) or owns_storage(value)):
        raise NotTaken("its static buffer is a view of another tensor, whose memory cannot be given back")


def _writes(user: Node) -> Iterator[list[Node]]:
    """The write that `user`, who uses a buffer, is or leads to: the slice that is written to, and the call."""
    into = is_call(user, "setitem", "index_copy_", "index_put_") and "out" not in user.kwargs
    if into:
        yield [user]
    elif is_getitem(user) or is_call(user, "narrow"):
        yield from ([user, call] for call in user.users if is_call(call, "copy_") and call.args[0] is user)


def _index_and_new(nodes: list[Node], seq: int) -> tuple[Any, Any]:
    """What a write takes as the index of the dimension of tokens, and the new tokens."""
    call = nodes[-1]
    if is_call(call, "index_copy_"):
        if argument(call, 1, "dim") not in (seq, seq - 4):
            raise NotTaken(f"its static buffer is written along another dimension than {seq}")
        return argument(call, 2, "index"), argument(call, 3, "source")
    if is_call(call, "index_put_"):
        index = tuple(slice(None) if i is None else i for i in argument(call, 1, "indices"))
        if argument(call, 3, "accumulate", False):
            raise NotTaken("its static buffer is added to")
        return _along_seq(index, shape(call.args[0]), seq), argument(call, 2, "values")
    if is_call(call, "setitem"):
        return _along_seq(call.args[1], shape(call.args[0]), seq), call.args[2]
    return slice_of(nodes[0], seq), argument(call, 1, "src")


def slice_of(node: Node, seq: int) -> Any:
    """The index that a slice or `narrow` takes along the dimension of tokens."""
    if is_getitem(node):
        return _along_seq(node.args[1], shape(node.args[0]), seq)
    dim, start, size = (argument(node, i, name) for i, name in enumerate(("dim", "start", "length"), 1))
    if dim not in (seq, seq - 4):
        raise NotTaken(f"its static buffer is sliced along another dimension than {seq}")
    start, size = example(start), example(size)
    return slice(start, start + size)


def _along_seq(index: Any, sizes: tuple, seq: int) -> Any:
    """The part of an index of a tensor of four dimensions that is about its tokens; all else must be whole."""
    parts = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in [part for part in parts if not isinstance(part, Node)]:
        i = next(i for i, part in enumerate(parts) if part is Ellipsis)
        parts[i : i + 1] = [slice(None)] * (5 - len(parts))
    parts += [slice(None)] * (4 - len(parts))
    rest = [(d, part) for d, part in enumerate(parts) if d != seq]
    if len(parts) != 4 or not all(_is_whole(part, sizes[d]) for d, part in rest):
        raise NotTaken(f"its static buffer is indexed in other dimensions than {seq}, or some of its rows only")
    return parts[seq]


def _is_whole(part: Any, size: int) -> bool:
    if not isinstance(part, slice) or part.step not in (None, 1):
        return False
    return example(part.start) in (None, 0) and (part.stop is None or same(example(part.stop), size))


def _position(index: Any, new: Any) -> Position:
    if isinstance(index, slice):
        start, stop = 0 if index.start is None else example(index.start), example(index.stop)
        numbers = all(isinstance(x, (int, torch.SymInt)) for x in (start, stop))
        if index.step not in (None, 1) or not numbers or not (same(stop - start, new) or stop - start == new):
            raise NotTaken("the slice of its static buffer that is written is not understood")
        return Position(None, start)
    if not isinstance(index, Node) or len(shape(index)) != 1:
        raise NotTaken("the positions that are written in its static buffer are not understood")
    size = shape(index)[0]
    if not (same(size, new) or size == new):
        raise NotTaken(f"{size} positions for {new} new tokens")
    source = source_of(index)
    if source is not None:
        return Position(source, sympy.Symbol(f"position of {source.name}"), index)
    counted = counts(index.graph)
    grid = read_value(index, {node: grid for node, (grid, _) in counted.items()})
    if isinstance(grid, Grid) and grid.dim == -1:
        if isinstance(grid.offset, (int, torch.SymInt)):
            return Position(None, grid.offset, index)
        if grid.offset == COUNT and len(sources := counts_in(index, counted)) == 1:
            return Position(*sources, COUNT, index)
    raise NotTaken("where its static buffer is written is computed in the graph")


def source_of(index: Node) -> Node | None:
    """The placeholder of whole numbers that `index` holds, all of them and in their order."""
    count = shape(index)[0]
    while not is_written(index):
        if index.op == "placeholder":
            return index if _is_whole_numbers(index) else None
        keeps = is_call(index, "to", "long", "int", "view", "reshape", "squeeze", "flatten", "contiguous", "getitem")
        inner = index.args[0] if keeps else None
        if inner is None or not shape(inner) or not same(reduce(operator.mul, shape(inner)), count):
            return None
        index = inner
    return None


def _is_whole_numbers(node: Node) -> bool:
    value = example(node)
    return isinstance(value, Tensor) and not (value.is_floating_point() or value.dtype == torch.bool)


def counts(graph: Graph) -> dict[Node, tuple[Grid, Node]]:
    """Sums of a count of tokens, a placeholder [] of whole numbers, and numbers that are known: as long as the graph has
    not counted the new tokens. With that placeholder."""
    found: dict[Node, tuple[Grid, Node]] = {}
    inputs = graph.find_nodes(op="placeholder")
    placeholders = {node: node for node in inputs if shape(node) == () and _is_whole_numbers(node)}
    counted = memory(placeholders)
    near = {*placeholders, *(other for node in placeholders for other in inputs_beside(node))}  # what counts can be changed through
    changed: set[int] = set()
    for node in graph.nodes:
        if near.isdisjoint(node.all_input_nodes):
            continue
        if is_call(node, *CASTS) and node.args[0] in placeholders and _is_whole_numbers(node):
            if not memory(node.args[:1]) & changed:
                placeholders[node] = placeholders[node.args[0]]
        elif is_call(node, "add") and len(node.args) == 2:
            for count, other in (node.args, node.args[::-1]):
                known = placeholders.get(count) if isinstance(count, Node) else None
                grid = read_value(other, {}) if known is not None and not memory([count]) & changed else None
                if isinstance(grid, Grid) and isinstance(grid.offset, int):
                    found[node] = Grid(grid.dim, COUNT + grid.offset), known
        changed |= memory(written(node))
        if memory([node]) & counted or node in placeholders:
            near.add(node)
    return found


def counts_in(node: Node, counted: dict[Node, tuple[Grid, Node]]) -> set[Node]:
    """The counts, of `counts`, that `node` is computed from."""
    pending, seen, found = [node], set(), set()
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in counted:
            found.add(counted[node][1])
        else:
            pending.extend(node.all_input_nodes)
    return found
