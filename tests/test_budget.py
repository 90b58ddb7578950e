"""How many tokens each layer keeps."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minikv_compile import MiniKVConfig
from minikv_compile.budget import budget, covering, in_tokens, layer_budgets, pyramid, pyramidkv, uniform
from minikv_compile.policy import within_budget

from .helpers import compiled, greedy, make_backend, prompt, tiny

SHARES = st.one_of(
    st.builds(pyramid, st.floats(1, 50), st.integers(1, 40)),
    st.builds(pyramidkv, st.floats(1, 50), st.integers(1, 40), st.floats(0, 3)),
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
    for i, tokens in enumerate(budgets):
        assert abs(tokens - (first + (last - first) * i / (layers - 1))) <= 1


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



@given(
    depth=st.floats(1, 50), layers=st.integers(2, 40), limit=st.integers(1, 2000), fill=st.floats(0, 1),
)  # fmt: skip
def test_pyramidkv_stays_a_line(depth, layers, limit, fill):
    """Section 4.2's arithmetic, and its code's where the first layer would keep more than there is: k_min = k / beta,
    k_max = 2 k - k_min, or k_max = n and k_min = 2 k - n; each within one token."""
    mean = round(fill * limit)
    config = MiniKVConfig(heavy=mean, layer_budget="pyramidkv", pyramid_depth=depth, sinks=0)
    budgets = [budget(limit, layer, layers, config)[1] for layer in range(layers)]
    last = mean / depth
    first = 2 * mean - last
    if first > limit:
        first, last = limit, 2 * mean - limit
    for i, tokens in enumerate(budgets):
        assert abs(tokens - (first + (last - first) * i / (layers - 1))) <= 1
    assert sum(budgets) == mean * layers and budgets == sorted(budgets, reverse=True)


def test_a_pyramid_has_its_papers_depth():
    of = lambda **changes: MiniKVConfig(heavy=1400, **changes)  # noqa: E731
    last = lambda config: budget(10_000, 10, 11, config)[1]  # noqa: E731
    assert last(of(layer_budget="pyramid")) == 200 and last(of(layer_budget="pyramidkv")) == 70
    assert last(of(layer_budget="pyramid", pyramid_depth=14)) == last(of(layer_budget="pyramidkv", pyramid_depth=14)) == 100


@given(
    heads=st.integers(1, 3), n=st.integers(1, 60), share=st.floats(0.01, 1), seed=st.integers(0, 999),
    zeros=st.floats(0, 1),
)  # fmt: skip
def test_the_fewest_tokens_that_cover_a_share(heads, n, share, seed, zeros):
    scores = torch.rand(heads, n, generator=torch.Generator().manual_seed(seed))
    scores[:, : int(zeros * n)] = 0
    count, total = covering(scores, share), scores.double().sum(-1)
    best = lambda k: scores.double().topk(k, dim=-1).values.sum(-1)  # noqa: E731
    assert (best(count) >= share * total - 1e-9).all()
    assert count == 0 or (best(count - 1) < share * total).any()


@given(
    length=st.integers(1, 80), layers=st.integers(1, 5), heavy=st.floats(0, 1), coverage=st.floats(0.01, 1), seed=st.integers(0, 99)
)
def test_a_measured_budget_covers_or_is_full(length, layers, heavy, coverage, seed):
    """No layer keeps more than its equal share of the budget, and none keeps less unless that covers its scores."""
    scores = torch.rand(2, length, generator=torch.Generator().manual_seed(seed)) ** 8
    config = MiniKVConfig(policy="heavy_hitter", heavy=heavy, layer_budget="coverage", coverage=coverage, sinks=2)
    kept = within_budget(scores, length, 0, layers, config)
    sinks = min(2, length)
    assert kept.shape[1] <= sinks + in_tokens(heavy, length)
    among = scores[:, sinks:].double()
    held = among.gather(1, kept[:, sinks:] - sinks).sum(-1)
    assert kept.shape[1] == sinks + min(in_tokens(heavy, length), length - sinks) or (held >= coverage * among.sum(-1) - 1e-9).all()


def test_each_layer_and_row_keeps_what_covers_it():
    """End to end: a row's budget is its own, and more coverage keeps more."""
    ids = prompt(600, batch=2)
    kept = {}
    for coverage in (0.5, 0.8, 0.99):
        backend = make_backend(
            "default", policy="heavy_hitter", heavy=1.0, layer_budget="coverage", coverage=coverage, important=8, window=0
        )
        cache = greedy(compiled(tiny(), backend), ids, new=2).past_key_values
        counts = [layer.keys.kept_mask()[:, :, :600].sum(-1) for layer in cache.layers]
        assert all((count == count[:, :1]).all() for count in counts), "heads of a row keep equally many"
        kept[coverage] = torch.stack(counts)
    assert (kept[0.5] < kept[0.8]).all() and (kept[0.8] < kept[0.99]).all() and (kept[0.99] < 600).all()
    assert len(kept[0.8].unique()) > 1
