"""What a mask in the graph says: whatever the reader claims must be what the mask holds."""

import pytest
import torch
import torch.nn.functional as F
from torch.fx import Interpreter

from minikv_compile.passes.graph import argument, is_written, written
from minikv_compile.passes.masks import read_mask, reduces_to_padding
from minikv_compile.passes.sites import sites_in

from .helpers import prompt, tiny


def capture(function, *inputs, dynamic=False):
    """Dynamo's graph of `function`, and the arguments of its call."""
    seen = []

    def backend(module, example_inputs):
        def call(*args):
            seen.append((module, args))
            return module.forward(*args)

        return call

    torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)(*inputs)
    [(module, args)] = seen
    return module, args


class Values(Interpreter):
    """Runs a graph and keeps what every node held at its end."""

    garbage_collect_values = False

    def __init__(self, module, args):
        super().__init__(module, garbage_collect_values=False)
        self.run(*args)


def claimed(predicate, values, queries, keys):
    """The mask that a predicate stands for: bool [batch, 1, queries, keys]."""
    key, query = torch.arange(keys), torch.arange(queries)[:, None]
    mask = torch.ones(1, 1, queries, keys, dtype=torch.bool)
    for offset in predicate.causal:
        mask = mask & (key <= query + int(offset))
    for offset in predicate.sliding:
        mask = mask & (key > query + int(offset))
    for node in predicate.padding:
        mask = mask & values.env[node].bool()[:, None, None, :keys]
    return mask


def grids(queries, keys):
    """Positions of keys and queries, the newest last, as transformers broadcasts them."""
    key = torch.arange(keys)[None, None, None, :]
    return key, (torch.arange(queries) + (keys - queries))[None, None, :, None]


def causal(q, k, pad):
    key, query = grids(q, k)
    return key <= query


def causal_the_other_way(q, k, pad):
    key, query = grids(q, k)
    return query + 1 > key


def causal_expanded(q, k, pad):
    key, query = grids(q, k)
    return (key <= query).expand(pad.shape[0], 1, q, k)


def causal_of_two_dimensions(q, k, pad):
    return (torch.arange(k)[None, :] <= torch.arange(k - q, k)[:, None])[None, None]


def padding_only(q, k, pad):
    return pad[:, None, None, :k].expand(-1, 1, q, -1)


def padding_of_integers(q, k, pad):
    return pad.long().to(torch.bool)[:, None, None, :]


def both(q, k, pad):
    return causal(q, k, pad) & pad[:, None, None, :]


def both_gathered(q, k, pad):
    """`padding[batch, key]` on broadcast grids, as transformers' mask functions are evaluated."""
    key, query = grids(q, k)
    rows = torch.arange(pad.shape[0])[:, None, None, None]
    return torch.logical_and(key <= query, pad[rows, key])


def both_and_true(q, k, pad):
    return both(q, k, pad) & torch.ones((), dtype=torch.bool)


def sliding(q, k, pad):
    key, query = grids(q, k)
    return (key <= query) & (key > query - 3)


def prefix(q, k, pad):
    key, query = grids(q, k)
    return (key <= query) | (key < 3)


def two_paddings(q, k, pad):
    return both(q, k, pad) & pad.flip(0)[:, None, None, :]


def shifted(q, k, pad):
    key, query = grids(q, k)
    return key < query


def every_other_key(q, k, pad):
    return (torch.arange(0, 2 * k, 2)[None, None, None, :] <= torch.arange(k - q, k)[None, None, :, None]) & (
        pad[:, None, None, :]
    )


def first_key_only(q, k, pad):
    key, _ = grids(q, k)
    return (key <= k - q).expand(pad.shape[0], 1, q, k)


def query_padding(q, k, pad):
    return causal(q, k, pad) & pad[:, None, k - q :, None]


def anticausal(q, k, pad):
    key, query = grids(q, k)
    return key >= query


