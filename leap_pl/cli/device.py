"""Device that a verb runs a model on."""

import torch
from torch import nn

from leap_pl.errors import UserError


def device_name(device: str) -> str:
    """Return ``device``; for ``auto``, the name of the first GPU, or of the CPU without one."""
    return ("cuda:0" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def check_device(device: str) -> None:
    """Check that ``device`` computes, before anything is read for it.

    Raises:
        UserError: It does not exist, cannot be used, or holds no numbers, as ``meta`` does.
    """
    try:
        usable = torch.ones(1, device=device_name(device)).item() == 1
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise _unusable(device, str(error)) from error
    if not usable:
        raise _unusable(device, "it computes nothing")


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
    except (RuntimeError, AssertionError, ImportError) as error:
        raise _unusable(device, str(error)) from error
    return where


def _unusable(device: str, reason: str) -> UserError:
    reason = next(iter(reason.splitlines()), "torch does not say why")
    return UserError(f"--device {device} cannot be used ({reason}). Give --device cpu, or another.")
