"""Policies: what a prompt token is worth, and which prompt tokens each layer keeps.

A policy of your own is a `Policy` with a `score`; `MiniKVConfig(policy=Mine())` takes it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .budget import COVERAGE, budget, covering
from .kernels.important import NO_TOKEN, distance_from_mean
from .kernels.packing import BLOCK
from .kernels.select import highest

if TYPE_CHECKING:
    from .config import MiniKVConfig


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


class Policy(ABC):
    """What a prompt token is worth. Sinks and the newest `recent` tokens are kept in any case; of the others each KV head
    of a layer keeps its `heavy` budget of those with the highest scores."""

    name: ClassVar[str]
    observes: ClassVar[str] = "nothing"
    """Whose attention `Prompt.attention` sums: "all" queries, the "last" `MiniKVConfig.observed` ones, or "nothing"."""

    @abstractmethod
    def score(self, prompt: Prompt, config: MiniKVConfig) -> Tensor:
        """fp32 [kv_heads, n]: more is kept first. What counts is the order; the layer budget "coverage" takes sums, too, and wants
        none below 0."""


class HeavyHitter(Policy):
    """Cumulative attention (H2O, arXiv 2306.14048; MiniKV section 3.1)."""

    name, observes = "heavy_hitter", "all"

    def score(self, prompt: Prompt, config: MiniKVConfig) -> Tensor:
        return prompt.attention


class QHitter(Policy):
    """Heavy hitters that also quantize well (Q-Hitter, MLSys 2024): half cumulative attention, half how narrow the ranges
    of the token's key and value are, each from 0 to 1 in its head; a few tokens count for their attention alone."""

    name, observes = "q_hitter", "all"
    weight: ClassVar[float] = 0.5
    """Of attention."""
    surest: ClassVar[float] = 0.07
    """The share of the tokens that attention alone chooses, as in the paper's code."""

    def score(self, prompt: Prompt, config: MiniKVConfig) -> Tensor:
        attention = _from_0_to_1(prompt.attention)
        friendly = 1 - (_from_0_to_1(_disparity(prompt.keys)) + _from_0_to_1(_disparity(prompt.values))) / 2
        score = self.weight * attention + (1 - self.weight) * friendly
        return _first(attention, self.surest, score)


def _disparity(x: Tensor) -> Tensor:
    """The range of each token's numbers, to which its quantization error is proportional: fp32 [kv_heads, n]."""
    return (x.amax(-1) - x.amin(-1)).float().nan_to_num(0.0, 0.0, 0.0)


def _from_0_to_1(x: Tensor) -> Tensor:
    low, high = x.aminmax(dim=-1, keepdim=True)
    return (x - low) / (high - low).clamp(min=torch.finfo(torch.float32).tiny)


def _first(by: Tensor, share: float, score: Tensor) -> Tensor:
    """Scores from 0 to 1, more for the share of each head's tokens that are the highest `by` something else."""
    first = by.topk(round(share * by.shape[1]), dim=-1).indices
    return score.scatter_add(1, first, torch.ones_like(score))


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


class HeavyOutlier(Policy):
    """Heavy hitters, behind a few tokens whose keys are far from the head's mean: a prompt's own attention does not say what a
    question after it will look for (docs/design.md)."""

    name, observes = "heavy_outlier", "all"
    outliers: ClassVar[float] = 0.03
    """The share of the tokens that their keys choose."""

    def score(self, prompt: Prompt, config: MiniKVConfig) -> Tensor:
        return _first(distance_from_mean(prompt.keys), self.outliers, _from_0_to_1(prompt.attention))


class Random(Policy):
    """The control: the same tokens in every run, others in every layer."""

    name = "random"

    def score(self, prompt: Prompt, config: MiniKVConfig) -> Tensor:
        device = prompt.keys.device
        generator = torch.Generator(device).manual_seed(prompt.layer)
        return torch.rand(prompt.keys.shape[:2], dtype=torch.float32, device=device, generator=generator)


KEEP_ALL = "keep_all"
OURS = (HeavyHitter(), QHitter(), ObservationWindow(), Recent(), KeyNorm(), KeyOutlier(), HeavyOutlier(), Random())
POLICIES: dict[str, Policy | None] = {
    KEEP_ALL: None,
    **{policy.name: policy for policy in OURS},
}
"""By name; None keeps all."""
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


def within_budget(scores: Tensor, length: int, layer: int, layers: int, config: MiniKVConfig) -> Tensor:
    """Sinks, the newest `recent` tokens and, of the rest, the `heavy` tokens with the highest scores.

    Args:
        scores: fp32 [kv_heads, at least `length`], none negative. What lies past `length` is padding.

    Returns:
        int64 [kv_heads, kept], ascending, below `length`.
    """
    sinks, heavy, recent = budget(length, layer, layers, config)
    among = scores[:, sinks : length - recent]
    if config.layer_budget == COVERAGE:
        heavy = min(heavy, covering(among, config.coverage))
    chosen = highest(among, heavy) + sinks
    position = torch.arange(length, device=scores.device).expand(scores.shape[0], -1)
    return torch.cat([position[:, :sinks], chosen, position[:, length - recent :]], -1)


