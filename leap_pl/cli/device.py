"""Device that a verb runs a model on."""

import torch
from torch import nn

from leap_pl.errors import UserError


def device_name(device: str) -> str:
    """Return ``device``; for ``auto``, the name of the first GPU, or of the CPU without one."""
    return ("cuda:0" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def move_to_device(model: nn.Module, device: str) -> str:
    """Move ``model`` to ``device``, and return its name; ``auto`` is the first GPU, or the CPU without one.

    Raises:
        UserError: The device does not exist, or cannot be used.
    """
    where = device_name(device)
    try:
        model.to(where)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"--device {device} cannot be used ({str(error).splitlines()[0]}). Give --device cpu, or another."
        ) from error
    return where
