"""A MaskExport on several ranks."""

from pathlib import Path

import pytest
from python_runs import data, trainer
from ranks import run_ranks

from leap_pl import LeapModule
from leap_pl.callbacks import MaskExport
from leap_pl.prior import Prior

pytestmark = pytest.mark.usefixtures("eager")


def test_a_mask_export_without_checkpoints_on_two_ranks(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    run_ranks(2, exported_by_two, str(model_folder), str(text_file), str(tmp_path), folder=tmp_path / "said")
    assert [path.name for path in tmp_path.rglob("mask.safetensors")] == ["mask.safetensors"]


def exported_by_two(rank: int, model: str, text: str, folder: str) -> None:
    module = LeapModule(model, dtype="float32", prior=Prior(method="magnitude", cache_dir=f"{folder}/p"))
    made = trainer(MaskExport(), max_steps=1, devices=2, strategy="ddp", default_root_dir=folder)
    made.fit(module, data(text, validation_sequences=0))
