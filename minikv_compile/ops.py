"""The custom ops `torch.ops.minikv.*`: what the rewritten graph calls. Each runs on CPU and CUDA."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from . import compat
from .balancer import balancer_of
from .config import MiniKVConfig
from .feedback import WIDEST, feedback_factors
from .kernels import attend, compress, linear, packing, prefill, scores
from .kernels import flush as flush_kernels
from .kernels.important import NO_TOKEN, stored_order
from .kernels.packing import BLOCK, metadata_dtype, words
from .kernels.products import folded
from .kernels.select import bitmask
from .kernels.state import COLUMNS, IN_IMPORTANT, IN_TIER, NOT_FINITE, OFFSET, PINNED
from .policy import Prompt, important_tokens, padded_to, select
from .rotation import rotation_matrix
from .tiers import attended, grouping, tier_names

ROLES = ("key", "value")

MIN_BLOCKS = 2
"""A dimension of size 0 or 1 would be specialised by Dynamo, and its growth would recompile."""


READS_HOST = (torch.Tag.cudagraph_unsafe,)
"""Tags of the ops of several tokens, which copy between host and device: no CUDA graph may hold them."""


def on_its_own(op: Callable) -> Callable:
    """Codes and scores must not depend on the caller's autocast, nor may kernels be launched on the caller's GPU, if tensors
    are on another: that of the layer, where a model is spread over several."""

    @wraps(op)
    def run(*args, **kwargs):
        with ExitStack() as stack:
            for kind in ("cpu", "cuda"):
                if torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            device = _device_of(args)
            if device.type == "cuda" and device.index != torch.cuda.current_device():
                stack.enter_context(torch.cuda.device(device))
            return op(*args, **kwargs)

    return run


def _device_of(args: Sequence[Any]) -> torch.device:
    """Of the first tensor, which may be in lists."""
    first = next(x for x in args if isinstance(x, Tensor) or (isinstance(x, (list, tuple)) and x))
    return first.device if isinstance(first, Tensor) else _device_of(first)


@custom_op("minikv::align_rows", mutates_args=(), tags=READS_HOST)
def align_rows(valid: Tensor) -> tuple[Tensor, Tensor]:
    """How to put each row's valid tokens first; once per graph, for all of its layers.

    Args:
        valid: bool [batch, seq], False for padding, at any place.

    Returns:
        order: int64 [batch, seq], the valid tokens first, in their order; lengths: int64 [batch], how many, *on the
        CPU*, so that no layer waits for the device.

    Raises:
        ValueError: a row without tokens.
    """
    lengths = valid.sum(-1).cpu()
    if lengths.min() == 0:
        raise ValueError(f"Row {int(lengths.argmin())} of the batch has no tokens: its attention mask is all zeros.")
    return valid.logical_not().to(torch.int8).argsort(dim=-1, stable=True), lengths


@align_rows.register_fake
def _(valid):
    return valid.new_empty(valid.shape, dtype=torch.int64), torch.empty(valid.shape[:1], dtype=torch.int64, device="cpu")


def take_tokens(x: Tensor, order: Tensor) -> Tensor:
    """Tokens of [batch, heads, seq, head_dim] by `order`, int64 [batch, tokens] or [batch, heads, tokens]."""
    if order.dim() == 2:
        order = order[:, None].expand(-1, x.shape[1], -1)
    return x.gather(2, order[..., None].expand(-1, -1, -1, x.shape[-1]))


@custom_op("minikv::prefill_attention", mutates_args=(), tags=READS_HOST)
@on_its_own
def prefill_attention(
    q: Tensor, k: Tensor, v: Tensor, order: Tensor | None, lengths: Tensor | None, scale: float, observed: int | None
) -> tuple[Tensor, Tensor]:
    """Causal attention in memory linear in `seq`, and its column scores.

    Args:
        q: [batch, heads, seq, head_dim]; k, v: [batch, kv_heads, seq, head_dim].
        order, lengths: of `align_rows`; None for no padding. Outputs at padding are finite and otherwise unspecified.
        observed: how many of each row's newest queries count in the scores: 0 for all, None for no scores.

    Returns:
        out like `q`; scores fp32 [batch, kv_heads, seq], each row's valid tokens first, or an empty tensor.
    """
    padded = lengths is not None and int(lengths.min()) < q.shape[2]
    if padded:
        order = order.to(q.device)  # made for all layers, of which some may be on another device
        # With the valid tokens first, causality alone masks the padding: no [seq, seq] mask.
        q, k, v = (take_tokens(x, order) for x in (q, k, v))
    if observed is not None:
        out, lse = prefill.causal_attention_lse(q, k, v, scale)
        columns = scores.column_scores(q, k, lse, scale, lengths.to(q.device) if padded else None, observed or None)
    else:
        out, columns = prefill.causal_attention(q, k, v, scale), q.new_empty(0, dtype=torch.float32)
    if padded:
        out = take_tokens(out, order.argsort(dim=-1))
    return out.contiguous(), columns


@prefill_attention.register_fake
def _(q, k, v, order, lengths, scale, observed):
    shape = (0,) if observed is None else (k.shape[0], k.shape[1], k.shape[2])
    return q.new_empty(q.shape), q.new_empty(shape, dtype=torch.float32)


def dense_capacity(config: MiniKVConfig, used: int, pinned: int) -> int:
    """Tokens of a dense region that holds `used`, of which `pinned` stay."""
    if config.bits == 16 or used > pinned + config.room:
        return -(-(used + config.buffer) // BLOCK) * BLOCK
    return pinned + config.room


def blocks_to_flush(used: int, n: int, room: int, config: MiniKVConfig) -> int:
    """Blocks that a row with `used` tokens in its dense region, pinned ones not counted, moves to its tier to make room for
    `n` more."""
    return max(0, used - config.window) // BLOCK if used + n > room else 0


def stored_tokens(state: Tensor, length: int | Tensor) -> Tensor:
    """int32 [batch]: how many of the `length` logical tokens are stored."""
    return length - state[:, OFFSET] + state[:, IN_TIER] + state[:, IN_IMPORTANT]


@on_its_own
def compress_prompt(
    k: Tensor, v: Tensor, scores: Tensor | None, order: Tensor | None, lengths: Tensor | None, layer: int, layers: int,
    config: str, q_range: Tensor | None = None, q_moments: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    """Select, gather, balance, rotate, quantize and pack the prompt's keys and values: the op `minikv::compress`.

    Args:
        k, v: [batch, kv_heads, seq, head_dim], any strides.
        scores: fp32 [batch, kv_heads, seq], each row's valid tokens first; None where the policy observes nothing.
        order, lengths: of `align_rows`; None for no padding.
        config: `MiniKVConfig.to_json()`.
        q_range: of the prompt's queries (`minikv::query_range`); None where nothing is balanced.
        q_moments: of them (`minikv::query_moments`); None for keys that are rounded to nearest.

    Returns:
        the tensors of `fields(...)`, first for the keys, then for the values.

    Raises:
        ValueError: a prompt without tokens.
    """
    settings = MiniKVConfig.from_json(config)
    batch, heads, seq, dim = k.shape
    if seq == 0:
        raise ValueError(f"MiniKV, layer {layer}: the prompt is empty.")
    padded = lengths is not None
    counts = row_lengths = [seq] * batch if lengths is None else lengths.tolist()
    order = None if min(counts) == seq else order.to(k.device)
    whole = settings.bits == 16 or seq < settings.min_prompt
    index = order if order is None else order[:, None].expand(-1, heads, -1)
    prompts = [
        Prompt(n, layer, None if scores is None else scores[b, :, :n], k[b], v[b], None if order is None else order[b])
        for b, n in enumerate(row_lengths)
    ]
    chosen = None
    if settings.drops and not whole:
        chosen = select(prompts, layer, layers, settings)
        counts = [row.shape[-1] for row in chosen]
        index = chosen[0].new_zeros(batch, heads, max(counts))
        for target, row in zip(index, chosen, strict=True):
            target[:, : row.shape[-1]] = row
        if order is not None:
            index = order[:, None].expand(-1, heads, -1).gather(2, index)

    apart = [0 if whole else n for n in row_lengths]
    apart = [settings.important_tokens(n, min(n, kept)) for n, kept in zip(apart, counts, strict=True)]
    rows = torch.tensor(
        [_row(kept, seq, count, whole, settings) for kept, count in zip(counts, apart, strict=True)], dtype=torch.int32
    )
    packed = rows[:, IN_TIER].tolist()
    capacity = dense_capacity(settings, int((seq - rows[:, OFFSET]).max()), int(rows[:, PINNED].max()))
    # What follows from them comes in the same copy: a launch less for each.
    pinned, in_important = rows[:, PINNED], rows[:, IN_IMPORTANT]
    more = (
        seq - rows[:, OFFSET], pinned - settings.sinks + in_important, pinned + in_important, rows[:, IN_TIER] + in_important
    )
    rows = torch.cat([rows, torch.stack(more, 1).int()], 1)
    if k.is_cuda:
        rows = rows.pin_memory()  # a copy from anything else would wait for the device
    rows = rows.to(k.device, non_blocking=True)
    pinned, (used, apart_in_row, before_tier, in_tiers) = rows[:, PINNED], rows[:, COLUMNS:].unbind(1)
    rows = rows[:, :COLUMNS]
    rotation = rotation_matrix(settings.rotation, dim, k.device)
    shared = []
    if settings.pins:
        important = important_tokens(prompts, chosen, packed, apart, settings)
        important = padded_to(important, settings.counts_vary * MIN_BLOCKS, NO_TOKEN)
        shared.append(important.int())
        if any(apart) and (any(packed) or settings.two_tiers):
            stored = stored_order(important, apart_in_row, max(counts), settings.sinks)
            index = stored if index is None else index.gather(2, stored)
    if settings.drops or padded:
        everything = torch.arange(seq, device=k.device).expand(batch, heads, -1) if index is None else index
        shared.append(bitmask(everything, stored_tokens(rows, seq), seq))
    if index is not None:
        index = index.contiguous()
    balancer = balancer_of(q_range, k, order, row_lengths) if settings.balances else None
    factors = None
    if q_moments is not None and settings.feeds_back and dim <= WIDEST and any(packed + apart):
        factors = feedback_factors(q_moments, rotation, balancer)

    out = []
    for role, x in zip(ROLES, (k, v), strict=True):
        state = rows.clone(memory_format=torch.contiguous_format)
        counted = torch.zeros(batch, seq, dtype=torch.int32, device=k.device), state[:, NOT_FINITE]
        group, axis = grouping(settings, role, dim)
        tiers = [] if settings.bits == 16 else [(settings.bits, before_tier, state[:, IN_TIER], packed)]
        if settings.two_tiers:
            tiers.append((settings.important_bits, pinned, state[:, IN_IMPORTANT], apart))
        for bits, start, tokens, known in tiers:
            out += compress.compress(
                x, index, start, tokens, max(max(known) // BLOCK, MIN_BLOCKS), bits, group, axis, role, rotation,
                settings.clip_of(bits), counted=counted, balancer=balancer if role == "key" else None,
                metadata_bits=settings.metadata_bits, factors=factors if role == "key" else None,
            )  # fmt: skip
        out += [balancer] * (settings.balances and role == "key")
        out += [compress.dense_region(x, index, pinned, in_tiers, used, capacity, counted), state]
        out += [t.clone() if role == ROLES[1] else t for t in shared]  # outputs must not share storage
    return out


_compress = custom_op("minikv::compress", compress_prompt, mutates_args=(), tags=READS_HOST)


def _row(kept: int, seq: int, important: int, whole: bool, config: MiniKVConfig) -> list[int]:
    """The state of a row of a prompt of `seq` that keeps `kept` tokens, of which so many are important."""
    pinned = config.pinned(important)
    in_important = important if config.two_tiers else 0
    packed = 0 if whole else max(0, kept - pinned - config.window) // BLOCK * BLOCK
    return [seq - (kept - packed), 0, packed - in_important, 0, pinned, in_important]


def slots(important: Tensor, n: int, sinks: int) -> Tensor:
    """The inverse of `stored_order`: the slot of each of a row's first `n` stored tokens.

    Args:
        important: int [batch, kv_heads, most], ascending, none a sink, NO_TOKEN behind rows of fewer.

    Returns:
        int64 [batch, kv_heads, n].
    """
    token = torch.arange(n, device=important.device, dtype=important.dtype).expand(*important.shape[:2], n).contiguous()
    before = torch.searchsorted(important, token)
    count = (important != NO_TOKEN).sum(-1, keepdim=True)
    is_important = important.gather(2, before.clamp(max=important.shape[2] - 1)) == token
    return torch.where(is_important, sinks + before, torch.where(token < sinks, token, token + count - before))


def fields(config: MiniKVConfig, role: str, padded: bool) -> list[str]:
    """Names of the tensors that `compress_prompt` returns for the keys or the values."""
    return [
        *tier_names(config, role), "dense", "state", *["important"] * config.pins, *["kept"] * (config.drops or padded)
    ]  # fmt: skip


@_compress.register_fake
def _(k, v, scores, order, lengths, layer, layers, config, q_range=None, q_moments=None):
    settings = MiniKVConfig.from_json(config)
    batch, heads, seq, dim = k.shape
    sizes = [compat.new_size(k, MIN_BLOCKS), *(compat.new_size(k, MIN_BLOCKS) for _ in range(settings.bits < 16))]
    capacity, blocks = sizes[0], sizes[-1]
    important_blocks = compat.new_size(k, MIN_BLOCKS) if settings.two_tiers else 0
    most = compat.new_size(k, MIN_BLOCKS) if settings.counts_vary else settings.important
    out = []
    for role, x in zip(ROLES, (k, v), strict=True):
        made = {
            "dense": ((capacity, dim), x.dtype),
            "balancer": ((dim,), torch.float32),
            "important": ((most,), torch.int32),
            "kept": (((seq + 7) // 8,), torch.uint8),
        }
        for prefix, bits, size in (("", settings.bits, blocks), ("important_", settings.important_bits, important_blocks)):
            if bits < 16 and settings.bits < 16:
                tensors = tier_tensors(settings, role, size, dim, bits)
                made |= {prefix + name: tensor for name, tensor in zip(("codes", "scale", "zero"), tensors, strict=True)}
        for name in fields(settings, role, lengths is not None):
            if name == "state":
                out.append(x.new_empty((batch, COLUMNS), dtype=torch.int32))
            else:
                shape, dtype = made[name]
                out.append(x.new_empty((batch, heads, *shape), dtype=dtype))
    return out


def tier_tensors(
    config: MiniKVConfig, role: str, blocks: int, dim: int, bits: int
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes, without batch and heads, and dtypes of codes, scale and zero (`kernels.packing`) of a tier."""
    group, axis = grouping(config, role, dim)
    width = words(bits)
    meta = (blocks, BLOCK // group, dim) if axis == "token" else (blocks, dim // group, BLOCK)
    stored = metadata_dtype(bits, config.metadata_bits)
    return [((blocks, width, dim) if role == "key" else (blocks, dim, width), torch.int16), (meta, stored), (meta, stored)]


@custom_op("minikv::decode_attention", mutates_args=("k_dense", "v_dense"))
@on_its_own
def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, k_tier: Sequence[Tensor], v_tier: Sequence[Tensor], k_dense: Tensor,
    v_dense: Tensor, state: Tensor, length: int, scale: float, config: str, padding: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Append the new tokens to the dense regions, and attend from them over tier and dense region.

    Args:
        q: [batch, heads, n, head_dim]; k, v: the new tokens, [batch, kv_heads, n, head_dim].
        k_tier, v_tier: the tensors of `tier_names`. k_dense, v_dense: written in place; the caller has
            made room (`KVTensor.reserve`).
        state: int32 [batch, COLUMNS] of the keys. length: logical tokens, without the new ones.
        padding: [batch, length + n], false for padding; None if none of the new tokens can be.

    Returns:
        [batch, heads, n, head_dim].

    Raises:
        ValueError: a new token is padding.
    """
    settings = MiniKVConfig.from_json(config)
    if padding is not None:
        check_padding(padding.bool().to(state.device), state, length, q.shape[2], settings)
    dim = q.shape[-1]
    return attend.attend(
        q, k, v, k_dense=k_dense, v_dense=v_dense, state=state, length=length + k.shape[2], scale=scale,
        rotation=rotation_matrix(settings.rotation, dim, q.device), **attended(k_tier, v_tier, settings, dim),
    )  # fmt: skip


@decode_attention.register_fake
def _(q, k, v, k_tier, v_tier, k_dense, v_dense, state, length, scale, config, padding=None):
    return q.new_empty(q.shape)


@on_its_own
def check_padding(valid: Tensor, state: Tensor, length: int, n: int, config: MiniKVConfig) -> None:
    """Raise if the mask of a later call does not fit the cache, which knows its padding from the prefill.

    Args:
        valid: bool [batch, length + n].
    """
    fits = valid[:, length : length + n].all()
    if not config.drops:
        fits &= (valid[:, :length].sum(-1) == stored_tokens(state, length)).all()
    message = (
        f"The attention mask does not fit the compressed cache of {length} tokens and {n} new ones: keep the prompt's "
        "mask, and continue all rows with equally many tokens, none of them padding."
    )
    if valid.is_cuda and n == 1:
        compat.assert_on_device(fits, message)
    elif not fits:
        raise ValueError(message)


def decode_attention_in_graph(
    q: Tensor, k: Tensor, v: Tensor, k_tier: Sequence[Tensor], v_tier: Sequence[Tensor], k_dense: Tensor,
    v_dense: Tensor, state: Tensor, length: int, scale: float, config: str, rotation: Tensor | None,
) -> Tensor:  # fmt: skip
    """`decode_attention` for a compiler to trace through and fuse: what Inductor gets on a CPU.

    Args:
        rotation: the matrix of the configuration, as a constant of the graph.
    """
    settings = MiniKVConfig.from_json(config)
    length = length + k.shape[2]
    attend.append(k_dense, k, state, length)
    attend.append(v_dense, v, state, length)
    return attend.attend_reference(
        q, k_dense=k_dense, v_dense=v_dense, state=state, length=length, scale=scale, rotation=rotation,
        products=folded(q.shape[1] // k.shape[1]), **attended(k_tier, v_tier, settings, q.shape[-1]),
    )  # fmt: skip


@on_its_own
def flush(
    keys: Sequence[Sequence[Tensor]], values: Sequence[Sequence[Tensor]], length: int, n: int, room: int, blocks: int,
    config: MiniKVConfig, counted: int = 0, keep: bool = False,
) -> Tensor:  # fmt: skip
    """`kernels.flush.flush` as a configuration has it. No graph calls it by itself, so it is no custom op, which would cost
    more on the host than its launches."""
    dense = (*keys, *values)[0][3]
    groups, axes = zip(*(grouping(config, role, dense.shape[-1]) for role in ROLES), strict=True)
    rotation = rotation_matrix(config.rotation, dense.shape[-1], dense.device)
    return flush_kernels.flush(
        keys, values, length, n, room, config.window, blocks, config.bits, groups, axes, rotation, config.balances,
        config.clip_of(config.bits), counted=counted, keep=keep,
    )  # fmt: skip


def kept_mask(kept: Tensor, state: Tensor, length: int) -> Tensor:
    """bool [batch, kv_heads, length]: which logical tokens of a `KVTensor` are stored."""
    return tokens_kept(kept, stored_tokens(state, length), length, length)


def tokens_kept(kept: Tensor, stored: Tensor, length: int | Tensor, size: int) -> Tensor:
    """bool [batch, kv_heads, size]: which of the first `size` tokens are stored.

    Args:
        kept: uint8 [batch, kv_heads, ceil(prompt / 8)], one bit per prompt token. Later tokens are all stored; where
            they start follows from how many are.
        stored: int [batch], how many tokens are. length: logical tokens.
    """
    bits = kept[..., None] >> torch.arange(8, dtype=torch.uint8, device=kept.device) & 1
    token = torch.arange(size, device=kept.device)
    before = token < length  # a prompt may have been cut
    prompt = bits.flatten(2).bool()[..., :size]
    prompt &= before[: prompt.shape[-1]]
    generated = stored[:, None] - prompt.sum(-1)
    mask = before & (token >= (length - generated)[..., None])
    mask[..., : prompt.shape[-1]] |= prompt
    return mask


def place_tokens(values: Tensor, mask: Tensor) -> Tensor:
    """Stored tokens, in their order, where bool `mask` [batch, kv_heads, length] has them; zeros elsewhere."""
    source = (mask.cumsum(-1) - 1).clamp(min=0)
    return take_tokens(values, source).masked_fill(~mask[..., None], 0)


@custom_op("minikv::once", mutates_args=())
def once(x: Tensor) -> Tensor:
    """A copy of `x`: to Inductor, `x` itself, in memory, and not computed again by each kernel that reads it (`lowering`)."""
    return x.clone()


@once.register_fake
def _(x):
    return torch.empty_like(x)


@custom_op("minikv::linear_parts", mutates_args=())
@on_its_own
def linear_parts(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """What each part of the inputs adds to the outputs of linear layers that read one input.

    Args:
        x: [..., in], at most `linear.MOST_ROWS` rows. weights: as of `linear.linear_triton`.

    Returns:
        fp32 [parts, ..., sum of out], to be summed.
    """
    parts = linear.parts_of(sum(weight.shape[0] for weight in weights), x.shape[-1])
    rows = x.reshape(-1, x.shape[-1])
    run = linear.linear_triton if x.is_cuda or linear.INTERPRET else linear.linear_reference
    return run(rows, weights, parts).unflatten(1, x.shape[:-1])


@linear_parts.register_fake
def _(x, weights):
    outputs = sum(weight.shape[0] for weight in weights)
    return x.new_empty((linear.parts_of(outputs, x.shape[-1]), *x.shape[:-1], outputs), dtype=torch.float32)


@custom_op("minikv::dequantize", mutates_args=())
@on_its_own
def dequantize(
    tier: Sequence[Tensor], dense: Tensor, state: Tensor, important: Tensor | None, kept: Tensor | None, length: int,
    role: str, config: str,
) -> Tensor:  # fmt: skip
    """The dense [batch, kv_heads, length, head_dim] of a `KVTensor`'s tensors (`tier`: those of `tier_names`); zeros for
    what is not stored."""
    settings = MiniKVConfig.from_json(config)
    batch, heads, capacity, dim = dense.shape
    pinned, in_tier, in_important = (state[:, None, column, None] for column in (PINNED, IN_TIER, IN_IMPORTANT))
    # In storage: what is pinned, then the important tier, the tier, and the rest of the dense region.
    if important is None:
        token = torch.arange(length, device=dense.device).expand(batch, 1, -1)
    else:
        token = slots(important, length, settings.sinks)
    token = token.expand(-1, heads, -1)
    in_dense = torch.where(token < pinned, token, token - in_tier - in_important)
    values = take_tokens(dense, in_dense.clamp(0, capacity - 1))
    tiers = [] if settings.bits == 16 else [(tier[:3], settings.bits, pinned + in_important, in_tier)]
    if settings.two_tiers:
        tiers.append((tier[3:6], settings.important_bits, pinned, in_important))
    group, axis = grouping(settings, role, dim)
    rotation = rotation_matrix(settings.rotation, dim, dense.device)
    for (codes, scale, zero), bits, first, tokens in tiers:
        packed = packing.dequantize(packing.unpack(codes, bits, role), scale, zero, bits, group, axis).flatten(2, 3)
        packed = packed if rotation is None else packed @ rotation.T
        if settings.balances and role == "key":
            packed = packed / tier[-1][:, :, None]
        packed = packing.to_dtype(packed, dense.dtype)
        inside = (token >= first) & (token < first + tokens)
        taken = take_tokens(packed, (token - first).clamp(0, packed.shape[2] - 1))
        values = torch.where(inside[..., None], taken, values)
    return values if kept is None else place_tokens(values, kept_mask(kept, state, length))


@dequantize.register_fake
def _(tier, dense, state, important, kept, length, role, config):
    return dense.new_empty((dense.shape[0], dense.shape[1], length, dense.shape[3]))
