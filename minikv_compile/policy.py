"""Policies: what a prompt token is worth, and which prompt tokens each layer keeps.

A policy of your own is a `Policy` with a `score`; `MiniKVConfig(policy=Mine())` takes it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels.important import distance_from_mean
from .kernels.packing import BLOCK
from .kernels.select import highest

if TYPE_CHECKING:
    from .config import MiniKVConfig


def uniform(depth: float, layers: int) -> list[float]:
    """Every layer the same budget."""
    return [1.0] * layers


def pyramid(depth: float, layers: int) -> list[float]:
    """MiniKV's pyramid (section 3.2): relative budgets from `2 - 1 / depth` in the first layer down to `1 / depth` in
    the last, linear between, mean 1. (PyramidKV, arXiv 2406.02069, is the same with its beta, 20, as the depth.)"""
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


def layer_shares(config: MiniKVConfig, layers: int) -> Sequence[float]:
    """Each layer's budget relative to the others'.

    Raises:
        ValueError: an explicit list for another number of layers.
    """
    if isinstance(config.layer_budget, str):
        return LAYER_BUDGETS[config.layer_budget](config.pyramid_depth, layers)
    if len(config.layer_budget) != layers:
        raise ValueError(f"MiniKVConfig.layer_budget has {len(config.layer_budget)} shares, the model {layers} layers.")
    return config.layer_budget


@dataclass(frozen=True)
class Prompt:
    """One row's valid prompt tokens, n of them, in one layer."""

    n: int
    layer: int
    attention: Tensor | None
    """fp32 [kv_heads, n]: attention probabilities summed over the queries that the policy observes and over the query
    heads of each KV head; None for a policy that observes nothing."""
    _keys: Tensor
    _values: Tensor
    _order: Tensor | None

    @property
    def keys(self) -> Tensor:
        """[kv_heads, n, head_dim], after rotary embedding."""
        return self._tokens(self._keys)

    @property
    def values(self) -> Tensor:
        """[kv_heads, n, head_dim]."""
        return self._tokens(self._values)

    def _tokens(self, x: Tensor) -> Tensor:
        return x[:, : self.n] if self._order is None else x[:, self._order[: self.n]]


class Policy:
    """What a prompt token is worth. Sinks and the newest `recent` tokens are kept in any case; of the others each KV head
    of a layer keeps its `heavy` budget of those with the highest scores."""

    name: ClassVar[str]
    observes: ClassVar[str] = "nothing"
    """Whose attention `Prompt.attention` sums: "all" queries, the "last" `MiniKVConfig.observed` ones, or "nothing"."""

    def score(self, prompt: Prompt, config: MiniKVConfig) -> Tensor:
        """fp32 [kv_heads, n], none negative."""
        raise NotImplementedError


class HeavyHitter(Policy):
    """Cumulative attention (H2O, arXiv 2306.14048; MiniKV section 3.1)."""

    name, observes = "heavy_hitter", "all"

    def score(self, prompt: Prompt, config: MiniKVConfig) -> Tensor:
        return prompt.attention


