"""Read what a file says as plain values of known names and types: a file is data, and never names code to run."""

import json
from functools import cache
from typing import Any

from leap_pl.errors import UserError

LONGEST = 120  # characters of a value that a message shows
REMEDY = "Take another copy of the file, or the one before it."


def read(value: Any, kind: Any, where: str) -> Any:
    """Return ``value`` as ``kind``, built of plain values alone.

    A number is not taken for a string or a boolean, nor the other way round; an unknown name is refused. Nothing is
    imported and nothing of the value is called: ``kind`` says which classes there are.

    Args:
        value: Dictionaries, lists, strings, numbers, booleans and None, as a file held them.
        kind: A type that pydantic knows: a plain one, a Literal, a container of these or a dataclass.
        where: File and setting, for the message.

    Raises:
        UserError: The value is not of this type, or not plain.
    """
    from pydantic import ValidationError

    try:
        # Strictly read JSON: lists become tuples and dictionaries dataclasses, and nothing else is converted.
        return _adapter(kind).validate_json(json.dumps(value), strict=True, extra="forbid")
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        path = ".".join(str(part) for part in first["loc"])
        if first["type"] == "missing":
            raise UserError(f"{where} lacks {path}. {REMEDY}") from None
        place = f"{where}.{path}" if path else where
        raise UserError(f"{place} is {shown(first['input'])}: {first['msg'].lower()}. {REMEDY}") from None
    except (TypeError, ValueError, RecursionError):
        raise UserError(f"{where} is not a plain value ({shown(value)}). {REMEDY}") from None


def shown(value: Any) -> str:
    """Return ``value`` for a message: on one line and short, control characters escaped."""
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


@cache
def _adapter(kind: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)
