"""The one module that touches private names of torch, for torch 2.11 to 2.13."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch._dynamo
from torch import Tensor
from torch._dynamo import lookup_backend, maybe_mark_dynamic
from torch._dynamo.source import AttrSource, ConstantSource, TensorProperty, TensorPropertySource
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import _constrain_range_for_size


disabled_torch_function = torch._C._disabled_torch_function_impl
"""For `__torch_function__`: rules live in `__torch_dispatch__` alone, so that Dynamo sees an ordinary tensor."""


def allow_graphs(count: int) -> None:
    """Let a forward be compiled for so many kinds of inputs: past Dynamo's limit (8) it would run uncompressed."""
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, count)


def assert_on_device(condition: Tensor, message: str) -> None:
    """Raise where `condition` is false, without waiting for the device. torch takes fewer than 255 characters."""
    torch._assert_async(condition, message[:250])


def is_fake(x: Tensor) -> bool:
    """Whether `x` is a tensor without data, as Dynamo traces with."""
    return isinstance(x, FakeTensor)


def mark_dynamic(x: Tensor, dim: int) -> None:
    """Let Dynamo treat this size as dynamic from the first compilation on."""
    maybe_mark_dynamic(x, dim)


@contextmanager
def outside_inference_mode():
    """No gradients, and tensors that may be written in place later, inside inference mode and outside of it."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def is_erased(node: Node) -> bool:
    """Whether `node` was taken out of its graph."""
    return node._erased


def call_name(target: Any) -> str:
    """The name of what a call_function node calls; of an overload, its operator's."""
    return getattr(target, "_opname", None) or getattr(target, "__name__", str(target))


def set_field_source(node: Node, kv: Node, name: str) -> None:
    """Tell Dynamo where the placeholder `node` comes from: it is the attribute `name` of the `KVTensor` placeholder `kv`,
    or its length ("length")."""
    source = kv._dynamo_source
    length = TensorPropertySource(source, TensorProperty.SIZE, 2)
    node._dynamo_source = length if name == "length" else AttrSource(source, name)


def set_constant_source(node: Node) -> None:
    """Tell Dynamo that the placeholder `node` is no argument of the user's."""
    node._dynamo_source = ConstantSource(node.name)


def copy_source(source: Node, target: Node) -> None:
    """Give a placeholder's copy the place that Dynamo takes it from."""
    if hasattr(source, "_dynamo_source"):
        target._dynamo_source = source._dynamo_source


def wrapper_subclass(cls: type, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of class `cls` with this logical shape and no storage of its own."""
    return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)


def fake_constant(x: Tensor, like: Tensor) -> Tensor:
    """`x` without data, of fixed size, beside the fake tensor `like`."""
    return like.fake_mode.from_tensor(x, static_shapes=True)


def copy_module_attributes(source: GraphModule, target: GraphModule) -> None:
    """What AOTAutograd reads off Dynamo's graph module besides its graph."""
    for name in ("_param_name_to_source", "compile_subgraph_reason", "torchdynamo_force_dynamic"):
        if hasattr(source, name):
            setattr(target, name, getattr(source, name))


def inner_compiler(name: str | Callable, mode: str | None, options: dict[str, Any] | None) -> Callable:
    """What compiles the rewritten graph: `(module, example_inputs) -> callable`."""
    if callable(name):
        return name
    if name == "inductor":
        return torch._TorchCompileInductorWrapper(mode, options, None)
    return lookup_backend(name)


def count(**amounts: int) -> None:
    """Add to `torch._dynamo.utils.counters["minikv"]`."""
    counters["minikv"].update(amounts)


def new_size(like: Tensor, minimum: int) -> torch.SymInt:
    """A size that a custom op's fake implementation cannot know: `torch.library.get_ctx().new_dynamic_size`, also where
    Dynamo was not asked to capture ops of data-dependent shape (that is for the user's ops, not for ours).
    """
    shape_env = getattr(like, "fake_mode", None) and like.fake_mode.shape_env
    if shape_env is None:
        return torch.library.get_ctx().new_dynamic_size(min=minimum)
    size = shape_env.create_unbacked_symint()
    _constrain_range_for_size(size, min=minimum)
    return size
