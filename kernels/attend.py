"""Attention of new tokens over a compressed past: packed tier + dense region, one softmax."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from .attention import _split_kernel
from .compress import Packed
from .jit import check_dtype, check_head_dim, dot_precision, operand_dtype, unit_last
from .merge import _merge_kernel
from .packing import BLOCK, MOST_NOISE, WORD_BITS, GroupAxis, metadata, value_chunks, words
from .prepare import _prepare_kernel
from .products import DEQUANTIZED, Products
from .state import COLUMNS, IN_IMPORTANT, IN_TIER, NO_OFFSET, OFFSET
from .tuning import AttendTuning, attend_tuning, merge_tuning


@dataclass(frozen=True)
class Important:
    """A second tier, grouped, rotated and balanced as the first, of other bits."""

    keys: Packed
    values: Packed
    bits: int


def append(dense: Tensor, new: Tensor, state: Tensor, length: int) -> None:
    """Write `new` [batch, kv_heads, n, head_dim] into `dense` [batch, kv_heads, capacity, head_dim], in place.

    `length` counts the tokens *with* the new ones; row b's new tokens land at `length - n - state[b, 0]`.
    """
    n = new.shape[-2]
    batch = torch.arange(new.shape[0], device=new.device)[:, None]
    slots = length - n - state[:, OFFSET, None] + torch.arange(n, device=new.device)
    dense[batch, :, slots.long()] = new.transpose(1, 2)


def _first(count: Tensor, places: int) -> Tensor:
    """bool [..., places]: which are the first int32 `count` [...]. int32, of which a vector has as many as of fp32."""
    return torch.arange(places, dtype=torch.int32, device=count.device) < count[..., None]


def _zeros_past(stored: Tensor, values: Packed) -> Packed:
    """Values that are zero past the first `stored` [batch] tokens. There they may be anything, NaN too: 0 * NaN must not reach the
    output. Scales and zeros of 8 bits are finite."""
    codes, *both = values
    if both[0].dtype != torch.uint8:
        past = ~_first(stored, codes.shape[2] * BLOCK).view(stored.shape[0], 1, -1, 1, BLOCK)
        both = [meta.masked_fill(past, 0.0) for meta in both]
    return codes, *both


def attend_reference(
    q: Tensor,
    k_tier: Packed | None,
    v_tier: Packed | None,
    k_dense: Tensor,
    v_dense: Tensor,
    state: Tensor,
    length: int,
    scale: float,
    bits: int,
    k_group: int,
    k_axis: GroupAxis,
    v_group: int,
    rotation: Tensor | None,
    balancer: Tensor | None = None,
    important: Important | None = None,
    noise: float = 0.0,
    products: Products = DEQUANTIZED,
) -> Tensor:
    """Attention of the newest `n` tokens of each row, causal among themselves, in plain PyTorch.

    Args:
        q: [batch, heads, n, head_dim].
        k_tier, v_tier: codes, scale and zero (`packing`) of [batch, kv_heads, blocks * BLOCK, head_dim], balanced and
            rotated. Row b's first `state[b, IN_TIER]` tokens are valid. None where there is no tier.
        k_dense, v_dense: [batch, kv_heads, capacity, head_dim], neither balanced nor rotated. Row b's first
            `length - state[b, OFFSET]` tokens are valid, the new ones (already appended) last.
        state: int32 [batch, COLUMNS] (`state`).
        length: logical tokens, with the new ones.
        rotation: orthogonal [head_dim, head_dim], or None.
        balancer: fp32 [batch, kv_heads, head_dim], positive: by what the keys in tiers were multiplied; or None.
        important: another tier, of row b's `state[b, IN_IMPORTANT]` tokens, beside the first; or None.
        noise: a tier's logits are less by so many times the sum of squares of `scale * q * step`, over channels, but by no more
            than `MOST_NOISE`. Of keys grouped along tokens.
        products: with the tiers.

    Returns:
        [batch, heads, n, head_dim] in the dtype of `q`.
    """
    batch, heads, n, dim = q.shape
    kv_heads = k_dense.shape[1]
    query = q.float().reshape(batch, kv_heads, heads // kv_heads * n, dim)
    stored = query if balancer is None else query / balancer[:, :, None]
    stored = stored if rotation is None else stored @ rotation.float()

    tiers = [] if k_tier is None else [(k_tier, v_tier, bits, IN_TIER)]
    if important is not None:
        tiers.append((important.keys, important.values, important.bits, IN_IMPORTANT))
    stored = stored * scale
    noises = [
        (noise * (stored.square() @ metadata(*keys[1:], width)[0].flatten(2, 3).square().mT)).clamp(max=MOST_NOISE)
        if noise and k_axis == "token" else None
        for keys, _, width, _ in tiers
    ]  # fmt: skip
    logits = [
        products.keys(stored, keys, width, k_group, k_axis, less)
        .masked_fill(~_first(state[:, column], keys[0].shape[2] * BLOCK)[:, None, None], -torch.inf)
        for (keys, _, width, column), less in zip(tiers, noises, strict=True)
    ]  # fmt: skip
    ages = torch.arange(n - 1, -1, -1, dtype=torch.int32, device=q.device)  # how many new tokens are newer than query i
    seen = _first(length - state[:, OFFSET, None] - ages, k_dense.shape[2])  # [batch, n, capacity]
    recent = (query @ k_dense.float().transpose(-1, -2) * scale).unflatten(2, (-1, n))
    logits = torch.cat([*logits, recent.masked_fill(~seen[:, None, None], -torch.inf).flatten(2, 3)], -1)

    # A softmax, divided by its sum after the product with values: of channels there are fewer than of tokens.
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    *of_tiers, of_dense = weights.split([*(keys[0].shape[2] * BLOCK for keys, *_ in tiers), k_dense.shape[2]], -1)
    out = of_dense @ v_dense.float().masked_fill(~seen[:, -1, None, :, None], 0.0)
    if tiers:
        packed = sum(
            products.values(p, _zeros_past(state[:, column], values), width, v_group)
            for p, (_, values, width, column) in zip(of_tiers, tiers, strict=True)
        )
        out = out + (packed if rotation is None else packed @ rotation.float().T)
    return (out / weights.sum(-1, keepdim=True)).view(batch, heads, n, dim).to(q.dtype)


@functools.cache
def _device_properties(device: torch.device) -> tuple[int, bool]:
    """(multiprocessors, whether a kernel can be launched while the one before it runs)."""
    if device.type != "cuda":
        return 1, False
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, torch.version.hip is None and properties.major >= 9


def block_bytes(dim: int, bits: int, k_group: int, v_group: int) -> float:
    """Of one tier block, keys and values, with 16 bits of metadata; with 8, two loads of a scale make nearly as many."""
    return BLOCK * dim * (bits / 4 + 4 / k_group + 4 / v_group)


def folds(dim: int, k_group: int, v_group: int) -> float:
    """Operands that scales are folded into, for each tier block: one for each group."""
    return BLOCK / k_group + dim / v_group


def free_columns(query_rows: int, k_axis: GroupAxis) -> bool:
    """Whether the query rows of a KV head leave half of a product's 8 columns free."""
    return k_axis == "token" and 2 * query_rows <= AttendTuning.min_rows


