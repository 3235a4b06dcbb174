"""Masks of a model that is sparse already: a packed folder, an export of leap_pl, or any model with exact zeros."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from leap_pl.base_model.weights import find_weights, model_fingerprint
from leap_pl.errors import UserError, listing
from leap_pl.inputs import records
from leap_pl.inputs.hub import local_folder
from leap_pl.inputs.plain_values import read_plain_json, shown
from leap_pl.masks import MaskSet, PackedMasks, Provenance
from leap_pl.masks.exported import exported_record
from leap_pl.masks.mask_set import installed_versions
from leap_pl.oneshot.methods import METHODS
from leap_pl.sparse.folder import is_packed, read_masks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROUNDED = 1e-3  # share of the weights that another data type may round to 0
UNKNOWN = "unknown"  # method of a mask that was found in a model


def masks_of(name: str, model: "PreTrainedModel", *, revision: str | None = None) -> MaskSet:
    """Return the mask of the sparse model ``name``.

    A packed folder and an export of leap_pl record theirs. Of another model, the weights of the decoder blocks that
    ``fit`` would gate are kept where they are not zero; so of one whose record is of another mask than these make.

    Args:
        name: Hub id, folder or GGUF file of the model.
        model: The same, loaded, with dense weights in memory.
        revision: Branch, tag or commit on the hub.

    Raises:
        UserError: The recorded mask is damaged, or is not that of the model.
    """
    folder = local_folder(name, records.MASK, records.RECORD, revision=revision)
    if is_packed(folder):
        masks = read_masks(folder)
    elif (folder / records.MASK).is_file():
        masks = MaskSet.load(folder / records.MASK)
    else:
        weights = find_weights(model, once=True)
        found = PackedMasks.of((name, weight.parameter != 0) for name, weight in weights.items())
        record = exported_record(folder)
        digest = record.pop("mask_digest", None)  # earlier versions recorded none
        made_by = Provenance(name, model_fingerprint(model), UNKNOWN, revision=revision, versions=installed_versions())
        read_off = MaskSet(found, made_by)
        as_recorded = digest is None or digest == read_off.digest_of_bits()
        whole = _record(folder)
        if whole.get(records.ZEROS):  # kept weights that are 0, which are read off as removed ones
            as_recorded |= _unrecorded_zeros(whole, model, list(weights)) == 0
        return MaskSet(found, Provenance(**record)) if record and as_recorded else read_off
    parameters = dict(model.named_parameters())
    shapes = {weight: tuple(parameter.shape) for weight, parameter in parameters.items()}
    wrong = [weight for weight, shape in masks.shapes.items() if shapes.get(weight) != shape] or _filled(model, masks)
    if not wrong and not is_packed(folder) and _pruned_again(folder, model, masks):
        raise UserError(
            f"{name} has more zeros than its {records.RECORD} records: it was pruned again. Remove {records.MASK} to "
            "pack what is not zero, or export the model again."
        )
    if wrong:
        raise UserError(
            f"{name} records a mask of {listing([shown(weight, 200) for weight in wrong], 3)} that is not the model's. "
            f"Remove {records.MASK} to pack what is not zero, or export the model again."
        )
    ordered = ((weight, masks.masks[weight]) for weight in parameters if weight in masks.shapes)  # unpacked in turn
    return MaskSet(PackedMasks.of(ordered), masks.provenance)


def _filled(model: "PreTrainedModel", masks: MaskSet) -> list[str]:
    """Return the weights of ``model`` of which ``masks`` remove an element that is not zero."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    alike = [name for name, shape in masks.shapes.items() if name in parameters and parameters[name].shape == shape]
    return [name for name in alike if bool(parameters[name][~masks.masks[name]].any())]


def _record(folder: Path) -> dict[str, Any]:
    """Return the whole record of an exported model; an empty one if it cannot be read."""
    try:
        record = read_plain_json(folder / records.RECORD)
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _unrecorded_zeros(record: dict[str, Any], model: "PreTrainedModel", names: list[str]) -> int | None:
    """Return how many more zeros the weights ``names`` of ``model`` have than its record says, removed and kept ones.

    None where it does not say, or where its weights were rounded, which makes zeros too.
    """
    counts = [count for key in ("removed", records.ZEROS) if isinstance(count := record.get(key), int)]
    if len(counts) < 2 or "rounded_to" in record:
        return None
    parameters = dict(model.named_parameters())
    return sum(int((parameters[name].detach() == 0).sum()) for name in names if name in parameters) - sum(counts)


