"""Compiles the accelerator of device.cpp, once for each version of torch and of its source."""

import fcntl
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths, library_paths

SOURCE = Path(__file__).with_name("device.cpp")


def compiler() -> str | None:
    """The C++ compiler; None: there is none."""
    return shutil.which(os.environ.get("CXX", "c++"))


def library() -> Path:
    """The compiled device, compiled if it has not been yet; one process compiles, others wait."""
    place = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "leap_pl-tests" / place
    folder.mkdir(parents=True, exist_ok=True)
    made, part = folder / "device.so", folder / "device.part"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # given back with the process, however that ends
        if not made.exists():
            words = [str(compiler()), "-shared", "-fPIC", "-O1", "-std=c++20", "-w", str(SOURCE), "-o", str(part)]
            words += [f"-I{path}" for path in include_paths()] + [f"-L{path}" for path in library_paths()]
            words += ["-ltorch_cpu", "-lc10", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
            done = subprocess.run(words, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            part.rename(made)
    return made
