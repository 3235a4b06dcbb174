"""Runs from Python, without the command line: small modules, data and trainers."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest

from leap_pl import LeapModule, TextDataModule
from leap_pl.callbacks import Checkpoints
from leap_pl.prior import Prior

QUIET = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)


def trainer(*callbacks: L.Callback, **settings: Any) -> L.Trainer:
    given = {**QUIET, **settings}
    if any(isinstance(callback, Checkpoints) for callback in callbacks):
        del given["enable_checkpointing"]
    return L.Trainer(accelerator="cpu", callbacks=list(callbacks), **given)


def data(text: Path | str, **settings: Any) -> TextDataModule:
    return TextDataModule(text=str(text), **{"seq_length": 32, "batch_size": 2, "validation_sequences": 2, **settings})


@pytest.fixture
def module(model_folder: Path, tmp_path: Path) -> LeapModule:
    return LeapModule(
        str(model_folder), dtype="float32", prior=Prior(method="magnitude", cache_dir=str(tmp_path / "p"))
    )


def again(module: LeapModule) -> LeapModule:
    return LeapModule(module.base_model, dtype="float32", prior=module.run_prior.settings)
