"""`StepGraph`: a decode step as one CUDA graph, for as long as it does the same work from token to token."""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from . import compat
from .kernels.state import OFFSET

log = logging.getLogger("minikv")

TRIALS = 3
"""Calls with inputs in the same places before the step is captured, which takes as long as a few of them."""
WORTH = 32
"""Replays after which a capture was worth it: then one call in new places is enough."""
ALIGNED = 4
"""int32 of 16 bytes, at which kernels take their inputs to begin."""


@dataclass(frozen=True)
class Layout:
    """What is known of the inputs of a step (`passes.step.Step`), by their places."""

    states: tuple[int, ...]
    fed: tuple[int, ...]
    """May lie elsewhere in each call: they are copied."""
    held: tuple[int, ...]
    """The others."""
    sized: tuple[int, ...]
    """Those of them whose sizes may change."""
    strided: tuple[int, ...]
    """Whose strides may, by more than the tensor's sizes say."""

    @classmethod
    def of(cls, step: Any, placeholders: Sequence[Any]) -> Layout:
        place = {node: i for i, node in enumerate(placeholders)}
        held = [node for node in placeholders if node is not step.lengths and node not in step.fed]
        changing = {node: compat.changing(node.meta["example_value"]) for node in held}
        sized, strided = ([node for node in held if changing[node][what]] for what in (0, 1))
        return cls(*(tuple(place[node] for node in nodes) for nodes in (step.states, step.fed, held, sized, strided)))

    def now(self, inputs: Sequence[Tensor]) -> tuple[list, ...]:
        """What a captured step depends on, besides the values of its inputs."""
        return (
            [inputs[i].data_ptr() for i in self.held], [inputs[i].shape for i in self.sized],
            [inputs[i].stride() for i in self.strided], [inputs[i].shape for i in self.fed],
        )  # fmt: skip


