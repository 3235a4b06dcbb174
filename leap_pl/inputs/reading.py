"""Read regular files only, within size limits.

A path that the user gives may be anything: a pipe without a writer, an endless device, a few kilobytes that unpack to
gigabytes. Every reader calls this module first, so that such a file is refused with one line and in bounded time and
memory.
"""

import json
import os
import stat
from pathlib import Path
from typing import IO, Any

from leap_pl.errors import UserError, one_line

MOST_SETTINGS = 1 << 20  # bytes of a config: the longest shipped one has some kilobytes
MOST_DESCRIPTION = 1 << 24  # bytes of a config.json, which may list the names of 22,000 classes
MOST_INDEX = 1 << 26  # bytes of an index of weights: about 100 bytes a tensor, and 600,000 tensors

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
_REMEDY = "Save its content in a regular file, and name that."


def check_regular(path: str | Path, what: str = "") -> int:
    """Check that ``path`` is a regular file, without opening it: opening a device can have side effects.

    Args:
        path: File, or link to one.
        what: Role of the file in messages: ``--config``, ``base model``.

    Returns:
        Size in bytes. A file of size 0 counts as empty, whatever reading it would return (as in ``/proc``).

    Raises:
        UserError: ``path`` is a folder, a pipe, a socket or a device, or does not exist.
    """
    called = f"{what} {path}".strip()
    try:
        found = Path(path).stat()
    except (OSError, ValueError) as error:
        raise UserError(
            f"{called} cannot be read ({getattr(error, 'strerror', None) or error}). Check the path."
        ) from error
    if not stat.S_ISREG(found.st_mode):
        kind = next((name for is_kind, name in _KINDS if is_kind(found.st_mode)), "not a file")
        raise UserError(f"{called} is {kind}, and cannot be read from any position. {_REMEDY}")
    return found.st_size


def open_regular(path: str | Path, what: str = "") -> IO[bytes]:
    """Open the regular file ``path`` to read its bytes; never wait for a writer.

    Raises:
        UserError: :func:`check_regular` raises.
        OSError: The file is not readable.
    """
    check_regular(path, what)
    # The file may have been replaced in between: open without blocking, and check again.
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        check_regular(path, what)
        raise UserError(f"{f'{what} {path}'.strip()} changed while it was opened. Run the command again.")
    return file


def read_regular(path: str | Path, *, most: int, what: str = "") -> bytes:
    """Return the bytes of the regular file ``path``, at most ``most``.

    Raises:
        UserError: The file is not regular, not readable, or longer.
    """
    called = f"{what} {path}".strip()
    try:
        with open_regular(path, what) as file:
            read = file.read(most + 1)
    except OSError as error:
        raise UserError(f"{called} cannot be read ({error.strerror or error}). Check its permissions.") from error
    if len(read) > most:
        raise UserError(f"{called} has more than {most:,} bytes, far more than such a file has. Check the name.")
    return read


def read_json(path: str | Path, *, most: int, what: str = "") -> Any:
    """Return the JSON value in the regular file ``path`` of at most ``most`` bytes.

    Raises:
        UserError: The file is not regular, is longer, or does not contain valid JSON.
    """
    raw = read_regular(path, most=most, what=what)
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:  # too many digits and invalid UTF-8 are ValueErrors as well
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else one_line(error, 200)
        raise UserError(
            f"{f'{what} {path}'.strip()} does not contain valid JSON ({reason}). Use another copy of the file."
        ) from error
