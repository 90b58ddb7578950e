"""Which layer of its model an attention site is, also where graph breaks part the model.

A whole graph counts its sites in execution order. A part does not know how many ran before it, nor how many follow. But the
module whose compiled call is running knows its attention modules, and each site's weights belong to one of them. Where a
part has no weights, because each layer with some is a graph break, it is the method of one of them.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn
from torch.fx import Node

from .. import compat
from .sites import where

if TYPE_CHECKING:
    from .rewrite import Rewriter

GRAPHS = 64
"""Of a forward, at most: a cache, a batch of another size and a mask each make one."""


@dataclass(frozen=True)
class Layers:
    """The layers of a graph's sites, of all `total` of them."""

    indices: list[int]
    names: list[str]
    """Of the modules that make the calls; in the whole model, where that is known."""
    total: int
    is_part: bool = False
    """Whether the model has others, in other graphs."""
    known: bool = True
    """False: it is a part, counted from 0."""


def number(rewriter: Rewriter, calls: list[Node]) -> Layers:
    """The layers of the attention sites `calls`."""
    counted = list(range(len(calls))), [where(call) for call in calls], len(calls)
    root, is_whole = compat.compiled_call()
    if is_whole and not compat.ends_in_break(rewriter.module):
        return Layers(*counted)
    if root is None or not calls:
        return Layers(*counted, is_part=True, known=False)
    weights = [_nearest_weight(rewriter, call) for call in calls]
    owners = [_owner(rewriter, call, weight, root) for call, weight in zip(calls, weights, strict=True)]
    kinds = tuple({type(owner) for owner in owners if owner is not None})
    modules = [module for module in root.modules() if isinstance(module, kinds)]
    indices = [i for owner in owners for i, module in enumerate(modules) if module is owner]
    if len(set(indices)) < len(calls):
        return Layers(*counted, is_part=True, known=False)
    if rewriter.config.by_layer:
        _keep_apart(owners, weights, len(modules), root)
    if not _several(root).isdisjoint(modules):  # those behind it count from another number, too
        return Layers(*counted, is_part=True, known=False)
    names = {module: name for name, module in root.named_modules()}
    return Layers(indices, [names[owner] for owner in owners], len(modules), is_part=True)


def _owner(rewriter: Rewriter, call: Node, weight: Node | None, root: nn.Module) -> nn.Module | None:
    """The module of `root` that makes the call: the one whose method it is in, or of the class that Dynamo saw there, with
    the nearest weight."""
    stack = list((call.meta.get("nn_module_stack") or {}).values())
    if not stack:
        traced = compat.traced_module()
        return traced if traced is not None and _is_one_of_many(traced, root) else None
    if weight is None:
        return None
    found = [
        module for module in root.modules()
        if type(module) is stack[-1][1] and module is not root
        and any(p is rewriter.value_of(weight) for p in module.parameters())
    ]  # fmt: skip
    return found[0] if len(found) == 1 else None


def _several(root: nn.Module) -> set[nn.Module]:
    """The modules that stand in a list more than once, with what they hold: several layers each. (A second name is none.)"""
    lists = nn.ModuleList, nn.ModuleDict, nn.Sequential
    counts = [Counter(holder._modules.values()) for holder in root.modules() if isinstance(holder, lists)]
    return {part for count in counts for held, times in count.items() if held and times > 1 for part in held.modules()}


def _is_one_of_many(module: nn.Module, root: nn.Module) -> bool:
    """Whether a module is one layer's: there are others like it, and it does not hold several of anything itself."""
    lists = nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict
    several = any(isinstance(part, lists) and len(part) > 1 for part in module.modules())
    return sum(type(other) is type(module) for other in root.modules()) > 1 and not several


def _keep_apart(owners: list[nn.Module], weights: list[Node | None], layers: int, root: nn.Module) -> None:
    """Let no other layer have this graph, though it looked alike."""
    compat.allow_graphs(GRAPHS * layers)
    traced = compat.traced_module()
    if traced is not None and traced is not root:
        compat.only_for()
    if traced is None or sum(type(module) is type(owners[0]) for module in traced.modules()) > 1:
        for weight in weights:  # a method of several layers' module: what it is called for tells them apart
            if weight is not None:
                compat.only_for(weight)


def _nearest_weight(rewriter: Rewriter, call: Node) -> Node | None:
    """The parameter that fewest nodes are between: of what the attention is computed from, else of what becomes of it."""
    for neighbours in (lambda node: node.all_input_nodes, lambda node: [*node.users, *node.all_input_nodes]):
        pending, seen = deque([call]), {call}
        while pending:
            node = pending.popleft()
            if node.op == "placeholder" and isinstance(rewriter.value_of(node), nn.Parameter):
                return node
            pending.extend(new := [n for n in neighbours(node) if n not in seen])
            seen.update(new)
    return None
