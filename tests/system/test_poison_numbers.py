"""Numbers that go wrong while learning: gradients and logits that are none, overflow, densities that run away."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fit_flags, refused

from leap_pl.checkpoints.layout import load_checkpoint, masks_from_checkpoint
from leap_pl.cli.main import main

pytestmark = pytest.mark.usefixtures("eager")


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_gradient_that_is_no_number(
    model_folder, text_file, tmp_path: Path, capsys, monkeypatch, value: float
) -> None:
    """It would spoil every logit through the clipped norm: the step is not taken."""
    from leap_pl.training.module import LeapModule

    def spoiled(self: LeapModule, optimizer: Any) -> None:
        if self.global_step == 3:
            list(self.gates.values())[2].logits.grad[0, 0] = value  # type: ignore[index]
        real(self, optimizer)

    real = LeapModule.on_before_optimizer_step
    monkeypatch.setattr(LeapModule, "on_before_optimizer_step", spoiled)
    line = refused(fit_flags(model_folder, text_file, tmp_path), capsys)
    assert "step 3: the gradients of model.layers.0.self_attn.v_proj.weight are infinite or NaN" in line
    assert masks_from_checkpoint(tmp_path / "checkpoints" / "last.ckpt").total


def test_where_a_look_waits_for_the_device_gradients_are_looked_at_at_log_steps(
    model_folder, text_file, tmp_path: Path, capsys, monkeypatch
) -> None:
    """The logits are spoiled by then; what was saved before is not."""
    from leap_pl.training.module import LeapModule

    def spoiled(self: LeapModule, optimizer: Any) -> None:
        steps.append(self.global_step)
        if self.global_step == 2:
            list(self.gates.values())[2].logits.grad[0, 0] = float("nan")  # type: ignore[index]
        real(self, optimizer)

    steps: list[int] = []
    real = LeapModule.on_before_optimizer_step
    monkeypatch.setattr(LeapModule, "on_before_optimizer_step", spoiled)
    monkeypatch.setattr(LeapModule, "looks_later", property(lambda self: True))
    every = ["--sparsity_log.every_n_steps=4", "--checkpoint.every_n_train_steps=2", "--trainer.max_steps=8"]
    flags = fit_flags(model_folder, text_file, tmp_path, *every, "--trainer.val_check_interval=100")
    assert "step 2: gradients are infinite or NaN, or overflow together" in refused(flags, capsys)
    assert steps == [0, 1, 2, 3]
    logits = load_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["state_dict"]
    assert all(torch.isfinite(tensor).all() for tensor in logits.values())


def test_gradients_that_overflow_together(model_folder, text_file, tmp_path: Path, capsys, monkeypatch) -> None:
    from leap_pl.training.module import LeapModule

    def spoiled(self: LeapModule, optimizer: Any) -> None:
        for gate in self.gates.values():
            gate.logits.grad.fill_(1e30)  # type: ignore[union-attr]
        real(self, optimizer)

    real = LeapModule.on_before_optimizer_step
    monkeypatch.setattr(LeapModule, "on_before_optimizer_step", spoiled)
    assert "step 0: the gradients overflow" in refused(fit_flags(model_folder, text_file, tmp_path), capsys)


@pytest.mark.parametrize(
    ("values", "finite"),
    [
        ([1.0, float("nan"), 2.0], False),
        ([float("inf"), 1.0], False),
        ([float("inf"), float("-inf")], False),
        ([3e38, 3e38], True),  # whose sum is not
        ([1.0, -1.0], True),
        ([], True),
    ],
)
def test_logits_are_looked_through(values: list[float], finite: bool) -> None:
    from leap_pl.training.finite import NonFiniteError, check_logits

    learned = {("a", "logits"): torch.zeros(3), ("b", "logits"): torch.tensor(values)}
    if finite:
        check_logits(learned, 7)
    else:
        with pytest.raises(NonFiniteError, match="step 7: the logits of b are infinite or NaN"):
            check_logits(learned, 7)


@pytest.mark.parametrize("word", ["--model.dtype=float16", "--trainer.precision=16-true"])
def test_float16_is_refused_where_the_loss_is_not_scaled(
    model_folder, text_file, tmp_path: Path, capsys, word: str
) -> None:
    """Most gradients would be rounded to 0, unnoticed: what is left would learn from the budget alone."""
    line = refused(fit_flags(model_folder, text_file, tmp_path, word), capsys)
    assert "the loss is not scaled, and float16 rounds most gradients to 0" in line
    assert "--trainer.precision 16-mixed" in line


def test_what_overflows_in_float16_names_the_remedy() -> None:
    from leap_pl.training.finite import NonFiniteError, check_terms

    with pytest.raises(NonFiniteError, match=r"step 3: .*--model\.dtype bfloat16 or float32"):
        check_terms({"lm": torch.tensor(float("inf"))}, 3, torch.float16)


@pytest.mark.parametrize("end", [0, 1])
def test_a_weight_whose_density_runs_to_an_end_is_warned_of_once(
    model_folder, text_file, tmp_path: Path, monkeypatch, recwarn, end: int
) -> None:
    """Its logits are pushed to one side from the second step on; all other weights are silent."""
    from leap_pl.training.module import LeapModule

    def pushing(self: LeapModule, batch: Any, batch_idx: int) -> torch.Tensor:
        gate = self.gates["model.layers.1.mlp.up_proj.weight"]
        if self.global_step >= 2:
            gate.logits.data.fill_(50.0 if end else -50.0)
        return real(self, batch, batch_idx)

    real = LeapModule.training_step
    monkeypatch.setattr(LeapModule, "training_step", pushing)
    main(fit_flags(model_folder, text_file, tmp_path, "--data.validation_sequences=0"))
    (said,) = [str(w.message) for w in recwarn if "its density is" in str(w.message)]
    assert f"model.layers.1.mlp.up_proj.weight: its density is {end}.0000, and the model's target is 0.5" in said
    assert "--model.objective.budget_scope layer" in said
    assert "--model.ignore '[model.layers.1.mlp.up_proj.weight]'" in said
