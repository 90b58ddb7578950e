"""One-token graphs that do the same work at every length: what depends on it becomes data, for `stepgraph.StepGraph`."""

from __future__ import annotations

import operator
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Graph, Node

from .. import compat, ops
from .graph import CASTS, argument, callee, erase_dead, example, is_call, is_written, memory, same, shape
from .rewrite import Longer, Rewritten

minikv = torch.ops.minikv

DEVICES = set() if os.environ.get("MINIKV_CUDA_GRAPHS") == "0" else {"cuda"}
"""Types of devices whose decode steps become one CUDA graph (none with `MINIKV_CUDA_GRAPHS=0`). (The tests add "cpu".)"""

MOST_FED = 1 << 20
"""Bytes of an argument that may be copied in each step, where it can lie elsewhere than in the step before."""

ATTENTION = minikv.decode_attention.default, ops.decode_attention_in_graph
STATE, LENGTH, PADDING = 7, 8, 11
"""Arguments of theirs."""

RANDOM = {
    "bernoulli", "bernoulli_", "multinomial", "normal", "normal_", "rand", "rand_like", "randint", "randint_like", "randn",
    "randn_like", "randperm", "exponential_", "uniform_", "dropout", "alpha_dropout", "feature_dropout",
}  # fmt: skip


@dataclass
class Step:
    """A rewritten graph in which states and `lengths` say all that there is to know of lengths. Nodes are placeholders."""

    states: dict[Node, Node | int]
    """Each takes a state of which the length, this one, is subtracted from the offset: attention gets 0 for it."""
    lengths: Node
    """int32 [len(states)]: these lengths. The last placeholder."""
    checks: list[tuple[Node, Node, Node | int]]
    """Masks, states and lengths that `ops.check_padding` takes before each call."""
    fed: list[Node]
    """Small arguments of the call, each in a place of its own. All others lie where they lay in the step before."""


def make_step(rewritten: Rewritten, kinds: set[str]) -> Step | None:
    """Rewrite the graph once more, where it is a decode step on one device of these kinds; None where it is not."""
    graph = rewritten.module.graph
    erase_dead(graph, [node for node in graph.nodes if not node.users])  # sizes that Dynamo worked out, for the most part
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    sites = [node for node in graph.nodes if node.target in ATTENTION]
    devices = {example(node).device for node in placeholders if isinstance(example(node), Tensor)}
    outputs = [out for out in rewritten.outputs if out is not None]
    if (
        not sites or not all(isinstance(out, (Node, Longer)) for out in outputs)
        or rewritten.held or rewritten.opened or rewritten.densified or rewritten.counted
        or any(compat.is_wrapper(example(node)) for node in placeholders)
        or len(devices) != 1 or next(iter(devices)).type not in kinds
        or not all(isinstance(out, Longer) or _is_new(out, placeholders) for out in outputs)
        or any(_is_unsafe(node) for node in graph.nodes)
    ):  # fmt: skip
        return None
    states = {site.args[STATE]: site.args[LENGTH] for site in sites}
    alike = {tuple(map(str, shape(state))) for state in states}
    if len(alike) != 1 or any(
        not same(shape(site.args[0])[2], 1) or site.args[LENGTH] is not states[site.args[STATE]]
        or any(user not in sites for user in site.args[STATE].users)
        for site in sites
    ):  # fmt: skip
        return None
    masks = {site: site.args[PADDING] for site in sites if site.target is ATTENTION[0] and len(site.args) > PADDING}
    checks = [(_cast_from(mask), site.args[STATE], site.args[LENGTH]) for site, mask in masks.items() if mask is not None]
    readers = _readers(graph, sites)
    shifted = [_read(node, list(states.values())) for node in readers]
    if None in shifted or any(mask is None for mask, *_ in checks):
        return None
    lengths = _lengths(graph, placeholders[-1], len(states))
    for node, what in zip(readers, shifted, strict=True):
        _rewrite(graph, node, what, lengths)
    for site in sites:
        args = list(site.args)
        args[LENGTH] = 0
        if site in masks:
            args[PADDING] = None
        site.args = tuple(args)
    erase_dead(graph, masks.values())
    _erase_sizes(graph)
    masked = {mask for mask, *_ in checks if not mask.users}
    for node in masked:
        graph.erase_node(node)
    graph.lint()
    rewritten.module.recompile()
    inside = {*rewritten.fields, *rewritten.constants, *masked}
    fed = [node for node in placeholders if node not in inside and not compat.is_erased(node) and _is_fed(node)]
    return Step(states, lengths, checks, fed)


