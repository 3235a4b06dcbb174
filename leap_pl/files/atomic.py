"""Atomic writes of files and folders.

Everything leap_pl writes for the user goes through here: it is written to a temporary path in the destination's
folder, flushed to the disk, then renamed. A process killed at any moment leaves the old state or the new one.

The temporary path of a killed process, ``.NAME.….part``, is removed by the next process that writes NAME: a running
writer holds a lock on its temporary path, which is released when the process ends, however it ends.
"""

import errno
import fcntl
import glob
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from leap_pl.errors import UserError, listing, one_line
from leap_pl.inputs import records
from leap_pl.inputs import register as inputs

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2  # linux/fs.h
_NOT_SUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)  # by the kernel, or by this file system


@contextmanager
def atomic_file(path: str | Path, *, own: bool = False) -> Iterator[Path]:
    """Write a file atomically: yield a temporary path in its folder, which on success is flushed and becomes ``path``.

    A ``path`` that is a symbolic link is followed: the file that it points to is replaced, and the link stays.

    Args:
        path: File to write.
        own: The file belongs to the run that writes it, as a checkpoint does. It is replaced even if the run has
            resumed from it, and a symbolic link is replaced, not followed, since it points to an older checkpoint.

    Raises:
        UserError: The folder is not writable, the disk is full, or ``path`` is an input of the command or a device.
    """
    path = Path(path)
    try:
        place = path if own else followed(path)
        if place.exists() and not (place.is_file() or place.is_dir()):  # which root could replace
            raise UserError(f"{path} is a device or a pipe, which cannot be replaced by a file. Name another path.")
        register = None if own else inputs.current()
        if register is not None:
            register.check_file(inputs.real_place(place), path)
        place.parent.mkdir(parents=True, exist_ok=True)
        with _temporary(place) as temporary:
            _set_mode(temporary, 0o666)
            yield temporary
            _set_mode(temporary, 0o666)  # some writers put a file of their own there, that only its owner can read
            flush(temporary)
            if register is not None:
                register.check_file(inputs.real_place(place), path)
            temporary.replace(place)
            _confirm(place)
    except _write_errors() as error:
        raise UserError(_write_failure(path, error)) from error


@contextmanager
def atomic_folder(
    path: str | Path, *, force: bool = False, own: bool = False, verb: str | None = None
) -> Iterator[Path]:
    """Write a folder atomically: yield a temporary folder, which on success is flushed and becomes ``path``.

    A record of the files is added to it (:mod:`leap_pl.inputs.records`). A ``path`` that is a symbolic link is
    followed: the folder that it points to is replaced, and the link stays.

    Args:
        path: Folder to write.
        force: Replace a folder that is not empty, if leap_pl wrote everything in it.
        own: The folder belongs to the run that writes it, as for :func:`atomic_file`.
        verb: Command that the record names; by default the running one.

    Raises:
        UserError: :func:`check_folder` raises, the folder is not writable, or the disk is full.
    """
    path = Path(path)
    register = None if own else inputs.current()
    if verb is None and register is not None:
        verb = register.verb
    check_folder(path, force=force, own=own, verb=verb)
    try:
        place = path if own else followed(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        with (
            nullcontext() if register is None else register.replacing(inputs.real_path(place), path),
            _temporary(place, folder=True) as temporary,
        ):
            _set_mode(temporary, 0o777)
            yield temporary
            records.write_record(temporary, verb)
            for item in sorted(temporary.rglob("*")):
                if item.is_file():
                    _set_mode(item, 0o666)  # some writers create files that only their owner can read
                flush(item)
            flush(temporary)
            check_folder(path, force=force, own=own, verb=verb)  # hours may have passed
            _swap(temporary, place)
            _confirm(place)
    except _write_errors() as error:
        raise UserError(_write_failure(path, error)) from error


def check_folder(path: str | Path, *, force: bool = False, own: bool = False, verb: str | None = None) -> None:
    """Check that the folder ``path`` may be written or replaced; the arguments are those of :func:`atomic_folder`.

    Raises:
        UserError: ``path`` is a file, or a mount point; or a folder that is not empty, and ``force`` is false or
            leap_pl did not write everything in it; or it contains an input of the command, or the working directory.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file, and the output is a folder. Name another folder.")
    if not path.is_dir():
        return
    if _is_mounted(path):
        raise UserError(f"{path} is a mount point, which cannot be replaced as a whole. Name a folder in it.")
    try:
        inside = any(path.iterdir())
    except OSError as error:
        raise UserError(_write_failure(path, error)) from error
    if inside and not force:
        raise UserError(f"{path} is not empty. Name another folder, or add --force to replace it.")
    if own:
        return
    place, here = inputs.real_path(path), _working_directory()
    if here is not None and (here == place or place in here.parents):
        how = "is" if here == place else "is inside"
        raise UserError(f"{path} would be replaced, and the working directory {here} {how} it. Name another folder.")
    register = inputs.current()
    if register is not None:
        register.check_folder(place, path)
    strangers = records.strangers(place, verb)
    if strangers:
        found = listing(strangers, 8)
        if records.verb_of(place) == "fit":
            raise UserError(f"{path} contains the output of leap_pl fit: {found}. Name another folder.")
        raise UserError(
            f"{path} contains files that leap_pl did not write: {found}. --force replaces only what leap_pl wrote; "
            "name another folder, or move them away."
        )


def _is_mounted(path: Path) -> bool:
    """Return whether a file system, or a folder of one, is mounted at ``path``."""
    place = inputs.real_path(path)
    if os.path.ismount(place):
        return True
    try:  # Linux: folders of the same file system
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return False
    escaped = re.sub(rb"[ \t\n\\]", lambda found: b"\\%03o" % found[0][0], os.fsencode(place))
    return any(line.split(b" ", 5)[4:5] == [escaped] for line in lines)


def _working_directory() -> Path | None:
    try:
        return Path.cwd()
    except FileNotFoundError:  # it was removed
        return None


def followed(path: Path) -> Path:
    """Return the path that is written for ``path``: itself, or the target if it is a symbolic link.

    Raises:
        UserError: It is a link into a folder that does not exist, as on a disk that is not mounted.
        OSError: The links form a loop.
    """
    if not path.is_symlink():
        return path
    place = inputs.real_path(path)
    if place.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    if not place.parent.is_dir():
        raise UserError(
            f"{path} is a link to {place}, and there is no folder {place.parent}. Create it, or name another path."
        )
    return place


def atomic_link(path: Path, target: Path) -> None:
    """Make ``path`` a symbolic link to ``target`` in the same folder, atomically; it may be a folder before.

    Raises:
        OSError: The folder is not writable, or its file system does not support symbolic links.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target.name)
    if path.is_dir() and not path.is_symlink():  # which no rename replaces
        _swap(temporary, path)
        _remove(temporary)
    else:
        temporary.replace(path)
    _confirm(path)


