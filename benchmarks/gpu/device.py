"""What a device is asked while it is measured: time, memory, and how many kernels a step starts."""

import gc
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.report import Row, wait_for

Result = TypeVar("Result")


def fitting(call: Callable[[], Result]) -> Result | None:
    """Return the result of ``call``, or None if the device has too little memory for it."""
    try:
        return call()
    except torch.OutOfMemoryError:
        pass  # outside, the error and the tensors of its frames are gone
    release()
    return None


def release() -> None:
    """Free the memory of what is no longer used: models with gates are in reference cycles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def clocked(call: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that ``call`` takes, by CUDA's events on a GPU, and by the clock on other devices."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    began.record()
    call()
    ended.record()
    ended.synchronize()
    return began.elapsed_time(ended) / 1e3


def launches(take: Callable[[], None], device: torch.device) -> Row:
    """Count the kernels that a step starts on a GPU; elsewhere the operators that the host dispatches.

    Returns nothing where the profiler sees no kernel, as on a machine without access to its counters.
    """
    if device.type != "cuda":
        with _Dispatches() as seen:
            take()
        return {"operators": seen.count}
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        take()
        wait_for(device)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "trace.json")
        trace.export_chrome_trace(str(file))  # by far the fastest way to thousands of events
        events = json.loads(file.read_text(encoding="utf-8"))["traceEvents"]
    count = sum(event.get("cat") == "kernel" for event in events)
    return {"launches": count} if count else {}


class _Dispatches(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def allocated(device: torch.device) -> int:
    """Return the bytes that tensors hold on a GPU; 0 on other devices."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def reset_peak(device: torch.device) -> None:
    """Reset the peak of :func:`peak_allocated`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_allocated(device: torch.device) -> int | None:
    """Return the largest number of bytes that tensors held on a GPU; None on other devices."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
