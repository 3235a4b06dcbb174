"""Masks as bits, an eighth of the memory of bool tensors."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor


class PackedMasks(Mapping[str, Tensor]):
    """Mapping of masks stored as bits, an eighth of the memory of bool tensors; each access unpacks a mask."""

    def __init__(self, packed: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]) -> None:
        """Hold bits packed by :func:`pack`.

        Raises:
            ValueError: They are not packed bits, or do not fit their shapes.
        """
        for name, bits in packed.items():
            _check_packed(bits, shapes[name])
        self.packed, self.shapes = dict(packed), {name: tuple(shapes[name]) for name in packed}

    @classmethod
    def of(cls, masks: Iterable[tuple[str, Tensor]]) -> "PackedMasks":
        """Pack masks one at a time, as the iterable yields them."""
        packed, shapes = {}, {}
        for name, mask in masks:
            packed[name], shapes[name] = pack(mask), tuple(mask.shape)
        return cls(packed, shapes)

    def __getitem__(self, name: str) -> Tensor:
        """Return the bool mask of the weight ``name`` as a new tensor."""
        return unpack(self.packed[name], self.shapes[name])

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of the weights."""
        return iter(self.packed)

    def __len__(self) -> int:
        """Return the number of weights."""
        return len(self.packed)


def pack(mask: Tensor) -> Tensor:
    """Pack a bool mask into bits: uint8, flat, the first element in the lowest bit of the first byte."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy().reshape(-1), bitorder="little"))


def unpack(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """Unpack the bits made by :func:`pack` into a bool mask of ``shape``.

    Raises:
        ValueError: They are not packed bits, or do not fit ``shape``.
    """
    count = _check_packed(packed, shape)
    bits = np.unpackbits(packed.numpy(), count=count, bitorder="little")
    return torch.from_numpy(bits.view(np.bool_)).view(tuple(shape))


def count(packed: Tensor, shape: Sequence[int]) -> int:
    """Return the number of kept weights of a mask of ``shape`` that :func:`pack` packed.

    Raises:
        ValueError: They are not packed bits, or do not fit ``shape``.
    """
    total = _check_packed(packed, shape)
    counts = np.bitwise_count(packed.numpy())
    beyond = total % 8  # elements in the last byte, if it is not full; whatever its other bits are
    last = 0 if not beyond else int(counts[-1]) - (int(packed[-1]) & ((1 << beyond) - 1)).bit_count()
    return int(counts.sum(dtype=np.int64)) - last


def _check_packed(packed: Tensor, shape: Sequence[int]) -> int:
    """Return the number of elements of a packed mask; raise a ValueError if it is not packed bits of ``shape``."""
    if packed.dtype != torch.uint8 or packed.ndim != 1 or not all(isinstance(n, int) and n > 0 for n in shape):
        raise ValueError("a mask is not packed bits")
    count = math.prod(shape)
    if packed.numel() != (count + 7) // 8:
        raise ValueError("a mask has another length than its shape")
    return count
