"""Every op of `torch.ops.minikv`: its registration, and its arithmetic against something straightforward."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

import minikv_compile.buffers  # noqa: F401  registers its ops
import minikv_compile.capacity  # noqa: F401  (it has an op)
from minikv_compile import KVTensor, MiniKVConfig, ops
from minikv_compile.cache import MiniKVLayer
from minikv_compile.kernels.packing import BLOCK, metadata
from minikv_compile.kernels.scores import column_scores_reference
from minikv_compile.ops import fields
from minikv_compile.policy import within_budget
from minikv_compile.rotation import hadamard, rotation_matrix

minikv = torch.ops.minikv
PRESETS = ["lossless", "default", "minikv", "mikv", "mikv4"]


def left_padding(lengths, seq):
    return torch.arange(seq) >= seq - torch.tensor(lengths)[:, None]


def compress(config, k, v, scores=None, valid=None, layer=0, layers=1, q_range=None):
    """`KVTensor`s of a prompt."""
    order, lengths = minikv.align_rows(valid) if valid is not None else (None, None)
    if config.balances and q_range is None:
        q_range = torch.rand(*k.shape[:2], k.shape[3]) + 0.1
    made = minikv.compress(k, v, scores, order, lengths, layer, layers, config.to_json(), q_range)
    made = iter(made)
    return tuple(
        KVTensor({name: next(made) for name in fields(config, role, valid is not None)}, config, role, k.shape[2])
        for role in ("key", "value")
    )


def cache(preset="default", length=300, batch=2, kv_heads=2, dim=32, dtype=torch.float32, valid=None, **changes):
    config = MiniKVConfig.preset(preset, **changes)
    k, v = torch.randn(2, batch, kv_heads, length, dim, dtype=dtype)
    scores = None if config.observed_queries is None else torch.rand(batch, kv_heads, length)
    return compress(config, k, v, scores, valid)


def tier(kv):
    return kv.packed


# ---- registration: schemas, fakes, no hidden aliases


def opcheck(op, *args):
    torch.library.opcheck(op.default, args, test_utils=("test_schema", "test_faketensor"))


def test_opcheck_once():
    opcheck(minikv.once, torch.randn(1, 1, 32))


@pytest.mark.parametrize("rows", [(3,), (2, 1)])
def test_opcheck_linear_parts(rows):
    x = torch.randn(*rows, 256).bfloat16()
    weights = [torch.randn(n, 256).bfloat16() for n in (128, 64)]
    opcheck(minikv.linear_parts, x, weights)
    got = minikv.linear_parts(x, weights)
    assert got.shape == (2, *rows, 192)
    torch.testing.assert_close(got.sum(0), F.linear(x.float(), torch.cat(weights).float()), atol=1e-4, rtol=1e-4)


def test_opcheck_align_rows():
    opcheck(minikv.align_rows, left_padding([7, 3], 7))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("observed", [None, 0, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_prefill_attention(padded, observed, dtype):
    q, k, v = (torch.randn(2, heads, 20, 16, dtype=dtype) for heads in (4, 2, 2))
    rows = minikv.align_rows(left_padding([20, 4], 20)) if padded else (None, None)
    opcheck(minikv.prefill_attention, q, k, v, *rows, 0.25, observed)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("length", [5, 300, 1500])
@pytest.mark.parametrize("preset", PRESETS)
def test_opcheck_compress(preset, length, padded):
    """Sizes of the tier depend on data: the fake may only name fewer facts, never wrong ones."""
    config = MiniKVConfig.preset(preset)
    k, v = torch.randn(2, 2, 2, length, 32)
    scores = None if config.observed_queries is None else torch.rand(2, 2, length)
    rows = minikv.align_rows(left_padding([length, 3], length)) if padded else (None, None)
    opcheck(minikv.compress, k, v, scores, *rows, 0, 2, config.to_json(), torch.rand(2, 2, 32))


@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("preset", PRESETS)
def test_opcheck_decode_attention(preset, new):
    k, v = cache(preset)
    q, n = torch.randn(2, 4, new, 32), torch.randn(2, 2, new, 32)
    opcheck(minikv.decode_attention, q, n, n, tier(k), tier(v), k.dense, v.dense, k.state, 300, 0.2, k.config.to_json())


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("preset", PRESETS)
def test_opcheck_dequantize(preset, padded):
    for kv in cache(preset, valid=left_padding([300, 80], 300) if padded else None):
        tensors = [getattr(kv, name) for name in ("packed", "dense", "state", "important", "kept")]
        opcheck(minikv.dequantize, *tensors, 300, kv.role, kv.config.to_json())


def check_what_queries_are_like(op, padded):
    rows = minikv.align_rows(left_padding([20, 4], 20)) if padded else (None, None)
    opcheck(op, torch.randn(2, 4, 20, 16), torch.randn(2, 2, 20, 16), *rows)


@pytest.mark.parametrize("padded", [False, True])
def test_opcheck_query_range(padded):
    check_what_queries_are_like(minikv.query_range, padded)


@pytest.mark.parametrize("padded", [False, True])
def test_opcheck_query_moments(padded):
    check_what_queries_are_like(minikv.query_moments, padded)


def fixed_layer(preset, filled=True):
    """A layer of a `MiniKVCache`, 300 of 400 tokens long, and keys and values."""
    layer = MiniKVLayer(MiniKVConfig.preset(preset), 400, 2, 2, 32, torch.float32, torch.device("cpu"))
    k, v = torch.randn(2, 2, 2, 300, 32)
    if filled:
        layer.update(k, v)
    return layer, layer.config.to_json(), k, v


@pytest.mark.parametrize("preset", ["lossless", "default"])
def test_opcheck_store_prompt(preset):
    layer, config, k, v = fixed_layer(preset, filled=False)
    opcheck(minikv.store_prompt, k, v, None, None, None, layer.key, layer.value, layer.important, layer.kept, layer.length,
            layer.padding, 0, 1, 400, config)  # fmt: skip


@pytest.mark.parametrize("preset", ["lossless", "default"])
def test_opcheck_update(preset):
    layer, config, k, v = fixed_layer(preset)
    opcheck(minikv.update, k[:, :, :5], v[:, :, :5], layer.key, layer.value, layer.important, layer.kept, layer.length,
            layer.padding, 400, config)  # fmt: skip


@pytest.mark.parametrize("preset", ["lossless", "default"])
def test_opcheck_make_room(preset):
    layer, config, *_ = fixed_layer(preset)
    mask = (torch.arange(400) <= 300)[None, None, None]
    opcheck(minikv.make_room, layer.key, layer.value, [layer.length], layer.padding, 1, mask, 400, config)


@pytest.mark.parametrize("preset", ["lossless", "default"])
def test_opcheck_extend_attention(preset):
    layer, config, k, v = fixed_layer(preset)
    opcheck(minikv.extend_attention, torch.randn(2, 4, 7, 32), k[:, :, :7], v[:, :, :7], layer.key, layer.value,
            layer.length, layer.padding, None, 400, 0.2, config)  # fmt: skip


def test_opcheck_padding_of():
    opcheck(minikv.padding_of, torch.ones(7, 7, dtype=torch.bool).tril().expand(2, 1, 7, 7))


def test_opcheck_seek():
    layer, config, _, _ = fixed_layer("default")
    opcheck(minikv.seek, torch.tensor([300]), layer.key[-1], layer.value[-1], layer.important, layer.kept, layer.length,
            layer.padding, 400, config)  # fmt: skip


def test_seek_to_the_start_forgets_the_padding():
    layer, config, _, _ = fixed_layer("default")
    layer.padding.fill_(5)
    minikv.seek(torch.tensor([0]), layer.key[-1], layer.value[-1], layer.important, layer.kept, layer.length, layer.padding, 400,
                config)  # fmt: skip
    assert int(layer.length) == 0 == int(layer.padding.sum())


@pytest.mark.parametrize("start", [0, 300])
def test_opcheck_prompt_or_extend(start):
    layer, config, k, v = fixed_layer("default", filled=bool(start))
    opcheck(minikv.prompt_or_extend, torch.randn(2, 4, 7, 32), k[:, :, :7], v[:, :, :7], torch.tensor(start), None, None, None,
            layer.key, layer.value, layer.important, layer.kept, layer.length, layer.padding, 0, 1, 400, 0.25, config)  # fmt: skip


def test_opcheck_chunked_mlp():
    gate, up, down = torch.randn(12, 8), torch.randn(12, 8), torch.randn(8, 12)
    opcheck(torch.ops.minikv.chunked_mlp, torch.randn(2, 7, 8), gate, up, down, 3)


def test_opcheck_given_back():
    """It only raises: when it is run, not when it is traced."""
    with FakeTensorMode():
        assert minikv.given_back(torch.empty(0, dtype=torch.bfloat16), [2, 3]).shape == (2, 3)
    with pytest.raises(RuntimeError, match="given back"):
        minikv.given_back(torch.empty(0), [2, 3])


def test_every_op_is_checked():
    """A new op comes with a test of its registration."""
    checked = {name.removeprefix("test_opcheck_") for name in globals() if name.startswith("test_opcheck_")}
    registered = {
        name.removeprefix("minikv::").split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("minikv::")
    }
    assert registered == checked


# ---- rotation


@pytest.mark.parametrize("dim", [16, 48, 64, 80, 96, 112, 128, 256])
def test_hadamard_is_orthogonal_and_spreads(dim):
    matrix = hadamard(dim)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(dim), rtol=0, atol=1e-6)
    # 80 = 64 + 16: every channel is spread evenly over its block.
    largest = 1 << (dim.bit_length() - 1)
    assert torch.equal(matrix[:largest, :largest].abs(), torch.full((largest, largest), largest**-0.5))
    assert not matrix[:largest, largest:].any()


# ---- attention


def by_hand(q, k, v, mask, scale):
    """Softmax attention in float64; q has more heads than k and v."""
    repeats = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(repeats, 1) for x in (k, v))
    logits = (q.double() @ k.mT * scale).masked_fill(~mask, -torch.inf)
    return logits.softmax(-1) @ v, logits.softmax(-1)


@settings(max_examples=40)
@given(
    bits=st.sampled_from([2, 4, 8, 16]), group=st.sampled_from([16, 32, 64, 128]),
    dim=st.sampled_from([16, 64, 80, 96]), rotation=st.sampled_from(["none", "hadamard"]),
    length=st.integers(1, 700), new=st.integers(1, 5), key_axis=st.sampled_from(["token", "channel"]),
    balancer=st.sampled_from(["none", "mikv"]), important=st.sampled_from([0, 30, 64, 0.5, 0.9]),
    important_bits=st.sampled_from([4, 8, 16]),
    ratio=st.integers(1, 5), kv_heads=st.integers(1, 3), sinks=st.integers(0, 5), window=st.integers(0, 70),
    drops=st.booleans(), padding=st.floats(0, 1), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)  # fmt: skip
def test_decode_is_attention_over_what_dequantize_gives(
    bits, group, dim, rotation, length, new, key_axis, balancer, important, important_bits, ratio, kv_heads, sinks, window, drops,
    padding, dtype
):
    """Appends, then attends; the second row is padded. Rounding of intermediate results is all that may differ."""
    policy = {"policy": "heavy_hitter", "heavy": 0.3, "recent": 0.2} if drops and bits < 16 else {}
    config = MiniKVConfig(
        bits=bits, group=group, rotation=rotation, sinks=sinks, window=window, key_axis=key_axis, balancer=balancer,
        important=important, important_bits=important_bits, noise_correction=False, **policy,
    )  # fmt: skip
    valid = left_padding([length, max(1, round(padding * length))], length)
    k, v = torch.randn(2, 2, kv_heads, length, dim).to(dtype)
    scores = torch.rand(2, kv_heads, length) if config.drops else None
    kt, vt = compress(config, k, v, scores, valid)
    kt, vt = kt.reserve(new), vt.reserve(new)
    q = torch.randn(2, kv_heads * ratio, new, dim).to(dtype)
    k_new, v_new = torch.randn(2, 2, kv_heads, new, dim).to(dtype)
    stored = kt.kept_mask()
    keys, values = (torch.cat([t.dequantize(), n], 2) for t, n in ((kt, k_new), (vt, v_new)))
    out = minikv.decode_attention(
        q, k_new, v_new, tier(kt), tier(vt), kt.dense, vt.dense, kt.state, length, 0.3, config.to_json()
    )
    causal = torch.arange(length + new) <= torch.arange(length, length + new)[:, None]
    visible = torch.cat([stored, torch.ones(2, kv_heads, new, dtype=torch.bool)], 2)
    mask = visible.repeat_interleave(ratio, 1)[:, :, None] & causal
    expected, _ = by_hand(q, keys, values, mask, 0.3)
    tolerance = {torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}[dtype]
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    # And what was appended is what the longer cache holds.
    assert torch.equal(kt.longer(new).dequantize()[:, :, length:], k_new)


@pytest.mark.parametrize("config", [
    MiniKVConfig(important=0),
    MiniKVConfig(important=0, bits=4, group=32, metadata_bits=16, rotation="none", window=10, error_feedback=False),
])  # fmt: skip
def test_noise_correction(config):
    """Packed tokens' logits are less by half the variance of their errors, of which feedback leaves half."""
    length, heads, dim, scale = 1500, 3, 32, 0.6
    k, v = torch.randn(2, 1, heads, length, dim)
    q, k_new, v_new = torch.randn(1, 2 * heads, 1, dim), *torch.randn(2, 1, heads, 1, dim)
    kt, vt = (t.reserve(1) for t in compress(config, k, v))
    keys, values = (torch.cat([t.dequantize(), n], 2).double() for t, n in ((kt, k_new), (vt, v_new)))
    out = minikv.decode_attention(
        q, k_new, v_new, tier(kt), tier(vt), kt.dense, vt.dense, kt.state, length, scale, config.to_json()
    )
    rotation = rotation_matrix(config.rotation, dim, q.device)
    turned = q if rotation is None else q @ rotation
    steps = metadata(kt.scale, kt.zero, config.bits)[0].repeat_interleave(config.group, 3).flatten(2, 3)
    turned, queries, steps = turned.double().unflatten(1, (heads, 2)), q.double().unflatten(1, (heads, 2)), steps.double()
    logits = torch.einsum("bhrnd,bhtd->bhrnt", queries, keys) * scale
    variance = torch.einsum("bhrnd,bhtd->bhrnt", (scale * turned) ** 2, steps**2) / 12
    logits[..., config.sinks : config.sinks + variance.shape[-1]] -= variance / (4 if config.error_feedback else 2)
    expected = torch.einsum("bhrnt,bhtd->bhrnd", logits.softmax(-1), values).flatten(1, 2)
    torch.testing.assert_close(out.double(), expected, rtol=2e-5, atol=2e-5)


