"""Decode attention over a packed tier and a dense region, against its reference."""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minikv_compile.kernels.attend import Important, append, attend, attend_reference, attend_triton
from minikv_compile.kernels.compress import compress_reference
from minikv_compile.kernels.packing import BLOCK, value_group
from minikv_compile.kernels.products import folded
from minikv_compile.kernels.tuning import AttendTuning
from minikv_compile.rotation import hadamard

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float32: 2e-5}
SMALL = AttendTuning(programs=5, sides=2, merge=((2, 1, 32, 4), (None, 16, 32, 2)))
"""Shares that cut items and span several. (One side, where query rows leave no columns free.)"""


@dataclass(frozen=True)
class Case:
    dim: int = 64
    kv_heads: int = 1
    ratio: int = 4
    new: int = 1
    dtype: torch.dtype = torch.float16
    bits: int = 2
    k_group: int = 64
    k_axis: str = "token"
    v_group: int = 64
    rotate: bool = True
    in_tier: tuple[int, ...] = (3, 1)
    """Blocks in each row's tier."""
    capacity: int = 3
    in_dense: tuple[int, ...] = (100, 7)
    """Tokens in each row's dense region, without the new ones."""
    dense_capacity: int = 128
    k_size: float = 1.0
    v_size: float = 1.0
    seed: int = 0
    balance: bool = False
    important_bits: int = 0
    """Of an important tier; 0 for none."""
    metadata_bits: int = 16
    noise: float = 0.0
    in_important: tuple[int, ...] = (2, 0, 1)
    """Blocks in each row's important tier."""


def poison(packed, blocks):
    """NaN metadata, or the largest bytes, past each row's blocks."""
    for t in packed[1:]:
        for row, n in enumerate(blocks):
            t[row, :, n:] = torch.nan if t.is_floating_point() else 255


def build(case):
    """The arguments of `attend`, on the CPU, NaN wherever nothing valid lies."""
    generator = torch.Generator().manual_seed(case.seed)
    batch, length = len(case.in_tier), 1000

    def random(heads, tokens, size=1.0):
        return (torch.randn(batch, heads, tokens, case.dim, generator=generator) * size).to(case.dtype)

    rotation = hadamard(case.dim) if case.rotate else None
    tokens = torch.tensor(case.in_tier, dtype=torch.int32) * BLOCK
    v_group = value_group(case.v_group, case.dim)
    k_group = case.k_group if case.k_axis == "token" else value_group(case.k_group, case.dim)
    balancer = torch.rand(batch, case.kv_heads, case.dim, generator=generator) + 0.5 if case.balance else None

    def tier(tokens, bits, blocks):
        made = []
        for size, group, axis, layout in (
            (case.k_size, k_group, case.k_axis, "key"),
            (case.v_size, v_group, "channel", "value"),
        ):
            x = random(case.kv_heads, case.capacity * BLOCK, size)
            factors = balancer if layout == "key" else None
            made.append(
                compress_reference(
                    x, None, 0, tokens, case.capacity, bits, group, axis, layout, rotation, balancer=factors,
                    metadata_bits=case.metadata_bits,
                )
            )
            poison(made[-1], blocks[:batch])
        return made

    tiers, important = tier(tokens, case.bits, case.in_tier), None
    second = torch.tensor(case.in_important[:batch], dtype=torch.int32) * BLOCK
    if case.important_bits:
        important = Important(*tier(second, case.important_bits, case.in_important), case.important_bits)
    dense = [random(case.kv_heads, case.dense_capacity, size) for size in (case.k_size, case.v_size)]
    for x in dense:
        for row, n in enumerate(case.in_dense):
            x[row, :, n:] = torch.nan
    offset = [length - case.new - n for n in case.in_dense]
    none = torch.zeros(batch)
    state = torch.stack([torch.tensor(offset), none, tokens, none, none, second], -1).int()
    q = random(case.kv_heads * case.ratio, case.new)
    new = [random(case.kv_heads, case.new, size) for size in (case.k_size, case.v_size)]
    return [
        q, *new, *tiers, *dense, state, length, case.dim**-0.5, case.bits, k_group, case.k_axis, v_group, rotation, balancer,
        important, case.noise,
    ]  # fmt: skip


def to_device(arguments, device):
    def move(x):
        if isinstance(x, Important):
            return Important(move(x.keys), move(x.values), x.bits)
        if isinstance(x, tuple):
            return tuple(t.to(device) for t in x)
        return x.to(device, copy=True) if isinstance(x, torch.Tensor) else x

    return [move(x) for x in arguments]


