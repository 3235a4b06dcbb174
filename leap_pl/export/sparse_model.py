"""Masks of a model that is sparse already: a packed folder, an export of leap_pl, or any model with exact zeros."""

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

UNKNOWN = "unknown"  # method of a mask that was found in a model


def masks_of(name: str, model: "PreTrainedModel", *, revision: str | None = None) -> MaskSet:
    """Return the mask of the sparse model ``name``.

    A packed folder and an export of leap_pl record theirs. Of another model, the weights of the decoder blocks that
    ``fit`` would gate are kept where they are not zero.

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
        record = {key: value for key, value in exported_record(folder).items() if key != "mask_digest"}
        if record:
            return MaskSet(found, Provenance(**record))
        made_by = Provenance(name, model_fingerprint(model), UNKNOWN, revision=revision, versions=installed_versions())
        return MaskSet(found, made_by)
    parameters = dict(model.named_parameters())
    shapes = {weight: tuple(parameter.shape) for weight, parameter in parameters.items()}
    wrong = [weight for weight, shape in masks.shapes.items() if shapes.get(weight) != shape]
    if not wrong:
        wrong = [weight for weight, mask in masks.masks.items() if bool(parameters[weight].detach()[~mask].any())]
    if wrong:
        raise UserError(
            f"{name} records a mask of {listing([shown(weight, 200) for weight in wrong], 3)} that is not the model's. "
            f"Remove {records.MASK} to pack what is not zero, or export the model again."
        )
    ordered = {weight: masks.masks[weight] for weight in parameters if weight in masks.shapes}
    return MaskSet(PackedMasks.of(ordered.items()), masks.provenance)


def recorded_facts(name: str, masks: MaskSet | None = None, *, revision: str | None = None) -> dict[str, Any]:
    """Return what the record of an exported model says of it and its mask does not: for the next record.

    Args:
        name: Hub id, folder or GGUF file of the model.
        masks: Its masks, for what is recorded of these.
        revision: Branch, tag or commit on the hub.

    Returns:
        ``perplexity``: text → figure; ``rounded_to``: data type that weights were rounded to; ``trained_in``: that of
        the training, if they were rounded after it; ``updated_by``: one-shot method that changed the kept weights;
        :data:`.ZEROS`: number of kept weights that are 0, before any rounding. Each only if recorded.
    """
    try:
        record = read_plain_json(local_folder(name, records.RECORD, revision=revision) / records.RECORD)
    except (OSError, ValueError):
        return {}
    if not isinstance(record, dict):
        return {}
    facts: dict[str, Any] = {}
    figures = record.get("perplexity")
    if isinstance(figures, dict) and all(map(_is_figure, figures.values())):
        facts["perplexity"] = figures
    if record.get("rounded_to") == "int8":
        facts["rounded_to"] = "int8"
    if record.get("trained_in") == "float32":
        facts["trained_in"] = "float32"
    zeros, of = record.get(records.ZEROS), record.get("mask_digest")
    if isinstance(zeros, int) and zeros >= 0 and masks is not None and of == masks.digest_of_bits():
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
