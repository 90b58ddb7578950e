"""Decode steps that `kernel_times.py` checks and times, and their inputs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import _path  # noqa: F401
import torch
import triton

from minikv_compile.kernels.attend import block_bytes, folds, free_columns
from minikv_compile.kernels.compress import compress_triton, empty_packed
from minikv_compile.kernels.packing import BLOCK, ZERO_AT, metadata_dtype, zero_parts
from minikv_compile.kernels.tuning import ATTEND_VARIANTS, attend_tuning
from minikv_compile.rotation import hadamard


@dataclass(frozen=True)
class Case:
    """One decode step."""

    name: str = "default"
    batch: int = 1
    length: int = 8192
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    bits: int = 2
    k_group: int = 128
    k_axis: str = "token"
    v_group: int = 128
    rotate: bool = True
    new: int = 1
    dense: int = 196
    """Tokens in the dense region: sinks, important tokens, window and half of the buffer."""
    dense_capacity: int = 260
    ragged: bool = False
    variant: str = ""
    metadata_bits: int = 8
    noise: float = 1 / 24

    @property
    def tier(self) -> int:
        """Tokens in the tier."""
        return max(0, self.length - self.dense) // BLOCK * BLOCK

    @property
    def bytes(self) -> int:
        """What a step must read and write, at least."""
        element = self.dtype.itemsize
        code_bytes = 2 * self.tier * self.dim * self.bits / 8
        metadata = metadata_dtype(self.bits, self.metadata_bits).itemsize
        meta_bytes = 2 * metadata * self.tier * self.dim * (1 / self.k_group + 1 / min(self.v_group, self.dim))
        kv_bytes = code_bytes + meta_bytes + 2 * (self.length - self.tier) * self.dim * element
        return int(self.batch * (self.kv_heads * kv_bytes + 2 * self.heads * self.dim * element))

    @property
    def label(self) -> str:
        tokens = f"{self.length // 1024}K" if self.length % 1024 == 0 else str(self.length)
        return f"B{self.batch}x{tokens} {self.heads}/{self.kv_heads} D{self.dim}"


MINIKV = dict(name="minikv g16", k_group=16, v_group=16, rotate=False, dense=64, dense_capacity=128,
              metadata_bits=16, noise=0.0)  # fmt: skip
DECODE = [Case(batch=b, length=n * 1024) for b, n in ((16, 32), (64, 8), (4, 128), (1, 128), (1, 32), (1, 8))]
FORMATS = [
    Case(batch=16, length=32768, **MINIKV),
    Case(batch=16, length=32768, **{**MINIKV, "name": "g16, 8 bit metadata", "metadata_bits": 8}),
    Case(batch=16, length=32768, name="16 bit metadata", metadata_bits=16),
    Case(batch=16, length=32768, name="4 bit", bits=4),
    Case(batch=16, length=32768, name="8 bit", bits=8),
    Case(batch=4, length=32768, heads=32, kv_heads=32),
    Case(batch=16, length=32768, heads=64),
    Case(batch=32, length=32768, heads=28, kv_heads=4),
    Case(batch=32, length=32768, dim=64, v_group=64),
]
TUNED = [DECODE[0], DECODE[1], *DECODE[3:], FORMATS[0], *FORMATS[3:5], FORMATS[-1]]
SMALL = dict(batch=3, length=4 * BLOCK + 100, dense=100, ragged=True, heads=8, kv_heads=2)
CHECKED = [
    Case(**SMALL),
    Case(**SMALL, dtype=torch.float16),
    Case(**SMALL, dtype=torch.float32),
    Case(**SMALL, metadata_bits=16, noise=0.0),
    Case(**SMALL, metadata_bits=16, dtype=torch.float16),
    Case(**SMALL, metadata_bits=16, dtype=torch.float32),
    Case(**SMALL, metadata_bits=16, dim=64, v_group=64),
    Case(**SMALL, metadata_bits=16, dim=80, v_group=16),
    Case(**SMALL, metadata_bits=16, k_axis="channel", k_group=32, v_group=32),
    Case(**SMALL, metadata_bits=16, bits=4, dtype=torch.float16),
    Case(**SMALL, bits=4, dtype=torch.float16),
    Case(**SMALL, bits=8),
    Case(**{**SMALL, "name": "g16", "k_group": 16, "v_group": 16}),
    Case(**{**SMALL, "name": "g16", "k_group": 16, "v_group": 16, "bits": 4}, dtype=torch.float16),
    Case(**{**SMALL, "name": "g16", "k_group": 16, "v_group": 16, "bits": 8}),
    Case(**SMALL, k_group=32, v_group=32),
    Case(**SMALL, k_group=64, v_group=64),
    Case(**SMALL, k_axis="channel"),
    Case(**SMALL, k_axis="channel", k_group=16, v_group=16, bits=4, dtype=torch.float16),
    Case(**SMALL, dim=64, v_group=64),
    Case(**SMALL, dim=64, dtype=torch.float16, k_axis="channel", k_group=32, v_group=32),
    Case(**SMALL, dim=80, v_group=16),
    Case(**SMALL, dim=80, v_group=16, dtype=torch.float16, bits=4),
    Case(**SMALL, dim=96, v_group=32),
    Case(**SMALL, dim=256),
    Case(**SMALL, dim=256, dtype=torch.float16, k_group=16, v_group=16),
    Case(**SMALL, dim=256, dtype=torch.float32, k_group=32, v_group=32),
    Case(**{**SMALL, "heads": 2}),
    Case(**{**SMALL, "heads": 14}),
    Case(**{**SMALL, "heads": 16}, dtype=torch.float16),
    Case(**{**SMALL, "heads": 32}),
    Case(**{**SMALL, "heads": 32}, dim=256),
    Case(**SMALL, new=5),
    Case(**SMALL, new=16, dtype=torch.float16, rotate=False),
]
DRY = [
    replace(CHECKED[0], batch=2, length=228, dim=64, v_group=64),
    replace(CHECKED[16], batch=1, length=228, dim=64, v_group=64, dtype=torch.float16),
]


def tensors(case: Case, device: torch.device, seed: int) -> list:
    """Random arguments of `attend_triton`. Codes and metadata are drawn as such, but for small ragged cases, which are
    quantized, and poisoned past their valid lengths."""
    generator = torch.Generator(device).manual_seed(seed)
    rotation = hadamard(case.dim).to(device) if case.rotate else None

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=case.dtype)

    batch, kv, dim = case.batch, case.kv_heads, case.dim
    blocks = max(case.tier // BLOCK, 1)
    grouping = dict(key=(case.k_group, case.k_axis), value=(case.v_group, "channel"))
    tier_tokens = torch.full((batch,), case.tier, device=device)
    dense_tokens = torch.full((batch,), case.length - case.tier, device=device)
    capacity = max(case.dense_capacity, case.length - case.tier)
    tiers = []
    for layout, (group, axis) in grouping.items():
        if case.ragged:
            x = normal(batch, kv, blocks * BLOCK, dim)
            full = torch.full((batch,), blocks * BLOCK, dtype=torch.int32, device=device)
            packed = compress_triton(x, None, 0, full, blocks, case.bits, group, axis, layout, rotation, 1.0,
                                     metadata_bits=case.metadata_bits)  # fmt: skip
        else:
            packed = empty_packed(batch, kv, blocks, dim, case.bits, group, axis, layout, device, case.metadata_bits)  # fmt: skip
            packed[0].random_(-(2**15), 2**15, generator=generator)
            if packed[1].dtype == torch.uint8:  # steps from 1/4 to 1/2 at 2 bits, zeros from -2 to -1 steps
                packed[1].random_(104, 112, generator=generator)
                packed[2].random_(ZERO_AT - int(2 * zero_parts(case.bits)), ZERO_AT, generator=generator)
            else:
                packed[1].uniform_(0.5, 1.5, generator=generator).div_(2**case.bits - 1)
                packed[2].uniform_(-0.75, -0.25, generator=generator)
        tiers.append(packed)
    dense = [normal(batch, kv, capacity, dim) for _ in range(2)]
    if case.ragged:
        tier_tokens = (tier_tokens - torch.arange(batch, device=device) * BLOCK).clamp(min=0)
        dense_tokens = (dense_tokens - 31 * torch.arange(batch, device=device)).clamp(min=case.new)
        for row in range(batch):
            for tier in tiers:
                for meta in tier[1:]:
                    meta[row, :, tier_tokens[row] // BLOCK :] = torch.nan if meta.is_floating_point() else 255
            for x in dense:
                x[row, :, dense_tokens[row] - case.new :] = torch.nan
    none = torch.zeros_like(tier_tokens)
    state = torch.stack([case.length - dense_tokens, none, tier_tokens, none, none, none], -1).int()
    q = normal(batch, case.heads, case.new, dim)
    new = [normal(batch, kv, case.new, dim) for _ in range(2)]
    return [q, *new, *tiers, *dense, state, case.length, dim**-0.5, case.bits, case.k_group, case.k_axis,
            case.v_group, rotation, None, None, case.noise]  # fmt: skip


def tuning_of(case: Case):
    """The table's choice for a case, or the variant that it names."""
    size = block_bytes(case.dim, case.bits, case.k_group, case.v_group)
    rows = case.batch * case.heads * case.new
    free = free_columns(case.heads // case.kv_heads * case.new, case.k_axis)
    chosen = attend_tuning(triton.next_power_of_2(case.dim), case.dtype.itemsize, size, rows, free,
                           folds(case.dim, case.k_group, case.v_group))  # fmt: skip
    return replace(chosen, **ATTEND_VARIANTS.get(case.variant, {}))