def score(name: str, prompt: Prompt, config: MiniKVConfig) -> Tensor:
    """What policy `name` thinks of a prompt's tokens: fp32 [kv_heads, n], none negative.

    Raises:
        ValueError: the policy returns no tensor, or one of another shape.
    """
    policy = POLICIES[name]
    scores, expected = policy.score(prompt, config), (prompt.keys.shape[0], prompt.n)
    if not isinstance(scores, Tensor):
        hint = ' `prompt.attention` is None unless the class says `observes = "all"` or "last".' * (prompt.attention is None)
        raise ValueError(f"Policy {name!r}: scores are {scores!r}, must be a tensor {expected}.{hint}")
    if scores.shape != expected:
        raise ValueError(f"Policy {name!r}: scores are {tuple(scores.shape)}, must be {expected}.")
    return scores if policy in OURS else from_0(scores.float())


def from_0(scores: Tensor) -> Tensor:
    """Any fp32 scores as selection takes them, by their bits: those of a head with one below 0 become their ranks, ties included,
    because a difference would round (masks are often of -1e9). NaN is as low as -inf, and 0 where none is below."""
    known = scores.nan_to_num(-torch.inf, torch.inf, -torch.inf)
    ranks = torch.searchsorted(known.sort(-1).values, known).float()
    return torch.where((scores < 0).any(-1, keepdim=True), ranks, scores.nan_to_num(0.0) + 0.0)  # -0.0 has the sign bit


def important_tokens(
    prompts: Sequence[Prompt], kept: Sequence[Tensor] | None, packed: Sequence[int], counts: Sequence[int],
    config: MiniKVConfig,
) -> Tensor:  # fmt: skip
    """Which kept tokens are held apart from those of `config.bits`.

    Args:
        kept: of each row, int64 [kv_heads, n]: the tokens of the prompt that are kept; None for all.
        packed: of each row, how many tokens will be packed at `config.bits`: of those and of the important ones the choice
            is. The first ones, where none is packed.
        counts: of each row, how many are important.

    Returns:
        int64 [batch, kv_heads, most], ascending, NO_TOKEN behind rows of fewer: places among the kept tokens.
    """

    def candidates(b: int) -> Tensor:
        n, heads = packed[b] + counts[b], prompts[b].keys.shape[0]
        if not packed[b]:
            return torch.zeros(heads, n, dtype=torch.float32, device=prompts[b].keys.device)
        scores = score(config.importance, prompts[b], config)
        return (scores if kept is None else scores.gather(1, kept[b]))[:, config.sinks : config.sinks + n]

    rows = [candidates(b) for b in range(len(prompts))]
    if len(set(counts)) == 1 and counts[0]:
        # One selection for all: padding is worth less than any token.
        most = max(packed) + counts[0]
        scores = torch.cat([padded_to(row, most, -1.0) for row in rows])
        return highest(scores, counts[0]).unflatten(0, (len(rows), -1)) + config.sinks
    chosen = [
        highest(row, count) + config.sinks if count else row.new_empty(row.shape[0], 0, dtype=torch.int64)
        for row, count in zip(rows, counts, strict=True)
    ]
    return torch.stack([padded_to(row, max(counts), NO_TOKEN) for row in chosen])


def padded_to(x: Tensor, size: int, value: float) -> Tensor:
    """`x` with its last dimension of `size` at least; itself where it is. (`F.pad` would copy it.)"""
    missing = size - x.shape[-1]
    return x if missing <= 0 else F.pad(x, (0, missing), value=value)


def select(prompts: Sequence[Prompt], layer: int, layers: int, config: MiniKVConfig) -> list[Tensor]:
    """The prompt tokens that layer number `layer` of `layers` keeps: for each row, int64 [kv_heads, kept], ascending."""
    assert config.drops, "a policy that keeps all selects nothing"

    def row(prompt: Prompt) -> Tensor:
        pinned = config.pinned(config.important_tokens(prompt.n))
        if prompt.n < pinned + config.window + BLOCK:  # nothing of it will be packed: dropping would save no byte
            return torch.arange(prompt.n, device=prompt.keys.device).expand(prompt.keys.shape[0], -1)
        kept = within_budget(score(config.policy, prompt, config), prompt.n, layer, layers, config)
        # Attention needs a token to attend to.
        return kept if kept.shape[1] else kept.new_full((kept.shape[0], 1), prompt.n - 1)

    return [row(prompt) for prompt in prompts]
