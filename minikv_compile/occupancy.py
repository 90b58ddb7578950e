"""What the host knows of a storage."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .kernels.packing import BLOCK
from .kernels.state import IN_IMPORTANT, IN_TIER, OFFSET, PINNED

if TYPE_CHECKING:
    from .tensor import KVTensor


class Occupancy:
    """What the host knows of a storage without reading the device, shared by all tensors that look into it."""

    def __init__(self, offsets: list[int], blocks: list[int], pinned: list[int], important: list[int]):
        self.offsets = offsets  # of each row: `length - offset` tokens are in its dense region
        self.blocks = blocks  # of each row's tier, in use
        self.pinned = pinned  # tokens at the front of each row's dense region that no flush moves
        self.important = important  # tokens in each row's important tier
        self.oversized = False  # the dense region was enlarged for many new tokens at once
        self.full: int | None = None  # the length up to which tokens can be written as it is; None: not worked out
        self.not_finite = [0] * len(offsets)  # of each row: what its state may count without being news
        self._tensors: list[weakref.ref[KVTensor]] = []

    @classmethod
    def read(cls, state: list[list[int]]) -> Occupancy:
        """From the rows of a state."""
        offsets, in_tier, pinned, important = ([row[i] for row in state] for i in (OFFSET, IN_TIER, PINNED, IN_IMPORTANT))
        return cls(offsets, [tokens // BLOCK for tokens in in_tier], pinned, important)

    @property
    def rows(self) -> tuple[list[int], ...]:
        """What is known of each row, as `Occupancy` takes it."""
        return self.offsets, self.blocks, self.pinned, self.important

    def copy(self) -> Occupancy:
        copied = Occupancy(*map(list, self.rows))
        copied.oversized, copied.not_finite = self.oversized, list(self.not_finite)
        return copied

    def behind_pinned(self, length: int) -> list[int]:
        """Tokens in each row's dense region behind the pinned ones."""
        return [length - offset - pinned for offset, pinned in zip(self.offsets, self.pinned, strict=True)]

    def room(self, capacity: int) -> int:
        """Tokens that fit a dense region behind the pinned ones, whichever row."""
        return capacity - max(self.pinned)

    def add(self, tensor: KVTensor) -> None:
        self._tensors = [ref for ref in self._tensors if ref() is not None]
        self._tensors.append(weakref.ref(tensor))

    @property
    def shared(self) -> bool:
        """Whether more than one living tensor looks into the storage."""
        return len([ref for ref in self._tensors if ref() is not None]) > 1


def read_states(states: list[Tensor]) -> list[list[list[int]]]:
    """The rows of states; reads the device once."""
    if len({state.shape for state in states}) > 1:
        return [state.tolist() for state in states]
    return torch.stack([state.to(states[0].device) for state in states]).tolist()
