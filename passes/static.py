"""The idiom of static buffers: `cache[:, :, position] = new`, and attention over the buffer that the model owns.

gpt-fast and its descendants. The write and the attention of a site become ops of `MiniKVCache`, on storages that the
boundary opens for each call (`buffers.Buffers`): there the positions are known, in the graph they are not. The graph must
prove that the tokens are written where the mask takes the queries to be, and that nobody else looks into the buffers.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial, reduce
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch import Tensor
from torch.fx import Node

from .. import compat
from ..buffers import GivenBack, Pair, is_triangle, owns_storage
from ..cache import MiniKVLayer
from ..ops import ROLES
from ..tensor import KVTensor
from . import fixed
from .graph import CASTS, argument, callee, erase_dead, example, is_call, is_getitem, same, shape, size_getter
from .masks import (
    VIEWS,
    Additive,
    Grid,
    Predicate,
    is_written,
    memory_of,
    read_mask,
    read_value,
    writes_in_place,
)
from .sites import NotTaken, Site

if TYPE_CHECKING:
    from .rewrite import Rewriter

NAME = "static buffer"
SEQ = 2

minikv = torch.ops.minikv
STATIC_CACHE = "for transformers' StaticCache, pass a MiniKVCache instead"


@dataclass(frozen=True)
class Position:
    """Where new tokens are written."""

    source: Node | None
    """The placeholder that holds the positions; None if they follow from `start`."""
    start: Any
    """The first: a number, or a symbol that stands for it."""


@dataclass(frozen=True, eq=False)
class Write:
    """How the keys, or the values, of one site are written."""

    buffer: Node
    nodes: tuple[Node, ...]
    """The call that writes; before it, the slice that it writes to."""
    new: Node
    position: Position

    @property
    def aliases(self) -> tuple[Node, ...]:
        """What stands for the buffer after the write: a call like `index_copy_` returns it."""
        return (self.buffer,) if len(self.nodes) > 1 else (self.buffer, *self.nodes)


def find(site: Site) -> tuple[Node | None, Node | None] | None:
    """The static buffers of a site: what its keys and values are slices of, or are written to."""
    roots = tuple(_root(node) or _target(node) for node in (site.key, site.value))
    return None if roots == (None, None) else roots


def plan(rewriter: Rewriter, site: Site, roots: tuple[Node | None, Node | None]) -> tuple[str, Callable[[int, int], None]]:
    """As `Rewriter._plan`.

    Raises:
        NotTaken: with the reason. The buffers then stay the model's own.
    """
    if None in roots or roots[0] is roots[1]:
        raise NotTaken("keys and values do not have a static buffer each")
    new = shape(site.query)[SEQ]
    key, value = (_read_write(rewriter, root, new) for root in roots)
    if key.position != value.position:
        raise NotTaken("keys and values are written at different positions")
    if shape(key.buffer) != shape(value.buffer) or key.buffer in rewriter.result.given_back:
        raise NotTaken("its static buffers are of different shapes, or another site's too")
    # Some models attend to a prompt before it goes through the buffer.
    direct = (site.key, site.value) == (key.new, value.new)
    if direct and key.position.source is None and not same(key.position.start, 0):
        raise NotTaken("new tokens see each other only, and there are others before them")
    for node, write in ((site.key, key), (site.value, value)):
        if not direct:
            _check_read(node, write)
        _check_readers(rewriter, site, write)
        _check_kept(rewriter, site, write)
    masks = _check_masks(rewriter, site, key.position, new, direct)
    for size in (new, key.position.start if key.position.source is None else 0):
        if size_getter(size, rewriter.originals) is None:
            raise NotTaken(f"a size or a position that it uses, {size}, is no input of the graph")
    if same(new, 1) and (direct or not _starts(rewriter, key)):
        raise NotTaken("its static buffers are dense: the prompt was left alone, or ran without this backend")
    rewriter.result.given_back |= {key.buffer, value.buffer}
    start = key.position.start
    kind = "decode" if same(new, 1) else "prefill" if key.position.source is not None or same(start, 0) else "extend"
    return kind, partial(_rewrite, rewriter, site, key, value, masks, direct)


def _starts(rewriter: Rewriter, write: Write) -> bool:
    """Whether what is written follows a prompt that was taken, or is the first."""
    position = write.position
    first = rewriter.value_of(position.source).flatten()[0] if position.source is not None else position.start
    return isinstance(example(write.buffer), GivenBack) or (not isinstance(first, torch.SymInt) and int(first) == 0)


def densify_rest(rewriter: Rewriter) -> Iterator[tuple[Node, str]]:
    """Buffers that have been given back, but that a site which was not taken uses, or anything else: the boundary makes
    them dense. With why."""
    for node in rewriter.originals:
        fake = example(node)
        if not isinstance(fake, GivenBack) or not node.users:
            continue
        why = next((site.reason for site in rewriter.result.sites if site.reason), "it is used outside of attention")
        node.meta["example_value"] = fake.marker.new_empty(fake.shape)
        rewriter.result.densified.add(node)
        yield node, why


# ---- the write


def _root(node: Node) -> Node | None:
    """What `node` is a slice or a view of, if it is a static buffer."""
    while is_getitem(node) or is_call(node, *VIEWS, *CASTS, "narrow", "transpose", "permute", "select", *WRITERS):
        node = node.args[0]
    if not isinstance(node, Node) or not isinstance(example(node), Tensor) or isinstance(example(node), KVTensor):
        return None
    is_source = node.op in ("placeholder", "get_attr") or is_call(node, "zeros", "new_zeros", "zeros_like", "empty", "full")
    return node if is_source and (isinstance(example(node), GivenBack) or is_written(node)) else None


def _target(node: Node) -> Node | None:
    """The static buffer that the new tokens `node` are written to."""
    writes = (user for user in node.users if is_call(user, "setitem", *WRITERS) and user.args[0] is not node)
    return next((root for root in (_root(write.args[0]) for write in writes) if root is not None), None)


def _read_write(rewriter: Rewriter, buffer: Node, new: Any) -> Write:
    """The one write into `buffer`, of `new` tokens."""
    if buffer.op != "placeholder":
        raise NotTaken(f"its static buffers are made in this graph ({STATIC_CACHE})")
    _check_buffer(rewriter, buffer)
    found = [write for user in buffer.users for write in _writes(user)]
    if len(found) != 1:
        raise NotTaken(f"the graph writes {len(found)} times into its static buffer, in a way that is understood")
    *_, call = nodes = found[0]
    index, tokens = _index_and_new(nodes)
    position = _position(index, tokens, new)
    sizes, into = shape(tokens) if isinstance(tokens, Node) else (), shape(buffer)
    fits = len(sizes) == 4 and all(same(a, b) for a, b in zip((*sizes[:2], sizes[3]), (*into[:2], into[3]), strict=True))
    if not fits or not (same(sizes[SEQ], new) or sizes[SEQ] == new):
        raise NotTaken(f"the graph writes {list(sizes)} into a static buffer {list(into)}, for {new} queries")
    if example(tokens).dtype != example(buffer).dtype:
        raise NotTaken(f"its new tokens are cast to the static buffer's {example(buffer).dtype}")
    return Write(buffer, tuple(nodes), tokens, position)


def _check_buffer(rewriter: Rewriter, buffer: Node) -> None:
    sizes, value = shape(buffer), rewriter.value_of(buffer)
    if len(sizes) != 4 or not all(isinstance(size, int) for size in sizes):
        raise NotTaken(f"its static buffer is {list(sizes)}, not [batch, kv_heads, seq, head_dim] of fixed sizes")
    if not compat.is_attribute(buffer):
        raise NotTaken("its static buffer is an argument, not a buffer of the model or of an object")
    if value is None or not (isinstance(value, GivenBack) or owns_storage(value)):
        raise NotTaken("its static buffer is a view of another tensor, whose memory cannot be given back")


WRITERS = ("index_copy_", "index_put_", "copy_")


def _writes(user: Node) -> Iterator[list[Node]]:
    """The write that `user`, who uses a buffer, is or leads to: the slice that is written to, and the call."""
    into = is_call(user, "setitem", "index_copy_", "index_put_") and "out" not in user.kwargs
    if into:
        yield [user]
    elif is_getitem(user) or is_call(user, "narrow"):
        yield from ([user, call] for call in user.users if is_call(call, "copy_") and call.args[0] is user)


def _index_and_new(nodes: list[Node]) -> tuple[Any, Any]:
    """What a write takes as the index of dimension 2, and the new tokens."""
    call = nodes[-1]
    if is_call(call, "index_copy_"):
        if argument(call, 1, "dim") not in (SEQ, SEQ - 4):
            raise NotTaken("its static buffer is written along another dimension than 2")
        return argument(call, 2, "index"), argument(call, 3, "source")
    if is_call(call, "index_put_"):
        index = tuple(slice(None) if i is None else i for i in argument(call, 1, "indices"))
        if argument(call, 3, "accumulate", False):
            raise NotTaken("its static buffer is added to")
        return _along_seq(index, shape(call.args[0])), argument(call, 2, "values")
    if is_call(call, "setitem"):
        return _along_seq(call.args[1], shape(call.args[0])), call.args[2]
    return _slice_of(nodes[0]), argument(call, 1, "src")


def _slice_of(node: Node) -> Any:
    """The index that a slice or `narrow` takes along dimension 2."""
    if is_getitem(node):
        return _along_seq(node.args[1], shape(node.args[0]))
    dim, start, size = (argument(node, i, name) for i, name in enumerate(("dim", "start", "length"), 1))
    if dim not in (SEQ, SEQ - 4):
        raise NotTaken("its static buffer is sliced along another dimension than 2")
    start, size = example(start), example(size)
    return slice(start, start + size)


def _along_seq(index: Any, sizes: tuple) -> Any:
    """The part of an index of a [batch, kv_heads, seq, head_dim] tensor that is about `seq`; all else must be whole."""
    parts = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in [part for part in parts if not isinstance(part, Node)]:
        i = next(i for i, part in enumerate(parts) if part is Ellipsis)
        parts[i : i + 1] = [slice(None)] * (5 - len(parts))
    parts += [slice(None)] * (4 - len(parts))
    rest = [(d, part) for d, part in enumerate(parts) if d != SEQ]
    if len(parts) != 4 or not all(_is_whole(part, sizes[d]) for d, part in rest):
        raise NotTaken("its static buffer is indexed in other dimensions than 2, or some of its rows only")
    return parts[SEQ]


def _is_whole(part: Any, size: int) -> bool:
    if not isinstance(part, slice) or part.step not in (None, 1):
        return False
    return example(part.start) in (None, 0) and (part.stop is None or same(example(part.stop), size))


def _position(index: Any, tokens: Any, new: Any) -> Position:
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
    source = _source(index)
    if source is not None:
        return Position(source, sympy.Symbol(f"position of {source.name}"))
    grid = read_value(index, {})
    if isinstance(grid, Grid) and grid.dim == -1 and isinstance(grid.offset, (int, torch.SymInt)):
        return Position(None, grid.offset)
    raise NotTaken(f"where its static buffer is written is computed in the graph ({STATIC_CACHE})")


def _source(index: Node) -> Node | None:
    """The placeholder of whole numbers that `index` holds, all of them and in their order."""
    count = shape(index)[0]
    while not is_written(index):
        if index.op == "placeholder":
            value = example(index)
            whole = isinstance(value, Tensor) and not (value.is_floating_point() or value.dtype == torch.bool)
            return index if whole else None
        keeps = is_call(index, "to", "long", "int", "view", "reshape", "squeeze", "flatten", "contiguous", "getitem")
        inner = index.args[0] if keeps else None
        if inner is None or not shape(inner) or not same(reduce(operator.mul, shape(inner)), count):
            return None
        index = inner
    return None


# ---- the read


def _check_read(operand: Node, write: Write) -> None:
    """Raise unless what a site attends to is the buffer, or its tokens up to the newest."""
    if operand in write.aliases:
        return
    inside = (is_getitem(operand) or is_call(operand, "narrow")) and operand.args[0] in write.aliases
    index = _slice_of(operand) if inside else None
    if not isinstance(index, slice) or index.step not in (None, 1) or example(index.start) not in (None, 0):
        raise NotTaken(f"what it reads of its static buffer is not understood ({callee(operand) or operand.op})")


def _check_readers(rewriter: Rewriter, site: Site, write: Write) -> None:
    """Raise unless this attention is the only one to read the buffer, after the write."""
    readers = {user for alias in write.aliases for user in alias.users} - set(write.nodes)
    order = {node: i for i, node in enumerate(rewriter.graph.nodes)}
    if any(order[reader] < order[write.nodes[-1]] for reader in readers):
        raise NotTaken("its static buffer is read before it is written")
    if not fixed.only_for(site, readers) or set(write.nodes[0].users) - readers - set(write.nodes):
        raise NotTaken("its static buffer is also read elsewhere")


def _check_kept(rewriter: Rewriter, site: Site, write: Write) -> None:
    """Raise if the new tokens are changed in place between the write and the attention, where they will be stored."""
    nodes, memory = list(rewriter.graph.nodes), memory_of(write.new)
    between = nodes[nodes.index(write.nodes[-1]) + 1 : nodes.index(site.node)]
    if any(writes_in_place(node) and memory_of(node.args[0]) is memory for node in between):
        raise NotTaken("its new tokens are changed after they were written")


# ---- the mask


def _check_masks(rewriter: Rewriter, site: Site, position: Position, new: Any, direct: bool) -> list[Node]:
    """Raise unless each query sees the tokens up to its own; with `direct`, the new tokens up to its own.

    Returns:
        placeholders that are relied on to be causal masks.
    """
    keys, start = shape(site.key)[SEQ], 0 if direct else position.start
    # What it reads ends with the newest token.
    exact = direct or (position.source is None and same(keys, start + new))
    if not site.masks:
        if exact and (same(new, 1) or (site.is_causal and same(new, keys))):
            return []
        raise NotTaken("without a mask it sees room that holds no tokens yet, or tokens that come later")
    if site.is_causal:
        raise NotTaken("is_causal together with a mask")
    seeds = {}
    if position.source is not None:
        seeds[position.source] = Grid(None if same(new, 1) else -1, start)
    relied = [] if direct else _triangles(rewriter, position, new, seeds)
    masks = [read_mask(mask.node, new, mask.blocks, seeds) for mask in site.masks]
    if None in masks:
        node = site.masks[masks.index(None)].node
        raise NotTaken(f"its mask is not proved to be causal (built by {callee(node) or node.op})")
    predicate = reduce(operator.and_, masks)
    if predicate.sliding:
        raise NotTaken("sliding window attention")
    if predicate.padding:
        raise NotTaken("padding in static buffers: pass a MiniKVCache instead, if the model takes a transformers cache")
    if not (predicate.causal or (exact and same(new, 1))) or not all(_is(offset, start) for offset in predicate.causal):
        raise NotTaken("its mask is not causal for the positions that are written")
    return relied


def _is(offset: Any, start: Any) -> bool:
    """Whether two offsets are equal. A symbol of a position equals itself only."""
    symbols = [isinstance(x, sympy.Basic) for x in (offset, start)]
    return same(offset, start) if any(symbols) else same(offset, start) or bool(offset == start)


def _triangles(rewriter: Rewriter, position: Position, new: Any, seeds: dict[Node, Any]) -> list[Node]:
    """Add to `seeds` the rows, for the new tokens, of triangular masks that the model keeps as buffers."""
    relied = []
    for node in rewriter.graph.nodes:
        source = node.args[0] if is_getitem(node) or is_call(node, "index_select") else None
        if not isinstance(source, Node) or source.op != "placeholder" or not _are_rows(node, source, position, new):
            continue
        value = rewriter.value_of(source)
        if value is None or is_written(source) or not is_triangle(value):
            continue
        predicate = Predicate(causal=(position.start,))
        seeds[node] = predicate if example(source).dtype == torch.bool else Additive(predicate)
        relied.append(source)
    return relied


def _are_rows(node: Node, source: Node, position: Position, new: Any) -> bool:
    """Whether `node` is `source[..., positions, :]`, with more leading dimensions of size 1 at most."""
    dims = len(shape(source))
    if is_call(node, "index_select"):
        rows = argument(node, 2, "index") if argument(node, 1, "dim") in (-2, dims - 2) else None
    else:
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        parts = [part for part in index if part is not None]
        before, rest = parts[: dims - 2], parts[dims - 2 :]
        whole = all(part == slice(None) for part in before if not isinstance(part, Node))
        if any(isinstance(part, Node) for part in before) or not whole or not 1 <= len(rest) <= 2:
            return False
        if len(rest) == 2 and not (isinstance(rest[1], slice) and example(rest[1].start) in (None, 0) and rest[1].step is None):
            return False
        rows = rest[0]
    sizes = shape(node)
    if len(sizes) < 2 or not same(sizes[-2], new) or not all(same(size, 1) for size in sizes[:-2]):
        return False
    if isinstance(rows, slice):
        start = 0 if rows.start is None else example(rows.start)
        return position.source is None and rows.step is None and same(start, position.start)
    if not isinstance(rows, Node) or len(shape(rows)) != 1:
        return False
    if position.source is not None:
        return _source(rows) is position.source
    grid = read_value(rows, {})
    return isinstance(grid, Grid) and grid.dim == -1 and same(grid.offset, position.start)


# ---- the change


def _rewrite(
    rewriter: Rewriter, site: Site, key: Write, value: Write, masks: list[Node], direct: bool, place: int,
    count: int,
) -> None:  # fmt: skip
    graph, result, originals = rewriter.graph, rewriter.result, rewriter.originals
    new, size, text = shape(site.query)[SEQ], shape(key.buffer)[SEQ], rewriter.config.to_json()
    source, start = key.position.source, key.position.start
    on_device = same(new, 1) and source is not None and is_far(source)
    held = _held(rewriter, key.buffer)
    if same(new, 1):
        with graph.inserting_before(site.node):
            if on_device:
                states = held[0][fixed.STATE], held[1][fixed.STATE]
                graph.call_function(minikv.seek.default, (source, *states, *held[2:5], size, text))
            step = graph.call_function(minikv.update.default, (key.new, value.new, *held, size, text))
        fixed.decode(rewriter, site, step, None, place, count)
        graph.erase_node(step)
    else:
        with graph.inserting_before(site.node):
            out = graph.call_function(
                minikv.prompt_or_extend.default,
                (site.query, key.new, value.new, _start(rewriter, site), *held, place, count, size, site.scale, text),
            )
        result.states += [(role, site.layer, part[fixed.STATE]) for role, part in zip(ROLES, held, strict=False)]
        out.meta["example_value"] = example(site.node)
        site.node.replace_all_uses_with(out)
        erase_dead(graph, [site.node], site.nodes)
    for node in (*reversed(key.nodes), *reversed(value.nodes)):
        graph.erase_node(node)
    position = size_getter(start, originals) if source is None else operator.itemgetter(originals.index(source))
    result.buffers.pairs.append(
        Pair(
            originals.index(key.buffer), originals.index(value.buffer), position, size_getter(new, originals), on_device,
            direct, place, count,
        )
    )  # fmt: skip
    for mask in masks:
        result.buffers.rely_on_mask(originals.index(mask))


def is_far(source: Node) -> bool:
    """Whether the host would have to wait to read a tensor."""
    return example(source).is_cuda


def _held(rewriter: Rewriter, buffer: Node) -> tuple:
    """Placeholders of the tensors of the layer that holds what `buffer` did, as ops take them: keys, values, and others."""
    fake = example(buffer)
    batch, heads, size, dim = fake.shape
    with compat.fake_mode(fake):
        layer = MiniKVLayer(rewriter.config, size, batch, heads, dim, fake.dtype, fake.device)
    nodes = [_input(rewriter, f"{buffer.name}_{i}", tensor) for i, tensor in enumerate(layer.tensors())]
    rewriter.result.held += nodes
    keys, values = len(layer.key), len(layer.value)
    return nodes[:keys], nodes[keys : keys + values], *nodes[keys + values :]


def _start(rewriter: Rewriter, site: Site) -> Node:
    """The placeholder of the first position that is written."""
    if rewriter.result.start is None:
        rewriter.result.start = _input(
            rewriter, "minikv_start", compat.fake_constant(torch.tensor(0), like=example(site.query))
        )
    return rewriter.result.start


def _input(rewriter: Rewriter, name: str, value: Tensor) -> Node:
    """A placeholder that the boundary fills."""
    with rewriter.graph.inserting_before(rewriter.originals[0]):
        node = rewriter.graph.placeholder(name)
    node.meta["example_value"] = value
    compat.set_constant_source(node)
    return node