MERGE_WARPS = 8


@dataclass(frozen=True)
class Launches:
    """What the three launches need besides tensors, lengths, capacities and strides: shared by `attend_triton` and
    Inductor's templates (`minikv_compile.lowering`)."""

    rows: int
    """Query rows, of all heads and batch rows."""
    items: int
    programs: int
    """Of split, at most."""
    slots: int
    """Of parts, enough for so many programs."""
    rotated: int
    """Programs of prepare that rotate q."""
    prepare_grid: tuple[int, int]
    merge_grid: tuple[int, int]
    tier_dtype: torch.dtype
    """Of q where it meets the tier."""
    sizes: dict[str, int]
    """Constants of all kernels; then those of split and merge, and of each."""
    line: dict[str, int]
    prepare: dict[str, int]
    split: dict[str, object]
    merge: dict[str, int]
    stages: int
    registers: int | None
    pdl: bool

    @property
    def q_tier_shape(self) -> tuple[int, int]:
        return self.rows, self.sizes["DP"]

    @property
    def parts_shape(self) -> tuple[int, int, int, int]:
        tiers = 1 + self.merge["HAS_IMPORTANT"]
        return 1 + tiers, self.slots, self.line["ROWS"], self.sizes["D"] + 4


def launches(
    batch: int, heads: int, n: int, dim: int, kv_heads: int, dtype: torch.dtype, tier: bool, bits: int, k_group: int,
    k_axis: GroupAxis, v_group: int, rotate: bool, device: torch.device, tuning: AttendTuning | None = None,
    balance: bool = False, important: bool = False, noise: float = 0.0,
) -> Launches:  # fmt: skip
    """The launches for so many queries; `tier`, `important`: whether there is one, and a second."""
    padded, ratio = triton.next_power_of_2(dim), heads // kv_heads
    if tuning is None:
        size = block_bytes(dim, bits, k_group, v_group) if tier else 0
        free, folded = free_columns(ratio * n, k_axis), folds(dim, k_group, v_group)
        tuning = attend_tuning(padded, dtype.itemsize, size, batch * heads * n, free, folded)
    row_tile = min(tuning.rows, max(tuning.min_rows, triton.next_power_of_2(ratio * n)))
    tiles = triton.cdiv(ratio * n, row_tile)
    items, rows = batch * kv_heads * tiles, batch * heads * n
    sides = tuning.sides if k_axis == "token" and tuning.sides * ratio * n <= row_tile else 1
    multiprocessors, pdl = _device_properties(device)
    programs = multiprocessors * tuning.programs
    merged, columns, step = merge_tuning(rows, tuning)
    rotated = triton.cdiv(rows, 16) if tier else 0
    return Launches(
        rows=rows, items=items, programs=programs, slots=programs + items, rotated=rotated,
        prepare_grid=(rotated + triton.cdiv(batch * kv_heads * n, 16), triton.cdiv(padded, tuning.prepare_columns)),
        merge_grid=(triton.cdiv(rows, merged), triton.cdiv(padded, columns)),
        tier_dtype=torch.float32 if dtype == torch.float32 else torch.float16,
        sizes=dict(KV_HEADS=kv_heads, RATIO=ratio, NEW=n, D=dim, DP=padded, PDL=pdl),
        line=dict(ROWS=row_tile, TILES=tiles, BATCH=triton.next_power_of_2(batch), UNIT=tuning.unit, HAS_TIER=tier,
                  BLOCK=BLOCK),
        prepare=dict(ROWS=16, COLUMNS=min(padded, tuning.prepare_columns), ROTATE=rotate, BALANCE=balance),
        split=dict(BITS=bits, K_GROUP=k_group, K_TOKEN_AXIS=k_axis == "token", V_GROUP=v_group, WORDS=words(bits),
                   SLICES=WORD_BITS // bits, CHUNKS=tuple(value_chunks(dim)), SIDES=sides,
                   DENSE_OPERAND=operand_dtype(dtype), PRECISION=dot_precision(dtype), NOISE=noise),
        merge=dict(HAS_IMPORTANT=important, MERGED=merged, COLUMNS=min(padded, columns), STEP=step, ROTATE=rotate),
        stages=tuning.stages, registers=tuning.registers, pdl=pdl,
    )  # fmt: skip


