"""Files and folders are there whole or not at all."""

import errno
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError
from written_files import NEW, contents, full, one_line, write_folder

from leap_pl.errors import UserError
from leap_pl.files import atomic as files
from leap_pl.files import atomic_file, atomic_folder, atomic_link, remove_abandoned

# -- files ------------------------------------------------------------------------------------------------


def test_a_file_appears_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folders" / "mask.safetensors"
    with atomic_file(path) as temporary:
        assert temporary.parent == path.parent
        temporary.write_text("whole")
        assert not path.exists()
    assert contents(path.parent) == {"mask.safetensors": "whole"}


def test_a_file_is_replaced_and_readable_as_the_umask_says(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    before = os.umask(0o027)
    try:
        with atomic_file(path) as temporary:
            temporary.write_text("new")
            assert path.read_text() == "old"
    finally:
        os.umask(before)
    assert contents(tmp_path) == {"a": "new"}
    assert path.stat().st_mode & 0o777 == 0o640
    with atomic_file(path) as temporary:  # by a writer that puts a file of its own there, as safetensors does
        (tmp_path / "own").write_text("newer")
        (tmp_path / "own").chmod(0o600)
        (tmp_path / "own").replace(temporary)
    assert contents(tmp_path) == {"a": "newer"}
    assert path.stat().st_mode & 0o777 == 0o666 & ~before


def test_a_runs_own_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    """``last.ckpt`` leads to an earlier checkpoint, a file or a folder, which stays as it is."""
    for name in ("step=2.ckpt", "step=2"):
        (tmp_path / f"last of {name}").symlink_to(name)
    (tmp_path / "step=2.ckpt").write_text("two")
    (tmp_path / "step=2").mkdir()
    (tmp_path / "step=2" / "part").write_text("two")
    with atomic_file(tmp_path / "last of step=2.ckpt", own=True) as temporary:
        temporary.write_text("three")
    with atomic_folder(tmp_path / "last of step=2", own=True, force=True, verb="fit") as temporary:
        (temporary / "part").write_text("three")
    assert not any(path.is_symlink() for path in tmp_path.iterdir())
    found = contents(tmp_path)
    assert (found["last of step=2.ckpt"], found["step=2.ckpt"]) == ("three", "two")
    assert (found["last of step=2/part"], found["step=2/part"]) == ("three", "two")


@pytest.mark.parametrize("kind", [KeyError, KeyboardInterrupt, UserError])
def test_a_file_whose_writer_fails_is_as_it_was(tmp_path: Path, kind: type[BaseException]) -> None:
    """The error comes through as it is; an OSError would become a UserError."""
    path = tmp_path / "a"
    path.write_text("old")

    def write() -> None:
        with atomic_file(path) as temporary:
            temporary.write_text("hal")
            raise kind("stop")

    with pytest.raises(kind, match="stop"):
        write()
    assert contents(tmp_path) == {"a": "old"}


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("disk\nfull")])
def test_a_writer_that_finds_the_disk_full_says_so(tmp_path: Path, error: Exception) -> None:
    path = tmp_path / "a"

    def write() -> None:
        with atomic_file(path) as temporary:
            temporary.write_text("hal")
            raise error

    with pytest.raises(UserError) as caught:
        write()
    one_line(caught, path, "No space left" if isinstance(error, OSError) else "disk full")
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("old", [None, "old"])
def test_a_full_disk_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, old: str | None
) -> None:
    path = tmp_path / "a"
    if old:
        path.write_text(old)
    if step == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    else:
        monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(UserError) as caught, atomic_file(path) as temporary:
        temporary.write_text("new")
    one_line(caught, path, "No space left on device")
    assert contents(tmp_path) == ({"a": old} if old else {})


def test_a_file_is_flushed_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    replace, fsync = Path.replace, os.fsync
    monkeypatch.setattr(os, "fsync", lambda d: (order.append("flush"), fsync(d))[1])
    monkeypatch.setattr(Path, "replace", lambda a, b: (order.append("rename"), replace(a, b))[1])
    with atomic_file(tmp_path / "a") as temporary:
        temporary.write_text("x")
    assert order[:2] == ["flush", "rename"]


# -- disks that do not confirm ----------------------------------------------------------------------------


@pytest.mark.parametrize("writer", ["file", "folder"])
def test_a_disk_that_fails_after_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str) -> None:
    """The new one stands, so the message must not say that nothing was left behind."""
    path, fsync = tmp_path / "out", os.fsync

    def flush(descriptor: int) -> None:
        if os.path.samestat(os.fstat(descriptor), tmp_path.stat()):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", flush)
    with pytest.raises(UserError) as caught:
        if writer == "file":
            with atomic_file(path) as temporary:
                temporary.write_text("new")
        else:
            write_folder(path)
    message = str(caught.value)
    assert f"{path} was written, but the disk does not confirm" in message
    assert "\n" not in message
    assert contents(tmp_path) == ({"out": "new"} if writer == "file" else {"out": None} | under("out", NEW))


