"""ProcessSettings: denormal numbers are flushed while a mask is learned, and are numbers again after it."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from leap_pl import LeapModule, TextDataModule
from leap_pl.callbacks import ProcessSettings
from leap_pl.prior import Prior

pytestmark = pytest.mark.skipif(not torch.set_flush_denormal(False), reason="this processor cannot flush them")

SMALL = torch.full((1_000_000,), 1e-30)  # enough elements for every thread


def kept() -> int:
    return int((SMALL * 1e-10).count_nonzero())


class Count(L.Callback):
    def __init__(self, error: Exception | None = None) -> None:
        self.during: list[int] = []
        self.error = error

    def on_train_batch_end(self, *_: Any) -> None:
        self.during.append(kept())
        if self.error is not None:
            raise self.error


def fit(count: Count, model_folder: Path, text_file: Path) -> None:
    trainer = L.Trainer(accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False,
                        enable_model_summary=False, enable_progress_bar=False,
                        callbacks=[ProcessSettings(), count])  # fmt: skip
    data = TextDataModule(str(model_folder), text=str(text_file), seq_length=32, validation_sequences=0)
    trainer.fit(LeapModule(str(model_folder), prior=Prior(method="none")), datamodule=data)


def test_denormal_numbers_are_flushed_on_all_threads_during_a_fit(model_folder, text_file) -> None:
    """Matrices of them take Intel's CPUs many times longer."""
    count, before = Count(), kept()
    fit(count, model_folder, text_file)
    assert [before, *count.during, kept()] == [SMALL.numel(), 0, SMALL.numel()]


def test_they_are_numbers_again_after_a_fit_that_fails(model_folder, text_file) -> None:
    count = Count(ArithmeticError("as many do"))
    with pytest.raises(ArithmeticError):
        fit(count, model_folder, text_file)
    assert [*count.during, kept()] == [0, SMALL.numel()]
