"""Safetensors file with packed weights: written one weight at a time, and checked before anything is computed from it.

A packed weight NAME is stored as NAME, its values; NAME_bitmap; and for int8 values NAME_scale. All other tensors are
stored as in any model. A reader that does not know the format finds NAME in another shape than the model has it, and
refuses the file.

The metadata of each file has, besides ``format: pt``,

==================  =====================================================================================
``packed_format``   ``leap_pl.packed``
``packed_version``  ``1``
``packed_layout``   the layout of :mod:`leap_pl.sparse.packed_weight` in a sentence, with the order of bits
``shapes``          JSON: name of a packed weight → its shape
``crc32``           JSON: name of a tensor of a packed weight → CRC-32 of its bytes, eight hexadecimal digits
``provenance``      JSON: the fields of :class:`leap_pl.masks.Provenance` of the mask
==================  =====================================================================================
"""

import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from leap_pl.base_model.stored_weights import BITMAP, SCALE
from leap_pl.errors import UserError
from leap_pl.files.tensor_file import DTYPE_NAMES, damage_in_one_line, tensor_bytes, write_tensors
from leap_pl.inputs.plain_values import MOST_BYTES, checked, parse_json, plain, shown
from leap_pl.inputs.reading import check_regular
from leap_pl.masks import MaskSet, Provenance
from leap_pl.masks.provenance_schema import parse_provenance, parse_shapes
from leap_pl.sparse.packed_weight import WORD, PackedWeight

FORMAT = "leap_pl.packed"
FORMAT_VERSION = 1
LAYOUT = (
    "NAME: values of the kept elements, row after row, by ascending column; NAME_bitmap: int32 (rows, words), bit j "
    "from the lowest of word k in row r keeps (r, 32 k + j); NAME_scale: float32 (rows,), factor of int8 values; "
    "columns are the last dimension, rows the others; little-endian"
)
_NO_SUM = "0" * 8  # until the tensor is written
_TYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}

REMEDY = "Export the model again, or use another copy of the file."