def attend_triton(
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    k_tier: Packed | None,
    v_tier: Packed | None,
    k_dense: Tensor,
    v_dense: Tensor,
    state: Tensor,
    length: int,
    scale: float,
    bits: int,
    k_group: int,
    k_axis: GroupAxis,
    v_group: int,
    rotation: Tensor | None,
    balancer: Tensor | None = None,
    important: Important | None = None,
    noise: float = 0.0,
    tuning: AttendTuning | None = None,
) -> Tensor:
    """`attend` as Triton kernels, in three launches; four with an important tier. Nothing that it does on the host depends
    on device data."""
    check_dtype(q, k_new, v_new, k_dense, v_dense)
    check_head_dim(q.shape[-1])
    tier = (*k_tier, *v_tier) if k_tier is not None else ()
    second = (*important.keys, *important.values) if important is not None else ()
    if not all(t.is_contiguous() for t in (*tier, *second, state)) or k_dense.stride(-1) != 1 or v_dense.stride(-1) != 1:
        raise ValueError("attend needs a contiguous tier and state, and dense regions with contiguous channels.")
    q, k_new, v_new = unit_last(q), unit_last(k_new), unit_last(v_new)
    batch, heads, n, dim = q.shape
    kv_heads, dense_capacity = k_dense.shape[1:3]
    if state.shape[1] != COLUMNS:
        raise ValueError(f"attend needs a state of {COLUMNS} columns.")
    rotate = rotation is not None and bool(tier)

    def launches_of(width: int) -> Launches:
        return launches(
            batch, heads, n, dim, kv_heads, q.dtype, bool(tier), width, k_group, k_axis, v_group, rotate, q.device, tuning,
            balancer is not None, important is not None, noise,
        )  # fmt: skip

    to = launches_of(bits)
    capacity, second_capacity = (held[0].shape[2] if held else 0 for held in (tier, second))
    # From capacities, never from lengths, which are on the device.
    units = to.items * max(triton.cdiv(dense_capacity, to.line["UNIT"]) + capacity, second_capacity)
    programs = min(to.programs, units)

    q_tier = torch.empty(to.q_tier_shape, dtype=to.tier_dtype, device=q.device)
    factor = torch.empty(to.rows, dtype=torch.float32, device=q.device)
    parts = torch.empty(to.parts_shape, dtype=torch.float32, device=q.device)
    out = torch.empty(batch, heads, n, dim, dtype=q.dtype, device=q.device)
    matrix = factor if rotation is None else rotation.to(torch.float32).contiguous()
    balance = factor if balancer is None else balancer.contiguous()
    dense_strides = (*k_dense.stride()[:3], *v_dense.stride()[:3])

    _prepare_kernel[to.prepare_grid](
        q, k_new, v_new, k_dense, v_dense, state, matrix, balance, q_tier, factor, batch, to.rotated, length, scale,
        *q.stride()[:3], *k_new.stride()[:3], *v_new.stride()[:3], *dense_strides, **to.sizes, **to.prepare,
    )  # fmt: skip
    def split(to: Launches, held: tuple, counters: Tensor, tokens: int, room: int, target: Tensor, pdl: bool) -> None:
        _split_kernel[(programs,)](
            q, q_tier, factor, *(held or [factor] * 6), k_dense, v_dense, counters, target, batch, tokens, scale, room,
            to.slots, *q.stride()[:3], *dense_strides, **to.sizes, **to.line, **to.split, num_warps=1,
            num_stages=to.stages, maxnreg=to.registers, launch_pdl=pdl,
        )  # fmt: skip

    split(to, tier, state, length, capacity, parts, to.pdl)
    if second:
        # Behind all of the launch before it: where no row has important tokens, nothing in it waits for anything.
        to_second = replace(launches_of(important.bits), slots=to.slots)
        split(to_second, second, state[:, NO_OFFSET:], 0, second_capacity, parts[1:], False)
    _merge_kernel[to.merge_grid](
        parts, state, matrix, out, batch, length, programs, to.slots, *out.stride()[:3], **to.sizes, **to.line,
        **to.merge, num_warps=MERGE_WARPS, num_stages=1, launch_pdl=to.pdl,
    )  # fmt: skip
    return out


