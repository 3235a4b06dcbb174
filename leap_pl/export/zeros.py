"""Zeros for removed weights, written straight into the safetensors files of a model.

The files are first written with the dense model's weights, which stay mapped from the base model's own files, and
then changed in place, one weight after another: a model of any size is exported with one weight in memory.
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
    """Where a tensor lies: in which file, from which byte on, its shape and its type."""

    file: Path
    start: int
    shape: tuple[int, ...]
    dtype: str


def zero_removed(folder: Path, masks: "MaskSet") -> bool:
    """Set what ``masks`` remove to zero in the model files of ``folder``.

    Returns:
        False, and nothing is changed, where the files hold some weight under another name or in another shape
        than the model does, as families that store experts one by one.
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
    """Every tensor in the safetensors files of ``folder``, by name."""
    found: dict[str, Place] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        with file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            header: Mapping[str, Any] = json.loads(opened.read(size))
        for name, told in header.items():
            if name != "__metadata__":
                found[name] = Place(file, 8 + size + told["data_offsets"][0], tuple(told["shape"]), told["dtype"])
    return found
