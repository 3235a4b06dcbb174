"""Learn which weights of a large language model to keep.

The names below are imported when they are first used, so that the command line answers at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from leap_pl.version import __version__

if TYPE_CHECKING:
    from leap_pl.data import TextDataModule as TextDataModule
    from leap_pl.errors import UserError as UserError
    from leap_pl.masks import MaskSet as MaskSet
    from leap_pl.training.module import LeapModule

_ROOMS = {
    "LeapModule": "leap_pl.training.module",
    "MaskSet": "leap_pl.masks",
    "TextDataModule": "leap_pl.data",
    "UserError": "leap_pl.errors",
}

__all__ = ["LeapModule", "MaskSet", "TextDataModule", "UserError", "__version__"]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return getattr(import_module(_ROOMS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
