"""Linear layer whose weight stays packed in memory."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leap_pl.sparse.packed_weight import PackedWeight


class PackedLinear(nn.Module):
    """Linear layer with a packed weight, in the place of an ``nn.Linear``.

    Attributes:
        in_features: Columns of the weight.
        out_features: Rows of the weight.
    """

    bitmap: Tensor
    values: Tensor
    scale: Tensor | None
    starts: Tensor

    def __init__(self, packed: PackedWeight, bias: Tensor | None = None) -> None:
        """Hold ``packed``, a weight of (out, in), and ``bias`` (out,), without a copy."""
        super().__init__()
        self.out_features, self.in_features = packed.shape
        self.register_buffer("bitmap", packed.bitmap)
        self.register_buffer("values", packed.values)
        self.register_buffer("scale", packed.scale)
        self.register_buffer("starts", packed.starts, persistent=False)
        self.bias = bias

    @property
    def packed(self) -> PackedWeight:
        """Return the weight."""
        shape = (self.out_features, self.in_features)
        return PackedWeight(self.bitmap, self.values, self.scale, shape, self.starts)

    @property
    def density(self) -> float:
        """Return the share of kept weights."""
        return self.packed.density

    def forward(self, input: Tensor) -> Tensor:
        """Return ``input`` (…, in) times the weight, plus the bias: (…, out)."""
        return F.linear(input, self.packed.unpack(input.dtype), self.bias)

    def extra_repr(self) -> str:
        """Return the sizes and the density."""
        return f"in_features={self.in_features}, out_features={self.out_features}, density={self.density:.3f}"


def worth_packing(rows: int, columns: int, density: float, dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether decoding with a packed weight of this shape is not slower than with a dense one."""
    return rows * columns >= 1 << 20
