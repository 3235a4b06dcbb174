"""Linear layer whose weight stays packed in memory."""

from collections.abc import Callable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leap_pl.sparse.building import has_kernels
from leap_pl.sparse.multiply import linear, unpack
from leap_pl.sparse.packed_weight import FLOATS, PackedWeight

DENSEST = 0.8  # density up to which packed weights are faster on every processor that has been measured
SMALLEST = 1 << 16  # elements of a weight likewise


class PackedLinear(nn.Module):
    """Linear layer with a packed weight, in the place of an ``nn.Linear``, for inference.

    Attributes:
        in_features: Columns of the weight.
        out_features: Rows of the weight.
    """

    bitmap: Tensor
    values: Tensor
    scale: Tensor | None
    starts: Tensor
    typed: Tensor  # of the type that the model computes in, which Module.to changes; it has no elements

    def __init__(self, packed: PackedWeight, bias: Tensor | None = None, *, dtype: torch.dtype | None = None) -> None:
        """Hold ``packed``, a weight of (out, in), and ``bias`` (out,), without a copy.

        Args:
            packed: Weight.
            bias: Bias; None: there is none.
            dtype: Data type of :attr:`weight`; None: that of the values, or of the scale of int8 values.
        """
        super().__init__()
        own = packed.values if packed.scale is None else packed.scale
        self.register_buffer("typed", own.new_empty(0, dtype=dtype), persistent=False)
        self.out_features, self.in_features = packed.shape
        self.register_buffer("bitmap", packed.bitmap)
        self.register_buffer("values", packed.values)
        self.register_buffer("scale", packed.scale)
        self.register_buffer("starts", packed.starts, persistent=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.register_load_state_dict_post_hook(_check)
        if self.values.device.type == "cpu" and has_kernels():
            for tensor in (self.bitmap, self.values):
                torch.ops.leap_pl.packed_large_pages(tensor)

    @property
    def packed(self) -> PackedWeight:
        """Return the weight."""
        shape = (self.out_features, self.in_features)
        return PackedWeight(self.bitmap, self.values, self.scale, shape, self.starts)

    @property
    def weight(self) -> Tensor:
        """Return the weight, dense: some models multiply by it themselves, or read its data type."""
        if self.typed.dtype not in FLOATS:  # which the compiled kernels have not
            return self.packed.unpack(self.typed.dtype)
        return unpack(self.bitmap, self.values, self.starts, self.scale, self.in_features, self.typed.dtype)

    @property
    def density(self) -> float:
        """Return the share of kept weights."""
        return self.packed.density

    def forward(self, input: Tensor) -> Tensor:
        """Return ``input`` (…, in) times the weight, plus the bias: (…, out)."""
        if self.typed.dtype not in FLOATS:
            return F.linear(input, self.weight, self.bias)
        return linear(input, self.bitmap, self.values, self.starts, self.scale, self.in_features, self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the layer, and convert the type that it computes in; scales of int8 values stay exact, in float32."""
        scale = self.scale
        super()._apply(fn, recurse)
        if scale is not None and self.scale is not None and self.scale.dtype != scale.dtype:
            self.scale = scale.to(self.scale.device)
        return self

    def extra_repr(self) -> str:
        """Return the sizes and the density."""
        return f"in_features={self.in_features}, out_features={self.out_features}, density={self.density:.3f}"


def _check(layer: PackedLinear, keys: Any) -> None:
    """Check the tensors of a state dict before a kernel reads them."""
    shape = (layer.out_features, layer.in_features)
    layer.starts = PackedWeight.of(layer.bitmap, layer.values, layer.scale, shape).starts


def worth_packing(rows: int, columns: int, density: float, dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether decoding with a packed weight is not slower than with a dense one, by what has been measured.

    With kernels for vectors (``python -m benchmarks.decode``), that is so for every shape and density in these bounds.
    No GPU has been measured.

    Args:
        rows: Rows of the weight.
        columns: Columns of the weight.
        density: Share of kept weights.
        dtype: Data type that the model computes in.
        device: Device that it runs on.
    """
    small_enough = density <= DENSEST and rows * columns >= SMALLEST
    on_cpu = dtype == torch.bfloat16 and device.type == "cpu"
    return small_enough and on_cpu and has_kernels() and torch.ops.leap_pl.packed_paths()[0] != "portable"
