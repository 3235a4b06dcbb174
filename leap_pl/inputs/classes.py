"""The classes that code from outside may add to by defining one."""

from inspect import isabstract
from typing import Any


def imported_kinds(base: type) -> dict[str, Any]:
    """Return the concrete subclasses of ``base`` by name: those of this package, and those imported since."""
    return {kind.__name__: kind for kind in _subclasses(base) if not isabstract(kind)}


def _subclasses(base: type) -> list[type]:
    direct: list[type] = base.__subclasses__()
    return [found for kind in direct for found in (kind, *_subclasses(kind))]
