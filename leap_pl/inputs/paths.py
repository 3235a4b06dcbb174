"""Paths as users type them."""

import os
from pathlib import Path


def expanded(path: str | os.PathLike[str]) -> Path:
    """Return ``path`` with ``~`` as the home folder; that of a user who does not exist stays, as in a shell."""
    return Path(os.path.expanduser(path))  # noqa: PTH111  (Path.expanduser raises where there is no such user)
