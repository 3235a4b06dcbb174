"""Numbers too small to be normal (below 1e-38) are taken for 0 by the CPU.

A gate that is nearly shut makes matrices of them, and Intel's processors multiply such some twenty times slower.
"""

import ctypes
from pathlib import Path

import torch

_PAUSE_HARD = 2  # of omp_pause_resource_t, OpenMP 5.0


def flush_denormals(flush: bool = True) -> None:
    """Let this process take denormal numbers for 0, or no longer do so, on all of OpenMP's threads.

    Nothing happens where the processor cannot. A thread has the setting of the one that started it, so that those
    which are there already are ended; new ones start when they are needed.
    """
    if not torch.set_flush_denormal(flush):
        return
    maps = Path("/proc/self/maps")
    mapped = maps.read_text(encoding="utf-8").splitlines() if maps.exists() else []
    # The sixth column, which may hold spaces.
    files = {Path(line.split(maxsplit=5)[5]) for line in mapped if "/" in line}
    for file in sorted(file for file in files if "omp" in file.name and ".so" in file.name and file.exists()):
        end_threads = getattr(ctypes.CDLL(str(file)), "omp_pause_resource_all", None)
        if end_threads is not None:
            end_threads(_PAUSE_HARD)
