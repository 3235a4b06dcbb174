"""Mistakes that the user can mend, told in one line."""

import warnings
from functools import cache


class UserError(ValueError):
    """What was asked cannot be done, and the user can ask differently.

    The message is one sentence or two: what was wrong, what was found, what to type instead. The command
    line prints it alone, without a traceback, and exits with status 2.
    """


def listing(names: list[str], most: int = 12) -> str:
    """``names`` as text for an error message: at most ``most`` of them, then how many more there are."""
    shown = ", ".join(names[:most]) or "none"
    return f"{shown}, and {len(names) - most} more" if len(names) > most else shown


@cache
def warn_once(message: str) -> None:
    """Warn of ``message``, once in a process: another library is not as it was, and something else is done instead."""
    warnings.warn(message, stacklevel=3)
