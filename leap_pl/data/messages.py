"""Messages of this room, which name options of ``leap_pl fit``, for verbs that name theirs otherwise."""

import re
from collections.abc import Collection


def for_options(message: str, options: Collection[str]) -> str:
    """Return ``message`` with ``--data.NAME`` as ``--NAME``, without the sentences on options that the verb lacks.

    Args:
        message: Message of a :class:`leap_pl.errors.UserError` of this room.
        options: Names of the options that the verb has, without dashes.
    """
    sentences = re.split(r"(?<=\.) ", message)
    kept = (one for one in sentences if {*re.findall(r"--data\.(\w+)", one)} <= {*options})
    return " ".join(kept).replace("--data.", "--")
