"""Caches that keep the sequence in front of the heads: `[batch, seq, kv_heads, head_dim]`, grown along dimension 1."""

import copy
import io

import pytest
import torch

from minikv_compile import KVTensor, cache_report
from minikv_compile.tensor import SeqFirst

from .helpers import PlainDecoder, causal, kinds, make_backend, prompt, run_plain
from .test_passes import boolean_mask, repeat_interleave, sliding_at_decode
from .test_unfused import added_triangle


class SeqFirstDecoder(PlainDecoder):
    """`PlainDecoder` whose tuples hold `[batch, seq, kv_heads, head_dim]`."""

    def __init__(self, *args, swap=lambda x: x.transpose(1, 2), **kwargs):
        super().__init__(*args, **kwargs)
        self.swap = swap

    def forward(self, ids, past=None, **inputs):
        batch, n = ids.shape
        start = past[0][0].shape[1] if past is not None else 0
        x = self.tokens(ids) + self.positions(torch.arange(start, start + n))
        kept = []
        for i, (qkv, out) in enumerate(zip(self.qkv, self.out, strict=True)):
            heads = qkv(x).view(batch, n, self.heads + 2 * self.kv_heads, self.head_dim)
            q, k, v = heads.split([self.heads, self.kv_heads, self.kv_heads], 2)
            if past is not None:
                k, v = torch.cat([past[i][0], k], 1), torch.cat([past[i][1], v], dim=1)
            kept.append((k, v))
            y = self.attend(*map(self.swap, (q, k, v)), past is not None, **inputs)
            x = x + out(self.swap(y).flatten(2))
        return self.head(x), tuple(kept)


def permute(x):
    return x.permute(0, 2, 1, 3)


SWAPS = [lambda x: x.transpose(1, 2), lambda x: x.transpose(2, 1), permute, lambda x: x.permute([0, 2, 1, 3])]


def both(model, ids, length, backend):
    expected, _ = run_plain(copy.deepcopy(model), ids, length)
    actual, past = run_plain(torch.compile(model, backend=backend), ids, length)
    return expected, actual, past


@pytest.mark.parametrize("attend", [causal, repeat_interleave, boolean_mask, added_triangle])
def test_tokens_equal_eagers(attend):
    backend = make_backend(strict=True)
    expected, actual, past = both(SeqFirstDecoder(attend), prompt(72, batch=2), 40, backend)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
    assert torch.equal(actual.argmax(-1), expected.argmax(-1))
    assert kinds(backend) == [["prefill"] * 2, ["decode"] * 2]
    assert all(type(x) is SeqFirst and x.shape == (2, 72, 2, 16) for pair in past for x in pair)


@pytest.mark.parametrize("swap", SWAPS)
def test_spellings_of_the_exchange(swap):
    backend = make_backend(strict=True)
    expected, actual, _ = both(SeqFirstDecoder(swap=swap), prompt(50), 40, backend)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


def test_through_inductor():
    for preset in ("lossless", "default"):
        torch._dynamo.reset()
        expected, actual, past = both(SeqFirstDecoder(), prompt(48), 40, make_backend(preset, inner="inductor"))
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-3)  # nothing is quantized yet
        assert type(past[0][0]) is SeqFirst


def test_default_is_what_it_is_with_heads_in_front():
    """The same tokens in the same storages, to the bit."""
    ids, torch_state = prompt(600), torch.get_rng_state()
    model = SeqFirstDecoder()
    torch.set_rng_state(torch_state)
    other = PlainDecoder()
    logits, past = run_plain(torch.compile(model, backend=make_backend("default")), ids, 400)
    torch._dynamo.reset()
    expected, other_past = run_plain(torch.compile(other, backend=make_backend("default")), ids, 400)
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))
    assert cache_report(past).bytes == cache_report(other_past).bytes
    assert [layer.tokens for layer in cache_report(past).layers] == [600, 600]
    for x, y in zip(past[0], other_past[0], strict=True):
        assert x.state[0, 2] > 0  # quantized tokens
        torch.testing.assert_close(x.dequantize(), y.dequantize().transpose(1, 2))


@pytest.mark.parametrize("sizes", [(30, 20, 1, 7), (1, 40, 40)])
def test_several_turns(sizes):
    model, ids = SeqFirstDecoder(boolean_mask), prompt(sum(sizes))
    step, past, plain, logits, expected = torch.compile(model, backend=make_backend(strict=True)), None, None, [], []
    with torch.no_grad():
        for part in ids.split(sizes, 1):
            out, past = step(part, past)
            want, plain = model(part, plain)
            logits.append(out)
            expected.append(want)
    torch.testing.assert_close(torch.cat(logits, 1), torch.cat(expected, 1), rtol=0, atol=1e-4)


def test_a_step_that_is_left_alone_reads_the_cache_dense():
    model, backend = SeqFirstDecoder(sliding_at_decode), make_backend()
    expected, actual, past = both(model, prompt(60), 40, backend)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
    assert kinds(backend)[0] == ["prefill", "prefill"] and not isinstance(past[0][0], KVTensor)


def make(tokens=300, preset="default"):
    _, past = run_plain(torch.compile(SeqFirstDecoder(), backend=make_backend(preset)), prompt(tokens), tokens)
    return past[0][0]


def test_what_people_do_with_a_cache():
    kv = make()
    dense = kv.dequantize()
    assert dense.shape == kv.shape == (1, 300, 2, 16) and kv.kept_mask().shape == (1, 2, 300)
    torch.testing.assert_close(kv.transpose(1, 2) + 0, dense.transpose(1, 2))
    new = torch.randn(1, 3, 2, 16)
    torch.testing.assert_close(torch.cat([kv, new], 1).dequantize()[:, 300:], new)
    assert type(kv[:, :290]) is SeqFirst and torch.equal(kv[:, :290].dequantize(), dense[:, :290])
    assert torch.equal(kv[torch.tensor([0, 0])].dequantize()[1], dense[0])
    assert torch.equal(copy.deepcopy(kv).dequantize(), dense)
    with pytest.raises(ValueError, match="seq, kv_heads, head_dim"):
        torch.cat([kv, torch.randn(1, 3, 4, 16)], 1)
    file = io.BytesIO()
    torch.save(kv, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert type(loaded) is SeqFirst and torch.equal(loaded.dequantize(), dense)


def test_a_cache_in_the_other_order_is_not_mistaken():
    """As many heads as tokens: only its type tells."""
    kv, model, ids = make(2, "lossless"), PlainDecoder(boolean_mask, layers=1), prompt(1)
    dense = kv.dequantize()
    with torch.no_grad():
        expected, _ = model(ids, ((dense, dense),))
        actual, _ = torch.compile(model, backend=(backend := make_backend()))(ids, ((kv, copy.deepcopy(kv)),))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    assert "another order" in kinds(backend)[0][0] or "is read elsewhere" in kinds(backend)[0][0], kinds(backend)
