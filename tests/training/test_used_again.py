"""From Python: modules, trainers and callbacks that are used twice."""

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from python_runs import again, data, trainer

from leap_pl import LeapModule, UserError
from leap_pl.callbacks import Checkpoints, RunReport, SparsityLogger
from leap_pl.checkpoints.layout import masks_from_checkpoint
from leap_pl.export.card import unfinished
from leap_pl.prior import Prior

pytestmark = pytest.mark.usefixtures("eager")


def test_a_module_that_was_used_does_not_start_silently_without_its_prior(module: LeapModule, text_file: Path) -> None:
    """A validation loads the model, without a prior, and a fit would go on from there."""
    text = data(text_file)
    with pytest.raises(UserError, match="has no mask before a fit"):
        trainer().validate(module, text, verbose=False)
    with pytest.raises(UserError, match=r"was validated, fitted or loaded before.*Make a new LeapModule, or resume"):
        trainer(max_steps=1).fit(module, text)
    fresh = again(module)
    trainer(max_steps=1).fit(fresh, text)
    with pytest.raises(UserError, match=r"was validated, fitted or loaded before"):
        trainer(max_steps=1).fit(fresh, text)


def test_a_fit_that_failed_before_its_first_step_may_be_repeated(module: LeapModule, text_file: Path) -> None:
    """Out of memory, for example: the module is at its prior still."""
    expected = again(module)
    trainer(max_steps=1).fit(expected, data(text_file))
    real = module.training_step

    def fail(batch: Any, batch_idx: int) -> Any:
        raise torch.OutOfMemoryError

    module.training_step = fail  # type: ignore[method-assign]
    with pytest.raises(torch.OutOfMemoryError):
        trainer(max_steps=1).fit(module, data(text_file))
    module.training_step = real  # type: ignore[method-assign]
    trainer(max_steps=1).fit(module, data(text_file))
    for name, gate in module.gates.items():
        assert torch.equal(gate.logits, expected.gates[name].logits)


def test_a_trainer_that_was_used_is_refused(module: LeapModule, text_file: Path) -> None:
    """Its step goes on, but text, optimizer and learning rate would begin again, or nothing would be learned."""
    used = trainer(max_steps=2)
    used.fit(module, data(text_file))
    with pytest.raises(UserError, match=r"this trainer is at step 2 of an earlier fit.*Make a new Trainer, or resume"):
        used.fit(again(module), data(text_file))


def test_a_used_module_and_trainer_resume(module: LeapModule, text_file: Path, tmp_path: Path) -> None:
    saved = Checkpoints(str(tmp_path / "run"), every_n_train_steps=1, save_top_k=-1)
    text = data(text_file)
    trainer(saved, max_steps=2).fit(module, text)
    (first,) = (tmp_path / "run").glob("*step=1*.ckpt")
    learned = {name: gate.logits.detach().clone() for name, gate in module.gates.items()}
    with torch.no_grad():
        for gate in module.gates.values():
            gate.logits.zero_()  # else a run that trains nothing would end with them too
    trainer(max_steps=2).fit(module, text, ckpt_path=str(first))
    for name, gate in module.gates.items():
        assert torch.equal(gate.logits, learned[name])


def test_a_checkpoint_without_its_place_in_a_run_is_no_start(
    module: LeapModule, text_file: Path, tmp_path: Path
) -> None:
    """Of a trainer that only validated, or of weights alone: a run would begin anew, from the mask that was learned."""
    text, first = data(text_file), tmp_path / "first.ckpt"
    run = trainer(max_steps=2)
    run.fit(module, text)
    run.save_checkpoint(first)
    measured = trainer()
    loaded = LeapModule.load_from_checkpoint(first)
    measured.validate(loaded, text, ckpt_path=str(first), verbose=False)
    measured.save_checkpoint(tmp_path / "validated.ckpt")
    run.save_checkpoint(tmp_path / "alone.ckpt", weights_only=True)
    stored = torch.load(first, weights_only=True)
    for part in ("loops", "lr_schedulers"):
        torch.save({name: value for name, value in stored.items() if name != part}, tmp_path / f"{part}.ckpt")
    lacks = {
        "validated": r"no states of its optimizer: it",
        "alone": r"no states of its optimizer or state of its schedule: it",
        "loops": r"no place in its run: it was not written by a run that learns",
        "lr_schedulers": r"no state of its schedule: it",
    }
    for name, says in lacks.items():
        path = str(tmp_path / f"{name}.ckpt")
        with pytest.raises(UserError, match=says):
            trainer(max_steps=2).fit(again(module), text, ckpt_path=path)
        assert masks_from_checkpoint(path).digest_of_bits() == module.mask_set().digest_of_bits()
    trainer(max_steps=2).fit(again(module), text, ckpt_path=str(first))


