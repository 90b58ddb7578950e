"""The custom ops `torch.ops.minikv.*`: what the rewritten graph calls. Each runs on CPU and CUDA."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import wraps

import torch
from torch import Tensor
from torch.library import custom_op

from . import compat
from .config import MiniKVConfig
from .kernels import attention, compress, packing, prefill, scores
from .kernels import flush as flush_kernels
from .kernels.important import stored_order
from .kernels.packing import BLOCK, metadata_dtype, words
from .kernels.select import bitmask
from .policy import Prompt, important_tokens, select
from .rotation import rotation_matrix

ROLES = ("key", "value")
OFFSET, NOT_FINITE, IN_TIER = range(3)
"""Columns of a state, int32 [batch, 3]: `length - offset` tokens of the row are valid in its dense region (sinks,
window, buffer); how many stored tokens hold NaN or inf; tokens in the tier."""

MIN_BLOCKS = 2
"""A dimension of size 0 or 1 would be specialised by Dynamo, and its growth would recompile."""


READS_HOST = (torch.Tag.cudagraph_unsafe,)
"""Tags of the ops of a prefill, which copy between host and device: no CUDA graph may hold them."""


def without_autocast(op: Callable) -> Callable:
    """Codes and scores must not depend on the caller's autocast."""

    @wraps(op)
    def run(*args, **kwargs):
        with ExitStack() as stack:
            for kind in ("cpu", "cuda"):
                if torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            return op(*args, **kwargs)

    return run


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
@without_autocast
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


