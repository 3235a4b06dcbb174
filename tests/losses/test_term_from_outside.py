"""A loss from outside the package: the one that docs/extend.md shows, against its closed form, and in whole runs."""

import importlib
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from conftest import fit_flags, refused
from stopped_runs import differences
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from leap_pl import LeapModule, TextDataModule
from leap_pl.checkpoints.layout import load_checkpoint
from leap_pl.cli.main import main
from leap_pl.cli.prune import prune_command
from leap_pl.errors import UserError
from leap_pl.losses.objective import Objective
from leap_pl.losses.term import MicroBatch, Term
from leap_pl.training.weights import WeightTraining

pytestmark = pytest.mark.usefixtures("eager")

ROOT = Path(__file__).parents[2]
TYPED = ["--model.objective.extra+=mylosses.Entropy", "--model.objective.extra.weight=0.5"]
NO_TERMS = """

def made() -> Term:
    raise SystemExit


class Other:
    def __init__(self):
        raise SystemExit
"""
QUIET: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
QUIET |= {"enable_model_summary": False, "num_sanity_val_steps": 0}
PLACES = ("--trainer.accelerator", "--trainer.logger", "--checkpoint.", "--sparsity_log.")


@pytest.fixture(scope="module", autouse=True)
def mylosses(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The module that docs/extend.md shows, on Python's path, with two things in it that are no terms."""
    section = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8").partition("## Add a loss")[2]
    shown = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert shown
    folder = tmp_path_factory.mktemp("mine")
    (folder / "mylosses.py").write_text(shown[1] + NO_TERMS, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield importlib.import_module("mylosses")
        del sys.modules["mylosses"]


@pytest.fixture(scope="module")
def whole(model_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of six steps with the term."""
    folder = tmp_path_factory.mktemp("entropy")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEAP_PL_COMPILE", "0")
        main(fit_flags(model_folder, text_file, folder, *TYPED))
    return folder


def resume(whole: Path, folder: Path, *more: str) -> list[str]:
    places = [word for word in fit_flags("none", "none", folder) if word.startswith(PLACES)]
    return ["fit", *places, f"--ckpt_path={whole / 'checkpoints' / 'step=2.ckpt'}", *more]


def same_end(folder: Path, whole: Path) -> None:
    ends = [load_checkpoint(run / "checkpoints" / "step=6.ckpt") for run in (folder, whole)]
    learned, expected = ({key: end[key] for key in ("state_dict", "optimizer_states")} for end in ends)
    assert list(differences(learned, expected)) == []


# -- value and gradient -------------------------------------------------------------------------------------


class Gradients(L.Callback):
    """Keep the logits that a step begins with, the loss and its gradient."""

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        assert isinstance(pl_module, LeapModule)
        self.logits = {name: gate.logits.detach().double().numpy() for name, gate in pl_module.gates.items()}

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        assert isinstance(pl_module, LeapModule)
        self.terms = {name: float(value) for name, value in pl_module.terms.items()}
        self.slope = float(pl_module.state.alpha) / float(pl_module.state.tau)
        grads = {name: gate.logits.grad for name, gate in pl_module.gates.items()}
        self.grads = {name: grad.double().numpy().copy() for name, grad in grads.items() if grad is not None}


def first_step(model_folder: Path, text_file: Path, objective: Objective) -> Gradients:
    module = LeapModule(str(model_folder), objective=objective, dtype="float32")
    data = TextDataModule(str(model_folder), str(text_file), seq_length=32, batch_size=2, validation_sequences=0)
    found = Gradients()
    L.Trainer(max_steps=1, accelerator="cpu", callbacks=[found], **QUIET).fit(module, data)
    return found


def closed_form(logits: dict[str, Any], slope: float) -> tuple[float, dict[str, Any]]:
    """Mean of −p·log p − (1 − p)·log(1 − p) over all logits, and ∂/∂θ = −(α/τ)·z·p·(1 − p)/N; float64."""
    total = sum(theta.size for theta in logits.values())
    entropy, grads = 0.0, {}
    for name, theta in logits.items():
        z = slope * theta
        p, q = 1 / (1 + np.exp(-z)), 1 / (1 + np.exp(z))
        entropy -= float((p * np.log(p) + q * np.log(q)).sum())
        grads[name] = -slope * z * p * q / total
    return entropy / total, grads


def test_value_and_gradient_have_their_closed_form(model_folder, text_file, mylosses) -> None:
    """Alone: every other weight is 0, and adds nothing."""
    term = mylosses.Entropy(weight=0.3)
    found = first_step(model_folder, text_file, Objective(lm=0, budget=0, weight=0, extra=[term]))
    value, grads = closed_form(found.logits, found.slope)
    assert value > 0.1
    assert found.terms["entropy"] == pytest.approx(value, rel=1e-5)
    assert found.terms["loss"] == pytest.approx(0.3 * value, rel=1e-5)
    assert "lm" not in found.terms
    for name, grad in grads.items():
        np.testing.assert_allclose(found.grads[name], 0.3 * grad, rtol=1e-4, atol=1e-9)
        assert np.abs(grad).max() > 1e-6


def test_the_term_is_added_to_the_others(model_folder, text_file, mylosses) -> None:
    without = first_step(model_folder, text_file, Objective(distillation=0.5))
    found = first_step(model_folder, text_file, Objective(distillation=0.5, extra=[mylosses.Entropy(weight=-20.0)]))
    value, grads = closed_form(found.logits, found.slope)
    assert found.terms["loss"] == pytest.approx(without.terms["loss"] - 20 * value, rel=1e-5)
    assert {**without.terms, "loss": 0, "entropy": found.terms["entropy"]} == {**found.terms, "loss": 0}
    for name, grad in grads.items():
        np.testing.assert_allclose(found.grads[name] - without.grads[name], -20 * grad, rtol=1e-3, atol=1e-6)


# -- on the command line ------------------------------------------------------------------------------------


def test_tensorboard_has_its_curve(whole: Path) -> None:
    events = EventAccumulator(str(whole / "tensorboard"))
    events.Reload()
    curves = {tag for tag in events.Tags()["scalars"] if tag.startswith("loss/")}
    assert curves == {f"loss/{name}" for name in ("total", "lm", "distillation", "budget", "kept_norm", "entropy")}
    assert [event.step for event in events.Scalars("loss/entropy")] == [1, 2, 3, 4, 5, 6]
    assert events.Scalars("loss/entropy")[0].value > events.Scalars("loss/entropy")[-1].value > 0


def test_the_checkpoint_and_the_mask_describe_it(whole: Path) -> None:
    described = [{"class_path": "mylosses.Entropy", "init_args": {"weight": 0.5}}]
    told = load_checkpoint(whole / "checkpoints" / "step=2.ckpt")["leap_pl"]
    assert told["learned_with"]["model.objective"]["extra"] == described
    assert told["settings"]["objective"]["extra"] == described


@pytest.mark.parametrize(
    "words", [TYPED, [], ["--model.objective.extra=[{class_path: mylosses.Entropy, init_args: {weight: 0.5}}]"]]
)
def test_a_resumed_run_ends_bit_identical(whole: Path, tmp_path: Path, words: list[str]) -> None:
    """Typed again, or known because it is imported already."""
    main(resume(whole, tmp_path, *words))
    same_end(tmp_path, whole)


def test_the_last_checkpoint_is_resumed_from(whole: Path, tmp_path: Path, model_folder, text_file) -> None:
    """Its folder is looked in after the class was typed, and then the class is known: it is not there twice."""
    (tmp_path / "checkpoints").mkdir()
    step = whole / "checkpoints" / "step=2.ckpt"
    (tmp_path / "checkpoints" / step.name).write_bytes(step.read_bytes())
    main(fit_flags(model_folder, text_file, tmp_path, *TYPED, "--ckpt_path=last"))
    same_end(tmp_path, whole)


def test_other_settings_of_it_are_refused(whole: Path, tmp_path: Path, capsys) -> None:
    line = refused(resume(whole, tmp_path, TYPED[0], "--model.objective.extra.weight=0.25"), capsys)
    assert "model.objective.extra was [{'class_path': 'mylosses.Entropy', 'init_args': {'weight': 0.5}}] and is" in line
    assert "0.25" in line
    assert "model.objective.extra was" in refused(resume(whole, tmp_path, "--model.objective.extra=[]"), capsys)


def changed(whole: Path, folder: Path, extra: Any) -> Path:
    """A run whose checkpoint tells of other terms."""
    checkpoint = torch.load(whole / "checkpoints" / "step=2.ckpt", weights_only=True)
    checkpoint["leap_pl"]["learned_with"]["model.objective"]["extra"] = extra
    (folder / "checkpoints").mkdir(parents=True)
    torch.save(checkpoint, folder / "checkpoints" / "step=2.ckpt")
    return folder


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ([{"class_path": "theirs.Entropy2", "init_args": {"weight": 0.5}}], "type --model.objective.extra with its"),
        ([{"class_path": "os.system", "init_args": {"command": "true"}}], "type --model.objective.extra with its"),
        ([{"class_path": "theirs.Entropy", "init_args": {}}], "type --model.objective.extra with its settings"),
        ([{"class_path": "mylosses.Entropy", "init_args": {"wait": 0.5}}], "Entropy has no argument 'wait'"),
        ([{"class_path": "mylosses.Entropy", "init_args": {"weight": "0.5"}}], "weight is '0.5'"),
        ([{"class_path": "mylosses.Entropy", "init_args": {"weight": float("nan")}}], "weight is nan"),
        ("mylosses.Entropy", "model.objective.extra is 'mylosses.Entropy'"),
        ([3], "model.objective.extra.0 is 3"),
    ],
)
def test_what_a_checkpoint_names_is_refused_in_one_line(whole, tmp_path: Path, capsys, extra: Any, says: str) -> None:
    assert says in refused(resume(changed(whole, tmp_path / "odd", extra), tmp_path / "run"), capsys)


def test_a_class_that_is_not_imported_is_typed_again(whole: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    """As in a process of its own, which knows nothing of the class."""
    monkeypatch.setattr("leap_pl.training.run_settings.imported_kinds", lambda base: {})
    line = refused(resume(whole, tmp_path), capsys)
    assert "step=2.ckpt: model.objective.extra is 'mylosses.Entropy', and a checkpoint may only name classes of" in line
    assert "If this one is yours, type --model.objective.extra with its settings." in line
    main(resume(whole, tmp_path, *TYPED))
    same_end(tmp_path, whole)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--model.objective.extra+=mylosses.Other"], "mylosses.Other does not correspond to a subclass of Term"),
        (["--model.objective.extra+=mylosses.made"], "mylosses.made, but must be a subclass of Term"),
        (["--model.objective.extra+=mylosses.Gone"], "module 'mylosses' has no attribute 'Gone'"),
        (["--model.objective.extra+=leap_pl.losses.term.Term"], "is abstract"),
        ([TYPED[0], "--model.objective.extra.wait=1"], "there is no setting model.objective.extra.wait"),
        (
            [TYPED[0], "--model.objective.extra.weight=.nan"],
            "extra.weight is nan; give a finite number",
        ),
        ([*TYPED, *TYPED], "the name of Entropy is 'entropy', which is that of another term"),
        (["--model.objective.extra=3"], "model.objective.extra: expected Sequence. Got value: 3"),
    ],
)
def test_what_is_typed_is_refused_in_one_line(tmp_path: Path, capsys, words: list[str], says: str) -> None:
    """Before anything that is named is called."""
    assert says in refused(fit_flags(tmp_path / "gone", tmp_path / "gone.txt", tmp_path, *words), capsys)


# -- from Python --------------------------------------------------------------------------------------------


def test_a_module_is_loaded_with_its_terms(whole: Path, tmp_path: Path, mylosses) -> None:
    path = whole / "checkpoints" / "step=6.ckpt"
    module = LeapModule.load_from_checkpoint(path)
    assert module.objective.extra == (mylosses.Entropy(weight=0.5),)
    described = [{"class_path": "elsewhere.Entropy", "init_args": {"weight": 0.5}}]
    other = changed(whole, tmp_path, described) / "checkpoints" / "step=2.ckpt"
    with pytest.raises(UserError, match=r"type --model\.objective\.extra"):
        LeapModule.load_from_checkpoint(other)
    mine = Objective(extra=[mylosses.Entropy()])
    assert LeapModule.load_from_checkpoint(other, objective=mine).objective is mine


class Mean(Term):
    """A term that is not a dataclass, and counts how often it is asked for its value."""

    name = "mean"
    asked = 0

    def value(self, batch: MicroBatch) -> Tensor:
        self.asked += 1
        return torch.stack([gate.logits.mean() for gate in batch.gates.values()]).mean()


class Fading(Mean):
    name = "fading"

    def weight_at(self, fraction: float) -> float:
        return self.weight * (1 - fraction)


class Teacher(Term):
    """The squared distance of the hidden states from the dense model's."""

    name = "teacher"
    needs_teacher = True

    def value(self, batch: MicroBatch) -> Tensor:
        assert batch.teacher is not None
        assert not batch.teacher.requires_grad
        assert batch.teacher.shape == batch.hidden.shape == (len(batch.targets), batch.hidden.shape[-1])
        return (batch.hidden - batch.teacher).square().mean()


def test_a_term_of_weight_0_is_not_asked_for(model_folder, text_file) -> None:
    terms = Mean(weight=0.0), Fading(weight=2.0)
    found = first_step(model_folder, text_file, Objective(extra=terms))
    assert [term.asked for term in terms] == [0, 1]
    assert "mean" not in found.terms
    assert "fading" in found.terms


class Rising(Term):
    """Mean of the hidden states, with a weight that rises from 0."""

    name = "rising"

    def value(self, batch: MicroBatch) -> Tensor:
        return batch.hidden.float().square().mean()

    def weight_at(self, fraction: float) -> float:
        return self.weight * fraction


class Steps(L.Callback):
    """Keep what is trained before each step and at the end."""

    def __init__(self) -> None:
        self.weights: list[list[Tensor]] = []

    def keep(self, _: L.Trainer, pl_module: L.LightningModule, *__: Any) -> None:
        self.weights.append([each.detach().clone() for each in pl_module.parameters() if each.requires_grad])

    on_train_batch_start = on_train_end = keep


def test_weights_under_a_fixed_mask_wait_for_a_term_that_rises_from_0(model_folder, text_file, tmp_path: Path) -> None:
    """Nothing else has a gradient in the first step."""
    prune_command(str(model_folder), str(tmp_path / "mask"), method="magnitude")
    alone = Objective(lm=0, distillation=0, budget=0, weight=0, extra=[Rising(weight=1e3)])
    with pytest.raises(UserError, match="and the weight of each extra term are 0: nothing to learn from"):
        replace(alone, extra=[Mean(weight=0.0)])
    module = LeapModule(
        str(model_folder),
        dtype="float32",
        mask=str(tmp_path / "mask"),
        train_weights="kept",
        objective=alone,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        weight_training=WeightTraining(lr=0.1, warmup_steps=0),
    )
    steps = Steps()
    data = TextDataModule(str(model_folder), str(text_file), seq_length=32, batch_size=2, validation_sequences=0)
    L.Trainer(max_steps=3, accelerator="cpu", callbacks=[steps], **QUIET).fit(module, data)
    first, second, third, end = steps.weights
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert any(not torch.equal(one, other) for one, other in zip(second, third, strict=True))
    assert all(bool(weight.isfinite().all()) for weight in end)


def test_a_term_may_ask_for_the_teacher(model_folder, text_file) -> None:
    without = first_step(model_folder, text_file, Objective())
    found = first_step(model_folder, text_file, Objective(extra=[Teacher()]))
    assert found.terms["teacher"] > 0
    assert found.terms["distillation"] == 0
    assert found.terms["loss"] == pytest.approx(without.terms["loss"] + found.terms["teacher"], rel=1e-5)
    name = next(iter(found.grads))
    assert np.abs(found.grads[name] - without.grads[name]).max() > 0


def test_a_value_that_is_no_scalar(model_folder, text_file) -> None:
    class Vector(Mean):
        name = "vector"

        def value(self, batch: MicroBatch) -> Tensor:
            return super().value(batch).expand(3)

    with pytest.raises(UserError, match=r"the loss term vector is of shape \(3,\); return a scalar tensor"):
        first_step(model_folder, text_file, Objective(extra=[Vector()]))


@pytest.mark.parametrize("name", ["loss", "total", "lm", "distillation", "budget", "kept_norm", "a/b", "", None, 3])
def test_names_that_no_term_may_have(name: Any) -> None:
    term = Mean()
    term.name = name
    with pytest.raises(UserError, match=r"objective.extra: the name of Mean is .*\. Set another\."):
        Objective(extra=[term])


@pytest.mark.parametrize("extra", [3, Mean(), [3], ["mylosses.Entropy"], [Mean], "mean", {"mean": Mean()}])
def test_what_is_no_list_of_terms(extra: Any) -> None:
    with pytest.raises(UserError, match=r"objective.extra (is|holds) .*; give "):
        Objective(extra=extra)


class Weighted(Term):
    name = "weighted"

    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)

    def value(self, batch: MicroBatch) -> Tensor:
        return batch.hidden.sum()


@pytest.mark.parametrize("attributes", [{}, {"weight": None}, {"weight": "0.5"}, {"weight": True}])
def test_a_term_without_a_number_for_its_weight_is_refused(attributes: dict[str, Any]) -> None:
    found = re.escape(repr(attributes.get("weight")))
    with pytest.raises(UserError, match=rf"the weight of Weighted is {found}; give a number, as super\(\)"):
        Objective(extra=[Weighted(**attributes)])
    Objective(extra=[Weighted(weight=2)])
