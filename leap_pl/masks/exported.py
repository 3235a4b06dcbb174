"""Provenance in the record of a folder, or of a repository of the hub, that a sparse model was exported into."""

import os
from pathlib import Path
from typing import Any

from leap_pl.errors import UserError
from leap_pl.inputs import records
from leap_pl.inputs.hub import fetch_optional, is_hub_id
from leap_pl.inputs.paths import expanded
from leap_pl.inputs.plain_values import read_plain_json
from leap_pl.masks.mask_set import BEFORE, SPARSE_BASE, STAYED, TRAINED

# Keys by which one-shot pruning records its text.
OF_TEXT = (
    "text",
    "files",
    "text_column",
    "config_name",
    "split",
    "separator",
    "seed",
    "sequences",
    "seq_length",
    "bos",
)


def texts_of_weights(name: str | Path, *, revision: str | None = None) -> list[dict[str, Any]]:
    """Return the settings of the texts that an exported model's weights were trained on, from the last to the first.

    Args:
        name: Folder, or hub id, as of :func:`exported_record`.
        revision: Branch, tag or commit on the hub.

    Raises:
        UserError: If the record cannot be read.
    """
    fields, record = _read(name, revision)
    texts: list[dict[str, Any]] = []
    config = fields.get("config")
    updated = isinstance(record.get("updated_by"), str)
    if updated and isinstance(config, dict) and config.get("text") and "weight_update" not in config:
        # Made by the method that made the mask too, which records its text beside its settings.
        texts.append({key: config[key] for key in OF_TEXT if key in config})
    while isinstance(config, dict):
        found, training = [config.get("weight_update")], config.get(TRAINED)
        if isinstance(training, dict):
            before = training.get(BEFORE)
            found += [config.get("data"), *(before if isinstance(before, list) else ())]
        texts += [text for text in found if isinstance(text, dict) and text not in texts]
        # Only where training started from weights that were trained under the mask that stayed.
        goes_on = isinstance(training, dict) and (training.get("start") or config.get(SPARSE_BASE))
        config = stayed.get("config") if goes_on and isinstance(stayed := config.get(STAYED), dict) else None
    return texts


def exported_record(name: str | Path, *, revision: str | None = None) -> dict[str, Any]:
    """Return the provenance in an exported folder, with its ``mask_digest``; an empty dictionary for other models.

    Args:
        name: Folder; or, as a string that names no local path, ``USER/NAME`` of a model repository of the hub.
        revision: Branch, tag or commit on the hub.

    Raises:
        UserError: If the record cannot be read, or is no provenance.
    """
    fields, record = _read(name, revision)
    digest = record.get("mask_digest")
    return {**fields, "mask_digest": digest if isinstance(digest, str) else None} if fields else {}


def _read(name: str | Path, revision: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the fields of the provenance in the record of ``name``, and the whole record; both empty without any."""
    if isinstance(name, str) and is_hub_id(name):
        path = fetch_optional(name, records.RECORD, revision)
    else:
        path = expanded(name) / records.RECORD
    if path is None or not os.path.lexists(path):
        return {}, {}
    from leap_pl.masks.provenance_schema import provenance_fields  # asks for pydantic

    try:
        record = read_plain_json(path)
        known = isinstance(record, dict)
        if known and "provenance" not in record and records.KEY in record:
            return {}, {}  # a folder of another kind, whose record only names the command that wrote it
        fields = provenance_fields(record.get("provenance", record) if known else record)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{path} cannot be read ({reason}). Export the checkpoint again.") from error
    return fields, record
