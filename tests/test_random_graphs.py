"""Random small decoders: whatever the pass makes of them, they compute what they computed."""

import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from . import test_static
from .helpers import PlainDecoder, make_backend, prompt, run_plain
from .test_order import SeqFirstDecoder

DIMS = st.sampled_from([8, 16, 32, 48])  # 8 is none that the kernels take
SPELLINGS = ["call", "grouped", "unfused", "upcast", "prescaled"]
MASKS = ["causal", "grid", "additive", "window", "full"]


def seen(mask, q, k, start):
    """Boolean [queries, keys], or None where the call says it all."""
    queries = torch.arange(q.shape[2])[:, None] + start
    keys = torch.arange(k.shape[2])[None]
    if mask == "window":
        return (keys <= queries) & (keys > queries - 9)
    return keys <= queries if mask in ("grid", "additive") else None


def attention(spelling, mask, scale):
    def attend(q, k, v, past):
        allowed = seen(mask, q, k, k.shape[2] - q.shape[2])
        if spelling == "call" or spelling == "grouped":
            if spelling == "call":
                k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
            bias = allowed
            if mask == "additive":
                bias = torch.where(allowed, 0.0, torch.finfo(q.dtype).min)
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=bias, is_causal=mask == "causal" and not past, scale=scale, enable_gqa=True
            )
        ratio = q.shape[1] // k.shape[1]
        k, v = (x[:, :, None].expand(-1, -1, ratio, -1, -1).reshape(q.shape[0], -1, *x.shape[2:]) for x in (k, v))
        factor = scale or 1 / math.sqrt(q.shape[-1])
        logits = (q * factor) @ k.transpose(2, 3) if spelling == "prescaled" else (q @ k.transpose(-1, -2)) * factor
        if mask == "causal" and not past:
            logits = logits + torch.full((q.shape[2], k.shape[2]), -math.inf).triu(1)
        elif allowed is not None and mask == "additive":
            logits = logits + torch.where(allowed, 0.0, torch.finfo(q.dtype).min)
        elif allowed is not None:
            logits = logits.masked_fill(~allowed, -math.inf)
        return F.softmax(logits, -1, dtype=torch.float32 if spelling == "upcast" else None).to(v.dtype) @ v

    return attend


@pytest.mark.slow
@settings(max_examples=25)
@given(
    spelling=st.sampled_from(SPELLINGS), mask=st.sampled_from(MASKS), scale=st.sampled_from([None, 0.3]), dim=DIMS,
    kv_heads=st.sampled_from([1, 2, 3]), ratio=st.sampled_from([1, 2, 5]), batch=st.sampled_from([1, 2]),
    tokens=st.integers(2, 40), decoder=st.sampled_from([PlainDecoder, SeqFirstDecoder]),
)  # fmt: skip
def test_rewritten_equals_eager(spelling, mask, scale, dim, kv_heads, ratio, batch, tokens, decoder):
    torch._dynamo.reset()
    model = decoder(attention(spelling, mask, scale), 2, kv_heads * ratio, kv_heads, dim)
    ids, backend = prompt(tokens + 4, batch), make_backend()
    expected, _ = run_plain(model, ids, tokens)
    got, past = run_plain(torch.compile(model, backend=backend), ids, tokens)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
    reports = [site for graph in backend.graphs for site in graph]
    taken = dim % 16 == 0 and mask not in ("window", "full")
    assert {site.rewritten for site in reports} == {taken}, reports
    assert (type(past[0][0]) is torch.Tensor) != taken


@settings(max_examples=12)
@given(
    pair=st.sampled_from(test_static.PAIRS), dim=DIMS, kv_heads=st.sampled_from([1, 2, 3]), ratio=st.sampled_from([1, 2, 5]),
    batch=st.sampled_from([1, 2]), tokens=st.integers(2, 40),
)  # fmt: skip
def test_rewritten_equals_eager_over_static_buffers(pair, dim, kv_heads, ratio, batch, tokens):
    torch._dynamo.reset()
    with mock.patch.multiple(test_static, HEADS=kv_heads * ratio, KV_HEADS=kv_heads, DIM=dim):
        model, backend = test_static.StaticDecoder(*pair, batch=batch), make_backend()
        expected, got = test_static.both(model, prompt(tokens + 4, batch), tokens, backend=backend)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
    reports = [site for graph in backend.graphs for site in graph]
    assert {site.rewritten for site in reports} == {dim % 16 == 0}, reports
    assert test_static.all_given_back(model) == (dim % 16 == 0)
