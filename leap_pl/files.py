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
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from safetensors import SafetensorError

from leap_pl.errors import UserError, listing
from leap_pl.inputs import records
from leap_pl.inputs import register as inputs

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2  # linux/fs.h
_NO_SUCH_CALL = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)  # of the kernel, or of this file system


@contextmanager
def atomic_file(path: str | Path, *, own: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it is flushed and becomes ``path``.

    A ``path`` that is a symbolic link is followed: the file that it leads to is replaced, and the link stays.

    Args:
        path: To be written.
        own: It belongs to the run that writes it, as a checkpoint does, which the run may have resumed from: it is
            replaced though it was read, and not followed where it is a link, which then leads to an older one.

    Raises:
        UserError: The folder cannot be written, the disk is full, or ``path`` is what the command reads.
    """
    path = Path(path)
    try:
        place = path if own else followed(path)
        register = None if own else inputs.current()
        if register is not None:
            register.check_file(place, path)
        place.parent.mkdir(parents=True, exist_ok=True)
        with _temporary(place) as temporary:
            temporary.chmod(0o666 & ~_umask())
            yield temporary
            flush(temporary)
            if register is not None:
                register.check_file(place, path)
            temporary.replace(place)
            _confirm(place)
    except (OSError, SafetensorError) as error:
        raise UserError(_write_failure(path, error)) from error


@contextmanager
def atomic_folder(
    path: str | Path, *, force: bool = False, own: bool = False, verb: str | None = None
) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``; on success its files are flushed and it becomes ``path``.

    It is given a record of what was written (:mod:`leap_pl.inputs.records`). A ``path`` that is a symbolic link is
    followed: the folder that it leads to is replaced, and the link stays.

    Args:
        path: To be written.
        force: Replace a folder with something in it, if all of that is leap_pl's.
        own: As of :func:`atomic_file`.
        verb: What the record is to name; by default the command that runs.

    Raises:
        UserError: As :func:`check_folder`; or the folder cannot be written, or the disk is full.
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
            nullcontext() if register is None else register.replacing(place, path),
            _temporary(place, folder=True) as temporary,
        ):
            temporary.chmod(0o777 & ~_umask())
            yield temporary
            records.write_record(temporary, verb)
            for item in sorted(temporary.rglob("*")):
                if item.is_file():
                    item.chmod(0o666 & ~_umask())  # some writers make files that only their owner can read
                flush(item)
            flush(temporary)
            check_folder(path, force=force, own=own, verb=verb)  # hours may have passed
            _swap(temporary, place)
            _confirm(place)
    except (OSError, SafetensorError) as error:
        raise UserError(_write_failure(path, error)) from error


def check_folder(path: str | Path, *, force: bool = False, own: bool = False, verb: str | None = None) -> None:
    """Make sure that the folder ``path`` may be written, or replaced; arguments as of :func:`atomic_folder`.

    Raises:
        UserError: ``path`` is a file; or a folder with something in it, and ``force`` is false or some of it is not
            leap_pl's; or it holds what the command reads, or the folder that the command was called in.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file, and a folder is to be written there. Name another folder.")
    if not path.is_dir():
        return
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
        how = "is" if here == place else "lies in"
        raise UserError(f"{path} would be replaced, and {here} {how} it. Name another folder.")
    register = inputs.current()
    if register is not None:
        register.check_folder(place, path)
    strange = records.strangers(place, verb)
    if strange:
        found = listing(strange, 8)
        if records.verb_of(place) == "fit":
            raise UserError(f"{path} holds what leap_pl fit has learned: {found}. Name another folder.")
        raise UserError(
            f"{path} holds what leap_pl did not write: {found}. --force replaces only what leap_pl wrote; name another "
            "folder, or move them away."
        )


def _working_directory() -> Path | None:
    try:
        return Path.cwd()
    except FileNotFoundError:  # it was removed
        return None


def followed(path: Path) -> Path:
    """Where ``path`` is written: itself, or what it leads to if it is a symbolic link.

    Raises:
        UserError: It is a link into a folder that is not there, as on a disk that is not mounted.
        OSError: Links lead in a circle.
    """
    if not path.is_symlink():
        return path
    place = inputs.real_path(path)
    if place.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    if not place.parent.is_dir():
        raise UserError(
            f"{path} is a link to {place}, and there is no folder {place.parent}. Make that, or name another place."
        )
    return place


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
