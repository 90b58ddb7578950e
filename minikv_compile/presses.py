"""kvpress's methods, for `minikv bench`: imported without the package's own `__init__`, which patches transformers and
needs more than a press does, and told of positions as it expects from the transformers that it was written for."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch

PRESSES = {"kvpress-snapkv": ("snapkv_press", "SnapKVPress"), "kvpress-pyramidkv": ("pyramidkv_press", "PyramidKVPress")}
"""Module and class of each method."""
KEPT = 0.5
"""The share of the prompt that is kept where none is named."""


def kept_share(method: str) -> float:
    """Of "kvpress-snapkv:kept=0.2".

    Raises:
        ValueError: anything else than a share below 1.
    """
    _, colon, rest = method.partition(":")
    name, _, value = rest.partition("=")
    try:
        share = float(value) if colon else KEPT
    except ValueError:
        share = 0.0
    if (colon and name != "kept") or not 0 < share < 1:
        raise ValueError(f"{method!r}: takes the share of a prompt's tokens that it keeps, as in kvpress-snapkv:kept=0.2")
    return share


def is_installed() -> bool:
    return find_spec("kvpress") is not None


def make_press(method: str) -> Any:
    """The press of a method."""
    if "kvpress" not in sys.modules:
        package = ModuleType("kvpress")
        package.__path__ = list(find_spec("kvpress").submodule_search_locations)
        sys.modules["kvpress"] = package
    module, name = PRESSES[method.partition(":")[0]]
    return getattr(importlib.import_module(f"kvpress.presses.{module}"), name)(compression_ratio=1 - kept_share(method))


@contextmanager
def pressed(model: Any, press: Any) -> Iterator[None]:
    """While a prompt is read: each layer's cache is compressed when its attention is done."""

    def tell(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        # transformers no longer passes it on; a press asks it for whether this is a prompt.
        return args, {"cache_position": torch.arange(kwargs["hidden_states"].shape[1]), **kwargs}

    hooks = [layer.self_attn.register_forward_pre_hook(tell, with_kwargs=True) for layer in model.model.layers]
    try:
        with press(model):
            yield
    finally:
        for hook in hooks:
            hook.remove()
