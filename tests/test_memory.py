"""Memory of a prefill: every allocation is recorded, so nothing of size [seq, seq] can hide in an op."""

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from .helpers import PlainDecoder, make_backend, prompt, tiny

HEADS, HEAD_DIM = 2, 32
SHORT, LONG = 1024, 2048


def allocations(function):
    """Bytes of the largest allocation, and the most bytes that were alive at once, beyond those before the call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        result = function()
    changes = [e.nbytes() for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert changes, "this version of torch records no memory"
    live = peak = 0
    for change in changes:  # in time
        live += change
        peak = max(peak, live)
    return max(changes), peak, result


def masked(q, k, v, past):
    """As transformers attends where it makes a mask of every prompt."""
    mask = torch.arange(k.shape[2])[None, None, None] <= torch.arange(q.shape[2])[None, None, :, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def measure(preset, layers, length, kind):
    """Of a prefill that was compiled before; "causal", "masked" (causal, by a mask), or "padded"."""
    torch._dynamo.reset()
    backend = make_backend(preset) if preset else "eager"
    sizes = {"layers": layers, "heads": 2 * HEADS, "kv_heads": HEADS, "head_dim": HEAD_DIM}
    ids = prompt(length, batch=2)
    if kind == "padded":
        model = tiny(**sizes)
        model.compile(backend=backend)
        mask = torch.ones_like(ids)
        mask[1, : length // 3] = 0

        def prefill():
            return model(ids, attention_mask=mask, use_cache=True, logits_to_keep=1).past_key_values
    else:
        model = PlainDecoder(*([masked] if kind == "masked" else []), **sizes)
        model.head = torch.nn.Identity()  # logits of the whole prompt would outweigh the rest
        model.compile(backend=backend)

        def prefill():
            return model(ids)[1]

    with torch.no_grad():
        prefill()
        largest, peak, _ = allocations(prefill)
    return largest, peak


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["causal", "masked", "padded"])
@pytest.mark.parametrize("preset", ["default", "minikv", "mikv"])
def test_prefill_is_linear_and_holds_one_dense_layer(preset, kind):
    layer = 2 * 2 * HEADS * LONG * HEAD_DIM * 4  # dense keys and values of one layer: batch of two, fp32
    largest, peak = measure(preset, 2, LONG, kind)
    shorter_largest, shorter_peak = measure(preset, 2, SHORT, kind)
    assert largest <= 2.1 * shorter_largest
    assert peak <= 2.2 * shorter_peak  # of 1K tokens 6 blocks are packed, of 2K 14
    _, deeper = measure(preset, 6, LONG, kind)
    # Four more layers cost four more compressed caches, not four dense ones.
    assert deeper - peak <= 4 * 0.45 * layer


def test_the_measure_sees_a_dense_cache_and_a_dense_mask():
    """Without the backend the same numbers are those of a dense cache, and a [seq, seq] mask where there is one."""
    layer = 2 * 2 * HEADS * LONG * HEAD_DIM * 4
    _, shallow = measure(None, 2, LONG, "causal")
    _, deep = measure(None, 6, LONG, "causal")
    assert deep - shallow >= 4 * 0.95 * layer
    with_mask, _ = measure(None, 2, LONG, "masked")
    shorter, _ = measure(None, 2, SHORT, "masked")
    assert with_mask >= 2 * LONG * LONG and with_mask >= 3.5 * shorter
