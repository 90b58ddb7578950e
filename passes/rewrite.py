"""The pass: rewrite every attention site that it can, and say why of the others."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from typing import Any

import torch
from torch.fx import GraphModule, Node

from .. import compat, ops
from ..buffers import Buffers
from ..config import MiniKVConfig
from ..kernels.prefill import causal_attention
from ..ops import ROLES
from ..rotation import rotation_matrix
from ..tensor import SEQ, KVTensor
from . import fixed, functional, static
from .graph import callee, erase_dead, example, is_call, is_getitem, is_written, same, shape, size_getter
from .layers import Layers, number
from .linears import merge_linears
from .masks import Predicate, read_mask, reduces_to_padding
from .once import compute_once
from .sight import check_now
from .sites import NotKept, NotTaken, Site, outputs, read_site, sites_in, where
from .sizes import lower_sizes
from .writes import Write

log = logging.getLogger("minikv")
minikv = torch.ops.minikv


class RewriteError(RuntimeError):
    """A graph that must not run as it is: the message says which site, why, and what to do."""


@dataclass(frozen=True)
class SiteReport:
    """What became of one attention site."""

    layer: int
    where: str
    kind: str
    """ "prefill", "decode", "extend" (several tokens on a compressed past), or "" if it was not taken."""
    idiom: str
    reason: str
    """Why it was left alone; "" if it was rewritten."""
    layer_known: bool = True
    """False: a graph break parted the model, and `layer` counts from the beginning of this part."""

    @property
    def rewritten(self) -> bool:
        return not self.reason


@dataclass(frozen=True, eq=False)
class Made:
    """An output that a prefill compresses: tensors of a new `KVTensor`."""

    role: str
    names: tuple[str, ...]
    nodes: tuple[Node, ...]
    length: Any
    layer: int
    seq: int


@dataclass(frozen=True, eq=False)
class Longer:
    """An output that is the compressed input number `past`, `n` tokens longer."""

    past: int
    n: Any
    layer: int


@dataclass
class Rewritten:
    """A rewritten copy of Dynamo's graph; its placeholders still take `KVTensor`s (see `desugar`)."""

    module: GraphModule
    outputs: list[Node | Made | Longer | static.Born]
    sites: list[SiteReport] = field(default_factory=list)
    fields: dict[Node, tuple[Node, str]] = field(default_factory=dict)
    """Placeholders made by the pass: of which `KVTensor` placeholder they hold which tensor, or "length"."""

    constants: dict[Node, torch.Tensor] = field(default_factory=dict)
    """Placeholders made by the pass that always take the same tensor."""

    buffers: Buffers | None = None
    given_back: set[Node] = field(default_factory=set)
    """Placeholders of static buffers, whose tokens `buffers` holds from now on."""
    densified: set[Node] = field(default_factory=set)
    """Placeholders of such buffers that become dense again."""
    held: list[Node] = field(default_factory=list)
    """Placeholders of the storages that `Buffers.open` gives, in its order."""
    opened: dict[str, Node] = field(default_factory=dict)
    """Placeholders of what else it gives, by their names in `buffers.OPENED`."""
    padding: Node | None = None
    """The placeholder that says which tokens in static buffers are padding."""

    counted: list[tuple[str, int, Node, Node]] = field(default_factory=list)
    """Role, layer and placeholders of the dense regions and states of fixed storages, in which tokens with NaN or inf are
    counted."""
    stores: bool = False
    """Whether the graph may store a prompt in them."""

    @property
    def outputs_changed(self) -> bool:
        """Whether the graph is another, or what it takes and returns."""
        changed = bool(self.fields) or bool(self.densified) or not all(isinstance(out, Node) or out is None for out in self.outputs)
        return changed or any(site.rewritten for site in self.sites)


