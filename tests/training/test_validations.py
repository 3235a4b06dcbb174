"""What a validation measures: in which precision, of which part of the text, and at which times."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from python_runs import again, data, trainer

from leap_pl import LeapModule, UserError
from leap_pl.training.run_length import check_run_length
from leap_pl.training.validation import Measured, Validation

pytestmark = pytest.mark.usefixtures("eager")


def test_curves_have_no_point_of_a_part_of_the_text(module: LeapModule, text_file: Path, tmp_path: Path) -> None:
    """A sanity check reads two batches, unless it is told to read all."""
    for steps, first in ((2, 1), (-1, 0)):
        logger = CSVLogger(tmp_path, name=str(steps))
        often = {"val_check_interval": 1, "check_val_every_n_epoch": None}
        run = trainer(logger=logger, max_steps=1, num_sanity_val_steps=steps, **often)
        learning = again(module)
        run.fit(learning, data(text_file, validation_sequences=8))
        with (Path(logger.log_dir) / "metrics.csv").open(encoding="utf-8") as file:
            points = [row for row in csv.DictReader(file) if row["perplexity/hard"]]
        assert [int(row["step"]) for row in points] == [*range(first, 2)]
        assert len({row["perplexity/dense"] for row in points}) == 1


def test_a_validation_sums_in_full_precision_whatever_the_trainers_is() -> None:
    """Lightning converts a whole module to the data type of a *-true precision."""
    torch.manual_seed(0)
    head, whole = torch.nn.Linear(8, 50), Validation()
    half = Validation().to(torch.bfloat16).bfloat16().half()
    for validation in (whole, half):
        validation.begin()
    for _ in range(300):
        hidden, targets = torch.randn(4, 32, 8), torch.randint(0, 50, (4, 32))
        for validation in (whole, half):
            validation.update("hard", hidden, targets, head, 64)
    assert half.hard_metric.compute() == whole.hard_metric.compute()
    assert half.hard_metric.compute().dtype == torch.float32


def test_the_logits_of_a_bfloat16_head_are_summed_in_float32() -> None:
    torch.manual_seed(0)
    head, validation = torch.nn.Linear(64, 500).bfloat16(), Validation()
    hidden, targets = torch.randn(4, 128, 64).bfloat16(), torch.randint(0, 500, (4, 128))
    validation.begin()
    validation.update("hard", hidden, targets, head, 512)
    logits = head(hidden).double().flatten(0, 1)
    expected = float(torch.nn.functional.cross_entropy(logits, targets.flatten()).exp())
    assert float(validation.hard_metric.compute()) == pytest.approx(expected, rel=1e-5)


def test_one_improbable_token_does_not_make_a_perplexity_infinite() -> None:
    validation, targets = Validation(), torch.tensor([[0, 1, 2]])
    logits = torch.tensor([[[0.0, 0.0, 0.0], [150.0, 0.0, 0.0], [1.0, 2.0, 3.0]]])
    validation.begin()
    validation.update("hard", logits, targets, lambda hidden: hidden, 2)
    expected = torch.nn.functional.cross_entropy(logits[0].double(), targets[0]).exp()
    assert torch.isfinite(expected)
    assert float(validation.hard_metric.compute()) == pytest.approx(float(expected), rel=1e-5)


def test_validation_by_the_clock_is_of_one_rank(text_file: Path) -> None:
    """Each rank looks at its own."""
    one, two = (
        trainer(
            max_steps=2, devices=devices, strategy="ddp" if devices > 1 else "auto", val_check_interval="00:00:30:00"
        )
        for devices in (1, 2)
    )
    check_run_length(one)
    with pytest.raises(UserError, match="is a time, and each of the 2 ranks would look at its own clock"):
        check_run_length(two)


def test_figures_of_another_text_are_not_shown() -> None:
    of: Any = {"tokens": "a" * 16, "sequences": 4, "seq_length": 32.0}
    of |= {"fingerprint": "f", "dtype": "float32", "precision": "32-true"}
    validation = Validation()
    validation.hard, validation.dense = Measured(20.0, **of), Measured(10.0, **of)
    validation.start = Measured(30.0, **{**of, "tokens": "b" * 16})
    assert validation.figures() == {"hard": 20.0, "dense": 10.0}
    assert "prior" not in validation.summary(3)
    validation.start = Measured(30.0, **of)
    assert validation.figures()["prior"] == 30.0
