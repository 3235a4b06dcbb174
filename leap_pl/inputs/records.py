"""What leap_pl wrote into a folder, in the folder itself: ``--force`` replaces that, and nothing else.

Every folder that is written has a ``leap_pl.json``; under ``folder`` it holds the format, the verb and the names of
all files. An export's facts stand in the same file, and so does what a run of ``leap_pl fit`` has written into its
folder of checkpoints. A file that is not in the record is somebody else's.

Of the folders that were written before there were such records those are known that can be told by what is in them:
exported and pruned models, whose ``leap_pl.json`` has a ``provenance``, what ``prune`` writes around these, and the
parts of a distributed checkpoint.
"""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

MASK_FORMAT = "leap_pl.MaskSet"  # what the metadata of a mask says
RECORD = "leap_pl.json"
MASK = "mask.safetensors"  # the mask of a folder
KEY = "folder"
FORMAT = "leap_pl.folder"
FORMAT_VERSION = 1

# What transformers writes for a model and its tokenizer, and what an export adds.
_MODEL_FILES = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|chat_template"
    r"|preprocessor_config|processor_config)\.json|(model|pytorch_model)[\w.-]*\.(safetensors|bin|json)|merges\.txt"
    r"|vocab\.txt|[\w-]+\.model|chat_template\.jinja|additional_chat_templates/[\w.-]+\.jinja|[\w-]+\.py"
    r"|README\.md|mask\.safetensors|leap_pl\.json"
)
_PART_FILES = re.compile(r"meta\.pt|\.metadata|__\d+_\d+\.distcp")


def files_in(folder: Path) -> list[str]:
    """Every file under ``folder``, and every symbolic link: paths within it, sorted."""
    found = []
    for place, folders, files in os.walk(folder):
        links = [name for name in folders if Path(place, name).is_symlink()]
        found += [Path(place, name).relative_to(folder).as_posix() for name in (*files, *links)]
    return sorted(found)


def write_record(folder: Path, verb: str | None) -> None:
    """Write the record of all that is in ``folder``, before that gets its name; the same files, the same bytes."""
    path = folder / RECORD
    facts = _read(path) or {}
    facts[KEY] = _entry(verb, {*files_in(folder), RECORD})
    path.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def extended(folder: Path, verb: str, names: Iterable[str], *, job: str | None = None) -> str:
    """The text of the record of ``folder`` with ``names`` added, and without those that are not there any more.

    Args:
        folder: That is written file by file.
        verb: That writes it.
        names: Of files that are about to be written.
        job: That runs the verb, where a scheduler gives jobs a name.
    """
    facts = _read(folder / RECORD) or {}
    there = {name for name in _names(facts) or () if os.path.lexists(folder / name)}
    entry = _entry(verb, {*there, *names, RECORD}) | ({} if job is None else {"job": job})
    return json.dumps(facts | {KEY: entry}, indent=2) + "\n"


def recorded(folder: Path) -> set[str]:
    """The names in the record of ``folder``; none where there is no record."""
    return set(_names(_read(folder / RECORD) or {}) or ())


def verb_of(folder: Path) -> str | None:
    """The verb that wrote ``folder``, if its record tells."""
    return _told(folder, "verb")


def job_of(folder: Path) -> str | None:
    """The job that wrote ``folder``, if its record tells."""
    return _told(folder, "job")


def strangers(folder: Path, verb: str | None) -> list[str]:
    """What is in ``folder`` that leap_pl did not write, as far as its record, or what it is made of, tells.

    Args:
        folder: That is to be replaced.
        verb: The command that would do so. What fit has learned gives way to fit alone.
    """
    there = files_in(folder)
    facts = _read(folder / RECORD) or {}
    names = _names(facts)
    if names is not None:
        wrote = verb_of(folder)
        return there if wrote == "fit" != verb else [name for name in there if name not in names]
    if isinstance(facts.get("provenance"), dict):
        return [name for name in there if not _MODEL_FILES.fullmatch(name)]
    if {"meta.pt", ".metadata"} <= {*there} and verb == "fit":
        return [name for name in there if not _PART_FILES.fullmatch(name)]
    if MASK in there and "errors.json" in there:
        return _strangers_of_prune(folder, there)
    return there


def is_mask_file(path: Path) -> bool:
    """Whether ``path`` is a MaskSet file, of any version, as far as its header tells."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("format") == MASK_FORMAT
    except (SafetensorError, OSError, ValueError, RuntimeError):
        return False


def _strangers_of_prune(folder: Path, there: list[str]) -> list[str]:
    """``OUT/mask.safetensors``, ``OUT/errors.json`` and ``OUT/model``, as prune wrote them without a record."""
    errors = _read(folder / "errors.json") or {}
    if not is_mask_file(folder / MASK) or "layer_error" not in errors:
        return there
    inner = [name for name in there if name.startswith("model/")]
    known = {MASK, "errors.json"}
    if (_read(folder / "model" / RECORD) or {}).get("provenance"):
        known |= {name for name in inner if _MODEL_FILES.fullmatch(name.removeprefix("model/"))}
    return [name for name in there if name not in known]


def _told(folder: Path, key: str) -> str | None:
    entry = (_read(folder / RECORD) or {}).get(KEY)
    told = entry.get(key) if isinstance(entry, dict) else None
    return told if isinstance(told, str) else None


def _entry(verb: str | None, names: Iterable[str]) -> dict[str, Any]:
    return {"format": FORMAT, "format_version": FORMAT_VERSION, "verb": verb, "files": sorted(names)}


def _names(facts: dict[str, Any]) -> set[str] | None:
    told = facts.get(KEY)
    if not isinstance(told, dict) or told.get("format") != FORMAT or not isinstance(told.get("files"), list):
        return None
    return {name for name in told["files"] if isinstance(name, str)}


def _read(path: Path) -> dict[str, Any] | None:
    """The JSON object in ``path``; None where there is none."""
    if path.is_symlink() or not path.is_file():
        return None
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return told if isinstance(told, dict) else None
