"""Read the names and shapes of the tensors in a base model's files, without values, to validate its settings."""

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from leap_pl.errors import UserError, listing, one_line
from leap_pl.inputs.reading import MOST_DESCRIPTION, MOST_INDEX, check_regular, read_json

PACKED_METHOD = "leap_pl"  # `quant_method` in the config of a model with packed weights (leap_pl.sparse)
BITMAP, SCALE = "_bitmap", "_scale"  # of the packed weight NAME are NAME_bitmap and NAME_scale
MOST_VOCABULARY = 1 << 28  # bytes of a tokenizer.json; those with the largest vocabularies have 35 million
# JSON files of a model's folder that are read by transformers or here.
_DESCRIBES = re.compile(
    r"(.*config|.*index|tokenizer.*|vocab|added_tokens|special_tokens_map|chat_template.*|leap_pl)\.json"
)
_INDICES = re.compile(r"(?<=\.)\d{1,9}(?=\.)")
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_SHORTEST_PACKED = 8  # weights in one stored number, for weights of 4 bits packed into 32
_WORD = 32  # weights in one number of a bitmap


@dataclass(frozen=True)
class StoredWeights:
    """Shapes of the tensors in a base model's files.

    Attributes:
        shapes: Name of a tensor → its shape.
        packed: Whether several weights may share one stored number.
        dtypes: Name of a tensor → its data type, of those in one that a model computes in.
    """

    shapes: Mapping[str, tuple[int, ...]]
    packed: bool = False
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype | None:
        """Return the data type of most of the elements; None if it is unknown, or not one that a model computes in."""
        elements: Counter[torch.dtype | None] = Counter()
        for name, shape in self.shapes.items():
            elements[self.dtypes.get(name)] += prod(shape)
        return elements.most_common(1)[0][0] if elements else None

    def rounded_in(self, parameters: Mapping[str, torch.Tensor], usual: torch.dtype, blocks: str) -> list[str]:
        """Return the names of the matrices that are not exact in a model, whose other data type rounds them.

        Args:
            parameters: Parameters of the model.
            usual: Data type of those of its decoder blocks that have other names in the files.
            blocks: Name of the decoder blocks. Of what else the model does not have, such as parts that see, nothing
                is said.
        """
        rounded = []
        for name, stored in self.dtypes.items():
            if name not in parameters and not name.startswith(f"{blocks}."):
                continue
            loaded = parameters[name].dtype if name in parameters else usual
            if len(self.shapes[name]) > 1 and torch.promote_types(stored, loaded) != loaded:
                rounded.append(name)
        return rounded

    @property
    def largest_dimension(self) -> int:
        """Return the largest dimension of any tensor, usually the vocabulary size."""
        return max((size for shape in self.shapes.values() for size in shape), default=0)

    @property
    def numbered(self) -> int:
        """Return the number of indexed parts, usually decoder blocks: the highest index in a tensor name plus one."""
        return max((int(index) + 1 for name in self.shapes for index in _INDICES.findall(name)), default=0)

    @property
    def elements(self) -> int:
        """Return the maximum number of weights that the files can contain."""
        return sum(map(prod, self.shapes.values())) * (_SHORTEST_PACKED if self.packed else 1)


def check_sizes(folder: Path) -> None:
    """Check that no JSON file that describes a model is so large that reading it would fill the memory.

    What else lies in its folder, such as the log of a training, is not read.

    Raises:
        UserError: A file is too large.
    """
    for file in folder.glob("*.json"):
        if not file.is_file() or not _DESCRIBES.fullmatch(file.name):
            continue
        most = MOST_INDEX
        if file.name in ("config.json", "generation_config.json"):
            most = MOST_DESCRIPTION
        elif file.name in ("tokenizer.json", "vocab.json"):
            most = MOST_VOCABULARY
        if check_regular(file) > most:
            raise UserError(f"{file} has more than {most:,} bytes, far more than such a file has. Fetch it again.")


