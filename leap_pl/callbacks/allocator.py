"""Settings of glibc's allocator: freed memory is kept for the next step, and returned before the first one.

glibc returns large freed blocks to the system. Every training step allocates and frees a gradient and a masked weight
for each gate, and the system would clear their pages each time: on a CPU that took longer than computing them.
dev/performance.md has measurements. What was freed before the first step, in making the prior, no step may need.
"""

import ctypes
import os
import platform

# Parameters of mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 32 * 2**20  # bytes; glibc takes no higher one


def keep_freed_memory() -> bool:
    """Make this process keep freed blocks of up to 32 MiB, and return whether it does.

    Its memory then stays at the peak of such blocks, and does not rise above it. With another allocator than glibc's,
    or if the environment configures glibc's (``MALLOC_…_`` or ``GLIBC_TUNABLES``), nothing is changed and False is
    returned: the user's configuration has priority.
    """
    theirs = any(name.startswith("MALLOC_") and name.endswith("_") for name in os.environ)
    if theirs or "GLIBC_TUNABLES" in os.environ or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # -1 is converted to the largest size: never trim. Setting either also disables glibc's dynamic adjustment of both.
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))


def release_freed_memory() -> bool:
    """Return freed memory to the system once, whatever :func:`keep_freed_memory` has set, and say whether any was.

    With another allocator than glibc's nothing is returned.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    return bool(ctypes.CDLL(None).malloc_trim(0))