def test_a_validation_of_a_learned_mask_is_not_that_of_the_prior(
    module: LeapModule, text_file: Path, tmp_path: Path
) -> None:
    saved = Checkpoints(str(tmp_path), every_n_train_steps=1, save_top_k=-1)
    trainer(saved, max_steps=2).fit(module, text := data(text_file))
    (first,) = tmp_path.glob("*step=1*.ckpt")
    resumed = LeapModule.load_from_checkpoint(first)
    trainer().validate(resumed, text, ckpt_path=str(first), verbose=False)
    assert {"hard", "dense"} == resumed.validation.figures().keys()
    trainer(max_steps=2).fit(resumed, text, ckpt_path=str(first))
    assert "prior" not in resumed.validation.figures()


def test_a_copy_runs_its_own_model(module: LeapModule, text_file: Path) -> None:
    trainer(max_steps=1).fit(module, data(text_file))
    ids = torch.arange(24).view(1, -1)
    copied = copy.deepcopy(module)
    with torch.no_grad():
        for gate in copied.gates.values():
            gate.logits.neg_()
        for one in (copied, module):
            one.choose_hard_masks()
        with copied.state.passing("hard"), module.state.passing("hard"):
            own = copied.head(copied.states(ids).flatten(0, 1))
            expected = copied.model(input_ids=ids, use_cache=False).logits[0]
            other = module.head(module.states(ids).flatten(0, 1))
    torch.testing.assert_close(own, expected)
    assert not torch.allclose(own, other, atol=1e-2)


def test_a_mask_before_a_fit_is_one_line(module: LeapModule) -> None:
    with pytest.raises(UserError, match="has no mask before a fit"):
        module.mask_set()


def test_what_a_mask_says_of_its_run_outlasts_a_validation(module: LeapModule, text_file: Path, tmp_path: Path) -> None:
    trainer(max_steps=2, accumulate_grad_batches=2, gradient_clip_val=0.7).fit(module, data(text_file))
    before = module.mask_set().provenance
    assert (before.config["steps"], before.config["max_steps"]) == (2, 2)
    other = tmp_path / "other.jsonl"
    other.write_text(text_file.read_text())
    trainer().validate(module, data(other), verbose=False)
    assert module.mask_set().provenance == before


