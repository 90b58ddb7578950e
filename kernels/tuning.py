"""Every tuning choice of the kernels, in one place. Nothing is tuned at run time: no choice depends on a length."""

from __future__ import annotations

from dataclasses import dataclass

import triton


@dataclass(frozen=True)
class ScoresTuning:
    columns: int
    """Keys per program. They are the rows of the product: 128 fill two of Hopper's 64-row instructions per warp group."""
    queries: int
    """Queries per step of the loop."""
    warps: int
    stages: int


def scores_tuning(head_dim: int, itemsize: int) -> ScoresTuning:
    """Tiles of the column-sum pass by bytes of a head."""
    if head_dim * itemsize <= 256:
        # One 128 x 64 fp32 tile is 64 registers a thread for four warps: room for two programs on a multiprocessor.
        return ScoresTuning(columns=128, queries=64, warps=4, stages=3)
    if head_dim * itemsize <= 512:
        # Half the keys, so that they and the queries in flight fit in shared memory.
        return ScoresTuning(columns=64, queries=64, warps=4, stages=2)
    # fp32 heads of 1 KiB, each split into two TF32 operands.
    return ScoresTuning(columns=64, queries=16, warps=4, stages=1)


@dataclass(frozen=True)
class CompressTuning:
    channels: int = 128
    """Channels per program, a power of two. A 128-token block of 128 channels is 64 KiB in fp32: 64 registers a thread
    for eight warps. Wider heads are split over programs."""
    contracted: int = 32
    """Channels per step of the rotation's product."""
    warps: int = 8
    stages: int = 2


COMPRESS = CompressTuning()


@dataclass(frozen=True)
class AttendTuning:
    rows: int = 16
    """Query rows (head in the group, new token) per program, at most. More would not leave registers for the output."""
    min_rows: int = 8
    """The narrowest matrix instruction's columns."""
    min_blocks: int = 8
    """Tier blocks per split, at least: a split's partial output (4 bytes times rows times head_dim) stays far below the
    bytes that it reads."""
    waves: int = 16
    """Programs per multiprocessor that splitting aims at: all that fit at once (one warp each), and as many again, so
    that uneven ones even out."""
    dense_tokens: int = 256
    """Dense tokens per split: as many bytes as about ten tier blocks."""
    dense_step: int = 32
    """Dense tokens per step of the loop."""
    merge_columns: int = 64
    """Output channels per merge program: it holds this slice of the rotation, times head_dim, in registers."""
    merge_splits: int = 16
    """Splits per step of the merge's loop."""
    warps: int = 1
    """One: a slice of a 2-bit block has 16 tokens, one warp's share of a matrix product, and a program of one warp needs
    no barriers."""
    stages: int = 3
    """Blocks in flight: two of them cover the memory's latency at about eight programs per multiprocessor."""


ATTEND = AttendTuning()


def attend_blocks_per_split(capacity: int, programs_per_split: int, multiprocessors: int, tuning: AttendTuning) -> int:
    """Tier blocks per split, from the tier's *capacity* (never its length, which is on the device)."""
    splits = max(1, tuning.waves * multiprocessors // programs_per_split)
    return max(tuning.min_blocks, triton.cdiv(capacity, splits))
