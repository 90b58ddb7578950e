"""Which tokens a layer keeps."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minikv_compile import MiniKVBackend, MiniKVConfig, cache_report
from minikv_compile.ops import take_tokens
from minikv_compile.policy import (
    POLICIES,
    Policy,
    Prompt,
    important_tokens,
    in_tokens,
    layer_budgets,
    pyramid,
    select,
    uniform,
    within_budget,
)

from .helpers import compiled, greedy, make_backend, prompt, tiny

SHARES = st.one_of(
    st.builds(pyramid, st.floats(1, 50), st.integers(1, 40)),
    st.builds(uniform, st.just(7.0), st.integers(1, 40)),
    st.lists(st.floats(0, 5), min_size=1, max_size=12),
)


@given(total=st.integers(0, 5000), shares=SHARES, limit=st.integers(0, 400))
def test_layer_budgets_are_exact(total, shares, limit):
    budgets = layer_budgets(total, shares, limit)
    assert len(budgets) == len(shares)
    assert sum(budgets) == min(total, limit * len(shares))
    assert all(0 <= b <= limit for b in budgets)


@given(total=st.integers(0, 5000), depth=st.floats(1, 50), layers=st.integers(1, 40), limit=st.integers(0, 400))
def test_a_pyramid_never_grows_upwards(total, depth, layers, limit):
    budgets = layer_budgets(total, pyramid(depth, layers), limit)
    assert budgets == sorted(budgets, reverse=True)


@given(depth=st.floats(1, 50), layers=st.integers(2, 40), mean=st.integers(100, 1000))
def test_a_pyramid_without_limit_is_the_papers(depth, layers, mean):
    """Last layer h / delta, first 2h - h / delta, linear between, mean h: each within one token."""
    budgets = layer_budgets(mean * layers, pyramid(depth, layers), 10**6)
    first, last = 2 * mean - mean / depth, mean / depth
    for i, budget in enumerate(budgets):
        assert abs(budget - (first + (last - first) * i / (layers - 1))) <= 1


@given(shares=SHARES, limit=st.integers(10, 400), fill=st.floats(0, 1))
def test_what_saturated_layers_cannot_use_goes_to_the_others(shares, limit, fill):
    total = round(fill * limit * len(shares))
    budgets = layer_budgets(total, shares, limit)
    open_layers = [i for i, b in enumerate(budgets) if b < limit]
    if sum(shares[i] for i in open_layers) == 0:
        return
    # The others divide what is left in proportion.
    left = total - limit * (len(shares) - len(open_layers))
    weight = sum(shares[i] for i in open_layers)
    for i in open_layers:
        # A layer that reaches the limit by rounding moves the others by less than a token each.
        assert abs(budgets[i] - left * shares[i] / weight) <= len(shares)
    assert sum(budgets) == total


def test_surplus_by_hand():
    assert layer_budgets(300, [1.8, 1.0, 0.2], 100) == [100, 100, 100]
    assert layer_budgets(200, [3.0, 1.0, 1.0], 100) == [100, 50, 50]
    assert layer_budgets(10, [1.0, 1.0, 1.0], 100) == [4, 3, 3]


@pytest.mark.parametrize("amount, tokens", [(0.25, 250), (0.0, 0), (1.0, 1000), (1, 1), (250, 250), (5000, 1000)])
def test_a_float_is_a_share_and_an_int_is_tokens(amount, tokens):
    assert in_tokens(amount, 1000) == tokens


budget = st.one_of(st.floats(0, 1), st.integers(0, 150))


@st.composite
def selections(draw):
    length, padding = draw(st.integers(1, 120)), draw(st.integers(0, 20))
    config = MiniKVConfig(
        policy="heavy_hitter", heavy=draw(budget), recent=draw(budget), sinks=draw(st.integers(0, 8)),
        layer_budget=draw(st.sampled_from(["uniform", "pyramid"])), pyramid_depth=draw(st.floats(1, 10)),
    )  # fmt: skip
    layers = draw(st.integers(1, 6))
    heads = draw(st.integers(1, 4))
    scores = torch.rand(heads, length + padding, generator=torch.Generator().manual_seed(draw(st.integers(0, 999))))
    scores[:, length:] = 1e9  # padding that would win
    return scores, length, draw(st.integers(0, layers - 1)), layers, config


@given(selections())
def test_within_budget(case):
    scores, length, layer, layers, config = case
    index = within_budget(scores, length, layer, layers, config)
    assert index.dtype == torch.int64 and index.shape[0] == scores.shape[0]
    recent = in_tokens(config.recent, length)
    sinks = min(config.sinks, length - recent)
    for head, row in enumerate(index.tolist()):
        assert row == sorted(set(row)) and all(0 <= i < length for i in row)
        kept = set(row)
        assert set(range(sinks)) <= kept and set(range(length - recent, length)) <= kept
        heavy = kept - set(range(sinks)) - set(range(length - recent, length))
        left = set(range(length)) - kept
        if heavy and left:
            assert min(scores[head, list(heavy)]) >= max(scores[head, list(left)])


@given(selections())
def test_the_layers_together_keep_the_whole_budget(case):
    scores, length, _, layers, config = case
    kept = [within_budget(scores, length, layer, layers, config).shape[1] for layer in range(layers)]
    recent = in_tokens(config.recent, length)
    sinks = min(config.sinks, length - recent)
    room = length - recent - sinks
    assert sum(kept) == layers * (recent + sinks) + min(in_tokens(config.heavy, length) * layers, room * layers)


def test_each_kv_head_and_each_row_chooses_for_itself():
    config = MiniKVConfig(policy="heavy_hitter", heavy=2, recent=1, sinks=1)
    scores = torch.zeros(2, 2, 10)
    scores[0, 0, [3, 5]], scores[0, 1, [4, 6]], scores[1, :, [2, 3]] = 1.0, 1.0, 1.0
    scores[1, :, 6:] = 9.0  # padding
    first, second = (within_budget(row, n, 0, 1, config) for row, n in zip(scores, [10, 6], strict=True))
    assert first.tolist() == [[0, 3, 5, 9], [0, 4, 6, 9]]
    assert second.tolist() == [[0, 2, 3, 5]] * 2


EVICTING = [name for name, policy in POLICIES.items() if policy]


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
@pytest.mark.parametrize("padding", [0, 100])
@pytest.mark.parametrize("name", EVICTING)
def test_every_policy_keeps_its_budget(name, padding, architecture):
    model, ids = tiny(architecture), prompt(600, batch=2)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    backend = make_backend("default", policy=name, heavy=100, recent=60, sinks=4)
    cache = greedy(compiled(model, backend), ids, new=3, attention_mask=mask).past_key_values
    for layer in cache.layers:
        kept = layer.keys.kept_mask()
        assert (kept[:, :, :600].sum(-1) == 164).all() and kept[:, :, -62:].all()
        assert not kept[0, :, :padding].any()
    assert all(layer.compressed for layer in cache_report(cache).layers)


def kept_of(name, **changes):
    model, ids = tiny(), prompt(600)
    backend = make_backend("default", policy=name, heavy=100, recent=60, **changes)
    cache = greedy(compiled(model, backend), ids, new=1).past_key_values
    return model, ids, [layer.keys.kept_mask()[0] for layer in cache.layers]


def test_recent_is_sinks_and_the_newest():
    _, _, masks = kept_of("recent")
    expected = torch.ones(600, dtype=torch.bool)
    expected[4:440] = False
    assert all(torch.equal(mask, expected.expand_as(mask)) for mask in masks)


def test_key_norm_keeps_small_keys():
    model, ids, masks = kept_of("key_norm")
    plain = tiny()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        keys = plain(ids, use_cache=True).past_key_values.layers[0].keys[0]
    norm = keys.norm(dim=-1)[:, 4:540]
    for head in range(2):
        kept = masks[0][head, 4:540]
        assert norm[head, kept].max() <= norm[head, ~kept].min()


def test_observation_window_sees_what_the_last_queries_ask_for():
    """The score of a token is that of its best neighbour."""
    prompt_ = Prompt(9, 0, torch.tensor([[0.0, 0, 0, 5, 0, 0, 0, 1, 0]]), torch.zeros(1, 9, 4), torch.zeros(1, 9, 4), None)
    score = POLICIES["observation_window"].score(prompt_, MiniKVConfig(pool=3))
    assert score.tolist() == [[0, 0, 5, 5, 5, 0, 1, 1, 1]]


def test_random_differs_by_layer_not_by_run():
    masks, again = kept_of("random")[2], kept_of("random")[2]
    assert all(map(torch.equal, masks, again)) and not torch.equal(masks[0], masks[1])


class EverySecond(Policy):
    """A user's own."""

    name = "every_second"

    def score(self, prompt, config):
        assert prompt.keys.shape == prompt.values.shape == (2, prompt.n, 16)
        return (torch.arange(prompt.n) % 2).float().expand(2, -1)