class States:
    """Those of all sites of a step, with the lengths taken off their offsets."""

    def __init__(self, like: Tensor, count: int):
        size = like.numel()
        rows = like.new_empty(count, -(-size // ALIGNED) * ALIGNED)[:, :size].unflatten(1, like.shape)
        self.tensors, self.lengths, self._offsets = list(rows.unbind()), like.new_empty(count), rows[..., OFFSET]

    def set_lengths(self, lengths: Sequence[int]) -> None:
        if len(set(lengths)) == 1:
            self.lengths.fill_(lengths[0])
        else:
            for one, length in zip(self.lengths.unbind(), lengths, strict=True):
                one.fill_(length)

    def take(self, states: list[Tensor]) -> None:
        compat.copy_all(self.tensors, states)
        self._offsets.sub_(self.lengths[:, None])


class StepGraph:
    """Calls a compiled decode step, and replays it as a CUDA graph where all that is not copied lies where it lay.

    What a graph holds of its inputs is addresses: it keeps no cache alive, and no model. A call whose inputs lie elsewhere, after
    a storage has grown or with another cache, runs as it is.
    """

    def __init__(self, compiled: Callable, layout: Layout):
        self.compiled, self.layout = compiled, layout
        self._now: tuple | None = None  # of the last call
        self._calls = 0  # like it, in a row
        self._graph: Any = None  # also one that is no longer good: its memory is the next one's
        self._outputs: list[Any] | None = None  # None: nothing is captured
        self._replays = 0
        self._fails = False
        self._fed: list[Tensor] = []
        self._states: States | None = None
        self._lock = threading.Lock()

    def __call__(self, *inputs: Any) -> list[Any]:
        with self._lock:  # threads may share a model
            return self._call(inputs)

    def _call(self, inputs: Sequence[Any]) -> list[Any]:
        known = len(inputs) - len(self.layout.states)
        inputs, lengths = inputs[:known], inputs[known:]
        if is_capturing(inputs[0].device):  # the caller's graph has states of its own
            states = self._new_states(inputs)
            states.set_lengths(lengths)
            return self._run(inputs, states)
        stream, alone = stream_of(inputs[0].device), is_alone()
        now = (stream, *self.layout.now(inputs))
        if now != self._now:
            if self._now is not None and stream != self._now[0]:
                self._states, self._graph = None, None  # the other stream may still be at work in them
            self._begin(now, inputs)
        self._states.set_lengths(lengths)
        if self._outputs is None:
            if not (self._is_time() and alone):
                self._calls += 1
                return self._run(inputs, self._states)
            if not self._capture(inputs):
                return self._run(inputs, self._states)
        for copy, i in zip(self._fed, self.layout.fed, strict=True):
            _fill(copy, inputs[i])
        self._graph.replay()
        self._replays += 1
        # They lie in the graph's memory, where the next replay writes.
        return [out.clone() if isinstance(out, Tensor) else out for out in self._outputs]

    def _begin(self, now: tuple, inputs: Sequence[Tensor]) -> None:
        """Forget what was captured."""
        self._now, self._calls, self._outputs, self._fed = now, 0, None, []
        if self._states is None or self._states.tensors[0].shape != inputs[self.layout.states[0]].shape:
            self._states = self._new_states(inputs)

    def _new_states(self, inputs: Sequence[Tensor]) -> States:
        return States(inputs[self.layout.states[0]], len(self.layout.states))

    def _run(self, inputs: Sequence[Tensor], states: States) -> list[Any]:
        """The step, from the lengths on."""
        inputs = list(inputs)
        states.take([inputs[i] for i in self.layout.states])
        for i, state in zip(self.layout.states, states.tensors, strict=True):
            inputs[i] = state
        return list(self.compiled(*inputs, states.lengths))

    def _is_time(self) -> bool:
        """Whether the step is to be captured."""
        return self._calls >= (1 if self._replays >= WORTH else TRIALS) and not self._fails

    def _capture(self, inputs: Sequence[Tensor]) -> bool:
        """Capture the step, which does not run it. Whether that could be done."""
        static = list(inputs)
        try:
            for i in self.layout.fed:
                static[i] = torch.empty_strided(inputs[i].shape, inputs[i].stride(), dtype=inputs[i].dtype, device=inputs[i].device)
                _fill(static[i], inputs[i])
            self._fed = [static[i] for i in self.layout.fed]
            self._graph, self._outputs = capture(lambda: self._run(static, self._states), inputs[0].device, self._graph)
        except Exception as error:  # whatever a model does that a CUDA graph cannot hold: it runs without
            log.warning("a decode step stays without a CUDA graph: %s", error)
            self._fails, self._graph, self._fed = True, None, []
            return False
        self._replays = 0
        return True


def _fill(copy: Tensor, x: Tensor) -> None:
    """`copy_`, also where one number is in several places."""
    for dim, stride in enumerate(copy.stride()):
        if stride == 0:
            copy, x = copy.narrow(dim, 0, 1), x.narrow(dim, 0, 1)
    copy.copy_(x)


def stream_of(device: torch.device) -> int:
    """The current stream, by its address."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def is_capturing(device: torch.device) -> bool:
    """Whether the caller captures a CUDA graph of its own."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


_one = threading.Lock()
"""Held by who captures: torch knows one capture at a time."""
_threads: WeakSet[threading.Thread] = WeakSet()


def is_alone() -> bool:
    """Whether of the threads that are alive only this one has run steps. While a graph is captured, torch refuses random numbers
    on its device to all other threads, and another that decodes may sample."""
    with _one:
        _threads.add(threading.current_thread())
        return sum(thread.is_alive() for thread in _threads) == 1


@dataclass
class SideGraph:
    """A CUDA graph, and the stream on which it was captured: cuBLAS keeps a workspace for each stream that it has seen, so that
    this one's lies in the graph's memory, and nobody else writes there."""

    graph: torch.cuda.CUDAGraph
    stream: torch.cuda.Stream

    def replay(self) -> None:
        self.graph.replay()


def capture(run: Callable[[], list[Any]], device: torch.device, old: SideGraph | None) -> tuple[SideGraph, list[Any]]:
    """A CUDA graph of `run`, in the memory of an `old` one, and what it returns. Other than `torch.cuda.graph` it neither
    collects garbage nor gives memory back, which takes longer than the capture."""
    graph, side, collects = torch.cuda.CUDAGraph(), torch.cuda.Stream(device) if old is None else old.stream, gc.isenabled()
    with _one, torch.cuda.device(device):
        side.wait_stream(torch.cuda.current_stream())
        gc.disable()  # what it might free must not be freed now
        try:
            with torch.cuda.stream(side):
                try:
                    graph.capture_begin(*(() if old is None else (old.graph.pool(),)), capture_error_mode="thread_local")
                    outputs = run()
                    graph.capture_end()
                except BaseException:  # Ctrl-C, too
                    compat.abandon_capture(graph, device)
                    raise
        finally:
            if collects:
                gc.enable()
        torch.cuda.current_stream().wait_stream(side)
    return SideGraph(graph, side), outputs
