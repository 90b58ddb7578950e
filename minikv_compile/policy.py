"""Policies: scores -> which prompt tokens each layer keeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .kernels.packing import BLOCK
from .kernels.select import highest

if TYPE_CHECKING:
    from .config import MiniKVConfig


def uniform(depth: float, layers: int) -> list[float]:
    """Every layer the same budget."""
    return [1.0] * layers


def pyramid(depth: float, layers: int) -> list[float]:
    """MiniKV's pyramid (section 3.2): relative budgets from `2 - 1 / depth` in the first layer down to `1 / depth` in
    the last, linear between, mean 1."""
    last = 1 / depth
    first = 2 - last
    return [first + (last - first) * i / max(layers - 1, 1) if layers > 1 else 1.0 for i in range(layers)]


LAYER_BUDGETS: dict[str, Callable[[float, int], list[float]]] = {"uniform": uniform, "pyramid": pyramid}


def in_tokens(amount: float | int, length: int) -> int:
    """A budget in tokens: a float is a share of `length`."""
    return min(round(amount * length) if isinstance(amount, float) else amount, length)


def layer_budgets(total: int, shares: Sequence[float], limit: int) -> list[int]:
    """Split `total` tokens over layers in proportion to `shares`, at most `limit` each.

    The sum is exactly `min(total, limit * layers)`: no token is lost to rounding, and what a saturated layer cannot
    use goes to the others, in proportion.
    """
    layers = len(shares)
    total = min(total, limit * layers)
    exact, open_layers = [0.0] * layers, set(range(layers))
    while open_layers:
        left = total - limit * (layers - len(open_layers))
        weight = sum(shares[i] for i in open_layers)
        for i in open_layers:
            exact[i] = left * (shares[i] / weight if weight > 0 else 1 / len(open_layers))
        saturated = {i for i in open_layers if exact[i] >= limit}
        if not saturated:
            break
        for i in saturated:
            exact[i] = limit
        open_layers -= saturated
    budgets = [int(value) for value in exact]
    # Largest remainders first; earlier layers win ties, so that a pyramid stays monotone.
    order = sorted(range(layers), key=lambda i: (budgets[i] - exact[i], i))
    for i in order[: total - sum(budgets)]:
        budgets[i] += 1
    return budgets


def heavy_hitter(scores: Tensor, length: int, layer: int, layers: int, config: MiniKVConfig) -> Tensor:
    """Sinks, the newest `recent` tokens and, of the rest, the `heavy` tokens with the highest scores.

    (H2O, arXiv 2306.14048; MiniKV section 3.1.) Each KV head chooses its own heavy hitters, by scores summed over its
    query heads.
    """
    recent = in_tokens(config.recent, length)
    sinks = min(config.sinks, length - recent)
    shares = LAYER_BUDGETS[config.layer_budget](config.pyramid_depth, layers)
    limit = length - recent - sinks
    heavy = layer_budgets(in_tokens(config.heavy, length) * layers, shares, limit)[layer]
    chosen = highest(scores[:, sinks : length - recent], heavy) + sinks
    position = torch.arange(length, device=scores.device).expand(scores.shape[0], -1)
    return torch.cat([position[:, :sinks], chosen, position[:, length - recent :]], -1)


POLICIES: dict[str, Callable[[Tensor, int, int, int, MiniKVConfig], Tensor] | None] = {
    "keep_all": None,
    "heavy_hitter": heavy_hitter,
}
"""`policy(scores [kv_heads, seq], length, layer, layers, config) -> index`: the kept tokens of one row of the batch,
int64 [kv_heads, kept], ascending, below `length`. Tokens at and past `length` are padding. None keeps all and needs no
scores."""


def select(scores: Tensor, lengths: Sequence[int], layer: int, layers: int, config: MiniKVConfig) -> list[Tensor]:
    """The prompt tokens that `layer` of `layers` keeps.

    Args:
        scores: fp32 [batch, kv_heads, seq], each row's valid tokens first.
        lengths: valid tokens of each row.

    Returns:
        for each row, int64 [kv_heads, kept], ascending.
    """
    policy = POLICIES[config.policy]
    assert policy is not None, "a policy that keeps all selects nothing"

    def row(scores: Tensor, n: int) -> Tensor:
        if n < config.sinks + config.window + BLOCK:  # nothing of it will be packed: dropping would save no byte
            return torch.arange(n, device=scores.device).expand(scores.shape[0], -1)
        return policy(scores, n, layer, layers, config)

    return [row(*pair) for pair in zip(scores, lengths, strict=True)]
