"""Compilation of the gates' kernels, with eager execution as fallback.

The forward and the backward pass of a gate are a few lines of tensor code over flat tensors. torch.compile fuses each
into one pass over memory (C++ on a CPU, Triton on a GPU). Both kernels take every number that changes between steps as
a tensor and every length as a symbol, so that one compilation suffices for the whole run. Without a compiler the same
code runs eagerly, with the same noise, many times slower.
"""

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import update_wrapper
from typing import Any, Generic, TypeVar

import torch

from leap_pl.errors import warn_once
from leap_pl.kernels.direct import DirectKernel
from leap_pl.kernels.inductor import many_variants, sizes_apart

Result = TypeVar("Result")

# Multiply and add as one instruction with one rounding (FMA): a gate on a CPU takes a third less time.
FLAGS = "fast"
if sys.platform == "linux" and torch.backends.cpu.get_cpu_capability() == "AVX512":
    # To reinterpret a number as bits, torch stores a vector, copies it and loads it again. GCC prefers half the vector
    # width on Intel CPUs and copies in two halves, which stalls the load: gates took twice as long. Inductor has no
    # separate option for this flag.
    FLAGS += " -mprefer-vector-width=512"
# Sizes need no check by the generated code: a call of other sizes is of another kind, or checked by torch.compile.
OPTIONS = {"cpp.enable_floating_point_contract_flag": FLAGS, "size_asserts": False}
# For kernels whose results are to be those of eager execution: multiplication and addition round apart.
APART = {**OPTIONS, "cpp.enable_floating_point_contract_flag": FLAGS.replace("fast", "off")}

# Function of the arguments of several calls, and of those that all share, which returns the calls' results.
Fused = Callable[[Sequence[tuple[Any, ...]], tuple[Any, ...]], list[Any]]
Backend = Callable[[Callable[..., Any], Mapping[str, Any], int | None], Fused]

_seconds: dict[str, float] = {}
_backends: dict[str, Backend | None] = {}  # by device type; None: eager


class Compiled(Generic[Result]):
    """Kernel that is compiled for the device of its first argument at its first call."""

    def __init__(self, kernel: Callable[..., Result], options: Mapping[str, Any], varying: int | None) -> None:
        """Wrap ``kernel``; see :func:`compiled`."""
        update_wrapper(self, kernel)
        self._kernel, self._options, self._varying = kernel, options, varying
        self._fused: dict[Backend, Fused] = {}
        self._timed: set[str] = set()

    def __call__(self, *arguments: Any) -> Result:
        """Return the result of the kernel."""
        return self.each([arguments])[0]

    def each(self, calls: Sequence[tuple[Any, ...]], shared: tuple[Any, ...] = ()) -> list[Result]:
        """Return the results of several calls on one device, such as those of the weights of a decoder block.

        Args:
            calls: Arguments of each call, a tensor first.
            shared: Arguments of all calls, which come after their own.
        """
        device = calls[0][0].device
        backend = _backend(device)
        if backend is None:
            return [self._kernel(*arguments, *shared) for arguments in calls]
        if backend not in self._fused:
            self._fused[backend] = backend(self._kernel, self._options, self._varying)
        fused = self._fused[backend]
        if device.type in self._timed:
            return fused(calls, shared)
        start = time.perf_counter()
        results = fused(calls, shared)
        _seconds[f"{self._kernel.__name__}[{device.type}]"] = time.perf_counter() - start
        self._timed.add(device.type)  # only now: after a failed compilation the next call compiles again
        return results


def compiled(
    kernel: Callable[..., Result], options: Mapping[str, Any] = OPTIONS, varying: int | None = None
) -> Compiled[Result]:
    """Compile ``kernel`` for the device of its first argument at its first call.

    Set ``LEAP_PL_COMPILE=0`` to run everything eagerly.

    Args:
        kernel: Function of positional arguments, a tensor first.
        options: Options of inductor.
        varying: Number of arguments, counted from the first, that determine sizes, strides and dtypes of all that are
            not shared (:meth:`Compiled.each`); only these and the shared ones are looked at, which is faster.
            None: all are looked at.
    """
    return Compiled(kernel, options, varying)


def rows(tensor: torch.Tensor) -> torch.Tensor:
    """Return ``tensor`` in two dimensions and not as a view: the shape of a view's base would be compiled in."""
    return (tensor if tensor.ndim == 2 else tensor.reshape(-1, tensor.shape[-1] if tensor.ndim else 1)).data


def scalar(value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return a number as a scalar tensor on the CPU, whatever the default device.

    Kernels take such a scalar as an argument on every device: it is not copied there, so the host does not wait.
    """
    return torch.tensor(value, dtype=dtype, device="cpu")


def compile_seconds() -> dict[str, float]:
    """Return the time of each kernel's first call, including compilation: ``name[device]`` → seconds."""
    return dict(_seconds)


def can_compile(device: torch.device) -> bool:
    """Return whether kernels for ``device`` are compiled; tested once with a small kernel."""
    return _backend(device) is not None


def _backend(device: torch.device) -> Backend | None:
    if os.environ.get("LEAP_PL_COMPILE") == "0":
        return None
    if device.type not in _backends:
        _backends[device.type] = _find_backend(device)
    return _backends[device.type]


def _find_backend(device: torch.device) -> Backend | None:
    """Return the fastest backend that computes a small kernel correctly on ``device``."""
    reasons = []
    # Direct calls only where the tests run them: code for another device is called as torch calls it.
    backends: tuple[Backend, ...] = (DirectKernel, _torch_compile) if device.type == "cpu" else (_torch_compile,)
    for backend in backends:
        try:
            _try(backend, device)
        except Exception as error:  # a compiler can fail with any exception
            reasons.append(next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)[:160])
            continue
        if reasons:
            warn_once(
                f"Gates are called through torch.compile each time, which is slower: on {device.type} their "
                f"compiled code cannot be called directly with this version of torch ({reasons[0]})."
            )
        return backend
    warn_once(
        f"The gates run uncompiled, many times slower: torch.compile does not work for {device.type} here "
        f"({reasons[-1]}). Install a C++ compiler (apt-get install g++), or Triton for a GPU."
    )
    return None


def _torch_compile(kernel: Callable[..., Any], options: Mapping[str, Any], _: int | None = None) -> Fused:
    fused = torch.compile(kernel, dynamic=True, options=dict(options))

    def each(calls: Sequence[tuple[Any, ...]], shared: tuple[Any, ...] = ()) -> list[Any]:
        with sizes_apart(), many_variants():  # any call may be the first of a kind, which compiles
            return [fused(*arguments, *shared) for arguments in calls]

    return each


def _try(backend: Backend, device: torch.device) -> None:
    """Check that ``backend`` computes kernels correctly: when it compiles, and then for other values and sizes.

    Raises:
        RuntimeError: A result is wrong. Other errors of compiling are raised unchanged.
    """
    kernel, ones = backend(_probe, OPTIONS, 1), torch.ones(4, 8, device=device)
    for x in (ones, 3 * ones, torch.ones(3, 5, device=device)):
        ((added, subtracted),) = kernel([(x,)], (2 * x,))
        if not (torch.equal(added, 3 * x) and torch.equal(subtracted, -x)):
            raise RuntimeError("a compiled kernel computes a wrong result")


def _probe(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x + y, x - y
