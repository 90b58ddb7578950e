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
    """The graph output that the model keeps: [batch, kv_heads, seq, head_dim], or what `seq` says."""
    new: Node
    """The tokens of this call, in the same order of dimensions."""
    past: Node | None
    """The placeholder of a `KVTensor`, or None in a prefill."""
    seq: int = SEQ
    """Its dimension of tokens: 1 where heads come after them."""


def read_slot(node: Node, kept: Collection[Node]) -> Slot:
    """The slot of the operand `node` of an attention call.

    Args:
        kept: what the graph returns.

    Raises:
        NotTaken: with the reason.
    """
    seq = SEQ
    if node not in kept and (inner := swapped(node)) is not None and (is_call(inner, "cat") or inner in kept):
        node, seq = inner, 1
    past, new = None, node
    if is_call(node, "cat") and len(node.args[0]) == 2:
        past, new = node.args[0]
        dim = argument(node, 1, "dim", 0)
        if example(past).numel() == 0:
            past = None
        elif dim % 4 != seq:
            raise NotTaken(f"keys and values grow along dimension {dim}, not {seq}")
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
    if past is not None and example(past).seq != seq:
        raise NotTaken("its cache was made with heads and tokens in another order")
    return Slot(node, new, past, seq)


def swapped(node: Node) -> Node | None:
    """What `node` is with tokens and heads, dimensions 1 and 2, exchanged."""
    if is_call(node, "transpose", "swapaxes", "swapdims") and {argument(node, i, f"dim{i - 1}") for i in (1, 2)} == {1, 2}:
        return node.args[0]
    if is_call(node, "permute"):
        order = node.args[1:] if len(node.args) > 2 else argument(node, 1, "dims")
        return node.args[0] if tuple(order) == (0, 2, 1, 3) else None
    return None
