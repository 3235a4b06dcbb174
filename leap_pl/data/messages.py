"""Messages of this room, which name options of ``leap_pl fit``, for verbs that name theirs otherwise."""

import re
from collections.abc import Collection


def for_validation(message: str) -> str:
    """Return ``message`` on a text to validate on, with its own options in the place of those of the training text."""
    return re.sub(r"--data\.(text|config_name|split)\b", r"--data.validation_\1", message)


def for_options(message: str, options: Collection[str]) -> str:
    """Return ``message`` with ``--data.NAME`` as ``--NAME``, without the sentences on options that the verb lacks.

    Args:
        message: Message of a :class:`leap_pl.errors.UserError` of this room.
        options: Names of the options that the verb has, without dashes.
    """
    sentences = re.split(r"(?<=\.) ", message)
    kept = (one for one in sentences if {*re.findall(r"--data\.(\w+)", one)} <= {*options})
    return " ".join(kept).replace("--data.", "--")