class Rewriter:
    """Rewrites a copy of one Dynamo graph. Dynamo reads its own graph again later, so that one is never edited."""

    def __init__(
        self, module: GraphModule, config: MiniKVConfig, fused: bool = False, values: Sequence[Any] | None = None
    ):
        """`fused`: whether what runs in plain PyTorch is to be traced into the graph. `values`: of its placeholders."""
        self.config, self.fused = config, fused
        self.module = copy_module(module)
        self.graph = self.module.graph
        self.originals = [node for node in self.graph.nodes if node.op == "placeholder"]
        self.values = values
        self.result = Rewritten(self.module, outputs(self.graph), buffers=Buffers(config))
        self.kept = {node for node in self.result.outputs if isinstance(node, Node)}
        self._fields: dict[tuple[Node, str], Node] = {}
        self.checked: frozenset[Node | None] = frozenset([None])
        self.rooms: dict[Any, Node] = {}  # the ops that make room in a `MiniKVCache`, by what layers that share one have alike
        self._rows: dict[Node, tuple[Node, ...]] = {}

    def run(self) -> Rewritten:
        lower_sizes(self)
        calls = sites_in(self.graph)
        self._check_configuration()
        layers = number(self, calls)
        skipped = self._skipped(layers)
        changes = []
        for layer, name, call in zip(layers.indices, layers.names, calls, strict=True):
            kind, idiom, reason = "", "", ""
            try:
                site = read_site(call, layer)
                if layer in skipped:
                    raise NotTaken("listed in skip_layers")
                kind, idiom, change = self._plan_any(site)
                changes.append((layer, change))
            except NotTaken as untaken:
                reason = str(untaken)
            self.result.sites.append(SiteReport(layer, name, kind, idiom, reason, layers.known))
        # Only now is it known how many layers share a budget: of a part, all that are not skipped.
        shared = [layer for layer in range(layers.total) if layer not in skipped]
        if not (layers.is_part and layers.known):
            shared = [layer for layer, _ in changes]
        for layer, change in changes:
            change(shared.index(layer), len(shared))
        self._densify_rest()
        if self.fused and changes:
            compute_once(self.graph)
            merge_linears(self)
        output = self.graph.output_node()
        output.args = (tuple(self._flat_outputs()),)
        self.graph.lint()
        self.module.recompile()
        return self.result

    # ---- one site

    def _plan_any(self, site: Site) -> tuple[str, str, Callable[[int, int], None]]:
        """As `_plan`, by the idiom of the site, whose name comes second."""
        if (call := fixed.find_call(site)) is not None:
            kind, change = fixed.plan(self, site, call)
            return kind, fixed.NAME, change
        if (buffers := static.find(site)) is not None:
            kind, change = static.plan(self, site, buffers)
            return kind, static.NAME, change
        kind, change = self._plan(site)
        return kind, functional.NAME, change

    def _plan(self, site: Site) -> tuple[str, Callable[[int, int], None]]:
        """What a site becomes, and the function that makes it so: of its place among the sites that are taken, and their
        number.

        Raises:
            NotTaken: with the reason. The graph is as it was.
        """
        new, tokens = shape(site.query)[SEQ], shape(site.key)[SEQ]
        masks = [read_mask(mask.node, new, mask.blocks) for mask in site.masks]
        try:
            key, value = (functional.read_slot(node, self.kept) for node in (site.key, site.value))
        except NotKept:
            if any(mask and mask.sliding for mask in masks):  # its cache keeps a slice
                raise NotTaken("sliding window attention") from None
            raise
        if (key.past is None) != (value.past is None) or key.stored is value.stored:
            raise NotTaken("keys and values do not have a slot each")
        if not same(shape(key.new)[key.seq], new) or not same(shape(value.new)[value.seq], new):
            raise NotTaken(f"{new} queries for {shape(key.new)[key.seq]} new keys: cross-attention")
        valid = self._padding(site, masks, new, tokens)
        for size in (new, shape(key.stored)[key.seq]) if key.past is None else (new,):
            if size_getter(size, self.originals) is None:
                raise NotTaken(f"its number of tokens, {size}, is no size of an input of the graph")
        for slot in (key, value):
            reader = other_reader(slot.stored, site.nodes)
            if reader is not None:
                raise NotTaken(f"its keys or values are also read by {where(reader)}")
        if key.past is None:
            return "prefill", partial(self._prefill, site, key, value, valid)
        # One check for all layers: the first that is rewritten makes it.
        check, self.checked = (None if valid in self.checked else valid), self.checked | {valid}
        return "decode" if same(new, 1) else "extend", partial(self._decode, site, key, value, check)

    def _padding(self, site: Site, masks: list[Predicate | None], new: Any, tokens: Any) -> Node | None:
        """The [batch, tokens] padding of a site whose attention is proved causal."""
        if not site.masks:
            if not same(new, 1) and not (site.is_causal and same(new, tokens)):
                raise NotTaken("not causal: every token sees every other")
            if site.is_causal and not same(new, tokens):
                raise NotTaken("is_causal with a past lets the new token see the oldest keys only")
            return None
        if None in masks:
            if (padding := self._padding_from_outside(site, new, tokens)) is not None:
                return padding
            node = site.masks[masks.index(None)].node
            what = "mask" if example(node).dtype == torch.bool else "mask, or bias by position (ALiBi),"
            raise NotTaken(f"its {what} is not understood (built by {callee(node) or node.op})")
        predicate = reduce(operator.and_, masks)
        if predicate.sliding:
            raise NotTaken("sliding window attention")
        if not reduces_to_padding(predicate, new, tokens):
            raise NotTaken("its mask is not causal")
        if not predicate.padding:
            return None
        return predicate.padding[0]

    def _padding_from_outside(self, site: Site, new: Any, tokens: Any) -> Node | None:
        """The padding of a mask [batch, 1, new, tokens] that another graph made: read, and checked, when it runs. Not where
        tokens are dropped: then nothing tells a step's padding from a window that hides tokens which are there."""
        mask, sizes = site.masks[0].node, (shape(site.query)[0], 1, new, tokens)
        readable = isinstance(self.value_of(mask), torch.Tensor) and not self.config.drops
        fits = readable and len(shape(mask)) == 4 and all(same(a, b) for a, b in zip(shape(mask), sizes, strict=True))
        if not fits or len(site.masks) > 1 or site.masks[0].blocks or mask.op != "placeholder" or is_written(mask):
            return None
        check_now(self, mask)
        return fixed.read_outside(self, mask, whole=True)

    def _prefill(
        self, site: Site, key: functional.Slot, value: functional.Slot, padding: Node | None, place: int, count: int
    ) -> None:
        observed = self.config.observed_queries
        with self.graph.inserting_before(site.node):
            k, v = (self._heads_first(slot) for slot in (key, value))
        rows = (None, None) if padding is None else self._aligned(padding, k, site.node)
        statistics = self.query_statistics(site, k, rows)
        scores = None
        if observed is not None or padding is not None or not site.fused:  # attention written out needs memory of seq * seq
            with self.graph.inserting_before(site.node):
                args = (site.query, k, v, *rows, site.scale, observed)
                out, scores = self._call(minikv.prefill_attention.default, args, 2)
            self.replace(site.node, out)
        else:
            site = self.without_mask(site, k, v)
        with self.graph.inserting_after(site.node if scores is None else scores):
            arguments = (
                k, v, None if observed is None else scores, *rows, place, count, self.config.to_json(), *statistics,
            )  # fmt: skip
            names = [ops.fields(self.config, role, padding is not None) for role in ROLES]
            made = self._call(minikv.compress.default, arguments, sum(map(len, names)))
        length = shape(key.stored)[key.seq]
        for role, slot, fields in zip(ROLES, (key, value), names, strict=True):
            nodes, made = made[: len(fields)], made[len(fields) :]
            self._replace_output(slot.stored, Made(role, tuple(fields), tuple(nodes), length, site.layer, slot.seq))
            if slot.stored is not slot.new:
                empty = slot.stored
                self.replace(empty, slot.new)
                erase_dead(self.graph, [empty])
        if scores is not None:
            erase_dead(self.graph, [site.node], site.nodes)

    def _decode(
        self, site: Site, key: functional.Slot, value: functional.Slot, padding: Node | None, place: int, count: int
    ) -> None:
        past = key.past, value.past
        with self.graph.inserting_before(site.node):
            k, v = self._heads_first(key), self._heads_first(value)
            k_tier, v_tier = (
                [self.field(kv, name) for name in ops.tier_names(self.config, role)]
                for kv, role in zip(past, ROLES, strict=True)
            )
            k_dense, v_dense = (self.field(kv, "dense") for kv in past)
            # A CPU has no kernel of ours: Inductor makes one of the op's plain PyTorch.
            in_graph = self.fused and example(site.query).device.type == "cpu" and padding is None
            last = self._rotation(site.query) if in_graph else padding
            out = self.graph.call_function(
                ops.decode_attention_in_graph if in_graph else minikv.decode_attention.default,
                (
                    site.query, k, v, k_tier, v_tier, k_dense, v_dense, self.field(key.past, "state"),
                    self.field(key.past, "length"), site.scale, self.config.to_json(), last,
                ),
            )  # fmt: skip
        out.meta["example_value"] = example(site.node)
        self.replace(site.node, out)
        for slot in (key, value):
            longer = Longer(self.originals.index(slot.past), shape(slot.new)[slot.seq], site.layer)
            self._replace_output(slot.stored, longer)
        self._detach_output()
        erase_dead(self.graph, [site.node], site.nodes)
        for slot in (key, value):
            if slot.past.users:
                raise RewriteError(f"site {site.layer} ({where(site.node)}): {slot.past} is still used after its rewrite")

    # ---- pieces

    def query_statistics(self, site: Site, key: Node, rows: Sequence[Node | None]) -> list[Node | None]:
        """What the balancer, and what error feedback, has to know of a prompt's queries, computed before its attention, so that
        they die there."""
        asked = (self.config.balances, minikv.query_range), (self.config.feeds_back, minikv.query_moments)
        with self.graph.inserting_before(site.node):
            return [
                self.graph.call_function(op.default, (site.query, key, *rows)) if wanted else None for wanted, op in asked
            ]

    def _heads_first(self, slot: functional.Slot | Write) -> Node:
        """The new tokens of a slot or a static buffer, [batch, kv_heads, n, head_dim], where nodes are being inserted."""
        if slot.seq == SEQ:
            return slot.new
        node = self.graph.call_method("transpose", (slot.new, 1, SEQ))
        node.meta["example_value"] = example(slot.new).transpose(1, SEQ)
        return node

    def without_mask(self, site: Site, key: Node, value: Node) -> Site:
        """A prompt's attention whose masks are proved to say no more than "causal", so that none is ever made."""
        if not site.masks:
            return site
        with self.graph.inserting_before(site.node):
            out = self.graph.call_function(causal_attention, (site.query, key, value, site.scale))
        out.meta.update(site.node.meta)
        self.replace(site.node, out)
        erase_dead(self.graph, [site.node], site.nodes)
        return replace(site, node=out, nodes=(out,), masks=())

    def _call(self, op: Callable, args: tuple, results: int) -> list[Node]:
        """A call that returns several tensors, and its items."""
        call = self.graph.call_function(op, args)
        with self.graph.inserting_after(call):
            items = [self.graph.call_function(_item, (call, i)) for i in reversed(range(results))]
        return items[::-1]

    def value_of(self, node: Node) -> Any:
        """What the placeholder `node` was given when the graph was captured; None if that is not known, or it is none."""
        known = self.values is not None and node in self.originals
        return self.values[self.originals.index(node)] if known else None

    def _aligned(self, padding: Node, key: Node, before: Node) -> tuple[Node, ...]:
        """`align_rows` of a padding mask, made where the first site needs it."""
        if padding not in self._rows:
            tokens = shape(key)[SEQ]
            with self.graph.inserting_before(before):
                if not same(shape(padding)[1], tokens):
                    # A mask may be longer than the prompt, where the model gathers from it.
                    tokens = self._size_of(tokens)
                    padding_now = self.graph.call_function(_first_columns, (padding, tokens))
                else:
                    padding_now = padding
                valid = self.graph.call_method("bool", (padding_now,))
                self._rows[padding] = tuple(self._call(minikv.align_rows.default, (valid,), 2))
        return self._rows[padding]

    def _rotation(self, query: Node) -> Node | None:
        """The rotation matrix, as an input that the boundary fills."""
        matrix = rotation_matrix(self.config.rotation, shape(query)[3], example(query).device)
        known = [node for node, constant in self.result.constants.items() if constant is matrix]
        if matrix is None or known:
            return known[0] if known else None
        with self.graph.inserting_before(self.originals[0]):
            node = self.graph.placeholder(f"minikv_rotation_{len(self.result.constants)}")
        node.meta["example_value"] = compat.fake_constant(matrix, like=example(query))
        compat.set_constant_source(node)
        self.result.constants[node] = matrix
        return node

    def _size_of(self, size: Any) -> Any:
        """A node, or a constant, of a size."""
        if isinstance(size, int):
            return size
        for node in self.originals:
            if isinstance(example(node), torch.SymInt) and same(example(node), size):
                return node
            dims = [] if isinstance(example(node), KVTensor) else [d for d, s in enumerate(shape(node)) if same(s, size)]
            if dims:
                return self.graph.call_method("size", (node, dims[0]))
        raise NotTaken(f"the size {size} is no size of an input of the graph")

    def field(self, kv: Node, name: str) -> Node:
        """The placeholder of a tensor of the `KVTensor` placeholder `kv`, or of its "length"."""
        if (kv, name) not in self._fields:
            fake = example(kv)
            value = fake.length if name == "length" else getattr(fake, name)
            if name == "length":
                # Dynamo passes the sizes that it uses as inputs of their own.
                passed = [n for n in self.originals if isinstance(example(n), torch.SymInt) and same(example(n), value)]
                if isinstance(value, int) or passed:
                    return value if isinstance(value, int) else passed[0]
            with self.graph.inserting_before(self.originals[0]):
                node = self.graph.placeholder(f"{kv.name}_{name}")
            node.meta["example_value"] = value
            compat.set_field_source(node, kv, name)
            self._fields[kv, name] = node
            self.result.fields[node] = (kv, name)
        return self._fields[kv, name]

    def replace(self, node: Node, by: Node) -> None:
        """`by` in the place of `node`, also where the graph returns it."""
        node.replace_all_uses_with(by)
        self._replace_output(node, by)

    def _replace_output(self, stored: Node, by: Node | Made | Longer | static.Born) -> None:
        self.result.outputs = [by if out is stored else out for out in self.result.outputs]

    def _detach_output(self) -> None:
        """Let the graph's output node use only what the result still returns."""
        self.graph.output_node().args = (tuple(self._flat_outputs()),)

    def _flat_outputs(self) -> list[Any]:
        flat: list[Any] = []
        for out in self.result.outputs:
            if isinstance(out, Made):
                flat += out.nodes
            elif not isinstance(out, (Longer, static.Born)):
                flat.append(out)
        return flat

    def _skipped(self, layers: Layers) -> set[int]:
        total = layers.total
        if total and not layers.known and self.config.by_layer:
            log.warning(
                "a graph break parts the model, and which of its layers these %d are is not known: skip_layers and "
                "layer_budget count them from 0",
                total,
            )
        outside = [layer for layer in self.config.skip_layers if not -total <= layer < total]
        if outside and total:
            log.warning("skip_layers: %s, but this graph has %d attention sites", outside, total)
        return {layer % total for layer in self.config.skip_layers if layer not in outside}

    def _check_configuration(self) -> None:
        made = [(node, example(node).config) for node in self.originals if isinstance(example(node), KVTensor)]
        for node, config in [*made, *((call, fixed.configuration(call)) for call in fixed.calls(self.graph))]:
            if config != self.config:
                raise RewriteError(
                    f"{node.name}: this cache was made under another configuration ({config.differences(self.config)}"
                    " here). Use one backend for the life of a cache, or start a new cache."
                )

    def _densify_rest(self) -> None:
        """A compressed past of a site that was not taken: the model's own attention reads it in full precision."""
        for node, why in static.densify_rest(self):
            self._warn_dense(node, why)
        for node in self.originals:
            kv = example(node)
            if not isinstance(kv, KVTensor) or not node.users:
                continue
            why = next((site.reason for site in self.result.sites if site.reason), "it is read outside of attention")
            self._warn_dense(node, why)
            tier = [self.field(node, name) for name in ops.tier_names(self.config, kv.role)]
            names = ("dense", "state", "important", "kept")
            tensors = [self.field(node, name) if getattr(kv, name) is not None else None for name in names]
            # Users in the graph's order: the dense tensor stands before the first.
            with self.graph.inserting_before(min(node.users, key=list(self.graph.nodes).index)):
                dense = self.graph.call_function(
                    minikv.dequantize.default,
                    (tier, *tensors, self.field(node, "length"), kv.role, self.config.to_json()),
                )
                if kv.seq != SEQ:
                    dense = self.graph.call_method("transpose", (dense, kv.seq, SEQ))
            dense.meta["example_value"] = kv.dense.new_empty(kv.shape)
            self.replace(node, dense)


    def _warn_dense(self, node: Node, why: str) -> None:
        if self.config.drops:
            raise RewriteError(
                f"{node.name}: a compressed cache that dropped tokens meets an attention that cannot be rewritten "
                f"({why}). Feed one token at a time, or use a preset that drops nothing."
            )
        log.warning("%s goes back to a dense cache: %s", node.name, why)


