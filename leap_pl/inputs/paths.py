"""Paths as users type them."""

import os
from pathlib import Path


def expanded(path: str | os.PathLike[str]) -> Path:
    """Return ``path`` with ``~`` as the home folder; that of a user who does not exist stays, as in a shell."""
    return Path(os.path.expanduser(path))  # noqa: PTH111  (Path.expanduser raises where there is no such user)


def behind_link(path: str | os.PathLike[str]) -> str:
    """Return what a link such as ``last.ckpt`` points to, so that all read the same: a run that goes on moves it."""
    place = expanded(path)
    try:
        return str(place.resolve() if place.is_symlink() else place)
    except (OSError, RuntimeError):  # links in a circle
        return str(place)
