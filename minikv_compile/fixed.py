"""The custom ops of `MiniKVCache`: storages of fixed capacity, whose lengths only the device knows.

A layer holds, for the keys and for the values, the tensors of a `KVTensor` (`names`), with one difference: the offset
in a state is minus the tokens in the dense region, so that every formula of `length - offset` holds with a constant for
the length. `decode_attention` and `flush` are the same ops.
"""

from __future__ import annotations

import logging
from functools import cache

import torch
from torch import Tensor
from torch.library import custom_op
from torch.utils.weak import WeakIdKeyDictionary

from . import compat, ops
from .config import MiniKVConfig
from .finite import news, warn_not_finite
from .kernels import attend, flush
from .kernels.important import NO_TOKEN
from .kernels.packing import BLOCK
from .kernels.state import COLUMNS, IN_TIER, OFFSET, PINNED
from .ops import MIN_BLOCKS, READS_HOST, ROLES, on_its_own, stored_tokens
from .policy import POLICIES
from .rotation import rotation_matrix

log = logging.getLogger("minikv")

TOO_FEW = "It was made for less than it is asked to store: raise max_new_tokens, or leave it out."
FULL_TIER = f"MiniKVCache is full: a layer has no room for another block of tokens. {TOO_FEW}"
VERY_NEGATIVE = -1e4
"""What is added to the logit of a key that is not seen is at most this."""


def names(config: MiniKVConfig, role: str) -> list[str]:
    """Of the tensors that hold a layer's keys, or its values."""
    return [*ops.tier_names(config, role), "dense", "state"]


DENSE, STATE = -2, -1
"""Where in them the dense region and the state are."""


