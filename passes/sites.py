"""Attention sites: calls of scaled-dot-product attention, attention written out, and what only looks like either."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Graph, Node

from .graph import argument, callee, example, is_call, is_getitem, is_written, same, shape
from .unfused import Mask, NotUnderstood, find_softmax, read_unfused

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class NotTaken(Exception):
    """Why the pass leaves a site alone."""


class NotKept(NotTaken):
    """The site's keys and values are no output of the graph as they are."""


@dataclass
class Site:
    """One attention call. `key`/`value` are its operands before any repetition of KV heads."""

    node: Node
    layer: int
    query: Node
    key: Node
    value: Node
    masks: tuple[Mask, ...]
    is_causal: bool
    scale: float
    nodes: tuple[Node, ...]
    """The call, and what else only belongs to it. The first one gives the output."""
    fused: bool = True
    """Whether it is one call, not attention written out."""


def where(node: Node) -> str:
    """The module that makes a call, as its qualified name."""
    stack = node.meta.get("nn_module_stack") or {}
    names = [path for path, _ in stack.values()]
    return clean_path(names[-1]) if names else node.name


def clean_path(path: str) -> str:
    """L['self']._modules['model']... -> model...."""
    path = re.sub(r"^L\['(self|fn|args)'\](\[\d+\])?\.?", "", path)  # where the traced frame has the model
    return path.replace("_modules['", "").replace("']", "")


def is_site(node: Node) -> bool:
    """Whether `node` gives the output of an attention."""
    if node.op not in ("call_function", "call_method"):
        return False
    return "attention" in callee(node) or callee(node).startswith("flash_attn") or find_softmax(node) is not None


def read_site(node: Node, layer: int) -> Site:
    """Normalise the arguments of an attention.

    Raises:
        NotTaken: with the reason, for an attention that the compressed one has no counterpart of.
    """
    if is_call(node, "scaled_dot_product_attention"):
        site = _read_call(node, layer)
    elif find_softmax(node) is not None:
        site = _read_unfused(node, layer)
    elif is_call(node, "softmax"):
        raise NotTaken("a softmax over keys whose products with queries and values are not recognised")
    else:
        raise NotTaken(f"{callee(node)} is no scaled_dot_product_attention: load the model with attn_implementation='sdpa'")
    found = [(operand, without_repeats(operand)) for operand in (site.key, site.value)]
    if any(is_written(node) for operand, source in found for node in _down_to(source, operand)):
        raise NotTaken("its keys or values are changed in place after their heads were repeated")
    site = replace(site, key=found[0][1], value=found[1][1])
    _check_operands(site)
    return site


def _read_call(node: Node, layer: int) -> Site:
    if argument(node, 4, "dropout_p", 0.0) != 0.0:
        raise NotTaken("attention dropout: call model.eval()")
    query, key, value = (argument(node, i, name) for i, name in enumerate(("query", "key", "value")))
    scale = argument(node, 6, "scale")
    if isinstance(example(scale), torch.SymFloat):  # `dynamic=True`: becomes a constant, with a guard
        scale = float(example(scale))
    if isinstance(scale, Node):
        raise NotTaken("its scale is computed in the graph")
    scale = float(shape(query)[-1] ** -0.5 if scale is None else scale)
    is_causal = bool(argument(node, 5, "is_causal", False))
    mask = argument(node, 3, "attn_mask")
    return Site(node, layer, query, key, value, (Mask(mask),) if mask is not None else (), is_causal, scale, (node,))


def _read_unfused(node: Node, layer: int) -> Site:
    try:
        found = read_unfused(node)
    except NotUnderstood as why:
        raise NotTaken(str(why)) from None
    return Site(
        node, layer, found.query, found.key, found.value, tuple(found.masks), False, float(found.scale),
        tuple(found.nodes), fused=False,
    )  # fmt: skip


def _check_operands(site: Site) -> None:
    q, k, v = shape(site.query), shape(site.key), shape(site.value)
    if not (len(q) == len(k) == len(v) == 4):
        raise NotTaken(f"operands are {len(q)}-dimensional, not [batch, heads, seq, head_dim]")
    if not (same(q[0], k[0]) and same(q[0], v[0])):
        raise NotTaken("one row of keys and values is broadcast over the batch")
    if not same(k[1], v[1]) or not isinstance(q[1], int) or q[1] % k[1]:
        raise NotTaken(f"{q[1]} query heads, {k[1]} key heads, {v[1]} value heads: no grouped-query attention")
    if not same(q[3], v[3]):
        raise NotTaken(f"head_dim of keys and values differ ({q[3]} and {v[3]})")
    if not isinstance(q[3], int) or q[3] % 16 or q[3] > 512:
        raise NotTaken(f"head_dim {q[3]}: must be a multiple of 16, at most 512")
    dtype = example(site.query).dtype
    if dtype not in DTYPES or example(site.key).dtype != dtype or example(site.value).dtype != dtype:
        raise NotTaken(f"dtype {dtype}: must be float16, bfloat16 or float32, the same for q, k and v")


def without_repeats(node: Node) -> Node:
    """The KV heads behind `repeat_kv`: expand and reshape, or repeat_interleave, with head h of KV head h // repeats."""
    base = node
    if is_call(node, "contiguous"):
        base = node.args[0]
    if is_call(base, "repeat_interleave") and argument(base, 2, "dim") in (1, -3):
        return base.args[0] if isinstance(argument(base, 1, "repeats"), int) else node
    if is_call(base, "reshape", "view") and is_call(base.args[0], "expand"):
        inner = base.args[0].args[0]
        source = inner.args[0] if is_call(inner, "unsqueeze") or is_getitem(inner) else None
        if source is not None and _adds_dim_2(inner):
            batch, heads, seq, dim = shape(source)
            expanded, after = shape(base.args[0]), shape(base)
            if len(expanded) == 5 and same(expanded[1], heads) and same(after[1], heads * expanded[2]):
                return source
    return node


def _down_to(source: Node, node: Node) -> Iterator[Node]:
    """What `without_repeats` looks through."""
    while node is not source:
        yield node
        node = node.args[0]


def _adds_dim_2(node: Node) -> bool:
    before, after = shape(node.args[0]), shape(node)
    return len(before) == 4 and len(after) == 5 and same(after[2], 1) and all(
        same(a, b) for a, b in zip(before, (*after[:2], *after[3:]), strict=True)
    )  # fmt: skip


def sites_in(graph: Graph) -> list[Node]:
    """The attentions of a graph, in execution order: also softmaxes over keys whose attention is spelled in another way,
    so that they are reported."""
    known = {find_softmax(node) for node in graph.nodes if is_site(node)}
    return [
        node for node in graph.nodes
        if is_site(node) or (is_call(node, "softmax") and len(shape(node)) >= 4 and node not in known)
    ]  # fmt: skip


def outputs(graph: Graph) -> list[Any]:
    """What a Dynamo graph returns: a flat list."""
    return list(graph.output_node().args[0])