def dense_capacity(config: MiniKVConfig, used: int) -> int:
    """Tokens of a dense region that holds `used`."""
    if config.bits == 16 or used > config.capacity:
        return -(-(used + config.buffer) // BLOCK) * BLOCK
    return config.capacity


def blocks_to_flush(used: int, n: int, capacity: int, config: MiniKVConfig) -> int:
    """Blocks that a row with `used` tokens in its dense region moves to its tier to make room for `n` more."""
    return max(0, used - config.pinned - config.window) // BLOCK if used + n > capacity else 0


def grouping(config: MiniKVConfig, role: str, head_dim: int) -> tuple[int, str]:
    """Group size and axis of the keys or the values."""
    return (config.group, "token") if role == "key" else (config.value_group(head_dim), "channel")


@custom_op("minikv::compress", mutates_args=(), tags=READS_HOST)
@without_autocast
def compress_prompt(
    k: Tensor, v: Tensor, scores: Tensor | None, order: Tensor | None, lengths: Tensor | None, layer: int, layers: int,
    config: str,
) -> list[Tensor]:  # fmt: skip
    """Select, gather, rotate, quantize and pack the prompt's keys and values.

    Args:
        k, v: [batch, kv_heads, seq, head_dim], any strides.
        scores: fp32 [batch, kv_heads, seq], each row's valid tokens first; None where the policy observes nothing.
        order, lengths: of `align_rows`; None for no padding.
        config: `MiniKVConfig.to_json()`.

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

    packed = [0 if whole else max(0, n - settings.pinned - settings.window) // BLOCK * BLOCK for n in counts]
    in_dense = [n - p for n, p in zip(counts, packed, strict=True)]
    capacity = dense_capacity(settings, max(in_dense))
    rows = torch.tensor([[seq - n, 0, p, n] for n, p in zip(in_dense, packed, strict=True)], dtype=torch.int32)
    if k.is_cuda:
        rows = rows.pin_memory()  # a copy from anything else would wait for the device
    rows = rows.to(k.device, non_blocking=True)
    rotation = rotation_matrix(settings.rotation, dim, k.device)
    shared = []
    if settings.pins:
        important = important_tokens(prompts, chosen, packed, settings)
        shared.append(important.int())
        if any(packed):
            stored = stored_order(important, max(counts), settings.sinks)
            index = stored if index is None else index.gather(2, stored)
    if settings.drops or padded:
        everything = torch.arange(seq, device=k.device).expand(batch, heads, -1) if index is None else index
        shared.append(bitmask(everything, rows[:, IN_TIER] + rows[:, -1], seq))
    if index is not None:
        index = index.contiguous()

    out = []
    for role, x in zip(ROLES, (k, v), strict=True):
        state = rows[:, :-1].clone(memory_format=torch.contiguous_format)
        tokens = state[:, IN_TIER]
        counted = torch.zeros(batch, seq, dtype=torch.int32, device=k.device), state[:, NOT_FINITE]
        if settings.bits < 16:
            group, axis = grouping(settings, role, dim)
            blocks = max(max(packed) // BLOCK, MIN_BLOCKS)
            out += compress.compress(
                x, index, settings.pinned, tokens, blocks, settings.bits, group, axis, role, rotation, settings.clip,
                counted=counted,
            )  # fmt: skip
        out += [compress.dense_region(x, index, settings.pinned, tokens, rows[:, -1], capacity, counted), state]
        out += [t.clone() if role == ROLES[1] else t for t in shared]  # outputs must not share storage
    return out


def slots(important: Tensor, n: int, sinks: int) -> Tensor:
    """The inverse of `stored_order`: the slot of each of a row's first `n` stored tokens.

    Args:
        important: int [batch, kv_heads, count], ascending, none a sink.

    Returns:
        int64 [batch, kv_heads, n].
    """
    token = torch.arange(n, device=important.device, dtype=important.dtype).expand(*important.shape[:2], n).contiguous()
    before = torch.searchsorted(important, token)
    count = important.shape[2]
    is_important = important.gather(2, before.clamp(max=count - 1)) == token
    return torch.where(is_important, sinks + before, torch.where(token < sinks, token, token + count - before))


def fields(config: MiniKVConfig, padded: bool) -> list[str]:
    """Names of the tensors that `compress_prompt` returns for the keys, and again for the values."""
    names = ["codes", "scale", "zero"] if config.bits < 16 else []
    return names + ["dense", "state"] + ["important"] * config.pins + ["kept"] * (config.drops or padded)


@compress_prompt.register_fake
def _(k, v, scores, order, lengths, layer, layers, config):
    settings = MiniKVConfig.from_json(config)
    batch, heads, seq, dim = k.shape
    capacity = compat.new_size(k, MIN_BLOCKS)
    blocks = compat.new_size(k, MIN_BLOCKS) if settings.bits < 16 else 0
    out = []
    for role, x in zip(ROLES, (k, v), strict=True):
        codes, scale, zero = tier_shapes(settings, role, blocks, dim) if settings.bits < 16 else (None, None, None)
        made = {
            "codes": (codes, torch.int16),
            "scale": (scale, metadata_dtype(x.dtype)),
            "zero": (zero, metadata_dtype(x.dtype)),
            "dense": ((capacity, dim), x.dtype),
            "important": ((settings.important,), torch.int32),
            "kept": (((seq + 7) // 8,), torch.uint8),
        }
        for name in fields(settings, lengths is not None):
            if name == "state":
                out.append(x.new_empty((batch, 3), dtype=torch.int32))
            else:
                shape, dtype = made[name]
                out.append(x.new_empty((batch, heads, *shape), dtype=dtype))
    return out


def tier_shapes(config: MiniKVConfig, role: str, blocks: int, dim: int) -> tuple[tuple[int, ...], ...]:
    """Shapes of codes, scale and zero (`kernels.packing`), without batch and heads."""
    group, axis = grouping(config, role, dim)
    width = words(config.bits)
    meta = (blocks, BLOCK // group, dim) if axis == "token" else (blocks, dim // group, BLOCK)
    return ((blocks, width, dim) if role == "key" else (blocks, dim, width)), meta, meta


@custom_op("minikv::decode_attention", mutates_args=("k_dense", "v_dense"))
@without_autocast
def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, k_tier: Sequence[Tensor], v_tier: Sequence[Tensor], k_dense: Tensor,
    v_dense: Tensor, state: Tensor, length: int, scale: float, config: str, padding: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Append the new tokens to the dense regions, and attend from them over tier and dense region.

    Args:
        q: [batch, heads, n, head_dim]; k, v: the new tokens, [batch, kv_heads, n, head_dim].
        k_tier, v_tier: codes, scale and zero, or nothing (16 bits). k_dense, v_dense: written in place; the caller has
            made room (`KVTensor.reserve`).
        state: int32 [batch, 3] of the keys. length: logical tokens, without the new ones.
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
    return attention.attend(
        q, k, v, tuple(k_tier) or None, tuple(v_tier) or None, k_dense, v_dense, state, length + k.shape[2], scale,
        settings.bits, settings.group, "token", settings.value_group(dim),
        rotation_matrix(settings.rotation, dim, q.device),
    )  # fmt: skip


@decode_attention.register_fake
def _(q, k, v, k_tier, v_tier, k_dense, v_dense, state, length, scale, config, padding=None):
    return q.new_empty(q.shape)


def check_padding(valid: Tensor, state: Tensor, length: int, n: int, config: MiniKVConfig) -> None:
    """Raise if the mask of a later call does not fit the cache, which knows its padding from the prefill.

    Args:
        valid: bool [batch, length + n].
    """
    fits = valid[:, length : length + n].all()
    if not config.drops:
        stored = state[:, IN_TIER] + length - state[:, OFFSET]
        fits &= (valid[:, :length].sum(-1) == stored).all()
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
    attention.append(k_dense, k, state, length)
    attention.append(v_dense, v, state, length)
    return attention.attend_reference(
        q, tuple(k_tier) or None, tuple(v_tier) or None, k_dense, v_dense, state, length, scale, settings.bits,
        settings.group, "token", settings.value_group(q.shape[-1]), rotation,
    )  # fmt: skip


@custom_op("minikv::flush", mutates_args=("codes", "scale", "zero", "dense", "state"))
@without_autocast
def flush(
    codes: Tensor, scale: Tensor, zero: Tensor, dense: Tensor, state: Tensor, length: int, n: int, capacity: int,
    blocks: int, role: str, config: str,
) -> None:  # fmt: skip
    """Move the oldest tokens of full rows' dense regions that are neither sink nor window into the tier, in whole
    blocks (`blocks_to_flush`, on the device).

    Args:
        length: logical tokens. n, capacity: rows that could not hold `n` more in `capacity` tokens are full.
        blocks: the most that any row moves. The tier has room for them.
        role: "key" or "value".
    """
    settings = MiniKVConfig.from_json(config)
    dim = dense.shape[-1]
    group, axis = grouping(settings, role, dim)
    counted = torch.zeros(dense.shape[0], dense.shape[2], dtype=torch.int32, device=dense.device), state[:, NOT_FINITE]
    plan = flush_kernels.plan(state, length, n, capacity, settings.pinned, settings.window, blocks)
    compress.compress(
        dense, None, settings.pinned, plan[0], blocks, settings.bits, group, axis, role,
        rotation_matrix(settings.rotation, dim, dense.device), settings.clip, out=(codes, scale, zero),
        first_block=plan[1], counted=counted,
    )  # fmt: skip
    flush_kernels.move_up(dense, state, plan, settings.pinned)


@flush.register_fake
def _(codes, scale, zero, dense, state, length, n, capacity, blocks, role, config):
    return None


def kept_mask(kept: Tensor, state: Tensor, length: int) -> Tensor:
    """bool [batch, kv_heads, length]: which logical tokens of a `KVTensor` are stored."""
    return tokens_kept(kept, state[:, IN_TIER] + length - state[:, OFFSET], length, length)


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


@custom_op("minikv::dequantize", mutates_args=())
@without_autocast
def dequantize(
    codes: Tensor | None, scale: Tensor | None, zero: Tensor | None, dense: Tensor, state: Tensor,
    important: Tensor | None, kept: Tensor | None, length: int, role: str, config: str,
) -> Tensor:  # fmt: skip
    """The dense [batch, kv_heads, length, head_dim] of a `KVTensor`'s tensors; zeros for what is not stored."""
    settings = MiniKVConfig.from_json(config)
    batch, _, capacity, dim = dense.shape
    pinned, in_tier = settings.pinned, state[:, None, IN_TIER, None]
    # In storage: what is pinned, then the tier, then the rest of the dense region.
    if important is None:
        token = torch.arange(length, device=dense.device).expand(batch, 1, -1)
    else:
        token = slots(important, length, settings.sinks)
    token = token.expand(-1, dense.shape[1], -1)
    inside = (token >= pinned) & (token < pinned + in_tier)
    values = take_tokens(dense, torch.where(token < pinned, token, token - in_tier).clamp(0, capacity - 1))
    if codes is not None:
        group, axis = grouping(settings, role, dim)
        packed = packing.dequantize(packing.unpack(codes, settings.bits, role), scale, zero, group, axis).flatten(2, 3)
        rotation = rotation_matrix(settings.rotation, dim, dense.device)
        packed = packing.to_dtype(packed if rotation is None else packed @ rotation.T, dense.dtype)
        slot = (token - pinned).clamp(0, packed.shape[2] - 1)
        values = torch.where(inside[..., None], take_tokens(packed, slot), values)
    return values if kept is None else place_tokens(values, kept_mask(kept, state, length))


@dequantize.register_fake
def _(codes, scale, zero, dense, state, important, kept, length, role, config):
    return dense.new_empty((dense.shape[0], dense.shape[1], length, dense.shape[3]))