class ObservationWindow(Policy):
    """Attention of the newest queries, the highest of `pool` neighbours: facts are kept whole (SnapKV, arXiv 2404.14469,
    section 4). What no question in the prompt asks for is lost."""

    name, observes = "observation_window", "last"

    def score(self, prompt: Prompt, config: MiniKVConfig) -> Tensor:
        return F.max_pool1d(prompt.attention[None], config.pool, stride=1, padding=config.pool // 2)[0]


class Recent(Policy):
    """Nothing but sinks and the newest tokens (StreamingLLM, arXiv 2309.17453)."""

    name = "recent"

    def score(self, prompt: Prompt, config: MiniKVConfig) -> Tensor:
        position = torch.arange(prompt.n, dtype=torch.float32, device=prompt.keys.device)
        return position.expand(prompt.keys.shape[0], -1)


class KeyNorm(Policy):
    """Keys of a small norm get much attention (arXiv 2406.11430)."""

    name = "key_norm"

    def score(self, prompt: Prompt, config: MiniKVConfig) -> Tensor:
        norm = prompt.keys.float().norm(dim=-1)
        return norm.amax(-1, keepdim=True) - norm


class KeyOutlier(Policy):
    """Keys far from the head's mean key: they set the ranges of their groups, and are what single queries look for
    (docs/design.md; OTT, arXiv 2505.10938, keeps such tokens unquantized too)."""

    name = "key_outlier"

    def score(self, prompt: Prompt, config: MiniKVConfig) -> Tensor:
        return distance_from_mean(prompt.keys)


class Random(Policy):
    """The control: the same tokens in every run, others in every layer."""

    name = "random"

    def score(self, prompt: Prompt, config: MiniKVConfig) -> Tensor:
        device = prompt.keys.device
        generator = torch.Generator(device).manual_seed(prompt.layer)
        return torch.rand(prompt.keys.shape[:2], dtype=torch.float32, device=device, generator=generator)


KEEP_ALL = "keep_all"
POLICIES: dict[str, Policy | None] = {
    KEEP_ALL: None,
    **{policy.name: policy for policy in (HeavyHitter(), ObservationWindow(), Recent(), KeyNorm(), KeyOutlier(), Random())},
}
"""By name; None keeps all."""
OURS = tuple(POLICIES.values())


OBSERVES = ("nothing", "all", "last")


def check_policy(policy: Policy) -> None:
    """Whether a policy can be known by its name.

    Raises:
        ValueError: no name, an unknown `observes`, or the name of another policy. (A configuration is text, in ops and
            in saved caches: a name stands for one policy only.)
    """
    name = getattr(policy, "name", None)
    if not isinstance(name, str) or not name:
        raise ValueError(f"{type(policy).__name__} needs a `name`, a text.")
    if policy.observes not in OBSERVES:
        raise ValueError(f"{name}: `observes` is {policy.observes!r}, must be one of {', '.join(OBSERVES)}.")
    known = POLICIES.get(name, policy)
    if known is not policy and (type(known) is not type(policy) or not _same_fields(known, policy)):
        raise ValueError(f"the name {name!r} is taken by another policy; give this one a name of its own.")


def _same_fields(a: Policy, b: Policy) -> bool:
    try:
        return bool(vars(a) == vars(b))
    except RuntimeError:  # tensors
        return False


def budget(length: int, layer: int, layers: int, config: MiniKVConfig) -> tuple[int, int, int]:
    """How many sinks, heavy and recent tokens of a prompt of `length` tokens layer number `layer` of `layers` keeps."""
    recent = in_tokens(config.recent, length)
    sinks = min(config.sinks, length - recent)
    limit = length - recent - sinks
    shares = layer_shares(config, layers)
    return sinks, layer_budgets(in_tokens(config.heavy, length) * layers, shares, limit)[layer], recent


def most_kept(length: int, layer: int, layers: int, config: MiniKVConfig) -> int:
    """About the most tokens that a layer keeps of any prompt of up to `length`: budgets in tokens saturate at short prompts,
    where other layers get what is left over. (About: not every length is tried.)"""
    if not config.drops:
        return length
    lengths = [length >> i for i in range(length.bit_length())]
    return max(sum(budget(n, layer, layers, config)) for n in lengths)


def within_budget(scores: Tensor, length: int, layer: int, layers: int, config: MiniKVConfig) -> Tensor:
    """Sinks, the newest `recent` tokens and, of the rest, the `heavy` tokens with the highest scores.

    Args:
        scores: fp32 [kv_heads, at least `length`], none negative. What lies past `length` is padding.

    Returns:
        int64 [kv_heads, kept], ascending, below `length`.
    """
    sinks, heavy, recent = budget(length, layer, layers, config)
    chosen = highest(scores[:, sinks : length - recent], heavy) + sinks
    position = torch.arange(length, device=scores.device).expand(scores.shape[0], -1)
    return torch.cat([position[:, :sinks], chosen, position[:, length - recent :]], -1)


def score(name: str, prompt: Prompt, config: MiniKVConfig) -> Tensor:
    """What policy `name` thinks of a prompt's tokens: fp32 [kv_heads, n], none negative.

    What a policy of the user's gives below 0, or as NaN, counts as 0.

    Raises:
        ValueError: the policy returns another shape.
    """
    policy = POLICIES[name]
    scores, expected = policy.score(prompt, config), (prompt.keys.shape[0], prompt.n)
    if scores.shape != expected:
        raise ValueError(f"Policy {name!r}: scores are {tuple(scores.shape)}, must be {expected}.")
    if policy in OURS:
        return scores
    return scores.float().nan_to_num(0.0).clamp(min=0.0) + 0.0  # selection orders by bits: -0.0 would be negative


def important_tokens(
    prompts: Sequence[Prompt], kept: Sequence[Tensor] | None, packed: Sequence[int], config: MiniKVConfig
) -> Tensor:
    """Which kept tokens are held unquantized beside the sinks.

    Args:
        kept: of each row, int64 [kv_heads, n]: the tokens of the prompt that are kept; None for all.
        packed: of each row, how many tokens will be packed: of those and of the important ones the choice is. The first
            ones, where none is packed.

    Returns:
        int64 [batch, kv_heads, important], ascending: places among the kept tokens.
    """

    def candidates(b: int) -> Tensor:
        n, heads = packed[b] + config.important, prompts[b].keys.shape[0]
        if packed[b]:
            scores = score(config.importance, prompts[b], config)
            scores = (scores if kept is None else scores.gather(1, kept[b]))[:, config.sinks : config.sinks + n]
        else:
            scores = torch.zeros(heads, n, dtype=torch.float32, device=prompts[b].keys.device)
        missing = max(packed) - packed[b]
        return F.pad(scores, (0, missing), value=-1.0) if missing else scores

    rows = [candidates(b) for b in range(len(prompts))]
    scores = rows[0] if len(rows) == 1 else torch.cat(rows)
    return highest(scores, config.important).unflatten(0, (len(rows), -1)) + config.sinks


def select(prompts: Sequence[Prompt], layer: int, layers: int, config: MiniKVConfig) -> list[Tensor]:
    """The prompt tokens that layer number `layer` of `layers` keeps: for each row, int64 [kv_heads, kept], ascending."""
    assert config.drops, "a policy that keeps all selects nothing"

    def row(prompt: Prompt) -> Tensor:
        if prompt.n < config.pinned + config.window + BLOCK:  # nothing of it will be packed: dropping would save no byte
            return torch.arange(prompt.n, device=prompt.keys.device).expand(prompt.keys.shape[0], -1)
        kept = within_budget(score(config.policy, prompt, config), prompt.n, layer, layers, config)
        # Attention needs a token to attend to.
        return kept if kept.shape[1] else kept.new_full((kept.shape[0], 1), prompt.n - 1)

    return [row(prompt) for prompt in prompts]
