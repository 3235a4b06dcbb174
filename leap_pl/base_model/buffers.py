"""Buffers of a base model keep their precision when its weights are converted."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def keeping_buffers(module: nn.Module) -> Iterator[None]:
    """Keep the data type of the floating-point buffers of ``module`` while it is moved or converted within.

    transformers holds rotary frequencies in float32, whatever the data type of a model. Rounded to bfloat16, positions
    are off by a radian after a thousand tokens, and the model is another one.
    """
    before = {name: buffer for name, buffer in module.named_buffers() if buffer.is_floating_point()}
    yield
    for name, kept in before.items():
        owner, _, tensor = name.rpartition(".")
        place = module.get_submodule(owner)
        now = getattr(place, tensor)
        if now.dtype != kept.dtype:
            setattr(place, tensor, kept.to(now.device))
