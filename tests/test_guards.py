"""What Dynamo checks before each call of a graph that takes `KVTensor`s."""

import copy
import re

import pytest
import torch
from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list

from minikv_compile import KVTensor

from .helpers import PlainDecoder, captured, make_backend, prompt, run_plain


def guards(kind=PlainDecoder):
    """Of all graphs of a class of models, as text."""
    entries = _debug_get_cache_entry_list(kind.forward.__code__)
    return "\n".join(str(entry.guard_manager) for entry in entries)


def read(text):
    """What guards read of the tensors of the past."""
    return set(re.findall(r"L\['past'\]\[\d\]\[\d\]\.(\w+)", text))


def pairs(past):
    return [kv for pair in past for kv in pair]


@pytest.mark.parametrize("preset", ["default", "minikv", "mikv", "lossless"])
def test_only_outer_sizes_and_the_context_are_guarded(preset):
    model, ids = PlainDecoder(), prompt(420)
    call = torch.compile(model, backend=make_backend(preset))
    run_plain(call, ids, 400)
    text = guards()
    assert "___check_metadata" in text and read(text) == {"size", "stride"}
    assert captured() == (2, 0)


@torch.no_grad()
def test_nor_are_they_after_the_batch_has_changed():
    """Dynamo gives each size of a batch a symbol of its own then; a copy needs no graph of its own."""
    model = PlainDecoder()
    call = torch.compile(model, backend=make_backend("default"))
    for batch in (1, 2, 3):
        _, past = run_plain(call, prompt(310, batch), 300)
    assert captured() == (4, 0)
    call(prompt(310, 3)[:, -1:], copy.deepcopy(past))
    assert captured() == (4, 0) and read(guards()) == {"size", "stride"}


@torch.no_grad()
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_has_no_graph_of_its_own(copied):
    call, ids = torch.compile(PlainDecoder(), backend=make_backend("default")), prompt(310)
    _, past = call(ids[:, :300])
    past = tuple(tuple(map(copied, pair)) for pair in past)
    for t in range(300, 304):
        _, past = call(ids[:, t : t + 1], past)
    assert captured() == (2, 0)


def swapped(x):
    return x.transpose(0, 1).contiguous().transpose(0, 1) if x.dim() > 2 else x


def spread(x):
    return torch.empty_strided(x.shape, (2 * x.stride(0), *x.stride()[1:]), dtype=x.dtype).copy_(x)


@torch.no_grad()
@pytest.mark.parametrize("batch, change", [(2, swapped), (2, spread), (1, spread)])
def test_a_cache_with_other_strides_has_a_graph_of_its_own(batch, change):
    model, ids = PlainDecoder(), prompt(420, batch)
    call = torch.compile(model, backend=make_backend("default"))
    expected, past = run_plain(call, ids, 400)
    _, past = run_plain(call, ids[:, :400], 400)
    strange = tuple(tuple(kv._apply_fn_to_data(change).mark_dynamic() for kv in pair) for pair in past)
    assert all(kv.context["regular"] for kv in pairs(past)) and not any(kv.context["regular"] for kv in pairs(strange))
    actual, past = call(ids[:, 400:401], strange)
    torch.testing.assert_close(actual[:, -1], expected[:, 400])
    assert captured() == (3, 0)
    for t in range(401, 420):
        actual, past = call(ids[:, t : t + 1], past)
        torch.testing.assert_close(actual[:, -1], expected[:, t])


@torch.no_grad()
def test_a_size_that_the_model_reads_stays_guarded():
    """The model's code asks how many blocks there are: a graph holds for one answer."""

    class Asks(PlainDecoder):
        def forward(self, ids, past=None, keep=True):
            logits, kept = super().forward(ids, past, keep)
            return (logits + 1 if past is not None and past[0][0].codes.shape[2] > 6 else logits), kept

    model = Asks()
    call = torch.compile(model, backend=make_backend("default"))
    for length, more in ((300, 0), (1200, 1), (310, 0)):
        ids = prompt(length + 1)
        _, past = call(ids[:, :length])
        blocks = past[0][0].codes.shape[2]
        assert (blocks > 6) == more
        dense = tuple((k.dequantize(), v.dequantize()) for k, v in past)
        plain, _ = PlainDecoder.forward(model, ids[:, length:], dense)
        logits, _ = call(ids[:, length:], past)
        torch.testing.assert_close(logits, plain + more, rtol=0, atol=0.05)
    assert read(guards(Asks)) > {"size", "stride", "codes"}


def test_short_prompts_beside_long_ones():
    """Where a size is 1, the graph takes it for a constant."""
    model = PlainDecoder()
    call = torch.compile(model, backend=make_backend("minikv"))
    for length in (3, 500, 5, 40):
        ids = prompt(length + 4)
        actual, past = run_plain(call, ids, length)
        assert all(isinstance(kv, KVTensor) for kv in pairs(past))
        if length < 100:
            torch.testing.assert_close(actual, run_plain(model, ids, length)[0], rtol=0, atol=1e-5)
