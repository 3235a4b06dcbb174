"""Triton kernels for CUDA, each behind an operator of ``torch.ops.leap_pl`` and tested in Triton's interpreter.

What torch.compile generates for a GPU can be looked at and tested only where there is one. These kernels are the same
code everywhere: the tests run them on a CPU, bit by bit against the eager operations, and compile them for the GPUs
of several generations. On a GPU they also launch once for all gates of a decoder block, not once for each.
"""

import importlib
import math
import os
from functools import cache
from importlib.util import find_spec

import torch

from leap_pl.errors import one_line, warn_once

OLDEST = (8, 0)  # compute capability: Ampere
KEYS = [1, 2, 3, 4]  # of the noise of two gates, with which kernels are tried
DEVICES = {"cuda"}  # types of the devices on which the operators run; the tests add the CPU, for the interpreter


def has_kernels(device: torch.device) -> bool:
    """Return whether the operators of this package run on ``device``; with ``LEAP_PL_COMPILE=0``, none does."""
    if device.type not in DEVICES or os.environ.get("LEAP_PL_COMPILE") == "0":
        return False
    return _found() and _is_new_enough(device) and _works(device)


@cache
def _is_new_enough(device: torch.device) -> bool:
    """Return whether a GPU of NVIDIA has instructions for bfloat16, which kernels cannot be built without."""
    if device.type != "cuda" or torch.version.hip is not None:
        return True
    found = torch.cuda.get_device_capability(device)
    if found < OLDEST:
        warn_once(
            f"leap_pl's kernels are for GPUs of compute capability {OLDEST[0]}.{OLDEST[1]} and newer, and {device} has "
            f"{found[0]}.{found[1]}: gates, losses and packed weights run without them, slower."
        )
    return found >= OLDEST


@cache
def _works(device: torch.device) -> bool:
    """Return whether kernels can be built and compute: Triton needs a C compiler and the headers of Python.

    The kernels of masks have instructions that those of losses do without.
    """
    try:
        logits, targets = torch.zeros(1, 2, device=device), torch.zeros(1, dtype=torch.int64, device=device)
        loss, _ = torch.ops.leap_pl.lm_loss(logits, targets, 1.0)
        found = float(loss.sum())
        # Gates that keep one weight of 1, and not another, whatever their noise.
        ones, gates, numbers = [logits[:, :1] + 1] * 2, [logits[:, :1] + sign for sign in (1e4, -1e4)], (1.0, 1.0)
        masked, sums = torch.ops.leap_pl.mask_forward(gates, ones, KEYS, *numbers)
        grads = torch.ops.leap_pl.mask_backward(gates, ones, ones, sums, KEYS, *numbers)
        kept = torch.cat([*map(torch.flatten, masked), sums, *map(torch.flatten, grads)]).tolist()
    except torch.OutOfMemoryError:  # says nothing of the kernels
        raise
    except Exception as error:
        reason = one_line(error, 200)
    else:
        exact = [1.0, 0.0] * 3 + [0.0, 0.0]
        right = abs(found - math.log(2)) < 1e-3
        if right and kept == exact:
            return True
        reason = f"masks of {exact} are {kept}" if right else f"a loss of {math.log(2):.4f} is {found:.4f}"
    warn_once(
        f"Triton builds no kernels that work here ({reason}), so gates and losses run on the GPU without them, slower. "
        "It needs a C compiler and the headers of Python: apt-get install gcc python3-dev."
    )
    return False


@cache
def _found() -> bool:
    if find_spec("triton") is None:
        warn_once(
            "Triton is not installed, so gates and losses run on the GPU uncompiled, many times slower: install it."
        )
        return False
    try:
        for module in ("masks", "losses"):  # define the operators
            importlib.import_module(f"{__name__}.{module}")
    except Exception as error:
        warn_once(
            f"Triton cannot be imported ({one_line(error, 200)}), so gates and losses run on the GPU uncompiled, many "
            "times slower: install the Triton of this version of torch."
        )
        return False
    return True
