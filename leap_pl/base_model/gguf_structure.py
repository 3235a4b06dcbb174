"""The structure of a GGUF file, checked before a reader builds on it: every count, length and offset in it.

The format is that of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any

from leap_pl.base_model.stored_weights import StoredWeights
from leap_pl.errors import UserError
from leap_pl.inputs.reading import check_regular, open_regular

MOST_ITEMS = 1 << 22  # in all lists together: the reader keeps an object of its own for each; Gemma has 1.3 million
MOST_TENSORS = 1 << 16
MOST_KEYS = 1 << 12
MOST_STRING = 1 << 24  # bytes; a chat template has thousands
_MOST_DIMENSIONS = 4
_ALIGNMENT = 32

# Type of a value → how it is packed; strings and lists have lengths of their own.
_NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _LIST = 8, 9


@dataclass(frozen=True)
class GgufFile:
    """What a GGUF file says of itself.

    Attributes:
        told: Key → value; of a list only the kind of its items and their number: ``(kind, number)``.
        stored: The tensors, whose shapes are as PyTorch has them.
    """

    told: Mapping[str, Any]
    stored: StoredWeights


def read_structure(path: Path) -> GgufFile:
    """Read the structure of the GGUF file ``path``, and none of its weights.

    Raises:
        UserError: It is no regular file, no GGUF file of a version that is read, or damaged: something in it lies
            outside it, overlaps, comes twice, or is of no known kind.
    """
    size = check_regular(path, "base model")
    with open_regular(path, "base model") as file:
        try:
            return _Reader(file, size).read()
        except (_DamagedError, struct.error, UnicodeDecodeError, OSError) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"base model {path} could not be read: it is no intact GGUF file ({reason}). Check that the files are "
                "complete."
            ) from error


class _DamagedError(Exception):
    pass


class _Reader:
    def __init__(self, file: IO[bytes], size: int) -> None:
        self.file = file
        self.size = size
        self.at = 0
        self.items = 0

    def read(self) -> GgufFile:
        if self._bytes(4) != b"GGUF":
            raise _DamagedError("it does not begin with GGUF")
        version = self._number("<I")
        if version not in (2, 3):
            raise _DamagedError(f"its version is {version}, and 2 and 3 are read")
        tensors, keys = self._number("<Q"), self._number("<Q")
        if tensors > MOST_TENSORS or keys > MOST_KEYS:
            raise _DamagedError(f"it counts {tensors:,} tensors and {keys:,} keys")
        told: dict[str, Any] = {}
        for _ in range(keys):
            key = self._string()
            if key in told:
                raise _DamagedError(f"the key {key[:60]!r} comes twice")
            told[key] = self._value(self._number("<I"))
        alignment = told.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
            raise _DamagedError(f"its alignment is {alignment!r}")
        shapes: dict[str, tuple[int, ...]] = {}
        extents = []
        for _ in range(tensors):
            name, shape, kind, offset = self._tensor()
            if name in shapes:
                raise _DamagedError(f"the tensor {name[:60]!r} comes twice")
            if offset % alignment:
                raise _DamagedError(f"the tensor {name[:60]!r} is not aligned")
            shapes[name] = shape
            extents.append((offset, _length(name, shape, kind), name))
        self._check_extents(extents, -(-self.at // alignment) * alignment)
        return GgufFile(told, StoredWeights(shapes))

    def _check_extents(self, extents: list[tuple[int, int, str]], start: int) -> None:
        behind = 0
        for offset, length, name in sorted(extents):
            if offset < behind:
                raise _DamagedError(f"the tensor {name[:60]!r} overlaps another")
            behind = offset + length
            if start + behind > self.size:
                raise _DamagedError(f"the tensor {name[:60]!r} lies behind its end, or it was cut short")

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        dimensions = self._number("<I")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise _DamagedError(f"the tensor {name[:60]!r} has {dimensions} dimensions")
        shape = tuple(self._number("<Q") for _ in range(dimensions))
        if not all(1 <= size < 1 << 40 for size in shape) or prod(shape) >= 1 << 48:
            raise _DamagedError(f"the tensor {name[:60]!r} has the shape {shape}")
        return name, shape[::-1], self._number("<I"), self._number("<Q")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind in _NUMBERS:
            return self._number(_NUMBERS[kind])
        if kind != _LIST:
            raise _DamagedError(f"a value is of the unknown kind {kind}")
        of, number = self._number("<I"), self._number("<Q")
        self.items += number
        if self.items > MOST_ITEMS:
            raise _DamagedError(f"its lists have more than {MOST_ITEMS:,} items")
        if of == _STRING:
            for _ in range(number):
                self._string()
        elif of in _NUMBERS:
            self._skip(number * struct.calcsize(_NUMBERS[of]))
        else:
            raise _DamagedError(f"a list is of items of the kind {of}")
        return of, number

    def _string(self) -> str:
        length = self._number("<Q")
        if length > MOST_STRING:
            raise _DamagedError(f"a text in it has {length:,} bytes")
        return self._bytes(length).decode()

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._bytes(struct.calcsize(form)))[0]

    def _bytes(self, length: int) -> bytes:
        if self.at + length > self.size:
            raise _DamagedError("it ends before what it begins")
        read = self.file.read(length)
        if len(read) < length:
            raise _DamagedError("it became shorter while it was read")
        self.at += length
        return read

    def _skip(self, length: int) -> None:
        if self.at + length > self.size:
            raise _DamagedError("it ends before what it begins")
        self.at = self.file.seek(self.at + length)


def _length(name: str, shape: tuple[int, ...], kind: int) -> int:
    """Bytes of a tensor, from the sizes of the blocks that its type is quantised in."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except (ValueError, KeyError):
        raise _DamagedError(f"the tensor {name[:60]!r} is of the unknown type {kind}") from None
    if shape[-1] % block:
        raise _DamagedError(f"the tensor {name[:60]!r} has rows of {shape[-1]}, and its type has blocks of {block}")
    return prod(shape) // block * size