def test_a_policy_of_ones_own():
    _, _, masks = kept_of(EverySecond(), sinks=0)
    assert masks[0][0, :540].nonzero().flatten().remainder(2).all()
    config = MiniKVConfig(policy=EverySecond())
    assert config.policy == "every_second" and MiniKVConfig.from_json(config.to_json()) == config
    del POLICIES["every_second"]


def test_explicit_layer_budgets():
    _, _, masks = kept_of("heavy_hitter", layer_budget=[3, 1])
    assert [int(mask[0].sum()) for mask in masks] == [150 + 64, 50 + 64]
    with pytest.raises(Exception, match="layer_budget has 3 shares, the model 2 layers"):
        kept_of("heavy_hitter", layer_budget=(3.0, 1.0, 1.0))


@given(
    lengths=st.lists(st.integers(1, 900), min_size=1, max_size=3), sinks=st.integers(0, 5), count=st.integers(1, 70),
    window=st.integers(0, 40), seed=st.integers(0, 99),
)  # fmt: skip
def test_important_tokens_are_those_of_the_highest_scores(lengths, sinks, count, window, seed):
    """Each row's own ones, whatever rows are beside it; none is a sink, or so new that it will not be packed."""
    torch.manual_seed(seed)
    config = MiniKVConfig(sinks=sinks, important=count, window=window)
    prompts = [Prompt(n, 0, None, *torch.randn(2, 2, n, 16), None) for n in lengths]
    packed = [max(0, n - sinks - count - window) // 128 * 128 for n in lengths]
    chosen = important_tokens(prompts, None, packed, [count] * len(prompts), config)
    assert chosen.shape == (len(lengths), 2, count) and (chosen.diff(dim=-1) > 0).all()
    for row, tokens, places in zip(prompts, packed, chosen, strict=True):
        last = sinks + count + tokens
        assert places.min() >= sinks and places.max() < last
        if tokens:
            distance = (row.keys - row.keys[:, :: max(1, row.n // 256)].mean(1, keepdim=True)).norm(dim=-1)
            assert torch.equal(places, distance[:, sinks:last].topk(count).indices.sort().values + sinks)


@pytest.mark.parametrize("importance", ["heavy_hitter", "observation_window", "recent", "random"])
def test_importance_by_any_policy(importance):
    """Also one that looks at attention, for which the prefill then computes scores."""
    model = tiny()
    config = MiniKVConfig(importance=importance, important=20, group=32)
    ids = prompt(400, 2)
    out = greedy(compiled(model, MiniKVBackend(config, "eager")), ids, 3)
    kv = out.past_key_values.layers[1].keys
    assert kv.important.shape == (2, 2, 20) and kv.state[:, 2].tolist() == [256, 256]
    held = take_tokens(kv.dequantize(), kv.important.long())
    assert torch.equal(held, kv.dense[:, :, 4:24])


class Shifted(Policy):
    """Negative scores, NaN, and another dtype."""

    name = "shifted"

    def score(self, prompt, config):
        scores = prompt.keys.double().norm(dim=-1) - 100
        scores[:, 5] = torch.nan
        return scores


def test_scores_of_the_users_own_are_made_safe():
    """Padding of a shorter row is never chosen, whatever a policy says of real tokens."""
    config = MiniKVConfig(importance=Shifted())
    assert config == MiniKVConfig(importance="shifted") and POLICIES["shifted"].name == "shifted"
    prompts = [Prompt(n, 0, None, *torch.randn(2, 2, n, 16), None) for n in (600, 300)]
    chosen = important_tokens(prompts, None, [384, 128], [64, 64], config)
    assert chosen[1].max() < 4 + 64 + 128 and (chosen.diff(dim=-1) > 0).all()


def test_rows_of_which_nothing_is_packed_under_another_default_dtype():
    keys = torch.randn(2, 50, 16)
    torch.set_default_dtype(torch.float64)
    try:
        chosen = important_tokens([Prompt(50, 0, None, keys, keys, None)], None, [0], [64], MiniKVConfig())
    finally:
        torch.set_default_dtype(torch.float32)
    assert chosen[0, 1].tolist() == list(range(4, 68))


def test_a_layer_keeps_a_token_at_least():
    config = MiniKVConfig.preset("minikv", recent=0.0, layer_budget=(1.0, 0.0))
    (kept,) = select([Prompt(300, 1, torch.rand(2, 300), *torch.randn(2, 2, 300, 16), None)], 1, 2, config)
    assert kept.tolist() == [[299], [299]]
