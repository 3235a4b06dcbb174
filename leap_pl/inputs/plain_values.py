"""Read untrusted JSON as plain values: bounded in size, depth and numbers, and validated by a schema.

What leap_pl reads back from JSON (results, the metadata of masks, the facts of model folders) goes through here before
it is used. The result consists of dictionaries, lists, strings, booleans, None, integers of at most 64 bits and finite
floats; a strict pydantic schema defines their names, types and ranges. No name from the JSON is ever imported, called
or looked up.
"""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leap_pl.errors import UserError

if TYPE_CHECKING:
    from pydantic import TypeAdapter

MOST_BYTES = 16 << 20  # of a file: a real result has some tens of kilobytes, one of a million windows 10 MiB
MOST_DEPTH = 32  # of nested dictionaries and lists; a real result has 8
MOST_DIGITS = 20
LONGEST_VALUE = 120  # characters of a value that a message shows
REMEDY = "Use another copy of the file, or an earlier one."
LONGEST_NAME = 4096  # characters of a path, a hub id, a weight's or a task's name


def read_plain_json(path: Path, most_bytes: int = MOST_BYTES) -> Any:
    """Read the plain values in the file ``path``.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not a regular file, is too large, or contains something else; the message is one line.
    """
    if not path.is_file():
        raise ValueError("it is not a regular file")
    with path.open("rb") as file:
        data = file.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise ValueError(f"it is larger than {most_bytes >> 20} MiB")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 text at byte {error.start}") from error
    return parse_json(text)


