"""Sines and cosines of a step's positions are computed once. Inductor would write them into the kernels of every layer that reads
them, which took 2.3 us each at 128K tokens and 1.3 at 32K (an H200, benchmarks/results/step_profile_128k.txt, step_profile.txt)."""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from .. import lowering
from .graph import example, is_call, same, shape

minikv = torch.ops.minikv


def compute_once(graph: Graph) -> None:
    """Put `minikv::once` behind the sines and cosines of one token's position, where Inductor has our lowering of it."""
    for node in list(graph.nodes):
        if is_call(node, "cos", "sin") and _is_of_one_token(node) and example(node).device.type in lowering.DEVICES:
            with graph.inserting_after(node):
                once = graph.call_function(minikv.once.default, (node,))
            once.meta.update(node.meta)
            node.replace_all_uses_with(once, lambda user, once=once: user is not once)


def _is_of_one_token(node: Node) -> bool:
    return len(shape(node)) > 1 and same(shape(node)[1], 1)
