"""Files and folders are there whole or not at all."""

import ctypes
import errno
import json
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

from leap_pl.errors import UserError
from leap_pl.files import atomic as files
from leap_pl.files import atomic_file, atomic_folder, atomic_link, remove_abandoned


def contents(folder: Path) -> dict[str, str | None]:
    """Everything under ``folder``, hidden leftovers too: path → text, None for a folder."""
    return {str(p.relative_to(folder)): p.read_text() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def record_of(*names: str) -> str:
    """The record of a folder that is written outside a command."""
    told = {"format": "leap_pl.folder", "format_version": 1, "verb": None, "files": sorted([*names, "leap_pl.json"])}
    return json.dumps({"folder": told}, indent=2) + "\n"


def old_folder(path: Path) -> None:
    """A folder with one file in it that leap_pl wrote before."""
    path.mkdir()
    (path / "old").write_text("old")
    (path / "leap_pl.json").write_text(record_of("old"))


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def in_two_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that cannot exchange two names."""
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)


def one_line(error: pytest.ExceptionInfo[UserError], path: Path, reason: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    assert str(path) in message
    assert reason in message
    assert "Nothing was left behind" in message


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


# -- folders ----------------------------------------------------------------------------------------------


def write_folder(path: Path, *, force: bool = False, fail: BaseException | None = None) -> None:
    with atomic_folder(path, force=force) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "a").write_text("new a")
        (temporary / "sub" / "b").write_text("new b")
        if fail:
            raise fail


NEW = {"a": "new a", "leap_pl.json": record_of("a", "sub/b"), "sub": None, "sub/b": "new b"}


@pytest.mark.parametrize("there", ["nothing", "an empty folder", "an empty folder, with force"])
def test_a_folder_appears_at_the_end(tmp_path: Path, there: str) -> None:
    path = tmp_path / "up" / "out"
    if there != "nothing":
        path.mkdir(parents=True)
    write_folder(path, force=there.endswith("force"))
    assert contents(path) == NEW
    assert [p.name for p in path.parent.iterdir()] == ["out"]


def test_a_folder_with_something_in_it_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.mkdir()
    (path / ".hidden").write_text("old")
    with pytest.raises(UserError, match=r"is not empty.*--force"):
        write_folder(path)
    assert contents(tmp_path) == {"out": None, "out/.hidden": "old"}


@pytest.mark.parametrize("steps", [1, 2])
def test_a_folder_with_something_in_it_is_replaced_by_force(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    if steps == 2:
        in_two_steps(monkeypatch)
    path = tmp_path / "out"
    old_folder(path)
    write_folder(path, force=True)
    assert contents(path) == NEW
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("mounted", ["a file system", "a folder"])
def test_a_mount_point_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mounted: str
) -> None:
    (tmp_path / "a b").mkdir()
    out = tmp_path / "link"
    out.symlink_to(tmp_path / "a b")
    table = f"36 35 98:0 /x {tmp_path}/a\\040b rw,noatime - ext3 /dev/root rw\n" if mounted == "a folder" else ""
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda p: table.encode() if p.name == "mountinfo" else read(p))
    monkeypatch.setattr(os.path, "ismount", lambda path: not table and Path(path).name == "a b")
    with pytest.raises(UserError) as caught, atomic_folder(out):
        pytest.fail("the body must not run")
    assert str(caught.value) == f"{out} is a mount point, which cannot be replaced as a whole. Name a folder in it."
    with atomic_folder(out / "inside") as folder:
        (folder / "f").write_text("x")


@pytest.mark.parametrize("force", [False, True])
def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path, force: bool) -> None:
    path = tmp_path / "out"
    path.write_text("old")
    with pytest.raises(UserError, match="is a file"):
        write_folder(path, force=force)
    assert contents(tmp_path) == {"out": "old"}


@pytest.mark.parametrize("kind", [KeyError, KeyboardInterrupt, UserError])
@pytest.mark.parametrize("old", [False, True])
def test_a_folder_whose_writer_fails_is_as_it_was(tmp_path: Path, kind: type[BaseException], old: bool) -> None:
    path = tmp_path / "out"
    if old:
        old_folder(path)
    before = contents(tmp_path)
    with pytest.raises(kind, match="stop"):
        write_folder(path, force=True, fail=kind("stop"))
    assert contents(tmp_path) == before


def fail_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", full)


def fail_swap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_exchange", full)
    monkeypatch.setattr(Path, "rename", full)


def fail_first_rename(monkeypatch: pytest.MonkeyPatch) -> None:
    in_two_steps(monkeypatch)
    monkeypatch.setattr(Path, "rename", full)


def fail_second_rename(monkeypatch: pytest.MonkeyPatch) -> None:
    """The old folder is out of the way, and the new one cannot take its place."""
    in_two_steps(monkeypatch)
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda a, b: full() if a.name.endswith(".part") else rename(a, b))


def put_nothing_in_place(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """The old folder is moved away, and after that every rename fails."""
    in_two_steps(monkeypatch)
    rename = Path.rename

    def first_only(source: Path, target: Path) -> Path:
        if target.name != "was":
            raise error
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", first_only)


@pytest.mark.parametrize("fail", [fail_fsync, fail_swap, fail_first_rename, fail_second_rename])
@pytest.mark.parametrize("old", [False, True])
def test_a_full_disk_leaves_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail: Callable[[pytest.MonkeyPatch], None], old: bool
) -> None:
    path = tmp_path / "out"
    if old:
        old_folder(path)
    before = contents(tmp_path)
    with monkeypatch.context() as patch:
        fail(patch)
        with pytest.raises(UserError) as caught:
            write_folder(path, force=True)
    one_line(caught, path, "No space left on device")
    assert contents(tmp_path) == before


def test_an_old_folder_that_cannot_be_put_back_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old_folder(tmp_path / "out")
    put_nothing_in_place(monkeypatch, OSError(errno.EIO, os.strerror(errno.EIO)))
    with pytest.raises(UserError):
        write_folder(tmp_path / "out", force=True)
    assert "old" in contents(tmp_path).values()


def test_an_interrupt_in_the_middle_of_the_swap_leaves_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_two_steps(monkeypatch)
    old_folder(tmp_path / "out")
    rename, calls = Path.rename, []

    def interrupted(source: Path, target: Path) -> Path:
        calls.append(source)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "out", force=True)
    assert contents(tmp_path) == {"out": None, "out/leap_pl.json": record_of("old"), "out/old": "old"}


def test_a_folders_files_are_flushed_and_readable_as_the_umask_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Safetensors makes files that their owner alone can read."""
    flushed: set[int] = set()
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda d: (flushed.add(os.fstat(d).st_ino), fsync(d))[1])
    before = os.umask(0o022)
    try:
        with atomic_folder(tmp_path / "out") as temporary:
            (temporary / "sub").mkdir()
            for name in ("a", "sub/b"):
                (temporary / name).write_text("x")
                (temporary / name).chmod(0o600)
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755
    for name in ("a", "sub/b"):
        assert (tmp_path / "out" / name).stat().st_mode & 0o777 == 0o644
        assert (tmp_path / "out" / name).stat().st_ino in flushed


def test_two_folders_change_places_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At no moment is there no folder: no rename of Python's is used, and both are whole afterwards."""
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text(name)
    monkeypatch.setattr(Path, "rename", full)
    if not files._exchange(tmp_path / "one", tmp_path / "other"):
        pytest.skip("this system cannot exchange names")
    assert contents(tmp_path) == {"one": None, "one/other": "other", "other": None, "other/one": "one"}
    with pytest.raises(FileNotFoundError):
        files._exchange(tmp_path / "one", tmp_path / "nothing")


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EINVAL, errno.EIO])
def test_a_system_that_cannot_exchange_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    class Library:
        def renameat2(self, *_: Any) -> int:
            ctypes.set_errno(number)
            return -1

    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: Library())
    if number == errno.EIO:
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            files._exchange(tmp_path / "one", tmp_path / "other")
    else:
        assert not files._exchange(tmp_path / "one", tmp_path / "other")
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: object())
    assert not files._exchange(tmp_path / "one", tmp_path / "other")


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
    atomic_link(link, tmp_path / "other")
    assert link.read_text() == "other"
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
