"""The gates' kernels, compiled where there is a compiler.

A gate writes its forward and its backward pass as a few lines of tensor code over flat tensors. Here
torch.compile fuses each into one pass over memory (C++ on a CPU, Triton on a GPU). Both kernels take every
number that changes between steps as a tensor and every length as a symbol, so that one compilation serves
the whole run. Without a compiler the same lines run eagerly, with the same noise, many times slower.
"""

import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

from leap_pl.errors import warn_once
from leap_pl.kernels.direct import DirectKernel
from leap_pl.kernels.inductor import sizes_apart

Kernel = TypeVar("Kernel", bound=Callable[..., Any])

# Multiply and add as one instruction, rounded once: a third off the time of a gate on a CPU.
FLAGS = "fast"
if sys.platform == "linux" and torch.backends.cpu.get_cpu_capability() == "AVX512":
    # Where a number is read as bits, torch stores a vector, copies it and loads it again. GCC, which prefers half the
    # width on Intel's machines, copies it in two halves, for which the load must wait: gates took twice as long.
    # There is no option of its own for it.
    FLAGS += " -mprefer-vector-width=512"
OPTIONS = {"cpp.enable_floating_point_contract_flag": FLAGS}

Way = Callable[[Callable[..., Any], Mapping[str, Any]], Callable[..., Any]]  # a kernel and options → compiled

_seconds: dict[str, float] = {}
_ways: dict[str, Way | None] = {}  # by the type of a device; None: eager


def compiled(kernel: Kernel) -> Kernel:
    """Compile ``kernel`` for the device of its first argument at its first call.

    Set ``LEAP_PL_COMPILE=0`` to run everything eagerly.
    """

    def call(first: torch.Tensor, *rest: Any) -> Any:
        way = _way(first.device)
        if way is None:
            return kernel(first, *rest)
        if way not in fused:
            fused[way] = way(kernel, OPTIONS)
        if first.device.type in timed:
            return fused[way](first, *rest)
        start = time.perf_counter()
        with sizes_apart():
            result = fused[way](first, *rest)
        _seconds[f"{kernel.__name__}[{first.device.type}]"] = time.perf_counter() - start
        timed.add(first.device.type)  # not before: what failed to compile is tried the same way again
        return result

    fused: dict[Way, Callable[..., Any]] = {}
    timed: set[str] = set()
    call.__name__ = kernel.__name__
    call.__doc__ = kernel.__doc__
    return call  # type: ignore[return-value]


def rows(tensor: torch.Tensor) -> torch.Tensor:
    """Return ``tensor`` in two dimensions, and as no view: of a view, its base's shape would be compiled in."""
    return (tensor if tensor.ndim == 2 else tensor.reshape(-1, tensor.shape[-1] if tensor.ndim else 1)).data


def compile_seconds() -> dict[str, float]:
    """How long the first call of each kernel took, compilation included: ``name[device]`` → seconds."""
    return dict(_seconds)


def can_compile(device: torch.device) -> bool:
    """Return whether kernels for ``device`` are compiled; found out once by compiling a small one."""
    return _way(device) is not None


def _way(device: torch.device) -> Way | None:
    if os.environ.get("LEAP_PL_COMPILE") == "0":
        return None
    if device.type not in _ways:
        _ways[device.type] = _way_that_works(device)
    return _ways[device.type]


def _way_that_works(device: torch.device) -> Way | None:
    """Return the fastest way to compile for ``device`` by which a small kernel computes what it is to compute."""
    reasons = []
    for way in (DirectKernel, _checked_each_time):
        try:
            _try(way, device)
        except Exception as error:  # what makes a compiler fail is no closed list
            reasons.append(next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)[:160])
            continue
        if reasons:
            warn_once(
                f"Gates are called by way of torch.compile each time, which takes longer: on {device.type} their "
                f"compiled code cannot be called directly with this torch ({reasons[0]})."
            )
        return way
    warn_once(
        f"The gates run uncompiled, many times slower: torch.compile does not work for {device.type} here "
        f"({reasons[-1]}). Install a C++ compiler (apt-get install g++), or Triton for a GPU."
    )
    return None


def _checked_each_time(kernel: Callable[..., Any], options: Mapping[str, Any]) -> Callable[..., Any]:
    return torch.compile(kernel, dynamic=True, options=dict(options))


def _try(way: Way, device: torch.device) -> None:
    """Make sure that kernels are computed by ``way``: when they are compiled, and after it for other numbers and sizes.

    Raises:
        RuntimeError: They are not. What compiling raises passes.
    """
    kernel, ones = way(_probe, OPTIONS), torch.ones(4, 8, device=device)
    with sizes_apart():
        for x in (ones, 3 * ones, torch.ones(3, 5, device=device)):
            added, taken_off = kernel(x, 2 * x)
            if not (torch.equal(added, 3 * x) and torch.equal(taken_off, -x)):
                raise RuntimeError("a compiled kernel computes something else")


def _probe(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x + y, x - y
