"""What weights the files of a base model hold: names, shapes and no values, read before anything is believed."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from leap_pl.errors import UserError, listing
from leap_pl.inputs.reading import MOST_DESCRIPTION, MOST_INDEX, check_regular, read_json

MOST_VOCABULARY = 1 << 28  # bytes of a tokenizer.json; those of the largest vocabularies have 35 million
_INDICES = re.compile(r"(?<=\.)\d{1,9}(?=\.)")
_SHORTEST_PACKED = 8  # weights in one stored number, where they are packed to 4 bits in 32


@dataclass(frozen=True)
class StoredWeights:
    """Shapes of the tensors that a base model's files hold.

    Attributes:
        shapes: Name of a tensor → its shape.
        packed: Whether several weights may share one stored number.
    """

    shapes: Mapping[str, tuple[int, ...]]
    packed: bool = False

    @property
    def largest_dimension(self) -> int:
        """The largest dimension of any tensor, of a causal language model its vocabulary as a rule."""
        return max((size for shape in self.shapes.values() for size in shape), default=0)

    @property
    def numbered(self) -> int:
        """How many parts the names count, decoder blocks as a rule: the highest number in a name, and one."""
        return max((int(index) + 1 for name in self.shapes for index in _INDICES.findall(name)), default=0)

    @property
    def elements(self) -> int:
        """The most weights that the files can hold."""
        return sum(map(prod, self.shapes.values())) * (_SHORTEST_PACKED if self.packed else 1)


def check_sizes(folder: Path) -> None:
    """Make sure that no description in a model folder is so long that to read it would fill the memory.

    Raises:
        UserError: One is.
    """
    for file in folder.glob("*.json"):
        if not file.is_file():
            continue
        most = MOST_INDEX
        if file.name in ("config.json", "generation_config.json"):
            most = MOST_DESCRIPTION
        elif file.name in ("tokenizer.json", "vocab.json"):
            most = MOST_VOCABULARY
        if check_regular(file) > most:
            raise UserError(f"{file} has more than {most:,} bytes, and such a file has far fewer. Fetch it again.")


def read_shapes(folder: Path) -> StoredWeights | None:
    """Read what the files of a model folder hold: safetensors, else PyTorch's own format; None where there is neither.

    Raises:
        UserError: An index is no index, names files outside the folder, or names one that is not there; or a file is
            damaged.
    """
    for single, index in (
        ("model.safetensors", "model.safetensors.index.json"),
        ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    ):
        files = [folder / single] if (folder / single).is_file() else []
        if not files and (folder / index).is_file():
            files = _indexed(folder, folder / index)
        if files:
            shapes: dict[str, tuple[int, ...]] = {}
            packed = False
            for file in files:
                packed |= _read(file, shapes)
            return StoredWeights(shapes, packed)
    return None


def _indexed(folder: Path, index: Path) -> list[Path]:
    told = read_json(index, most=MOST_INDEX)
    placed = told.get("weight_map") if isinstance(told, dict) else None
    if not isinstance(placed, dict) or not all(isinstance(name, str) for name in placed.values()):
        raise UserError(f"{index} is no index of weights (it has no weight_map of names). Fetch it again.")
    names = sorted(set(placed.values()))
    outside = [name for name in names if Path(name).name != name or name in ("", ".", "..")]
    if outside:
        raise UserError(f"{index} names a file outside its folder: {outside[0]!r}. Fetch the model again.")
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise UserError(f"{folder} lacks {listing(absent, 3)}, which {index.name} names. Fetch the model again.")
    return [folder / name for name in names]


def _read(file: Path, shapes: dict[str, tuple[int, ...]]) -> bool:
    """Add the shapes in ``file``; whether several weights may share one of its numbers."""
    packed = False
    if file.suffix == ".safetensors":
        check_regular(file, "base model")
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  (no mapping)
                    part = opened.get_slice(name)
                    shapes[name] = tuple(part.get_shape())
                    packed |= not str(part.get_dtype()).startswith(("F", "BF"))
        except (SafetensorError, OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"base model {file} could not be read: {reason} Check that the files are complete."
            ) from error
        return packed
    try:  # names and shapes alone: nothing is read into memory, and nothing in it is run
        tensors: Any = torch.load(file, map_location="meta", weights_only=True, mmap=True)
    except Exception:  # an older format, or a damaged file: of which the reader of the model tells
        return True
    if isinstance(tensors, dict):
        found = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, torch.Tensor)}
        shapes |= {str(name): tuple(tensor.shape) for name, tensor in found.items()}
        packed = any(not tensor.is_floating_point() for tensor in found.values())
    return packed


def told_by(folder: Path) -> dict[str, Any]:
    """Read the settings in a model folder's ``config.json``.

    Raises:
        UserError: It holds no JSON object.
    """
    told = read_json(folder / "config.json", most=MOST_DESCRIPTION, what="base model")
    if not isinstance(told, dict):
        raise UserError(
            f"base model {folder / 'config.json'} holds {json.dumps(told)[:40]} and no settings. Fetch the model again."
        )
    return told
