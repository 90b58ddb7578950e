"""Static K/V buffers that a model owns: taken over with the same tokens, or left alone with the reason."""

import copy
import importlib.util
import pathlib
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from minikv_compile import MiniKVConfig, cache_report, explain, fixed
from minikv_compile.buffers import GivenBack, make_dense
from minikv_compile.cache import MiniKVLayer

from .helpers import VOCAB, kinds, make_backend, on_cpu, prompt

pytestmark = pytest.mark.usefixtures("each_device")

minikv = torch.ops.minikv
LAYERS, HEADS, KV_HEADS, DIM, ROOM = 2, 4, 2, 16, 160
EXAMPLE = pathlib.Path(__file__).parents[1] / "examples" / "static_buffers.py"


# ---- spellings: write(buffer, new, positions, start) -> what is read; see(model, q, k, v, positions, start) -> out


def setitem(buffer, new, positions, start):
    buffer[:, :, positions] = new
    return buffer


def setitem_ellipsis(buffer, new, positions, start):
    buffer[..., positions, :] = new
    return buffer


def index_copy(buffer, new, positions, start):
    return buffer.index_copy_(2, positions, new)


def index_copy_negative(buffer, new, positions, start):
    buffer.index_copy_(dim=-2, index=positions.long(), source=new)
    return buffer


def index_put(buffer, new, positions, start):
    return torch.ops.aten.index_put_(buffer, [None, None, positions], new)


def slice_copy(buffer, new, positions, start):
    buffer[:, :, start : start + new.shape[2]].copy_(new)
    return buffer


def narrow_copy(buffer, new, positions, start):
    buffer.narrow(2, start, new.shape[2]).copy_(new)
    return buffer


def slice_setitem(buffer, new, positions, start):
    buffer[:, :, start : start + new.shape[2]] = new
    return buffer


def slice_in_slice_out(buffer, new, positions, start):
    buffer[:, :, start : start + new.shape[2]] = new
    return buffer[:, :, : start + new.shape[2]]


def computed_positions(buffer, new, positions, start):
    return buffer.index_copy_(2, torch.arange(start, start + new.shape[2], device=new.device), new)


BY_POSITION = [setitem, setitem_ellipsis, index_copy, index_copy_negative, index_put]
BY_START = [slice_copy, narrow_copy, slice_setitem, computed_positions]


