"""Packed format of an export: bitmaps and kept values in the place of dense weights."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor

from leap_pl.base_model.stored_weights import BITMAP, SCALE, model_files
from leap_pl.errors import UserError
from leap_pl.sparse.folder import pack_folder, packed_weights
from leap_pl.sparse.packed_weight import WORD, PackedWeight

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from leap_pl.masks import MaskSet


def write_packed_model(
    base: "PreTrainedModel", masks: "MaskSet", folder: Path, *, int8: bool = False, force: bool = False
) -> dict[str, Any]:
    """Write ``base`` under ``masks`` into ``folder``, packed, and read it back.

    Args:
        base: Model with dense weights.
        masks: Weights to keep.
        folder: Folder to write.
        int8: Round the values of packed weights to int8.
        force: Pack the model even if that makes it larger.

    Returns:
        Facts for ``leap_pl.json``: data type of the values, bytes of the packed weights, also for each weight and
        for the dense weights.

    Raises:
        UserError: Packing makes the model larger, or is impossible, or what was written does not read back.
    """
    weights: dict[str, Tensor] = {name: weight.detach() for name, weight in base.named_parameters()}
    facts = _sizes(weights, masks, int8=int8)
    if facts["bytes"] >= facts["dense_bytes"] and not force:
        raise UserError(
            f"{masks.sparsity:.1%} of the weights of the decoder blocks are zero: packed they take "
            f"{facts['bytes']:,} bytes, and dense {facts['dense_bytes']:,}. Prune more of them, or add --force to pack "
            "the model nevertheless."
        )
    base.save_pretrained(folder, save_original_format=False)  # under the names of the model, which the masks have
    pack_folder(folder, masks, int8=int8)
    _verify(base, masks, folder, int8=int8)
    return facts


def _sizes(weights: dict[str, Tensor], masks: "MaskSet", *, int8: bool) -> dict[str, Any]:
    packed, dense, dtypes = 0, 0, set()
    for name, mask in masks.masks.items():
        rows, columns = mask.numel() // mask.shape[-1], mask.shape[-1]
        size = 1 if int8 else weights[name].element_size()
        packed += int(mask.sum()) * size + 4 * rows * (-(-columns // WORD) + int8)
        dense += weights[name].nbytes
        dtypes.add("int8" if int8 else str(weights[name].dtype).removeprefix("torch."))
    return {
        "values": ", ".join(sorted(dtypes)),
        "bytes": packed,
        "dense_bytes": dense,
        "bytes_per_weight": packed / masks.total,
        "dense_bytes_per_weight": dense / masks.total,
    }


def _verify(base: "PreTrainedModel", masks: "MaskSet", folder: Path, *, int8: bool) -> None:
    """Read the folder back, one weight at a time, and compare it with ``base`` and ``masks`` bit for bit.

    Raises:
        UserError: A tensor differs.
    """
    expected = base.state_dict()
    wrong, found = [], set()
    for name, packed in packed_weights(folder):
        found.add(name)
        if name not in masks.masks or not _is_packed(packed, expected[name], masks.masks[name], int8=int8):
            wrong.append(name)
    wrong += sorted(masks.masks.keys() - found)  # of a header that was lost
    parts = {f"{name}{suffix}" for name in masks.masks for suffix in ("", BITMAP, SCALE)}
    for file in model_files(folder):
        with safe_open(file, framework="pt") as opened:
            wrong += [
                name
                for name in opened.keys()  # noqa: SIM118  (no mapping)
                if name not in parts and not _same(opened.get_tensor(name), expected[name])
            ]
    if wrong:
        raise UserError(f"{wrong[0]} does not read back as it was written. Check the disk of {folder.parent}.")


def _is_packed(packed: PackedWeight, weight: Tensor, mask: Tensor, *, int8: bool) -> bool:
    if not torch.equal(packed.mask(), mask):
        return False
    if not int8:
        return _same(packed.unpack(weight.dtype), weight.masked_fill(~mask, 0))
    again = PackedWeight.pack(weight, mask, int8=True)
    return _same(packed.values, again.values) and _same(packed.unpack(), again.unpack())


def _same(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors have the same bits."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(*(each.contiguous().reshape(-1).view(torch.uint8) for each in (one, other)))
