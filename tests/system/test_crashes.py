"""A test's process that crashes says where, also after its first run."""

import ctypes
from pathlib import Path

import pytest
from conftest import fit_flags
from ranks import run_ranks

from leap_pl.cli.main import main


def crash(rank: int, words: list[str]) -> None:
    main(words)
    ctypes.CDLL(None).abort()


def test_a_rank_that_crashes_after_a_run_says_where(
    model_folder: Path, text_file: Path, tmp_path: Path, eager: None
) -> None:
    words = fit_flags(model_folder, text_file, tmp_path / "run", "--trainer.max_steps=1", "--model.warmup_steps=1")
    with pytest.raises(AssertionError, match=r"(?s)Fatal Python error: Aborted.*in crash"):
        run_ranks(1, crash, words, folder=tmp_path / "said", seconds=120)
