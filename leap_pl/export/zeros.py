"""In-place zeroing of removed weights in the safetensors files of a model.

The files are first written with the dense weights, which stay memory-mapped from the base model's files, and then
changed in place, one weight at a time: exporting a model of any size needs memory for one weight.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from leap_pl.masks import MaskSet

_SIZES = {"F32": 4, "BF16": 2, "F16": 2}  # bytes an element


@dataclass(frozen=True)
class Place:
    """Location of a tensor: file, offset of its first byte, shape and dtype."""

    file: Path
    start: int
    shape: tuple[int, ...]
    dtype: str


def zero_removed(folder: Path, masks: "MaskSet") -> bool:
    """Set the weights that ``masks`` remove to zero in the model files of ``folder``.

    Returns:
        True; or False, with nothing changed, if the files store some weight under another name or in another shape
        than the model, as families that store experts one by one do.
    """
    places = places_in(folder)
    for name, shape in masks.shapes.items():
        place = places.get(name)
        if place is None or place.shape != shape or place.dtype not in _SIZES:
            return False
    for name, mask in masks.masks.items():
        place = places[name]
        bits = np.memmap(place.file, f"u{_SIZES[place.dtype]}", "r+", place.start, mask.numel())
        bits[~mask.reshape(-1).numpy()] = 0
        bits.flush()
    return True


def places_in(folder: Path) -> dict[str, Place]:
    """Return the location of every tensor in the safetensors files of ``folder``, by name."""
    found: dict[str, Place] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        with file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            header: Mapping[str, Any] = json.loads(opened.read(size))
        for name, entry in header.items():
            if name != "__metadata__":
                found[name] = Place(file, 8 + size + entry["data_offsets"][0], tuple(entry["shape"]), entry["dtype"])
    return found