def test_what_a_mask_says_of_a_run_that_was_interrupted(module: LeapModule, text_file: Path, tmp_path: Path) -> None:
    """Also after a validation, which every notebook does next."""

    class Interrupting(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 2:
                raise InterruptedError

    text, run = data(text_file), trainer(Interrupting(), max_steps=5, gradient_clip_val=0.7)
    with pytest.raises(InterruptedError):
        run.fit(module, text)
    before = module.mask_set().provenance
    assert [before.config[name] for name in ("steps", "max_steps", "gradient_clip_val")] == [2, 5, 0.7]
    with pytest.raises(UserError, match="this module was validated, fitted or loaded before"):
        trainer(max_steps=7).fit(module, text)
    for again_with in (trainer(), run):
        again_with.validate(module, text, verbose=False)
        assert module.mask_set().provenance == before
    assert unfinished(module.mask_set()) == "the mask is of step 2 of 5; "
    run.save_checkpoint(tmp_path / "a.ckpt")
    assert masks_from_checkpoint(tmp_path / "a.ckpt").provenance.config["max_steps"] == 5


def test_what_a_mask_says_of_a_finished_run_that_was_resumed(
    module: LeapModule, text_file: Path, tmp_path: Path
) -> None:
    """Lightning trains no step then, and calls no hook of it."""
    trainer(Checkpoints(str(tmp_path / "run")), max_steps=2).fit(module, data(text_file))
    loaded = again(module)
    trainer(max_steps=2).fit(loaded, data(text_file), ckpt_path=str(tmp_path / "run" / "last.ckpt"))
    trainer(gradient_clip_val=0.3).validate(loaded, data(text_file), verbose=False)
    config = loaded.mask_set().provenance.config
    assert [config[name] for name in ("steps", "max_steps", "gradient_clip_val")] == [2, 2, None]


def test_a_refused_fit_leaves_no_plan_to_print(
    module: LeapModule, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="monitors nothing"):
        trainer(RunReport(), EarlyStopping("nothing"), max_steps=1).fit(module, data(text_file))
    trainer(RunReport(), max_steps=1).fit(module, data(text_file))
    assert capsys.readouterr().err.count("gated, 14 tensors") == 1


def test_what_a_mask_says_after_other_checkpoints_and_refused_fits(
    module: LeapModule, text_file: Path, tmp_path: Path
) -> None:
    saved = Checkpoints(str(tmp_path / "run"), every_n_train_steps=1, save_top_k=-1)
    text = data(text_file)
    trainer(saved, max_steps=2).fit(module, text)
    before = module.mask_set().provenance
    with pytest.raises(UserError, match="loaded before"):
        trainer(max_steps=7).fit(module, text)
    assert module.mask_set().provenance == before
    first = min((tmp_path / "run").glob("*step=1*.ckpt"))
    trainer().validate(module, text, ckpt_path=str(first), verbose=False)
    assert module.mask_set().provenance.config["steps"] == 1


def test_an_optimizer_may_look_at_its_parameters(model_folder: Path, text_file: Path) -> None:
    for make in (
        lambda parameters: torch.optim.AdamW([{"params": parameters, "lr": 1e-3}]),
        lambda parameters: torch.optim.AdamW([one for one in parameters if one.requires_grad], lr=1e-3),
    ):
        module = LeapModule(str(model_folder), dtype="float32", prior=Prior(method="none"), optimizer=make)
        trainer(max_steps=1).fit(module, data(text_file))
        assert module.mask_set().total


def test_callbacks_of_two_runs_tell_of_one_each(module: LeapModule, text_file: Path, tmp_path: Path) -> None:
    saved, curves, report = Checkpoints(str(tmp_path / "first")), SparsityLogger(every_n_steps=1), RunReport()
    trainer(saved, curves, report, max_steps=2).fit(module, data(text_file))
    assert curves.last_bits
    newest = (tmp_path / "first" / "last.ckpt").resolve()
    assert newest.exists()
    second = again(module)
    with pytest.raises(UserError, match="holds another run"):
        trainer(saved, curves, report, max_steps=2).fit(second, data(text_file))
    assert (tmp_path / "first" / "last.ckpt").resolve() == newest
    curves.setup(trainer(), second, "fit")
    assert (curves.last_bits, curves.prior_bits, curves.last_step) == ({}, {}, -1)
    report.setup(trainer(), second, "fit")
    assert report.state_dict() == {"start": None}


def test_a_plan_is_told_once_after_a_fit_that_failed(module: LeapModule, tmp_path: Path, capsys: Any) -> None:
    text = tmp_path / "none.jsonl"
    with pytest.raises(UserError):
        trainer(RunReport(), max_steps=1).fit(module, data(text))
    assert len(module.when_loaded) <= 1
    text.write_text('{"text": "one two three four five six seven eight nine ten eleven twelve"}\n' * 20)
    capsys.readouterr()
    trainer(RunReport(), max_steps=1).fit(module, data(text, validation_sequences=0))
    assert module.when_loaded == []
