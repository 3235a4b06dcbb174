"""Setting of the CPU to flush denormal numbers (below 1e-38) to zero.

A nearly closed gate gives matrices of denormals, which Intel's processors multiply some twenty times slower.
"""

import ctypes
from pathlib import Path

import torch

_PAUSE_HARD = 2  # value of omp_pause_resource_t, OpenMP 5.0


def flushes_denormals() -> bool:
    """Return whether this thread flushes denormal numbers to zero."""
    return float(torch.full((), 1e-40, dtype=torch.float32, device="cpu") * 1.0) == 0


def flush_denormals(flush: bool = True) -> None:
    """Set whether this process flushes denormal numbers to zero, on all OpenMP threads.

    Nothing happens on processors without this mode. A thread inherits the setting of the thread that started it, so
    existing OpenMP threads are ended; new ones start when they are needed.
    """
    if not torch.set_flush_denormal(flush):
        return
    maps = Path("/proc/self/maps")
    mapped = maps.read_text(encoding="utf-8").splitlines() if maps.exists() else []
    # The sixth column, which may contain spaces.
    files = {Path(line.split(maxsplit=5)[5]) for line in mapped if "/" in line}
    for file in sorted(file for file in files if "omp" in file.name and ".so" in file.name and file.exists()):
        end_threads = getattr(ctypes.CDLL(str(file)), "omp_pause_resource_all", None)
        if end_threads is not None:
            end_threads(_PAUSE_HARD)
