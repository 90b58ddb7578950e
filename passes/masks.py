"""What an attention mask in the graph says: causal, padding, sliding window, or unknown.

The mask is read as a predicate over (batch, query, key) from the operations that build it. transformers builds it from
`arange` grids by broadcasting; a mask that is proved to be "causal and padding" is replaced by the padding alone, so
that no [seq, seq] tensor is ever made.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from .graph import CASTS, argument, callee, example, is_call, is_getitem, is_written, same, shape
from .unfused import is_very_negative

KEY, QUERY, BATCH = -1, -2, -4  # dimensions of a [batch, heads, query, key] mask, from the right


@dataclass(frozen=True)
class Grid:
    """An integer tensor: its index along one dimension (from the right; None for a constant) plus an offset."""

    dim: int | None
    offset: Any


@dataclass(frozen=True)
class Predicate:
    """A conjunction over (batch, query, key)."""

    causal: tuple = ()
    """Offsets c of `key <= query + c`."""
    sliding: tuple = ()
    """Offsets c of `key > query + c`."""
    padding: tuple[Node, ...] = field(default=())
    """Nodes of [batch, key], true where a key is no padding."""
    fixed: bool = False
    """Whether an offset is of a constant, not of the query's index."""

    def __and__(self, other: Predicate) -> Predicate:
        return Predicate(
            self.causal + other.causal, self.sliding + other.sliding,
            tuple(dict.fromkeys(self.padding + other.padding)), self.fixed or other.fixed,
        )  # fmt: skip


@dataclass(frozen=True)
class Not:
    """True where a predicate is false."""

    predicate: Predicate


@dataclass(frozen=True)
class Additive:
    """0 where a predicate holds, very negative where not: it is added to logits."""

    predicate: Predicate


@dataclass(frozen=True)
class Rows:
    """A [batch, key] input of the graph, cast at most: padding, once it is broadcast over queries."""

    node: Node


Value = Grid | Predicate | Not | Additive | Rows | None
VIEWS = ("expand", "view", "reshape", "unsqueeze", "contiguous")


def read_mask(
    node: Node, queries: Any, blocks: bool = False, known: dict[Node, Value] | None = None
) -> Predicate | None:
    """Which keys the mask `node` lets so many `queries` see, or None if it is not understood.

    A boolean mask is true where a key is seen, with `blocks` where it is not. A floating-point mask is added to logits.
    `known`: what is known of other nodes already.
    """
    value = read_value(node, dict(known or {}))
    if example(node).dtype == torch.bool:
        value = _not(value) if blocks else value
    else:
        value = value.predicate if isinstance(value, Additive) and not blocks else None
    if not isinstance(value, Predicate):
        return None
    # Without a query dimension, a bound on the key is one for the only query, or none on causality.
    return value if same(queries, 1) or not value.fixed else None


def read_value(node: Any, seen: dict[Node, Any]) -> Value:
    """What `node` holds, as far as it is a part of a mask; `seen` is what is known already."""
    if isinstance(node, (int, torch.SymInt)) and not isinstance(node, bool):
        return Grid(None, node)
    if not isinstance(node, Node) or is_written(node):
        return None
    if node not in seen:
        seen[node] = None
        seen[node] = _read_call(node, seen)
    return seen[node]


