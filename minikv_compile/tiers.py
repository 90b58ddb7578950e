"""What the packed tokens of a `KVTensor` are: how they are grouped, which tensors hold them, and what attention is told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .config import MiniKVConfig
from .kernels.attend import Important


def grouping(config: MiniKVConfig, role: str, head_dim: int) -> tuple[int, str]:
    """Group size and axis of the keys or the values."""
    if role == "key" and config.key_axis == "token":
        return config.group, "token"
    return config.value_group(head_dim), "channel"


def tier_names(config: MiniKVConfig, role: str) -> list[str]:
    """Names of the tensors that say what the packed keys or values of a `KVTensor` are: codes, scale and zero of the tier,
    then of the important tier, then the balancer of the keys. Ops take them as one list."""
    if config.bits == 16:
        return []
    names = ["codes", "scale", "zero"]
    if config.two_tiers:
        names += [f"important_{name}" for name in names]
    return names + ["balancer"] * (config.balances and role == "key")


def attended(k_tier: Sequence[Tensor], v_tier: Sequence[Tensor], config: MiniKVConfig, dim: int) -> dict[str, Any]:
    """What `attend` is told of packed tokens but their rotation: by lists of `tier_names`."""
    k_group, k_axis = grouping(config, "key", dim)
    important = None
    if config.two_tiers:
        important = Important(tuple(k_tier[3:6]), tuple(v_tier[3:6]), config.important_bits)
    return dict(
        k_tier=tuple(k_tier[:3]) or None, v_tier=tuple(v_tier[:3]) or None, bits=config.bits, k_group=k_group,
        k_axis=k_axis, v_group=config.value_group(dim), balancer=k_tier[-1] if config.balances else None,
        important=important, noise=config.noise,
    )  # fmt: skip