def _pruned_again(folder: Path, model: "PreTrainedModel", masks: MaskSet) -> bool:
    """Return whether ``model`` has more zeros than its record says, and than another data type makes of it."""
    more = _unrecorded_zeros(_record(folder), model, list(masks.shapes))
    return more is not None and more > ROUNDED * masks.total


def is_as_recorded(name: str, model: "PreTrainedModel", *, revision: str | None = None) -> bool:
    """Return whether the zeros of an exported model are still those of the mask that its record is of.

    They are not if its weights were trained or pruned again, and saved into the folder. Of a packed model they cannot
    be others, and a record without a digest, of an earlier version, is taken as it is.

    Args:
        name: Hub id or folder of the model.
        model: The same, loaded.
        revision: Branch, tag or commit on the hub.

    Raises:
        UserError: The record or the mask is damaged.
    """
    folder = local_folder(name, records.MASK, records.RECORD, revision=revision)
    digest = exported_record(folder).get("mask_digest")
    if digest is None or is_packed(folder):
        return True
    if (folder / records.MASK).is_file():
        masks = MaskSet.load(folder / records.MASK)
        same = masks.digest_of_bits() == digest and not _filled(model, masks)
        return same and not _pruned_again(folder, model, masks)
    return masks_of(name, model, revision=revision).provenance.method != UNKNOWN


def recorded_facts(name: str, masks: MaskSet | None = None, *, revision: str | None = None) -> dict[str, Any]:
    """Return what the record of an exported model says of it and its mask does not: for the next record.

    Args:
        name: Hub id, folder or GGUF file of the model.
        masks: Its masks. Nothing is returned if the record is of others.
        revision: Branch, tag or commit on the hub.

    Returns:
        ``perplexity``: text → figure; ``rounded_to``: data type that weights were rounded to; ``trained_in``: that of
        the training, if they were rounded after it; ``mixed_dtypes``: whether weights stored in another data type than
        most were rounded to that; ``updated_by``: one-shot method that changed the kept weights;
        :data:`.ZEROS`: number of kept weights that are 0, before any rounding. Each only if recorded.
    """
    record = _record(local_folder(name, records.RECORD, revision=revision))
    of = record.get("mask_digest")
    if masks is not None and of is not None and of != masks.digest_of_bits():
        return {}
    facts: dict[str, Any] = {}
    figures = record.get("perplexity")
    if isinstance(figures, dict) and all(map(_is_figure, figures.values())):
        facts["perplexity"] = figures
    if record.get("rounded_to") == "int8":
        facts["rounded_to"] = "int8"
    if record.get("mixed_dtypes") is True:
        facts["mixed_dtypes"] = True
    if record.get("trained_in") == "float32":
        facts["trained_in"] = "float32"
    zeros = record.get(records.ZEROS)
    if isinstance(zeros, int) and zeros >= 0 and masks is not None and of is not None:
        facts[records.ZEROS] = zeros
    updated_by = _updated_by(record)
    if isinstance(updated_by, str) and updated_by in METHODS:
        facts["updated_by"] = updated_by
    return facts


def _updated_by(record: dict[str, Any]) -> Any:
    """Return the one-shot method that changed the kept weights of the model with this record; None if none did."""
    if "updated_by" in record or "removed" in record:
        return record.get("updated_by")
    # What prune wrote beside updated weights in earlier versions: provenance alone.
    made = record.get("provenance")
    config = made.get("config") if isinstance(made, dict) else None
    again = config.get("weight_update") if isinstance(config, dict) else None
    if isinstance(again, dict):
        return again.get("method")
    return made.get("method") if isinstance(made, dict) else None


def _is_figure(figure: Any) -> bool:
    keys = ("value", "seq_length", "stride")
    return (
        isinstance(figure, dict)
        and all(isinstance(figure.get(key), int | float) for key in keys)
        and isinstance(figure.get("dense", 0.0), int | float)
    )