def _read_call(node: Node, seen: dict) -> Value:
    if isinstance(example(node), (int, torch.SymInt)):
        return Grid(None, example(node))
    name = callee(node) if node.op in ("call_function", "call_method") else ""
    if name == "arange":
        return _arange(node)
    if name in ("new_ones", "ones"):
        return Predicate()
    if name in ("tril", "triu"):
        return _triangle(node, name, seen)
    if name in ("add", "sub", "le", "lt", "ge", "gt"):
        left, right = (read_value(a, seen) for a in node.args[:2])
        if isinstance(left, Grid) and isinstance(right, Grid):
            return _shift(name, left, right) if name in ("add", "sub") else _compare(name, left, right)
        if isinstance(left, Additive) and isinstance(right, Additive) and name == "add":
            return Additive(left.predicate & right.predicate)
    elif name in ("and_", "logical_and", "bitwise_and"):
        left, right = (read_value(a, seen) for a in node.args[:2])
        if isinstance(left, Predicate) and isinstance(right, Predicate):
            return left & right
    elif name in ("invert", "logical_not", "bitwise_not") or (name == "eq" and node.args[1] == 0):
        return _not(read_value(node.args[0], seen))
    elif name == "where" and len(node.args) == 3:
        return _additive(*node.args, seen)
    elif name == "masked_fill":
        return _additive(node.args[1], argument(node, 2, "value"), node.args[0], seen)
    elif name == "pad":
        return Rows(node) if isinstance(read_value(node.args[0], seen), Rows) and _adds_padding(node) else None
    elif is_getitem(node) and isinstance(node.args[1], tuple) and _is_gather(node.args[1]):
        return _gather(node, seen)
    elif name in CASTS or name in VIEWS or is_getitem(node):
        return _view(node, read_value(node.args[0], seen))
    return Rows(node) if _is_padding_source(node) else None


def _is_padding_source(node: Node) -> bool:
    """An input [batch, key] of whole numbers or booleans."""
    return node.op == "placeholder" and len(shape(node)) == 2 and not example(node).is_floating_point()


def _adds_padding(node: Node) -> bool:
    """Whether a call of `pad` adds false entries on the right, and nothing else."""
    widths, mode, value = argument(node, 1, "pad"), argument(node, 2, "mode", "constant"), argument(node, 3, "value")
    return len(widths) == 2 and widths[0] == 0 and mode == "constant" and value in (None, 0)


def _arange(node: Node) -> Grid | None:
    ends = [a for a in node.args if isinstance(example(a), (int, torch.SymInt))]
    if len(ends) > 2 or argument(node, 2, "step", 1) != 1:
        return None
    start = example(ends[0]) if len(ends) == 2 else example(node.kwargs.get("start", 0))
    return Grid(-1, start)


def _shift(name: str, left: Grid, right: Grid) -> Grid | None:
    if right.dim is not None and (name == "sub" or left.dim is not None):
        return None
    offset = left.offset + right.offset if name == "add" else left.offset - right.offset
    return Grid(left.dim if right.dim is None else right.dim, offset)


def _compare(name: str, left: Grid, right: Grid) -> Predicate | None:
    """`left name right` as a bound on the key."""
    if left.dim is None and right.dim is None:  # one key, one query
        offsets = left.offset, right.offset
        known = all(isinstance(offset, int) for offset in offsets)
        return Predicate() if known and getattr(operator, name)(*offsets) else None
    if left.dim != KEY:
        left, right = right, left
        name = {"le": "ge", "lt": "gt", "ge": "le", "gt": "lt"}[name]
    if left.dim != KEY or right.dim not in (QUERY, None):
        return None
    offset, fixed = right.offset - left.offset, right.dim is None
    if name in ("le", "lt"):
        return Predicate(causal=(offset if name == "le" else offset - 1,), fixed=fixed)
    return Predicate(sliding=(offset if name == "gt" else offset - 1,), fixed=fixed)


def _not(value: Value) -> Value:
    if isinstance(value, Not):
        return value.predicate
    if not isinstance(value, Predicate):
        return None
    bounds = len(value.causal) + len(value.sliding)
    if bounds == 1 and not value.padding:
        return Predicate(causal=value.sliding, sliding=value.causal, fixed=value.fixed)
    return Not(value)


def _additive(condition: Any, there: Any, elsewhere: Any, seen: dict) -> Additive | None:
    """`where(condition, there, elsewhere)` of 0 and a very negative number."""
    value = read_value(condition, seen)
    if is_very_negative(there) and _is_zero(elsewhere):
        value = _not(value)
    elif not (_is_zero(there) and is_very_negative(elsewhere)):
        return None
    return Additive(value) if isinstance(value, Predicate) else None


