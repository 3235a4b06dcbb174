"""What a result depends on, in sixteen digits."""

import glob
import hashlib
import json
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from experiments.assets.packages import SOURCES
from leap_pl.inputs.paths import expanded
from leap_pl.inputs.records import RECORD

# Of a folder, what tells how it was made.
MADE = {SOURCES, RECORD}
# Of a model's settings, the key that tells with which release of transformers they were saved.
SAVED_BY = "transformers_version"


def digest(value: Any) -> str:
    """16 hexadecimal digits of plain ``value``, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def identity(name: Any) -> Any:
    """What stands for a model or text in a digest: the content of a local file or folder, else the name.

    A hub id stands for itself: pin its revision where it matters. A list stands for its members', a pattern for the
    files that it matches. How a folder was made, which its records say, is no content, and neither is the release of
    transformers that saved it.
    """
    if isinstance(name, list):
        return [identity(item) for item in name]
    path = expanded(str(name))
    if not path.exists() and glob.has_magic(str(name)):
        return [identity(found) for found in sorted(glob.glob(str(path), recursive=True))] or name  # noqa: PTH207
    within = (
        (item for item in path.rglob("*") if item.is_file() and item.name not in MADE) if path.is_dir() else (path,)
    )
    files = sorted(within)
    if not path.exists():
        return name
    return digest([[str(file.relative_to(path)), _content(file, _state(file))] for file in files])


def _state(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns


@cache
def _content(file: Path, state: tuple[int, int]) -> str:
    if file.name in ("config.json", "generation_config.json"):
        with suppress(ValueError, AttributeError):  # damaged settings are what they are: bytes
            settings = json.loads(file.read_bytes())
            return digest({key: value for key, value in settings.items() if key != SAVED_BY})
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
