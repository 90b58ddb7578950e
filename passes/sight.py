"""What makes sure that the queries of a site see the tokens of static buffers up to their own: of the idiom in `static.py`."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch.fx import Node

from .. import fixed
from ..buffers import is_triangle
from ..tensor import SEQ
from .graph import CASTS, argument, callee, example, is_call, is_getitem, is_written, same, shape
from .masks import Additive, Grid, Predicate, read_mask, read_value
from .sites import NotTaken, Site
from .writes import Position, Write, counts, counts_in, sizes_of, source_of

if TYPE_CHECKING:
    from .rewrite import Rewriter


@dataclass(frozen=True, eq=False)
class Sight:
    """On what it relies that each query sees the tokens up to its own, and no other."""

    prompt_only: bool = False
    """New tokens see each other only, so that they must be the first."""
    triangles: tuple[Node, ...] = ()
    """Placeholders that are causal masks."""
    counts: tuple[Node, ...] = ()
    """Placeholders of counts of tokens, which must be the first position that is written."""
    padding: Node | None = None
    """The placeholder that says which tokens are none: [batch, keys], or a mask [batch or 1, 1, n, keys] from outside."""
    checked: Node | None = None
    """A mask [batch or 1, 1, n, keys] that is compared, when it runs, with the tokens that are there."""


def read_sight(rewriter: Rewriter, site: Site, write: Write, new: Any, direct: bool) -> Sight:
    """How the masks of a site let its queries see the buffer, or, with `direct`, the new tokens.

    Raises:
        NotTaken: with the reason.
    """
    position = write.position
    keys, start = shape(site.key)[SEQ], 0 if direct else position.start
    # What it reads ends with the newest token.
    exact = direct or (position.source is None and same(keys, start + new))
    if not site.masks:
        if exact and (same(new, 1) or (site.is_causal and same(new, keys))):
            return Sight(prompt_only=direct)
        if site.is_causal and position.source is not None:  # which lets the query i see the keys up to i
            return Sight(prompt_only=True)
        raise NotTaken("without a mask it sees room that holds no tokens yet, or tokens that come later")
    if site.is_causal:
        raise NotTaken("is_causal together with a mask")
    plain = _plain_mask(site, write, new, direct)
    if plain is not None and plain.op == "placeholder" and not is_written(plain):
        check_now(rewriter, plain, 0 if direct else position)
        return Sight(direct, padding=plain, checked=None if direct else plain)
    seeds: dict[Node, Any] = {}
    if position.source is not None and not position.is_count:
        seeds[position.source] = Grid(None if same(new, 1) else -1, start)
    counted = counts(rewriter.graph)
    seeds |= {node: grid for node, (grid, _) in counted.items()}
    triangles = [] if direct else _triangles(rewriter, position, new, seeds)
    masks = [read_mask(mask.node, new, mask.blocks, seeds) for mask in site.masks]
    if None in masks:
        node = site.masks[masks.index(None)].node
        raise NotTaken(f"its mask is not proved to be causal (built by {callee(node) or node.op})")
    predicate = reduce(operator.and_, masks)
    if predicate.sliding:
        raise NotTaken("sliding window attention")
    # As if there were no tokens before, which the boundary will see to.
    first = position.source is not None and bool(predicate.causal) and all(same(offset, 0) for offset in predicate.causal)
    causal = all(_is(offset, start) for offset in predicate.causal) and (predicate.causal or (exact and same(new, 1)))
    if not (causal or first):
        raise NotTaken("its mask is not causal for the positions that are written")
    relied = set().union(*(counts_in(mask.node, counted) for mask in site.masks)) if position.is_count else set()
    # Of one token, the host may not know the position; of padding, only the tokens that are there tell.
    at_run_time = bool(predicate.padding) or (position.is_count and same(new, 1))
    if at_run_time and (plain is None or len(predicate.padding) > 1):
        raise NotTaken("its mask cannot be compared with the tokens: it is not one mask [batch, 1, queries, keys] of all keys")
    padding = _tokens_of(predicate.padding[0]) if predicate.padding else None
    checked = plain if at_run_time and not direct else None
    return Sight(direct or not causal, tuple(triangles), tuple(relied), padding, checked)


def _tokens_of(padding: Node) -> Node:
    """The placeholder behind a padding mask: padded itself, to the room of a cache, at most."""
    while is_call(padding, "pad", *CASTS):
        padding = padding.args[0]
    if padding.op != "placeholder":
        raise NotTaken("its padding is computed in the graph")
    return padding


def _plain_mask(site: Site, write: Write, new: Any, direct: bool) -> Node | None:
    """The mask of a site, if it is one alone, [batch or 1, 1, n, keys], of all keys of the buffer; with `direct`, of the new
    ones."""
    mask, batch = site.masks[0].node, shape(site.query)[0]
    keys = new if direct else sizes_of(write.buffer)[write.seq]
    sizes = shape(mask)
    if len(site.masks) > 1 or site.masks[0].blocks or len(sizes) != 4 or not same(shape(site.key)[SEQ], keys):
        return None
    fits = all(same(a, b) for a, b in zip(sizes[1:], (1, new, keys), strict=True))
    return mask if fits and (same(sizes[0], batch) or same(sizes[0], 1)) else None


def check_now(rewriter: Rewriter, mask: Node, position: Position | int | None = None) -> None:
    """Raise unless a mask from outside is causal for the call that the graph is captured from: later ones are checked.
    `position`: of its first query; None if the queries are the last of its keys."""
    value = rewriter.value_of(mask)
    if position is None:
        position = value.shape[3] - value.shape[2]
    if isinstance(position, Position):
        source = position.source
        position = position.start if source is None else int(rewriter.value_of(source).flatten()[0])
    if isinstance(position, int) and not fixed.is_causal(value, position):
        raise NotTaken("its mask, from outside of the graph, is not causal")


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
        return source_of(rows) is position.source
    grid = read_value(rows, {})
    return isinstance(grid, Grid) and grid.dim == -1 and same(grid.offset, position.start)
