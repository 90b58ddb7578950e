"""Attention written out is taken like the fused call, or left alone with the reason."""

import math

import pytest
import torch
import torch.nn.functional as F

from minikv_compile import KVTensor

from .helpers import (
    PlainDecoder,
    all_compressed,
    compiled,
    greedy,
    kinds,
    logits_of,
    make_backend,
    prompt,
    run_plain,
    tiny,
)

N = 40


def repeated(q, k, v):
    ratio = q.shape[1] // k.shape[1]
    return k.repeat_interleave(ratio, 1), v.repeat_interleave(ratio, 1)


def added_triangle(q, k, v, past):
    k, v = repeated(q, k, v)
    logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if not past:
        logits = logits + torch.triu(torch.full((q.shape[2], k.shape[2]), float("-inf")), diagonal=1)
    return torch.softmax(logits, -1) @ v


def filled_triangle(q, k, v, past):
    k, v = repeated(q, k, v)
    logits = torch.matmul(q * q.shape[-1] ** -0.5, k.mT)
    if not past:
        seen = torch.tril(torch.ones(q.shape[2], k.shape[2]))
        logits = logits.masked_fill(seen[None, None] == 0, float("-inf"))
    return F.dropout(logits.softmax(dim=-1, dtype=torch.float32), 0.1, False).to(v.dtype) @ v


def where_grid(q, k, v, past):
    k, v = repeated(q, k, v)
    logits = torch.matmul(q, k.permute(0, 1, 3, 2)) * 0.25
    if not past:
        at = torch.arange(k.shape[2])
        logits = torch.where((at[None] <= at[:, None])[None, None], logits, torch.finfo(logits.dtype).min)
    return F.softmax(logits.float(), dim=-1).type_as(q) @ v


def filled_future(q, k, v, past):
    k, v = repeated(q, k, v)
    logits = 0.25 * (q @ k.transpose(2, 3))
    if not past:
        future = torch.triu(torch.ones(q.shape[2], k.shape[2], dtype=torch.bool), 1)
        logits = logits.masked_fill(future, -1e9)
    return torch.matmul(logits.softmax(-1), v)


@pytest.mark.parametrize("attend", [added_triangle, filled_triangle, where_grid, filled_future])
def test_spellings(attend):
    model, backend, ids = PlainDecoder(attend), make_backend(), prompt(N + 6, batch=2)
    expected, _ = run_plain(model, ids, N)
    got, _ = run_plain(torch.compile(model, backend=backend), ids, N)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert kinds(backend) == [["prefill"] * 2, ["decode"] * 2]


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "phi3"])
def test_eager_attention_of_transformers(architecture, padding):
    model, ids = tiny(architecture, attn_implementation="eager"), prompt(N, batch=2)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    expected = greedy(model, ids, attention_mask=mask)
    backend = make_backend()
    got = greedy(compiled(model, backend), ids, attention_mask=mask)
    assert torch.equal(got.sequences, expected.sequences)
    assert kinds(backend) == [["prefill"] * 2, ["decode"] * 2]
    assert all_compressed(got.past_key_values)
    torch.testing.assert_close(logits_of(got), logits_of(expected), rtol=1e-3, atol=1e-3)


def test_prompt_makes_no_square_matrix():
    """Taken, attention written out becomes linear in memory: the graph has no product of queries and keys."""
    seen = []

    def inner(module, inputs):
        seen.append(module)
        return module

    greedy(compiled(tiny(attn_implementation="eager"), make_backend("default", inner=inner)), prompt(N), new=2)
    shapes = [n.meta["example_value"].shape for m in seen for n in m.graph.nodes if hasattr(n.meta.get("example_value"), "shape")]
    assert not [s for s in shapes if len(s) == 4 and s[-1] == s[-2] and s[1] == 4]


def soft_capped(q, k, v, past):
    k, v = repeated(q, k, v)
    return ((q @ k.mT * 0.25).div(30).tanh() * 30).softmax(-1) @ v


def sinks(q, k, v, past):
    k, v = repeated(q, k, v)
    logits = torch.cat([q @ k.mT * 0.25, q.new_zeros(*q.shape[:3], 1)], -1)
    return logits.softmax(-1)[..., :-1] @ v


def alibi(q, k, v, past):
    k, v = repeated(q, k, v)
    return (q @ k.mT * 0.25 - torch.arange(k.shape[2]).float()).softmax(-1) @ v


