"""Linear layers of few rows that read one input are one product (`kernels.linear`): a decode step takes as long as its weights
take to load, and small weights load faster together."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from .. import compat, lowering
from ..kernels.linear import MOST_ROWS, MOST_WEIGHTS, STEP, TILE
from .graph import argument, example, is_pure, memory

if TYPE_CHECKING:
    from .rewrite import Rewriter

DTYPES = (torch.float16, torch.bfloat16)
MOST_OUTPUTS = 1 << 16
"""Of a product. cuBLAS is as fast with more, which are the logits'."""


def merge_linears(rewriter: Rewriter) -> None:
    """Put `minikv::linear_parts` in the place of the linear layers that it takes, up to MOST_WEIGHTS that read one input in one
    call. Their outputs are computed from it as from any sum, for Inductor to fuse."""
    groups: list[list[Node]] = []
    latest: dict[Node, tuple[list[Node], set[int]]] = {}  # of each input: a group, and memory that may be written to since
    for node in rewriter.graph.nodes:
        if _fits(node):
            group, written = latest.get(node.args[0], ([], set()))
            if not 0 < len(group) < MOST_WEIGHTS or written & memory(node.args[:2]):
                latest[node.args[0]] = group, _ = [], set()
                groups.append(group)
            group.append(node)
        elif node.target is not F.linear and not is_pure(node):
            for _, written in latest.values():
                written |= memory(node.all_input_nodes)
    for group in groups:
        _merge(rewriter, group[0].args[0], group)


def _merge(rewriter: Rewriter, x: Node, nodes: list[Node]) -> None:
    weights = [node.args[1] for node in nodes]
    with rewriter.graph.inserting_before(nodes[0]):
        parts = rewriter.graph.call_function(torch.ops.minikv.linear_parts.default, (x, weights))
    begin = 0
    for node, weight in zip(nodes, weights, strict=True):
        end = begin + compat.static_size(example(weight).shape[0])
        with rewriter.graph.inserting_before(node):
            new = rewriter.graph.call_function(_outputs, (parts, begin, end, example(node).dtype, argument(node, 2, "bias")))
        new.meta.update(node.meta)
        rewriter.replace(node, new)
        rewriter.graph.erase_node(node)
        begin = end


def _outputs(parts: Tensor, begin: int, end: int, dtype: torch.dtype, bias: Tensor | None) -> Tensor:
    """One layer's, rounded once, as a product of its own would be."""
    out = parts[..., begin:end].sum(0)
    return (out if bias is None else out + bias).to(dtype)


def _fits(node: Node) -> bool:
    """Whether it is a plain layer of a plain weight, for few rows, on a device with our kernel, of dtypes and sizes that the kernel
    takes."""
    if node.target is not F.linear or len(node.args) < 2:
        return False
    x, weight, bias = example(node.args[0]), example(node.args[1]), argument(node, 2, "bias")
    tensors = [x, weight, example(node), *([] if bias is None else [example(bias)])]
    if not all(isinstance(t, Tensor) and not compat.is_wrapper(t) and t.dtype in DTYPES for t in tensors):
        return False
    sizes = [compat.static_size(size) for size in (*x.shape, *weight.shape)]
    if None in sizes or x.dim() < 2 or weight.dim() != 2:
        return False
    *rows, inputs, outputs, _ = sizes
    return (
        len({t.dtype for t in tensors}) == 1  # also under autocast
        and x.device.type in lowering.DEVICES
        and weight.is_contiguous() and weight.numel() < 2**31
        and 0 < math.prod(rows) <= MOST_ROWS and inputs % STEP == 0 and outputs % TILE == 0 and outputs <= MOST_OUTPUTS
        and node.args[1].op == "placeholder"
    )  # fmt: skip
