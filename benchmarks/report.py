"""What every benchmark shares: the machine's name, a Markdown table, a JSON file, interleaved timing."""

import json
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from leap_pl.files import atomic_file
from leap_pl.masks.mask_set import installed_versions

Row = dict[str, Any]


def machine() -> dict[str, Any]:
    """Processor, accelerator, threads and versions that a figure belongs to."""
    found: dict[str, Any] = {"cpu": _cpu(), "threads": torch.get_num_threads(), "versions": installed_versions()}
    if torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(), "driver": _driver(), "cuda": torch.version.cuda}
    return found


def _driver() -> str | None:
    """Version of the GPU's driver, as its kernel module says."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        text = ""
    named = re.search(r"Kernel Module.*?(\d+(?:\.\d+)+)", text)
    if named:
        return named[1]
    try:
        words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        said = subprocess.run(words, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return said.split("\n")[0].strip() or None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    named = {key.strip(): value.strip() for key, value in facts.items()}
    matrix = ", ".join(flag for flag in ("avx512_bf16", "amx_bf16") if flag in named.get("flags", "").split())
    return f"{named.get('model name', platform.machine())}{f' ({matrix})' if matrix else ''}"


def interleaved(
    variants: Mapping[str, Callable[[], object]],
    repeats: int,
    device: torch.device,
    warm_up: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each call, the variants taking turns, so that a busy spell of the machine meets all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(warm_up + repeats):
        for name, call in variants.items():
            wait_for(device)
            start = clock()
            call()
            wait_for(device)
            if turn >= warm_up:
                seconds[name].append(clock() - start)
    return seconds


def ratio(seconds: Mapping[str, list[float]], above: str, below: str) -> float:
    """Median over the turns of the ratio within one turn: what the two share, a slow machine, cancels."""
    return statistics.median(a / b for a, b in zip(seconds[above], seconds[below], strict=True))


def wait_for(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def one_line(error: BaseException) -> str:
    """The class of an error, and the beginning of its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table; floats with four significant digits."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
    lines += ["| " + " | ".join(_cell(row.get(key)) for key in keys) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def sequences(tokens: int, seq_length: int) -> tuple[int, int]:
    """Return the number and length of sequences of at most ``seq_length`` that have exactly so many ``tokens``.

    Raises:
        SystemExit: There are none, and what is reported would be of other tokens than what is computed.
    """
    length = min(tokens, seq_length)
    if length < 1 or tokens % length:
        raise SystemExit(f"{tokens} tokens are no whole number of sequences of {seq_length}. Give a multiple of that.")
    return tokens // length, length


def finish(rows: Sequence[Row], output: str | None, **facts: Any) -> None:
    """Print the table, and write rows and facts to the JSON file ``output`` if there is one."""
    about = {"machine": machine(), **facts}
    print(table(rows))
    print(json.dumps(about, indent=2))
    write(rows, output, about)


def write(rows: Sequence[Row], output: str | None, about: Mapping[str, Any]) -> None:
    """Write rows and facts to the JSON file ``output`` if there is one."""
    if output:
        with atomic_file(output) as temporary:
            temporary.write_text(json.dumps({"rows": list(rows), **about}, indent=2) + "\n", encoding="utf-8")