def check(case, device, tuning=SMALL, edit=lambda arguments: None, largest=1.0):
    """`edit` changes the arguments; `largest` is by how much it multiplies the size of values."""
    arguments = build(case)
    edit(arguments)
    on_device = to_device(arguments, device)
    actual = attend_triton(*on_device, tuning=tuning)
    finite = [t and tuple(x.nan_to_num(0.0) for x in t) for t in arguments[3:5]]  # 0 * NaN in the reference
    arguments[3:5] = finite
    if arguments[-2] is not None:
        held = ((arguments[-2].keys, arguments[-2].values), arguments[-2].bits)
        arguments[-2] = Important(*(tuple(x.nan_to_num(0.0) for x in t) for t in held[0]), held[1])
    expected = attend(arguments[0].float(), *arguments[1:])
    assert actual.dtype == case.dtype and actual.shape == expected.shape
    tolerance = TOLERANCE[case.dtype]
    torch.testing.assert_close(actual.float().cpu(), expected, rtol=tolerance, atol=tolerance * case.v_size * largest)
    for ours, theirs in zip(on_device[5:7], arguments[5:7], strict=True):
        assert torch.equal(ours.cpu().nan_to_num(7.0), theirs.nan_to_num(7.0))


@settings(max_examples=40)
@given(
    dim=st.sampled_from([16, 32, 64, 80, 96, 128, 256]),
    ratio=st.sampled_from([*range(1, 17), 1, 2, 3, 4, 4, 4]),
    sides=st.sampled_from([1, 2, 2]),
    kv_heads=st.sampled_from([1, 2]),
    dtype=st.sampled_from(DTYPES),
    bits=st.sampled_from([2, 4, 8]),
    metadata_bits=st.sampled_from([8, 16]),
    noise=st.sampled_from([0.0, 1 / 24]),
    k_group=st.sampled_from([16, 32, 64, 128]),
    k_axis=st.sampled_from(["token", "token", "channel"]),
    v_group=st.sampled_from([16, 32, 64, 128]),
    rotate=st.booleans(),
    in_tier=st.integers(0, 3),
    in_dense=st.integers(0, 120),
    balance=st.booleans(),
    seed=st.integers(0, 9),
)
def test_matches_reference(device, sides, **choices):
    choices["in_tier"] = (choices["in_tier"],)
    choices["in_dense"] = (choices["in_dense"],)
    check(Case(**choices), device, tuning=replace(SMALL, sides=sides))


@settings(max_examples=10)
@given(
    dim=st.sampled_from([64, 80, 128]), ratio=st.sampled_from([1, 3, 8]), new=st.sampled_from([1, 3]),
    dtype=st.sampled_from(DTYPES), bits=st.sampled_from([2, 4]), important_bits=st.sampled_from([4, 8]),
    metadata_bits=st.sampled_from([8, 16]), noise=st.sampled_from([0.0, 0.1]),
    k_axis=st.sampled_from(["token", "channel"]), rotate=st.booleans(),
    balance=st.booleans(),
    in_tier=st.tuples(st.integers(0, 3), st.integers(0, 3)), in_important=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    seed=st.integers(0, 9),
)  # fmt: skip
def test_important_tier(device, **choices):
    """Two tiers and the dense region are one softmax; any of the tiers may be empty, in one row or in both."""
    check(Case(**choices), device)


@settings(max_examples=40)
@given(
    dim=st.sampled_from([16, 64, 80, 96, 128, 256]), ratio=st.sampled_from([1, 4, 7, 12]), new=st.sampled_from([1, 3]),
    dtype=st.sampled_from(DTYPES), bits=st.sampled_from([2, 4, 8]), important_bits=st.sampled_from([0, 4, 8]),
    metadata_bits=st.sampled_from([8, 16]), noise=st.sampled_from([0.0, 0.1]), k_group=st.sampled_from([16, 32, 64, 128]),
    k_axis=st.sampled_from(["token", "channel"]),
    v_group=st.sampled_from([16, 64, 128]), in_tier=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    balance=st.booleans(), seed=st.integers(0, 9),
)  # fmt: skip
def test_folded_products(**choices):
    """The same numbers, NaN past what is valid or not."""
    case = Case(**choices, kv_heads=2)
    q, k_new, v_new, *others = build(case)
    q = q.float()
    for dense, new in zip(others[2:4], (k_new, v_new), strict=True):
        append(dense, new, others[4], others[5])
    expected, found = attend_reference(q, *others), attend_reference(q, *others, products=folded(case.ratio))
    assert expected.isfinite().all()
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


def test_no_second_side_without_columns_for_it(device):
    check(Case(ratio=4), device, tuning=replace(SMALL, rows=4))


