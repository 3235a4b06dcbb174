"""Files and folders that are there whole or not at all.

Everything leap_pl writes for the user goes through here: written beside its destination under a name of
its own, flushed to the disk, then renamed. A process killed at any moment leaves the old state or the new.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from leap_pl.errors import UserError


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it is flushed and becomes ``path``.

    Raises:
        UserError: The folder cannot be written, or the disk is full.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        temporary.chmod(0o666 & ~_umask())
        yield temporary
        _flush(temporary)
        temporary.replace(path)
        _flush(path.parent)
    except (OSError, SafetensorError) as error:
        raise UserError(_write_failure(path, error)) from error
    finally:
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink()


@contextmanager
def atomic_folder(path: str | Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``; on success its files are flushed and it becomes ``path``.

    Raises:
        UserError: ``path`` is a file, or a folder with something in it and ``force`` is false; or the
            folder cannot be written, or the disk is full.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file, and a folder is to be written there. Name another folder.")
    if not force and path.is_dir() and any(path.iterdir()):
        raise UserError(f"{path} is not empty. Name another folder, or add --force to replace it.")
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
        temporary.chmod(0o777 & ~_umask())
        yield temporary
        for item in sorted(temporary.rglob("*")):
            if item.is_file():
                item.chmod(0o666 & ~_umask())  # some writers make files that only their owner can read
            _flush(item)
        _swap(temporary, path)
        _flush(path.parent)
    except (OSError, SafetensorError) as error:
        raise UserError(_write_failure(path, error)) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _swap(new: Path, path: Path) -> None:
    """Put the folder ``new`` in the place of ``path``; what was there goes only after the new one stands."""
    if not path.exists():
        new.rename(path)
        return
    holder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
    old = holder / "was"
    try:
        path.rename(old)
        new.rename(path)
    except BaseException:
        if old.exists() and not path.exists():
            old.rename(path)
        raise
    finally:
        if path.exists():  # else the old folder could not be put back either, and must not be lost
            shutil.rmtree(holder, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _write_failure(path: Path, error: Exception) -> str:
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())
    return f"{path} could not be written ({reason}). Nothing was left behind; free space or name another place."
