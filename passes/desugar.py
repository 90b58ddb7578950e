"""The boundary: the compiled graph sees plain tensors, its caller `KVTensor`s."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .. import compat, fixed, ops
from ..buffers import OPENED, Buffers
from ..cache import MiniKVLayer
from ..config import MiniKVConfig
from ..finite import report_not_finite
from ..stepgraph import Layout
from ..tensor import KVTensor, make_room, wrap_prompt
from .graph import example, size_getter
from .rewrite import Longer, Made, Rewritten
from .static import Born
from .step import make_step

minikv = torch.ops.minikv

Getter = Callable[[Sequence[Any]], Any]


def desugar(
    rewritten: Rewritten, originals: Sequence[Node], example_inputs: Sequence[Any], config: MiniKVConfig,
    replays: Collection[str] = (),
) -> tuple[list[Any], Boundary]:
    """Drop the placeholders of `KVTensor`s, and of static buffers that were taken, from a rewritten graph.

    Args:
        replays: kinds of devices on which what is compiled from a decode step may run as a CUDA graph.

    Returns:
        example inputs of the graph's new placeholders, and the boundary that calls what is compiled from it.
    """
    graph = rewritten.module.graph
    position = {node: i for i, node in enumerate(originals)}
    for node in originals:
        if isinstance(example(node), KVTensor) or node in rewritten.given_back:
            graph.erase_node(node)
    step = make_step(rewritten, set(replays)) if replays else None
    rewritten.module.recompile()
    places = {node: len(originals) + i for i, node in enumerate(rewritten.held)}
    places |= {node: OPENED.index(name) - len(OPENED) for name, node in rewritten.opened.items()}

    def getter(node: Node | int) -> Getter:
        if not isinstance(node, Node) or node in rewritten.constants:
            return _constant(rewritten.constants.get(node, node))
        if node in rewritten.fields:
            kv, name = rewritten.fields[node]
            return _field(position[kv], name)
        return _argument(places.get(node, position.get(node)))

    taken = [node for node in graph.nodes if node.op == "placeholder"]
    own = {node for node in taken if node in position and node not in rewritten.densified}
    inputs = [example_inputs[position[node]] if node in own else example(node) for node in taken]
    getters = [getter(node) for node in taken if step is None or node is not step.lengths]
    growth = {out.past: size_getter(out.n, originals) for out in rewritten.outputs if isinstance(out, Longer)}
    lengths = {out: size_getter(out.length, originals) for out in rewritten.outputs if isinstance(out, Made)}
    boundary = Boundary(config, getters, growth, lengths, rewritten.outputs)
    rewritten.buffers.densified = [position[node] for node in rewritten.densified]
    boundary.buffers = rewritten.buffers if rewritten.buffers.pairs or rewritten.densified else None
    places |= position
    boundary.counted = [
        (role, layer, places[dense], places[state]) for role, layer, dense, state in rewritten.counted if state in places
    ]
    boundary.stores = rewritten.stores
    if step is not None:
        boundary.step = Layout.of(step, taken)
        boundary.getters += [getter(length) for length in step.states.values()]
        boundary.checks = [tuple(map(getter, check)) for check in step.checks]
    boundary.rooms = [
        tuple([places[tensor] for tensor in held] for held in node.args[:2])
        for node in graph.nodes
        if node.target is minikv.make_room.default and {t for held in node.args[:2] for t in held} <= set(places)
    ]  # fmt: skip
    return inputs, boundary


def _argument(i: int) -> Getter:
    return lambda args: args[i]


def _constant(value: Any) -> Getter:
    return lambda args: value


def _field(i: int, name: str) -> Getter:
    if name == "length":
        return lambda args: args[i].length
    return lambda args: getattr(args[i], name)


class Boundary:
    """Calls a compiled graph with the tensors inside `KVTensor`s, and wraps what comes back."""

    def __init__(
        self, config: MiniKVConfig, getters: list[Getter], growth: dict[int, Getter], lengths: dict[Made, Getter],
        outputs: list[Node | Made | Longer | Born],
    ):  # fmt: skip
        self.config, self.getters, self.growth, self.lengths, self.outputs = config, getters, growth, lengths, outputs
        self.compiled: Callable | None = None
        self.buffers: Buffers | None = None
        self.counted: list[tuple[str, int, int, int]] = []  # with places of arguments: see `Rewritten.counted`
        self.stores = False
        self.step: Layout | None = None  # of the inputs, whose last are lengths then: see `make_step`
        self.checks: list[tuple[Getter, Getter, Getter]] = []  # what `ops.check_padding` takes
        self.rooms: list[tuple[list[int], list[int]]] = []  # places of what each `minikv::make_room` takes
        self._room: weakref.ref[Tensor] | None = None
        self._calls = 0
        self.on_model: Callable[[Sequence[Any]], None] | None = None  # told of the arguments of each new model
        self.parameters: tuple[int, ...] = ()  # positions of the model's first parameter and its last
        self._model: list[weakref.ref[Tensor]] = []

    def __call__(self, *args: Any) -> list[Any]:
        if self.on_model is not None and not self._is_known(args):
            self._model = [weakref.ref(args[i]) for i in self.parameters]
            self.on_model(args)
        with compat.outside_inference_mode():
            if self.growth:
                args = self._reserve(list(args))
            layers: list[MiniKVLayer] = []
            if self.buffers is not None:
                layers, opened = self.buffers.open(args)
                args = [*args, *opened]
            if self.rooms:
                self._prepare_rooms(args)
            for check in self.checks:
                mask, state, length = (get(args) for get in check)
                ops.check_padding(mask.bool().to(state.device), state, length, 1, self.config)
            flat = list(self.compiled(*[get(args) for get in self.getters]))
            if self.counted:
                self._report_counted(args)
            return self._wrap(args, flat, layers)

    def _report_counted(self, args: Sequence[Any]) -> None:
        """Report NaN and inf in a prompt at once; in other tokens once in as many calls as fill a buffer, not to wait for the
        device at each step."""
        prompt = self.stores and (self.buffers is None or int(args[-1]) == 0)
        self._calls += 1
        if prompt or self._calls % self.config.buffer == 0:
            held = [(role, layer, args[dense], args[state]) for role, layer, dense, state in self.counted]
            fixed.report(held, self.config, prompt)

    def _prepare_rooms(self, args: Sequence[Any]) -> None:
        """What `make_room` keeps of the storages is made here, not in memory that a CUDA graph uses again."""
        first = args[self.rooms[0][0][0]]
        if self._room is None or self._room() is not first:
            self._room = weakref.ref(first)
            for places in self.rooms:
                fixed.prepare_room(*([args[i] for i in held] for held in places), self.config)

    def _is_known(self, args: Sequence[Any]) -> bool:
        return bool(self._model) and all(ref() is args[i] for ref, i in zip(self._model, self.parameters, strict=True))

    def _reserve(self, args: list[Any]) -> list[Any]:
        """Make room for the new tokens: outside of the graph, so that it sees only storages that fit."""
        grown = [(out.past, out.layer) for out in self.outputs if isinstance(out, Longer)]
        blocks = [args[i].occupancy.blocks for i, _ in grown]
        roomy = make_room([args[i] for i, _ in grown], [self.growth[i](args) for i, _ in grown])
        for (i, _), kv in zip(grown, roomy, strict=True):
            args[i] = kv
        flushed = [
            (kv, layer) for kv, (_, layer), before in zip(roomy, grown, blocks, strict=True) if kv.occupancy.blocks is not before
        ]
        if flushed:
            report_not_finite(*map(list, zip(*flushed, strict=True)))
        return args

    def _wrap(self, args: Sequence[Any], flat: list[Any], layers: list[MiniKVLayer]) -> list[Any]:
        results, made, tensors = [], [], iter(flat)
        for out in self.outputs:
            if isinstance(out, Longer):
                results.append(args[out.past].longer(self.growth[out.past](args)))
            elif isinstance(out, Born):
                results.append(self.buffers.pairs[out.pair].given_back(layers[out.pair], out.role))
            elif isinstance(out, Made):
                made.append(({name: next(tensors) for name in out.names}, out.role, self.lengths[out](args), out.layer))
                results.append(None)
            else:
                results.append(next(tensors))
        if made:
            seqs = [out.seq for out in self.outputs if isinstance(out, Made)]
            wrapped = iter(wrap_prompt(made, self.config, seqs))
            results = [next(wrapped) if isinstance(out, Made) else r for out, r in zip(self.outputs, results, strict=True)]
        return results
