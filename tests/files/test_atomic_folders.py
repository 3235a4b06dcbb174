"""A folder appears whole, or the one before it stays."""

import ctypes
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from written_files import NEW, contents, full, in_two_steps, old_folder, one_line, record_of, write_folder

from leap_pl.errors import UserError
from leap_pl.files import atomic as files
from leap_pl.files import atomic_folder


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
    for folder in (tmp_path / "out", tmp_path / "out" / "sub", tmp_path):  # which hold the names
        assert folder.stat().st_ino in flushed


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
