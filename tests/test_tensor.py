"""`KVTensor` in eager mode: whatever a cache class does to keys and values, against a dense mirror."""

import copy
import io

import pytest
import torch
from transformers import DynamicCache

from minikv_compile import KVTensor, MiniKVConfig, PackedInt, tensor
from minikv_compile.finite import report_not_finite
from minikv_compile.kernels.packing import BLOCK
from minikv_compile.kernels.state import IN_IMPORTANT, IN_TIER
from minikv_compile.ops import fields
from minikv_compile.tensor import wrap_prompt

from .helpers import PlainDecoder, make_backend, prompt, run_plain

HEADS, DIM = 2, 32
PRESETS = ["lossless", "default", "minikv", "mikv", "mikv4"]
SHORT = {
    "minikv": {"policy": "keep_all"},  # the format without a policy that drops
    "mikv": {"important": 0.9}, "mikv4": {"important": 0.9},  # of 300 tokens: 74 important ones, or a block of them
}  # fmt: skip


def make(preset="default", length=300, role="key", x=None, valid=None, dtype=torch.float32, batch=1, **changes):
    """A compressed prompt and the dense tensor that it came from."""
    config = MiniKVConfig.preset(preset, **{**SHORT.get(preset, {}), **changes})
    x = torch.randn(batch, HEADS, length, DIM, dtype=dtype) if x is None else x
    order = lengths = scores = None
    if valid is not None:
        order, lengths = torch.ops.minikv.align_rows(valid)
    if config.observed_queries is not None:
        scores = torch.rand(x.shape[:3])
    q_range = torch.ones(x.shape[0], HEADS, DIM)
    made = iter(torch.ops.minikv.compress(x, x, scores, order, lengths, 0, 1, config.to_json(), q_range))
    parts = [
        ({name: next(made) for name in fields(config, role, valid is not None)}, role, x.shape[2], 0)
        for role in ("key", "value")
    ]
    return wrap_prompt(parts, config)[role == "value"], x


def new_tokens(n=1, like=None):
    batch, dtype = (1, torch.float32) if like is None else (like.shape[0], like.dtype)
    return torch.randn(batch, HEADS, n, DIM, dtype=dtype)


def bound(kv, x):
    """Half a step of each token's widest group, and what rounding the metadata to bf16 adds to it.

    With a rotation the errors of a group's channels add up: by Cauchy-Schwarz at most sqrt(DIM) of them.
    """
    width = 2 * x.abs().amax() * (1 if kv.config.rotation == "none" else DIM**0.5)
    step = width / (2**kv.config.bits - 1)
    spread = 1 if kv.config.rotation == "none" else DIM**0.5
    return (0.5 * step + 2**-7 * width) * spread


def assert_holds(kv, x, exact_from=None):
    """`kv` stands for `x`: sinks and the newest tokens exactly, the others within the error of quantization."""
    assert kv.shape == x.shape
    dense = kv.dequantize()
    assert dense.shape == x.shape and dense.dtype == x.dtype
    config, length = kv.config, x.shape[2]
    exact_from = length - config.window if exact_from is None else exact_from
    if config.bits == 16:
        assert torch.equal(dense, x)
        return
    exact_from = max(exact_from, 0)
    assert torch.equal(dense[:, :, exact_from:], x[:, :, exact_from:])
    assert torch.equal(dense[:, :, : config.sinks], x[:, :, : config.sinks])
    error = (dense - x).abs()
    assert error.max() <= bound(kv, x)
    # The bound of the worst token is loose; on average a 2-bit code of a Gaussian is much nearer, and so is the order
    # of tokens checked: two unrelated ones differ by 1.1 on average.
    assert error.mean() < 0.45


# ---- what a tensor says of itself


