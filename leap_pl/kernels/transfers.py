"""Copies between host and device for which the host need not wait."""

import torch
from torch import Tensor

ASYNCHRONOUS = {"cuda"}  # types of devices that copy to and from pinned memory while the host goes on


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """Return ``tensor``, on the CPU, in pinned memory if ``device`` copies from there without a host sync."""
    return tensor.pin_memory() if device.type in ASYNCHRONOUS else tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return ``tensor`` on ``device``, without a host sync if it comes from pinned memory."""
    return tensor.to(device, non_blocking=device.type in ASYNCHRONOUS)


def to_host(tensor: Tensor) -> Tensor:
    """Return ``tensor`` on the CPU for later work of its device, without a host sync where that is possible.

    The host itself must not read the result before it has synchronized with the device.
    """
    if tensor.device.type not in ASYNCHRONOUS:
        return tensor.cpu()
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
