"""Inductor's lowering of `minikv::decode_attention`: its three kernels as Triton templates, in place of the opaque op. (And of
`minikv::linear_parts` and `minikv::once`.)

The templates (`kernels/templates/`) call the device functions that the op launches, with the constants that it launches
them with (`attend.launches`): there is one arithmetic. What they add is what Inductor can do with a kernel that it
generates: launch it without the op's way through the dispatcher, measure configurations (`mode="max-autotune"`), and
fuse what follows into the last one. Where they do not apply, the op runs.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from . import compat
from .config import MiniKVConfig
from .kernels import attend, attention, jit, linear, merge, packing, prepare, state, tier
from .kernels.attend import BLOCK, MERGE_WARPS, Launches
from .kernels.tuning import template_tunings
from .rotation import rotation_matrix
from .tiers import grouping

DEVICES = set() if os.environ.get("MINIKV_TEMPLATES") == "0" else {"cuda"}
"""Types of devices whose graphs get the templates; `MINIKV_TEMPLATES=0` leaves the op there. (The tests add "cpu", in
Triton's interpreter.)"""

_SOURCES = Path(attention.__file__).parent / "templates"


@cache
def fingerprint() -> str:
    """Of all text that a generated kernel is made of: Inductor's caches know neither templates nor what they import."""
    modules = attend, attention, jit, linear, merge, packing, prepare, state, tier
    files = [*sorted(_SOURCES.glob("*.jinja")), *(Path(module.__file__) for module in modules), Path(__file__)]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def cache_tag() -> str:
    """What a graph that Inductor has cached depends on, besides what Inductor knows."""
    return f"minikv-{fingerprint()}-{','.join(sorted(DEVICES))}"


@cache
def _template(name: str) -> Any:
    source = f"# minikv {fingerprint()}\n" + (_SOURCES / f"{name}.py.jinja").read_text()
    return compat.template_class()(name=f"minikv_{name}", grid=compat.symbolic_grid(_grid), source=source)


def _grid(*sizes_and_constants: Any) -> tuple[int, int, int]:
    return (*sizes_and_constants[-1]["GRID"], 1)


@cache
def register() -> None:
    """Tell Inductor."""
    op = torch.ops.minikv.decode_attention.default
    opaque = compat.inductor().fallback(op, add_to_fallback_set=False)

    def lower(q, k, v, k_tier, v_tier, k_dense, v_dense, state, length, scale, config, padding=None):
        settings = MiniKVConfig.from_json(config)
        if _applies(q, k, k_dense, v_dense, [*k_tier, *v_tier, state], scale, padding) and not settings.two_tiers:
            balancer = k_tier[-1] if settings.balances else None
            tier = [*k_tier[:3], *v_tier]
            return _decode(q, k, v, tier, k_dense, v_dense, state, length, scale, settings, balancer)
        return opaque(q, k, v, k_tier, v_tier, k_dense, v_dense, state, length, scale, config, padding)

    compat.inductor().register_lowering(op, type_promotion_kind=None)(lower)
    compat.inductor().register_lowering(torch.ops.minikv.once.default, type_promotion_kind=None)(compat.in_memory)
    compat.inductor().register_lowering(torch.ops.minikv.linear_parts.default, type_promotion_kind=None)(_linear_parts)


def _applies(q: Any, k: Any, k_dense: Any, v_dense: Any, whole: Sequence[Any], scale: Any, padding: Any) -> bool:
    """Whether all that the templates take as constants is known, and layouts are as `attend_triton` wants them."""
    known = [*q.get_size(), *k.get_size(), k_dense.get_size()[1]]
    return (
        q.get_device().type in DEVICES
        and padding is None
        and isinstance(scale, (int, float))
        and all(compat.is_known(size) for size in known)
        and all(compat.is_contiguous(x) for x in whole)
        and all(compat.is_known(x.get_stride()[-1]) and x.get_stride()[-1] == 1 for x in (k_dense, v_dense))
    )


def _decode(
    q: Any, k: Any, v: Any, tier: list[Any], k_dense: Any, v_dense: Any, state: Any, length: Any, scale: float,
    config: MiniKVConfig, balancer: Any | None,
) -> Any:  # fmt: skip
    """The three launches: nodes of Inductor's."""
    inductor, device = compat.inductor(), q.get_device()
    q, k, v = (compat.realized(x) for x in (q, k, v))
    k_dense, v_dense, state, *tier = (compat.realized(x, unit_last=False) for x in (k_dense, v_dense, state, *tier))
    batch, heads, n, dim = (int(size) for size in q.get_size())
    rotate = config.rotation != "none" and bool(tier)
    (k_group, k_axis), v_group = grouping(config, "key", dim), config.value_group(dim)
    block = attend.block_bytes(dim, config.bits, k_group, v_group) if tier else 0
    variants = [
        attend.launches(
            batch, heads, n, dim, int(k.get_size()[1]), q.get_dtype(), bool(tier), config.bits, k_group, k_axis,
            v_group, rotate, device, tuning, balancer is not None, noise=config.noise,
        )
        for tuning in template_tunings(
            triton.next_power_of_2(dim), q.get_dtype().itemsize, block, batch * heads * n,
            attend.free_columns(heads // int(k.get_size()[1]) * n, k_axis), attend.folds(dim, k_group, v_group),
            compat.measures(),
        )
    ]  # fmt: skip
    to, length = variants[0], length + n
    slots = max(variant.slots for variant in variants)

    def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Any:
        return compat.realized(inductor.empty_strided(list(shape), None, dtype=dtype, device=device))

    def layout(shape: tuple[int, ...], dtype: torch.dtype) -> Any:
        return inductor.FixedLayout(device, dtype, list(shape))

    factor = empty((to.rows,), torch.float32)
    matrix = compat.constant(lambda: rotation_matrix(config.rotation, dim, device)) if rotate else factor
    balance = factor if balancer is None else compat.realized(balancer, unit_last=False)
    common = dict(BATCH_SIZE=batch, **to.sizes)
    q_tier, _ = _call(
        "prepare", [q, k, v, k_dense, v_dense, state, matrix, balance, factor], layout(to.q_tier_shape, to.tier_dtype), [length],
        [dict(common, **to.prepare, SCALE=float(scale), ROTATED=to.rotated, GRID=to.prepare_grid, num_warps=4,
              num_stages=1)],
        mutated=[k_dense, v_dense, factor],
    )  # fmt: skip
    capacity = tier[0].get_size()[2] if tier else 0
    inputs = [q, compat.realized(q_tier), factor, *(tier or [factor] * 6), k_dense, v_dense, state]
    parts, chosen = _call(
        "split", inputs, layout((2, slots, *to.parts_shape[2:]), torch.float32), [length, capacity],
        [_split_constants(variant, common, scale, slots) for variant in variants],
        make={len(inputs) - 1: _state_to_measure(length, capacity, k_dense.get_size()[2])},
        pdl=to.pdl,
    )  # fmt: skip
    to = variants[chosen]
    out, _ = _call(
        "merge", [compat.realized(parts), state, matrix], layout((batch, heads, n, dim), q.get_dtype()), [length],
        [dict(common, **to.line, **to.merge, SLOTS=slots, PROGRAMS=to.programs, GRID=to.merge_grid,
              num_warps=MERGE_WARPS, num_stages=1)],
        pdl=to.pdl,
    )  # fmt: skip
    return out


def _linear_parts(x: Any, weights: list[Any]) -> Any:
    """One launch."""
    *rows, inputs = map(int, x.get_size())
    outputs = [int(weight.get_size()[0]) for weight in weights]
    launch = linear.Launch.of(math.prod(rows), inputs, outputs, linear.parts_of(sum(outputs), inputs))
    layout = compat.inductor().FixedLayout(x.get_device(), torch.float32, list(launch.shape))
    out, _ = _call(
        "linear", [compat.contiguous(x), *linear.three([compat.realized(weight) for weight in weights])], layout, [],
        [dict(launch.constants, GRID=launch.grid, num_warps=linear.WARPS, num_stages=1)],
    )  # fmt: skip
    return compat.viewed(out, [launch.shape[0], *rows, launch.shape[2]])


def _split_constants(to: Launches, common: dict[str, Any], scale: float, slots: int) -> dict[str, Any]:
    # They are written into the kernel's source; what is no literal is made there.
    own = {name: value for name, value in to.split.items() if name != "CHUNKS"}
    own.update(PRECISION=repr(own["PRECISION"]), DENSE_OPERAND=f"tl.{_name(own['DENSE_OPERAND'])}")
    return dict(common, **to.line, **own, SCALE=float(scale), SLOTS=slots, GRID=(to.programs, 1), num_warps=1,
                num_stages=to.stages)  # fmt: skip


def _name(dtype: Any) -> str:
    return {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}[str(dtype)]


def _call(
    name: str, inputs: list[Any], layout: Any, sizes: list[Any], configurations: list[dict[str, Any]],
    mutated: list[Any] | None = None, make: dict[int, Callable[[Any], Tensor]] | None = None, pdl: bool = False,
) -> tuple[Any, int]:  # fmt: skip
    """(output of the template, place of the configuration that was chosen)."""
    choices: list[Any] = []
    for constants in configurations:
        error = _template(name).maybe_append_choice(
            choices, input_nodes=inputs, layout=layout, call_sizes=sizes, mutated_inputs=mutated,
            triton_meta={"launch_pdl": True} if pdl else None, **constants,
        )  # fmt: skip
        if error is not None:
            raise error
    node, choice = compat.select(f"minikv_{name}", choices, inputs, layout, make or {})
    compat.symbols_of(node, sizes)
    return node, choices.index(choice)


def _state_to_measure(length: Any, capacity: Any, dense: Any) -> Callable[[Any], Tensor]:
    """Makes a state for full regions: random numbers would send a kernel anywhere."""

    def make(node: Any) -> Tensor:
        row = [compat.size_hint(length) - compat.size_hint(dense), 0, compat.size_hint(capacity) * BLOCK, 0, 0, 0]
        return torch.tensor([row] * int(node.get_size()[0]), dtype=torch.int32, device=node.get_device())

    return make
