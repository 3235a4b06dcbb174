"""C++ kernels of packed weights: compiled when first used, and cached for later processes.

The compiler is called directly, with the paths of :mod:`torch.utils.cpp_extension`: its ``load`` needs ninja, and waits
forever for a process that was killed while it compiled.
"""

import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch

from leap_pl.errors import warn_once
from leap_pl.escape import say
from leap_pl.inputs.paths import expanded

SOURCES = [Path(__file__).with_name(name) for name in ("decode.cpp", "rows.h")]


@cache
def has_kernels() -> bool:
    """Return whether the operators of packed weights run compiled on a CPU; compile and load them at the first call.

    Without a compiler, and with ``LEAP_PL_COMPILE=0``, they run in plain torch.
    """
    if os.environ.get("LEAP_PL_COMPILE") == "0":
        return False
    try:
        made = library()
        try:
            torch.ops.load_library(made)
        except OSError:  # damaged on the disk, or of other system libraries than those here: compile it once more
            made.unlink(missing_ok=True)
            torch.ops.load_library(library())
    except Exception as error:  # a compiler, and a library that is loaded, can fail in any way
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)[:160]
        warn_once(
            f"The kernels of packed weights cannot be compiled here ({reason}): weights are dense in memory, and with "
            "--memory packed slower than dense ones. Install a C++ compiler (apt-get install g++)."
        )
        return False
    return True


def library() -> Path:
    """Return the compiled library, of this version of torch and of the sources; one process compiles, others wait.

    Raises:
        RuntimeError: There is no compiler, or it failed.
    """
    import fcntl  # not everywhere: without it, there are no kernels

    compiler = shlex.split(os.environ.get("CXX") or "c++")  # may be several words: ccache g++
    if not compiler or shutil.which(compiler[0]) is None:
        raise RuntimeError("no C++ compiler")
    said = subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout
    facts = f"{torch.__version__} {platform.machine()} {said}".encode()
    key = hashlib.sha256(facts + b"".join(source.read_bytes() for source in SOURCES)).hexdigest()[:16]
    home = _cache_home()
    made = (home or Path()) / "leap_pl" / "kernels" / key / "decode.so"
    if home is not None and _is_trusted(made) and _is_trusted(made.parent):
        return made
    try:
        if home is None:
            raise FileNotFoundError("this user has no home")
        made.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        made.parent.chmod(0o700)
        if not _is_trusted(made.parent):
            raise PermissionError(f"{made.parent} is another user's")
        lock = (made.parent / "lock").open("w")
    except OSError:  # of a home that may only be read, or is another user's: for this process alone
        made = Path(_temporary_folder().name) / made.name
        lock = (made.parent / "lock").open("w")
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released with the process, however that ends
        if not _is_trusted(made):
            made.unlink(missing_ok=True)
            _compile(compiler, made)
    return made


def _cache_home() -> Path | None:
    """Return the folder of the user's caches; None if there is none.

    A relative one is ignored, as its specification says: what lies in the working directory may be anyone's.
    """
    named = (expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache"), expanded("~/.cache"))
    return next((folder for folder in named if folder.is_absolute()), None)


def _is_trusted(path: Path) -> bool:
    """Return whether ``path`` is there and nobody but this user and root could have put it there: it is run."""
    try:
        found = path.lstat()
    except OSError:
        return False
    return found.st_uid in (0, os.getuid()) and not stat.S_ISLNK(found.st_mode) and not found.st_mode & 0o022


@cache
def _temporary_folder() -> tempfile.TemporaryDirectory[str]:
    """Return a folder that only this process uses, and that is removed at its end."""
    return tempfile.TemporaryDirectory(prefix="leap_pl-kernels-")


def _compile(compiler: list[str], made: Path) -> None:
    from torch.utils.cpp_extension import include_paths, library_paths  # slow to import

    say("compiling the kernels of packed weights, once for this version of torch: about half a minute", sys.stderr)
    # OpenMP is that of torch, which is loaded already: a second pool of threads would keep the cores of the first busy.
    words = [*compiler, "-shared", "-fPIC", "-O3", "-std=c++20", "-fopenmp", "-w", str(SOURCES[0])]
    words += [f"-I{path}" for path in include_paths()] + [f"-L{path}" for path in library_paths()]
    words += ["-ltorch_cpu", "-lc10", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    with tempfile.TemporaryDirectory(dir=made.parent) as folder:
        part = Path(folder) / made.name
        done = subprocess.run([*words, "-o", str(part)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(next((line for line in done.stderr.splitlines() if "error" in line), done.stderr))
        part.chmod(0o755)  # that of a linker goes by the umask, by which others of a group might write it
        part.rename(made)
