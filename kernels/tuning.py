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
    contracted: int = 32
    """Channels per step of the rotation's product."""
    warps: int = 8
    stages: int = 2


COMPRESS = CompressTuning()


@dataclass(frozen=True)
class AttendTuning:
    rows: int = 16
    """Query rows (head in the group, new token) per program, at most: they share what is read."""
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
    """Triton keeps `stages - 1` blocks in shared memory and asks for the next one at the end of a step. With 2, a program
    waits for each block and only other programs hide that; with 3, it has a whole step's time, for 8 KiB more (2 bits)."""
    registers: int | None = None
    """Limit per thread; None for the compiler's 255, with which 8 programs fit on a multiprocessor."""


def attend_tuning(head_dim: int, itemsize: int) -> AttendTuning:
    """By bytes of a head, as it enters the dense region's products."""
    if head_dim * itemsize <= 256:
        return AttendTuning()
    # Output, q and words grow with the head: fewer rows and tokens at once, or they would not fit in registers.
    return AttendTuning(rows=8, dense_step=16)


ATTEND_VARIANTS: dict[str, dict[str, int]] = {
    "stages2": dict(stages=2),
    "stages2-reg168": dict(stages=2, registers=168),  # 11 programs on a multiprocessor; spills about 150 bytes
    "stages2-reg168-waves22": dict(stages=2, registers=168, waves=22),
    "stages2-reg128-waves24": dict(stages=2, registers=128, waves=24),
    "stages4": dict(stages=4),
    "waves8": dict(waves=8),
    "waves32": dict(waves=32),
    "blocks4": dict(min_blocks=4),
    "blocks16": dict(min_blocks=16),
}
"""What `benchmarks/kernels.py --tune` measures beside the table's choice: changes to `attend_tuning`."""


def attend_blocks_per_split(capacity: int, programs_per_split: int, multiprocessors: int, tuning: AttendTuning) -> int:
    """Tier blocks per split, from the tier's *capacity* (never its length, which is on the device)."""
    splits = max(1, tuning.waves * multiprocessors // programs_per_split)
    return max(tuning.min_blocks, triton.cdiv(capacity, splits))
