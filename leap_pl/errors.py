"""Errors that the user can fix, reported in one line."""

import warnings
from functools import cache

# In messages of torch and of the system.
_REFUSED = ("can't allocate memory", "cannot allocate memory", "not enough memory", "out of memory", "bad_alloc")


class UserError(ValueError):
    """Error that the user can fix by changing a command, a setting or a file.

    The message is one or two sentences: what was wrong, what was found, what to type instead. The command line prints
    only the message, without a traceback, and exits with status 2.
    """


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory was refused, on a device or on the host."""
    # torch's class by its name, since errors need no torch; on a CPU it raises a RuntimeError.
    kinds, said = {kind.__name__ for kind in type(error).__mro__}, str(error).lower()
    return bool({"OutOfMemoryError", "MemoryError"} & kinds) or any(words in said for words in _REFUSED)


def out_of_memory(error: BaseException) -> str:
    """Return the beginning of a message: what the error says of the memory that was refused."""
    where = " on the device" if type(error).__name__ == "OutOfMemoryError" else ""
    return f"out of memory{where}: {(str(error).splitlines() or [type(error).__name__])[0]}"


def listing(names: list[str], most: int = 12) -> str:
    """Return ``names`` as text for an error message: at most ``most`` of them, then the number of the rest."""
    shown = ", ".join(names[:most]) or "none"
    return f"{shown}, and {len(names) - most} more" if len(names) > most else shown


def one_line(error: object, most: int | None = None) -> str:
    """Return the text of ``error`` on one line, or its type's name if it has none: at most ``most`` characters."""
    return (" ".join(str(error).split()) or type(error).__name__)[:most]


@cache
def warn_once(message: str) -> None:
    """Warn with ``message``, once per process: for fallbacks when another library has changed."""
    warnings.warn(message, stacklevel=3)
