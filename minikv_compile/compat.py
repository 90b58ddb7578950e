"""The one module that touches private names of torch, for torch 2.11 to 2.13."""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from types import SimpleNamespace
from typing import Any

import sympy
import torch
import torch._dynamo
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor
from torch._dynamo import lookup_backend
from torch._dynamo.guards import GuardBuilder, install_guard
from torch._dynamo.source import (
    AttrSource,
    ConstantSource,
    LocalSource,
    SubclassAttrListSource,
    TensorProperty,
    TensorPropertySource,
)  # fmt: skip
from torch._dynamo.symbolic_convert import tls
from torch._dynamo.utils import counters
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import _constrain_range_for_size
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

INT32 = 2**31 - 1
"""The most elements of a tensor whose places a kernel can count in 32 bits."""

disabled_torch_function = torch._C._disabled_torch_function_impl
"""For `__torch_function__`: rules live in `__torch_dispatch__` alone, so that Dynamo sees an ordinary tensor."""


def allow_graphs(count: int) -> None:
    """Let a forward be compiled for so many kinds of inputs: past Dynamo's limit (8) it would run uncompressed."""
    config = torch._dynamo.config
    for name, limit in (("recompile_limit", count), ("accumulated_recompile_limit", 4 * count)):
        entry = config._config[name]
        entry.default = max(entry.default, limit)  # what is set is of this thread alone, and others may run the model, too
        if getattr(config, name) < limit:
            setattr(config, name, limit)


def assert_on_device(condition: Tensor, message: str) -> None:
    """Raise where `condition` is false, without waiting for the device. torch takes fewer than 255 characters."""
    torch._assert_async(condition, message[:250])


def is_fake(x: Tensor) -> bool:
    """Whether `x` is a tensor without data, as Dynamo traces with."""
    return isinstance(x, FakeTensor)


def mark_dynamic(x: Tensor, dim: int) -> None:
    """Let Dynamo treat this size as dynamic from the first compilation on: `torch._dynamo.maybe_mark_dynamic` without the tensors
    inside a subclass, which takes 20 us, and without the flag by which a guard of torch 2.13 looks for marks of other kinds."""
    if is_marked(x):
        x._dynamo_weak_dynamic_indices.add(dim)
    else:
        x._dynamo_weak_dynamic_indices = {dim}


def is_marked(x: Tensor) -> bool:
    """Whether a size of `x` was marked as dynamic."""
    return "_dynamo_weak_dynamic_indices" in x.__dict__


def mark_static(x: Tensor) -> None:
    """Tell Dynamo that the address of `x` stays, so that CUDA graphs may write into it, and that its sizes do: after another
    cache's, it would take them for dynamic."""
    torch._dynamo.mark_static_address(x)
    torch._dynamo.mark_static(x)


def settled(x: Any) -> Any:
    """A graph's input as what is compiled from the graph will name it. A size that a guard has found equal to another
    one goes by the other one's symbol from then on, but Inductor names an input by the symbol that it began with: where
    the other one is no input of the graph, the generated code would use a name that it does not define."""
    if not isinstance(x, torch.SymInt) or x.node._expr == x.node.expr:
        return x
    return x.node.shape_env.create_symintnode(x.node.expr, hint=x.node.hint)


def changing(x: Tensor) -> tuple[bool, bool]:
    """Whether sizes of a fake tensor may change from call to call; and whether its strides may, by more than its sizes say."""
    sizes, strides = ({n.node.expr for n in numbers if isinstance(n, torch.SymInt)} for numbers in (x.shape, x.stride()))
    in_sizes, in_strides = (set().union(*(each.free_symbols for each in found)) for found in (sizes, strides))
    return bool(in_sizes), bool(in_strides - sizes)


def is_wrapper(x: Any) -> bool:
    """Whether `x` is a tensor made of others, which has no address."""
    return is_traceable_wrapper_subclass(x)


def storages_of(value: Any) -> set[int]:
    """What tensors, also fake ones, have in common that lie in the same memory: of those in `value`."""
    strided = (x for x in tree_leaves(value) if isinstance(x, Tensor) and not is_wrapper(x) and x.layout is torch.strided)
    return {_without_vmap(x).untyped_storage()._cdata for x in strided}


def _without_vmap(x: Tensor) -> Tensor:
    """What `torch.func` has wrapped, which has a storage."""
    while is_functorch_wrapped_tensor(x):
        x = get_unwrapped(x)
    return x