def sdpa(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def triangle(model, q, k, v, positions, start):
    return sdpa(q, k, v, model.triangle[None, None, positions])


def repeated(model, q, k, v, positions, start):
    k, v = k.repeat_interleave(HEADS // KV_HEADS, dim=1), v.repeat_interleave(HEADS // KV_HEADS, dim=1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=model.triangle.index_select(0, positions)[None, None])


def grid(model, q, k, v, positions, start):
    return sdpa(q, k, v, torch.arange(ROOM, device=q.device) <= positions[:, None])


def additive(model, q, k, v, positions, start):
    return sdpa(q, k, v, model.additive[:, :, positions])


def written_out(model, q, k, v, positions, start):
    k, v = k.repeat_interleave(HEADS // KV_HEADS, dim=1), v.repeat_interleave(HEADS // KV_HEADS, dim=1)
    logits = q @ k.transpose(-1, -2) * DIM**-0.5
    logits = logits.masked_fill(~model.triangle[positions], -torch.inf)
    return torch.softmax(logits.float(), -1).to(v.dtype) @ v


def grid_of_start(model, q, k, v, positions, start):
    queries = torch.arange(start, start + q.shape[2], device=q.device)
    return sdpa(q, k, v, torch.arange(k.shape[2], device=q.device) <= queries[:, None])


def triangle_of_start(model, q, k, v, positions, start):
    return sdpa(q, k, v, model.triangle[start : start + q.shape[2], : k.shape[2]])


def by_length(model, q, k, v, positions, start):
    return F.scaled_dot_product_attention(q, k, v, is_causal=not start, enable_gqa=True)


class StaticDecoder(nn.Module):
    """Two layers over K/V buffers of its own, in float32 of large weights."""

    def __init__(self, write=setitem, see=triangle, room=ROOM, batch=1):
        super().__init__()
        self.write, self.see = write, see
        width = HEADS * DIM
        self.tokens, self.positions = nn.Embedding(VOCAB, width), nn.Embedding(room, width)
        self.qkv = nn.ModuleList(nn.Linear(width, (HEADS + 2 * KV_HEADS) * DIM) for _ in range(LAYERS))
        self.out = nn.ModuleList(nn.Linear(width, width) for _ in range(LAYERS))
        self.head = nn.Linear(width, VOCAB)
        self.register_buffer("triangle", torch.ones(room, room).tril().bool())
        self.register_buffer("additive", torch.full((1, 1, room, room), -torch.inf).triu(1))
        for i in range(LAYERS):
            for role in "kv":
                self.register_buffer(f"{role}{i}", self.buffer(batch, room))
        self.eval()

    def buffer(self, batch, room):
        return torch.zeros(batch, KV_HEADS, room, DIM)

    def caches(self):
        return [getattr(self, f"{role}{i}") for i in range(LAYERS) for role in "kv"]

    def forward(self, ids, positions, start=0):
        x = self.tokens(ids) + self.positions(positions)
        for i, (qkv, out) in enumerate(zip(self.qkv, self.out, strict=True)):
            heads = qkv(x).view(*ids.shape, -1, DIM).transpose(1, 2)
            q, k, v = heads.split([HEADS, KV_HEADS, KV_HEADS], 1)
            x = x + out(self.attend(i, q, k, v, positions, start).transpose(1, 2).flatten(2))
        return self.head(x)

    def attend(self, i, q, k, v, positions, start):
        keys = self.write(getattr(self, f"k{i}"), k, positions, start)
        values = self.write(getattr(self, f"v{i}"), v, positions, start)
        return self.see(self, q, keys, values, positions, start)


@torch.no_grad()
def run(model, ids, *sizes, start=0):
    """Logits of `ids`, fed in parts of these sizes and then one by one."""
    logits, end = [], start + ids.shape[1]
    while start < end:
        (n, *sizes) = sizes or (1,)
        part = ids[:, -(end - start) :][:, :n]
        part = torch.tensor(part.tolist())  # of its own strides
        logits.append(model(part, torch.arange(start, start + n), start))
        start += n
    return torch.cat(logits, 1)


def both(model, ids, *sizes, backend):
    """Logits of a copy of the model as it is, and of the model compiled with `backend`."""
    expected = run(copy.deepcopy(model), ids, *sizes)
    return expected, run(torch.compile(model, backend=backend), ids, *sizes)


def same_tokens(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
    assert torch.equal(actual.argmax(-1), expected.argmax(-1))


def all_given_back(model):
    return all(type(cache) is GivenBack for cache in model.caches())


def all_dense(model):
    return all(type(cache) is torch.Tensor for cache in model.caches())


# ---- what is taken


PAIRS = [
    *((write, triangle) for write in BY_POSITION),
    *((setitem, see) for see in (repeated, grid, additive, written_out)),
    *((write, grid_of_start) for write in BY_START),
    (slice_setitem, triangle_of_start),
    *((slice_in_slice_out, see) for see in (by_length, grid_of_start, triangle_of_start)),
]


@pytest.mark.parametrize("write, see", PAIRS)
def test_spellings_that_are_taken(write, see):
    model, backend = StaticDecoder(write, see), make_backend(strict=True)
    storages = [StorageWeakRef(cache.untyped_storage()) for cache in model.caches()]
    expected, actual = both(model, prompt(72), 40, backend=backend)
    same_tokens(actual, expected)
    assert all(graph in (["prefill"] * LAYERS, ["decode"] * LAYERS) for graph in kinds(backend)), kinds(backend)
    assert {kind for graph in kinds(backend) for kind in graph} == {"prefill", "decode"}
    assert {site.idiom for graph in backend.graphs for site in graph} == {"static buffer"}
    assert all_given_back(model) and all(storage.expired() for storage in storages)


def test_two_graphs_serve_all_steps():
    model, backend = StaticDecoder(), make_backend()
    run(torch.compile(model, backend=backend), prompt(72), 40)
    assert len(backend.graphs) == 2


def test_through_inductor():
    for preset in ("lossless", "default"):
        torch._dynamo.reset()
        model = StaticDecoder()
        ids = prompt(60)
        expected, actual = both(model, ids, 40, backend=make_backend(preset, inner="inductor"))
        assert all_given_back(model)
        if preset == "lossless":
            same_tokens(actual, expected)


def test_rows_of_a_batch():
    model = StaticDecoder(batch=3)
    expected, actual = both(model, prompt(60, batch=3), 40, backend=make_backend(strict=True))
    same_tokens(actual, expected)
    assert all_given_back(model)


def test_a_prompt_that_is_attended_to_before_it_is_stored():
    class Direct(StaticDecoder):
        def attend(self, i, q, k, v, positions, start):
            if q.shape[2] == 1:
                return super().attend(i, q, k, v, positions, start)
            self.write(getattr(self, f"k{i}"), k, positions, start)
            self.write(getattr(self, f"v{i}"), v, positions, start)
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    model, backend = Direct(), make_backend(strict=True)
    expected, actual = both(model, prompt(60), 40, backend=backend)
    same_tokens(actual, expected)
    assert kinds(backend) == [["prefill"] * LAYERS, ["decode"] * LAYERS]
    with pytest.raises(ValueError, match="must start at position 0"):
        run(torch.compile(model, backend=backend), prompt(5), 5, start=60)


# ---- going on, starting over, going back


@pytest.mark.parametrize("preset", ["lossless", "minikv"])
def test_another_prompt_starts_over(preset):
    model = StaticDecoder()
    step = torch.compile(model, backend=make_backend(preset, min_prompt=1000) if preset != "lossless" else make_backend())
    for length, first in ((60, 40), (50, 45), (70, 1)):  # the last one begins with one token
        ids = prompt(length)
        same_tokens(run(step, ids, first), run(dense_like(model), ids, first))


def dense_like(model):
    """A dense model with the same weights."""
    other = StaticDecoder(model.write, model.see)
    weights = {name: value for name, value in model.state_dict().items() if name[1:].isdigit() is False}
    other.load_state_dict(weights, strict=False)
    return other


def test_several_turns_are_one_conversation():
    model, backend, ids = StaticDecoder(), make_backend(strict=True), prompt(120)
    expected, actual = both(model, ids, 30, 1, 1, 40, 1, 7, backend=backend)
    same_tokens(actual, expected)
    assert int(model.k0.layer.length) == 120


def test_going_back_within_the_unquantized_tokens():
    """As speculative decoding does: rejected tokens are written again."""
    model, ids = StaticDecoder(), prompt(60)
    step, dense = torch.compile(model, backend=make_backend("default", window=32)), dense_like(model)
    for part, start in ((ids, 0), (prompt(5), 60), (prompt(9), 62), (prompt(1), 70)):
        same_tokens(run(step, part, part.shape[1], start=start), run(dense, part, part.shape[1], start=start))


@on_cpu
def test_positions_that_no_compressed_buffer_can_go_to():
    model = StaticDecoder(room=400)
    step = torch.compile(model, backend=make_backend("default", buffer=128, window=8))
    run(step, prompt(300), 300)
    with pytest.raises(ValueError, match="tokens are missing between"):
        run(step, prompt(1), start=310)
    with pytest.raises(ValueError, match="Cannot roll back"):
        run(step, prompt(1), start=20)
    with pytest.raises(ValueError, match="do not fit a static buffer of 400"):
        run(step, prompt(101), 101, start=300)
    with pytest.raises(ValueError, match="not one after the other"), torch.no_grad():
        step(prompt(4), torch.tensor([300, 301, 303, 304]))
    run(step, prompt(50), 40)  # and nothing is broken


def test_tokens_that_the_model_wrote_without_the_backend():
    """The prompt runs eagerly; a second one of several tokens is the first that the backend sees."""
    model, ids = StaticDecoder(), prompt(80)
    expected = run(copy.deepcopy(model), ids, 30, 40)
    first = run(model, ids[:, :30], 30)
    rest = run(torch.compile(model, backend=make_backend()), ids[:, 30:], 40, start=30)
    same_tokens(torch.cat([first, rest], 1), expected)
    assert all_given_back(model)


def test_a_decode_step_takes_over_the_tokens_of_an_eager_prompt():
    """As where only the decode step is compiled, which is how gpt-fast does it."""
    model, ids, backend = StaticDecoder(), prompt(40), make_backend(strict=True)
    expected = run(copy.deepcopy(model), ids, 30)
    run(model, ids[:, :30], 30)
    same_tokens(run(torch.compile(model, backend=backend), ids[:, 30:], start=30), expected[:, 30:])
    # Of dense buffers, and, in torch 2.13, another of compressed ones.
    assert all(graph == ["decode"] * LAYERS for graph in kinds(backend)) and kinds(backend) and all_given_back(model)


def test_a_decode_step_after_an_eager_prompt_that_the_policy_would_have_to_see():
    model, ids, backend = StaticDecoder(), prompt(40), make_backend("minikv")
    expected = run(copy.deepcopy(model), ids, 30)
    run(model, ids[:, :30], 30)
    same_tokens(run(torch.compile(model, backend=backend), ids[:, 30:], start=30), expected[:, 30:])
    assert all("the policy looks at the prompt" in kind for kind in kinds(backend)[0]) and all_dense(model)


def test_a_decode_step_after_a_prompt_that_was_left_alone():
    class Odd(StaticDecoder):
        def attend(self, i, q, k, v, positions, start):
            out = super().attend(i, q, k, v, positions, start)
            return out if q.shape[2] == 1 else out + 0 * getattr(self, f"k{i}").mean()

    model, backend = Odd(), make_backend()
    expected, actual = both(model, prompt(60), 40, backend=backend)
    same_tokens(actual, expected)
    assert all("the prompt was left alone" in kind for kind in kinds(backend)[1]) and all_dense(model)


# ---- the buffer afterwards


READS = {
    "arithmetic": lambda x: x + 1,
    "reduction": lambda x: x.sum(),
    "slice": lambda x: x[:, :, :4].clone(),
    "write": lambda x: x[:, :, 0].fill_(1),
    "setitem": lambda x: x.__setitem__((slice(None), slice(None), 0), 0.0),
    "copy": lambda x: torch.empty(x.shape).copy_(x),
    "cast": lambda x: x.to(torch.bfloat16),
    "save": lambda x: torch.save(x, "/dev/null"),
    "another compiler": lambda x: torch.compile(lambda t: t.sum(), backend="aot_eager")(x),
    "inductor": lambda x: torch.compile(lambda t: t * 2)(x),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_reading_a_buffer_afterwards_is_an_error(read):
    model = StaticDecoder()
    run(torch.compile(model, backend=make_backend()), prompt(45), 40)
    with pytest.raises(RuntimeError, match="was given back.*make_dense"), torch.no_grad():
        read(model.k0)
    assert model.k0.shape == (1, KV_HEADS, ROOM, DIM) and "GivenBack" in repr(model.k0)


def test_the_uncompiled_model_raises_and_make_dense_mends_it():
    model, ids = StaticDecoder(), prompt(60)
    expected = run(dense_like(model), ids, 40)
    step = torch.compile(model, backend=make_backend())
    first = run(step, ids[:, :50], 40)
    with pytest.raises(RuntimeError, match="was given back"):
        run(model, ids[:, 50:], start=50)
    make_dense(model)
    assert all_dense(model)
    same_tokens(torch.cat([first, run(model, ids[:, 50:], start=50)], 1), expected)


def test_zeroing_a_buffer_forgets_its_tokens():
    model, ids = StaticDecoder(), prompt(45)
    step = torch.compile(model, backend=make_backend())
    expected = run(step, ids, 40)
    for cache in model.caches():
        cache.zero_()
    assert int(model.k0.layer.length) == 0
    same_tokens(run(step, ids, 40), expected)


def test_a_copy_of_the_model_goes_its_own_way():
    model, ids = StaticDecoder(), prompt(60)
    expected = run(dense_like(model), ids, 40)
    run(torch.compile(model, backend=make_backend()), ids[:, :50], 40)
    twin = copy.deepcopy(model)
    run(torch.compile(model, backend=make_backend()), prompt(10), start=50)
    same_tokens(run(torch.compile(twin, backend=make_backend()), ids[:, 50:], start=50), expected[:, 50:])
    assert twin.k0.layer is twin.v0.layer is not model.k0.layer


@pytest.mark.gpu
@pytest.mark.parametrize("each_device", ["cpu"], indirect=True)
def test_a_step_out_of_place_stops_the_device():
    """In a process of its own: after a device assertion nothing else runs."""
    code = (
        "import torch; torch.set_default_device('cuda'); from tests.test_static import *\n"
        "step = torch.compile(StaticDecoder(), backend=make_backend())\n"
        "run(step, prompt(40), 40); run(step, prompt(1), start=90); torch.cuda.synchronize()\n"
    )
    root = pathlib.Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "assert" in done.stderr


# ---- compressed


def test_default_is_finite_and_its_bytes_are_counted():
    model = StaticDecoder(room=600)
    dense = sum(cache.untyped_storage().nbytes() for cache in model.caches())
    logits = run(torch.compile(model, backend=make_backend("default", inner="eager")), prompt(540), 500)
    assert logits.isfinite().all() and all_given_back(model)
    report = cache_report(model)
    held = [t for i in range(LAYERS) for side in ("key", "value") for t in getattr(getattr(model, f"k{i}").layer, side)]
    assert report.bytes >= sum(t.untyped_storage().nbytes() for t in held)
    assert report.bytes < 0.7 * dense and [layer.tokens for layer in report.layers] == [540] * LAYERS
    assert all(layer.compressed for layer in report.layers)


def test_compression_is_that_of_a_minikv_cache():
    """The same storages, and to the bit the same codes."""
    model, ids = StaticDecoder(room=400), prompt(360)
    run(torch.compile(model, backend=make_backend("minikv")), ids, 300)
    layer = model.k0.layer
    assert (layer.place, layer.count, layer.config) == (0, LAYERS, MiniKVConfig.preset("minikv"))
    assert layer.key[fixed.STATE][0, 2] > 0 and layer.keys.kept_mask().sum() < 360 * KV_HEADS


@on_cpu
def test_a_step_back_is_taken_by_all_layers_or_by_none():
    model = StaticDecoder(room=400)
    step = torch.compile(model, backend=make_backend("default", window=8))
    run(step, prompt(300), 300)
    model.k1.layer.crop(-5)  # as if it could not go as far
    model.k1.layer.key[fixed.STATE][:, 0] = model.k1.layer.value[fixed.STATE][:, 0] = 0
    with pytest.raises(ValueError, match="Cannot roll back"):
        run(step, prompt(1), start=294)
    assert [int(model.k0.layer.length), int(model.k1.layer.length)] == [300, 295]


def test_inference_mode():
    ids = prompt(60)
    with torch.inference_mode():
        model = StaticDecoder()
        expected = run(dense_like(model), ids, 40)
        same_tokens(run(torch.compile(model, backend=make_backend(strict=True)), ids, 40), expected)
    assert all_given_back(model)


def test_another_configuration_starts_over_or_raises():
    model, ids = StaticDecoder(), prompt(45)
    run(torch.compile(model, backend=make_backend()), ids, 40)
    torch._dynamo.reset()
    other = torch.compile(model, backend=make_backend(window=16))
    with pytest.raises(ValueError, match="another configuration.*window"):
        run(other, prompt(1), start=45)
    same_tokens(run(other, ids, 40), run(dense_like(model), ids, 40))


def test_nan_in_a_prompt_is_reported_once():
    model = StaticDecoder()
    with torch.no_grad():
        model.qkv[1].weight[-1] = torch.inf
    step = torch.compile(model, backend=make_backend("default"))
    with pytest.warns(match=r"NaN or inf in 40 tokens in the values of layer 1: ") as seen:
        run(step, prompt(45), 40, 3)
    assert len([warning for warning in seen if "NaN" in str(warning.message)]) == 1


# ---- what is left alone


def sliding(model, q, k, v, positions, start):
    keys, queries = torch.arange(ROOM, device=q.device), positions[:, None]
    return sdpa(q, k, v, (keys <= queries) & (keys > queries - 8))


def sliding_triangle(model, q, k, v, positions, start):
    return sdpa(q, k, v, model.band[None, None, positions])


def shifted(model, q, k, v, positions, start):
    return sdpa(q, k, v, torch.arange(ROOM, device=q.device) <= positions[:, None] + 1)


def unknown_mask(model, q, k, v, positions, start):
    return sdpa(q, k, v, model.triangle[None, None, positions].logical_or(torch.arange(ROOM, device=q.device) == 3))


def padded(model, q, k, v, positions, start):
    return sdpa(q, k, v, model.triangle[None, None, positions] & model.keep[:, None, None, :].bool())


def no_mask(model, q, k, v, positions, start):
    return sdpa(q, k, v, None)


def other_rows(model, q, k, v, positions, start):
    return sdpa(q, k, v, model.triangle[None, None, positions.clamp(min=1)])


def also_read(model, q, k, v, positions, start):
    return triangle(model, q, k, v, positions, start) + k.mean()


def next_position(buffer, new, positions, start):
    buffer[:, :, (positions + 1) % ROOM] = new
    return buffer


def reversed_positions(buffer, new, positions, start):
    buffer[:, :, positions.flip(0)] = new.flip(2)
    return buffer


def accumulated(buffer, new, positions, start):
    buffer[:, :, positions] = 0
    return torch.ops.aten.index_put_(buffer, [None, None, positions], new, True)


def twice(buffer, new, positions, start):
    buffer[:, :, positions] = 0
    buffer[:, :, positions] = new
    return buffer


def before(buffer, new, positions, start):
    old = buffer + 0
    buffer[:, :, positions] = new
    return torch.where(buffer == 0, old, buffer)


def changed_afterwards(buffer, new, positions, start):
    buffer[:, :, positions] = new
    new[:, :, 0].mul_(2)
    return buffer


def repeated_and_changed(model, q, k, v, positions, start):
    k, v = k.repeat_interleave(HEADS // KV_HEADS, dim=1), v.repeat_interleave(HEADS // KV_HEADS, dim=1)
    k.mul_(2)
    return sdpa(q, k.contiguous(), v, model.triangle[positions])


def first_channels(buffer, new, positions, start):
    buffer[:, :, positions, :DIM] = new
    return buffer[:, :, :, :DIM]


LEFT_ALONE = [
    (setitem, sliding, "sliding window"),
    (setitem, sliding_triangle, "not proved to be causal"),
    (setitem, shifted, "not causal"),
    (setitem, unknown_mask, "not proved to be causal"),
    (setitem, no_mask, "room that holds no tokens yet"),
    (setitem, other_rows, "not proved to be causal"),
    (setitem, also_read, "also read elsewhere"),
    (next_position, triangle, "computed in the graph"),
    (reversed_positions, triangle, "computed in the graph"),
    (accumulated, triangle, "2 times"),
    (twice, triangle, "2 times"),
    (before, triangle, "not what the model keeps"),
    (changed_afterwards, triangle, "changed after they were written"),
    (setitem, repeated_and_changed, "changed in place after their heads were repeated"),
    (first_channels, triangle, "indexed in other dimensions"),
]


@pytest.mark.parametrize("write, see, reason", LEFT_ALONE, ids=lambda x: getattr(x, "__name__", None))
def test_what_is_not_proved_is_left_alone(write, see, reason):
    model, backend = StaticDecoder(write, see), make_backend()
    model.register_buffer("band", model.triangle.triu(-8))
    if write is first_channels:
        for i in range(LAYERS):
            for role in "kv":
                setattr(model, f"{role}{i}", torch.zeros(1, KV_HEADS, ROOM, DIM + 16))
    expected, actual = both(model, prompt(60), 40, backend=backend)
    same_tokens(actual, expected)
    assert all(kind not in ("prefill", "decode") and reason in kind for graph in kinds(backend) for kind in graph)
    assert all_dense(model), kinds(backend)


class Counted(StaticDecoder):
    """Counts its tokens itself, in int32: before they are placed, or after."""

    def __init__(self, when):
        super().__init__(index_copy, self.grid)
        self.when = when
        self.register_buffer("count", torch.zeros((), dtype=torch.int32))
        self.register_buffer("counts", self.count.view(1))

    @staticmethod
    def grid(model, q, k, v, positions, start):
        return sdpa(q, k, v, (torch.arange(ROOM, device=q.device) <= positions[:, None])[None, None])

    def forward(self, ids, positions, start=0):
        if self.when == "before":
            self.count.add_(ids.shape[1])
        if self.when == "through a view":
            self.counts.add_(ids.shape[1])
        positions = self.count.to(torch.long) + torch.arange(ids.shape[1], device=ids.device)
        out = super().forward(ids, positions)
        if self.when == "after":
            self.count.add_(ids.shape[1])
        return out


@pytest.mark.parametrize("when", ["after", "before", "through a view"])
def test_a_count_that_has_changed_is_another(when):
    """Also where it is cast, to memory of its own."""
    model, backend = Counted(when), make_backend()
    expected, actual = both(model, prompt(42), 40, backend=backend)
    same_tokens(actual, expected)
    if when == "after":
        assert kinds(backend) == [["prefill"] * LAYERS, ["decode"] * LAYERS]
    else:
        assert len(kinds(backend)) == 2 and all("in the graph" in kind for graph in kinds(backend) for kind in graph)


class Conditional(StaticDecoder):
    """Branches on its positions, as rotary embeddings do that change with the length."""

    def forward(self, ids, positions, start=0):
        scale = torch.cond(positions.max() > 1000, lambda x: x * 2.0, lambda x: x * 1.0, (positions,))
        return super().forward(ids, positions, start) + 0 * scale[:, None]


def test_what_a_branch_reads_is_not_written():
    model, backend = Conditional(setitem, grid), make_backend(strict=True)
    expected, actual = both(model, prompt(42), 40, backend=backend)
    same_tokens(actual, expected)
    assert kinds(backend) == [["prefill"] * LAYERS, ["decode"] * LAYERS] and all_given_back(model)


def test_padding(each_device):
    """Which tokens are padding, the model keeps as a buffer; what a padding token answers is not specified."""
    model, backend, ids = StaticDecoder(see=padded, batch=2), make_backend(strict=True), prompt(70, batch=2)
    model.register_buffer("keep", torch.ones(2, ROOM, dtype=torch.long))
    model.keep[1, :5] = 0
    expected, actual = both(model, ids, 40, 1, 1, 9, backend=backend)
    same_tokens(actual[0], expected[0])
    same_tokens(actual[1, 5:], expected[1, 5:])
    assert kinds(backend) == [["prefill"] * LAYERS, ["decode"] * LAYERS, ["prefill"] * LAYERS] and all_given_back(model)
    assert model.k0.layer.padding.tolist() == [0, 5]
    if each_device.type == "cpu":
        model.keep[1, 6] = 0
        with pytest.raises(ValueError, match="does not fit"):
            run(torch.compile(model, backend=backend), prompt(1, batch=2), start=70)


def from_outside(model, q, k, v, positions, start):
    return sdpa(q, k, v, model.mask)


@pytest.mark.parametrize("additive", [False, True])
def test_masks_that_come_from_outside_of_the_graph(additive, each_device):
    model, backend, ids = StaticDecoder(see=from_outside, batch=2), make_backend(), prompt(60, batch=2)

    def talk(model, call, sizes=(40, 1, 1, 9, 1)):
        out, start = [], 0
        for n in sizes:
            seen = torch.arange(ROOM) <= torch.arange(start, start + n)[:, None]
            seen = (seen & (torch.arange(ROOM) >= torch.tensor([0, 7])[:, None, None]))[:, None]
            model.mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min) if additive else seen
            out.append(call(ids[:, start : start + n], torch.arange(start, start + n)))
            start += n
        return torch.cat(out, 1)

    with torch.no_grad():
        twin = copy.deepcopy(model)
        expected, step = talk(twin, twin), torch.compile(model, backend=backend)
        actual = talk(model, step)
        same_tokens(actual[0], expected[0])
        same_tokens(actual[1, 7:], expected[1, 7:])
        assert all_given_back(model) and model.k0.layer.padding.tolist() == [0, 7]
        for start, n in ((52, 1), (52, 4)) if each_device.type == "cpu" else ():  # a GPU asserts
            model.mask = model.mask[:, :, :1].repeat(1, 1, n, 1)  # of the last step: they do not see themselves
            with pytest.raises(ValueError, match="does not fit"):
                step(prompt(n, batch=2), torch.arange(start, start + n))


def test_a_mask_from_outside_that_is_not_causal_is_left_alone():
    model, backend = StaticDecoder(see=from_outside), make_backend()
    model.mask = torch.ones(40, ROOM, dtype=torch.bool)[None, None]
    step, twin, ids = torch.compile(model, backend=backend), copy.deepcopy(model), prompt(40)
    with torch.no_grad():
        same_tokens(step(ids, torch.arange(40)), twin(ids, torch.arange(40)))
    assert all("from outside of the graph, is not causal" in kind for kind in kinds(backend)[0]) and all_dense(model)


class SeqFirst(StaticDecoder):
    """Buffers [batch, seq, kv_heads, head_dim]."""

    def buffer(self, batch, room):
        return torch.zeros(batch, room, KV_HEADS, DIM)


def seq_first(buffer, new, positions, start):
    buffer[:, positions] = new.transpose(1, 2)
    return buffer.transpose(1, 2)


def seq_first_index_copy(buffer, new, positions, start):
    return buffer.index_copy_(1, positions, new.transpose(1, 2)).permute(0, 2, 1, 3)


def seq_first_slice(buffer, new, positions, start):
    buffer[:, start : start + new.shape[2]] = new.transpose(1, 2)
    return buffer[:, : start + new.shape[2]].transpose(1, 2)


@pytest.mark.parametrize("write, see", [(seq_first, triangle), (seq_first_index_copy, grid), (seq_first_slice, by_length)])
def test_sequence_before_heads(write, see):
    model, backend, ids = SeqFirst(write, see, batch=2), make_backend(strict=True), prompt(60, batch=2)
    expected, actual = both(model, ids, 40, backend=backend)
    same_tokens(actual, expected)
    assert all_given_back(model) and model.k0.shape == (2, ROOM, KV_HEADS, DIM)
    make_dense(model)
    assert model.k0.shape == (2, ROOM, KV_HEADS, DIM)
    twin, token = copy.deepcopy(model), prompt(1, batch=2)
    same_tokens(run(torch.compile(model, backend=backend), token, start=60), run(twin, token, start=60))


def test_sequence_before_heads_compressed():
    """The same codes as with heads in front."""
    ids, layers = prompt(350), []
    for kind, write in ((StaticDecoder, setitem), (SeqFirst, seq_first)):
        torch.manual_seed(1)
        model = kind(write, room=400)
        run(torch.compile(model, backend=make_backend("minikv")), ids, 300)
        layers.append(model.k1.layer)
    assert all(map(torch.equal, layers[0].tensors(), layers[1].tensors()))


def test_layers_of_one_large_buffer_are_left_alone():
    class Large(StaticDecoder):
        def __init__(self):
            super().__init__()
            self.register_buffer("all", torch.zeros(2 * LAYERS, 1, KV_HEADS, ROOM, DIM))
            for i in range(LAYERS):
                setattr(self, f"k{i}", self.all[2 * i])
                setattr(self, f"v{i}", self.all[2 * i + 1])

    model, backend = Large(), make_backend()
    expected = run(dense_like(model), ids := prompt(60), 40)
    same_tokens(run(torch.compile(model, backend=backend), ids, 40), expected)
    assert all("view of another tensor" in kind for graph in kinds(backend) for kind in graph)


def test_buffers_that_are_arguments_are_left_alone():
    """After a graph break, an argument may be a view that nobody keeps."""
    model, backend = StaticDecoder(), make_backend()

    @torch.compile(backend=backend)
    def step(q, k, v, keys, values, positions):
        keys[:, :, positions], values[:, :, positions] = k, v
        return triangle(model, q, keys, values, positions, 0)

    keys, values = model.buffer(1, ROOM), model.buffer(1, ROOM)
    q, k, v = torch.randn(1, HEADS, 20, DIM), *torch.randn(2, 1, KV_HEADS, 20, DIM)
    with torch.no_grad():
        step(q, k, v, keys, values, torch.arange(20))
    assert torch.equal(keys[:, :, :20], k) and kinds(backend) == [
        ["its static buffer is an argument, not a buffer of the model or of an object"]
    ]


def test_two_layers_that_share_buffers_are_left_alone():
    class Shared(StaticDecoder):
        def attend(self, i, q, k, v, positions, start):
            if i == 0:
                return super().attend(i, q, k, v, positions, start)
            return triangle(self, q, self.k0, self.v0, positions, start)

    model, backend = Shared(), make_backend()
    expected, actual = both(model, prompt(60), 40, backend=backend)
    same_tokens(actual, expected)
    assert all_dense(model)


def test_a_step_that_cannot_be_rewritten_makes_the_buffers_dense(caplog):
    class Odd(StaticDecoder):
        def attend(self, i, q, k, v, positions, start):
            out = super().attend(i, q, k, v, positions, start)
            return out if q.shape[2] > 1 or self.regular else out + 0 * getattr(self, f"k{i}").mean()

    model, ids, backend = Odd(), prompt(60), make_backend()
    model.regular = True
    expected = run(copy.deepcopy(model), ids, 40)
    step = torch.compile(model, backend=backend)
    first = run(step, ids[:, :50], 40)
    model.regular = False
    rest = run(step, ids[:, 50:], start=50)
    same_tokens(torch.cat([first, rest], 1), expected)
    assert all_dense(model) and "goes back to a dense cache" in caplog.text


def test_a_graph_break_before_the_attention_makes_the_buffers_dense():
    class Broken(StaticDecoder):
        def attend(self, i, q, k, v, positions, start):
            keys = self.write(getattr(self, f"k{i}"), k, positions, start)
            values = self.write(getattr(self, f"v{i}"), v, positions, start)
            if q.shape[2] == 1:
                torch._dynamo.graph_break()
            return self.see(self, q, keys, values, positions, start)

    model = Broken()
    expected, actual = both(model, prompt(60), 40, backend=make_backend())
    same_tokens(actual, expected)


def test_a_mask_that_changes_afterwards_is_an_error():
    model, backend = StaticDecoder(), make_backend()
    step = torch.compile(model, backend=backend)
    run(step, prompt(45), 40)
    model.triangle[44, 2] = False
    with pytest.raises(ValueError, match="not causal any more"):
        run(step, prompt(1), start=45)


# ---- reports, example, ops


def test_explain_names_the_idiom_and_leaves_the_buffers():
    model, ids = StaticDecoder(), prompt(40)
    result = explain(model, ids, torch.arange(40))
    assert result.rewritten == LAYERS and "static buffer" in str(result) and all_dense(model)
    same_tokens(run(model, ids, 40), run(dense_like(model), ids, 40))


def test_the_example():
    spec = importlib.util.spec_from_file_location("static_buffers", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    model = example.Transformer().eval()
    ids = torch.randint(0, 256, (1, 100))
    model.setup_caches(1, 256)
    expected = example.generate(model, ids, 33)
    model.setup_caches(1, 256)
    backend = make_backend(strict=True)
    assert torch.equal(example.generate(torch.compile(model, backend=backend), ids, 33), expected)
    assert kinds(backend) == [["prefill"] * 2, ["decode"] * 2]
    assert all(type(buffer) is GivenBack for buffer in example.buffers(model))


def make_layer(preset="default", tokens=300, **changes):
    config = MiniKVConfig.preset(preset, **changes)
    layer = MiniKVLayer(config, 400, 1, KV_HEADS, DIM, torch.float32, torch.get_default_device())
    k, v = torch.randn(2, 1, KV_HEADS, tokens, DIM)
    scores = torch.rand(1, KV_HEADS, tokens)
    minikv.store_prompt(k, v, scores, None, None, *held(layer), 0, 1, 400, config.to_json())
    layer.filled = True
    return layer, config.to_json(), k


def held(layer):
    """The layer's tensors as ops take them."""
    return layer.key, layer.value, *layer.tensors()[len(layer.key) + len(layer.value) :]


def seek(layer, config, position):
    key, value, *rest = held(layer)
    minikv.seek(torch.tensor([position]), key[fixed.STATE], value[fixed.STATE], *rest, 400, config)


def test_seek_goes_on_back_and_to_the_start(each_device):
    layer, config, k = make_layer(window=8)
    before = layer.keys.dequantize()
    seek(layer, config, 300)
    assert torch.equal(layer.keys.dequantize(), before)
    seek(layer, config, 296)
    assert layer.keys.shape[2] == 296 and torch.equal(layer.keys.dequantize(), before[:, :, :296])
    for position in (297, 20, 400) if each_device.type == "cpu" else ():
        with pytest.raises(ValueError, match="out of place"):
            seek(layer, config, position)
    seek(layer, config, 0)
    assert int(layer.length) == 0
    for i in range(5):  # one token after the other, from nothing
        seek(layer, config, i)
        minikv.update(k[:, :, i : i + 1], k[:, :, i : i + 1], *held(layer), 400, config)
    torch.testing.assert_close(layer.keys.dequantize(), k[:, :, :5])
    assert layer.keys.kept_mask().all()


@on_cpu
def test_a_step_whose_position_only_the_device_knows(monkeypatch):
    """As on a GPU: the graph itself goes to the position."""
    monkeypatch.setattr("minikv_compile.passes.static.is_far", lambda source: True)
    for preset, inner in (("lossless", "eager"), ("lossless", "inductor"), ("default", "eager")):
        torch._dynamo.reset()
        model, ids = StaticDecoder(), prompt(60)
        dense, step = dense_like(model), torch.compile(model, backend=make_backend(preset, inner, strict=True))
        for part, first, start in ((ids, 40, 0), (prompt(8), 1, 56), (prompt(12), 1, 0), (ids, 45, 0)):
            same_tokens(run(step, part, first, start=start), run(dense, part, first, start=start))
        with pytest.raises(ValueError, match="out of place"):
            run(step, prompt(1), start=90)