def sliced(q, k, pad):
    return torch.cat([causal(q, k, pad), causal(q, k, pad)], -1)[..., k:]


def edited_in_place(q, k, pad):
    mask = causal_expanded(q, k, pad).contiguous()
    mask[..., 1] = False
    return mask


def edited_through_a_method(q, k, pad):
    mask = causal_expanded(q, k, pad).contiguous()
    mask.logical_and_(pad[:, None, None, :])
    return mask


def additive_padding(q, k, pad):
    return torch.where(pad, 0.0, -torch.inf)[:, None, None, :]


TAKEN = [causal, causal_the_other_way, causal_expanded, both, both_gathered, both_and_true]
MAY_BE_TAKEN = [causal_of_two_dimensions, padding_only, padding_of_integers, first_key_only]
LEFT = [
    sliding, prefix, two_paddings, shifted, every_other_key, query_padding, anticausal, sliced,
    edited_in_place, edited_through_a_method, additive_padding,
]  # fmt: skip



def read(build, queries, keys, dynamic):
    """The predicate of a mask, whether it may be replaced by lengths, the mask itself, and the values of all nodes."""
    pad = torch.ones(2, keys, dtype=torch.bool)
    pad[0, :2] = False

    def attend(q, k, pad):
        return F.scaled_dot_product_attention(q, k, k, attn_mask=build(q.shape[2], k.shape[2], pad))

    q, k = torch.randn(2, 1, queries, 8), torch.randn(2, 1, keys, 8)
    module, args = capture(attend, q, k, pad, dynamic=dynamic)
    values = Values(module, args)
    [site] = sites_in(module.graph)
    mask = argument(site, 3, "attn_mask")
    predicate = read_mask(mask, queries)
    shapes = [argument(site, i, name).meta["example_value"].shape[2] for i, name in ((0, "query"), (1, "key"))]
    lengths = predicate is not None and reduces_to_padding(predicate, *shapes)
    return predicate, lengths, values.env[mask], values


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("queries, keys", [(9, 9), (4, 9), (1, 9)])
@pytest.mark.parametrize("build", TAKEN + MAY_BE_TAKEN + LEFT)
def test_a_claim_is_what_the_mask_holds(build, queries, keys, dynamic):
    predicate, lengths, mask, values = read(build, queries, keys, dynamic)
    full = (2, 1, queries, keys)
    if predicate is not None:
        assert mask.dtype == torch.bool, "a float mask is added, it is no predicate"
        assert torch.equal(claimed(predicate, values, queries, keys).expand(full), mask.expand(full))
    if build in TAKEN:
        assert lengths
    elif build in LEFT:
        assert not lengths
    if lengths:
        # Causality and one padding must be all there is: the newest query sees whatever is no padding.
        key, query = grids(queries, keys)
        assert torch.equal(mask.expand(full), (key <= query) & mask[:, :, -1:].expand(2, 1, 1, keys))


@torch.library.custom_op("minikv_tests::hide", mutates_args=("mask",))
def hide(other: torch.Tensor, mask: torch.Tensor) -> None:
    mask.logical_and_(other)


@torch.library.custom_op("minikv_tests::look", mutates_args=("other",))
def look(other: torch.Tensor, mask: torch.Tensor) -> None:
    other.logical_and_(mask)


WRITES = {
    "method": lambda mask, other: mask.logical_and_(other), "view": lambda mask, other: mask.mT.logical_and_(other.mT),
    "item": lambda mask, other: mask.chunk(1)[0].logical_and_(other),
    "list": lambda mask, other: torch._foreach_mul_([mask], [other]),
    "out": lambda mask, other: torch.logical_and(mask, other, out=mask),
    "operator": lambda mask, other: torch.ops.minikv_tests.hide(other, mask),
    "inplace": lambda mask, other: F.relu(mask, inplace=True), "inplace, by its place": lambda mask, other: F.relu(mask, True),
}  # fmt: skip


