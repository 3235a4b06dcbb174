"""The gates' kernels, compiled where there is a compiler.

A gate writes its forward and its backward pass as a few lines of tensor code over flat tensors. Here
torch.compile fuses each into one pass over memory (C++ on a CPU, Triton on a GPU). Both kernels take every
number that changes between steps as a tensor and every length as a symbol, so that one compilation serves
the whole run. Without a compiler the same lines run eagerly, with the same noise, many times slower.
"""

import os
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.fx.experimental import _config as symbols

from leap_pl.kernels.direct import DirectKernel

Kernel = TypeVar("Kernel", bound=Callable[..., Any])

# Multiply and add as one instruction, rounded once: a third off the time of a gate on a CPU.
FLAGS = "fast"
if sys.platform == "linux" and torch.backends.cpu.get_cpu_capability() == "AVX512":
    # Where a number is read as bits, torch stores a vector, copies it and loads it again. GCC, which prefers half the
    # width on Intel's machines, copies it in two halves, for which the load must wait: gates took twice as long.
    # There is no option of its own for it.
    FLAGS += " -mprefer-vector-width=512"
OPTIONS = {"cpp.enable_floating_point_contract_flag": FLAGS}

_seconds: dict[str, float] = {}
_verdicts: dict[str, bool] = {}


def compiled(kernel: Kernel) -> Kernel:
    """Compile ``kernel`` for the device of its first argument at its first call.

    Set ``LEAP_PL_COMPILE=0`` to run everything eagerly.
    """
    fused = DirectKernel(kernel, OPTIONS)

    def call(first: torch.Tensor, *rest: Any) -> Any:
        if not can_compile(first.device):
            return kernel(first, *rest)
        if first.device.type in timed:
            return fused(first, *rest)
        start = time.perf_counter()
        # Sizes that are equal in this call need not be in the next.
        with symbols.patch(use_duck_shape=False):  # type: ignore[attr-defined]
            result = fused(first, *rest)
        _seconds[f"{kernel.__name__}[{first.device.type}]"] = time.perf_counter() - start
        timed.add(first.device.type)  # not before: what failed to compile is tried the same way again
        return result

    timed: set[str] = set()
    call.__name__ = kernel.__name__
    call.__doc__ = kernel.__doc__
    return call  # type: ignore[return-value]


def rows(tensor: torch.Tensor) -> torch.Tensor:
    """Return ``tensor`` in two dimensions, and as no view: of a view, its base's shape would be compiled in."""
    return (tensor if tensor.ndim == 2 else tensor.reshape(-1, tensor.shape[-1] if tensor.ndim else 1)).data


def scalar(value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return a number as a scalar tensor on the CPU, whatever the default device.

    Kernels take such a scalar as an argument on every device: it is not copied there, so the host does not wait.
    """
    return torch.tensor(value, dtype=dtype, device="cpu")


def compile_seconds() -> dict[str, float]:
    """How long the first call of each kernel took, compilation included: ``name[device]`` → seconds."""
    return dict(_seconds)


def can_compile(device: torch.device) -> bool:
    """Whether kernels for ``device`` are compiled; found out once by compiling a small one."""
    if os.environ.get("LEAP_PL_COMPILE") == "0":
        return False
    if device.type not in _verdicts:
        try:
            torch.compile(_probe, dynamic=True, options=dict(OPTIONS))(torch.ones(4, device=device))
            _verdicts[device.type] = True
        except Exception as error:
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            warnings.warn(
                f"The gates run uncompiled, many times slower: torch.compile does not work for {device.type} here "
                f"({reason[:160]}). Install a C++ compiler (apt-get install g++), or Triton for a GPU.",
                stacklevel=2,
            )
            _verdicts[device.type] = False
    return _verdicts[device.type]


def _probe(x: torch.Tensor) -> torch.Tensor:
    return x.sin() + 1
