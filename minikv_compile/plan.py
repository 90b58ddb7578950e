"""What fits a GPU's memory: which batch of a prompt, and which prompt, by method.

Nothing here says what a cache takes. The caches are made, by the code that allocates them, for a model without data (on
torch's meta device), and their storages are counted; so is what is alive while the model reads a prompt.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache, PreTrainedModel

from . import compat
from .backend import MiniKVBackend
from .cache import MiniKVCache, what_layers_keep
from .config import MiniKVConfig
from .kernels.packing import BLOCK
from .measure import FULL, parse_method
from .shapes import weight_bytes


@dataclass(frozen=True)
class Fit:
    """What fits under one method; sizes in bytes, lengths in tokens."""

    method: str
    cache_bytes: int
    """Of one row of the prompt and its reply: exact."""
    reading_bytes: int
    """The most that is alive beside weights and caches while one row of the prompt is read: an estimate."""
    total_bytes: int
    """Of one row: weights, cache and reading."""
    largest_batch: int
    """Of rows of the prompt. 0: not one."""
    longest_prompt: int
    """Of one row, in whole blocks of 128 tokens. 0: not one block."""


class Planner:
    """The memory of a model's caches under one method, without a GPU.

    Prompts are read row by row: into a cache for one row, which is copied into the one for all (at one row there is one), or,
    where nothing is compressed, each layer into its place.
    """

    def __init__(self, model: PreTrainedModel, method: str, new_tokens: int):
        """
        Args:
            model: on the meta device.
            method: "full" or a preset, changed or not.
            new_tokens: of a reply: what a cache has room for besides the prompt.

        Raises:
            ConfigError: unknown method.
        """
        self.model, self.method, self.new_tokens = model, method, new_tokens
        self.config = parse_method(method)
        self.cache_bytes = lru_cache(None)(self._cache_bytes)

    @cached_property
    def weights(self) -> int:
        return weight_bytes(self.model)

    def make_cache(self, batch: int, prompt: int) -> MiniKVCache:
        """A cache of fixed capacity for `batch` rows; the dense one has every layer skipped."""
        config = self.config or MiniKVConfig(skip_layers=tuple(range(self.model.config.num_hidden_layers)))
        return MiniKVCache(self._seen, prompt + self.new_tokens, batch, config, self.new_tokens)

    @cached_property
    def _seen(self) -> list[Any]:
        return what_layers_keep(self.model)

    def _cache_bytes(self, batch: int, prompt: int) -> int:
        return held_bytes(self.make_cache(batch, prompt))

    def reading_bytes(self, prompt: int) -> int:
        """The most bytes alive beside weights and caches while a row is read: in eager mode for the dense cache, through
        the backend for the others. Kernels' own scratch is not in it.

        Raises:
            ValueError: Dynamo cannot compile the model as one graph.
        """
        ids = torch.zeros(1, prompt, dtype=torch.int64, device="meta")
        if self.config is None:
            # A dynamic cache, as long as the prompt, is among what is alive.
            held = ids, *self.model.parameters(), *self.model.buffers()
            peak = compat.most_memory(_without_attention(self._read), (self.model.forward, ids, DynamicCache()), held)
            return peak - held_bytes(self._dense_row(prompt))
        peaks: list[int] = []

        def inner(module: Any, example_inputs: Any) -> Callable:
            def run(*args: Any) -> Any:
                peaks.append(compat.most_memory(_without_attention(lambda: module(*args)), (), args))
                raise _Read  # what is done with a graph's results looks at data

            return run

        forward = type(self.model).forward.__get__(self.model)
        compiled = torch.compile(forward, backend=MiniKVBackend(self.config, inner), fullgraph=True)
        try:
            with suppress(_Read):
                self._read(compiled, ids, self.make_cache(1, prompt))
        except RuntimeError as error:  # of Dynamo
            raise ValueError(f"{type(self.model).__name__} is not compiled as one graph: {error}") from error
        finally:
            torch.compiler.reset()
        return peaks[0]

    def _dense_row(self, prompt: int) -> MiniKVCache:
        planner = Planner(self.model, self.method, new_tokens=0)
        return planner.make_cache(1, prompt)

    @staticmethod
    def _read(forward: Callable, ids: Tensor, cache: Any) -> None:
        with torch.no_grad():
            forward(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

    def total_bytes(self, batch: int, prompt: int, reading: int) -> int:
        """The most bytes alive with `batch` rows of so many tokens, of which reading one takes `reading`."""
        row = self.cache_bytes(1, prompt) if batch > 1 and self.config is not None else 0
        return self.weights + self.cache_bytes(batch, prompt) + row + reading

    def fit(self, memory: int, prompt: int) -> Fit:
        """What fits `memory` bytes.

        Raises:
            ValueError: as `reading_bytes`, or the model has no cache of this kind (`MiniKVCache`).
        """
        reading = self.reading_bytes(prompt)

        def total(batch: int, length: int) -> int:
            # What is read grows with the length; a weight's or a constant's share of it is nothing.
            return self.total_bytes(batch, length, -(-reading * length // prompt))

        free = max(memory - self.weights, 0)
        one = self.cache_bytes(1, prompt)
        return Fit(
            self.method, one, reading, total(1, prompt),
            most(lambda rows: total(rows, prompt), memory, free // one + 1),
            most(lambda blocks: total(1, blocks * BLOCK), memory, free * prompt // (reading * BLOCK) + 1) * BLOCK,
        )  # fmt: skip


def most(total: Callable[[int], int], limit: int, top: int) -> int:
    """The largest number up to `top` whose `total`, which grows, is at most `limit`; 0 if there is none."""
    return bisect_right(range(1, top + 1), limit, key=total)


def held_bytes(cache: Any) -> int:
    """Bytes of the storages of all tensors that a cache's layers hold."""
    storages = {}
    for layer in cache.layers:
        for held in vars(layer).values():
            for x in held if isinstance(held, (list, tuple)) else [held]:
                if isinstance(x, Tensor):
                    storages[id(x)] = x.untyped_storage().nbytes()
    return sum(storages.values())


