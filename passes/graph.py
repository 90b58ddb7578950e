"""Reading Dynamo's FX graphs: shapes, arguments, what calls write into, dead nodes."""

from __future__ import annotations

import inspect
import operator
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import lru_cache, partial
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from .. import compat


def example(node: Any) -> Any:
    """The fake value that Dynamo propagated to `node`, or the constant itself."""
    return node.meta.get("example_value", node.meta.get("val")) if isinstance(node, Node) else node


def shape(node: Node) -> tuple:
    """Sizes of a tensor node; () for anything else."""
    value = example(node)
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def same(a: Any, b: Any) -> bool:
    """Whether two sizes are equal for every input, without adding a guard."""
    a, b = (x.node.expr if isinstance(x, torch.SymInt) else x for x in (a, b))
    return bool(a == b)


def is_call(node: Any, *names: str) -> bool:
    """Whether `node` calls one of these: "reshape" is `x.reshape(...)`, `torch.reshape(x, ...)` and aten's overloads."""
    if not isinstance(node, Node) or node.op not in ("call_function", "call_method"):
        return False
    return callee(node) in names


def callee(node: Node) -> str:
    """The plain name of what a call node calls: "and_" and "le" for operators too, however they are spelled."""
    name = node.target if isinstance(node.target, str) else compat.call_name(node.target).split(".")[0]
    if name.startswith("__") and name.endswith("__"):  # a method: x.__eq__(y)
        name = name[2:-2]
        return name + "_" if name in ("and", "or", "not") else name
    return name


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of a call, however it was passed."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def is_getitem(node: Any) -> bool:
    return isinstance(node, Node) and node.op == "call_function" and node.target is operator.getitem


def size_getter(size: Any, inputs: Sequence[Node]) -> Callable[[Sequence[Any]], int] | None:
    """How to read a size off the arguments of a call; None if it is no size of an input."""
    if isinstance(size, int):
        return lambda args: size
    for i, node in enumerate(inputs):
        value = example(node)
        if isinstance(value, torch.SymInt) and same(value, size):
            return partial(_item_at, i)
        if isinstance(value, Tensor):
            for dim, extent in enumerate(value.shape):
                if same(extent, size):
                    return partial(_size_at, i, dim)
    return None


def _item_at(i: int, args: Sequence[Any]) -> int:
    return args[i]


def _size_at(i: int, dim: int, args: Sequence[Any]) -> int:
    return args[i].shape[dim]


def memory(nodes: Iterable[Any]) -> set[int]:
    """What nodes whose tensors lie in the same memory have in common."""
    return set().union(*(compat.storages_of(example(node)) for node in nodes))


def written(node: Node) -> list[Node]:
    """The arguments that a call writes into: by its schema, `out=`, `inplace=`, or a name like "add_", "iadd" and "setitem"."""
    if node.op not in ("call_function", "call_method"):
        return []
    if compat.is_higher_order(node.target):
        return node.all_input_nodes if _may_write(node) else []
    into = [node.kwargs.get("out"), *compat.mutable_arguments(node.target, node.args, node.kwargs)]
    name = callee(node)
    if name == "setitem" or _is_in_place(name) or _asks_to_be_in_place(node):
        into.append(node.args[0] if node.args else node.kwargs.get("input"))
    nodes: list[Node] = []
    map_arg(into, nodes.append)
    return nodes


def is_written(node: Node) -> bool:
    """Whether the graph writes into `node`, or into a view of it, after it was made; or into another input in its memory."""
    own, seen = memory([node]), set()
    pending = [node, *inputs_beside(node)]
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if any(node in written(user) for user in node.users):
            return True
        pending.extend(user for user in node.users if own & memory([user]))
    return False


_beside: WeakKeyDictionary[Graph, dict[str, list[str]]] = WeakKeyDictionary()
"""Of a graph, when it was first asked for: inputs that lie in the memory of others, and those; by name, to keep no graph alive."""


def inputs_beside(node: Node) -> list[Node]:
    """The other inputs that lie in the memory of an input."""
    if node.op != "placeholder":
        return []
    if node.graph not in _beside:
        in_memory: dict[int, list[str]] = defaultdict(list)
        for each in node.graph.find_nodes(op="placeholder"):
            for storage in memory([each]):
                in_memory[storage].append(each.name)
        _beside[node.graph] = {name: names for names in in_memory.values() if len(names) > 1 for name in names}
    names = _beside[node.graph].get(node.name, [])
    return [each for each in node.graph.find_nodes(op="placeholder") if each.name in names] if names else []


def _may_write(node: Node) -> bool:
    """Whether a higher-order operator may write into what it takes: unless it has subgraphs, none of which has a call that writes.
    (A Triton kernel of the model's own has none.)"""
    inside = [graph for each in node.all_input_nodes if (graph := compat.subgraph_of(each))]
    return not inside or any(written(each) for graph in inside for each in graph.nodes)


def _is_in_place(name: str) -> bool:
    if name.startswith("i") and name not in ("index", "inv", "invert") and hasattr(operator, f"__{name}__"):
        return True
    return name.endswith("_") and name not in ("and_", "or_", "is_", "not_")


def _asks_to_be_in_place(node: Node) -> Any:
    place = _place_of_inplace(node.target) if isinstance(node.target, FunctionType) else None
    return node.kwargs.get("inplace", place is not None and len(node.args) > place and node.args[place])


@lru_cache(maxsize=1024)
def _place_of_inplace(target: Any) -> int | None:
    """Of `inplace` among the arguments of a function like `F.relu`."""
    names = list(inspect.signature(target).parameters)
    return names.index("inplace") if "inplace" in names else None


CASTS = ("to", "type", "bool", "float", "half", "bfloat16", "type_as", "contiguous", "detach")
"""Calls that keep the values, up to their dtype and their place in memory."""

PURE = {
    "getitem", "arange", "add", "sub", "mul", "le", "lt", "ge", "gt", "and_", "logical_and", "bitwise_and", "new_ones",
    "ones", "expand", "view", "reshape", "unsqueeze", "cat", "tensor", "repeat_interleave", "softmax", "matmul", "bmm",
    "scaled_dot_product_attention", "transpose", "size", "full", "dropout", "where", "zeros", "masked_fill", "truediv",
    "div", "permute", "swapaxes", "tril", "triu", "invert", "eq", "getattr", "swapdims", "sym_sum", *CASTS,
}  # fmt: skip
"""Calls without a side effect that the passes know. Nothing else is ever erased: Dynamo's graphs hold in-place methods
that FX's own dead-code pass takes for pure."""


def is_pure(node: Node) -> bool:
    """Whether `node` is one of the calls in `PURE`, and does not write into an argument all the same."""
    return is_call(node, *PURE) and not written(node)


def erase_dead(graph: Graph, roots: Iterable[Node], known: Collection[Node] = ()) -> None:
    """Erase `roots` and what only they used, as far as it is proved dead. `known` write into nothing that is read."""
    pending = [node for node in roots if isinstance(node, Node)]
    while pending:
        node = pending.pop()
        if compat.is_erased(node) or node.users or node.op == "placeholder":
            continue
        if node not in known and not is_pure(node):
            continue
        pending.extend(node.all_input_nodes)
        graph.erase_node(node)
