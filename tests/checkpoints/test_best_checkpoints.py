"""Checkpoints that are kept by a metric, or not written at all; links to them, and what a run says of them."""

import errno
import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import failing
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.strategies import Strategy
from stopped_runs import at_call, flags, kept, send, stopped
from torch.utils.data import DataLoader

from leap_pl import LeapModule, TextDataModule
from leap_pl.callbacks import Checkpoints
from leap_pl.callbacks import lightning_internals as internals
from leap_pl.checkpoints import run_folder
from leap_pl.cli.main import main
from leap_pl.errors import UserError, warn_once
from leap_pl.files import atomic_link
from leap_pl.prior import Prior

pytestmark = pytest.mark.usefixtures("eager", "event_files_in_order")

BEST = ["--checkpoint.monitor=perplexity/hard", "--checkpoint.mode=min", "--checkpoint.save_top_k=3"]
NONE = ["--checkpoint.save_top_k=0", "--checkpoint.save_last=false"]


def without_interval(words: list[str]) -> list[str]:
    return [word for word in words if not word.startswith(("--checkpoint.every_n", "--checkpoint.save_top_k=-1"))]


# -- which are the best --------------------------------------------------------------------------------------------


def test_a_checkpoint_that_was_not_measured_does_not_compete(
    model_folder, text_file, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Validated after steps 2 and 4, stopped after 3: that one has the perplexity of step 2 only by its age."""
    words = without_interval(flags(model_folder, text_file, tmp_path, *BEST))
    with monkeypatch.context() as patch:
        at_call(patch, "training_step", 11, send(signal.SIGTERM))
        stopped(words)
    assert kept(tmp_path) == ["last.ckpt", "step=2.ckpt"]
    last = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    (state,) = [state for key, state in last["callbacks"].items() if key.startswith("Checkpoints")]
    assert last["global_step"] == 3
    assert [Path(path).name for path in state["best_k_models"]] == ["step=2.ckpt"]
    main([*words, "--ckpt_path=last"])
    assert kept(tmp_path) == ["last.ckpt", "step=2.ckpt", "step=4.ckpt"]
    assert (tmp_path / "checkpoints" / "last.ckpt").readlink() == Path("step=4.ckpt")


def state_of(checkpoint: Path) -> dict[str, Any]:
    callbacks = torch.load(checkpoint, weights_only=True)["callbacks"]
    (state,) = [state for key, state in callbacks.items() if key.startswith("Checkpoints")]
    found: dict[str, Any] = state
    return found


def best_of(checkpoint: Path) -> list[str]:
    return sorted(Path(path).name for path in state_of(checkpoint)["best_k_models"])


@pytest.mark.parametrize("last", ["link", "true"])
def test_every_validation_competes_whatever_is_written_between(
    last: str, model_folder, text_file, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every step a checkpoint is due, as in the recipes for several ranks; validated are 2, 4 and 6."""
    words = without_interval(flags(model_folder, text_file, tmp_path, *BEST))
    words += ["--checkpoint.every_n_train_steps=1", "--trainer.max_steps=6", f"--checkpoint.save_last={last}"]
    main(words)
    assert best_of(tmp_path / "checkpoints" / "last.ckpt") == ["step=2.ckpt", "step=4.ckpt", "step=6.ckpt"]
    assert kept(tmp_path) == ["last.ckpt", "step=2.ckpt", "step=4.ckpt", "step=6.ckpt"]
    files = {step: tmp_path / "checkpoints" / f"step={step}.ckpt" for step in (2, 4, 6)}
    assert {step: torch.load(file, weights_only=True)["global_step"] for step, file in files.items()} == {
        step: step for step in files
    }


@pytest.mark.parametrize("monitor", ["perplexity/hard", "step"])
def test_perplexities_of_two_texts_do_not_compete(
    model_folder, text_file, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn, monitor: str
) -> None:
    """Resumed with a validation text whose perplexity is higher: the best of the first part is no better for that."""
    text, other = tmp_path / "other.jsonl", tmp_path / "kept.jsonl"
    text.write_text("\n".join(json.dumps({"text": "%%% " * 60 + str(number)}) for number in range(20)))
    shutil.copy(text_file, other)
    words = without_interval(flags(model_folder, text_file, tmp_path, f"--checkpoint.monitor={monitor}"))
    words += ["--checkpoint.save_top_k=1", "--trainer.max_steps=6"]
    texts = [f"--data.validation_text={path}" for path in (text, other)]
    with monkeypatch.context() as patch:
        at_call(patch, "training_step", 11, send(signal.SIGTERM))
        stopped([*words, texts[0]])
    (score,) = state_of(tmp_path / "checkpoints" / "last.ckpt")["best_k_models"].values()
    recwarn.clear()
    monkeypatch.setattr(
        "leap_pl.training.validation.TokenPerplexity.compute", lambda self: torch.tensor(2.0) * score.abs().clamp(min=9)
    )
    main([*words, texts[1], "--ckpt_path=last"])
    state = state_of(tmp_path / "checkpoints" / "last.ckpt")
    assert [Path(path).name for path in state["best_k_models"]] == [f"step={4 if monitor != 'step' else 6}.ckpt"]
    said = [str(warning.message) for warning in recwarn if "no longer measured as before" in str(warning.message)]
    assert len(said) == (monitor != "step")


def test_a_link_to_itself_is_not_made(tmp_path: Path) -> None:
    """As after a step that was written to last.ckpt alone, since it was not measured."""
    last = tmp_path / "last.ckpt"
    last.write_text("whole")
    run: Any = SimpleNamespace(is_global_zero=True, strategy=SimpleNamespace(barrier=lambda: None))
    internals.SavingCheckpoint._link_checkpoint(run, str(last), str(last))
    assert last.read_text() == "whole"


def test_where_all_are_kept_none_competes(model_folder, text_file, tmp_path: Path) -> None:
    words = without_interval(flags(model_folder, text_file, tmp_path, *BEST[:2]))
    main([*words, "--checkpoint.every_n_train_steps=1", "--checkpoint.save_top_k=-1"])
    assert {"step=2.ckpt", "step=3.ckpt", "step=4.ckpt"} <= {*kept(tmp_path)}


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_folder_becomes_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchanges: bool) -> None:
    """As of a sharded run, whose last.ckpt was written before the first validation."""
    if not exchanges:
        monkeypatch.setattr("leap_pl.files.atomic._exchange", lambda one, other: False)
    for name in ("step=2.ckpt", "last.ckpt"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part").write_text(name)
    run: Any = SimpleNamespace(is_global_zero=True, strategy=SimpleNamespace(barrier=lambda: None))
    internals.SavingCheckpoint._link_checkpoint(run, str(tmp_path / "step=2.ckpt"), str(tmp_path / "last.ckpt"))
    assert (tmp_path / "last.ckpt").readlink() == Path("step=2.ckpt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "step=2.ckpt"]
    atomic_link(tmp_path / "last.ckpt", tmp_path / "step=2.ckpt")  # a link to a folder is none


@pytest.mark.parametrize("folder", [True, False])
def test_where_there_are_no_links_there_are_copies(tmp_path: Path, monkeypatch, folder: bool) -> None:
    def refuses(*_: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(internals, "atomic_link", refuses)
    checkpoint, last = tmp_path / "step=2.ckpt", tmp_path / "last.ckpt"
    if folder:
        checkpoint.mkdir()
    file = checkpoint / "part" if folder else checkpoint
    run: Any = SimpleNamespace(is_global_zero=True, strategy=SimpleNamespace(barrier=lambda: None))
    for content in ("one", "two"):
        file.write_text(content)
        internals.SavingCheckpoint._link_checkpoint(run, str(checkpoint), str(last))
        assert not last.is_symlink()
        assert (last / "part" if folder else last).read_text() == content


def test_a_run_that_resumes_where_there_are_no_links_has_a_copy(tmp_path: Path, monkeypatch) -> None:
    def refuses(*_: Any) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(run_folder, "atomic_link", refuses)
    (tmp_path / "step=2.ckpt").write_text("whole")
    run_folder.link_last(tmp_path, tmp_path / "step=2.ckpt")
    assert (tmp_path / "last.ckpt").read_text() == "whole"
    assert not (tmp_path / "last.ckpt").is_symlink()


@pytest.mark.parametrize("stops", [False, True])
def test_a_command_that_ends_holds_no_optimizer_state(
    stops: bool, model_folder, text_file, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning would copy it from a device to host memory; the checkpoint has it."""
    ended, before = [], Strategy.teardown

    def teardown(self: Strategy) -> None:
        learned = [parameter for group in self.optimizers[0].param_groups for parameter in group["params"]]
        ended.append((bool(learned), dict(self.optimizers[0].state), [one.grad for one in learned]))
        before(self)

    monkeypatch.setattr(Strategy, "teardown", teardown)
    if stops:
        at_call(monkeypatch, "training_step", 8, send(signal.SIGTERM))
        stopped(flags(model_folder, text_file, tmp_path))
    else:
        main(flags(model_folder, text_file, tmp_path))
    assert all(some and not state and not any(grad is not None for grad in grads) for some, state, grads in ended)
    assert len(ended) == 1
    for path in tmp_path.rglob("*.ckpt"):
        assert torch.load(path, weights_only=True)["optimizer_states"][0]["state"]


def test_optimizer_states_stay_for_a_callback_that_comes_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may save a checkpoint after the others have."""
    monkeypatch.setattr("leap_pl.callbacks.checkpoints.current", object)
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    optimizer = torch.optim.AdamW([parameter])
    optimizer.step()
    first, last, both = Checkpoints(), Checkpoints(), Checkpoints(save_on_exception=True)
    for callback, callbacks in ((first, [first, last]), (last, [first, last]), (both, [both])):
        callback._free_state(SimpleNamespace(checkpoint_callbacks=callbacks, optimizers=[optimizer]))  # type: ignore
        assert optimizer.state
        assert parameter.grad is not None
    last._free_state(SimpleNamespace(checkpoint_callbacks=[last], optimizers=[optimizer]))  # type: ignore
    assert not optimizer.state
    assert parameter.grad is None


def test_a_program_may_save_a_checkpoint_of_a_run_that_has_ended(
    model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    saving, text = Checkpoints(str(tmp_path / "run")), TextDataModule(text=str(text_file), seq_length=32, batch_size=2)
    trainer = Trainer(accelerator="cpu", max_steps=1, callbacks=[saving], logger=False, enable_progress_bar=False)
    trainer.fit(LeapModule(str(model_folder), dtype="float32", prior=Prior(method="none")), text)
    trainer.save_checkpoint(tmp_path / "later.ckpt")
    assert torch.load(tmp_path / "later.ckpt", weights_only=True)["optimizer_states"][0]["state"]


# -- none at all ---------------------------------------------------------------------------------------------------


def test_a_stop_without_checkpoints_says_so(
    model_folder, text_file, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    with monkeypatch.context() as patch:
        at_call(patch, "training_step", 8, send(signal.SIGTERM))
        stopped([*without_interval(flags(model_folder, text_file, tmp_path)), *NONE])
    said = capsys.readouterr().err
    assert "SIGTERM: stopped at step 2; no checkpoint is written, since checkpoint.save_top_k" in said
    assert kept(tmp_path) == []


def test_an_end_without_checkpoints_says_so(
    model_folder, text_file, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def stop(self: Any, trainer: Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step == 2

    monkeypatch.setattr("leap_pl.callbacks.SparsityLogger.on_train_batch_end", stop)
    main([*without_interval(flags(model_folder, text_file, tmp_path)), *NONE])
    said = capsys.readouterr().err
    assert (
        "ended at step 2 of 4; learning is not finished, and no mask is written. There is no checkpoint, since" in said
    )
    assert "None" not in said


def test_a_loggers_folder_that_is_a_url_is_refused(model_folder, text_file, tmp_path: Path, capsys) -> None:
    words = [word for word in flags(model_folder, text_file, tmp_path) if not word.startswith("--checkpoint.dirpath")]
    words = [word for word in words if "logger" not in word]
    for last in ("link", "true"):
        more = ["--trainer.logger=false", "--trainer.default_root_dir=memory://runs", f"--checkpoint.save_last={last}"]
        assert "is a URL, and a run resumes from files" in failing(capsys, [*words, *more])


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("save_weights_only=true", "leaves out what a run needs to resume. Leave it out"),
        ("dirpath=memory://runs/one", "is a URL, and a run resumes from files. Give a folder"),
        (
            "save_on_train_epoch_end=true",
            "would write the last checkpoint, by which a run is finished, before",
        ),
        ("every_n_epochs=2", "every_n_epochs is 2, and a run is one epoch: nothing would be saved at validations"),
    ],
)
def test_checkpoints_that_no_run_could_resume_from(option: str, says: str, model_folder, text_file, tmp_path, capsys):
    assert says in failing(capsys, flags(model_folder, text_file, tmp_path, f"--checkpoint.{option}"))


# -- what a checkpoint says of others -------------------------------------------------------------------------------


def test_a_checkpoint_names_no_path_that_is_removed(model_folder, text_file, tmp_path: Path) -> None:
    """A checkpoint is data: of its paths the names count, in the run's own folder."""
    words = without_interval(flags(model_folder, text_file, tmp_path, "--checkpoint.save_top_k=1"))
    folder, victim = tmp_path / "checkpoints", tmp_path / "victim"
    victims = [victim / "step=1.ckpt", tmp_path / "victim.ckpt" / "file", tmp_path / "notes" / "file"]
    for path in victims:
        path.parent.mkdir(exist_ok=True)
        path.write_text("not of this run")
    with pytest.MonkeyPatch.context() as patch:
        at_call(patch, "training_step", 11, send(signal.SIGTERM))
        stopped(words)
    path = (folder / "last.ckpt").resolve()
    checkpoint = torch.load(path, weights_only=True)
    (state,) = [state for key, state in checkpoint["callbacks"].items() if key.startswith("Checkpoints")]
    aimed = [str(folder / ".." / "victim.ckpt"), str(victim / "step=1.ckpt"), str(folder / ".." / "notes")]
    for there in ({}, {"dirpath": str(folder)}):
        state.pop("dirpath", None)
        paths = {"last_model_path": aimed[0], "kth_best_model_path": aimed[1], "best_model_path": aimed[2]}
        state.update({"best_k_models": dict.fromkeys(aimed, float("-inf"))}, **paths, **there)
        torch.save(checkpoint, path)
        loaded = Checkpoints(str(folder), save_top_k=1)
        loaded.load_state_dict(state)
        named = {*loaded.best_k_models, *loaded._surplus, loaded.last_model_path, loaded.kth_best_model_path}
        assert named - {""} <= {str(folder / name) for name in ("victim.ckpt", "step=1.ckpt")}
        assert not any(loaded._should_remove_checkpoint(Trainer(logger=False), one, "x") for one in aimed)
    main([*words, "--ckpt_path=last"])
    assert [path.read_text() for path in victims] == ["not of this run"] * 3
    assert kept(tmp_path) == ["last.ckpt", "step=3.ckpt", "step=4.ckpt"]  # of the first it says nothing any more


@pytest.mark.parametrize("named", [True, False])
def test_a_run_that_no_checkpoint_was_named_for_resumes_from_none(
    named: bool, model_folder, text_file, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """With OnExceptionCheckpoint Lightning would from the newest that it finds, also where another is replaced."""
    monkeypatch.chdir(tmp_path)
    words = flags(model_folder, text_file, tmp_path)
    if not named:  # Lightning puts them below its root
        words = [word for word in words if not word.startswith(("--checkpoint.dirpath", "--trainer.logger"))]
        words += ["--trainer.logger=false", f"--trainer.default_root_dir={tmp_path}"]
    main(words)
    saving = f"--trainer.callbacks+={{class_path: OnExceptionCheckpoint, init_args: {{dirpath: {tmp_path / 'other'}}}}}"
    message = failing(capsys, [*words, saving, "--force"])
    assert f"resumes from {tmp_path / 'checkpoints' / 'last.ckpt'} by itself, and no --ckpt_path was typed" in message
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "on_exception.ckpt").touch()
    assert "on_exception.ckpt by itself" in failing(capsys, [*words, saving, "--force"])


def test_a_run_in_a_folder_above_removes_its_checkpoints(
    model_folder, text_file, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose path has two dots."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    words = without_interval(flags(model_folder, text_file, tmp_path, "--checkpoint.save_top_k=1"))
    words = [word for word in words if not word.startswith(("--checkpoint.dirpath", "--trainer.logger"))]
    main([*words, "--trainer.logger=false", "--trainer.default_root_dir=../runs"])
    assert kept(tmp_path / "runs") == ["last.ckpt", "step=4.ckpt"]


def test_a_run_that_was_moved_removes_its_older_checkpoints(model_folder, text_file, tmp_path: Path) -> None:
    words = without_interval(flags(model_folder, text_file, tmp_path / "a", "--checkpoint.save_top_k=1"))
    with pytest.MonkeyPatch.context() as patch:
        at_call(patch, "training_step", 11, send(signal.SIGTERM))
        stopped(words)
    (tmp_path / "a").rename(tmp_path / "b")
    words = without_interval(flags(model_folder, text_file, tmp_path / "b", "--checkpoint.save_top_k=1"))
    main([*words, "--ckpt_path=last"])
    assert kept(tmp_path / "b") == ["last.ckpt", "step=4.ckpt"]


def test_the_link_leads_to_a_checkpoint_while_another_is_removed(
    model_folder, text_file, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Removing a folder of many gigabytes takes a while, in which a process may be killed."""
    removed, real = [], Strategy.remove_checkpoint

    def remove(self: Strategy, path: Any) -> None:
        link = Path(path).with_name("last.ckpt")
        removed.append((Path(path).name, link.resolve().name, link.resolve().exists()))
        real(self, path)

    monkeypatch.setattr(Strategy, "remove_checkpoint", remove)
    main(without_interval(flags(model_folder, text_file, tmp_path, "--checkpoint.save_top_k=1")))
    assert removed == [("step=2.ckpt", "step=4.ckpt", True)]


# -- data of one's own ---------------------------------------------------------------------------------------------


class Own(LightningDataModule):
    def train_dataloader(self) -> Any:
        return DataLoader([{"input_ids": torch.arange(16)}] * 8, batch_size=1)  # type: ignore[arg-type]


class Learner(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.weight.sum() * batch["input_ids"].float().mean()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        from leap_pl.checkpoints.rewind import rewind

        rewind(self.trainer, checkpoint)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-6)


def test_a_checkpoint_amid_a_step_of_other_data_says_what_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warn_once.cache_clear()
    with monkeypatch.context() as patch:
        real = Learner.training_step

        def step(self: Learner, batch: Any, batch_idx: int) -> torch.Tensor:
            if batch_idx == 6:
                send(signal.SIGTERM)()
            return real(self, batch, batch_idx)

        patch.setattr(Learner, "training_step", step)
        settings: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "accelerator": "cpu"}
        run = Trainer(
            max_steps=2,
            accumulate_grad_batches=4,
            callbacks=[Checkpoints(str(tmp_path), every_n_train_steps=100)],
            **settings,
        )
        with pytest.warns(UserWarning, match="of the middle of an optimizer step"), pytest.raises(SystemExit):
            run.fit(Learner(), Own())
    warn_once.cache_clear()


def plain_trainer(saving: Checkpoints, **settings: Any) -> Trainer:
    quiet: dict[str, Any] = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    return Trainer(callbacks=[saving], accelerator="cpu", max_epochs=-1, **quiet, **settings)


def test_a_program_keeps_its_best_where_temporary_files_are_on_another_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning moves a file there by copying, which follows the link to the best."""

    def another_disk(source: Any, target: Any, **_: Any) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "rename", another_disk)
    saving = Checkpoints(str(tmp_path), monitor="step", mode="min", save_top_k=1, every_n_train_steps=1)
    plain_trainer(saving, max_steps=3).fit(Learner(), Own())
    steps = {path.name: torch.load(path, weights_only=True)["global_step"] for path in sorted(tmp_path.glob("*.ckpt"))}
    assert steps == {"last.ckpt": 3, "step=1.ckpt": 1}


@pytest.mark.parametrize("accumulated", [3, 16])
def test_a_step_that_an_epoch_ends_is_saved(tmp_path: Path, accumulated: int) -> None:
    """Of text of eight batches, which begins again: the last of them ends a step, however few there were."""
    saving = Checkpoints(str(tmp_path), save_top_k=-1, every_n_train_steps=1)
    plain_trainer(saving, max_steps=4, accumulate_grad_batches=accumulated).fit(Learner(), Own())
    assert {path.name for path in tmp_path.glob("step*")} == {f"step={step}.ckpt" for step in range(1, 5)}


def test_a_url_is_refused_from_python() -> None:
    with pytest.raises(UserError, match="is a URL"):
        Checkpoints("s3://bucket/run")


def test_signals_are_told_to_other_ranks_on_the_host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A tensor on the devices would drain them in every micro-batch."""
    groups, others = [], {"number": 0}

    def reduce(numbers: torch.Tensor, op: Any, group: Any) -> None:
        assert (numbers.device.type, op, group) == ("cpu", torch.distributed.ReduceOp.MAX, "gloo")
        numbers.fill_(max(int(numbers), others["number"]))

    monkeypatch.setattr(torch.distributed, "new_group", lambda backend, timeout: groups.append(backend) or backend)
    monkeypatch.setattr(torch.distributed, "all_reduce", reduce)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", groups.remove)
    saving, run = Checkpoints(str(tmp_path), every_minutes=1), SimpleNamespace(world_size=2, is_global_zero=False)
    saving._stop_if_signalled(run)  # type: ignore[arg-type]
    assert not saving._time_is_up(run)  # type: ignore[arg-type]
    others["number"] = 1
    assert saving._time_is_up(run)  # type: ignore[arg-type]  # by the clock of rank zero
    others["number"] = int(signal.SIGTERM)
    with pytest.raises(SystemExit):
        saving._stop_if_signalled(run)  # type: ignore[arg-type]
    assert groups == ["gloo"]
    saving.teardown(run, None, "fit")  # type: ignore[arg-type]
    assert groups == []


def test_a_checkpoint_is_due_half_an_hour_after_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [5000.0]
    monkeypatch.setattr("leap_pl.callbacks.checkpoints.time.monotonic", lambda: now[0])
    monkeypatch.setattr("leap_pl.callbacks.checkpoints.saves_shards", lambda trainer: False)
    monkeypatch.setattr("leap_pl.callbacks.checkpoints.record_checkpoint", lambda *_: None)
    monkeypatch.setattr(internals.SavingCheckpoint, "write", lambda *_: None)
    saving, run = Checkpoints(str(tmp_path)), SimpleNamespace(world_size=1, is_global_zero=True, loggers=[])
    saving.write(run, str(tmp_path / "a.ckpt"))  # type: ignore[arg-type]
    for _ in range(2):
        now[0] += 1799
        assert not saving._time_is_up(run)  # type: ignore[arg-type]
        now[0] += 1
        assert saving._time_is_up(run)  # type: ignore[arg-type]
        saving.write(run, str(tmp_path / "a.ckpt"))  # type: ignore[arg-type]
