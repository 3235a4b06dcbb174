"""Files and folders that are there whole or not at all.

Everything leap_pl writes for the user goes through here: written beside its destination under a name of
its own, flushed to the disk, then renamed. A process killed at any moment leaves the old state or the new.

What such a process leaves beside it, ``.NAME.….part``, is removed by the next one that writes NAME: a living
writer holds a lock on its own, which ends with it, however it ends.
"""

import ctypes
import errno
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from leap_pl.errors import UserError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2  # linux/fs.h
_NO_SUCH_CALL = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)  # of the kernel, or of this file system


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it is flushed and becomes ``path``.

    Raises:
        UserError: The folder cannot be written, or the disk is full.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _temporary(path) as temporary:
            temporary.chmod(0o666 & ~_umask())
            yield temporary
            flush(temporary)
            temporary.replace(path)
            _confirm(path)
    except (OSError, SafetensorError) as error:
        raise UserError(_write_failure(path, error)) from error


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
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _temporary(path, folder=True) as temporary:
            temporary.chmod(0o777 & ~_umask())
            yield temporary
            for item in sorted(temporary.rglob("*")):
                if item.is_file():
                    item.chmod(0o666 & ~_umask())  # some writers make files that only their owner can read
                flush(item)
            flush(temporary)
            _swap(temporary, path)
            _confirm(path)
    except (OSError, SafetensorError) as error:
        raise UserError(_write_failure(path, error)) from error


def check_apart(folder: str | Path, inputs: Iterable[object]) -> None:
    """Make sure that replacing ``folder`` would not take away what the command reads, nor where it was called.

    Args:
        folder: To be written, maybe by force.
        inputs: Names of files and folders; what is no name, or of nothing that is there, is passed over.

    Raises:
        UserError: One of them lies in ``folder``, or is ``folder``.
    """
    place = Path(folder).resolve()
    for name in (Path.cwd(), *inputs):
        if not isinstance(name, str | Path) or not Path(name).expanduser().exists():
            continue
        path = Path(name).expanduser().resolve()
        if place.is_dir() and (path == place or place in path.parents):
            how = "is" if path == place else "lies in"
            raise UserError(f"{folder} would be replaced, and {name} {how} it. Name another folder.")


def atomic_link(path: Path, target: Path) -> None:
    """Make ``path`` a symbolic link to ``target`` in the same folder; there is always the old one or the new.

    Raises:
        OSError: The folder cannot be written, or its file system has no such links.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target.name)
    temporary.replace(path)
    _confirm(path)


def check_writable(folder: Path) -> None:
    """Make sure that files can be written in ``folder``; one that is not there is made, and taken away again.

    Raises:
        UserError: They cannot.
    """
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _temporary(folder / "writable"):
            pass
        if made:  # what refuses to run should leave nothing behind
            folder.rmdir()
    except OSError as error:
        raise UserError(_write_failure(folder, error)) from error


def remove_abandoned(folder: Path, name: str | None = None) -> None:
    """Remove what killed processes left half-written in ``folder``, of ``name`` alone if it is given."""
    for item in folder.glob(f".{'*' if name is None else glob.escape(name)}.*.part"):
        with suppress(OSError):  # it is another process's to remove, or locks do not work here
            if item.is_symlink():
                item.unlink()
                continue
            descriptor = os.open(item, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(item)
            finally:
                os.close(descriptor)


@contextmanager
def _temporary(path: Path, *, folder: bool = False) -> Iterator[Path]:
    """A new file or folder beside ``path``, locked while it is written, and gone afterwards if it is still there."""
    remove_abandoned(path.parent, path.name)
    prefix, suffix = f".{path.name}.", ".part"
    while True:
        if folder:
            name = tempfile.mkdtemp(prefix=prefix, suffix=suffix, dir=path.parent)
            descriptor = os.open(name, os.O_RDONLY)
        else:
            descriptor, name = tempfile.mkstemp(prefix=prefix, suffix=suffix, dir=path.parent)
        with suppress(OSError):  # without locks nothing is ever taken for abandoned
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if Path(name).exists():  # else another process took it for abandoned before it was locked
            break
        os.close(descriptor)
    try:
        yield Path(name)
    finally:
        _remove(Path(name))
        os.close(descriptor)


def _remove(item: Path) -> None:
    if item.is_dir() and not item.is_symlink():
        shutil.rmtree(item, ignore_errors=True)
    else:
        with suppress(OSError):
            item.unlink()


def _swap(new: Path, path: Path) -> None:
    """Put the folder ``new`` in the place of ``path``; afterwards ``new`` may be what was there.

    Both names change in one step where the system can do that (Linux, on most file systems). Elsewhere there
    is a moment between two renames at which the old folder lies beside, in ``.NAME.….old``.
    """
    if not path.exists():
        new.rename(path)
    elif not _exchange(new, path):
        _swap_in_two_steps(new, path)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; False where the system cannot.

    Raises:
        OSError: It can, and failed.
    """
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NO_SUCH_CALL:
        return False
    raise OSError(number, os.strerror(number), str(other))


def _swap_in_two_steps(new: Path, path: Path) -> None:
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


def flush(path: Path) -> None:
    """Have what ``path`` holds written to the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _confirm(path: Path) -> None:
    """Flush the folder in which ``path`` has just got its name.

    Raises:
        UserError: The disk failed at that; ``path`` stands all the same.
    """
    try:
        flush(path.parent)
    except OSError as error:
        if error.errno in _NO_SUCH_CALL:  # a file system that flushes no folders
            return
        raise UserError(
            f"{path} was written, but the disk does not confirm that it would outlast a power cut "
            f"({error.strerror}). Check the disk, and write it again or copy it elsewhere."
        ) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _write_failure(path: Path, error: Exception) -> str:
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())
    in_the_way = next((parent for parent in path.parents if parent.exists() and not parent.is_dir()), None)
    if in_the_way is not None:
        reason = f"{in_the_way} is a file: Not a directory"
    return f"{path} could not be written ({reason}). Nothing was left behind; free space or name another place."
