"""What a result depends on, in sixteen digits."""

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

from experiments.assets.packages import SOURCES


def digest(value: Any) -> str:
    """16 hexadecimal digits of plain ``value``, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def identity(name: Any) -> Any:
    """What stands for a model or text in a digest: the content of a local file or folder, else the name.

    A hub id stands for itself: pin its revision where it matters. A list stands for its members'. How a folder was
    made, which its file of sources says, is no content.
    """
    if isinstance(name, list):
        return [identity(item) for item in name]
    path = Path(str(name)).expanduser()
    within = (item for item in path.rglob("*") if item.is_file() and item.name != SOURCES) if path.is_dir() else (path,)
    files = sorted(within)
    if not path.exists():
        return name
    return digest([[str(file.relative_to(path)), _content(file, _state(file))] for file in files])


def _state(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns


@cache
def _content(file: Path, state: tuple[int, int]) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