@dataclass(frozen=True)
class Stored:
    """Packed weight in a file, known by the file's header.

    Attributes:
        file: File that has all its tensors.
        shape: Shape of the weight.
        kept: Number of values.
        dtype: Data type of the values.
    """

    file: Path
    shape: tuple[int, ...]
    kept: int
    dtype: torch.dtype

    def parts(self, dtype: torch.dtype) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Return the data type and shape of each tensor by the suffix of its name; that of the values has none.

        Args:
            dtype: Data type of values that are not int8.
        """
        rows, words = prod(self.shape[:-1]), -(-self.shape[-1] // WORD)
        int8 = self.dtype == torch.int8
        parts = {"": (torch.int8 if int8 else dtype, (self.kept,)), BITMAP: (torch.int32, (rows, words))}
        return parts | ({SCALE: (torch.float32, (rows,))} if int8 else {})


# -- write --------------------------------------------------------------------------------------------------


def write_packed(source: Path, target: Path, masks: MaskSet, *, int8: bool) -> None:
    """Write the tensors of the safetensors file ``source`` into ``target``, those that ``masks`` has as packed weights.

    Needs memory for one weight.

    Args:
        source: File with dense weights under the names of the masks.
        target: File to write.
        masks: Weights to keep.
        int8: Round the values to int8.

    Raises:
        UserError: A weight cannot be packed.
    """
    with safe_open(source, framework="pt") as file:
        packed, plain_parts = {}, {}
        shapes = masks.shapes
        for name in file.keys():  # noqa: SIM118  (no mapping)
            view = file.get_slice(name)
            shape, dtype = tuple(view.get_shape()), _TYPES[view.get_dtype()]
            if shapes.get(name) == shape:
                stored = Stored(target, shape, int(masks.masks[name].sum()), torch.int8 if int8 else dtype)
                packed[name] = {f"{name}{suffix}": part for suffix, part in stored.parts(dtype).items()}
            else:
                plain_parts[name] = (dtype, shape)
        everything = {part: of for parts in (*packed.values(), plain_parts) for part, of in parts.items()}
        layout = dict(sorted(everything.items(), key=lambda part: (-part[1][0].itemsize, part[0])))  # all are aligned
        metadata = _metadata({name: list(shapes[name]) for name in packed}, masks.provenance)
        sums = {part: _NO_SUM for parts in packed.values() for part in parts}

        def tensors() -> Iterator[tuple[str, Tensor]]:
            for name in packed:
                for part, tensor in _packed_parts(name, file.get_tensor(name), masks.masks[name], int8=int8).items():
                    sums[part] = f"{zlib.crc32(tensor_bytes(tensor)):08x}"
                    yield part, tensor
            for name in plain_parts:
                yield name, file.get_tensor(name)

        write_tensors(target, layout, tensors(), lambda: {**metadata, "crc32": json.dumps(sums)})


def _packed_parts(name: str, weight: Tensor, mask: Tensor, *, int8: bool) -> dict[str, Tensor]:
    packed = PackedWeight.pack(weight, mask, int8=int8)
    parts = {"": packed.values, BITMAP: packed.bitmap, SCALE: packed.scale}
    return {f"{name}{suffix}": part for suffix, part in parts.items() if part is not None}


def _metadata(shapes: Mapping[str, list[int]], provenance: Provenance) -> dict[str, str]:
    return {
        "format": "pt",
        "packed_format": FORMAT,
        "packed_version": str(FORMAT_VERSION),
        "packed_layout": LAYOUT,
        "shapes": json.dumps(shapes),
        "provenance": json.dumps(plain(asdict(provenance))),
    }


# -- read ---------------------------------------------------------------------------------------------------


def read_headers(files: Iterable[Path]) -> tuple[dict[str, Stored], Provenance | None]:
    """Return the packed weights in ``files`` and the provenance of their mask; none and None if no weight is packed.

    Raises:
        UserError: A file is truncated or damaged, or of another version of the format.
    """
    found: dict[str, Stored] = {}
    provenance = None
    for file in files:
        check_regular(file, "base model")
        with damage_in_one_line(file, REMEDY), safe_open(file, framework="pt") as opened:
            metadata = _metadata_of(file, opened)
            if metadata is not None:
                found |= _packed_in(file, opened, metadata)
                provenance = Provenance(**parse_provenance(metadata["provenance"]))
    return found, provenance if found else None


def names_in(files: Iterable[Path]) -> set[str]:
    """Return the names of all tensors in ``files``.

    Raises:
        UserError: A file is truncated or damaged.
    """
    names: set[str] = set()
    for file in files:
        with damage_in_one_line(file, REMEDY), safe_open(file, framework="pt") as opened:
            names |= {*opened.keys()}
    return names


def _metadata_of(file: Path, opened: Any) -> dict[str, str] | None:
    metadata: dict[str, str] = opened.metadata() or {}
    if metadata.get("packed_format") != FORMAT:
        return None
    version = metadata.get("packed_version", "")
    if version != str(FORMAT_VERSION):
        raise UserError(
            f"{file} is packed in format version {shown(version, 20)}, and this leap_pl reads version "
            f"{FORMAT_VERSION}. Update leap_pl: pip install --upgrade leap_pl"
        )
    if any(len(text) > MOST_BYTES for text in metadata.values()):
        raise ValueError(f"its metadata is larger than {MOST_BYTES >> 20} MiB")
    return metadata


def _packed_in(file: Path, opened: Any, metadata: Mapping[str, str]) -> dict[str, Stored]:
    names = set(opened.keys())
    found = {}
    for name, shape in parse_shapes(metadata["shapes"]).items():
        if name not in names:
            raise ValueError(f"it lacks {shown(name)}")
        values = opened.get_slice(name)
        stored = Stored(file, tuple(shape), prod(values.get_shape()), _TYPES[values.get_dtype()])
        for suffix, (dtype, expected) in stored.parts(stored.dtype).items():
            part = opened.get_slice(f"{name}{suffix}")
            if (tuple(part.get_shape()), part.get_dtype()) != (expected, DTYPE_NAMES[dtype]):
                raise ValueError(f"{shown(name + suffix)} is {part.get_dtype()} {part.get_shape()}")
        found[name] = stored
    return found


def check_sums(file: Path) -> None:
    """Check the bytes of every tensor of a packed weight in ``file`` against the sums that were written with them.

    Raises:
        UserError: They differ, or the file is damaged in another way.
    """
    for _ in _tensors(file):
        pass


def read_weights(file: Path) -> Iterator[tuple[str, PackedWeight]]:
    """Yield the packed weights in ``file``, one at a time, each checked by its sums and :meth:`PackedWeight.of`.

    Raises:
        UserError: The file is damaged.
    """
    for name, shape, parts in _tensors(file):
        with damage_in_one_line(file, REMEDY):
            try:
                yield name, PackedWeight.of(parts[BITMAP], parts[""], parts.get(SCALE), shape)
            except UserError as error:
                raise ValueError(f"{shown(name)}: {error}") from error


def _tensors(file: Path) -> Iterator[tuple[str, tuple[int, ...], dict[str, Tensor]]]:
    """Yield name, shape and the tensors, by suffix, of each packed weight in ``file``, after checking their sums."""
    with damage_in_one_line(file, REMEDY), safe_open(file, framework="pt") as opened:
        metadata = _metadata_of(file, opened)
        if metadata is None:
            return
        sums = checked(dict[str, str], parse_json(metadata["crc32"]))
        for name, stored in _packed_in(file, opened, metadata).items():
            parts = {suffix: opened.get_tensor(f"{name}{suffix}") for suffix in stored.parts(stored.dtype)}
            for suffix, tensor in parts.items():
                if f"{zlib.crc32(tensor_bytes(tensor)):08x}" != sums[f"{name}{suffix}"]:
                    raise ValueError(f"{shown(name + suffix)} has other bytes than were written")
            yield name, stored.shape, parts