def under(folder: str, entries: dict[str, str | None]) -> dict[str, str | None]:
    return {f"{folder}/{name}": text for name, text in entries.items()}


def test_a_file_system_that_flushes_no_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flush(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "fsync", flush)
    with atomic_file(tmp_path / "a") as temporary:
        temporary.write_text("new")
    with atomic_folder(tmp_path / "b") as temporary:
        (temporary / "c").mkdir()
        (temporary / "c" / "d").write_text("new")
    found = contents(tmp_path)
    assert (found["a"], found["b/c/d"]) == ("new", "new")


# -- links, and what killed processes leave ----------------------------------------------------------------


def test_a_link_changes_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one", "other"):
        (tmp_path / name).write_text(name)
    link = tmp_path / "last"
    atomic_link(link, tmp_path / "one")
    assert link.read_text() == "one"
    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space"):
        atomic_link(link, tmp_path / "other")
    assert link.read_text() == "one"
    monkeypatch.undo()
    flushed, fsync = set(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda d: (flushed.add(os.fstat(d).st_ino), fsync(d))[1])
    atomic_link(link, tmp_path / "other")
    assert link.read_text() == "other"
    assert tmp_path.stat().st_ino in flushed
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["last", "one", "other"]


KILLED = """
import os, signal, sys
from pathlib import Path
from leap_pl.files import atomic_file, atomic_folder
with atomic_file(Path(sys.argv[1]) / "a") as file, atomic_folder(Path(sys.argv[1]) / "b") as folder:
    file.write_text("half"); (folder / "half").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_writer_left_goes_with_the_next_one(tmp_path: Path) -> None:
    for _ in range(2):
        killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
        assert killed.returncode == -signal.SIGKILL
        names = [p.name for p in tmp_path.iterdir()]
        assert len(names) == 2  # those of the first are gone
        assert all(name.endswith(".part") for name in names)
    with atomic_file(tmp_path / "a") as mine:
        remove_abandoned(tmp_path)
        assert mine.exists()  # its writer lives
        assert [p.name for p in tmp_path.iterdir()] == [mine.name]
        mine.write_text("whole")
    assert contents(tmp_path) == {"a": "whole"}


def test_nothing_else_is_taken_for_abandoned(tmp_path: Path) -> None:
    for name in (".a.123.part", ".ab.123.part", "a.part", ".a.part.txt", ".a.1.old"):
        (tmp_path / name).write_text("x")
    remove_abandoned(tmp_path, "a")
    assert set(contents(tmp_path)) == {".ab.123.part", "a.part", ".a.part.txt", ".a.1.old"}


def test_without_locks_nothing_is_taken_for_abandoned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    (tmp_path / ".a.123.part").write_text("x")
    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    with atomic_file(tmp_path / "a") as temporary:
        temporary.write_text("new")
    assert contents(tmp_path) == {".a.123.part": "x", "a": "new"}


# -- places that cannot be written ------------------------------------------------------------------------


@pytest.mark.parametrize("writer", [atomic_file, atomic_folder])
def test_a_parent_that_is_a_file(tmp_path: Path, writer: Callable[[Path], Any]) -> None:
    (tmp_path / "parent").write_text("a file")
    path = tmp_path / "parent" / "out"
    with pytest.raises(UserError) as caught, writer(path):
        pytest.fail("the body must not run")
    one_line(caught, path, "could not be written")
    assert contents(tmp_path) == {"parent": "a file"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.parametrize("writer", [atomic_file, atomic_folder])
def test_a_parent_that_is_read_only(tmp_path: Path, writer: Callable[[Path], Any]) -> None:
    path = tmp_path / "out"
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(UserError) as caught, writer(path):
            pytest.fail("the body must not run")
    finally:
        tmp_path.chmod(0o700)
    one_line(caught, path, "Permission denied")


@pytest.mark.parametrize(("writer", "maker"), [(atomic_file, "mkstemp"), (atomic_folder, "mkdtemp")])
def test_a_parent_on_a_read_only_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: Callable[[Path], Any], maker: str
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(f"tempfile.{maker}", refuse)
    path = tmp_path / "out"
    with pytest.raises(UserError) as caught, writer(path):
        pytest.fail("the body must not run")
    one_line(caught, path, "Read-only file system")
    assert contents(tmp_path) == {}


def test_rights_that_the_mount_decides_are_left_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On SMB with the files of another user, everything but chmod is permitted."""

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "chmod", refuse)
    with atomic_file(tmp_path / "file") as temporary:
        temporary.write_text("a")
    with atomic_folder(tmp_path / "folder") as temporary:
        (temporary / "a").write_text("a")
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "a").read_text() == "a"
