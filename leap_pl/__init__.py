"""Learn which weights of a large language model to keep.

The names below are imported when they are first used, so that the command line answers at once. Packed folders are
loaded by transformers once this package is imported.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from leap_pl.sparse.registration import register_packed_folders
from leap_pl.version import __version__

if TYPE_CHECKING:
    from leap_pl.errors import UserError as UserError
    from leap_pl.masks import MaskSet as MaskSet
    from leap_pl.training.datamodule import TextDataModule as TextDataModule
    from leap_pl.training.module import LeapModule as LeapModule

_ROOMS = {
    "LeapModule": "leap_pl.training.module",
    "MaskSet": "leap_pl.masks",
    "TextDataModule": "leap_pl.training.datamodule",
    "UserError": "leap_pl.errors",
}

# Former names of modules, which configs saved by earlier versions contain in class paths → their current names.
# Modules that kept their name, or became a package of that name, need no row.
_MOVED = {
    "module": "leap_pl.training.module",
    "objective": "leap_pl.losses.objective",
    "optimizer": "leap_pl.training.optimizers",
    "schedules": "leap_pl.training.schedules",
}

__all__ = ["LeapModule", "MaskSet", "TextDataModule", "UserError", "__version__"]

register_packed_folders()


if not TYPE_CHECKING:  # which would take any name for one of this package

    def __getattr__(name: str) -> Any:
        if name in _ROOMS:
            return getattr(import_module(_ROOMS[name]), name)
        if name in _MOVED:
            return import_module(_MOVED[name])
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
