"""Every tuning choice of the kernels, in one place. Nothing is measured at run time, and a length chooses between two tiles of
the scores only (`scores_tuning`)."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class ScoresTuning:
    columns: int
    """Keys per program: the columns of the product, which halve how often queries are read with each doubling."""
    queries: int
    """Queries per step of the loop: the rows of the product."""
    warps: int
    stages: int


MANY_KEYS = 2 * 132 * 256
"""Keys, of all heads and batch rows, from which programs of 256 keys occupy an H200 (132 multiprocessors) twice."""
WIDE_BYTES = 113 * 1024
"""Shared memory of such a program."""


def scores_tuning(head_dim: int, itemsize: int, keys: int = 0) -> ScoresTuning:
    """Tiles of the column-sum pass by bytes of a head, and by keys of all heads and batch rows."""
    if head_dim * itemsize <= 256:
        if itemsize == 2 and keys >= MANY_KEYS:
            # The widest product: queries are read, and multiplied from shared memory, half as often, which is less heat,
            # too: an H200 keeps its highest clock. Two programs of 255 registers fit on a multiprocessor; what they spill is
            # used beside the loop that counts, at the diagonal.
            return ScoresTuning(columns=256, queries=64, warps=4, stages=3)
        # About 150 registers and 64 KiB of shared memory: room for three programs on a multiprocessor, so that some are
        # at exp2 while another is at the product.
        return ScoresTuning(columns=128, queries=64, warps=4, stages=2)
    if head_dim * itemsize <= 512:
        # Half the keys, so that they and the queries in flight fit in shared memory.
        return ScoresTuning(columns=64, queries=64, warps=4, stages=2)
    # fp32 heads of 1 KiB, each split into two TF32 operands.
    return ScoresTuning(columns=64, queries=16, warps=4, stages=1)


@dataclass(frozen=True)
class CompressTuning:
    contracted: int = 128
    """Channels per step of the rotation's product."""
    warps: int = 8
    registers: int | None = 128
    """Limit per thread: two programs on a multiprocessor, one of which loads while the other computes."""


def compress_tuning(itemsize: int) -> CompressTuning:
    """By bytes of a value."""
    if itemsize == 2:
        return CompressTuning()
    # fp32: operands are split into TF32 parts, in smaller steps, so that they fit.
    return CompressTuning(contracted=32, registers=None)


FEW_ROWS = 64
"""Query rows, of all heads and batch rows, up to which a decode step counts as small: one sequence or two."""


@dataclass(frozen=True)
class AttendTuning:
    rows: int = 16
    """Query rows (head in the group, new token) per item, at most: they share what is read."""
    min_rows: int = 8
    """The narrowest matrix instruction's columns."""
    unit: int = 32
    """Dense tokens per step of the loop, and per unit of work."""
    programs: int = 8
    """Programs per multiprocessor, of one warp each: as many as run at once (255 registers a thread allow 8), so that
    all end together."""
    stages: int = 2
    """Triton keeps `stages - 1` blocks in shared memory. With 2 it asks for the next block at the end of a step: a
    program waits for it, and only other programs hide that."""
    registers: int | None = None
    """Limit per thread; None for the compiler's 255."""
    sides: int = 1
    """1 or 2, where half of a product's columns is free: parts of a block's tokens that share a step of the loop, side by
    side. Each has its own columns, with the same query rows: fewer exponentials and sums of columns without a query."""
    prepare_columns: int = 32
    """Channels per program that rotates q."""
    merge: tuple[tuple[int | None, int, int, int], ...] = (
        (FEW_ROWS, 1, 64, 256), (256, 1, 128, 128), (None, 16, 128, 8),
    )  # fmt: skip
    """By query rows, at most (None: any number): rows and channels per merging program, and parts of a row that it
    loads at once. Few rows have many parts each; programs of many rows share the load of the rotation."""


def attend_tuning(
    head_dim: int, itemsize: int, block_bytes: float = 0, query_rows: int = 2**31, free_columns: bool = False, folds: float = 0
) -> AttendTuning:
    """By bytes of a head, as it enters the dense region's products, and of a tier block, keys and values; by query rows
    of all heads and batch rows; by whether those of one KV head leave half of a product's columns free (`free_columns`); by
    how many operands a block's scales are folded into (`folds`)."""
    # Output, q and words grow with the head: fewer rows and tokens at once, or they would not fit in registers.
    wide = {} if head_dim * itemsize <= 256 else dict(rows=8, unit=16, merge=((FEW_ROWS, 1, 32, 64), (None, 16, 32, 4)))
    # A third stage hides the wait for memory, a fifth of the loop without it, where eight programs still fit. Programs
    # with a few blocks each gain nothing by a longer start, unless blocks are small (64 channels at 2 bits).
    most = 10 if query_rows > FEW_ROWS and head_dim * itemsize <= 256 else 5  # KiB
    # Value words of 64 channels at 2 bits have 8 rows, half of an operand, which a second side's fill. Of many groups, two
    # meet in the columns of one fold. Larger blocks of few groups gain nothing by two sides (within 4% at 128 channels, 6%
    # slower at 4 bits).
    sides = 2 if free_columns and block_bytes > 0 and (block_bytes <= 5 * 1024 or folds >= 8) else 1
    third = 0 < block_bytes <= most * 1024
    stages = 3 if third else 2
    # Besides blocks, about what operands need on their way from one layout to another.
    shared = (stages - 1) * block_bytes + (24 if third else 32) * head_dim * itemsize
    programs = max(1, min(8, int(224 * 1024 // (shared + 1024))))
    return AttendTuning(programs=programs, stages=stages, sides=sides, **wide)


def merge_tuning(rows: int, tuning: AttendTuning) -> tuple[int, int, int]:
    """(rows, channels, parts) of the merging programs; see `AttendTuning.merge`."""
    return next(sizes for most, *sizes in tuning.merge if most is None or rows <= most)


def template_tunings(
    head_dim: int, itemsize: int, block_bytes: float, query_rows: int, free_columns: bool, folds: float, measure: bool
) -> list[AttendTuning]:
    """What Inductor chooses from in a compiled graph: the table's choice, and where it is to measure
    (`mode="max-autotune"`) also what came near it on some shape. Not more: each takes seconds to compile."""
    table = attend_tuning(head_dim, itemsize, block_bytes, query_rows, free_columns, folds)
    if not measure:
        return [table]
    others = [
        replace(table, stages=5 - table.stages),  # one more or one less: within 10% on an H200, by shape
        replace(table, programs=max(1, table.programs // 2)),  # where shared memory, not registers, is what is short
    ]
    return list(dict.fromkeys([table, *others]))


ATTEND_VARIANTS: dict[str, dict[str, object]] = {
    "sides1": dict(sides=1),
    "sides2": dict(sides=2),
    "stages2": dict(stages=2),
    "stages3": dict(stages=3),
    "stages3-programs6": dict(stages=3, programs=6),
    "programs4": dict(programs=4),
    "programs5": dict(programs=5),
    "programs12-reg168": dict(programs=12, registers=168, stages=2),  # about 150 bytes of spills
    "programs12-reg168-stages3": dict(programs=12, registers=168, stages=3),
    "programs10-reg200": dict(programs=10, registers=200),
    "programs16": dict(programs=16),
    "merge1": dict(merge=((None, 1, 128, 128),)),
    "merge16": dict(merge=((None, 16, 128, 8),)),
}
"""What `benchmarks/kernel_times.py --tune` measures beside the table's choice: changes to `attend_tuning`."""
