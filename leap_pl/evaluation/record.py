"""Result files: measurements with their subject, protocol and environment, reproducible from the same inputs."""

import json
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

from leap_pl.errors import UserError
from leap_pl.files import atomic_file, followed
from leap_pl.inputs.paths import expanded
from leap_pl.inputs.plain_values import plain, read_plain_json, shown
from leap_pl.inputs.register import note_input

FORMAT = "leap_pl.evaluation"
FORMAT_VERSION = 1
UNFINISHED = "unfinished"


def check_place(path: str | Path) -> None:
    """Check that a result can be written to ``path``, before hours of computation.

    Raises:
        UserError: If ``path`` is a folder, a device, a pipe or a file that is no result, or its folder cannot be
            created or written.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"--output {path} is a folder. Name a file in it: --output {path / 'result.json'}")
    if path.exists() and not path.is_file():
        raise UserError(f"--output {path} is no regular file. Name another; figures are also printed.")
    if path.is_file() and path.stat().st_size and not _is_result(path):
        raise UserError(f"--output {path} exists and is no result of leap_pl evaluate. Name another file.")
    try:
        parents = followed(path).absolute().parents
    except OSError as error:
        raise UserError(f"--output {path} cannot be written ({error.strerror}). Name another place.") from error
    folder = next(parent for parent in parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        reason = "is not writable" if folder.is_dir() else "is a file"
        raise UserError(f"--output {path} cannot be written: {folder} {reason}. Name another place.")


def _is_result(path: Path) -> bool:
    """Return whether the file ``path``, which may be of any size, begins as a result does."""
    with path.open("rb") as file:
        begins = file.read(1_000_000).decode(errors="replace")
    return begins.lstrip().startswith("{") and re.search(rf'"format"\s*:\s*"{re.escape(FORMAT)}"', begins) is not None


def may_replace(path: str | Path) -> bool:
    """Return whether figures that something came after may be written to ``path``: no finished result is there."""
    try:
        return (
            not Path(path).exists()
            or not Path(path).stat().st_size
            or bool(read_plain_json(Path(path)).get(UNFINISHED))
        )
    except (OSError, ValueError, AttributeError):
        return False


def write_result(path: str | Path, result: dict[str, Any]) -> None:
    """Write ``result`` as JSON with one line for each of its keys, atomically.

    Raises:
        UserError: If the file cannot be written.
    """
    encoder = json.JSONEncoder(sort_keys=True, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    lines = (encoder.encode({key: value}).removeprefix("{").removesuffix("}") for key, value in plain(result).items())
    with atomic_file(path) as temporary:
        temporary.write_text("{\n" + ",\n".join(sorted(lines)) + "\n}\n", encoding="utf-8")


def read_result(path: str | Path) -> dict[str, Any]:
    """Return the contents of the result file ``path``, by the schema of :mod:`leap_pl.evaluation.result_schema`.

    Raises:
        UserError: If ``path`` does not exist, is larger than 16 MiB, not a result file, of a newer format, or damaged.
    """
    from leap_pl.evaluation.result_schema import checked_result

    path = expanded(path)
    note_input(path)
    try:
        result = read_plain_json(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{path} cannot be read as a result file ({reason}). Evaluate again with --output.") from error
    if not isinstance(result, dict) or result.get("format") != FORMAT:
        raise UserError(f"{path} is JSON but no result of leap_pl evaluate. Give a file written with --output.")
    version = result.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path} is a result of format version {shown(str(version), 20)}, and this leap_pl reads "
            f"{FORMAT_VERSION}. Update leap_pl, or evaluate again."
        )
    try:
        return checked_result(result)
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}. Evaluate again with --output.") from error


def environment(device: str) -> dict[str, Any]:
    """Return package versions, the commit of a source checkout, and the hardware."""
    from importlib.metadata import version

    from leap_pl.masks.mask_set import installed_versions

    return {
        "versions": installed_versions()
        | {name: version(name) for name in ("lm_eval", "tokenizers")}
        | {"python": platform.python_version()},
        "commit": commit(),
        "hardware": _hardware(device),
    }


def commit() -> str | None:
    """Return the commit that leap_pl runs from, with ``+changes`` if files differ; None if it is installed."""
    package = Path(__file__).resolve().parents[1]
    try:
        root = _git(package, "rev-parse", "--show-toplevel")
        # A virtual environment can be inside another project's checkout.
        if Path(root) != package.parent:
            return None
        changes = "+changes" if _git(package, "status", "--porcelain", "--untracked-files=no") else ""
        return _git(package, "rev-parse", "HEAD") + changes
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _hardware(device: str) -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {
        "device": device,
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if device.startswith("cuda"):
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