@settings(max_examples=30)
@given(
    seq=st.integers(1, 90), ratio=st.integers(1, 4), kv_heads=st.integers(1, 2), observed=st.sampled_from([None, 0, 7]),
    padding=st.sampled_from(["none", "left", "right", "anywhere"]), fill=st.floats(0, 1), seed=st.integers(0, 99),
)  # fmt: skip
def test_prefill_attention_row_by_row(seq, ratio, kv_heads, observed, padding, fill, seed):
    torch.manual_seed(seed)
    q, k, v = (torch.randn(2, heads, seq, 16) for heads in (kv_heads * ratio, kv_heads, kv_heads))
    count = max(1, round(fill * seq)) if padding != "none" else seq
    valid = torch.ones(2, seq, dtype=torch.bool)
    valid[1] = False
    places = {"left": range(seq - count, seq), "right": range(count), "none": range(seq)}
    valid[1, list(places.get(padding, torch.randperm(seq)[:count].tolist()))] = True
    rows = (None, None) if padding == "none" else minikv.align_rows(valid)
    q[1, :, ~valid[1]] = 1e4  # padding that would win, if it took part
    k[1, :, ~valid[1]] = 1e4
    out, scores = minikv.prefill_attention(q, k, v, *rows, 0.25, observed)
    assert out.isfinite().all() and out.is_contiguous()
    for row in range(2):
        own = valid[row]
        n = int(own.sum())
        expected, maps = by_hand(
            *(x[row : row + 1, :, own] for x in (q, k, v)), torch.ones(n, n, dtype=torch.bool).tril(), 0.25
        )
        torch.testing.assert_close(out[row : row + 1, :, own].double(), expected, rtol=1e-5, atol=1e-5)
        if observed is not None:
            columns = maps[:, :, -observed:].sum(2).unflatten(1, (kv_heads, ratio)).sum(2)[0]
            torch.testing.assert_close(scores[row, :, :n].double(), columns, rtol=1e-3, atol=1e-5)
            assert not scores[row, :, n:].any()
    assert observed is not None or scores.numel() == 0


