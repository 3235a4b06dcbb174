"""Files and folders are there whole or not at all."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from leap_pl.errors import UserError
from leap_pl.files import atomic_file, atomic_folder


def contents(folder: Path) -> dict[str, str | None]:
    """Everything under ``folder``, hidden leftovers too: path → text, None for a folder."""
    return {str(p.relative_to(folder)): p.read_text() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


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


NEW = {"a": "new a", "sub": None, "sub/b": "new b"}


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


def test_a_folder_with_something_in_it_is_replaced_by_force(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.mkdir()
    (path / "old").write_text("old")
    write_folder(path, force=True)
    assert contents(path) == NEW
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


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
        path.mkdir()
        (path / "old").write_text("old")
    before = contents(tmp_path)
    with pytest.raises(kind, match="stop"):
        write_folder(path, force=True, fail=kind("stop"))
    assert contents(tmp_path) == before


def fail_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", full)


def fail_first_rename(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "rename", full)


def fail_second_rename(monkeypatch: pytest.MonkeyPatch) -> None:
    """The old folder is out of the way, and the new one cannot take its place."""
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda a, b: full() if a.name.endswith(".part") else rename(a, b))


def put_nothing_in_place(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """The old folder is moved away, and after that every rename fails."""
    rename = Path.rename

    def first_only(source: Path, target: Path) -> Path:
        if target.name != "was":
            raise error
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", first_only)


@pytest.mark.parametrize("fail", [fail_fsync, fail_first_rename, fail_second_rename])
@pytest.mark.parametrize("old", [False, True])
def test_a_full_disk_leaves_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail: Callable[[pytest.MonkeyPatch], None], old: bool
) -> None:
    path = tmp_path / "out"
    if old:
        path.mkdir()
        (path / "old").write_text("old")
    before = contents(tmp_path)
    with monkeypatch.context() as patch:
        fail(patch)
        with pytest.raises(UserError) as caught:
            write_folder(path, force=True)
    one_line(caught, path, "No space left on device")
    assert contents(tmp_path) == before


def test_an_old_folder_that_cannot_be_put_back_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    put_nothing_in_place(monkeypatch, OSError(errno.EIO, os.strerror(errno.EIO)))
    with pytest.raises(UserError):
        write_folder(tmp_path / "out", force=True)
    assert "old" in contents(tmp_path).values()


def test_an_interrupt_in_the_middle_of_the_swap_leaves_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    rename, calls = Path.rename, []

    def interrupted(source: Path, target: Path) -> Path:
        calls.append(source)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "out", force=True)
    assert contents(tmp_path) == {"out": None, "out/old": "old"}


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
            (temporary / "a").write_text("x")
            (temporary / "a").chmod(0o600)
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "out" / "a").stat().st_mode & 0o777 == 0o644
    assert (tmp_path / "out" / "a").stat().st_ino in flushed


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
