"""Record of the files that leap_pl wrote into a folder: ``--force`` replaces these, and nothing else.

Every output folder has a ``leap_pl.json``, whose key ``folder`` has the format, the verb and the names of all files.
The same file has the facts of an export. A run of ``leap_pl fit`` keeps such a record in its checkpoint folder. A file
that is not in the record was not written by leap_pl.

Folders of earlier versions have no record. Recognized by their content are exported and pruned models, whose
``leap_pl.json`` has a ``provenance``, the files that ``prune`` writes around these, and the parts of a distributed
checkpoint.
"""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from leap_pl.inputs.paths import expanded
from leap_pl.inputs.reading import MOST_DESCRIPTION, read_json

MASK_FORMAT = "leap_pl.MaskSet"  # `format` in the metadata of a mask file
RECORD = "leap_pl.json"
ZEROS = "zeros_of_base_model_among_kept"  # in the record of an export: number of kept weights that are 0
MASK = "mask.safetensors"  # the mask of a folder
CHECKPOINTS = "checkpoints"  # folder of a run that has its checkpoints and, by default, its mask
WEIGHTS_FORMAT = "leap_pl.KeptWeights"  # `format` in the metadata of a file of trained weights
WEIGHTS = "weights.safetensors"  # the trained weights of a folder, beside the mask that they belong to
# Names of the files of a run → those of an earlier run's in the same folder.
EARLIER = {MASK: "mask-earlier.safetensors", WEIGHTS: "weights-earlier.safetensors"}
KEY = "folder"
FORMAT = "leap_pl.folder"
FORMAT_VERSION = 1

# Files that transformers writes for a model and its tokenizer, and those that an export adds.
_MODEL_FILES = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|chat_template"
    r"|preprocessor_config|processor_config|video_preprocessor_config)\.json|(model|pytorch_model)[\w.-]*\.(safetensors|bin|json)|merges\.txt"
    r"|vocab\.txt|[\w-]+\.model|chat_template\.jinja|additional_chat_templates/[\w.-]+\.jinja|[\w-]+\.py"
    r"|README\.md|mask\.safetensors|leap_pl\.json"
)
_PART_FILES = re.compile(r"meta\.pt|\.metadata|__\d+_\d+\.distcp")


def mask_in(path: str | Path) -> Path:
    """Return the MaskSet file of a folder: of an export, of ``prune``, or of a run, which has it with its checkpoints.

    Returns:
        ``path`` itself, with ``~`` expanded, if it is no folder or has no such file.
    """
    path = expanded(path)
    return next((file for file in (path / MASK, path / CHECKPOINTS / MASK) if file.is_file()), path)


def files_in(folder: Path) -> list[str]:
    """Return all files and symbolic links under ``folder`` as sorted paths relative to it."""
    found = []
    for place, folders, files in os.walk(folder):
        links = [name for name in folders if Path(place, name).is_symlink()]
        found += [Path(place, name).relative_to(folder).as_posix() for name in (*files, *links)]
    return sorted(found)


def write_record(folder: Path, verb: str | None) -> None:
    """Write the record of all files in ``folder``, before it is renamed; the same files give the same bytes."""
    path = folder / RECORD
    facts = _read(path) or {}
    facts[KEY] = _entry(verb, {*files_in(folder), RECORD})
    path.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def extended(folder: Path, verb: str, names: Iterable[str], *, job: str | None = None) -> str:
    """Return the text of the record of ``folder`` with ``names`` added and names of missing files removed.

    Args:
        folder: Folder that is written file by file.
        verb: Verb that writes it.
        names: Names of files that are about to be written.
        job: Name of the scheduler's job that runs the verb, if there is one.
    """
    facts = _read(folder / RECORD) or {}
    present = {name for name in _names(facts) or () if os.path.lexists(folder / name)}
    entry = _entry(verb, {*present, *names, RECORD}) | ({} if job is None else {"job": job})
    return json.dumps(facts | {KEY: entry}, indent=2) + "\n"


def recorded(folder: Path) -> set[str]:
    """Return the names in the record of ``folder``; the empty set without a record."""
    return set(_names(_read(folder / RECORD) or {}) or ())


def verb_of(folder: Path) -> str | None:
    """Return the verb that wrote ``folder``, or None if it has no record of it."""
    return _recorded_text(folder, "verb")


def job_of(folder: Path) -> str | None:
    """Return the job that wrote ``folder``, or None if it has no record of it."""
    return _recorded_text(folder, "job")


def strangers(folder: Path, verb: str | None) -> list[str]:
    """Return the files in ``folder`` that leap_pl did not write, according to its record or else its content.

    Args:
        folder: Folder to replace.
        verb: Command that would replace it. Only fit may replace the output of fit.
    """
    found = files_in(folder)
    facts = _read(folder / RECORD) or {}
    names = _names(facts)
    if names is not None:
        writer = verb_of(folder)
        return found if writer == "fit" != verb else [name for name in found if name not in names]
    if isinstance(facts.get("provenance"), dict):
        return [name for name in found if not _MODEL_FILES.fullmatch(name)]
    if {"meta.pt", ".metadata"} <= {*found} and verb == "fit":
        return [name for name in found if not _PART_FILES.fullmatch(name)]
    if MASK in found and "errors.json" in found:
        return _strangers_of_prune(folder, found)
    return found


def is_mask_file(path: Path) -> bool:
    """Return whether ``path`` is a MaskSet file, of any version, according to its header."""
    return _format_of(path) == MASK_FORMAT


def is_weights_file(path: Path) -> bool:
    """Return whether ``path`` is a file of trained weights, of any version, according to its header."""
    return _format_of(path) == WEIGHTS_FORMAT


def _format_of(path: Path) -> str | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("format")
    except (SafetensorError, OSError, ValueError, RuntimeError):
        return None


def _strangers_of_prune(folder: Path, found: list[str]) -> list[str]:
    """Return the files ``found`` that prune did not write, in a folder of a version without records.

    Such a folder has ``mask.safetensors``, ``errors.json`` and ``model``.
    """
    errors = _read(folder / "errors.json") or {}
    if not is_mask_file(folder / MASK) or "layer_error" not in errors:
        return found
    inner = [name for name in found if name.startswith("model/")]
    known = {MASK, "errors.json"}
    if (_read(folder / "model" / RECORD) or {}).get("provenance"):
        known |= {name for name in inner if _MODEL_FILES.fullmatch(name.removeprefix("model/"))}
    return [name for name in found if name not in known]


def _recorded_text(folder: Path, key: str) -> str | None:
    entry = (_read(folder / RECORD) or {}).get(KEY)
    value = entry.get(key) if isinstance(entry, dict) else None
    return value if isinstance(value, str) else None


def _entry(verb: str | None, names: Iterable[str]) -> dict[str, Any]:
    return {"format": FORMAT, "format_version": FORMAT_VERSION, "verb": verb, "files": sorted(names)}


def _names(facts: dict[str, Any]) -> set[str] | None:
    entry = facts.get(KEY)
    if not isinstance(entry, dict) or entry.get("format") != FORMAT or not isinstance(entry.get("files"), list):
        return None
    return {name for name in entry["files"] if isinstance(name, str)}


def _read(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in ``path``; None if there is no file or no object in it."""
    if path.is_symlink() or not path.is_file():
        return None
    try:
        facts = read_json(path, most=MOST_DESCRIPTION)
    except ValueError:
        return None
    return facts if isinstance(facts, dict) else None