def parse_json(text: str, *, finite: bool = True) -> Any:
    """Return the plain values in ``text``.

    Args:
        text: JSON.
        finite: Refuse numbers that are infinite, NaN or beyond 64 bits; otherwise they become infinite or NaN floats.

    Raises:
        ValueError: ``text`` is not JSON; or a number is not finite or a string not valid Unicode (the message gives its
            path); or a dictionary has a duplicate key; or dictionaries and lists are nested too deeply. The message is
            one line.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_int=_integer)
        check_depth(value)
        # Both are rare, so the values are searched only if the text may contain one.
        if finite and re.search("NaN|Infinity|[eE][+]?[0-9]{3}|[0-9]{19}", text):
            _refuse(value, _is_not_finite, "not a finite number")
        if "\\u" in text:  # a lone surrogate is not a character, and cannot be encoded again
            _refuse(value, _is_not_unicode, "not valid Unicode")
    except RecursionError as error:
        raise ValueError(f"it is nested deeper than {MOST_DEPTH} levels") from error
    return value


def _integer(digits: str) -> int | float:
    if len(digits) > MOST_DIGITS or not -(1 << 63) <= int(digits) < 1 << 63:
        return math.inf  # is refused afterwards
    return int(digits)


def _is_not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _is_not_unicode(value: Any) -> bool:
    return isinstance(value, str) and re.search("[\ud800-\udfff]", value) is not None


def _refuse(value: Any, is_wrong: Callable[[Any], bool], what: str, place: tuple[object, ...] = ()) -> None:
    """Raise a ValueError with the path of the first wrong value or key in ``value``, whose depth is bounded."""
    if is_wrong(value):
        raise ValueError(f"'{path_of(place)}' is {what}")
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            if is_wrong(key):
                raise ValueError(f"the key '{path_of((*place, key))}' is {what}")
            if isinstance(inner, dict | list) or is_wrong(inner):
                _refuse(inner, is_wrong, what, (*place, key))


def path_of(place: Iterable[object]) -> str:
    """Return the path of a value, given as its keys, as text for an error message."""
    return " > ".join(shown(str(key)) for key in place)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"it contains the key {shown(twice)} twice")
    return found


def check_depth(value: Any) -> None:
    """Check that ``value`` is nested as deep as is read, at most.

    Raises:
        ValueError: It is nested deeper.
    """
    level = [value]
    for _ in range(MOST_DEPTH + 1):
        level = [inner for item in level for inner in _items(item) if isinstance(inner, dict | list)]
        if not level:
            return
    raise ValueError(f"it is nested deeper than {MOST_DEPTH} levels")


def _items(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def checked(kind: Any, value: Any) -> Any:
    """Return ``value`` validated as ``kind``, a type that pydantic supports: the fields that it defines, in its types.

    Raises:
        ValueError: ``value`` does not fit; the message is one line that names the first invalid key.
    """
    from pydantic import ValidationError

    try:
        return _adapter(kind).validate_python(value, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = path_of(first["loc"])
        wrong = re.sub(r"^(Input|Value error,|Field) ?", "", first["msg"])
        found = "" if first["type"] == "missing" else f", and is {_summary(first['input'])}"
        raise ValueError(f"'{place}' is missing or invalid ({wrong}{found})") from error


def plain_paths(value: Any) -> Any:
    """Return ``value`` with its paths as strings, also in a list or dictionary: checkpoints hold plain values."""
    if isinstance(value, dict):
        return {name: plain_paths(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_paths(item) for item in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def read(value: Any, kind: Any, where: str, remedy: str = REMEDY) -> Any:
    """Return ``value``, read from a checkpoint, as an instance of ``kind`` built from plain values only.

    Numbers, strings and booleans are not converted into each other; an unknown name is refused. Nothing is imported
    and nothing in the value is called: only ``kind`` defines which classes are instantiated.

    Args:
        value: Dictionaries, lists, strings, numbers, booleans and None.
        kind: Type that pydantic supports: a plain one, a Literal, a container of these or a dataclass.
        where: File and setting, for the message.
        remedy: Sentence that ends the message.

    Raises:
        UserError: The value is not of this type, or not plain.
    """
    from pydantic import ValidationError

    try:
        # Strict JSON: lists become tuples and dictionaries dataclasses, and nothing else is converted.
        return _adapter(kind).validate_json(json.dumps(value), strict=True, extra="forbid")
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        path = ".".join(shown(str(part)) for part in first["loc"])
        if first["type"] == "missing":
            raise UserError(f"{where} lacks {path}. {remedy}") from None
        place = f"{where}.{path}" if path else where
        if first["type"] == "value_error":  # raised by a dataclass itself
            raise UserError(f"{place}: {first['msg'].removeprefix('Value error, ').rstrip('.')}. {remedy}") from None
        raise UserError(f"{place} is {display(first['input'])}: {first['msg'].lower()}. {remedy}") from None
    except (TypeError, ValueError, RecursionError):
        raise UserError(f"{where} is not a plain value ({display(value)}). {remedy}") from None


def display(value: Any) -> str:
    """Return the ``repr`` of ``value`` for a message: one short line of printable text."""
    try:
        return shown(repr(value), LONGEST_VALUE)
    except RecursionError:
        return f"a {type(value).__name__} nested too deeply"


@cache
def _adapter(kind: Any) -> "TypeAdapter[Any]":
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _summary(value: Any) -> str:
    if isinstance(value, dict | list):
        return f"a {'dictionary' if isinstance(value, dict) else 'list'} of {len(value)}"
    return shown(repr(value), 40)


def plain(value: Any) -> Any:
    """Return ``value`` converted to JSON types; a number of NumPy, or a tensor of one, to a plain number.

    A number that is not finite becomes None, and what is no Unicode, such as a path of other bytes, is escaped.
    """
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {plain(str(key)): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int):
        return value
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        item = value.item()
        return plain(str(item) if type(item) is type(value) else item)
    return plain(str(value))


def shown(name: str, most: int = 80) -> str:
    """Return ``name`` as one line of printable text; if longer than ``most`` characters, its middle is left out.

    Control characters, line breaks and lone surrogates are escaped as in Python.
    """
    if len(name) > most:
        half = (most - 1) // 2
        name = f"{name[: most - 1 - half]}…{name[-half:]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
