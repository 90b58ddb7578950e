"""The idiom of `MiniKVCache`: an op of ours stores the prompt, another appends and reads everything back dense.

Storages and lengths are plain tensors of the graph's inputs, so that nothing changes at its boundary. What the masks of
a decode step are, only the device knows (their offset is the cache's length), or they come from outside of the graph:
instead of a proof, the rewritten step checks them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from .. import ops
from ..config import MiniKVConfig
from ..fixed import DENSE, STATE, check_step
from ..ops import ROLES
from .graph import erase_dead, example, is_getitem, same, shape
from .masks import read_mask
from .sites import NotTaken, Site

if TYPE_CHECKING:
    from .rewrite import Rewriter

NAME = "MiniKVCache"
SEQ = 2

minikv = torch.ops.minikv
STORE, UPDATE = (minikv.store_prompt, minikv.store_prompt.default), (minikv.update, minikv.update.default)


def calls(graph: torch.fx.Graph) -> list[Node]:
    """The ops of `MiniKVCache` in a graph."""
    return [node for node in graph.nodes if node.op == "call_function" and node.target in (*STORE, *UPDATE)]


def configuration(call: Node) -> MiniKVConfig:
    """That of the cache which made `call`."""
    return MiniKVConfig.from_json(next(arg for arg in reversed(call.args) if isinstance(arg, str)))


def find_call(site: Site) -> Node | None:
    """The op of a `MiniKVCache` that stores what `site` attends to."""
    if is_getitem(site.key) and site.key.args[0].target in UPDATE:
        call = site.key.args[0]
        return call if is_getitem(site.value) and site.value.args == (call, 1) and site.key.args[1] == 0 else None
    stores = (user for user in site.key.users if user.target in STORE and user.args[:2] == (site.key, site.value))
    return next(stores, None)


def plan(rewriter: Rewriter, site: Site, call: Node) -> tuple[str, Callable[[int, int], None]]:
    """As `Rewriter._plan`.

    Raises:
        NotTaken: with the reason. The cache then serves the model's own attention.
    """
    new = shape(site.query)[SEQ]
    if not same(shape(call.args[0])[SEQ], new):
        raise NotTaken(f"{new} queries for {shape(call.args[0])[SEQ]} new keys: cross-attention")
    if call.target in STORE:
        return "prefill", partial(_prefill, rewriter, site, call, _prompt_padding(rewriter, site, call))
    rows, held = shape(call.args[0])[0], shape(call.args[2][DENSE])[0]
    if rows != held:  # a guard: Dynamo knows the rows of the cache, and may take those of the tokens for dynamic
        raise NotTaken(f"{rows} rows of new tokens for a cache of {held}")
    readers = {user for item in call.users for user in item.users}
    if len(call.users) > 2 or not only_for(site, readers):
        raise NotTaken("its keys or values are also read elsewhere")
    mask = _step_mask(site, call)
    checked, rewriter.checked = mask in rewriter.checked, rewriter.checked | {mask}
    return "decode" if same(new, 1) else "extend", partial(decode, rewriter, site, call, None if checked else mask)


def only_for(site: Site, readers: set[Node]) -> bool:
    """Whether `readers`, and those behind them, end in the attention."""
    for reader in readers - set(site.nodes):
        if not reader.users or reader.op == "output" or not only_for(site, set(reader.users)):
            return False
    return True


def _prompt_padding(rewriter: Rewriter, site: Site, call: Node) -> tuple[Node | None, bool]:
    """The padding of a prompt; and whether it is a whole mask from outside, to be read when it runs."""
    new = shape(site.query)[SEQ]
    if len(site.masks) == 1 and not site.masks[0].blocks and _from_outside(site.masks[0].node, call, new, new):
        return site.masks[0].node, True
    masks = [read_mask(mask.node, new, mask.blocks) for mask in site.masks]
    return rewriter._padding(site, masks, new, new), False


def _step_mask(site: Site, call: Node) -> Node:
    new, keys = shape(site.query)[SEQ], shape(site.key)[SEQ]
    if not site.masks:
        raise NotTaken("without a mask it sees room that holds no tokens yet")
    mask = site.masks[0]
    if len(site.masks) > 1 or mask.blocks or not _is_plain(mask.node, call, new, keys):
        raise NotTaken("its mask is more than causal and padding (biases by position, or heads of their own)")
    known = read_mask(mask.node, new)
    if known is not None and known.sliding:
        raise NotTaken("sliding window attention")
    return mask.node


def _from_outside(mask: Node, call: Node, queries: Any, keys: Any) -> bool:
    return mask.op == "placeholder" and _is_plain(mask, call, queries, keys) and same(
        shape(mask)[0], shape(call.args[0])[0]
    )  # fmt: skip


def _is_plain(mask: Node, call: Node, queries: Any, keys: Any) -> bool:
    """Whether a mask has the shape [batch, 1, queries, keys]."""
    sizes, batch = shape(mask), shape(call.args[0])[0]
    return (
        len(sizes) == 4 and (same(sizes[0], batch) or same(sizes[0], 1)) and same(sizes[1], 1)
        and same(sizes[2], queries) and same(sizes[3], keys)
    )  # fmt: skip


def _prefill(
    rewriter: Rewriter, site: Site, call: Node, padding: tuple[Node | None, bool], place: int, count: int
) -> None:
    graph, observed = rewriter.graph, rewriter.config.observed_queries
    mask, outside = padding
    count_not_finite(rewriter, site, call.args[5:7], stores=True)
    rows = (None, None)
    if mask is not None:
        rows = rewriter._aligned(read_outside(rewriter, mask) if outside else mask, call.args[0], _first(site, call))
    statistics = rewriter.query_statistics(site, call.args[0], rows)
    call.args = (*call.args[:2], None, *rows, *call.args[5:], *statistics)
    for node in filter(None, statistics):
        node.append(call)
    if observed is None and mask is None and site.fused:
        rewriter.without_mask(site, *call.args[:2])
        return
    with graph.inserting_before(site.node):
        out, scores = rewriter._call(
            minikv.prefill_attention.default, (site.query, *call.args[:2], *rows, site.scale, observed), 2
        )
    rewriter.replace(site.node, out)
    call.update_arg(2, None if observed is None else scores)
    scores.append(call)
    erase_dead(graph, [site.node], site.nodes)


def count_not_finite(rewriter: Rewriter, site: Site, held: Sequence[Sequence[Node]], stores: bool) -> None:
    """Let the boundary look for tokens with NaN or inf in storages of keys and of values."""
    rewriter.result.counted += [(role, site.layer, t[DENSE], t[STATE]) for role, t in zip(ROLES, held, strict=True)]
    rewriter.result.stores |= stores


def _first(site: Site, call: Node) -> Node:
    """Whichever of the two comes first in the graph."""
    return min(site.node, call, key=list(call.graph.nodes).index)


def read_outside(rewriter: Rewriter, mask: Node, whole: bool = False) -> Node:
    """The padding of a mask (`minikv::padding_of`), read once per graph."""
    for user in mask.users:
        if user.target is minikv.padding_of.default:
            return user
    with rewriter.graph.inserting_after(rewriter.originals[-1]):
        node = rewriter.graph.call_function(minikv.padding_of.default, (mask, whole))
    node.meta["example_value"] = example(mask)[:, 0, -1].bool()
    return node


def _only_before(node: Node, there: Node, call: Node) -> bool:
    """Whether an input of the graph is read by nothing from `there` on but `call`, so that it can be written there."""
    return node.op == "placeholder" and all(user is call or user < there for user in node.users)


def _make_room(rewriter: Rewriter, site: Site, call: Node, mask: Node | None, limit: int | None) -> None:
    """Room for the new token of `call`: in one op with that of other layers which are alike."""
    graph = rewriter.graph
    _, _, key, value, _, _, length, padding, _, text = call.args
    dense = (*key[DENSE:], *value[DENSE:])  # tiers may differ in their blocks
    alike = text, len(key), *((str(list(shape(x))), example(x).dtype, example(x).device) for x in dense)  # or symbols
    there = rewriter.rooms.get(alike)
    given = (*key, *value, length)
    if mask is None and there is not None and all(_only_before(node, there, call) for node in given):
        keys, values, lengths, *rest = there.args
        there.args = ([*keys, *key], [*values, *value], [*lengths, length], *rest)
        return
    with graph.inserting_before(site.node):
        if mask is not None and rewriter.fused and example(mask).device.type != "cpu":
            # Inductor fuses it with what makes the mask. (A CPU raises at once, which no graph can.)
            graph.call_function(check_step, (mask, length, padding, 1, limit))
            mask = limit = None
        rewriter.rooms[alike] = graph.call_function(
            minikv.make_room.default, (key, value, [length], padding, 1, mask, limit, text)
        )


def decode(rewriter: Rewriter, site: Site, call: Node, mask: Node | None, place: int, count: int) -> None:
    """Replace a later attention, whose new tokens `call` (`minikv::update`) is to store; `mask` None: nothing is checked."""
    graph, config = rewriter.graph, rewriter.config
    k, v, key, value, _, _, length, padding, max_length, text = call.args
    limit = None if mask is None else max_length
    new = shape(k)[SEQ]
    count_not_finite(rewriter, site, (key, value), stores=False)
    if same(new, 1):
        _make_room(rewriter, site, call, mask, limit)
        with graph.inserting_before(site.node):
            # A CPU has no kernel of ours: Inductor makes one of the op's plain PyTorch.
            in_graph = rewriter.fused and example(site.query).device.type == "cpu"
            out = graph.call_function(
                ops.decode_attention_in_graph if in_graph else minikv.decode_attention.default,
                (
                    site.query, k, v, key[:DENSE], value[:DENSE], key[DENSE], value[DENSE], key[STATE], -1, site.scale,
                    text, rewriter._rotation(site.query) if in_graph and config.bits < 16 else None,
                ),
            )  # fmt: skip
    else:
        with graph.inserting_before(site.node):
            out = graph.call_function(
                minikv.extend_attention.default,
                (site.query, k, v, key, value, length, padding, mask, limit, site.scale, text),
            )
    out.meta["example_value"] = example(site.node)
    rewriter.replace(site.node, out)
    erase_dead(graph, [site.node], (*site.nodes, call))
