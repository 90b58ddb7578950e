"""Tokens that hold NaN or inf: who says so, and once."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .config import MiniKVConfig
from .kernels.state import NOT_FINITE, OFFSET, PINNED
from .occupancy import read_states

if TYPE_CHECKING:
    from .tensor import KVTensor


def report_not_finite(
    tensors: list[KVTensor], layers: list[int], states: list[list[list[int]]] | None = None, prompt: bool = False
) -> None:
    """Warn of keys and values of these layers that hold NaN or inf; raise if the configuration is strict. Tokens are
    counted in a prefill (`prompt`), and when they are flushed."""
    found = []
    states = states or read_states([kv.state for kv in tensors])
    for kv, layer, rows in zip(tensors, layers, states, strict=True):
        used = [kv.length - row[OFFSET] for row in rows]
        count, kv.occupancy.not_finite = news(rows, kv.occupancy.not_finite, kv.dense if prompt else None, used, kv.config)
        if count:
            found.append(f"{count} tokens in the {kv.role}s of layer {layer}")
    warn_not_finite(found, tensors[0].config.strict)


def news(
    state: list[list[int]], known: list[int], dense: Tensor | None, used: list[int], config: MiniKVConfig
) -> tuple[int, list[int]]:
    """How many tokens with NaN or inf a state counts beyond those that are `known` of each row, and what is known then.

    Args:
        dense, used: of a prompt, its dense region, and the tokens of each row in it. What waits there is counted, and will be
            counted again when it is flushed, which is before any later token is: so it is known already.
    """
    counts = [row[NOT_FINITE] for row in state]
    new = sum(max(count - before, 0) for count, before in zip(counts, known, strict=True))
    known = [max(pair) for pair in zip(counts, known, strict=True)]
    if new and dense is not None and config.bits < 16:
        slot, pinned = torch.arange(dense.shape[-2], device=dense.device), [row[PINNED] for row in state]
        first, end = (torch.tensor(rows, device=dense.device)[:, None] for rows in (pinned, used))
        waits = (slot >= first) & (slot < end)
        again = ((~dense.isfinite()).any(-1).any(1) & waits).sum(-1).tolist()
        known = [a + b for a, b in zip(known, again, strict=True)]
    return new, known


def warn_not_finite(found: list[str], strict: bool) -> None:
    """Say which tokens hold NaN or inf.

    Raises:
        ValueError: `strict`.
    """
    if not found:
        return
    message = (
        f"NaN or inf in {', '.join(found)}: quantized, each is stored as the nearest code of its group, and other tokens "
        "are not affected; sinks, important tokens, window and buffer hold it as it is. Check the model's dtype and weights."
    )
    if strict:
        raise ValueError(message)
    warnings.warn(message, stacklevel=2)
