"""Attention written out: `softmax(q @ k^T * scale + mask) @ v`.

transformers' `eager` attention and most hand-written decoders, with or without an fp32 softmax, dropout in evaluation
mode, a mask that is added (0 or very negative) or filled in.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from numbers import Number
from typing import Any

import torch
from torch.fx import Node

from .graph import CASTS, argument, callee, example, is_call, shape


class NotUnderstood(Exception):
    """What stands between the two products."""


@dataclass(frozen=True)
class Mask:
    """A mask of the logits: boolean, or floating-point and added to them."""

    node: Node
    blocks: bool = False
    """Whether a boolean mask is true where a key is *not* seen."""


@dataclass
class Unfused:
    """What is read off the chain of calls that ends in `probabilities @ value`."""

    query: Node
    key: Node
    value: Node
    scale: float = 1.0
    masks: list[Mask] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    """The chain, the last product first."""


PRODUCTS = ("matmul", "bmm")
# In place too: nobody else reads the logits.
TIMES, OVER, PLUS = ("mul", "imul", "mul_"), ("truediv", "div", "itruediv", "div_"), ("add", "iadd", "add_")
MASKED = -1e4
"""What is added to a logit at most this takes its key out of the softmax."""
SHRINKS = 0.01
"""The smallest factor behind a mask that leaves it one: exp(SHRINKS * MASKED) is a subnormal number of fp32."""


def find_softmax(node: Node) -> Node | None:
    """The softmax whose result, cast or dropped out, `node` multiplies with values."""
    if not is_call(node, *PRODUCTS):
        return None
    weights = node.args[0]
    while is_call(weights, *CASTS, "dropout", "getitem", "view", "reshape"):
        weights = weights.args[0]
    return weights if is_call(weights, "softmax") and len(shape(weights)) >= 3 else None


def read_unfused(node: Node) -> Unfused:
    """Take apart the attention that ends in `node`, for which `find_softmax` found a softmax.

    Raises:
        NotUnderstood: with the reason.
    """
    nodes, softmax = [node], find_softmax(node)
    weights = node.args[0]
    while weights is not softmax:
        if is_call(weights, "dropout") and argument(weights, 1, "p", 0.5) and argument(weights, 2, "training", True):
            raise NotUnderstood("attention dropout: call model.eval()")
        if is_call(weights, "getitem"):
            raise NotUnderstood("its softmax has more logits than keys (attention sinks)")
        if is_call(weights, "view", "reshape"):
            raise NotUnderstood("its attention weights are reshaped: batch and heads in one dimension")
        _check_cast(weights, "its attention weights")
        nodes.append(weights)
        weights = weights.args[0]
    if argument(softmax, 1, "dim") not in (-1, len(shape(softmax)) - 1):
        raise NotUnderstood("its softmax is not over the keys")
    nodes.append(softmax)
    found = Unfused(None, None, node.args[1], nodes=nodes)
    logits = softmax.args[0]
    while not is_call(logits, *PRODUCTS):
        nodes.append(logits)
        logits = _step(logits, found)
    nodes.append(logits)
    found.query, transposed = _before_upcast(logits.args[0], nodes), _before_upcast(logits.args[1], nodes)
    nodes.append(transposed)
    found.key = _before_upcast(_untransposed(transposed), nodes)
    for before in nodes[1:]:
        reader = next((user for user in before.users if user not in nodes), None)
        if reader is not None:
            raise NotUnderstood(f"its attention weights are also read by {callee(reader) or reader.op}")
    return found


def _step(node: Node, found: Unfused) -> Node:
    """The logits before `node`: what `node` does to them goes to `found`."""
    if is_call(node, *CASTS):
        _check_cast(node, "its logits")
        return node.args[0]
    if is_call(node, *TIMES, *OVER) and not node.kwargs:
        left, right = node.args[:2]
        if not isinstance(right, Number):
            left, right = right, left
        if isinstance(right, Number) and not isinstance(right, bool) and isinstance(left, Node):
            if is_call(node, *TIMES) or left is node.args[0]:
                found.scale *= right if is_call(node, *TIMES) else 1 / right
                return left
        raise NotUnderstood("its scale is computed in the graph")
    if is_call(node, *PLUS) and not node.kwargs:
        left, right = node.args[:2]
        if not _is_logits(left):
            left, right = right, left
        if not _is_logits(left):
            raise NotUnderstood(f"its logits go through {callee(node)}")
        return _masked(found, left, right, False)
    if is_call(node, "masked_fill") and is_very_negative(argument(node, 2, "value")):
        return _masked(found, node.args[0], node.args[1], True)
    if is_call(node, "where") and len(node.args) == 3 and is_very_negative(node.args[2]):
        return _masked(found, node.args[1], node.args[0], False)
    if is_call(node, "tanh"):
        raise NotUnderstood("soft-capped logits (tanh)")
    if is_call(node, "cat"):
        raise NotUnderstood("its softmax has more logits than keys (attention sinks)")
    if is_call(node, "baddbmm"):
        raise NotUnderstood("a bias is added to its logits by position (ALiBi)")
    raise NotUnderstood(f"its logits go through {callee(node)}")


def _check_cast(node: Node, what: str) -> None:
    if is_call(node, *CASTS) and not example(node).dtype.is_floating_point:
        raise NotUnderstood(f"{what} are cast to {example(node).dtype}")


def _before_upcast(node: Node, nodes: list[Node]) -> Node:
    """The operand of which `node` is a copy in fp32: products are summed in fp32 in any case.

    A copy that somebody else reads too, such as a cache, is an operand itself.
    """
    while is_call(node, "to", "float", "type") and example(node).dtype == torch.float32 and set(node.users) <= set(nodes):
        nodes.append(node)
        node = node.args[0]
    return node


def _masked(found: Unfused, logits: Any, mask: Any, blocks: bool) -> Node:
    if not isinstance(logits, Node) or not isinstance(mask, Node) or not shape(mask):
        raise NotUnderstood("a number is added to its logits")
    if not found.scale >= SHRINKS:  # of what stands behind the mask, so far
        raise NotUnderstood(f"its mask is multiplied by {found.scale:g}, together with its logits")
    found.masks.append(Mask(mask, blocks))
    return logits


def _is_logits(node: Any) -> bool:
    """Whether a product of two activations lies behind `node`, through casts, scales and masks."""
    while isinstance(node, Node) and is_call(node, *CASTS, *TIMES, *OVER, *PLUS, "sub", "masked_fill", "tanh", "view", "reshape"):
        node = node.args[0]
    return is_call(node, *PRODUCTS, "baddbmm", "einsum")


def _untransposed(node: Node) -> Node:
    """k of k^T."""
    dims = len(shape(node))
    swapped = {-1 % dims, -2 % dims} if dims else set()
    if is_call(node, "transpose", "swapaxes", "swapdims") and {d % dims for d in node.args[1:3]} == swapped:
        return node.args[0]
    if is_call(node, "mT") or (is_call(node, "getattr") and node.args[1] == "mT"):
        return node.args[0]
    order = node.args[1:] if is_call(node, "permute") else ()
    order = order[0] if len(order) == 1 else order
    if len(order) == dims == 4 and tuple(d % 4 for d in order) == (0, 1, 3, 2):
        return node.args[0]
    raise NotUnderstood(f"its keys are not transposed in the graph ({callee(node)})")


def is_very_negative(value: Any) -> bool:
    return isinstance(value, Number) and value <= MASKED
