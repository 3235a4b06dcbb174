"""What is read back from files: refused in one line that names the file, or used to the end; never a traceback."""

from pathlib import Path

import fuzz_readers
import pytest


@pytest.mark.parametrize(
    ("name", "inputs"), [("result", 300), ("mask", 300), ("packed", 300), ("record", 300), ("text", 100)]
)
def test_damaged_and_hostile_files(name: str, inputs: int, tmp_path: Path) -> None:
    found = fuzz_readers.fuzz(fuzz_readers.readers(every=40)[name], inputs, 1, tmp_path)
    assert not found.failures, found.failures[0]
    assert found.counts["refused"] + found.counts["accepted"] == inputs
    assert found.counts["accepted"] > inputs / 20  # else it would not reach what uses them


def test_damaged_and_hostile_questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    with fuzz_readers.bare_survey():
        found = fuzz_readers.fuzz(fuzz_readers.readers()["questions"], 60, 1, tmp_path)
    assert not found.failures, found.failures[0]
    assert found.counts["accepted"] > 5
    assert found.counts["refused"] > 5


def test_a_reader_that_fails_is_found(tmp_path: Path) -> None:
    """The harness itself: another exception, a message of two lines, and one that names no file are failures."""
    from leap_pl.errors import UserError

    for error in (KeyError("x"), UserError("two\nlines of fuzzed.json"), UserError("no name")):

        def read(path: Path, error: Exception = error) -> None:
            raise error

        found = fuzz_readers.fuzz(fuzz_readers.Reader(lambda draw: b"{}", read, "fuzzed.json"), 3, 0, tmp_path / "in")
        assert found.counts == {"failed": 3}
        assert len(found.failures) == 3


def test_equal_seeds_make_equal_inputs() -> None:
    import random

    for reader in fuzz_readers.readers().values():
        inputs = [reader.make(random.Random(f"0 {number}")) for number in range(40)]
        assert inputs == [reader.make(random.Random(f"0 {number}")) for number in range(40)]
        assert len(set(inputs)) > 20
