"""What may be read, and how much of it at once: regular files, within limits.

A file that the user names may be anything: a pipe that nobody writes to, a device that never ends, a few kilobytes that
unpack to gigabytes. Whatever reads one comes through here first, so that it is refused in one line and in bounded time
and memory.
"""

import json
import os
import stat
from pathlib import Path
from typing import IO, Any

from leap_pl.errors import UserError

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
_REMEDY = "Save what it holds in a regular file, and name that."


def check_regular(path: str | Path, what: str = "") -> int:
    """Make sure that ``path`` is a regular file, without opening it: to open some devices does something.

    Args:
        path: A file, or a link to one.
        what: What it should be, for the message: ``--config``, ``base model``.

    Returns:
        Its size in bytes. A file of no bytes holds nothing, whatever reading it would give (as in ``/proc``).

    Raises:
        UserError: It is a folder, a pipe, a socket or a device, or is not there.
    """
    called = f"{what} {path}".strip()
    try:
        found = Path(path).stat()
    except (OSError, ValueError) as error:
        raise UserError(f"{called} cannot be read ({getattr(error, 'strerror', None) or error}).") from error
    if not stat.S_ISREG(found.st_mode):
        kind = next((name for is_kind, name in _KINDS if is_kind(found.st_mode)), "no file")
        raise UserError(f"{called} is {kind}, and cannot be read again from a place in it. {_REMEDY}")
    return found.st_size


def open_regular(path: str | Path, what: str = "") -> IO[bytes]:
    """Open the regular file ``path`` to read its bytes; never waits for a writer.

    Raises:
        UserError: As :func:`check_regular`.
        OSError: It may not be read.
    """
    check_regular(path, what)
    # What has taken its place meanwhile is opened without waiting, and looked at again.
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        check_regular(path, what)
        raise UserError(f"{f'{what} {path}'.strip()} changed while it was opened.")
    return file


def read_regular(path: str | Path, *, most: int, what: str = "") -> bytes:
    """Return the bytes of the regular file ``path``, of which there may be ``most``.

    Raises:
        UserError: It is no regular file, may not be read, or is longer.
    """
    called = f"{what} {path}".strip()
    try:
        with open_regular(path, what) as file:
            read = file.read(most + 1)
    except OSError as error:
        raise UserError(f"{called} cannot be read ({error.strerror or error}).") from error
    if len(read) > most:
        raise UserError(
            f"{called} has more than {most:,} bytes, and what is read as this has far fewer. Check the name."
        )
    return read


def read_json(path: str | Path, *, most: int, what: str = "") -> Any:
    """Return the JSON value in the regular file ``path``, of at most ``most`` bytes.

    Raises:
        UserError: It is no regular file, is longer, or holds no JSON.
    """
    raw = read_regular(path, most=most, what=what)
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:  # too many digits and broken UTF-8 are values as well
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())[:200]
        raise UserError(f"{f'{what} {path}'.strip()} holds no JSON that can be read ({reason}).") from error
