"""Kernels of the hub, which transformers fetches and runs without being asked: they are code."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Never

# Argument of ``from_pretrained``: transformers replaces layers by kernels of the hub where there is a GPU, by default.
# They also give other numbers than the layers that they replace.
NO_KERNELS = {"use_kernels": False}


@contextmanager
def without_hub_kernels() -> Iterator[None]:
    """Fetch no kernel from the hub inside, whatever asks for one; transformers goes on with its own layers then.

    ``use_kernels=False`` is not enough: the loader of GGUF files asks for kernels in any case, and so does a RWKV model
    that is built where there is a GPU. Both take an error for "there are none".
    """
    from transformers.integrations import hub_kernels
    from transformers.utils import is_kernels_available

    if not is_kernels_available():
        yield
        return
    from kernels import LayerRepository

    places: tuple[tuple[Any, str], ...] = ((hub_kernels, "get_kernel"), (LayerRepository, "load"))
    usual = [getattr(owner, name) for owner, name in places]
    for owner, name in places:
        setattr(owner, name, _refuse)
    try:
        yield
    finally:
        for (owner, name), function in zip(places, usual, strict=True):
            setattr(owner, name, function)


def _refuse(*_: object, **__: object) -> Never:
    raise RuntimeError("kernels of the hub are code, which is not run unless it is allowed")
