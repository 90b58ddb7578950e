"""Which tokens a layer keeps."""

import runpy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minikv_compile import ConfigError, MiniKVBackend, MiniKVConfig, cache_report
from minikv_compile.budget import in_tokens
from minikv_compile.ops import align_rows, compress_prompt, dequantize, fields, kept_mask, take_tokens, tier_names
from minikv_compile.policy import POLICIES, Policy, Prompt, from_0, important_tokens, select, within_budget

from .helpers import compiled, greedy, make_backend, prompt, tiny

EXAMPLES = Path(__file__).parent.parent / "examples"
budget = st.one_of(st.floats(0, 1), st.integers(0, 150))


@st.composite
def selections(draw):
    length, padding = draw(st.integers(1, 120)), draw(st.integers(0, 20))
    config = MiniKVConfig(
        policy="heavy_hitter", heavy=draw(budget), recent=draw(budget), sinks=draw(st.integers(0, 8)),
        layer_budget=draw(st.sampled_from(["uniform", "pyramid", "pyramidkv"])), pyramid_depth=draw(st.floats(1, 10)),
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


@pytest.mark.slow
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


def test_heavy_outliers_are_the_furthest_keys_then_heavy_hitters():
    n = 100
    attention, keys = torch.rand(2, n), torch.randn(2, n, 8)
    keys[0, [40, 7, 90]] *= 20
    keys[1, [3, 4, 5]] *= 20
    attention[:, 4] = 9.0  # of both kinds in one head
    score = POLICIES["heavy_outlier"].score(Prompt(n, 0, attention, keys, keys, None), MiniKVConfig())
    order = score.argsort(dim=-1, descending=True)
    assert order[0, :3].sort().values.tolist() == [7, 40, 90] and order[1, :3].sort().values.tolist() == [3, 4, 5]
    for head in range(2):
        heavy = attention[head].argsort(descending=True)
        assert torch.equal(order[head, 3:], heavy[~torch.isin(heavy, order[head, :3])])


def test_q_hitters_get_attention_and_quantize_well():
    """Of tokens with as much attention those of narrow ranges; the surest heavy hitters whatever their ranges are."""
    n = 100
    attention = torch.ones(2, n)
    attention[:, :7] = torch.arange(20.0, 13.0, -1)  # 7%
    attention[:, 50] = 0.5
    keys, values = torch.ones(2, n, 4), torch.ones(2, n, 4)
    keys[:, :, 0] = values[:, :, 0] = 5.0
    keys[:, 20:40, 0] = values[:, 20:40, 0] = 1.5  # narrow
    keys[:, :7, 0] = 9.0
    score = POLICIES["q_hitter"].score(Prompt(n, 0, attention, keys, values, None), MiniKVConfig())
    assert score.shape == (2, n) and (score >= 0).all()
    order = score.argsort(dim=-1, descending=True)
    assert (order[:, :7].sort().values == torch.arange(7)).all()
    assert (order[:, 7:27].sort().values == torch.arange(20, 40)).all()
    assert (order[:, -1] == 50).all()


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


@pytest.mark.parametrize("importance", ["heavy_hitter", "heavy_outlier", "observation_window", "recent", "random"])
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
    """Negative scores, NaN, infinities, and another dtype."""

    name = "shifted"

    def score(self, prompt, config):
        scores = prompt.keys.double().norm(dim=-1) - 100
        scores[:, 5:8] = torch.tensor([torch.nan, -torch.inf, torch.inf])
        return scores


def test_scores_of_the_users_own_are_made_safe():
    """Padding of a shorter row is never chosen, whatever a policy says of real tokens."""
    config = MiniKVConfig(importance=Shifted())
    assert config == MiniKVConfig(importance="shifted") and POLICIES["shifted"].name == "shifted"
    prompts = [Prompt(n, 0, None, *torch.randn(2, 2, n, 16), None) for n in (600, 300)]
    chosen = important_tokens(prompts, None, [384, 128], [64, 64], config)
    assert chosen[1].max() < 4 + 64 + 128 and (chosen.diff(dim=-1) > 0).all()
    for row, tokens, n in zip(prompts, chosen, (448, 192), strict=True):
        norms = row.keys[:, 4 : 4 + n].norm(dim=-1)
        norms[:, 1:3], norms[:, 3] = -1, 1000
        assert torch.equal(tokens, norms.topk(64).indices.sort().values + 4)


@pytest.mark.parametrize(
    "scores",
    [[-3.0, -1.0, -2.0], [-torch.inf] * 2 + [torch.nan], [-0.0, 0.0, 2.0], [torch.inf, -5.0, 1.0],
     [0.1, 0.3, 0.2, -1e9], [1.0, 3.0, 2.0, torch.finfo(torch.float32).min], [-2.0, -2.0, 1.0], [torch.nan, 1.0, 0.0]],
)
def test_scores_from_0(scores):
    """As they are where none is below 0, else ranks: the order stays, and no bit says below 0."""
    given = torch.tensor([scores])
    found, below = from_0(given), bool((given < 0).any())
    assert found.isfinite().all() and not found.signbit().any() and found.min() == 0
    assert below or torch.equal(found, given.nan_to_num(0.0))
    order = given.nan_to_num(-torch.inf if below else 0.0, torch.inf, -torch.inf)
    assert torch.equal(found[..., None] > found[:, None], order[..., None] > order[:, None])


class Blind(Policy):
    """Looks at attention, and does not say so."""

    name = "blind"

    def score(self, prompt, config):
        return prompt.attention


def test_a_policy_without_scores_is_told_why():
    with pytest.raises(Exception, match='scores are None, must be a tensor.*observes = "all"'):
        kept_of(Blind())
    del POLICIES["blind"]
    with pytest.raises(ConfigError, match=r"policy = .*must be an object: Blind\(\)"):
        MiniKVConfig(policy=Blind)


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


@st.composite
def prompts_and_configs(draw):
    window, important = draw(st.integers(0, 40)), draw(st.integers(0, 40))
    config = MiniKVConfig(
        policy=draw(st.sampled_from(["keep_all", *EVICTING])), heavy=draw(st.floats(0, 1)), recent=draw(st.floats(0, 0.5)),
        sinks=draw(st.integers(0, 5)), important=important, window=window, group=draw(st.sampled_from([16, 128])),
        importance=draw(st.sampled_from(["key_outlier", "random"])), coverage=draw(st.floats(0.1, 1)),
        layer_budget=draw(st.sampled_from(["uniform", "pyramid", "pyramidkv", "coverage"])),
    )  # fmt: skip
    return config, draw(st.integers(1, 700)), draw(st.integers(0, 300)), draw(st.integers(0, 99))


@given(prompts_and_configs())
@settings(deadline=None, max_examples=60)
def test_each_valid_token_is_in_one_tier_or_dropped(case):
    """Unquantized tokens read back exactly, packed ones nearly, dropped ones as zeros: so each token tells where it is."""
    config, n, padding, seed = case
    torch.manual_seed(seed)
    seq, layer, layers = n + padding, 1, 3
    k, v, scores = torch.randn(2, 2, seq, 16), torch.randn(2, 2, seq, 16), torch.rand(2, 2, seq)
    valid = torch.ones(2, seq, dtype=torch.bool)
    valid[1, :padding] = False
    order, lengths = align_rows(valid)
    text = config.to_json()
    made = iter(compress_prompt(k, v, scores, order, lengths, layer, layers, text))
    for role, x in (("key", k), ("value", v)):
        held = {name: next(made) for name in fields(config, role, True)}
        tier = [held[name] for name in tier_names(config, role)]
        back = dequantize(tier, *(held.get(name) for name in ("dense", "state", "important", "kept")), seq, role, text)
        kept = kept_mask(held["kept"], held["state"], seq)
        zero, exact = (back == 0).all(-1), (back == x).all(-1)
        packed = kept & ~exact
        in_tier, offset = held["state"][:, 2, None], held["state"][:, 0, None]
        assert torch.equal(zero, ~kept) and not (kept & ~valid[:, None]).any()
        assert torch.equal(packed.sum(-1), in_tier.expand(-1, 2))
        assert torch.equal((kept & exact).sum(-1), (seq - offset).expand(-1, 2))
        assert (kept.sum(-1) > 0).all()
        if not config.drops:
            assert torch.equal(kept, valid[:, None].expand(-1, 2, -1))
        if in_tier.min() > 0 and config.pins:
            assert exact.gather(2, order[:, None].expand(-1, 2, -1).gather(2, held_places(kept, order, held["important"]))).all()


def held_places(kept, order, important):
    """Important tokens are named by their places among the kept ones, here by those among the valid tokens."""
    ranks = kept.gather(2, order[:, None].expand(-1, 2, -1)).cumsum(-1)
    return torch.searchsorted(ranks, important.long() + 1)


@pytest.mark.slow
def test_the_example_of_a_policy_runs(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    try:
        runpy.run_path(str(EXAMPLES / "custom_policy.py"))["main"](length=1024)
    finally:
        POLICIES.pop("unusual", None)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == ["unusual", "key_outlier", "random"]
