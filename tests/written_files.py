"""Folders that were written before, and ways in which writing fails."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from leap_pl.errors import UserError
from leap_pl.files import atomic as files
from leap_pl.files import atomic_folder


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


def write_folder(path: Path, *, force: bool = False, fail: BaseException | None = None) -> None:
    with atomic_folder(path, force=force) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "a").write_text("new a")
        (temporary / "sub" / "b").write_text("new b")
        if fail:
            raise fail


NEW = {"a": "new a", "leap_pl.json": record_of("a", "sub/b"), "sub": None, "sub/b": "new b"}
