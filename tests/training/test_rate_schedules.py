"""Schedules of the learning rate that do not suit a run, told before the model is loaded; and what the plan says."""

import warnings
from pathlib import Path

import pytest
import torch
import yaml
from conftest import failing, fit_flags
from recovered_runs import Flags

from leap_pl.cli.main import main
from leap_pl.training.optimization import make_scheduler, usual_optimizer

pytestmark = pytest.mark.usefixtures("eager")


def one_cycle(folder: Path, **settings: object) -> str:
    """A config with the schedule, whose cycle of momentum these optimizers do not need."""
    given = {"max_lr": 1e-3, "cycle_momentum": False, **settings}
    scheduler = {"class_path": "torch.optim.lr_scheduler.OneCycleLR", "init_args": given}
    (folder / "schedule.yaml").write_text(yaml.safe_dump({"model": {"lr_scheduler": scheduler}}))
    return f"--config={folder / 'schedule.yaml'}"


def test_a_schedule_that_ends_before_the_run(
    model_folder: Path, text_file: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("leap_pl.training.gated_module.load_model", lambda *a, **k: pytest.fail("it was loaded"))
        message = failing(capsys, fit_flags(model_folder, text_file, tmp_path, one_cycle(tmp_path, total_steps=5)))
    assert "OneCycleLR takes 5 steps, and trainer.max_steps is 6. Set --model.lr_scheduler.total_steps 6" in message
    main(fit_flags(model_folder, text_file, tmp_path / "run", one_cycle(tmp_path, total_steps=6)))


def test_a_schedule_that_moves_the_moment_that_packed_states_are_of(
    model_folder: Path, text_file: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    packed = "--model.optimizer=PackedAdamW"
    cycle = one_cycle(tmp_path, total_steps=6, cycle_momentum=True)
    with monkeypatch.context() as patch:
        patch.setattr("leap_pl.training.gated_module.load_model", lambda *a, **k: pytest.fail("it was loaded"))
        message = failing(capsys, fit_flags(model_folder, text_file, tmp_path, cycle, packed))
    assert "OneCycleLR changes β₁ with the learning rate, and PackedAdamW" in message
    assert "Set --model.lr_scheduler.cycle_momentum false" in message
    main(fit_flags(model_folder, text_file, tmp_path / "run", one_cycle(tmp_path, total_steps=6), packed))
    main(
        fit_flags(model_folder, text_file, tmp_path / "whole", one_cycle(tmp_path, total_steps=6, cycle_momentum=True))
    )


def test_a_schedule_that_gives_weights_the_rate_of_the_mask(
    model_folder: Path, text_file: Path, tmp_path: Path, capsys
) -> None:
    weights = "--model.train_weights=kept"
    words = [one_cycle(tmp_path, total_steps=6), weights]
    assert "OneCycleLR would give weights the learning rate of the mask" in failing(
        capsys, fit_flags(model_folder, text_file, tmp_path / "a", *words)
    )
    main(
        fit_flags(
            model_folder, text_file, tmp_path / "b", one_cycle(tmp_path, total_steps=6, max_lr=[1e-3, 1e-4]), weights
        )
    )


def test_the_plan_names_the_schedule_of_weights(recover: Flags, tmp_path: Path, capsys) -> None:
    words = ["--model.lr_scheduler=StepLR", "--model.lr_scheduler.step_size=2"]
    main(recover(tmp_path, *words))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("weights")]
    assert line.endswith("learning rate 0.01 (by StepLR)")


def test_a_cosine_of_another_length_and_a_warmup_without_use(
    model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    cosine = ["--model.lr_scheduler=CosineAnnealingLR", "--model.lr_scheduler.T_max=3", "--model.warmup_steps=2"]
    with (
        pytest.warns(UserWarning, match=r"CosineAnnealingLR is made for T_max 3 steps, and trainer\.max_steps is 6"),
        pytest.warns(UserWarning, match=r"not used, since model\.lr_scheduler has its own curve: model\.warmup_steps"),
    ):
        main(fit_flags(model_folder, text_file, tmp_path, *cosine))


@pytest.mark.filterwarnings("error:model.lr_scheduler", "error:not used")
def test_a_cosine_of_the_run(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    cosine = ["--model.lr_scheduler=CosineAnnealingLR", "--model.lr_scheduler.T_max=6"]
    main(fit_flags(model_folder, text_file, tmp_path, *cosine))


@pytest.mark.parametrize(("total", "advised"), [(40, 4), (6, 1)])
def test_a_warmup_that_is_longer_than_the_run(total: int, advised: int) -> None:
    """With one of all steps, the last step has the whole rate."""
    optimizer = usual_optimizer([torch.nn.Parameter(torch.zeros(1))])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler = make_scheduler(None, optimizer, {"model.warmup_steps": total}, total)
    (factor,) = scheduler.lr_lambdas
    assert factor(total - 1) == 1
    told = (
        rf"^model\.warmup_steps is {total + 1} and trainer\.max_steps {total}: the learning rate never reaches its "
        rf"maximum\. Set --model\.warmup_steps to about {advised}\.$"
    )
    with pytest.warns(UserWarning, match=told):
        make_scheduler(None, optimizer, {"model.warmup_steps": total + 1}, total)


def test_a_rate_that_a_schedule_replaces_is_told(recover: Flags, tmp_path: Path) -> None:
    """OneCycleLR has a highest rate of its own, whatever the optimizer's is."""
    words = recover(tmp_path / "run", one_cycle(tmp_path, total_steps=4))
    with pytest.warns(UserWarning, match=r"OneCycleLR sets its own .* up to 0\.001, and the given 0\.01 is not used"):
        main(words)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*sets its own learning rates")
        main(recover(tmp_path / "same", one_cycle(tmp_path, total_steps=4, max_lr=1e-2)))