def read_shapes(folder: Path) -> StoredWeights | None:
    """Read the tensor shapes in a model folder: from safetensors, else PyTorch's format; None if it has neither.

    Raises:
        UserError: An index is invalid, or names a file that is missing or outside the folder; or a file is damaged.
    """
    files = model_files(folder) or _files(folder, "pytorch_model.bin")
    if not files:
        return None
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, torch.dtype] = {}
    packed = False
    for file in files:
        packed |= _read(file, shapes, dtypes)
    return StoredWeights(shapes, packed, dtypes)


def model_files(folder: Path) -> list[Path]:
    """Return the safetensors files with the weights of a model folder, one or those of its index; [] without any.

    Raises:
        UserError: The index is invalid, or names a file that is missing or outside the folder.
    """
    return _files(folder, "model.safetensors")


def _files(folder: Path, single: str) -> list[Path]:
    if (folder / single).is_file():
        return [folder / single]
    index = folder / f"{single}.index.json"
    return _indexed(folder, index) if index.is_file() else []


def _indexed(folder: Path, index: Path) -> list[Path]:
    content = read_json(index, most=MOST_INDEX)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError(f"{index} is not an index of weights (it has no weight_map of names). Fetch it again.")
    names = sorted(set(weight_map.values()))
    outside = [name for name in names if Path(name).name != name or name in ("", ".", "..")]
    if outside:
        raise UserError(f"{index} names a file outside its folder: {outside[0]!r}. Fetch the model again.")
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise UserError(f"{folder} lacks {listing(absent, 3)}, which {index.name} names. Fetch the model again.")
    return [folder / name for name in names]


def _read(file: Path, shapes: dict[str, tuple[int, ...]], dtypes: dict[str, torch.dtype]) -> bool:
    """Add the shapes in ``file`` to ``shapes``, and data types that a model computes in to ``dtypes``.

    Returns:
        Whether several weights may share one stored number.
    """
    packed = False
    if file.suffix == ".safetensors":
        check_regular(file, "base model")
        try:
            with safe_open(file, framework="pt") as opened:
                names = opened.keys()
                bitmaps = {name for name in names if name.endswith(BITMAP)}
                scales = {f"{name.removesuffix(BITMAP)}{SCALE}" for name in bitmaps}
                for name in names:
                    part, bitmap = opened.get_slice(name), f"{name}{BITMAP}"
                    if bitmap in bitmaps:  # its values are a list; the bitmap has its shape
                        *rows, words = opened.get_slice(bitmap).get_shape() or (0,)
                        shapes[name] = (*rows, words * _WORD)
                    elif name not in bitmaps and name not in scales:
                        shapes[name] = tuple(part.get_shape())
                        packed |= not str(part.get_dtype()).startswith(("F", "BF"))
                        if str(part.get_dtype()) in _FLOATS:
                            dtypes[name] = _FLOATS[str(part.get_dtype())]
        except (SafetensorError, OSError, ValueError) as error:
            reason = one_line(error, 200)
            raise UserError(
                f"base model {file} could not be read: {reason} Check that the files are complete."
            ) from error
        return packed
    try:  # names and shapes only: no tensor is read into memory, and no code in the file is run
        tensors: Any = torch.load(file, map_location="meta", weights_only=True, mmap=True)
    except Exception:  # an older format, or a damaged file, which the reader of the model reports
        return True
    if isinstance(tensors, dict):
        found = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, torch.Tensor)}
        shapes |= {str(name): tuple(tensor.shape) for name, tensor in found.items()}
        packed = any(not tensor.is_floating_point() for tensor in found.values())
        dtypes |= {str(name): tensor.dtype for name, tensor in found.items() if tensor.dtype in _FLOATS.values()}
    return packed


def read_settings(folder: Path) -> dict[str, Any]:
    """Read the settings in a model folder's ``config.json``.

    Raises:
        UserError: It does not contain a JSON object.
    """
    settings = read_json(folder / "config.json", most=MOST_DESCRIPTION, what="base model")
    if not isinstance(settings, dict):
        raise UserError(
            f"base model {folder / 'config.json'} contains {json.dumps(settings)[:40]}, not settings. Fetch the model "
            "again."
        )
    return settings
