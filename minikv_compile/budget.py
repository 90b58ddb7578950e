"""Budgets: how many prompt tokens each layer keeps.

Layers run one after the other, and a layer's dense keys and values die before the next ones are made. So no budget may
depend on what later layers score. Shares that are known beforehand divide a total; "coverage", which is measured, lets
each layer keep as little as its own scores allow, and no more than an equal share. (Weighed: two passes over the prompt, of
which the first only scores, take twice as long; packing too much in each layer and evicting when all have been scored
writes every block twice; handing what a layer leaves on to later ones favours the last layers, which need least.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from .kernels.packing import BLOCK

if TYPE_CHECKING:
    from .config import MiniKVConfig

COVERAGE = "coverage"
"""The layer budget that is measured from the prompt."""


def uniform(depth: float, layers: int, most: float = float("inf")) -> list[float]:
    """Every layer the same budget."""
    return [1.0] * layers


def pyramid(depth: float, layers: int, most: float = float("inf")) -> list[float]:
    """MiniKV's pyramid (section 3.2): relative budgets from `2 - 1 / depth` in the first layer down to `1 / depth` in
    the last, linear between, mean 1. What layers cannot use goes to the others, in proportion."""
    return _linear(2 - 1 / depth, layers)


def pyramidkv(depth: float, layers: int, most: float = float("inf")) -> list[float]:
    """PyramidKV's pyramid (arXiv 2406.02069, section 4.2; its beta is `depth`): the same line, but where the first layer's
    budget is more than there are tokens, the line is turned about its middle until it fits, and stays a line."""
    return _linear(min(2 - 1 / depth, max(most, 1.0)), layers)


def _linear(first: float, layers: int) -> list[float]:
    """From `first` down to `2 - first`."""
    return [first - 2 * (first - 1) * i / (layers - 1) for i in range(layers)] if layers > 1 else [1.0]


LAYER_BUDGETS: dict[str, tuple[Callable[[float, int, float], list[float]], float]] = {
    "uniform": (uniform, 1.0), "pyramid": (pyramid, 7.0), "pyramidkv": (pyramidkv, 20.0), COVERAGE: (uniform, 1.0),
}  # fmt: skip
"""By name: relative budgets as a function of the depth, the layers, and the most that one layer can keep, as a multiple of
the mean; and the paper's depth."""


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


def layer_shares(config: MiniKVConfig, layers: int, most: float) -> Sequence[float]:
    """Each layer's budget relative to the others'.

    Args:
        most: what one layer can keep at most, as a multiple of the mean.

    Raises:
        ValueError: an explicit list for another number of layers.
    """
    if isinstance(config.layer_budget, str):
        shares, depth = LAYER_BUDGETS[config.layer_budget]
        return shares(config.pyramid_depth or depth, layers, most)
    if len(config.layer_budget) != layers:
        raise ValueError(f"MiniKVConfig.layer_budget has {len(config.layer_budget)} shares, the model {layers} layers.")
    return config.layer_budget


def budget(length: int, layer: int, layers: int, config: MiniKVConfig) -> tuple[int, int, int]:
    """How many sinks, heavy (at most) and recent tokens of a prompt of `length` tokens layer number `layer` of `layers` keeps."""
    recent = in_tokens(config.recent, length)
    sinks = min(config.sinks, length - recent)
    limit, heavy = length - recent - sinks, in_tokens(config.heavy, length)
    shares = layer_shares(config, layers, limit / heavy if heavy else 1.0)
    return sinks, layer_budgets(heavy * layers, shares, limit)[layer], recent


def most_kept(length: int, layer: int, layers: int, config: MiniKVConfig) -> int:
    """About the most tokens that a layer keeps of any prompt of up to `length`: budgets in tokens saturate at short prompts,
    where other layers get what is left over. (About: not every length is tried.)"""
    if not config.drops:
        return length
    lengths = [length >> i for i in range(length.bit_length())]
    # Shorter prompts are kept whole (`policy.select`, `minikv::compress`).
    whole = max(config.min_prompt, config.pinned(config.important_tokens(length)) + config.window + BLOCK) - 1
    return max(min(length, whole), *(sum(budget(n, layer, layers, config)) for n in lengths))


def covering(scores: Tensor, share: float) -> int:
    """The fewest tokens that hold at least `share` of the sum of the scores in each head. (Waits for the device.)

    Args:
        scores: fp32 [kv_heads, n], none negative.
    """
    if not scores.shape[1]:
        return 0
    held = scores.double().sort(dim=-1, descending=True).values.cumsum(-1)
    short = held < share * held[:, -1:] * (1 - 1e-12)  # rounding may not ask for a token more
    return int((short.sum(-1) + (held[:, -1] > 0)).max())