def check_writable(folder: Path) -> None:
    """Check that files can be written in ``folder``; one that does not exist is created and removed again.

    Raises:
        UserError: The folder is not writable.
    """
    made = not inputs.exists(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _temporary(folder / "writable"):
            pass
        if made:  # a command that refuses to run should leave nothing behind, but folders that others may be using
            folder.rmdir()
    except OSError as error:
        raise UserError(_write_failure(folder, error)) from error


def remove_abandoned(folder: Path, name: str | None = None) -> None:
    """Remove the temporary files of killed processes from ``folder``, only those of ``name`` if it is given."""
    for item in folder.glob(f".{'*' if name is None else glob.escape(name)}.*.part"):
        with suppress(OSError):  # another process holds the lock or has removed it, or locks do not work here
            if item.is_symlink():
                item.unlink()
                continue
            descriptor = os.open(item, os.O_RDONLY if item.is_dir() else os.O_RDWR)  # NFS locks what is open to write
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(item)
            finally:
                os.close(descriptor)


@contextmanager
def _temporary(path: Path, *, folder: bool = False) -> Iterator[Path]:
    """Create a temporary file or folder in the folder of ``path``, locked while written and removed if it is left."""
    remove_abandoned(path.parent, path.name)
    prefix, suffix = f".{path.name}.", ".part"
    while True:
        if folder:
            name = tempfile.mkdtemp(prefix=prefix, suffix=suffix, dir=path.parent)
            descriptor = os.open(name, os.O_RDONLY)
        else:
            descriptor, name = tempfile.mkstemp(prefix=prefix, suffix=suffix, dir=path.parent)
        with suppress(OSError):  # where locks do not work, nothing is ever considered abandoned
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if Path(name).exists():  # else another process considered it abandoned before it was locked
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
    """Replace the folder ``path`` by ``new``; afterwards ``new`` may be the old folder.

    Both names change in one step where the system supports it (Linux, on most file systems). Elsewhere there
    is a moment between two renames at which the old folder is in the same parent folder, in ``.NAME.….old``.
    """
    if not path.exists():
        new.rename(path)
    elif not _exchange(new, path):
        _swap_in_two_steps(new, path)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; return False where the system does not support it.

    Raises:
        OSError: The exchange is supported, and failed.
    """
    import ctypes  # slow to load, as safetensors is, and not needed by --help

    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NOT_SUPPORTED:
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
        if path.exists():  # else the old folder could not be restored either, and must not be lost
            shutil.rmtree(holder, ignore_errors=True)


def flush(path: Path) -> None:
    """Flush the file or folder ``path`` to the disk; a folder only where the file system can flush folders."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def _confirm(path: Path) -> None:
    """Flush the folder of ``path``, in which it was just renamed.

    Raises:
        UserError: The disk failed to flush; ``path`` is in place nevertheless.
    """
    try:
        flush(path.parent)
    except OSError as error:
        raise UserError(
            f"{path} was written, but the disk does not confirm that it would survive a power cut "
            f"({error.strerror}). Check the disk, and write it again or copy it elsewhere."
        ) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _set_mode(path: Path, most: int) -> None:
    """Give ``path`` the rights of a new file; where the mount decides them, as on SMB, it has those already."""
    try:
        path.chmod(most & ~_umask())
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.ENOSYS):
            raise


def _write_errors() -> tuple[type[Exception], ...]:
    """Return the errors of writing: safetensors has its own, and is slow to load where nothing is written."""
    loaded = sys.modules.get("safetensors")
    return (OSError,) if loaded is None else (OSError, loaded.SafetensorError)


def _write_failure(path: Path, error: Exception) -> str:
    reason = getattr(error, "strerror", None) or one_line(error)
    in_the_way = next((parent for parent in path.parents if inputs.exists(parent) and not parent.is_dir()), None)
    if in_the_way is not None:
        reason = f"{in_the_way} is a file: Not a directory"
    return f"{path} could not be written ({reason}). Nothing was left behind; free space or name another path."