def _is_new(out: Node, placeholders: Sequence[Node]) -> bool:
    """Whether an output is a tensor that does not lie in an input."""
    return isinstance(example(out), Tensor) and not memory([out]) & memory(placeholders)


def _is_unsafe(node: Node) -> bool:
    """Whether a call may draw random numbers, or is known to be none for a CUDA graph."""
    if node.op not in ("call_function", "call_method"):
        return node.op not in ("placeholder", "output", "get_attr")
    tags = getattr(node.target, "tags", ())
    random = torch.Tag.nondeterministic_seeded in tags or callee(node) in RANDOM
    if is_call(node, "dropout") and argument(node, 2, "training", True) is False:
        random = False
    if is_call(node, "scaled_dot_product_attention"):
        random = argument(node, 4, "dropout_p", 0.0) != 0
    return random or torch.Tag.cudagraph_unsafe in tags


def _cast_from(mask: Node) -> Node | None:
    """The placeholder that `mask` has the values of."""
    while is_call(mask, *CASTS):
        mask = mask.args[0]
    return mask if mask.op == "placeholder" else None


def _is_size(node: object) -> bool:
    return isinstance(node, Node) and isinstance(example(node), torch.SymInt)


def _readers(graph: Graph, sites: list[Node]) -> list[Node]:
    """Who takes sizes, but for other sizes, and for attention."""
    return [
        node for node in graph.nodes
        if node not in sites and not isinstance(example(node), (int, torch.SymInt)) and any(map(_is_size, node.all_input_nodes))
    ]  # fmt: skip


def _more(size: Any, base: Any) -> int | None:
    """How much more one size is than another, if it is so for every input."""
    a, b = (x.node.expr if isinstance(x, torch.SymInt) else sympy.sympify(x) for x in (example(size), example(base)))
    difference = a - b
    return int(difference) if difference.is_Integer else None


@dataclass
class _Shifted:
    """A call that gives `base`, a tensor, or numbers from 0 on, plus the length number `place` and `more`."""

    base: Node | int
    place: int
    more: int


def _read(node: Node, lengths: list[Node | int]) -> _Shifted | None:
    """What `node` computes, if it can be computed from lengths on the device."""
    if len(node.args) != 2 or not is_call(node, "add", "arange"):
        return None
    if is_call(node, "add"):
        base, start = node.args if _is_size(node.args[1]) else node.args[::-1]
        if node.kwargs or not isinstance(example(base), Tensor):
            return None
    else:
        start, end = node.args
        base = _more(end, start)
        if base is None:
            return None
    found = ((place, _more(start, length)) for place, length in enumerate(lengths) if _is_size(length))
    place, more = next(((place, more) for place, more in found if more is not None), (None, None))
    return None if place is None else _Shifted(base, place, more)


def _rewrite(graph: Graph, node: Node, shifted: _Shifted, lengths: Node) -> None:
    with graph.inserting_before(node):
        base = shifted.base
        if isinstance(base, int):
            base = graph.call_function(torch.arange, (base,), dict(node.kwargs))
        length = graph.call_function(operator.getitem, (lengths, shifted.place))
        if shifted.more:
            length = graph.call_function(operator.add, (length, shifted.more))
        new = graph.call_function(operator.add, (base, length))
    new.meta.update(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _lengths(graph: Graph, last: Node, count: int) -> Node:
    """The placeholder of lengths, behind the `last` one."""
    with graph.inserting_after(last):
        node = graph.placeholder("minikv_lengths")
    like = next(example(x) for x in graph.nodes if x.op == "placeholder" and isinstance(example(x), Tensor))
    node.meta["example_value"] = compat.fake_constant(torch.zeros(count, dtype=torch.int32, device=like.device), like)
    compat.set_constant_source(node)
    return node


def _erase_sizes(graph: Graph) -> None:
    """Sizes that nobody takes any more, placeholders too."""
    for node in reversed(list(graph.nodes)):
        if isinstance(example(node), torch.SymInt) and not node.users:
            graph.erase_node(node)


def _is_fed(node: Node) -> bool:
    """Whether a placeholder's tensor is copied in each step: a small one that the caller passes."""
    x = example(node)
    if not isinstance(x, Tensor) or isinstance(x, torch.nn.Parameter) or compat.is_attribute(node) or is_written(node):
        return False
    return compat.hint(x.numel()) * x.itemsize <= MOST_FED
