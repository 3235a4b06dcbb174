"""Registration of packed folders with transformers, without importing it.

``import leap_pl`` has to answer at once, and importing transformers takes seconds. transformers finds no plugins by
itself. So a finder on ``sys.meta_path`` waits for the one module of transformers that has the table of quantizers, and
adds this package's to it when that module has been imported, through the public ``register_quantizer``. The finder
touches no other module, and removes itself.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

from leap_pl.errors import warn_once

TABLE = "transformers.quantizers.auto"  # the module of register_quantizer


def register_packed_folders() -> None:
    """Let ``from_pretrained`` of transformers load packed folders: now, or when transformers is imported."""
    if TABLE in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != TABLE:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register()

            vars(spec.loader)["exec_module"] = execute_and_register
        return spec


def _register() -> None:
    try:
        import_module("leap_pl.sparse.quantizer")
    except (ImportError, AttributeError, TypeError) as error:  # importing transformers must not fail because of this
        warn_once(f"this version of transformers cannot load packed folders of leap_pl ({error}).")