def test_ragged_rows(device):
    check(Case(in_tier=(3, 0, 1), in_dense=(100, 0, 64)), device)


@pytest.mark.parametrize("new, ratio", [(2, 1), (5, 4), (16, 2)])
def test_several_new_tokens(device, new, ratio):
    check(Case(new=new, ratio=ratio, in_dense=(100, 0)), device)


def test_ratio_of_seven(device):
    check(Case(ratio=7, dim=128, in_tier=(2,), in_dense=(20,)), device)


def test_no_tier(device):
    def edit(arguments):
        arguments[3] = arguments[4] = None

    check(Case(new=2), device, edit=edit)


def test_default_tuning(device):
    check(Case(), device, tuning=AttendTuning())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("v_size", [1e-6, 1e-4, 1e4, 1e6])
@pytest.mark.parametrize("metadata_bits", [8, 16])
def test_sizes_of_values(device, dtype, v_size, metadata_bits):
    """16-bit operands neither overflow nor lose small values, nor where metadata is subnormal or saturates."""
    if dtype == torch.float16 and not 1e-5 < v_size < 65504:
        pytest.skip("no fp16 numbers of this size")
    check(Case(dtype=dtype, v_size=v_size, metadata_bits=metadata_bits), device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("size", [2.0**-5, 2.0**5, 2.0**10, 2.0**14, 1e5])
def test_key_sizes_with_bytes_and_noise(device, dtype, rotate, size):
    """Neither the squares of the noise nor zeros beside the largest steps overflow into a NaN; where they fit in fp16, they are
    right."""

    def edit(arguments):
        arguments[0] /= size

    case = Case(dtype=dtype, rotate=rotate, k_size=size, bits=4 if size == 1e5 else 2, metadata_bits=8, noise=1 / 24)
    if size <= 2.0**5:
        check(case, device, edit=edit)
    else:
        arguments = to_device(build(case), device)
        arguments[0] /= size
        assert attend_triton(*arguments, tuning=SMALL).isfinite().all()


def test_value_sizes_that_change_from_block_to_block(device):
    def edit(arguments):
        for meta in arguments[4][1:]:
            meta[:, :, 1] *= 1000
            meta[:, :, 2] /= 1000

    check(Case(in_tier=(3,), in_dense=(10,), rotate=False, v_size=0.3), device, edit=edit, largest=1000.0)


@pytest.mark.parametrize("size", [1e-3, 100.0])
def test_sizes_of_queries(device, size):
    def edit(arguments):
        arguments[0] *= size

    check(Case(k_size=0.3), device, edit=edit)


def test_many_light_tokens_keep_their_weight(device):
    """Tokens of 2**-15 of the largest weight, of which only they have a value: none may vanish."""

    def edit(arguments):
        q, k_new, v_new, (_, k_scale, k_zero), (_, v_scale, v_zero), k_dense, v_dense = arguments[:7]
        for x in (q, k_new, v_new, k_scale, k_zero, v_zero, k_dense, v_dense):
            x.zero_()
        q[..., 0] = 8.0
        k_zero[:, :, 0, 0, 0] = 15 / 1.4427  # 16 tokens with all the weight
        v_scale.fill_(1.0)[:, :, 0, :, :16] = 0.0

    check(Case(in_tier=(3,), in_dense=(10,), k_group=16, rotate=False, v_size=1e-7), device, edit=edit)


def test_query_that_the_rotation_concentrates(device):
    """One rotated channel is sqrt(head_dim) times the largest of q; with keys near the end of fp16 it must not overflow."""

    def edit(arguments):
        arguments[0].fill_(1e-4)

    check(Case(dim=128, k_size=1e4), device, edit=edit)
    check(Case(dim=128, k_size=1e4, metadata_bits=8), device, edit=edit)


def test_layouts_of_queries_and_dense(device):
    """Views of [batch, seq, heads, head_dim], as a projection leaves them."""

    def edit(arguments):
        for i in (0, 1, 2, 5, 6):
            arguments[i] = arguments[i].transpose(1, 2).contiguous().transpose(1, 2)

    check(Case(kv_heads=2, new=2), device, edit=edit)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_new_length_compiles_nothing(device):
    import triton

    arguments = to_device(build(Case(in_dense=(5, 5))), device)
    attend_triton(*arguments)
    compiled = []
    triton.knobs.runtime.jit_post_compile_hook = lambda **kwargs: compiled.append(kwargs)
    try:
        for arguments[8] in (1001, 1008, 1016, 1024):
            attend_triton(*arguments)
    finally:
        triton.knobs.runtime.jit_post_compile_hook = None
    assert not compiled
