"""`PackedInt`: quantized tokens as a tensor subclass, in torchao's style."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only
from torchao.utils import TorchAOBaseTensor

from . import compat
from .kernels.packing import BLOCK, GroupAxis, Layout, dequantize, pack, quantize, to_dtype, unpack


class DenseOnUse(TorchAOBaseTensor):
    """A wrapper subclass of which any op without a rule of its own dequantizes its operands and runs."""

    __torch_function__ = compat.disabled_torch_function

    @classmethod
    @torch.compiler.disable  # a frame that runs eagerly after a graph break may come here
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            if any(isinstance(x, DenseOnUse) for x in tree_leaves(compat.mutable_arguments(func, args, kwargs))):
                raise cls._read_only(func)
            return cls._on_dense(func, args, kwargs)
        result = func.decompose(*args, **kwargs)  # inference mode passes on whole what other modes have taken apart
        if result is not NotImplemented:
            return result
        rule = cls._ATEN_OP_TABLE[cls].get(func)
        with compat.outside_inference_mode():  # a rule's new tensors: of inference mode, torch would refuse them as views
            result = NotImplemented if rule is None else rule(func, types, args, kwargs)
            return cls._on_dense(func, args, kwargs) if result is NotImplemented else result

    @staticmethod
    def _on_dense(func, args, kwargs):
        args, kwargs = tree_map_only(DenseOnUse, lambda t: t.as_operand(func), (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def _read_only(cls, func) -> RuntimeError:
        return RuntimeError(f"{func} would write into a {cls.__name__}, which is compressed: write into .dequantize().")

    def __setitem__(self, index, value):
        raise self._read_only("x[...] = value")

    def as_operand(self, func) -> Tensor:
        """What stands in for this tensor where `func` has no rule for it."""
        return self.dequantize()

    def dequantize(self) -> Tensor:
        raise NotImplementedError


class PackedInt(DenseOnUse):
    """Quantized `[batch, kv_heads, blocks * BLOCK, head_dim]`.

    Tensors:
        codes: int16 words of 16 / bits codes (`kernels.packing`), `[batch, kv_heads, blocks, ...]`.
        scale, zero: fp16, one per group: `value = code * scale + zero`; or uint8 (`kernels.packing`).
    Attributes:
        bits: 2, 4 or 8. group: values per scale and zero. axis: what a group lies along, "token" or "channel".
        order: of the words, "key" or "value". logical_dtype: dtype of the dequantized values.
    """

    tensor_data_names = ["codes", "scale", "zero"]
    tensor_attribute_names = ["bits", "group", "axis", "order", "logical_dtype"]

    def __new__(cls, codes, scale, zero, bits, group, axis, order, logical_dtype):
        batch, heads, blocks = codes.shape[:3]
        head_dim = codes.shape[-1] if order == "key" else codes.shape[-2]
        shape = (batch, heads, blocks * BLOCK, head_dim)
        return compat.wrapper_subclass(cls, shape, logical_dtype, codes.device)

    def __init__(
        self, codes: Tensor, scale: Tensor, zero: Tensor, bits: int, group: int, axis: GroupAxis, order: Layout,
        logical_dtype: torch.dtype,
    ):  # fmt: skip
        super().__init__()
        self.codes, self.scale, self.zero = codes, scale, zero
        self.bits, self.group, self.axis, self.order, self.logical_dtype = bits, group, axis, order, logical_dtype

    @classmethod
    def from_dense(
        cls, x: Tensor, bits: int, group: int, axis: GroupAxis, order: Layout, metadata_bits: int = 16
    ) -> PackedInt:
        """Quantize `x` [batch, kv_heads, tokens, head_dim], fp16, bf16 or fp32. `metadata_bits`: of a scale, and of a zero.

        Raises:
            ValueError: tokens are no multiple of BLOCK, `group` does not divide what it groups, or the dtype is wrong.
        """
        if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise ValueError(f"PackedInt takes float16, bfloat16 or float32, not {x.dtype}.")
        if x.dim() != 4 or x.shape[2] == 0 or x.shape[2] % BLOCK:
            raise ValueError(
                f"PackedInt takes [batch, kv_heads, tokens, head_dim] with a positive multiple of {BLOCK} tokens, not "
                f"{list(x.shape)}."
            )
        grouped = BLOCK if axis == "token" else x.shape[3]
        if grouped % group:
            raise ValueError(f"A group of {group} does not divide {grouped} {axis}s.")
        codes, scale, zero = quantize(x.unflatten(2, (-1, BLOCK)), bits, group, axis, metadata_bits=metadata_bits)
        return cls(pack(codes, bits, order), scale, zero, bits, group, axis, order, x.dtype)

    def dequantize(self) -> Tensor:
        """The values, in the logical dtype and shape."""
        codes = unpack(self.codes, self.bits, self.order)
        values = dequantize(codes, self.scale, self.zero, self.bits, self.group, self.axis).flatten(2, 3)
        return to_dtype(values, self.logical_dtype)

    def _apply_fn_to_data(self, fn) -> PackedInt:
        attributes = (getattr(self, name) for name in self.tensor_attribute_names)
        return type(self)(*(fn(getattr(self, name)) for name in self.tensor_data_names), *attributes)

    @property
    def nbytes_held(self) -> int:
        """Bytes of the real storages."""
        return sum(t.untyped_storage().nbytes() for t in (self.codes, self.scale, self.zero))

    def __repr__(self, *, tensor_contents=None) -> str:
        return (
            f"PackedInt(shape={list(self.shape)}, bits={self.bits}, group={self.group}, axis={self.axis!r}, "
            f"dtype={self.logical_dtype}, device={self.device})"
        )


@PackedInt.implements(torch.ops.aten._to_copy.default)
def _(func, types, args, kwargs):
    packed, dtype, device = args[0], kwargs.get("dtype"), kwargs.get("device")
    moved = packed._apply_fn_to_data(lambda t: t.to(device, copy=True))
    moved = PackedInt(*(getattr(moved, n) for n in PackedInt.tensor_data_names), packed.bits, packed.group, packed.axis,
                      packed.order, dtype or packed.dtype)  # fmt: skip
    return moved


torch.serialization.add_safe_globals([PackedInt])