def allocate(
    config: MiniKVConfig, role: str, batch: int, heads: int, max_length: int, dim: int, dtype: torch.dtype,
    device: torch.device, stored: int | None = None,
) -> list[Tensor]:  # fmt: skip
    """Zeros for `max_length` tokens, in the order of `names`. `stored`: how many of them are not dropped, at most, if fewer."""
    lead, made = (batch, heads), []
    if config.bits < 16:
        # A prompt of `stored` tokens may be a little shorter than another that keeps one more: a block to spare. (Where important
        # tokens are a share, a short prompt has few, and what follows it is packed.)
        behind = least_pinned(config) + config.window
        tokens = max_length if stored is None else min(max_length, max(stored, behind) + 2 * BLOCK)
        blocks = max(tokens - behind, BLOCK) // BLOCK
        shapes = ops.tier_tensors(config, role, blocks, dim, config.bits)
        if config.two_tiers:
            blocks = max(config.important_tokens(max_length) // BLOCK, MIN_BLOCKS)
            shapes += ops.tier_tensors(config, role, blocks, dim, config.important_bits)
        made = [torch.zeros(*lead, *shape, dtype=t, device=device) for shape, t in shapes]
        made += [torch.ones(*lead, dim, device=device)] * (config.balances and role == "key")
        capacity = config.pinned(config.important_tokens(max_length)) + config.room
        if config.min_prompt:  # a shorter prompt stays whole
            capacity = ops.dense_capacity(config, min(config.min_prompt, max_length), least_pinned(config))
    else:
        capacity = max_length
    dense = torch.zeros(*lead, capacity, dim, dtype=dtype, device=device)
    return [*made, dense, empty_state(config, batch, device)]


def room(config: MiniKVConfig, capacity: int) -> int:
    """Tokens of a dense region behind the pinned ones, as many in each row."""
    # Where important tokens are a share of the prompt, the region has space for those of the longest one.
    return config.room if isinstance(config.important, float) else capacity - least_pinned(config)


def least_pinned(config: MiniKVConfig) -> int:
    """Pinned tokens of a row without a prompt."""
    return config.pinned(config.important_tokens())


def empty_state(config: MiniKVConfig, batch: int, device: torch.device) -> Tensor:
    """That of rows without a prompt."""
    state = torch.zeros(batch, COLUMNS, dtype=torch.int32, device=device)
    state[:, PINNED] = least_pinned(config)
    return state


def first_tokens(config: MiniKVConfig, max_length: int, device: torch.device) -> Tensor:
    """int32 [most]: the important tokens of rows without a prompt: as long as nothing is packed, all tokens lie in their
    order."""
    most = config.important_tokens(max_length)
    most = max(most, MIN_BLOCKS) if config.counts_vary else most
    first = torch.arange(config.sinks, config.sinks + most, dtype=torch.int32, device=device)
    return torch.where(first < config.sinks + config.important_tokens(), first, NO_TOKEN)


def used(state: Tensor) -> Tensor:
    """int32 [batch]: tokens in the dense region."""
    return -state[:, OFFSET]


def bits_of(mask: Tensor) -> Tensor:
    """uint8 [..., ceil(n / 8)] of bool [..., n]: bit i % 8 of byte i // 8."""
    bits = torch.nn.functional.pad(mask, (0, -mask.shape[-1] % 8)).unflatten(-1, (-1, 8)).to(torch.uint8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(-1, dtype=torch.uint8)


def set_first(bits: Tensor, n: int) -> None:
    """Set the first `n` of bits that are 0, in place; in uint8, as of `bits_of`."""
    bits[..., : n // 8] = 255
    if n % 8:
        bits[..., n // 8] = 2 ** (n % 8) - 1


_known: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""What the states of storages may count of tokens with NaN or inf without being news, of each row."""


def report(held: list[tuple[str, int, Tensor, Tensor]], config: MiniKVConfig, prompt: bool = False) -> None:
    """Warn of tokens with NaN or inf that were counted since the last report, in these (role, layer, dense region, state): in a
    `prompt` that was just stored, and when they were flushed. Reads the device once.

    Raises:
        ValueError: there are some, and the configuration is strict.
    """
    found = []
    states = torch.stack([state.to(held[0][3].device) for *_, state in held]).tolist()
    for (role, layer, dense, state), rows in zip(held, states, strict=True):
        known = [0] * len(rows) if prompt else _known.get(state, [0] * len(rows))
        in_dense = [-row[OFFSET] for row in rows]
        count, _known[state] = news(rows, known, dense if prompt else None, in_dense, config)
        if count:
            found.append(f"{count} tokens in the {role}s of layer {layer}")
    warn_not_finite(found, config.strict)


@cache
def _warn_unfed() -> None:
    log.warning(
        "MiniKVCache: the prefill ran eagerly, so its keys are rounded to nearest, without error feedback: run it through the "
        "minikv backend too, or set error_feedback=False, which corrects for as much noise."
    )


@custom_op("minikv::store_prompt", mutates_args=("key", "value", "important", "kept", "length", "padding"), tags=READS_HOST)
@on_its_own
def store_prompt(
    k: Tensor, v: Tensor, scores: Tensor | None, order: Tensor | None, lengths: Tensor | None, key: list[Tensor],
    value: list[Tensor], important: Tensor, kept: Tensor, length: Tensor, padding: Tensor, place: int, count: int, max_length: int,
    config: str, q_range: Tensor | None = None, q_moments: Tensor | None = None,
) -> None:  # fmt: skip
    """Compress a prompt into storages that hold nothing that is still needed.

    Args:
        k, v, scores, order, lengths, config, q_range, q_moments: as for `minikv::compress`.
        key, value: the layer's tensors, see `names`.
        important: int32 [batch, kv_heads, most]. kept: uint8 [batch, kv_heads, ceil(max_length / 8)]: one bit
            per prompt token.
        length: int64 []: logical tokens. padding: int64 [batch]: how many of them are padding.
        place, count: of the layer among those that share a budget, and their number.

    Raises:
        ValueError: the prompt does not fit the storages; or its scores are missing: the policy observes attention, and
            the prefill has not been rewritten.
    """
    settings = MiniKVConfig.from_json(config)
    batch, heads, seq, dim = k.shape
    dense = key[DENSE]
    if (batch, heads, dim, k.dtype) != (dense.shape[0], dense.shape[1], dense.shape[3], dense.dtype):
        raise ValueError(
            f"MiniKVCache, layer {place}: keys {list(k.shape)} of {k.dtype}, but storages for a batch of "
            f"{dense.shape[0]}, {dense.shape[1]} KV heads of {dense.shape[3]}, {dense.dtype}: make a MiniKVCache for "
            "this model and batch_size."
        )
    if seq > max_length:
        raise ValueError(f"MiniKVCache: a prompt of {seq} tokens, but room for {max_length}: raise max_cache_len.")
    packs = seq >= max(settings.min_prompt, least_pinned(settings) + settings.window + BLOCK)
    if packs and ((settings.observed_queries is not None and scores is None) or (settings.balances and q_range is None)):
        drops = settings.drops and POLICIES[settings.policy].observes != "nothing"
        looks = f"the policy {settings.policy if drops else settings.importance!r}"
        looks = looks if settings.observed_queries is not None else f"the balancer {settings.balancer!r}"
        raise ValueError(
            f"MiniKVCache: {looks} looks at the prompt's attention, so the prefill must run through the minikv "
            "backend too: model.compile(backend=...) and generate(..., disable_compile=True). (With a CompileConfig, "
            "generate runs the prefill eagerly.)"
        )
    if packs and settings.feeds_back and q_moments is None:
        _warn_unfed()
    if settings.balances and q_range is None:  # nothing is packed, and nothing will be balanced
        q_range = torch.full((batch, heads, dim), torch.nan, device=k.device)
    made = iter(ops.compress_prompt(k, v, scores, order, lengths, place, count, config, q_range, q_moments))
    for role, tensors in zip(ROLES, (key, value), strict=True):
        parts = {name: next(made) for name in ops.fields(settings, role, lengths is not None)}
        for name, tensor in zip(names(settings, role), tensors, strict=True):
            if name == "state":
                tensor.copy_(parts[name])[:, OFFSET].sub_(seq)
            else:
                stored = min(tensor.shape[2], parts[name].shape[2])
                if name == "codes" and parts[name].shape[2] > max(tensor.shape[2], ops.MIN_BLOCKS):
                    raise ValueError(f"MiniKVCache, layer {place}: no room for a prompt of {seq} tokens. {TOO_FEW}")
                tensor[:, :, :stored] = parts[name][:, :, :stored]
    if settings.pins:
        stored = min(important.shape[2], parts["important"].shape[2])
        important.fill_(NO_TOKEN)[:, :, :stored] = parts["important"][:, :, :stored]
    kept.zero_()
    if "kept" in parts:
        kept[..., : parts["kept"].shape[-1]] = parts["kept"]
    else:
        set_first(kept, seq)
    length.fill_(seq)
    if lengths is None:
        padding.zero_()
    else:
        padding.copy_(seq - lengths)


@store_prompt.register_fake
def _(
    k, v, scores, order, lengths, key, value, important, kept, length, padding, place, count, max_length, config, q_range=None,
    q_moments=None,
):  # fmt: skip
    return None


@custom_op("minikv::make_room", mutates_args=("key", "value", "length"))
@on_its_own
def make_room(
    key: list[Tensor], value: list[Tensor], length: list[Tensor], padding: Tensor, n: int, mask: Tensor | None,
    max_length: int | None, config: str,
) -> None:  # fmt: skip
    """In every layer, count `n` more tokens, which `decode_attention` will append, and flush the rows that could not hold
    them.

    Nothing on the host depends on the device: it can be captured in a CUDA graph.

    Args:
        key, value: the tensors of the layers (`names`), one layer after the other; all layers' are alike, but for the tiers'
            blocks. length: of each.
        n: 1, or any number where there is no tier.
        padding: of the first layer. mask: [batch or 1, 1, n, max_length], what its attention was to see: checked. None:
            checked elsewhere. max_length: checked. None: checked elsewhere.

    Raises:
        ValueError: a token too many, or a mask that is not causal and padding. On a GPU, an assertion of the device.
    """
    settings = MiniKVConfig.from_json(config)
    if max_length is not None:
        check_step(mask, length[0], padding, n, max_length)
    keys, values = _by_layer(key, value, settings)
    if not keys[0][DENSE].is_cuda or settings.bits == 16:
        for tensors in zip(keys, values, length, strict=True):
            make_room_reference(*tensors, n, settings)
        return
    torch._foreach_add_(length, n)
    space = room(settings, keys[0][DENSE].shape[2])
    blocks = (space - settings.window) // BLOCK
    fits = ops.flush(*_flushed_parts(keys, values), 0, n, space, blocks, settings, counted=n)
    if settings.drops:  # else there is room for all that a cache may hold
        require(fits.all(), FULL_TIER)


@make_room.register_fake
def _(key, value, length, padding, n, mask, max_length, config):
    return None


def _by_layer(key: list[Tensor], value: list[Tensor], config: MiniKVConfig) -> list[list[tuple[Tensor, ...]]]:
    """The tensors of each layer (`names`): of its keys, and of its values."""
    both = zip(ROLES, (key, value), strict=True)
    return [list(zip(*[iter(held)] * len(names(config, role)), strict=True)) for role, held in both]


def _flushed_parts(*layers: list[tuple[Tensor, ...]]) -> list[list[tuple[Tensor, ...]]]:
    """Of each layer's tensors, those that `kernels.flush` takes."""
    return [[(*t[:3], t[DENSE], t[STATE], t[DENSE - 1]) for t in held] for held in layers]


def prepare_room(key: list[Tensor], value: list[Tensor], config: MiniKVConfig) -> None:
    """Before a graph with `make_room` runs on these tensors for the first time."""
    if key[0].is_cuda and config.bits < 16:
        flush.table_of(*_flushed_parts(*_by_layer(key, value, config)), keep=True)


def make_room_reference(key: list[Tensor], value: list[Tensor], length: Tensor, n: int, config: MiniKVConfig) -> None:
    """`make_room` in one layer, in plain PyTorch."""
    for role, tensors in zip(ROLES, (key, value), strict=True):
        _flush_full(tensors, n, role, config)
        tensors[STATE][:, OFFSET] -= n
    length += n


def _flush_full(tensors: list[Tensor], n: int, role: str, config: MiniKVConfig) -> None:
    """Flush the rows whose dense region could not hold `n` more."""
    space = room(config, tensors[DENSE].shape[2])
    # The host may ask a CPU. On a GPU, programs of the kernel that find nothing to do end at once.
    state = tensors[STATE]
    if config.bits == 16 or (not state.is_cuda and not (used(state) - state[:, PINNED] + n > space).any()):
        return
    _flush(tensors, tensors[DENSE], n, space, space, role, config)


def _flush(
    tensors: list[Tensor], dense: Tensor, n: int, space: int, most: int, role: str, config: MiniKVConfig
) -> None:
    """Flush the rows of `dense` that could not hold `n` more in `space` tokens behind the pinned ones; none holds more than
    `most`.

    Raises:
        ValueError: no room in the tier. On a GPU, an assertion of the device.
    """
    state = tensors[STATE]
    blocks = (most - config.window) // BLOCK
    if config.drops:
        leaving = flush.plan_reference(state, 0, n, space, config.window, blocks)[0]
        require((state[:, IN_TIER] + leaving <= tensors[0].shape[2] * BLOCK).all(), FULL_TIER)
    parts = [(*tensors[:3], dense, state, tensors[DENSE - 1])]
    stays = dense is tensors[DENSE]
    ops.flush(*((parts, []) if role == "key" else ([], parts)), 0, n, space, blocks, config, keep=stays)


def check_step(mask: Tensor | None, length: Tensor, padding: Tensor, n: int, max_length: int) -> None:
    """Raise unless `n` more tokens fit, and `mask` lets each see all tokens but padding and those after it."""
    require(
        length + n <= max_length,
        f"MiniKVCache is full: it has room for {max_length} tokens. Raise max_cache_len, or start a new cache.",
    )
    if mask is None:
        return
    # Which tokens are padding the prefill has settled; that it is as many, and no new token, is checked here.
    newest, query = seen_keys(mask)[0][:, -1], length + torch.arange(n, device=mask.device)
    own = newest.index_select(1, query.clamp(max=max_length - 1))
    require(
        is_causal(mask, length) & (newest.sum(-1) == length + n - padding).all() & own.all(),
        "The attention mask does not fit the cache of fixed capacity (MiniKVCache, StaticCache): it must be causal, with the "
        "prompt's padding and no other. A padded prompt needs its prefill under the minikv backend; after it, continue all "
        "rows with equally many tokens, none of them padding.",
    )


def is_causal(mask: Tensor, start: Tensor | int) -> Tensor:
    """bool []: whether a mask [batch, 1, n, keys] lets the queries from the position `start` on see the keys up to their own,
    but for some that no query of a row sees (padding)."""
    allowed, fits = seen_keys(mask)
    key = torch.arange(mask.shape[3], device=mask.device)
    query = start + torch.arange(mask.shape[2], device=mask.device)
    return fits & (allowed == (allowed[:, -1:] & (key <= query[:, None]))).all()


def seen_keys(mask: Tensor) -> tuple[Tensor, Tensor]:
    """bool [batch, queries, keys] of a mask [batch, 1, queries, keys], and whether it says yes or no everywhere."""
    mask = mask[:, 0]
    if mask.dtype == torch.bool:
        return mask, torch.ones((), dtype=torch.bool, device=mask.device)
    return mask == 0, ((mask == 0) | (mask <= VERY_NEGATIVE)).all()


def require(condition: Tensor, message: str) -> None:
    """Raise ValueError; on a GPU, let the device assert."""
    if condition.is_cuda:
        compat.assert_on_device(condition, message)
    elif not condition:
        raise ValueError(message)


@custom_op("minikv::extend_attention", mutates_args=("key", "value", "length"), tags=READS_HOST)
@on_its_own
def extend_attention(
    q: Tensor, k: Tensor, v: Tensor, key: list[Tensor], value: list[Tensor], length: Tensor, padding: Tensor,
    mask: Tensor | None, max_length: int | None, scale: float, config: str,
) -> Tensor:  # fmt: skip
    """Append any number of tokens and attend from them; arguments as of `make_room` and `decode_attention`.

    Returns:
        [batch, heads, n, head_dim].
    """
    settings = MiniKVConfig.from_json(config)
    n, dim = k.shape[2], k.shape[3]
    if max_length is not None:
        check_step(mask, length, padding, n, max_length)
    k_dense, v_dense = (_room(t, n, role, settings) for role, t in zip(ROLES, (key, value), strict=True))
    out = attend.attend(
        q, k, v, k_dense=k_dense, v_dense=v_dense, state=key[STATE], length=n, scale=scale,
        rotation=rotation_matrix(settings.rotation, dim, q.device),
        **ops.attended(key[:DENSE], value[:DENSE], settings, dim),
    )  # fmt: skip
    _settle(key, k_dense, n, "key", settings)
    _settle(value, v_dense, n, "value", settings)
    length += n
    return out


@extend_attention.register_fake
def _(q, k, v, key, value, length, padding, mask, max_length, scale, config):
    return q.new_empty(q.shape)


def _room(tensors: list[Tensor], n: int, role: str, config: MiniKVConfig) -> Tensor:
    """The dense region, or, where it is not sure to hold `n` more tokens, a larger copy for a while."""
    _flush_full(tensors, n, role, config)
    dense = tensors[DENSE]
    # A flush leaves room for one token at least.
    return dense if n == 1 or config.bits == 16 else torch.nn.functional.pad(dense, (0, 0, 0, n))


def _settle(tensors: list[Tensor], dense: Tensor, n: int, role: str, config: MiniKVConfig) -> None:
    """Count the `n` tokens that were appended to `dense` (of `_room`), and bring it back to the storage."""
    own = tensors[DENSE]
    tensors[STATE][:, OFFSET] -= n
    if dense is not own:
        space = room(config, own.shape[2])
        _flush(tensors, dense, 0, space, space + n, role, config)
        own.copy_(dense[:, :, : own.shape[2]])


@custom_op("minikv::update", mutates_args=("key", "value", "length"), tags=READS_HOST)
@on_its_own
def update(
    k: Tensor, v: Tensor, key: list[Tensor], value: list[Tensor], important: Tensor, kept: Tensor, length: Tensor,
    padding: Tensor, max_length: int, config: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Append new tokens, and return all of them dense, for an attention of the model's own. The pass replaces this op,
    and that attention, by `decode_attention` or `extend_attention`.

    Returns:
        keys and values, [batch, kv_heads, max_length, head_dim]; zeros for what is not stored.

    Raises:
        RuntimeError: the policy drops tokens: dense attention would take them for zeros.
    """
    settings = MiniKVConfig.from_json(config)
    n = k.shape[2]
    if settings.drops:
        raise RuntimeError(
            f"MiniKVCache with the policy {settings.policy!r}: dense attention would take dropped tokens for zeros. "
            "Run the model through the minikv backend: generate(..., compile_config=CompileConfig(backend='minikv'))."
        )
    if n == 1:
        _warn_dense()
    check_step(None, length, padding, n, max_length)
    slots = length + torch.arange(n, device=k.device)
    read = []
    for role, tensors, new in zip(ROLES, (key, value), (k, v), strict=True):
        dense = _room(tensors, n, role, settings)
        read.append(read_dense(tensors, important, kept, length, max_length, role, settings).index_copy_(2, slots, new))
        attend.append(dense, new, tensors[STATE], n)
        _settle(tensors, dense, n, role, settings)
    length += n
    return read[0], read[1]


@update.register_fake
def _(k, v, key, value, important, kept, length, padding, max_length, config):
    shape = k.shape[0], k.shape[1], max_length, k.shape[3]
    return k.new_empty(shape), v.new_empty(shape)


@cache
def _warn_dense() -> None:
    log.warning(
        "A MiniKVCache is decoded by dense attention: correct, but slow, and a layer's cache is dense for a moment. "
        "Run the model through the minikv backend: model.compile(backend=minikv_backend) and "
        "generate(..., disable_compile=True), or generate(..., compile_config=CompileConfig(backend='minikv'))."
    )


def read_dense(
    tensors: list[Tensor], important: Tensor, kept: Tensor, length: Tensor, size: int, role: str, config: MiniKVConfig
) -> Tensor:
    """[batch, kv_heads, size, head_dim]: the first `size` tokens; zeros for what is not stored."""
    *tier, dense, state = tensors
    important = important if config.pins else None
    stored = ops.dequantize(tier, dense, state, important, None, size, role, config.to_json())
    return ops.place_tokens(stored, ops.tokens_kept(kept, stored_tokens(state, 0), length, size))


@custom_op("minikv::padding_of", mutates_args=(), tags=READS_HOST)
def padding_of(mask: Tensor, whole: bool = False) -> Tensor:
    """Which tokens are no padding, of a mask [batch, 1, n, keys] that came from outside of the graph.

    Args:
        whole: the keys are all tokens, of which the `n` queries are the last. Else they are the room of a cache, and the
            queries are its first tokens: a prompt.

    Returns:
        bool [batch, keys if `whole` else n].

    Raises:
        ValueError: the mask says anything else than causal and padding.
    """
    n, keys = mask.shape[2:]
    seen, says_yes_or_no = seen_keys(mask)
    message = "The attention mask, which comes from outside of the graph, must be causal, with padding at most."
    if n == 1:
        require(says_yes_or_no, message)  # one token sees what is there, and a step should not wait for the device
    elif not is_causal(mask, keys - n if whole else 0):
        raise ValueError(message)
    return seen[:, -1, : keys if whole else n].clone()  # keys behind a prompt are not there yet


@padding_of.register_fake
def _(mask, whole=False):
    return mask.new_empty((mask.shape[0], mask.shape[3 if whole else 2]), dtype=torch.bool)
