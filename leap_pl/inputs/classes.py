"""The classes that code from outside may add to by defining one."""

from typing import Any


def imported_kinds(base: type) -> dict[str, Any]:
    """Return the subclasses of ``base`` by their names: those of this package, and those imported since."""
    return {kind.__name__: kind for kind in _subclasses(base)}


def _subclasses(base: type) -> list[type]:
    direct: list[type] = base.__subclasses__()
    return [found for kind in direct for found in (kind, *_subclasses(kind))]