def _item(values: Sequence[Any], index: int) -> Any:
    return values[index]


def _first_columns(mask: torch.Tensor, columns: int) -> torch.Tensor:
    return mask[:, :columns]


def other_reader(node: Node, site: tuple[Node, ...]) -> Node | None:
    """Who reads `node`, but for the graph's output and, behind repetitions of KV heads, the attention of these nodes."""
    for user in node.users:
        if user in site or user.op == "output":
            continue
        repeats = is_call(
            user, "expand", "reshape", "view", "unsqueeze", "contiguous", "repeat_interleave", "transpose", "permute", "swapaxes"
        )
        if not (repeats or is_getitem(user)):
            return user
        reader = other_reader(user, site)
        if reader is not None or not user.users:
            return reader or user
    return None


def copy_module(module: GraphModule) -> GraphModule:
    """A copy with everything that AOTAutograd reads off Dynamo's nodes."""
    graph = torch.fx.Graph()
    copies: dict[Node, Node] = {}
    output = graph.graph_copy(module.graph, copies)
    graph.output(output)
    for old, new in copies.items():
        new.meta = dict(old.meta)
        compat.copy_source(old, new)
    copy = GraphModule(module, graph)
    copy.meta = dict(module.meta)
    compat.copy_module_attributes(module, copy)
    return copy
