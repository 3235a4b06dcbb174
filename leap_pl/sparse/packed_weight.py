"""A sparse weight as a bitmap of its kept elements and their values, in row-major order.

A weight is seen as a matrix: its last dimension has the columns, all others together the rows. Bit j, counted from the
lowest, of word k in row r of the bitmap says that element (r, 32 k + j) is kept; the bits behind the last column are
zero. The values are those of the kept elements, row after row, each row by ascending column. The bitmap decides what is
kept, not the value: a kept element may be exactly zero.
"""

import math
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from leap_pl.errors import UserError

WORD = 32  # columns in a word of the bitmap
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_CHUNK = 1 << 20  # elements that are unpacked at once: the bits of one take 4 bytes while they are unpacked
_LARGEST = 127  # of an int8 value


@dataclass(frozen=True)
class PackedWeight:
    """Sparse weight of which only the kept elements are stored.

    Attributes:
        bitmap: Kept elements, int32 of (rows, words of 32 columns).
        values: Values of the kept elements, flat: bfloat16, float16 or float32; or int8, in units of ``scale``.
        scale: Factor of each row of int8 values, float32 of (rows,); None for other values.
        shape: Shape of the weight.
        starts: Index in ``values`` of the first element of each row, and their number: int64 of (rows + 1,).
    """

    bitmap: Tensor
    values: Tensor
    scale: Tensor | None
    shape: tuple[int, ...]
    starts: Tensor

    @classmethod
    @torch.no_grad()
    def pack(cls, weight: Tensor, mask: Tensor, *, int8: bool = False) -> Self:
        """Pack the elements of ``weight`` that ``mask`` keeps.

        Args:
            weight: Weight of one or more dimensions, in bfloat16, float16 or float32.
            mask: Bool tensor of the same shape; True: kept.
            int8: Round the values of each row to 255 levels: 127 is the largest magnitude among them. Without it
                :meth:`unpack` returns every kept bit.

        Raises:
            UserError: The weight has another data type, or a value that int8 cannot represent.
            ValueError: ``mask`` is not a bool tensor of the weight's shape.
        """
        if mask.dtype != torch.bool or mask.shape != weight.shape or weight.ndim == 0 or not weight.numel():
            raise ValueError(f"a mask of {mask.dtype}, {tuple(mask.shape)}, for a weight of {tuple(weight.shape)}")
        if weight.dtype not in FLOATS:
            raise UserError(f"a weight of {weight.dtype} cannot be packed; bfloat16, float16 and float32 can.")
        shape = tuple(weight.shape)
        mask_RC = mask.reshape(-1, shape[-1]).to(weight.device)
        values, scale, starts = weight.reshape(-1, shape[-1])[mask_RC], None, _starts(mask_RC.sum(1))
        if int8:
            values, scale = _round(values, starts)
        return cls(_bitmap(mask_RC), values, scale, shape, starts)

    @classmethod
    @torch.no_grad()
    def of(cls, bitmap: Tensor, values: Tensor, scale: Tensor | None, shape: tuple[int, ...]) -> Self:
        """Return the packed weight of these tensors after checking that they agree.

        Everything that reads a packed weight relies on it: no kernel looks beyond the end of ``values``.

        Raises:
            UserError: A tensor has a wrong type or shape, a bit behind the last column is set, or the bitmap keeps
                another number of elements than there are values.
        """
        rows, columns = math.prod(shape[:-1]), shape[-1]
        words = -(-columns // WORD)
        if bitmap.dtype != torch.int32 or bitmap.shape != (rows, words):
            raise UserError(
                f"the bitmap is {_described(bitmap)}, and a weight of {list(shape)} has one of int32 [{rows}, {words}]"
            )
        if values.ndim != 1 or values.dtype not in (*FLOATS, torch.int8):
            raise UserError(f"the values are {_described(values)}, not a list of numbers")
        if (values.dtype == torch.int8) != (scale is not None):
            raise UserError("int8 values have a scale, and no others")
        if scale is not None and (scale.shape != (rows,) or not scale.dtype.is_floating_point):
            raise UserError(f"the scale is {_described(scale)}, and there are {rows} rows")
        if scale is not None and not bool(torch.isfinite(scale).all()):
            raise UserError("the scale is not finite")
        if columns % WORD and bool((bitmap[:, -1] >> (columns % WORD)).any()):
            raise UserError(f"the bitmap keeps elements behind the last of {columns} columns")
        starts = _starts(_popcount(bitmap).sum(1))
        if int(starts[-1]) != len(values):
            raise UserError(f"the bitmap keeps {int(starts[-1]):,} elements, and there are {len(values):,} values")
        return cls(bitmap.contiguous(), values.contiguous(), scale, shape, starts)

    @property
    def density(self) -> float:
        """Return the share of kept elements."""
        return len(self.values) / math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Return the number of bytes of the stored tensors."""
        return sum(part.nbytes for part in (self.bitmap, self.values, self.scale) if part is not None)

    @torch.no_grad()
    def mask(self) -> Tensor:
        """Return the kept elements as a bool tensor of the weight's shape."""
        rows, columns = len(self.bitmap), self.shape[-1]
        mask_RC = torch.empty(rows, columns, dtype=torch.bool, device=self.bitmap.device)
        for chunk in self._chunks():
            mask_RC[chunk] = _bits(self.bitmap[chunk], columns)
        return mask_RC.view(self.shape)

    @torch.no_grad()
    def unpack(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the weight with zeros for all elements that are not kept.

        This is the definition of the format, on any device; it needs memory for the weight and one chunk of its rows.

        Args:
            dtype: Data type of the result; by default that of the values, or float32 for int8. In the type of the
                packed weight every kept bit is as it was packed.
        """
        if dtype is None:
            dtype = torch.float32 if self.scale is not None else self.values.dtype
        rows, columns = len(self.bitmap), self.shape[-1]
        weight_RC = torch.zeros(rows, columns, dtype=dtype, device=self.bitmap.device)
        for chunk in self._chunks():
            bounds = self.starts[chunk.start : chunk.stop + 1]
            values = self.values[int(bounds[0]) : int(bounds[-1])]
            if self.scale is not None:
                values = values.float() * torch.repeat_interleave(self.scale[chunk].float(), bounds.diff())
            weight_RC[chunk].masked_scatter_(_bits(self.bitmap[chunk], columns), values.to(dtype))
        return weight_RC.view(self.shape)

    def _chunks(self) -> list[slice]:
        rows = len(self.bitmap)
        step = max(1, _CHUNK // (self.bitmap.shape[1] * WORD))
        return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _bitmap(mask_RC: Tensor) -> Tensor:
    bytes_ = np.packbits(mask_RC.cpu().numpy(), axis=1, bitorder="little")
    padded = np.pad(bytes_, ((0, 0), (0, -bytes_.shape[1] % 4)))
    return torch.from_numpy(padded.view("<i4").astype(np.int32, copy=False)).to(mask_RC.device)


def _bits(bitmap: Tensor, columns: int) -> Tensor:
    """Return the bits of some rows as bool (rows, columns)."""
    places = torch.arange(WORD, dtype=torch.int32, device=bitmap.device)
    return (bitmap[:, :, None] >> places & 1).bool().view(len(bitmap), -1)[:, :columns]


def _popcount(words: Tensor) -> Tensor:
    """Return the number of bits set in each int32 word, by summing neighbouring fields of 1, 2, 4 … bits."""
    counts = words.long() & 0xFFFFFFFF
    for shift, fields in ((1, 0x55555555), (2, 0x33333333), (4, 0x0F0F0F0F), (8, 0x00FF00FF), (16, 0x0000FFFF)):
        counts = (counts & fields) + (counts >> shift & fields)
    return counts


def _starts(counts_R: Tensor) -> Tensor:
    return torch.nn.functional.pad(counts_R.cumsum(0), (1, 0))


def _round(values: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Return values rounded to int8, and the factor of each row."""
    counts = starts.diff()
    row = torch.repeat_interleave(torch.arange(len(counts), device=values.device), counts)
    exact = values.float()
    largest = torch.zeros(len(counts), device=values.device).scatter_reduce_(0, row, exact.abs(), "amax")
    if not bool(torch.isfinite(largest).all()):
        raise UserError("a weight has values that are infinite or NaN, which int8 cannot represent.")
    scale = largest / _LARGEST
    divisor = torch.where(scale > 0, scale, 1.0)
    return (exact / divisor[row]).round().clamp(-_LARGEST, _LARGEST).to(torch.int8), scale


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