@pytest.mark.parametrize("how", ["not", "operator that reads", *WRITES])
def test_a_mask_that_is_written_after_it_was_made(how):
    """However that is spelled, it is not what it was made as."""

    def build(queries, keys, pad):
        mask = causal_expanded(queries, keys, pad).contiguous()
        other = pad[:, None, None, :].expand(mask.shape).contiguous()
        if "inplace" in how:
            mask = torch.where(mask, 0.0, -torch.inf)
        if how == "operator that reads":
            torch.ops.minikv_tests.look(other, mask)
        elif how in WRITES:
            WRITES[how](mask, other)
        return mask

    predicate, *_ = read(build, 9, 9, False)
    assert (predicate is None) == (how in WRITES)


def by_vmap(queries, keys, pad):
    query, key = torch.arange(queries), torch.arange(keys)
    return torch.vmap(lambda q: torch.vmap(lambda k: k <= q)(key))(query)[None, None]


def test_masks_by_vmap_are_not_understood():
    """What is mapped over has no storage to ask for."""
    assert read(by_vmap, 9, 9, False)[0] is None


def test_an_input_in_the_memory_of_another():
    def call(base, view, mask):
        base.logical_and_(mask)
        return view & mask[0]

    base = torch.ones(4, 4, dtype=torch.bool)
    module, _ = capture(call, base, base[0], base.clone())
    assert [is_written(node) for node in module.graph.find_nodes(op="placeholder")] == [True, False, True]  # the mask is second


def test_views_of_views_are_looked_at_once(monkeypatch):
    def call(x):
        a, b = x.view(4, 4), x.view(4, 4)
        for _ in range(12):
            a, b = b, b.expand_as(a)
        return b + 1

    module, _ = capture(call, torch.ones(4, 4))
    looked = []
    monkeypatch.setattr("minikv_compile.passes.graph.written", lambda node: looked.append(node) or written(node))
    assert not is_written(module.graph.find_nodes(op="placeholder")[0])
    assert len(looked) < 3 * len(module.graph.nodes)  # each is a user of two


def test_a_kernel_of_the_models_own_may_write_into_all_that_it_takes():
    graph = torch.fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    mutation = torch.ops.higher_order.triton_kernel_wrapper_mutation
    kernel = graph.call_function(mutation, (), {"kernel_idx": 0, "kwargs": {"X": x, "Y": y}})
    assert written(kernel) == [x, y]


@pytest.mark.parametrize("batch, tokens, padding", [(2, 12, 0), (2, 12, 5), (1, 12, 5), (2, 1, 0), (1, 1, 0)])
def test_masks_of_transformers(batch, tokens, padding):
    """The masks in a whole model's graph."""
    model, ids = tiny(layers=1), prompt(tokens, batch=batch)
    mask = torch.ones_like(ids)
    mask[-1, :padding] = 0

    with torch.no_grad():
        module, args = capture(lambda i, m: model(i, attention_mask=m).logits, ids, mask)
    [site] = sites_in(module.graph)
    node = argument(site, 3, "attn_mask")
    predicate = read_mask(node, tokens)
    values = Values(module, args)
    assert predicate is not None and reduces_to_padding(predicate, tokens, tokens)
    assert len(predicate.padding) == 1
    actual = values.env[node].expand(batch, 1, tokens, tokens)
    assert torch.equal(claimed(predicate, values, tokens, tokens).expand_as(actual), actual)


def test_sliding_window_of_transformers():
    model = tiny("mistral", layers=1, sliding_window=5)
    with torch.no_grad():
        module, args = capture(lambda i: model(i).logits, prompt(12))
    [site] = sites_in(module.graph)
    predicate = read_mask(argument(site, 3, "attn_mask"), 12)
    assert predicate is not None and predicate.sliding and not reduces_to_padding(predicate, 12, 12)
    actual = Values(module, args).env[argument(site, 3, "attn_mask")]
    assert torch.equal(claimed(predicate, Values(module, args), 12, 12).expand_as(actual), actual)
