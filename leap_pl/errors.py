"""Errors that the user can fix, reported in one line."""

import warnings
from functools import cache


class UserError(ValueError):
    """Error that the user can fix by changing a command, a setting or a file.

    The message is one or two sentences: what was wrong, what was found, what to type instead. The command line prints
    only the message, without a traceback, and exits with status 2.
    """


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