class _Read(Exception):
    """A prompt was read."""


class _NoAttention(TorchFunctionMode):
    """`scaled_dot_product_attention` gives a result of the right shape: on the meta device it would be written out with
    all its scores, which no kernel for a GPU holds."""

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is F.scaled_dot_product_attention:
            query, _, value = (*args, *(kwargs or {}).values())[:3]
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        return function(*args, **(kwargs or {}))


def _without_attention(call: Callable) -> Callable:
    def run(*args: Any) -> Any:
        with _NoAttention():
            return call(*args)

    return run


UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_bytes(text: str) -> int:
    """ "80GB", "24 GiB", "1.5e9": a number of bytes.

    Raises:
        ValueError: anything else.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:e\d+)?)\s*([kmgt]i?)?b?\s*", text, re.IGNORECASE)
    if not found:
        raise ValueError(f"{text!r}: must be bytes, as in 80GB or 24GiB")
    return int(float(found[1]) * UNITS[(found[2] or "").lower()])


def parse_tokens(text: str) -> int:
    """ "131072", "128k", "1M": a number of tokens; k is 1024.

    Raises:
        ValueError: anything else, or 0.
    """
    found = re.fullmatch(r"\s*(\d+)\s*([km])?\s*", text, re.IGNORECASE)
    if not found or not int(found[1]):
        raise ValueError(f"{text!r}: must be tokens, as in 8192, 128k or 1M")
    return int(found[1]) * {"": 1, "k": 2**10, "m": 2**20}[(found[2] or "").lower()]


def plan_table(fits: list[Fit], head: str, positions: int | None) -> Table:
    """What fits, beside the dense cache. `positions`: how many tokens the model knows the places of."""
    shown = Table(title=head)
    one_row = "cache GiB", "of dense", "with weights, reading"
    for name in ("method", *one_row, "largest batch", "longest prompt"):
        shown.add_column(name, justify="right")
    dense = next((fit for fit in fits if fit.method == FULL), None)
    for fit in fits:
        share = f"{fit.cache_bytes / dense.cache_bytes:.1%}" if dense else ""
        shown.add_row(
            fit.method, f"{fit.cache_bytes / 2**30:.2f}", share, f"{fit.total_bytes / 2**30:.2f}",
            f"{fit.largest_batch:,}", f"{fit.longest_prompt:,}",
        )  # fmt: skip
    shown.caption = "GiB of one row; the longest prompt that is alone"
    if positions and any(fit.longest_prompt > positions for fit in fits):
        shown.caption += f". The model's positions end at {positions:,}"
    return shown