@pytest.mark.parametrize("seq", [1, 255, 256, 257, 600])
@pytest.mark.parametrize("ratio", [1, 3, 7])
@pytest.mark.parametrize("last", [None, 32])
def test_scores_are_column_sums_of_the_attention_map(seq, ratio, last):
    q, k = torch.randn(2, 2 * ratio, seq, 16), torch.randn(2, 2, seq, 16)
    lengths = torch.tensor([seq, max(1, seq // 3)])
    scores = column_scores_reference(q, k, 0.3, lengths, last)
    for row, n in enumerate(lengths.tolist()):
        _, maps = by_hand(q[row : row + 1, :, :n], k[row : row + 1, :, :n], k[row : row + 1, :, :n],
                          torch.ones(n, n, dtype=torch.bool).tril(), 0.3)  # fmt: skip
        maps = maps[:, :, -last:] if last else maps
        expected = maps.sum(2).unflatten(1, (2, ratio)).sum(2)[0]
        torch.testing.assert_close(scores[row, :, :n].double(), expected, rtol=1e-3, atol=1e-6)
        assert not scores[row, :, n:].any()


# ---- compress


def important_by_hand(keys, packed, config):
    """Of a row and head's keys [kept, head_dim]: the places of those farthest from the mean of all of the prompt's."""
    places = list(range(config.sinks, config.sinks + config.important))
    if packed:
        candidates = range(config.sinks, config.sinks + config.important + packed)
        places = sorted(candidates, key=lambda i: -keys[i])[: config.important]
    return sorted(places)


def metadata_by_hand(zero, step, config):
    """As they are stored."""
    if config.metadata_bits == 16 or config.bits == 8:
        return zero.half().float(), step.half().float()
    parts = {2: 8, 4: 2}[config.bits]
    step = torch.maximum(step, zero.abs() * parts / 119).half().float()
    last_place = 2.0 ** (step.log2().floor() - 3)
    step = (step / last_place + 0.5).floor() * last_place
    return (zero / step * parts).round() * step / parts, step


def compress_by_hand(x, tokens, distance, config, role):
    """What a row and head should hold, in order: float32 [kept, head_dim], and which of them are packed."""
    x = x[tokens].float()
    if config.bits == 16:
        return x, []
    packed = max(0, len(x) - config.sinks - config.important - config.window) // BLOCK * BLOCK
    if not packed:
        return x, []
    important = important_by_hand(distance[tokens].tolist(), packed, config)
    places = [i for i in range(config.sinks, len(x)) if i not in important][:packed]
    rotation = rotation_matrix(config.rotation, x.shape[1], x.device)
    part = x[places] if rotation is None else x[places] @ rotation
    if role == "key":
        groups = part.T.unflatten(1, (-1, config.group))
    else:
        groups = part.unflatten(1, (-1, config.value_group(x.shape[1])))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    middle, half = (low + high) / 2, (high - low) / 2 * config.clip_of(config.bits)
    low, high = middle - half, middle + half
    zero, step = metadata_by_hand(low, (high - low) / (2**config.bits - 1), config)
    groups = ((groups - zero) / step).round().clamp(0, 2**config.bits - 1) * step + zero
    part = groups.flatten(1).T if role == "key" else groups.flatten(1)
    x = x.clone()
    x[places] = part if rotation is None else part @ rotation.T
    return x, places


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dim", [32, 80])
@pytest.mark.parametrize(
    "config",
    [
        MiniKVConfig(),
        MiniKVConfig(bits=4, group=32, sinks=0, important=0, window=10),
        MiniKVConfig(bits=8, rotation="none", sinks=2, clip=0.9),
        MiniKVConfig.preset("minikv"),
        MiniKVConfig.preset("minikv", sinks=4, window=16, rotation="hadamard", heavy=100, recent=50),
        MiniKVConfig.preset("minikv", important=30),
        MiniKVConfig.preset("lossless"),
    ],
    ids=["default", "4 bits", "8 bits", "minikv", "mixed", "both", "lossless"],
)
def test_compress_by_hand(config, dim, padded):
    seq, layer, layers = 700, 1, 3
    lengths = [seq, 333] if padded else [seq, seq]
    valid = left_padding(lengths, seq)
    k, v = torch.randn(2, 2, 2, seq, dim)
    scores = torch.rand(2, 2, seq)
    kv = compress(config, k, v, scores if config.drops else None, valid if padded else None, layer, layers)
    chosen = None
    if config.drops:
        chosen = [within_budget(row, n, layer, layers, config) for row, n in zip(scores, lengths, strict=True)]
    for x, held in zip((k, v), kv, strict=True):
        dense, mask = held.dequantize(), held.kept_mask()
        for row in range(2):
            own = valid[row].nonzero().flatten()
            for head in range(2):
                tokens = own if chosen is None else own[chosen[row][head]]
                assert torch.equal(mask[row, head].nonzero().flatten(), tokens)
                sampled = own[:: max(1, len(own) // 256)]
                distance = (k[row, head] - k[row, head, sampled].mean(0)).square().sum(-1)
                expected, packed = compress_by_hand(x[row, head], tokens, distance, config, held.role)
                assert held.state[row, :3].tolist() == [seq - (len(tokens) - len(packed)), 0, len(packed)]
                # Scale, zero or a code may be rounded the other way, here and there.
                close = torch.isclose(dense[row, head, tokens], expected, rtol=1e-4, atol=1e-4)
                assert close.float().mean() > 0.995
                exact = [i for i in range(len(tokens)) if i not in set(packed)]
                assert torch.equal(dense[row, head, tokens[exact]], expected[exact])


@pytest.mark.parametrize("where", ["packed", "dense"])
def test_compress_counts_tokens_that_are_not_finite(where):
    k, v = torch.randn(2, 2, 2, 300, 32)
    token = 50 if where == "packed" else 290
    k[1, 0, token, 3], k[1, 1, token, 4], v[0, 0, token] = torch.nan, torch.inf, torch.nan
    valid = left_padding([300, 280], 300)
    k[1, :, :20] = torch.nan  # padding does not count
    kt, vt = compress(MiniKVConfig(rotation="none"), k, v, valid=valid)
    assert kt.state[:, 1].tolist() == [0, 1] and vt.state[:, 1].tolist() == [1, 0]
    if where == "packed":
        assert kt.dequantize().isfinite().all()


def test_flush_moves_whole_blocks_of_full_rows_only():
    """Row 0 has 364 tokens, row 1 has 244: with room for 192 behind 4 sinks and 64 important ones, 64 of them the window."""
    k, _ = cache(length=364, valid=left_padding([364, 244], 364))
    before, dense = k.state.clone(), k.dequantize()
    ops.flush([(k.codes, k.scale, k.zero, k.dense, k.state, k.dense)], [], 364, 30, 192, 1, k.config)
    # Row 0: 128 packed, 236 dense: 236 + 30 > 260, one block of 104 does not fill. Row 1: 244 dense, 112: neither.
    assert torch.equal(k.state, before) and torch.equal(k.dequantize(), dense)
    k, _ = cache(length=384, valid=left_padding([384, 254], 384))
    for _ in range(4):
        k = torch.cat([k, torch.randn(2, 2, 1, 32)], 2)
    assert k.state[:, 2].tolist() == [128, 0]
    k = torch.cat([k, torch.randn(2, 2, 1, 32)], 2)  # row 0 held 260, row 1 holds 258
    assert k.state[:, 2].tolist() == [256, 0] and k.state[:, 0].tolist() == [256, 130]


def test_errors():
    config = MiniKVConfig().to_json()
    with pytest.raises(ValueError, match="layer 3: the prompt is empty"):
        minikv.compress(torch.zeros(1, 1, 0, 16), torch.zeros(1, 1, 0, 16), None, None, None, 3, 4, config)
    with pytest.raises(ValueError, match="Row 0 of the batch has no tokens: its attention mask is all zeros"):
        minikv.align_rows(left_padding([0, 4], 4))


def test_sdpa_on_the_compressed_tensors_is_the_same_attention():
    """The rule that any other op dequantizes, against the op that replaces it."""
    k, v = cache(length=200)
    q, new = torch.randn(2, 4, 1, 32), torch.randn(2, 2, 1, 32)
    fallback = F.scaled_dot_product_attention(q, torch.cat([k, new], 2), torch.cat([v, new], 2), enable_gqa=True)
    k, v = k.reserve(1), v.reserve(1)
    fused = minikv.decode_attention(
        q, new, new, tier(k), tier(v), k.dense, v.dense, k.state, 200, 32**-0.5, k.config.to_json()
    )
    torch.testing.assert_close(fused, fallback, rtol=1e-5, atol=1e-5)
