"""The idiom of static buffers: `cache[:, :, position] = new`, and attention over the buffer that the model owns.

gpt-fast and its descendants; transformers' `StaticCache`, whose buffers may be made in the graph of the prompt. The write
and the attention of a site become ops of `MiniKVCache`, on storages that the boundary opens for each call
(`buffers.Buffers`): there the positions are known, in the graph they are not. The graph must prove that the tokens are
written (`writes.py`) where the mask takes the queries to be (`sight.py`), and that nobody else looks into the buffers.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.fx import Node

from .. import compat
from ..buffers import GivenBack, Pair, layer_for, left_alone
from ..ops import ROLES
from ..tensor import SEQ
from . import fixed
from .functional import swapped
from .graph import callee, erase_dead, example, is_call, is_getitem, memory, same, shape, size_getter, written
from .sight import Sight, read_sight
from .sites import NotTaken, Site
from .writes import Write, find_buffer, read_write, sizes_of, slice_of

if TYPE_CHECKING:
    from .rewrite import Rewriter

NAME = "static buffer"

minikv = torch.ops.minikv


@dataclass(frozen=True, eq=False)
class Born:
    """An output of the graph: the buffer of keys or values of a pair, which the boundary makes."""

    pair: int
    role: str


def find(site: Site) -> tuple[tuple[Node, int] | None, ...] | None:
    """The static buffers of a site: what its keys and values are slices of, or are written to."""
    found = tuple(find_buffer(node) for node in (site.key, site.value))
    return None if found == (None, None) else found


def plan(
    rewriter: Rewriter, site: Site, found: tuple[tuple[Node, int] | None, ...]
) -> tuple[str, Callable[[int, int], None]]:
    """As `Rewriter._plan`.

    Raises:
        NotTaken: with the reason. The buffers then stay the model's own.
    """
    try:
        return _plan(rewriter, site, found)
    except NotTaken:
        for buffer in found:
            if buffer is not None and isinstance(value := rewriter.value_of(buffer[0]), Tensor):
                left_alone[value] = True
        raise


def _plan(
    rewriter: Rewriter, site: Site, found: tuple[tuple[Node, int] | None, ...]
) -> tuple[str, Callable[[int, int], None]]:
    if None in found or found[0][0] is found[1][0]:
        raise NotTaken("keys and values do not have a static buffer each")
    new = shape(site.query)[SEQ]
    key, value = (read_write(rewriter, buffer, new, seq) for buffer, seq in found)
    if key.position != value.position:
        raise NotTaken("keys and values are written at different positions")
    like = [(sizes_of(write.buffer), write.seq, write.is_born) for write in (key, value)]
    if like[0] != like[1] or key.buffer in rewriter.result.given_back:
        raise NotTaken("its static buffers are of different shapes, or another site's too")
    # Some models attend to a prompt before it goes through the buffer.
    direct = all(_is_new(node, write) for node, write in ((site.key, key), (site.value, value)))
    if direct and key.position.source is None and not same(key.position.start, 0):
        raise NotTaken("new tokens see each other only, and there are others before them")
    for node, write in ((site.key, key), (site.value, value)):
        if not direct:
            _check_read(node, write)
        _check_readers(rewriter, site, write)
        _check_kept(rewriter, site, write)
    sight = read_sight(rewriter, site, key, new, direct)
    for size in (new, key.position.start if key.position.source is None else 0):
        if size_getter(size, rewriter.originals) is None:
            raise NotTaken(f"a size or a position that it uses, {size}, is no input of the graph")
    if same(new, 1):
        if sight.prompt_only:
            raise NotTaken("a prompt of one token, which sees itself only")
        _check_past(rewriter, key)
    if sight.padding is not None and rewriter.result.padding not in (None, sight.padding):
        raise NotTaken("its padding comes from another mask than that of the layers before")
    rewriter.result.padding = sight.padding or rewriter.result.padding
    rewriter.result.given_back |= {key.buffer, value.buffer}
    start = key.position.start
    kind = "decode" if same(new, 1) else "prefill" if key.position.source is not None or same(start, 0) else "extend"
    return kind, partial(_rewrite, rewriter, site, key, value, sight)


def _is_new(operand: Node, write: Write) -> bool:
    """Whether an attention reads the new tokens themselves."""
    if write.seq == SEQ:
        return operand is write.new
    return write.new in (operand, swapped(operand)) or operand is swapped(write.new)


def _check_past(rewriter: Rewriter, write: Write) -> None:
    """Raise if one token is written behind others that are dense, and should not be compressed now."""
    position = write.position
    first = rewriter.value_of(position.source).flatten()[0] if position.source is not None else position.start
    starts = write.is_born or (not isinstance(first, torch.SymInt) and int(first) == 0)
    if starts or isinstance(example(write.buffer), GivenBack):
        return
    if rewriter.value_of(write.buffer) in left_alone:
        raise NotTaken("its static buffers are dense: the prompt was left alone")
    if rewriter.config.observed_queries is not None:
        raise NotTaken(
            "its static buffers are dense: the policy looks at the prompt's attention, and the prompt ran without this backend"
        )


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


# ---- the read


def _check_read(operand: Node, write: Write) -> None:
    """Raise unless what a site attends to is the buffer, or its tokens up to the newest, [batch, kv_heads, seq, head_dim]."""
    node, seq = operand, SEQ
    while node not in write.aliases:
        if seq != write.seq and (inner := swapped(node)) is not None:
            node, seq = inner, write.seq
            continue
        index = slice_of(node, seq) if is_getitem(node) or is_call(node, "narrow") else None
        if not isinstance(index, slice) or index.step not in (None, 1) or example(index.start) not in (None, 0):
            raise NotTaken(f"what it reads of its static buffer is not understood ({callee(operand) or operand.op})")
        node = node.args[0]
    if seq != write.seq:
        raise NotTaken("it reads its static buffer with heads and tokens exchanged")


def _check_readers(rewriter: Rewriter, site: Site, write: Write) -> None:
    """Raise unless this attention is the only one to read the buffer, after the write."""
    readers = {user for alias in write.aliases for user in alias.users} - set(write.nodes)
    if write.is_born:
        readers = {reader for reader in readers if reader.op != "output"}
    order = {node: i for i, node in enumerate(rewriter.graph.nodes)}
    if any(order[reader] < order[write.nodes[-1]] for reader in readers):
        raise NotTaken("its static buffer is read before it is written")
    if not fixed.only_for(site, readers) or set(write.nodes[0].users) - readers - set(write.nodes):
        raise NotTaken("its static buffer is also read elsewhere")


def _check_kept(rewriter: Rewriter, site: Site, write: Write) -> None:
    """Raise if the new tokens are changed in place between the write and the attention, where they will be stored."""
    nodes, new = list(rewriter.graph.nodes), memory([write.new])
    between = nodes[nodes.index(write.nodes[-1]) + 1 : nodes.index(site.node)]
    if any(memory(written(node)) & new for node in between):
        raise NotTaken("its new tokens are changed after they were written")


# ---- the change


def _rewrite(
    rewriter: Rewriter, site: Site, key: Write, value: Write, sight: Sight, place: int, count: int
) -> None:  # fmt: skip
    graph, result, originals = rewriter.graph, rewriter.result, rewriter.originals
    sizes, position, text = sizes_of(key.buffer), key.position, rewriter.config.to_json()
    new, room = shape(site.query)[SEQ], sizes[key.seq]
    one = same(new, 1)
    on_device = one and position.source is not None and is_far(position.source)
    held = _held(rewriter, key)
    checked = sight.checked if sight.checked not in rewriter.checked else None  # one check for all layers
    rewriter.checked |= {checked}
    with graph.inserting_before(site.node):
        k, v = (rewriter._heads_first(write) for write in (key, value))
        if on_device:
            states = held[0][fixed.STATE], held[1][fixed.STATE]
            graph.call_function(minikv.seek.default, (position.index, *states, *held[2:6], room, text))
        if one:
            step = graph.call_function(minikv.update.default, (k, v, *held, room, text))
        else:
            rows = [None, None] if sight.padding is None else [_opened(rewriter, name, site) for name in ("order", "lengths")]
            start = _opened(rewriter, "start", site)
            out = graph.call_function(
                minikv.prompt_or_extend.default,
                (site.query, k, v, start, *rows, checked, *held, place, count, room, site.scale, text),
            )
    if one:
        fixed.decode(rewriter, site, step, checked, place, count)
        graph.erase_node(step)
    else:
        fixed.count_not_finite(rewriter, site, held[:2], stores=True)
        out.meta["example_value"] = example(site.node)
        rewriter.replace(site.node, out)
        erase_dead(graph, [site.node], site.nodes)
    pair = Pair(
        key=None if key.is_born else originals.index(key.buffer),
        value=None if key.is_born else originals.index(value.buffer),
        sizes=sizes, seq=key.seq, dtype=example(key.buffer).dtype, device=example(key.buffer).device,
        position=size_getter(position.start, originals) if position.source is None
        else operator.itemgetter(originals.index(position.source)),
        new=size_getter(new, originals), on_device=on_device, prompt_only=sight.prompt_only, place=place, count=count,
    )  # fmt: skip
    for role, write in zip(ROLES, (key, value), strict=True):
        for node in reversed(write.nodes):
            graph.erase_node(node)
        if write.is_born:
            rewriter._replace_output(write.buffer, Born(len(result.buffers.pairs), role))
            rewriter._detach_output()
            graph.erase_node(write.buffer)
    result.buffers.pairs.append(pair)
    result.buffers.rely_on(
        triangles=map(originals.index, sight.triangles), counts=map(originals.index, sight.counts),
        padding=None if sight.padding is None else originals.index(sight.padding),
    )  # fmt: skip


def is_far(source: Node) -> bool:
    """Whether the host would have to wait to read a tensor."""
    return example(source).is_cuda


def _held(rewriter: Rewriter, write: Write) -> tuple:
    """Placeholders of the tensors of the layer that holds what the buffer did, as ops take them: keys, values, and others."""
    fake = example(write.buffer)
    with compat.fake_mode(fake):
        layer = layer_for(rewriter.config, sizes_of(write.buffer), write.seq, fake.dtype, fake.device)
    nodes = [_input(rewriter, f"minikv_{write.buffer.name}_{i}", tensor) for i, tensor in enumerate(layer.tensors())]
    rewriter.result.held += nodes
    keys, values = len(layer.key), len(layer.value)
    return nodes[:keys], nodes[keys : keys + values], *nodes[keys + values :]


def _opened(rewriter: Rewriter, name: str, site: Site) -> Node:
    """The placeholder of "order", "lengths" or "start": see `Buffers.open`."""
    opened, query = rewriter.result.opened, example(site.query)
    if name not in opened:
        sizes = {"order": (query.shape[0], query.shape[SEQ]), "lengths": query.shape[:1], "start": ()}[name]
        with compat.fake_mode(query):
            value = torch.empty(sizes, dtype=torch.int64, device=query.device if name == "order" else "cpu")
        opened[name] = _input(rewriter, f"minikv_{name}", value)
    return opened[name]


def _input(rewriter: Rewriter, name: str, value: Tensor) -> Node:
    """A placeholder that the boundary fills."""
    with rewriter.graph.inserting_before(rewriter.originals[0]):
        node = rewriter.graph.placeholder(name)
    node.meta["example_value"] = value
    compat.set_constant_source(node)
    return node
