"""The functional cache idiom: `keys = cat([past, new], seq)`, kept by the caller.

transformers' `DynamicCache`, `past_key_values` tuples and most hand-written decoders. The first call concatenates with
an empty tensor, or with nothing.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch.fx import Node

from ..tensor import SEQ, KVTensor
from .graph import argument, example, is_call, same, shape
from .sites import NotKept, NotTaken

NAME = "cat"


@dataclass(frozen=True)
class Slot:
    """Where a site keeps its keys or values."""

    stored: Node
    """The graph output that the model keeps: [batch, kv_heads, seq, head_dim]."""
    new: Node
    """The tokens of this call."""
    past: Node | None
    """The placeholder of a `KVTensor`, or None in a prefill."""


def read_slot(node: Node, kept: Collection[Node]) -> Slot:
    """The slot of the operand `node` of an attention call.

    Args:
        kept: what the graph returns.

    Raises:
        NotTaken: with the reason.
    """
    past, new = None, node
    if is_call(node, "cat") and len(node.args[0]) == 2:
        past, new = node.args[0]
        dim = argument(node, 1, "dim", 0)
        if example(past).numel() == 0:
            past = None
        elif dim % 4 != SEQ:
            raise NotTaken(f"keys and values grow along dimension {dim}, not {SEQ}")
    if past is not None and not (past.op == "placeholder" and isinstance(example(past), KVTensor)):
        if past.op == "placeholder":
            raise NotTaken("its cache is dense: its prefill was left alone, or ran without this backend")
        raise NotTaken("its past is computed in the graph, it is no cache")
    if past is not None and set(past.users) != {node}:
        readers = ", ".join(sorted(user.name for user in past.users if user is not node))
        raise NotTaken(f"its compressed past is read elsewhere in the graph ({readers})")
    if node not in kept:
        raise NotKept("the keys and values that it attends to are not what the model keeps (or use_cache=False)")
    if past is not None and not same(shape(new)[0], shape(past)[0]):
        raise NotTaken("batch of the new tokens differs from the cache's")
    return Slot(node, new, past)