@pytest.mark.parametrize("role", ["key", "value"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_looks_like_the_dense_tensor(role, dtype):
    kv, x = make(role=role, dtype=dtype, batch=2)
    assert (kv.shape, kv.dtype, kv.device, kv.dim(), kv.numel()) == (x.shape, dtype, x.device, 4, x.numel())
    assert isinstance(kv, torch.Tensor) and kv.size(2) == 300
    assert f"KVTensor({role}, shape=[2, 2, 300, 32]" in repr(kv) and "bits=2" in repr(kv)
    assert f"{kv.nbytes_held:,} bytes" in str([kv])
    assert isinstance(kv.tier, PackedInt) and kv.tier.shape == (2, HEADS, 2 * BLOCK, DIM)  # 300 - 4 - 64 = 232: one
    assert kv.state[:, 2].tolist() == [BLOCK, BLOCK]


def test_bytes_are_those_of_the_storages():
    kv, _ = make(length=1024, dtype=torch.bfloat16)
    # 6 blocks of 2-bit codes; a byte of scale and one of zero per 128 tokens of a channel, 260 dense tokens, the
    # places of 64 of them, 6 counters.
    codes = HEADS * 6 * BLOCK * DIM * 2 // 8
    metadata = HEADS * 6 * DIM * 2
    dense = HEADS * (4 + 64 + 64 + 128) * DIM * 2
    assert kv.nbytes_held == codes + metadata + dense + HEADS * 64 * 4 + 6 * 4
    assert kv.untyped_storage().nbytes() != kv.nbytes_held  # why it has to be counted


# ---- growth


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("role", ["key", "value"])
@pytest.mark.parametrize("length, steps", [(1, [1] * 290), (300, [1] * 150), (257, [3, 1, 200, 1, 1, 500, 130])])
def test_appends_follow_a_dense_mirror(preset, role, length, steps):
    kv, mirror = make(preset, length, role)
    for n in steps:
        new = new_tokens(n)
        kv, mirror = torch.cat([kv, new], 2), torch.cat([mirror, new], 2)
        assert kv.shape == mirror.shape
        if n > 1 or mirror.shape[2] % 37 == 0:
            assert_holds(kv, mirror)
    assert_holds(kv, mirror)
    if preset != "lossless":
        kv, mirror = (torch.cat([t, n], 2) for n in [new_tokens()] for t in (kv, mirror))
        assert_holds(kv, mirror)
        assert kv.state[0, 2] >= (mirror.shape[2] - 4 - 64 - 129) // BLOCK * BLOCK
        assert kv.dense.shape[2] == kv.state[0, 4] + kv.config.room  # no dense region that outlives a long turn


def test_tokens_one_by_one_or_together_end_the_same():
    one, x = make(length=300)
    together = one.clone()
    new = new_tokens(700)
    together = torch.cat([torch.cat([together, new[:, :, :699]], 2), new[:, :, 699:]], 2)
    for t in range(700):
        one = torch.cat([one, new[:, :, t : t + 1]], 2)
    assert torch.equal(one.dequantize(), together.dequantize())
    assert one.state.tolist() == together.state.tolist()


def test_growth_copies_nothing_between_flushes():
    kv, _ = make(length=264, batch=2)
    moves = flushes = 0
    for _ in range(1500):
        before = {name: t.data_ptr() for name, t in kv.tensors().items()}
        in_tier = kv.state[0, 2].item()
        kv = torch.cat([kv, new_tokens(like=kv)], 2)
        moved = {name for name, t in kv.tensors().items() if t.data_ptr() != before[name]}
        flushed = kv.state[0, 2].item() != in_tier
        assert flushed or not moved
        assert moved <= {"codes", "scale", "zero"}  # the dense region stays where it is
        moves, flushes = moves + bool(moved), flushes + flushed
    assert flushes == 11
    assert moves <= flushes
    blocks = kv.codes.shape[2]
    assert kv.state[0, 2] // BLOCK <= blocks <= kv.state[0, 2] // BLOCK + 2  # room, but no waste


def test_reallocations_are_few_in_a_long_cache():
    """The tier grows by a 64th and a block: 100 flushes of a 64-block cache move it every other time, not each time."""
    kv, _ = make(length=64 * BLOCK + 132)
    moves = 0
    for _ in range(100):
        pointer = kv.codes.data_ptr()
        kv = torch.cat([kv, new_tokens(BLOCK)], 2)
        moves += kv.codes.data_ptr() != pointer
    assert kv.state[0, 2] // BLOCK >= 160
    assert moves <= 45


def test_lossless_grows_in_steps():
    kv, _ = make("lossless", length=10)
    moves = 0
    for _ in range(1000):
        pointer = kv.dense.data_ptr()
        kv = torch.cat([kv, new_tokens()], 2)
        moves += kv.dense.data_ptr() != pointer
    assert moves <= 8


# ---- sharing


@pytest.mark.parametrize("preset", PRESETS)
def test_two_branches_do_not_see_each_other(preset):
    kv, x = make(preset)
    a, b = [x], [x]
    left = right = kv
    for _ in range(150):  # with flushes on both sides
        a.append(new_tokens()), b.append(new_tokens())
        left, right = torch.cat([left, a[-1]], 2), torch.cat([right, b[-1]], 2)
    assert_holds(left, torch.cat(a, 2))
    assert_holds(right, torch.cat(b, 2))
    assert_holds(kv, x)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("steps", [[1] * 200, [150, 150], [700], [30, 1, 1]], ids=lambda steps: str(sum(steps)))
def test_an_old_reference_keeps_its_contents(preset, steps):
    kv, x = make(preset)
    before = kv.dequantize()
    longer = kv
    for n in steps:
        longer = torch.cat([longer, new_tokens(n)], 2)
    torch.testing.assert_close(kv.dequantize()[:, :, -64:], before[:, :, -64:], rtol=0, atol=0)
    assert_holds(kv, x)


def test_old_reference_after_one_flush_in_its_own_storage():
    """Its storage is full: making room quantizes what is older than the window, also for the one who looks."""
    kv, x = make(length=4 + 64 + 64 + 128)
    longer = torch.cat([kv, new_tokens()], 2)
    assert longer.state[0, 2] == BLOCK
    assert_holds(kv, x)


@pytest.mark.parametrize(
    "alias",
    ["detach", "alias", "loaded", "copy.copy"],
)
def test_aliases_are_branches_too(alias):
    kv, x = make()
    if alias == "loaded":
        kv = reload(kv, weights_only=True)
    other = {"alias": lambda: kv[:], "copy.copy": lambda: copy.copy(kv)}.get(alias, kv.detach)()
    a, b = new_tokens(), new_tokens()
    left, right = torch.cat([kv, a], 2), torch.cat([other, b], 2)
    assert_holds(left, torch.cat([x, a], 2))
    assert_holds(right, torch.cat([x, b], 2))


def test_a_lone_owner_never_copies():
    """An old wrapper that nobody holds any more must not cost a copy."""
    kv, _ = make(length=100)
    pointer = kv.dense.data_ptr()
    for _ in range(50):
        kv = torch.cat([kv, new_tokens()], 2)
    assert kv.dense.data_ptr() == pointer


# ---- rollback


@pytest.mark.parametrize("preset", ["lossless", "default"])
@pytest.mark.parametrize("removed", [1, 30, 64])
def test_crop_within_the_window_is_exact(preset, removed):
    kv, x = make(preset, length=4 + 64 + 64 + 128)
    kv, x = (torch.cat([t, n], 2) for n in [new_tokens()] for t in (kv, x))  # flushed: only the window is left
    assert preset == "lossless" or (x.shape[2] - kv.state[0, 0]) == 4 + 64 + 64 + 1
    cropped = kv[:, :, :-removed]
    assert isinstance(cropped, KVTensor)
    kept = x[:, :, :-removed]
    assert_holds(cropped, kept, exact_from=x.shape[2] - 65)
    # What was rolled back may be written again, and whoever still holds the longer tensor keeps it.
    again = new_tokens(3)
    assert_holds(torch.cat([cropped, again], 2), torch.cat([kept, again], 2), exact_from=x.shape[2] - 65)
    assert_holds(kv, x)


def test_crop_beyond_the_window():
    kv, _ = make(length=4 + 64 + 64 + 128)
    kv = torch.cat([kv, new_tokens()], 2)
    with pytest.raises(ValueError, match=r"Cannot roll back 66 tokens .*newest 65 .*MiniKVConfig\.window"):
        kv[:, :, :-66]


def test_crop_of_a_transformers_cache():
    """As assisted decoding does."""
    cache, (kv, x) = DynamicCache(), make()
    cache.update(x, x, 0)
    cache.layers[0].keys, cache.layers[0].values = kv, kv.clone()
    cache.crop(-10)
    assert isinstance(cache.layers[0].keys, KVTensor) and cache.get_seq_length() == 290
    assert_holds(cache.layers[0].keys, x[:, :, :290], exact_from=236)


# ---- copies, batches, devices, files


@pytest.mark.parametrize("copied", ["clone", "deepcopy", "to", "load", "load weights only"])
@pytest.mark.parametrize("preset", PRESETS)
def test_copies_have_storages_of_their_own(preset, copied):
    kv, x = make(preset)
    make_copy = {
        "clone": torch.clone,
        "deepcopy": copy.deepcopy,
        "to": lambda t: t.to("cpu", copy=True),
        "load": lambda t: reload(t, weights_only=False),
        "load weights only": lambda t: reload(t, weights_only=True),
    }
    other = make_copy[copied](kv)
    assert isinstance(other, KVTensor) and other.config == kv.config and other.role == kv.role
    assert torch.equal(other.dequantize(), kv.dequantize())
    assert not {t.data_ptr() for t in kv.tensors().values()} & {t.data_ptr() for t in other.tensors().values()}
    new = new_tokens(200)
    assert_holds(torch.cat([other, new], 2), torch.cat([x, new], 2))
    assert_holds(kv, x)


def test_tensors_that_share_a_storage_are_saved_apart():
    kv, x = make()
    a, b = new_tokens(), new_tokens()
    short, long = reload([kv, torch.cat([kv, a], 2)], weights_only=True)
    assert_holds(torch.cat([short, b], 2), torch.cat([x, b], 2))
    assert_holds(long, torch.cat([x, a], 2))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_cache_that_was_loaded_in_inference_mode_decodes(mode):
    model, ids = PlainDecoder(), prompt(310)
    call = torch.compile(model, backend=make_backend("default"))
    expected, _ = run_plain(call, ids, 300)
    _, past = run_plain(call, ids[:, :300], 300)
    with torch.inference_mode():
        past = reload(past, weights_only=True)
    with mode():
        for t in range(300, 310):
            logits, past = call(ids[:, t : t + 1], past)
            torch.testing.assert_close(logits[:, 0], expected[:, t])


def reload(kv, weights_only):
    file = io.BytesIO()
    torch.save(kv, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


def test_a_file_of_another_format(monkeypatch):
    kv, _ = make()
    monkeypatch.setattr("minikv_compile.tensor.FORMAT", 99)
    file = io.BytesIO()
    torch.save(kv, file)
    monkeypatch.undo()
    file.seek(0)
    with pytest.raises(ValueError, match="saved in format 99: this version of minikv_compile reads 5"):
        torch.load(file, weights_only=True)


def test_a_saved_file_is_small():
    kv, x = make(length=4096)
    file = io.BytesIO()
    torch.save(kv, file)
    assert kv.nbytes_held <= file.tell() < kv.nbytes_held + 4096


BATCH_OPS = {
    "index_select": lambda t: t.index_select(0, torch.tensor([2, 0, 0])),
    "index": lambda t: t[torch.tensor([2, 0, 0])],
    "index with ellipsis": lambda t: t[torch.tensor([2, 0, 0]), ...],
    "repeat_interleave": lambda t: t.repeat_interleave(2, dim=0),
    "mask": lambda t: t[torch.tensor([True, False, True])],
    "slice": lambda t: t[1:],
    "slice of one": lambda t: t[:1],
}


@pytest.mark.parametrize("op", BATCH_OPS)
@pytest.mark.parametrize("ragged", [False, True])
def test_operations_on_the_batch_keep_the_type(op, ragged):
    """What beam search and contrastive search do."""
    valid = torch.ones(3, 300, dtype=torch.bool)
    if ragged:
        valid[1, :250] = False
        valid[2, :100] = False
    kv, x = make(batch=3, valid=valid if ragged else None)
    x = x * valid[:, None, :, None]
    out, expected = BATCH_OPS[op](kv), BATCH_OPS[op](x)
    assert isinstance(out, KVTensor) and out.shape == expected.shape
    assert torch.equal(out.dequantize(), BATCH_OPS[op](kv.dequantize()))
    for _ in range(3):  # rows go on by themselves: their counters came with them
        new = new_tokens(70, like=out)
        out, expected = torch.cat([out, new], 2), torch.cat([expected, new], 2)
    assert_holds(out, expected)
    assert_holds(kv, x)


def test_other_operations_are_dense():
    kv, x = make("lossless")
    assert not isinstance(kv + 1, KVTensor) and torch.equal(kv + 1, x + 1)
    assert torch.equal(kv[:, :, 5:9], x[:, :, 5:9])
    assert torch.equal(kv[0], x[0]) and torch.equal(kv.transpose(1, 2), x.transpose(1, 2))
    twice, mask = torch.tensor([[0, 0]]), torch.tensor([[True, False]])
    assert torch.equal(kv[twice], x[twice]) and torch.equal(kv[mask], x[mask])
    assert torch.equal(torch.cat([kv, x], 3), torch.cat([x, x], 3))
    assert torch.equal(kv.to(torch.bfloat16), x.bfloat16())
    q = torch.randn(1, HEADS, 1, DIM)
    attention = torch.nn.functional.scaled_dot_product_attention
    torch.testing.assert_close(attention(q, kv, kv), attention(q, x, x))
    for write in (lambda: kv.zero_(), lambda: torch.add(x, 1, out=kv), lambda: torch._foreach_copy_([x, kv], [x, x])):
        with pytest.raises(RuntimeError, match="would write into a KVTensor"):
            write()


def test_assignment_raises():
    kv, _ = make()
    with pytest.raises(RuntimeError, match="would write into a KVTensor"):
        kv[:, :, 3] = 0


def test_joining_an_empty_cache_keeps_the_type():
    """How `DynamicCache` takes its first keys: `cat([empty, keys])`."""
    (keys, x), (values, _) = make("minikv", policy="heavy_hitter"), make("minikv", policy="heavy_hitter", role="value")
    cache = DynamicCache([(keys, values)])
    assert isinstance(cache.layers[0].keys, KVTensor) and cache.get_seq_length() == x.shape[2]


def test_dropped_tokens_are_never_taken_for_zeros():
    kv, x = make("minikv", policy="heavy_hitter")
    kept = kv.kept_mask()
    assert kept.sum(-1).tolist() == [[150, 150]] and kept[:, :, -75:].all()
    dense = kv.dequantize()
    assert not dense[~kept].any()
    assert (dense - x)[kept].abs().max() <= bound(kv, x)
    assert torch.equal(dense[:, :, -22:], x[:, :, -22:])  # of 150, 128 are packed
    with pytest.raises(RuntimeError, match=r"dropped tokens .*\.dequantize\(\)"):
        kv + 1
    # Whatever comes later is all there.
    kv = torch.cat([kv, new_tokens(9)], 2)
    assert torch.equal(kv.kept_mask(), torch.cat([kept, torch.ones(1, HEADS, 9, dtype=torch.bool)], 2))


# ---- ragged rows


@pytest.mark.parametrize("preset", ["default", "mikv", "mikv4"])
@pytest.mark.parametrize("side", ["left", "right", "anywhere"])
def test_ragged_rows(side, preset):
    """Padding is not stored; each row is what it would be alone."""
    lengths, seq = ([300, 171, 5], 300) if preset == "default" else ([700, 300, 5], 700)
    valid = torch.zeros(3, seq, dtype=torch.bool)
    for row, n in enumerate(lengths):
        place = {"left": slice(seq - n, seq), "right": slice(0, n)}.get(side, torch.randperm(seq)[:n])
        valid[row, place] = True
    x = torch.randn(3, HEADS, seq, DIM)
    importance = {} if preset == "default" else {"importance": "key_outlier", "important": 0.7}
    kv, _ = make(preset, x=x, valid=valid, **importance)
    assert torch.equal(kv.kept_mask(), valid[:, None].expand(-1, HEADS, -1))
    alone = [make(preset, x=x[row : row + 1, :, valid[row]], **importance)[0] for row in range(3)]
    for _ in range(260):  # flushes at different times
        new = new_tokens(like=x)
        kv = torch.cat([kv, new], 2)
        alone = [torch.cat([kv_row, new[row : row + 1]], 2) for row, kv_row in enumerate(alone)]
    dense, mask = kv.dequantize(), kv.kept_mask()
    assert not dense[~mask].any()
    for row, own in enumerate(alone):
        assert torch.equal(dense[row][mask[row]].view(HEADS, -1, DIM), own.dequantize()[0])
        assert kv.state[row, 2:].tolist() == own.state[0, 2:].tolist()
    assert preset == "default" or len(set(kv.state[:, 4 if preset == "mikv" else 5].tolist())) > 1


# ---- storage that was never written


def poisoned(kv):
    """NaN wherever no valid token lies."""
    dense_used = kv.shape[2] - kv.state[:, 0]
    for row in range(kv.shape[0]):
        kv.dense[row, :, dense_used[row] :] = torch.nan
        for tier, column in ((kv.tier, IN_TIER), (kv.important_tier, IN_IMPORTANT)):
            for meta in () if tier is None else (tier.scale, tier.zero):
                meta[row, :, kv.state[row, column] // BLOCK :] = torch.nan if meta.is_floating_point() else 255
    return kv


@pytest.mark.parametrize("preset", PRESETS)
def test_what_lies_past_the_valid_length_reaches_no_result(preset):
    valid = torch.ones(2, 400, dtype=torch.bool)
    valid[1, :330] = False
    k, x = make(preset, 400, batch=2, valid=valid)
    v, _ = make(preset, role="value", x=x, valid=valid)
    config = k.config.to_json()
    q, new = torch.randn(2, 2 * HEADS, 1, DIM), new_tokens(like=x)

    def results(k, v):
        attention = torch.ops.minikv.decode_attention(
            q, new, new, k.packed, v.packed, k.dense, v.dense, k.state, 400, 0.2, config
        )
        grown = torch.cat([torch.cat([k, new], 2), torch.cat([new] * 150, 2)], 2)
        return attention, k.dequantize(), grown.dequantize()

    expected = results(k.clone(), v.clone())
    actual = results(poisoned(k.clone()), poisoned(v.clone()))
    for a, b in zip(actual, expected, strict=True):
        assert torch.isfinite(a).all()
        assert torch.equal(a, b)


# ---- errors


@pytest.mark.parametrize(
    "new, message",
    [
        (torch.zeros(2, HEADS, 1, DIM), r"do not fit .*use a cache for the batch"),
        (torch.zeros(1, HEADS + 1, 1, DIM), r"do not fit the compressed cache \[1, 2, 300, 32\]"),
        (torch.zeros(1, HEADS, 1, DIM // 2), "do not fit"),
        (torch.zeros(1, HEADS, 1, DIM, dtype=torch.bfloat16), r"are torch.bfloat16 on cpu, .* is torch.float32 on cpu"),
        (torch.zeros(1, HEADS, 1, DIM, device="meta"), "on meta, the compressed cache is torch.float32 on cpu"),
    ],
)
def test_tokens_that_do_not_fit(new, message):
    kv, x = make()
    with pytest.raises(ValueError, match=message):
        torch.cat([kv, new], 2)
    assert_holds(kv, x)


def test_nan_is_reported_once():
    kv, x = make(length=4 + 64 + 64 + 128)
    bad = new_tokens()
    bad[..., 3] = torch.inf
    kv = torch.cat([kv, bad], 2)
    for _ in range(200):
        kv = torch.cat([kv, new_tokens()], 2)
    assert kv.state[0, 1] == 1  # counted when it was flushed
    dense = kv.dequantize()
    assert torch.isfinite(dense).all()


def test_nan_in_a_prompts_window_is_counted_once(recwarn):
    """It waits in the dense region, and is counted in the prefill; again, when it is flushed, it is no news."""
    x = torch.randn(2, HEADS, 300, DIM)
    x[0, 1, [2, 100, 270, 290], 3] = torch.nan
    kv, _ = make(x=x, batch=2)
    recwarn.clear()  # of keys and values
    for i in range(500):
        new = new_tokens(like=kv)
        new[1, 0, 0, 0] = torch.inf if i == 100 else 0  # of the other row
        kv = torch.cat([kv, new], 2)
        report_not_finite([kv], [0])
    found = [str(w.message).split(":")[0] for w in recwarn.list if "NaN" in str(w.message)]
    assert found == ["NaN or inf in 1 tokens in the keys of layer 0"]


def test_a_copy_does_not_report_again(recwarn):
    x = torch.randn(1, HEADS, 300, DIM)
    x[0, 0, 7] = torch.nan
    kv, _ = make(x=x)
    assert sum("NaN or inf in 1 tokens" in str(w.message) for w in recwarn.list) == 1
    recwarn.clear()
    report_not_finite([kv, kv.clone(), kv[torch.tensor([0])]], [0, 1, 2])
    assert not recwarn.list


@pytest.mark.parametrize("failing", [1, 3, 5])
def test_a_flush_that_runs_out_of_memory_can_be_tried_again(monkeypatch, failing):
    """What the host knows is never ahead of the storage, whichever of two tensors' allocations fails."""
    resized, allocations, failures = tensor._resized, [], []

    def out_of_memory(x, size):
        allocations.append(size)
        if len(allocations) == failing:
            failures.append(size)
            raise torch.OutOfMemoryError("no memory")
        return resized(x, size)

    monkeypatch.setattr(tensor, "_resized", out_of_memory)
    pair, others = ([make(length=500, role=role, x=x)[0] for role in ("key", "value")] for x in [torch.ones(1, 2, 500, DIM)] * 2)
    for _ in range(300):
        new = new_tokens()
        allocations.clear()
        try:
            pair = tensor.make_room(pair, [1, 1])
        except torch.OutOfMemoryError:
            pair = tensor.make_room(pair, [1, 1])
        pair = [torch.cat([kv, new], 2) for kv in pair]
        allocations.append(-failing)  # those of the others never fail
        allocations.extend([0] * failing)
        others = [torch.cat([kv, new], 2) for kv in others]
    assert failures
    for kv, other in zip(pair, others, strict=True):
        assert torch.equal(kv.dequantize(), other.dequantize()) and torch.equal(kv.state, other.state)
        assert kv.occupancy.offsets == kv.state[:, 0].tolist()


def test_a_flush_that_only_compiles(monkeypatch):
    """It changes nothing, and runs once for what is compiled once."""
    flushes, flush = [], tensor.ops.flush
    monkeypatch.setattr(tensor.ops, "flush", lambda *args, **kwargs: (flushes.append(args), flush(*args, **kwargs)))
    monkeypatch.setattr(tensor, "_compiled", set())
    short, long, lossless, rows = make()[0], make(length=700)[0], make("lossless")[0], make(batch=2)[0]
    before = [kv.dequantize() for kv in (short, long, lossless, rows)]
    states = [kv.state.clone() for kv in (short, long, lossless, rows)]
    for _ in range(2):
        tensor.compile_flush([short, long, lossless, rows])
    assert len(flushes) == 2  # of one row, of two
    for kv, held, state in zip((short, long, lossless, rows), before, states, strict=True):
        assert torch.equal(kv.dequantize(), held) and torch.equal(kv.state, state)


IN_EACH_MODE = {
    "rows": lambda kv: kv[:1], "crop": lambda kv: kv[:, :, :-2], "all": lambda kv: kv[:], "detach": lambda kv: kv.detach(),
    "clone": lambda kv: kv.clone(), "some rows": lambda kv: kv.index_select(0, torch.tensor([1])), "index": lambda kv: kv[[0, 2]],
    "copy": lambda kv: kv.to("cpu", copy=True), "same device": lambda kv: kv.to("cpu"), "narrow": lambda kv: kv.narrow(0, 0, 2),
    "append": lambda kv: torch.cat([kv, torch.ones(3, HEADS, 1, DIM)], 2), "repeat": lambda kv: kv.repeat_interleave(2, 0),
    "heads": lambda kv: kv[:, :1], "sum": lambda kv: kv + kv, "product": lambda kv: kv @ torch.ones(DIM, 2),
    "write": lambda kv: torch.zeros(kv.shape).copy_(kv), "half": lambda kv: kv.half(),
}  # fmt: skip


@pytest.mark.parametrize("what", IN_EACH_MODE)
@pytest.mark.parametrize("made", [torch.no_grad, torch.inference_mode])
def test_inference_mode_changes_nothing(what, made):
    """There, torch passes composite ops on whole, and refuses new tensors as views."""
    with made():
        kv, _ = make(batch=3)
    results = []
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            results.append(IN_EACH_MODE[what](kv))
    outside, inside = results
    assert type(inside) is type(outside) and inside.shape == outside.shape and inside.dtype == outside.dtype
    # A graph holds for tensors of one mode.
    assert not isinstance(inside, KVTensor) or not inside.is_inference() or outside.is_inference()
    dense = [x.dequantize() if isinstance(x, KVTensor) else x for x in results]
    torch.testing.assert_close(*dense, rtol=0, atol=0)


def test_a_cache_is_cropped_in_inference_mode():
    """As assisted decoding does."""
    kv, x = make()
    cache = DynamicCache()
    with torch.inference_mode():
        cache.update(kv, kv.clone(), 0)
        cache.crop(-3)
        cache.update(*(new_tokens(2),) * 2, 0)
    layer = cache.layers[0]
    assert isinstance(layer.keys, KVTensor) and layer.keys.shape[2] == x.shape[2] - 1
    assert_holds(layer.keys[:, :, : x.shape[2] - 3], x[:, :, :-3], exact_from=x.shape[2] - kv.config.window)