def _is_zero(x: Any) -> bool:
    if isinstance(x, Node) and is_written(x):
        return False
    if is_call(x, "tensor", "full"):
        x = argument(x, 0, "data") if is_call(x, "tensor") else argument(x, 1, "fill_value")
    return is_call(x, "zeros", "zeros_like", "new_zeros") or (isinstance(x, (int, float)) and x == 0)


def _triangle(node: Node, name: str, seen: dict) -> Predicate | Additive | None:
    """The lower triangle of ones, or the upper one of a very negative number."""
    source, diagonal = node.args[0], argument(node, 1, "diagonal", 0)
    if not isinstance(diagonal, int) or len(shape(node)) != 2:
        return None
    if is_call(source, "full", "new_full") and not is_written(source):
        low = is_very_negative(argument(source, 1, "fill_value")) and name == "triu" and diagonal > 0
        return Additive(Predicate(causal=(diagonal - 1,))) if low else None
    if read_value(source, seen) != Predicate():
        return None
    return Predicate(causal=(diagonal,)) if name == "tril" else Predicate(sliding=(diagonal - 1,))


def _is_gather(index: tuple) -> bool:
    return len(index) == 2 and all(isinstance(i, Node) for i in index)


def _gather(node: Node, seen: dict) -> Predicate | None:
    """`rows[batch_grid, key_grid]`."""
    source, (batch, key) = node.args[0], node.args[1]
    batch, key, rows = read_value(batch, seen), read_value(key, seen), read_value(source, seen)
    if not isinstance(rows, Rows):
        return None
    # A grid of one is read as the constant 0: all of a single row, or of a single key.
    all_batch, all_keys = (
        grid == Grid(dim, 0) or (grid == Grid(None, 0) and same(size, 1))
        for grid, dim, size in zip((batch, key), (BATCH, KEY), shape(rows.node), strict=True)
    )
    if all_batch and all_keys:
        return Predicate(padding=(rows.node,))
    return None


def _view(node: Node, value: Value) -> Value:
    """A view, a broadcast or a cast of `value`."""
    before, after = shape(node.args[0]), shape(node)
    if isinstance(value, Grid) and value.dim is not None:
        wide = [i - len(after) for i, size in enumerate(after) if not same(size, 1)]
        size = before[value.dim]
        if same(size, 1):
            return Grid(None, value.offset) if not wide else None
        return Grid(wide[0], value.offset) if len(wide) == 1 and same(after[wide[0]], size) else None
    if isinstance(value, Grid):
        return value
    if isinstance(value, (Predicate, Not, Additive)):
        # Broadcasts and casts keep a predicate, and so do new dimensions on the left; a slice would not.
        padding = value.padding if isinstance(value, Predicate) else value.predicate.padding
        new = len(after) - len(before)
        ok = (new == 0 or (new > 0 and len(before) >= 2 and not padding)) and all(
            same(a, b) or same(b, 1) for a, b in zip(after[new:], before, strict=True)
        )
        return value if ok or not before else None
    if isinstance(value, Rows):
        if len(after) == 2 and all(same(a, b) for a, b in zip(after, before, strict=True)):
            return Rows(node)
        rows = shape(value.node)
        if len(after) == 4 and same(after[0], rows[0]) and same(after[1], 1) and same(after[3], rows[1]):
            return Predicate(padding=(value.node,))
    return None


def reduces_to_padding(predicate: Predicate, queries: Any, keys: Any) -> bool:
    """Whether the predicate is exactly "causal and padding" for the newest `queries` of `keys` tokens."""
    if predicate.sliding or len(predicate.padding) > 1:
        return False
    # Where sizes have symbols of their own (each layer's cache may), their equality becomes a guard.
    causal = [offset for offset in predicate.causal if not (same(offset, keys - queries) or offset == keys - queries)]
    return not causal and (bool(predicate.causal) or same(queries, 1))