def einsum(q, k, v, past):
    k, v = repeated(q, k, v)
    return torch.einsum("bhqk,bhkd->bhqd", torch.einsum("bhqd,bhkd->bhqk", q, k).softmax(-1), v)


def with_dropout(q, k, v, past):
    k, v = repeated(q, k, v)
    return F.dropout((q @ k.mT).softmax(-1), 0.5, True) @ v


def causal_bias(q, k, value):
    later = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(k.shape[2] - q.shape[2] + 1)
    return torch.where(later, value, 0.0), later


def scaled_behind_its_mask(factor, value=-1e9):
    """The mask, too, is multiplied."""

    def attend(q, k, v, past):
        k, v = repeated(q, k, v)
        return ((q @ k.mT + causal_bias(q, k, value)[0]) * factor).softmax(-1) @ v

    return attend


def changed(change):
    """Logits that something else than a scale changes before they are masked."""

    def attend(q, k, v, past):
        k, v = repeated(q, k, v)
        return change(q @ k.mT).masked_fill(causal_bias(q, k, 0)[1], -torch.inf).softmax(-1) @ v

    return attend


def weights_cast(q, k, v, past):
    k, v = repeated(q, k, v)
    return (q @ k.mT * 4).masked_fill(causal_bias(q, k, 0)[1], -torch.inf).softmax(-1).to(torch.int32).float() @ v


def test_scaled_behind_its_mask():
    """By a factor that leaves the mask one."""
    model, backend, ids = PlainDecoder(scaled_behind_its_mask(0.25)), make_backend(), prompt(N)
    expected, _ = run_plain(model, ids, N)
    got, past = run_plain(torch.compile(model, backend=backend), ids, N)
    torch.testing.assert_close(got, expected)
    assert isinstance(past[0][0], KVTensor)


@pytest.mark.parametrize(
    "attend, reason",
    [(soft_capped, "soft-capped"), (sinks, "sinks"), (alibi, "logits go through"), (einsum, "not recognised"),
     (with_dropout, "dropout"), (scaled_behind_its_mask(-0.25), "its mask is multiplied by -0.25"),
     (scaled_behind_its_mask(0.0), "its mask is multiplied"), (scaled_behind_its_mask(1e-3, -1e4), "its mask is multiplied"),
     (changed(lambda x: torch.div(x, 4, rounding_mode="floor")), "logits go through"),
     (changed(lambda x: x.to(torch.int32).float()), "its logits are cast to torch.int32"),
     (changed(lambda x: x.bool().float()), "its logits are cast to torch.bool"),
     (weights_cast, "its attention weights are cast to torch.int32")],
)  # fmt: skip
def test_left_alone(attend, reason):
    model, backend, ids = PlainDecoder(attend), make_backend(), prompt(N)
    torch.manual_seed(1)
    expected, _ = run_plain(model, ids, N)
    torch.manual_seed(1)
    got, past = run_plain(torch.compile(model, backend=backend), ids, N)
    if attend is not with_dropout:
        torch.testing.assert_close(got, expected)
    assert len(backend.graphs[0]) == 2 and all(reason in site.reason for site in backend.graphs[0]), kinds(backend)
    assert type(past[0][0]) is torch.Tensor


def broadcast_values(q, k, v, past):
    """All keys, but one head of values."""
    k, _ = repeated(q, k, v)
    return (q @ k.mT * 0.25).softmax(-1) @ v[:, :1]


def test_heads_that_do_not_match_are_left_alone():
    model, backend, ids = PlainDecoder(broadcast_values), make_backend(), prompt(N)
    expected, _ = run_plain(model, ids, N)
    got, _ = run_plain(torch.compile(model, backend=backend), ids, N)
    torch.testing.assert_close(got, expected)
    assert not any(site.rewritten for site in backend.graphs[0])


def test_multi_query_attention_by_broadcast():
    def attend(q, k, v, past):
        logits = q @ k.mT * 0.25
        if not past:
            logits = logits + torch.full((q.shape[2], k.shape[2]), float("-inf")).triu(1)
        return logits.softmax(-1) @ v

    model, backend, ids = PlainDecoder(attend, kv_heads=1), make_backend(), prompt(N + 4)
    expected, _ = run_plain(model, ids, N)
    got, _ = run_plain(torch.compile(model, backend=backend), ids, N)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert kinds(backend) == [["prefill"] * 2, ["decode"] * 2]