def attend(
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    k_tier: Packed | None,
    v_tier: Packed | None,
    k_dense: Tensor,
    v_dense: Tensor,
    state: Tensor,
    length: int,
    scale: float,
    bits: int,
    k_group: int,
    k_axis: GroupAxis,
    v_group: int,
    rotation: Tensor | None,
    balancer: Tensor | None = None,
    important: Important | None = None,
    noise: float = 0.0,
) -> Tensor:
    """Append the new tokens to the dense regions, in place, and attend from them over the tier and the dense region.

    Args:
        k_new, v_new: [batch, kv_heads, n, head_dim]. The dense regions have room for them.
        The others as in `attend_reference`; `length` counts the new tokens, and what a state says
        of tiers are multiples of BLOCK.

    Returns:
        [batch, heads, n, head_dim] in the dtype of `q`.
    """
    if q.is_cuda:
        return attend_triton(
            q, k_new, v_new, k_tier, v_tier, k_dense, v_dense, state, length, scale, bits, k_group, k_axis, v_group,
            rotation, balancer, important, noise,
        )  # fmt: skip
    append(k_dense, k_new, state, length)
    append(v_dense, v_new, state, length)
    return attend_reference(
        q, k_tier, v_tier, k_dense, v_dense, state, length, scale, bits, k_group, k_axis, v_group, rotation,
        balancer, important, noise,
    )  # fmt: skip
