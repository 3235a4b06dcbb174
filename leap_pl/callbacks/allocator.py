"""Memory that was freed is kept for the next step, where C's allocator is glibc's.

glibc gives large freed blocks back to the system. Every step of learning takes and frees a gradient and a masked
weight of each gate, and the system would clear each of their pages anew: on a CPU that took longer than to compute
them. docs/performance.md measures it.
"""

import ctypes
import os
import platform

# Of mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 32 * 2**20  # bytes; glibc takes no higher one


def keep_freed_memory() -> bool:
    """Let this process keep what it frees, in blocks of up to 32 MiB; returns whether it does.

    What the process holds then never falls below its peak of such blocks, and does not rise above it. Nothing is done,
    and False returned, on other allocators than glibc's, and where the environment sets glibc's (``MALLOC_…_`` or
    ``GLIBC_TUNABLES``): whoever did so knows what they want.
    """
    theirs = any(name.startswith("MALLOC_") and name.endswith("_") for name in os.environ)
    if theirs or "GLIBC_TUNABLES" in os.environ or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # -1 becomes the largest size there is: never trim. Setting either also ends glibc's own adjustment of both.
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))
