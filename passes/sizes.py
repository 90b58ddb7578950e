"""Sizes that a graph reads off compressed keys and values."""

from __future__ import annotations

import operator
from functools import reduce
from typing import TYPE_CHECKING, Any

from torch.fx import Node
from torch.fx.node import map_arg

from ..tensor import KVTensor
from .graph import argument, example, is_call, is_getitem, shape

if TYPE_CHECKING:
    from .rewrite import Rewriter


def lower_sizes(rewriter: Rewriter) -> None:
    """Sizes that the graph reads off a `KVTensor`, or off what it grows to, come from its length."""
    for kv in rewriter.originals:
        if not isinstance(example(kv), KVTensor):
            continue
        grown = [user for user in kv.users if _appends(user, kv)]
        for tensor in (kv, *grown):
            for reader in [user for user in tensor.users if is_call(user, "numel", "size")]:
                _lower_size(rewriter, reader, kv)


def _lower_size(rewriter: Rewriter, reader: Node, kv: Node) -> None:
    """Replace one `size` or `numel` of `kv`, or of a `cat` that begins with it."""
    tensor = reader.args[0]

    def size(dim: int) -> Any:
        seq = example(kv).seq
        if dim % 4 != seq:
            extent, held = shape(tensor)[dim % 4], {0: 0, 3: 3}.get(dim % 4, 1)
            return extent if isinstance(extent, int) else rewriter.graph.call_method("size", (rewriter.field(kv, "dense"), held))
        length = rewriter.field(kv, "length")
        if tensor is kv:
            return length
        new = argument(tensor, 0, "tensors")[1]
        n = shape(new)[seq]
        n = n if isinstance(n, int) else rewriter.graph.call_method("size", (new, seq))
        return rewriter.graph.call_function(operator.add, (length, n))

    with rewriter.graph.inserting_before(reader):
        if is_call(reader, "numel"):
            replace_uses(reader, reduce(lambda a, b: rewriter.graph.call_function(operator.mul, (a, b)), map(size, range(4))))
        elif (dim := argument(reader, 1, "dim")) is not None:
            replace_uses(reader, size(dim))
        else:
            for item in [u for u in reader.users if is_getitem(u) and isinstance(u.args[1], int)]:
                replace_uses(item, size(item.args[1]))
                rewriter.graph.erase_node(item)
    if not reader.users:  # else size() is used as a whole: the site will be reported
        rewriter.graph.erase_node(reader)


def _appends(node: Node, kv: Node) -> bool:
    """Whether `node` appends to `kv`."""
    operands = argument(node, 0, "tensors") if is_call(node, "cat") else ()
    return len(operands) == 2 and operands[0] is kv and argument(node, 1, "dim", 0) % 4 == example(kv).seq


def replace_uses(node: Node, by: Node | int) -> None:
    """`Node.replace_all_uses_with`, for constants too."""
    for user in list(node.users):
        user.args = map_arg(user.args, lambda n: by if n is node else n)
        user.kwargs = map_arg(user.kwargs, lambda n: by if n is node else n)
