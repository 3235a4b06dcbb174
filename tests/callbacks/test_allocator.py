"""Freed memory is kept, by the pages that the system has to hand out, and returned before the first step."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from leap_pl.callbacks import process
from leap_pl.callbacks.allocator import keep_freed_memory

# Blocks of 4 MiB, 1,024 pages each, are taken, written and freed in turn.
PROGRAM = """
import resource, sys
import torch
from leap_pl.callbacks.allocator import keep_freed_memory

kept = keep_freed_memory() if sys.argv[1] == "keep" else False
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
take = lambda: [torch.ones(2**20) for _ in range(8)]
for _ in range(4):  # small allocations come to lie in freed blocks at first, which are then taken anew elsewhere
    take()
before = faults()
for _ in range(4):
    take()
print(kept, faults() - before)
"""


def _huge_pages() -> str:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return setting.read_text() if setting.exists() else ""


def _clean() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}


def run(what: str) -> tuple[bool, int]:
    """Whether memory is kept, and the page faults of 128 MiB taken again."""
    command = [sys.executable, "-c", PROGRAM, what]
    told = subprocess.run(command, env=_clean(), check=True, capture_output=True, text=True).stdout
    kept, faults = told.split()
    return kept == "True", int(faults)


@pytest.mark.skipif("[always]" in _huge_pages(), reason="a page of this system is two MiB")
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="for glibc")
def test_freed_memory_is_kept_and_not_faulted_in_again() -> None:
    kept, faults = run("keep")
    not_kept, faults_as_it_comes = run("as it comes")
    assert (kept, not_kept) == (True, False)
    assert faults_as_it_comes >= 8 * 1024  # of 32 blocks, or glibc has changed and this is no longer needed
    assert faults < faults_as_it_comes / 2


# What is freed lies below what stays, so that nothing is returned by itself.
BEFORE_THE_FIRST_STEP = """
import torch
from leap_pl.callbacks import ProcessSettings

def resident():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) // 1024 for line in status if line.startswith("RssAnon"))

callback = ProcessSettings()
callback.setup(None, None, "fit")
start = resident()
blocks = [torch.ones(2**20) for _ in range(64)]
stays = torch.ones(2**18)
del blocks
freed = resident()
callback.on_fit_start(None, None)
print(freed - start, resident() - start)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="for glibc")
def test_what_was_freed_before_the_first_step_is_returned() -> None:
    told = subprocess.run(
        [sys.executable, "-c", BEFORE_THE_FIRST_STEP], env=_clean(), check=True, capture_output=True, text=True
    ).stdout
    kept, left = map(int, told.split())
    assert kept >= 200, told  # MiB of 256, or nothing was kept that could be returned
    assert left < 40, told


@pytest.mark.parametrize(
    "environment", [{"MALLOC_TRIM_THRESHOLD_": "131072"}, {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"}]
)
def test_settings_of_the_environment_stand(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert not keep_freed_memory()


def test_other_allocators_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not keep_freed_memory()


def test_memory_that_the_prior_has_freed_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the device, and that of the host which is locked for copies to it."""
    given: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: given.append("device"))
    monkeypatch.setattr(torch.accelerator, "empty_host_cache", lambda: given.append("host"), raising=False)
    monkeypatch.setattr(process, "release_freed_memory", lambda: given.append("process"))
    monkeypatch.setattr(process, "flush_denormals", lambda *_: None)
    process.ProcessSettings().on_fit_start(None, None)  # type: ignore[arg-type]
    assert given == ["process", "device", "host"]