def is_higher_order(target: Any) -> bool:
    return isinstance(target, torch._ops.HigherOrderOperator)


def subgraph_of(node: Node) -> Graph | None:
    """The graph that a higher-order operator takes as its argument `node`; None if that is something else."""
    module = getattr(node.graph.owning_module, str(node.target), None) if node.op == "get_attr" else None
    return module.graph if isinstance(module, GraphModule) else None


def mutable_arguments(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """Those of a call's arguments that it is registered to write into; of a name that stands for several operators, those of each,
    but for its variants with `out=`."""
    operators = [target] if isinstance(target, torch._ops.OpOverload) else []
    if isinstance(target, torch._ops.OpOverloadPacket):
        operators = [getattr(target, name) for name in target.overloads() if "out" not in name]
    return [
        args[i] if i < len(args) else kwargs.get(argument.name)
        for each in operators for i, argument in enumerate(each._schema.arguments) if argument.is_write
    ]  # fmt: skip


def static_size(size: Any) -> int | None:
    """`size` where it is the same for all inputs that a graph takes, also one that Dynamo has learnt to be since."""
    return size if isinstance(size, int) else size.node.maybe_as_int()


def hint(size: Any) -> int:
    """What a size was when the graph was captured."""
    return size.node.hint if isinstance(size, torch.SymInt) else size


def copy_all(targets: list[Tensor], sources: list[Tensor]) -> None:
    """`copy_` of each, in one launch."""
    torch._foreach_copy_(targets, sources)


def abandon_capture(graph: torch.cuda.CUDAGraph, device: torch.device) -> None:
    """End a capture in which something failed, on its stream. Where CUDA says so, `capture_end` of torch before 2.12 leaves the
    allocator in the pool of the graph, so that the next `empty_cache` fails, and random numbers in a capture, so that the next
    one fails: until a capture has ended well."""

    def end_another() -> None:
        another, spare = torch.cuda.CUDAGraph(), []
        with suppress(Exception):  # now: not every allocator can in a capture
            spare.append(torch.empty(1, device=device))
        another.capture_begin(capture_error_mode="thread_local")
        try:
            for x in spare:  # torch warns of an empty graph
                x.zero_()
        finally:
            another.capture_end()

    for end in (
        graph.capture_end, lambda: torch._C._cuda_endAllocateToPool(device.index or 0, graph.pool()), end_another,
    ):  # fmt: skip
        with suppress(Exception):  # the first error is the one to tell
            end()


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
    """Tell Dynamo where the placeholder `node` comes from: it is the attribute `name` of the `KVTensor` placeholder
    `kv`, or its length ("length")."""
    source = kv._dynamo_source
    length = TensorPropertySource(source, TensorProperty.SIZE, kv.meta["example_value"].seq)
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


def fake_mode(like: Tensor) -> Any:
    """The context in which new tensors have no data, beside the fake tensor `like`."""
    return getattr(like, "marker", like).fake_mode


def is_attribute(node: Node) -> bool:
    """Whether Dynamo takes a placeholder from an attribute of something, not from a local variable or an argument. The
    name of a source is text, or gives it when called."""
    name = getattr(node, "_dynamo_source", None) and node._dynamo_source.name
    return "." in (name() if callable(name) else name or "")


def owner_of(node: Node | None) -> Any:
    """The object whose attribute a placeholder is, in the frame that Dynamo is tracing; None if that is not known."""
    base = getattr(getattr(node, "_dynamo_source", None), "base", None)
    frame = getattr(tls, "current_tx", None)
    if base is None or frame is None:
        return None
    name, output = base.name() if callable(base.name) else base.name, frame.output
    try:  # a source is the text of an expression, as guards evaluate it
        return eval(name, {"L": output.local_scope, "G": output.global_scope})
    except Exception:  # of something that only guards know
        return None


def compiled_call() -> tuple[torch.nn.Module | None, bool]:
    """The module whose compiled call is running, if it is one, the outermost; and whether what Dynamo is tracing is this call
    from its beginning, not what is left of it behind a graph break, or a call inside of it."""
    frame, root, is_whole, inside = sys._getframe(), None, True, False
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name == "torch._dynamo.convert_frame":  # behind it are the frames that run; what is traced is not one yet
            inside = False
        elif name == "torch._dynamo.eval_frame" and frame.f_code.co_name == "compile_wrapper":
            root, is_whole = getattr(frame.f_locals.get("fn"), "__self__", None), not inside
        elif not name.startswith("torch."):
            inside = True
        frame = frame.f_back
    return (root if isinstance(root, torch.nn.Module) else None), is_whole


def traced_module() -> torch.nn.Module | None:
    """The module whose method Dynamo is tracing, from its beginning or from behind a graph break."""
    frame = getattr(tls, "current_tx", None)
    module = frame.output.local_scope.get("self") if frame is not None else None
    return module if isinstance(module, torch.nn.Module) else None


def only_for(node: Node | None = None) -> None:
    """Let the graph that is compiled now be used only where the object behind a placeholder, or that of `traced_module`, is
    the one that it is now: Dynamo takes the graph of one module for another one whose shapes are alike."""
    source = LocalSource("self", is_input=True) if node is None else node._dynamo_source
    install_guard(source.make_guard(GuardBuilder.ID_MATCH))


def leave_unguarded(nodes: Iterable[Node]) -> None:
    """Take back what Dynamo guards on of the tensors inside the `KVTensor`s of these placeholders, where their outer sizes and
    their contexts say as much: in a step of 32 layers there are 448, and they took a fifth of the host's time. After all else
    that compiles the graph: guards of its own count. (Where attention is in the graph, on a CPU, it asks about all of them.)"""
    context = TracingContext.try_get()
    if context is None:
        return
    shape_env, sources, said = context.fake_mode.shape_env, set(), set()
    known = {
        node: {fits for x in node.meta["example_value"].tensors().values() for fits in _fits_int32(x)}
        for node in nodes if node.meta["example_value"].context["regular"]
    }  # fmt: skip
    of_all = set().union(*known.values())
    asked = set().union(*(guard.expr.free_symbols for guard in shape_env.guards if guard.expr not in of_all))
    for node, mine in known.items():
        kv, source = node.meta["example_value"], node._dynamo_source
        if _is_free(kv, asked):
            sources |= {AttrSource(source, name) for name in kv.tensors()} | {SubclassAttrListSource(source)}
            said |= mine
            kv.hide()
    guards = context.guards_context.dynamo_guards
    kept = type(guards.inner)(guard for guard in guards.inner if guard.originating_source not in sources)
    context.guards_context.dynamo_guards = type(guards)(kept)
    shape_env.guards[:] = [guard for guard in shape_env.guards if guard.expr not in said]
    shape_env.tracked_fakes[:] = [fake for fake in shape_env.tracked_fakes if fake.source not in sources]


def _is_free(kv: Tensor, asked: set[sympy.Symbol]) -> bool:
    """Whether a graph assumes nothing of the tensors inside a fake `KVTensor` that its context does not say: sizes that grow have
    symbols that no other guard has `asked` about, batches are the outer one or such, too, and the others are constant."""
    growing, batches, others = kv.sizes_inside()
    own = [size for size in batches if _symbols(size) != _symbols(kv.shape[0])]
    return all(_symbols(size) and not _symbols(size) & asked for size in growing + own) and not any(map(_symbols, others))


def _fits_int32(x: Tensor) -> tuple[Any, ...]:
    """How Inductor's guard says that `x` has elements to count in 32 bits."""
    count = x.numel()
    elements = count.node.expr if isinstance(count, torch.SymInt) else sympy.Integer(count)
    return sympy.Le(elements, INT32), sympy.Lt(elements, INT32 + 1)


def _symbols(size: Any) -> set[sympy.Symbol]:
    """Of what a size was before a guard found it equal to something."""
    return size.node._expr.free_symbols if isinstance(size, torch.SymInt) else set()


def ends_in_break(module: GraphModule) -> bool:
    """Whether a graph ends because Dynamo could not trace what follows."""
    reason = getattr(module, "compile_subgraph_reason", None)
    return reason is not None and reason.graph_break


def become(x: Tensor, other: Tensor) -> None:
    """Turn the object `x` into what `other` is, for all who refer to it. (`torch.utils.swap_tensors` refuses where weak
    references exist, as Dynamo's guards have them; they refer to the object, which stays.)"""
    torch._C._swap_tensor_impl(x, other)
    x.__class__, other.__class__ = other.__class__, x.__class__
    x.__dict__, other.__dict__ = other.__dict__, x.__dict__


def version_of(x: Tensor) -> int | None:
    """How often `x` was written to; None where torch does not count, under inference mode."""
    return None if x.is_inference() else x._version


def copy_module_attributes(source: GraphModule, target: GraphModule) -> None:
    """What AOTAutograd reads off Dynamo's graph module besides its graph."""
    for name in ("_param_name_to_source", "compile_subgraph_reason", "torchdynamo_force_dynamic"):
        if hasattr(source, name):
            setattr(target, name, getattr(source, name))


CONTRACTED = (
    {} if "TORCHINDUCTOR_CPP_ENABLE_FLOATING_POINT_CONTRACT_FLAG" in os.environ
    else {"cpp.enable_floating_point_contract_flag": "fast"}
)  # fmt: skip
"""Options of Inductor with which a CPU makes a product and its sum one instruction, as Triton does on a GPU: decode attention is
mostly these. What the user's environment says is left."""


def inner_compiler(name: str | Callable, mode: str | None, options: dict[str, Any] | None) -> Callable:
    """What compiles the rewritten graph: `(module, example_inputs) -> callable`."""
    if callable(name):
        return name
    if name == "inductor":
        return _with_templates(torch._TorchCompileInductorWrapper(mode, options, None))
    return lookup_backend(name)


def _with_templates(compiler: Callable) -> Callable:
    """`compiler`, Inductor, with our lowering, whose text its caches of compiled graphs do not know by themselves."""

    def compile(module: GraphModule, example_inputs: Sequence[Any]) -> Callable:
        from . import lowering  # it imports this module, and Inductor

        if not any(isinstance(x, Tensor) and x.device.type in lowering.DEVICES for x in example_inputs):
            return compiler(module, example_inputs)
        lowering.register()
        config = torch.compiler.config
        with config.patch(cache_key_tag=config.cache_key_tag + lowering.cache_tag()):
            return compiler(module, example_inputs)

    return compile


class _Storages(TorchDispatchMode):
    """Follows the storages that calls make until they are freed."""

    def __init__(self, held: Iterable[Any]):
        super().__init__()
        self.held = storages_of(list(held))
        self.alive: dict[int, int] = {}
        self.now = self.most = 0

    def __torch_dispatch__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self._add(x.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        name = storage._cdata
        if name in self.held or name in self.alive:
            return
        self.alive[name] = storage.nbytes()
        weakref.finalize(storage, self._drop, name)
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)

    def _drop(self, name: int) -> None:
        self.now -= self.alive.pop(name)


def most_memory(call: Callable, args: Sequence[Any], held: Iterable[Any]) -> int:
    """The most bytes of tensors alive at a time while `call(*args)` runs, on the meta device too, without those in the
    storages of `held`, which there were before."""
    storages = _Storages(held)
    with storages:
        call(*args)
    return storages.most


def expandable_segments() -> str:
    """Let CUDA's memory that is free in pieces serve larger tensors from now on, beside what PYTORCH_ALLOC_CONF asks for, which
    is read when torch is imported. Returns the settings as text."""
    names = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"
    asked = next((os.environ[name] for name in names if os.environ.get(name)), "")
    chosen = "expandable_segments" in asked or "backend" in asked  # another allocator has none
    settings = asked if chosen else ",".join(filter(None, (asked, "expandable_segments:True")))
    torch._C._accelerator_setAllocatorSettings(settings)
    return settings


def count(**amounts: int) -> None:
    """Add to `torch._dynamo.utils.counters["minikv"]`."""
    counters["minikv"].update(amounts)


def compiled_graphs() -> int:
    """Graphs that Dynamo has had compiled in this process."""
    return counters["stats"]["unique_graphs"]


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


# ---- Inductor, for `lowering`. Imported when the first graph is compiled: it takes a second.


@cache
def inductor() -> SimpleNamespace:
    """Modules and functions of Inductor."""
    from torch._inductor import config, ir, lowering, select_algorithm
    from torch._inductor.virtualized import V

    return SimpleNamespace(
        V=V, config=config, ir=ir, lowerings=lowering.lowerings, register_lowering=lowering.register_lowering,
        empty_strided=lowering.empty_strided, fallback=lowering.fallback_handler, FixedLayout=ir.FixedLayout,
        autotune=select_algorithm.autotune_select_algorithm,
    )  # fmt: skip


@cache
def template_class() -> type:
    """`TritonTemplate` whose source may also call `output()`, the pointer of the output where the kernel stores it by
    itself; `argument(i)`, int32 of `call_sizes[i]`, a size or not; `strides(name)`, all but the last."""
    from torch._inductor.select_algorithm import TritonTemplate, TritonTemplateKernel, texpr

    class Kernel(TritonTemplateKernel):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self._register_extra_template_env_fns(self.output, self.argument, self.strides)

        def output(self):
            return self.args.output(self.output_node.get_name())

        def argument(self, index):
            return f"tl.full([], {self.size_text(self.call_sizes[index])}, tl.int32)"

        def strides(self, name):
            *strides, _ = self.get_stride_and_maybe_freeze_layout(self.named_input_nodes[name])
            return ", ".join(map(self.size_text, strides))

        def size_text(self, size):
            # Not `rename_indexing`: it simplifies to any symbol that is known to be equal, also to one that is no input.
            size = sympy.sympify(size)
            names = {s: sympy.Symbol(str(self.args.size(s)), integer=True, nonnegative=True) for s in size.free_symbols}
            return texpr(size.xreplace(names))

    class Template(TritonTemplate):
        kernel_type = Kernel

    return Template


def symbolic_grid(grid: Callable) -> Any:
    """A grid that Inductor works out when it compiles, as far as it is constant."""
    from torch._inductor.select_algorithm import SymbolicGridFn

    return SymbolicGridFn(grid)


def select(name: str, choices: list, inputs: list, layout: Any, make: dict[int, Callable]) -> tuple[Any, Any]:
    """The node of the choice that Inductor measures as the fastest, and that choice. `make`: what makes the inputs to
    measure with, by place, where random ones will not do."""
    result = inductor().autotune(name, choices, inputs, layout, input_gen_fns=make)
    node = result[0] if isinstance(result, tuple) else result  # a pair from torch 2.12 on
    render = node.data.data.make_kernel_render
    return node, next(choice for choice in choices if choice.make_kernel_render is render)


def symbols_of(node: Any, sizes: Sequence[Any]) -> None:
    """Say that a template's kernel takes these sizes, which are not those of its inputs."""
    buffer = node.data.data
    buffer.subgraph_inps, buffer.subgraph_outs = [s for s in sizes if isinstance(s, sympy.Expr)], []


def measures() -> bool:
    """Whether Inductor is to measure configurations."""
    return inductor().config.max_autotune or inductor().config.max_autotune_gemm


def is_known(size: Any) -> bool:
    """Whether `size` is the same for all inputs that a graph takes."""
    return isinstance(size, (int, sympy.Integer))


def is_contiguous(x: Any) -> bool:
    """Whether the node `x` of a graph being lowered is contiguous for all inputs."""
    sizes = inductor().V.graph.sizevars
    strides = inductor().ir.FlexibleLayout.contiguous_strides(x.get_size())
    return all(sizes.statically_known_equals(a, b) for a, b in zip(x.get_stride(), strides, strict=True))


def size_hint(size: Any) -> int:
    """What `size` is for the inputs that a graph is compiled with."""
    return int(inductor().V.graph.sizevars.optimization_hint(size))


def realized(x: Any, unit_last: bool = True) -> Any:
    """`x` in memory, in a layout that stays; a copy where its last dimension should be contiguous and is not."""
    ir = inductor().ir
    x = ir.ExternKernel.realize_input(x)
    if unit_last and not inductor().V.graph.sizevars.statically_known_equals(x.get_stride()[-1], 1):
        x = ir.ExternKernel.require_contiguous(x)
    if isinstance(x.get_layout(), ir.FlexibleLayout):
        x.freeze_layout()
    return x


def contiguous(x: Any) -> Any:
    """`x` in memory, contiguous."""
    ir = inductor().ir
    return ir.ExternKernel.require_contiguous(ir.ExternKernel.realize_input(x))


def viewed(x: Any, size: Sequence[int]) -> Any:
    """`x` as another size."""
    return inductor().lowerings[torch.ops.aten.view.default](x, list(size))


def in_memory(x: Any) -> Any:
    """`x` as it is, computed by a kernel of its own."""
    x.realize()
    return x


def constant(make: Callable[[], Tensor]) -> Any:
    """A constant of the graph that is being lowered."""
    with unset_fake_temporarily():
        return inductor().V.graph.add_tensor_constant(make())
