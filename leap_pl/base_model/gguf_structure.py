"""Validate the structure of a GGUF file before a reader relies on it: every count, length and offset in it.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
"""

import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any

from leap_pl.base_model.stored_weights import StoredWeights
from leap_pl.errors import UserError, one_line
from leap_pl.inputs.reading import check_regular, open_regular

MOST_ITEMS = 1 << 22  # in all lists together: the reader creates an object for each; Gemma has 1.3 million
MOST_TENSORS = 1 << 16
MOST_KEYS = 1 << 12
MOST_STRING = 1 << 24  # bytes; a chat template has thousands
_MOST_DIMENSIONS = 4
_ALIGNMENT = 32

# Type of a value → its struct format; strings and lists have a length prefix.
_NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _LIST = 8, 9
_PLAIN = {0: "float32", 1: "float16", 30: "bfloat16"}  # kinds of tensors that are not quantised


@dataclass(frozen=True)
class GgufFile:
    """Metadata and tensor shapes of a GGUF file.

    Attributes:
        metadata: Key → value; a list is represented by the kind and number of its items: ``(kind, number)``.
        stored: Tensors, with shapes in PyTorch's order.
        plain: Name of the floating-point type that most weights of decoder blocks are stored in; None if quantised.
    """

    metadata: Mapping[str, Any]
    stored: StoredWeights
    plain: str | None = None


def read_structure(path: Path) -> GgufFile:
    """Read the structure of the GGUF file ``path``, without its weights.

    Raises:
        UserError: ``path`` is not a regular file, not a GGUF file of a supported version, or damaged: something in it
            is out of bounds, overlaps, occurs twice, or is of an unknown kind.
    """
    size = check_regular(path, "base model")
    with open_regular(path, "base model") as file:
        try:
            return _Reader(file, size).read()
        except (_DamagedError, struct.error, UnicodeDecodeError, OSError) as error:
            reason = one_line(error)
            raise UserError(
                f"base model {path} could not be read: it is not a valid GGUF file ({reason}). Check that the files "
                "are complete."
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
            raise _DamagedError("it does not start with GGUF")
        version = self._number("<I")
        if version not in (2, 3):
            raise _DamagedError(f"its version is {version}; versions 2 and 3 are supported")
        tensors, keys = self._number("<Q"), self._number("<Q")
        if tensors > MOST_TENSORS or keys > MOST_KEYS:
            raise _DamagedError(f"it declares {tensors:,} tensors and {keys:,} keys")
        metadata: dict[str, Any] = {}
        for _ in range(keys):
            key = self._string()
            if key in metadata:
                raise _DamagedError(f"the key {key[:60]!r} occurs twice")
            metadata[key] = self._value(self._number("<I"))
        alignment = metadata.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
            raise _DamagedError(f"its alignment is {alignment!r}")
        shapes: dict[str, tuple[int, ...]] = {}
        extents = []
        weights: Counter[int] = Counter()  # by kind
        for _ in range(tensors):
            name, shape, kind, offset = self._tensor()
            if name in shapes:
                raise _DamagedError(f"the tensor {name[:60]!r} occurs twice")
            if offset % alignment:
                raise _DamagedError(f"the tensor {name[:60]!r} is not aligned")
            shapes[name] = shape
            if name.startswith("blk.") and len(shape) > 1:
                weights[kind] += prod(shape)
            extents.append((offset, _length(name, shape, kind), name))
        self._check_extents(extents, -(-self.at // alignment) * alignment)
        plain = [kind for kind, count in weights.items() if kind in _PLAIN and 2 * count > weights.total()]
        return GgufFile(metadata, StoredWeights(shapes), _PLAIN[plain[0]] if plain else None)

    def _check_extents(self, extents: list[tuple[int, int, str]], start: int) -> None:
        end = 0
        for offset, length, name in sorted(extents):
            if offset < end:
                raise _DamagedError(f"the tensor {name[:60]!r} overlaps another")
            end = offset + length
            if start + end > self.size:
                raise _DamagedError(f"the tensor {name[:60]!r} ends after the file, which may be truncated")

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
            raise _DamagedError(f"a value has the unknown kind {kind}")
        item_kind, number = self._number("<I"), self._number("<Q")
        self.items += number
        if self.items > MOST_ITEMS:
            raise _DamagedError(f"its lists have more than {MOST_ITEMS:,} items")
        if item_kind == _STRING:
            for _ in range(number):
                self._string()
        elif item_kind in _NUMBERS:
            self._skip(number * struct.calcsize(_NUMBERS[item_kind]))
        else:
            raise _DamagedError(f"a list has items of the unknown kind {item_kind}")
        return item_kind, number

    def _string(self) -> str:
        length = self._number("<Q")
        if length > MOST_STRING:
            raise _DamagedError(f"a string in it has {length:,} bytes")
        return self._bytes(length).decode()

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._bytes(struct.calcsize(form)))[0]

    def _bytes(self, length: int) -> bytes:
        if self.at + length > self.size:
            raise _DamagedError("it is truncated")
        read = self.file.read(length)
        if len(read) < length:
            raise _DamagedError("it became shorter while being read")
        self.at += length
        return read

    def _skip(self, length: int) -> None:
        if self.at + length > self.size:
            raise _DamagedError("it is truncated")
        self.at = self.file.seek(self.at + length)


def _length(name: str, shape: tuple[int, ...], kind: int) -> int:
    """Return the size of a tensor in bytes, from the block size of its quantisation type."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except (ValueError, KeyError):
        raise _DamagedError(f"the tensor {name[:60]!r} has the unknown type {kind}") from None
    if shape[-1] % block:
        raise _DamagedError(f"the tensor {name[:60]!r} has rows of {shape[-1]}, and its type has blocks of {block}")
    return prod(shape) // block * size
