"""What two ranks log and record is of both, and not of the one that writes."""

from pathlib import Path
from typing import Any

import pytest
from conftest import fit_flags
from ranks import run_ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from leap_pl.cli.main import main


def learn(rank: int, words: list[str]) -> dict[str, Any]:
    """This rank's own terms and densities of the last micro-batch, and what it says was measured."""
    module = main(words).model
    return {
        "terms": {name: float(value) for name, value in module.terms.items()},
        "soft": sum(float(kept) for kept in module.gates.kept.values()) / sum(module.sizes.values()),
        "of": module.validation.hard.of,
        "value": module.validation.hard.value,
    }


def test_curves_are_means_over_the_ranks(model_folder: Path, text_file: Path, tmp_path: Path, eager: None) -> None:
    words = fit_flags(model_folder, text_file, tmp_path / "two", "--model.sparsity=0.7", "--trainer.max_steps=2")
    ranks = run_ranks(
        2, learn, [*words, "--trainer.devices=2", "--trainer.strategy=ddp"], folder=tmp_path / "said", seconds=200
    )
    assert ranks[0]["terms"]["lm"] != ranks[1]["terms"]["lm"]
    events = EventAccumulator(str(tmp_path / "two" / "tensorboard"))
    events.Reload()
    last = {tag: events.Scalars(tag)[-1].value for tag in ("loss/lm", "loss/total", "density/soft", "density/target")}
    for tag, name in (("loss/lm", "lm"), ("loss/total", "loss")):
        assert last[tag] == pytest.approx(sum(rank["terms"][name] for rank in ranks) / 2, rel=1e-5)
    assert last["density/soft"] == pytest.approx(sum(rank["soft"] for rank in ranks) / 2, rel=1e-5)
    assert last["density/target"] == pytest.approx(0.3)
    alone = learn(
        0, fit_flags(model_folder, text_file, tmp_path / "one", "--model.sparsity=0.7", "--trainer.max_steps=1")
    )
    for rank in ranks:
        assert rank["of"]["sequences"] == alone["of"]["sequences"] == 4
        assert rank["of"]["tokens"] == alone["of"]["tokens"]
