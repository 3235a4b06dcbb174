"""Hugging Face folder with packed weights: made of an ordinary one, recognized, and read back as a mask."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from leap_pl.base_model.stored_weights import PACKED_METHOD, model_files
from leap_pl.errors import UserError, listing
from leap_pl.inputs.paths import expanded
from leap_pl.inputs.plain_values import read_plain_json
from leap_pl.inputs.reading import MOST_DESCRIPTION
from leap_pl.inputs.register import note_input
from leap_pl.masks import MaskSet, PackedMasks
from leap_pl.sparse.packed_file import FORMAT, FORMAT_VERSION, Stored, read_headers, read_weights, write_packed
from leap_pl.sparse.packed_weight import PackedWeight

_INDEX = "model.safetensors.index.json"


def pack_folder(folder: Path, masks: MaskSet, *, int8: bool = False) -> None:
    """Pack the weights that ``masks`` covers in a Hugging Face folder, file by file in place.

    Needs memory for one weight, and disk space for one more file.

    Args:
        folder: Folder with safetensors files whose names of weights are those of the masks.
        masks: Weights to keep.
        int8: Round the values to int8.

    Raises:
        UserError: The files lack a weight of the masks, or one cannot be packed.
    """
    for file in model_files(folder):
        part = file.with_suffix(".part")
        write_packed(file, part, masks, int8=int8)
        part.replace(file)
    found, _ = read_headers(model_files(folder))
    absent = sorted(set(masks.masks) - set(found))
    if absent:
        raise UserError(
            f"the model is saved without {listing(absent, 3)} of the mask's shape, so it cannot be packed. "
            "Use --format huggingface."
        )
    _extend_index(folder / _INDEX, found)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = _settings(found)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _settings(found: dict[str, Stored]) -> dict[str, Any]:
    """Return the ``quantization_config`` of the folder's ``config.json``."""
    return {
        "quant_method": PACKED_METHOD,
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "values": ", ".join(sorted({str(stored.dtype).removeprefix("torch.") for stored in found.values()})),
        "needs": "pip install leap_pl, and import leap_pl before from_pretrained",
    }


def _extend_index(path: Path, found: dict[str, Stored]) -> None:
    """Add the tensors of packed weights to the index of a folder of several files."""
    if not path.is_file():
        return
    index = json.loads(path.read_text(encoding="utf-8"))
    for name, stored in found.items():
        index["weight_map"] |= {f"{name}{suffix}": stored.file.name for suffix in stored.parts(stored.dtype)}
    index["weight_map"] = dict(sorted(index["weight_map"].items()))
    index["metadata"]["total_size"] = sum(file.stat().st_size for file in model_files(path.parent))
    path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def is_packed(folder: str | Path) -> bool:
    """Return whether ``folder`` is a Hugging Face folder with packed weights, according to its ``config.json``."""
    try:
        config = read_plain_json(expanded(folder) / "config.json", MOST_DESCRIPTION)
    except (OSError, ValueError):
        return False
    given = config.get("quantization_config") if isinstance(config, dict) else None
    return isinstance(given, dict) and given.get("quant_method") == PACKED_METHOD


def has_int8(folder: str | Path) -> bool:
    """Return whether ``folder`` is packed, with values of int8; raises as :func:`read_headers` does."""
    if not is_packed(folder):
        return False
    found, _ = read_headers(model_files(expanded(folder)))
    return any(stored.dtype == torch.int8 for stored in found.values())


def packed_weights(folder: Path) -> Iterator[tuple[str, PackedWeight]]:
    """Yield the packed weights of ``folder``, one at a time; raises as :func:`read_weights` does."""
    for file in model_files(folder):
        yield from read_weights(file)


def read_masks(folder: str | Path) -> MaskSet:
    """Return the mask of a packed folder, from its bitmaps, with the provenance that its files record.

    Raises:
        UserError: The files are damaged, or none has packed weights.
    """
    folder = expanded(folder)
    note_input(folder)
    _, provenance = read_headers(model_files(folder))
    if provenance is None:
        raise UserError(f"{folder} has no packed weights, and its config.json says that it has. Export it again.")
    return MaskSet(PackedMasks.of((name, packed.mask()) for name, packed in packed_weights(folder)), provenance)
