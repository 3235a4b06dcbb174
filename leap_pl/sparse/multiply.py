"""Operators of packed weights: product with a few rows of input, and unpacking.

They are operators of ``torch.ops.leap_pl``, so that torch.compile takes a packed model as one graph. On a CPU they run
compiled C++ (``decode.cpp``), on a GPU Triton (:mod:`leap_pl.kernels.gpu.packed`), elsewhere plain torch.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from leap_pl.kernels import gpu
from leap_pl.sparse.building import has_kernels
from leap_pl.sparse.packed_weight import PackedWeight

DECODE = 16  # rows of input that are multiplied packed; with more, the weight is unpacked first

torch.library.define(
    "leap_pl::packed_linear",
    "(Tensor input, Tensor bitmap, Tensor values, Tensor starts, Tensor? scale, Tensor? bias, int columns, "
    "str path='') -> Tensor",
)
torch.library.define(
    "leap_pl::packed_unpack",
    "(Tensor bitmap, Tensor values, Tensor starts, Tensor? scale, int columns, ScalarType dtype, str path='') "
    "-> Tensor",
)
torch.library.define("leap_pl::packed_large_pages", "(Tensor tensor) -> ()")
torch.library.define("leap_pl::packed_paths", "() -> str[]")


def linear(
    input: Tensor,
    bitmap: Tensor,
    values: Tensor,
    starts: Tensor,
    scale: Tensor | None,
    columns: int,
    bias: Tensor | None = None,
) -> Tensor:
    """Return ``input`` (..., columns) times the transposed packed weight, (..., rows), plus ``bias``.

    Args:
        input: Inputs.
        bitmap: Bitmap of the weight, int32 (rows, words).
        values: Kept values.
        starts: Index of each row's first value, which :meth:`PackedWeight.of` has checked.
        scale: Scale of each row, float32, of int8 values.
        columns: Columns of the weight.
        bias: Bias (rows).
    """
    if not torch.compiler.is_compiling() and values.device.type == "cpu":
        has_kernels()  # compiles them
    parts = (bitmap, values, starts, scale, columns)
    if torch.is_grad_enabled() and (input.requires_grad or (bias is not None and bias.requires_grad)):
        product: Tensor = _Product.apply(input, bias, *parts)
        return product
    return torch.ops.leap_pl.packed_linear(input, *parts[:-1], bias, columns)


class _Product(torch.autograd.Function):
    """The product with its gradient, which is that of the dense weight; the operator has none, to be called faster."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        bias: Tensor | None,
        bitmap: Tensor,
        values: Tensor,
        starts: Tensor,
        scale: Tensor | None,
        columns: int,
    ) -> Tensor:
        ctx.save_for_backward(bitmap, values, starts, scale)
        ctx.columns = columns
        return torch.ops.leap_pl.packed_linear(input, bitmap, values, starts, scale, bias, columns)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        of_input = of_bias = None
        if ctx.needs_input_grad[0]:
            bitmap, values, starts, scale = ctx.saved_tensors
            of_input = gradient @ unpack(bitmap, values, starts, scale, ctx.columns, gradient.dtype)
        if ctx.needs_input_grad[1]:
            of_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0)
        return of_input, of_bias, None, None, None, None, None


def unpack(
    bitmap: Tensor, values: Tensor, starts: Tensor, scale: Tensor | None, columns: int, dtype: torch.dtype
) -> Tensor:
    """Return the dense weight (rows, columns) in ``dtype``; arguments as in :func:`linear`."""
    if not torch.compiler.is_compiling() and values.device.type == "cpu":
        has_kernels()  # compiles them
    return torch.ops.leap_pl.packed_unpack(bitmap, values, starts, scale, columns, dtype)


def _unpack(
    bitmap: Tensor,
    values: Tensor,
    starts: Tensor,
    scale: Tensor | None,
    columns: int,
    dtype: torch.dtype,
    path: str = "",
) -> Tensor:
    if gpu.has_kernels(values.device):
        from leap_pl.kernels.gpu import packed

        return packed.unpack(bitmap, values, starts, scale, columns, dtype)
    return PackedWeight(bitmap, values, scale, (len(bitmap), columns), starts).unpack(dtype)


def _linear(
    input: Tensor,
    bitmap: Tensor,
    values: Tensor,
    starts: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    columns: int,
    path: str = "",
) -> Tensor:
    if 0 < input.numel() <= DECODE * columns and gpu.has_kernels(values.device):
        from leap_pl.kernels.gpu import packed

        return packed.linear(input, bitmap, values, starts, scale, bias, columns)
    return F.linear(input, _unpack(bitmap, values, starts, scale, columns, input.dtype), bias)


def _large_pages(tensor: Tensor) -> None: ...


def _shape_linear(input: Tensor, bitmap: Tensor, *_: Any) -> Tensor:
    return input.new_empty(*input.shape[:-1], bitmap.shape[0])


def _shape_unpack(
    bitmap: Tensor,
    values: Tensor,
    starts: Tensor,
    scale: Tensor | None,
    columns: int,
    dtype: torch.dtype,
    *_: Any,
) -> Tensor:
    return values.new_empty(bitmap.shape[0], columns, dtype=dtype)


for _name, _plain in (("linear", _linear), ("unpack", _unpack), ("large_pages", _large_pages)):
    torch.library.impl(f"leap_pl::packed_{_name}", "default", _plain)
torch.library.register_fake("leap_pl::packed_linear", _shape_linear)
torch.library.register_fake("leap_pl::packed_unpack", _shape_unpack)
