"""Every config that is shipped parses, and makes the objects it names."""

from pathlib import Path

import pytest
import yaml

from leap_pl.callbacks import Annealing
from leap_pl.data import TextDataModule
from leap_pl.module import LeapModule
from leap_pl.schedules import Schedule
from leap_pl.trainer_cli import LeapCLI, make_cli

ROOT = Path(__file__).parents[1] / "configs"
CONFIGS = sorted(path for path in ROOT.rglob("*.yaml") if path.parent.name != "shared" and path.stem != "headline")


def instantiate(path: Path, tmp_path: Path) -> LeapCLI:
    """The command line up to, and without, the run."""
    flags = [f"--trainer.default_root_dir={tmp_path}", "--trainer.logger=false", "--trainer.accelerator=cpu"]
    return make_cli(["--config", str(path), *flags], run=False)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_makes_its_objects(path: Path, tmp_path: Path) -> None:
    cli = instantiate(path, tmp_path)
    assert isinstance(cli.model, LeapModule)
    assert isinstance(cli.datamodule, TextDataModule)
    assert cli.datamodule.tokenizer_name == cli.model.base_model
    assert any(isinstance(callback, Annealing) for callback in cli.trainer.callbacks)


@pytest.mark.parametrize("path", [path for path in CONFIGS if path.parent.name == "paper"], ids=lambda path: path.stem)
def test_rows_of_the_paper_have_its_settings(path: Path, tmp_path: Path) -> None:
    cli = instantiate(path, tmp_path)
    model, data, trainer = cli.model, cli.datamodule, cli.trainer
    assert model.sparsity == int(path.stem[-2:]) / 100
    assert trainer.max_steps * trainer.accumulate_grad_batches * data.batch_size * data.seq_length == 2000 * 256 * 4096
    assert data.text == "allenai/c4"
    objective = model.objective
    assert (objective.lm, objective.distillation, objective.budget, objective.weight) == (1, 0, 7, 10)
    assert (model.prior_settings.method, model.prior_settings.sequences, model.warmup_steps) == ("wanda", 128, 5)
    annealing = next(callback for callback in trainer.callbacks if isinstance(callback, Annealing))
    assert annealing.alpha == Schedule(25, 350, "linear")
    assert annealing.tau == Schedule(4, 0.05, "linear")
    assert trainer.gradient_clip_val == 1
    settings = cli.config.model.optimizer.init_args
    assert (settings.lr, tuple(settings.betas), settings.weight_decay) == (1e-3, (0.9, 0.95), 0)


def test_every_config_is_in_the_table() -> None:
    table = (ROOT / "README.md").read_text()
    for path in CONFIGS:
        row = path.stem.replace("-50", "-{50,60}").replace("-60", "-{50,60}")
        assert f"{row}.yaml" in table
        assert yaml.safe_load(path.read_text())["model"]["base_model"].split("/")[-1] in table
