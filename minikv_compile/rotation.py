"""Orthogonal rotations of the head dimension.

A rotation spreads an outlier channel over all channels, so that a group's range is set by its typical value. Keys and
values are rotated when they are compressed, the query at decode, the output once: `q @ k == (q @ R) @ (k @ R)` and
`p @ v == (p @ (v @ R)) @ R.T`. (Hadamard rotations for quantization: QuIP#, QuaRot.)
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

ROTATIONS = ("none", "hadamard")


def hadamard(dim: int) -> Tensor:
    """Orthogonal fp32 [dim, dim]: Sylvester's Hadamard matrix, block-diagonal in the powers of two of `dim`
    (80 = 64 + 16)."""
    blocks = []
    for power in reversed(range(dim.bit_length())):
        if dim >> power & 1:
            block = torch.ones(1, 1)
            for _ in range(power):
                block = torch.cat([torch.cat([block, block], 1), torch.cat([block, -block], 1)])
            blocks.append(block / block.shape[0] ** 0.5)
    return torch.block_diag(*blocks)


@lru_cache
def rotation_matrix(name: str, dim: int, device: torch.device) -> Tensor | None:
    """The matrix R of rotation `name`, fp32 [dim, dim] on `device`, or None for "none"."""
    return None if name == "none" else hadamard(dim).to(device)
