"""`minikv_backend`: the torch.compile backend."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.fx import GraphModule

from . import compat
from .config import MiniKVConfig
from .passes import step
from .passes.desugar import desugar
from .passes.graph import example
from .passes.layers import GRAPHS
from .passes.rewrite import RewriteError, Rewriter, SiteReport
from .stepgraph import StepGraph
from .tensor import KVTensor

log = logging.getLogger("minikv")

_rewritten: dict[tuple[int, ...], tuple[weakref.ref[torch.Tensor], ...]] = {}
"""The parameters of each graph in which a site was rewritten, by their ids: how `is_active` knows a model."""


class MiniKVBackend:
    """A torch.compile backend that rewrites attention and its KV cache, then compiles with `inner`.

    Args:
        config: what to keep: a `MiniKVConfig`, the name of a preset, or None for `default`.
        inner: "inductor", the name of another registered backend ("eager" for quick tests), or a callable
            `(GraphModule, example_inputs) -> callable`.

    Attributes:
        graphs: for each compiled graph that holds attention, what became of its sites.
    """

    def __init__(self, config: MiniKVConfig | str | None = None, inner: str | Callable = "inductor"):
        if isinstance(config, GraphModule):
            raise TypeError("The backend is an object: backend=MiniKVBackend(), not the class.")
        self.config = MiniKVConfig.of(config)
        if not isinstance(inner, str) and not callable(inner):
            raise TypeError(f"inner must be the name of a backend or a callable, not {type(inner).__name__}.")
        self.inner = inner
        self.graphs: list[list[SiteReport]] = []
        self.records = True  # whether what it rewrites makes a model active

    def __call__(
        self, module: GraphModule, example_inputs: Sequence[Any], *, mode: str | None = None,
        options: dict[str, Any] | None = None, **unused: Any,
    ) -> Callable:  # fmt: skip
        """Compile one Dynamo graph. `mode` and `options` go to `inner` when it is "inductor", and mean nothing elsewhere.

        Raises:
            RewriteError: gradients are on, a cache of another configuration came in, or, with `strict`, a site that
                cannot be rewritten.
        """
        compat.allow_graphs(GRAPHS)
        inner = compat.inner_compiler(self.inner, mode, options)
        originals = [node for node in module.graph.nodes if node.op == "placeholder"]
        if os.environ.get("MINIKV_DISABLE") == "1" and not any(isinstance(example(n), KVTensor) for n in originals):
            return inner(module, example_inputs)
        rewriter = Rewriter(module, self.config, self.inner == "inductor", example_inputs)
        rewritten = rewriter.run()
        if not rewritten.sites and not rewritten.outputs_changed:
            return inner(module, example_inputs)
        self._report(rewritten.sites)
        if not rewritten.outputs_changed:
            return inner(module, example_inputs)
        self._check_gradients(example_inputs)
        inputs, boundary = desugar(rewritten, rewriter.originals, example_inputs, self.config, self._replays(mode, options))
        inputs = [compat.settled(x) for x in inputs]
        if boundary.step is None:
            inner = compat.inner_compiler(self.inner, mode, {**compat.CONTRACTED, **(options or {})})
            boundary.compiled = inner(rewritten.module, inputs)
        else:  # one CUDA graph, in the place of those that `mode` may ask for
            inner = compat.inner_compiler(self.inner, mode, {**(options or {}), "triton.cudagraphs": False})
            boundary.compiled = StepGraph(inner(rewritten.module, inputs), boundary.step)
        compat.leave_unguarded(node for node in originals if isinstance(example(node), KVTensor))
        if self.records:
            places = [i for i, x in enumerate(example_inputs) if isinstance(x, torch.nn.Parameter)]
            if places:
                boundary.parameters, boundary.on_model = (places[0], places[-1]), partial(_record, places)
        return boundary

    def _replays(self, mode: str | None, options: dict[str, Any] | None) -> set[str]:
        """Kinds of devices on which a decode step may run as a CUDA graph. Of other compilers, nobody knows."""
        refused = mode == "max-autotune-no-cudagraphs" or (options or {}).get("triton.cudagraphs") is False
        return step.DEVICES if self.inner in ("inductor", "eager", "aot_eager") and not refused else set()

    def _check_gradients(self, example_inputs: Sequence[Any]) -> None:
        if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in example_inputs):
            raise RewriteError(
                "MiniKV compresses the cache of a model that generates, it has no gradients: call the model under "
                "torch.no_grad() or torch.inference_mode()."
            )

    def _report(self, sites: list[SiteReport]) -> None:
        self.graphs.append(sites)
        taken = [site for site in sites if site.rewritten]
        reasons: dict[str, SiteReport] = {}
        for site in sites:
            if not site.rewritten:
                reasons.setdefault(site.reason, site)
        compat.count(rewritten=len(taken), skipped=len(sites) - len(taken))
        became = f"{len(taken)} rewritten"
        if taken:
            kinds, share = ", ".join(sorted({site.kind for site in taken})), self.config.share_of_dense
            became += f" ({kinds}; their long caches take {share:.1%} of dense)"
        log.info("%d attention sites, %s, %d left alone", len(sites), became, len(sites) - len(taken))
        for reason, site in reasons.items():
            message = f"site {site.layer} ({site.where}) keeps the model's own attention, uncompressed: {reason}"
            wanted = reason == "listed in skip_layers"
            if self.config.strict and not wanted:
                raise RewriteError(message)
            log.log(logging.INFO if taken or wanted else logging.WARNING, message)

    def __repr__(self) -> str:
        return f"MiniKVBackend({self.config}, inner={self.inner!r})"


def _record(places: list[int], args: Sequence[Any]) -> None:
    for ids, refs in list(_rewritten.items()):
        if any(ref() is None for ref in refs):
            del _rewritten[ids]
    _rewritten[tuple(id(args[i]) for i in places)] = tuple(weakref.ref(args[i]) for i in places)


minikv_backend = MiniKVBackend()
"""The backend with the preset `default`; also `torch.compile(model, backend="minikv")`."""


def compile(model: torch.nn.Module, config: MiniKVConfig | str | None = None, **kwargs: Any) -> torch.nn.Module:
    """Compile `model.forward` in place with a MiniKV backend, so that `model(...)` and `model.generate(...)` use it.

    Args:
        config: a `MiniKVConfig`, the name of a preset, or None for `default`.
        kwargs: for `torch.nn.Module.compile`, or `inner` for `MiniKVBackend`.

    Returns:
        the model itself.
    """
    inner = kwargs.pop("inner", "inductor")
    model.compile(backend=MiniKVBackend(config, inner), **kwargs)
    return model


def is_active(model: torch.nn.Module) -> bool:
    """Whether a forward pass of `model` has run through a graph that a MiniKV backend rewrote.

    `torch.compile(model, backend=...).generate(...)` compiles nothing: then this is False.
    """
    mine = {id(p): p for p in model.parameters()}
    # All of them: one may be another model's too.
    return any(all(ref() is not None and mine.get(id(ref())) is ref() for ref in refs) for refs in _rewritten.values())
