"""What a mask says of the run it comes from: what acted, how far it came, and the prior it started from."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from conftest import Run, fit_flags
from lightning.pytorch.callbacks import Timer
from recovered_runs import Flags
from stopped_runs import STEPS, WINDOW, Outcome, at_call, curves, flags, kept, outcome, same, send, stopped

from leap_pl import LeapModule, TextDataModule
from leap_pl.checkpoints.layout import masks_from_checkpoint
from leap_pl.cli.main import main
from leap_pl.errors import UserError
from leap_pl.masks import MaskSet
from leap_pl.prior import started_prior
from leap_pl.prior.settings import Prior
from leap_pl.training.live_settings import of_optimizer, of_scheduler

pytestmark = pytest.mark.usefixtures("eager", "event_files_in_order")


def told(folder: Path, name: str = "mask") -> dict[str, Any]:
    return MaskSet.load(folder / "checkpoints" / f"{name}.safetensors").provenance.config


# -- what acted ---------------------------------------------------------------------------------------------


def test_what_the_provenance_tells(finished: Run, text_file: Path) -> None:
    config = told(finished.folder)
    assert config["optimizer"] == {
        "class": "AdamW",
        "lr": 1e-3,
        "betas": [0.9, 0.95],
        "eps": 1e-8,
        "weight_decay": 0.0,
        "amsgrad": False,
        "maximize": False,
        "capturable": False,
        "differentiable": False,
        "fused": True,
        "decoupled_weight_decay": True,
    }
    warmup = {"function": "warmup_cosine", "total": 6, "warmup": 5}
    assert config["lr_scheduler"] == {"class": "LambdaLR", "functions": [warmup]}
    assert (config["gradient_clip_val"], config["gradient_clip_algorithm"]) == (1.0, "norm")
    assert (config["precision"], config["dtype"], config["logits_dtype"]) == ("32-true", "float32", "float32")
    assert (config["accumulate_grad_batches"], config["ranks"], config["seed"]) == (2, 1, 0)
    assert (config["steps"], config["max_steps"]) == (6, 6)
    data = config["data"]
    assert (data["text"], data["tokens"], len(data["sha256"])) == (str(text_file), 6 * 2 * 2 * 32, 64)
    prior = MaskSet.load(finished.mask.with_name("prior.safetensors"))
    assert config["prior_digests"] == {"prior": prior.digest_of_bits()}


def test_groups_of_an_optimizer_and_not_its_defaults() -> None:
    one, two = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    optimizer = torch.optim.AdamW([{"params": [one], "lr": 3e-3, "weight_decay": 0.3}], lr=1e-3)
    assert of_optimizer(optimizer)["lr"] == 3e-3
    assert of_optimizer(optimizer)["weight_decay"] == 0.3
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.step()
    assert of_optimizer(optimizer)["lr"] == 3e-3  # before any schedule
    optimizer.add_param_group({"params": [two], "lr": torch.tensor(0.5)})
    assert [group["lr"] for group in of_optimizer(optimizer)["groups"]] == [3e-3, 0.5]
    json.dumps(of_optimizer(optimizer))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda o: torch.optim.lr_scheduler.StepLR(o, 7, 0.3), {"step_size": 7, "gamma": 0.3}),
        (lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [4, 2]), {"milestones": [2, 4], "gamma": 0.1}),
        (lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 9, 0.1), {"T_max": 9, "eta_min": 0.1}),
    ],
)
def test_a_scheduler_tells_what_it_goes_by_and_not_where_it_stands(
    make: Callable[[torch.optim.Optimizer], Any], expected: dict[str, Any]
) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = make(optimizer)
    before = of_scheduler(scheduler)
    assert before == {"class": type(scheduler).__name__, **expected}
    for _ in range(5):
        optimizer.step()
        scheduler.step()
    assert of_scheduler(scheduler) == before
    # After a resume the state of the checkpoint acts, whatever was typed.
    typed = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)
    if isinstance(scheduler, torch.optim.lr_scheduler.StepLR):
        typed.load_state_dict(scheduler.state_dict())
        assert of_scheduler(typed) == before


def test_schedulers_within_one() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    kinds = torch.optim.lr_scheduler
    both = kinds.SequentialLR(optimizer, [kinds.ConstantLR(optimizer, 0.5, 3), kinds.StepLR(optimizer, 4)], [3])
    assert of_scheduler(both) == {
        "class": "SequentialLR",
        "milestones": [3],
        "schedulers": [
            {"class": "ConstantLR", "factor": 0.5, "total_iters": 3},
            {"class": "StepLR", "step_size": 4, "gamma": 0.1},
        ],
    }


def test_after_a_resume_the_state_of_the_checkpoint_is_told(
    finished: Run, model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    """Lightning lays the optimizer's state of the checkpoint over what was typed: that acts."""
    checkpoint = torch.load(finished.folder / "checkpoints" / "step=4.ckpt", weights_only=True)
    (group,) = checkpoint["optimizer_states"][0]["param_groups"]
    group.update(weight_decay=0.25, betas=(0.5, 0.75), initial_lr=0.02)
    torch.save(checkpoint, tmp_path / "step=4.ckpt")
    main(fit_flags(model_folder, text_file, tmp_path, f"--ckpt_path={tmp_path / 'step=4.ckpt'}"))
    optimizer = told(tmp_path)["optimizer"]
    assert (optimizer["weight_decay"], optimizer["betas"], optimizer["lr"]) == (0.25, [0.5, 0.75], 0.02)


@pytest.mark.parametrize("typed", ["--model.gate.strength=9", "--model.prior.sequences=77", "--model.optimizer.lr=1"])
def test_what_is_typed_at_a_resume_and_does_not_act_is_not_claimed(
    finished: Run, model_folder: Path, text_file: Path, tmp_path: Path, typed: str
) -> None:
    """It may be refused; else the mask and all that it says are those of the run that was not stopped."""
    shutil.copytree(finished.folder / "priors", tmp_path / "priors")
    earlier = finished.folder / "checkpoints" / "step=4.ckpt"
    try:
        main(fit_flags(model_folder, text_file, tmp_path, f"--ckpt_path={earlier}", typed))
    except SystemExit:
        assert not (tmp_path / "checkpoints" / "mask.safetensors").exists()
    else:
        assert (tmp_path / "checkpoints" / "mask.safetensors").read_bytes() == finished.mask.read_bytes()


# -- runs that end early ------------------------------------------------------------------------------------


def time_is_up_at(monkeypatch: pytest.MonkeyPatch, micro_batch: int) -> None:
    """Let Lightning's timer of trainer.max_time run out at the end of that micro-batch, from 1."""
    calls = []

    def elapsed(self: Timer, stage: str = "train") -> float:
        return 1e6 if len(calls) >= micro_batch else 0.0

    def checked(self: Timer, *arguments: Any) -> None:
        calls.append(1)
        real(self, *arguments)

    real = Timer.on_train_batch_end
    monkeypatch.setattr(Timer, "time_elapsed", elapsed)
    monkeypatch.setattr(Timer, "on_train_batch_end", checked)


@pytest.mark.parametrize("micro_batch", [2 * WINDOW, 2 * WINDOW + 2, 3 * WINDOW + 1])
def test_max_time_leaves_a_checkpoint_and_no_mask(
    never_stopped: Outcome, model_folder, text_file, tmp_path: Path, monkeypatch, capsys, micro_batch: int
) -> None:
    """After a step and amid one; where a validation is due and where none is."""
    step = micro_batch // WINDOW
    words = flags(model_folder, text_file, tmp_path)
    with monkeypatch.context() as patch:
        time_is_up_at(patch, micro_batch)
        main([*words, "--trainer.max_time=00:00:01:00"])
    said = capsys.readouterr().err
    assert f"ended at step {step} of {STEPS}; learning is not finished, and no mask is written." in said
    assert "Resume with --ckpt_path last." in said
    assert f"step={step}.ckpt" in kept(tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").glob("*.safetensors")] == ["prior.safetensors"]
    assert max(curves(tmp_path / "tensorboard")["perplexity/hard"], default=0) <= 2  # none out of turn
    main([*words, "--trainer.max_time=00:00:01:00", "--ckpt_path=last"])  # of this start, not of both
    same(outcome(tmp_path), never_stopped)


def test_a_time_that_is_up_before_the_first_step(model_folder, text_file, tmp_path: Path, capsys) -> None:
    main(flags(model_folder, text_file, tmp_path, "--trainer.max_time=00:00:00:00"))
    said = capsys.readouterr().err
    assert "ended at step 0 of 4; learning is not finished, and no mask is written. There is no checkpoint" in said
    assert kept(tmp_path) == []


def test_the_mask_of_an_earlier_run_is_not_taken_for_this_ones(
    model_folder, text_file, tmp_path: Path, monkeypatch
) -> None:
    """Ended early or stopped, a run leaves none in its place; one that goes on over its own leaves nothing beside."""
    folder, words = tmp_path / "checkpoints", flags(model_folder, text_file, tmp_path)
    main(words)
    whole = (folder / "mask.safetensors").read_bytes()
    for path in folder.glob("*4.ckpt"):
        path.unlink()  # as if it was killed between the mask and the last checkpoint
    with monkeypatch.context() as patch:
        at_call(patch, "training_step", 2, send(15))
        stopped([*words, f"--ckpt_path={folder / 'step=2.ckpt'}"])
    names = {path.name for path in folder.glob("*.safetensors")}
    assert names == {"prior.safetensors", "mask-earlier.safetensors"}
    main([*words, "--ckpt_path=last"])
    assert {path.name for path in folder.glob("*.safetensors")} == {"prior.safetensors", "mask.safetensors"}
    assert (folder / "mask.safetensors").read_bytes() == whole


def test_the_weights_of_an_earlier_run_are_not_taken_for_this_ones(
    recovered: Path, recover: Flags, tmp_path: Path, monkeypatch
) -> None:
    """The mask of both is one, so that its digest does not tell them apart."""
    folder, words = tmp_path / "run" / "checkpoints", recover(tmp_path / "run")
    shutil.copytree(recovered, tmp_path / "run")
    whole = (folder / "weights.safetensors").read_bytes()
    for path in folder.glob("*4.ckpt"):
        path.unlink()
    with monkeypatch.context() as patch:
        at_call(patch, "training_step", 1, send(15))
        stopped([*words, f"--ckpt_path={folder / 'step=2.ckpt'}"])
    names = {"mask.safetensors", "weights.safetensors"}
    assert not {path.name for path in folder.glob("*.safetensors")} & names
    main([*words, "--ckpt_path=last"])
    assert {path.name for path in folder.glob("*.safetensors")} - {"prior.safetensors"} == names
    assert (folder / "weights.safetensors").read_bytes() == whole


def test_a_mask_of_an_intermediate_checkpoint_tells_its_step(
    finished: Run, recovered: Path, tmp_path: Path, capsys
) -> None:
    earlier, last = (finished.folder / "checkpoints" / f"step={step}.ckpt" for step in (2, 6))
    main(["export", f"--ckpt_path={earlier}", f"--output_dir={tmp_path / 'early'}"])
    assert f"{tmp_path / 'early'}: the mask is of step 2 of 6; " in capsys.readouterr().out
    facts = json.loads((tmp_path / "early" / "leap_pl.json").read_text())
    assert facts["provenance"]["config"]["steps"] == 2
    assert (
        "**Learning was not finished: the mask is of step 2 of 6.**" in (tmp_path / "early" / "README.md").read_text()
    )
    main(["export", f"--ckpt_path={last}", f"--output_dir={tmp_path / 'last'}"])
    assert "of step" not in capsys.readouterr().out
    assert "not finished" not in (tmp_path / "last" / "README.md").read_text()
    main(["export", f"--ckpt_path={recovered / 'checkpoints' / 'step=2.ckpt'}", f"--output_dir={tmp_path / 'weights'}"])
    assert f"{tmp_path / 'weights'}: the weights are of step 2 of 4; " in capsys.readouterr().out
    checkpoint = torch.load(earlier, weights_only=True)
    del checkpoint["leap_pl"]["settings"]["steps"]  # as versions before this one wrote it
    torch.save(checkpoint, tmp_path / "old.ckpt")
    assert masks_from_checkpoint(tmp_path / "old.ckpt").provenance.config["steps"] == 2


# -- the prior ----------------------------------------------------------------------------------------------


@pytest.fixture
def stopped_run(finished: Run, tmp_path: Path) -> Path:
    """A copy of the finished run as it was after its fourth step, without kept priors."""
    (tmp_path / "checkpoints").mkdir()
    for name in ("step=4.ckpt", "prior.safetensors"):
        shutil.copy(finished.folder / "checkpoints" / name, tmp_path / "checkpoints")
    shutil.copytree(finished.folder / "tensorboard", tmp_path / "tensorboard")
    return tmp_path


def from_prior(folder: Path) -> dict[int, float]:
    return curves(folder / "tensorboard").get("mask/changed_from_prior", {})


def refuse_to_prune(monkeypatch: pytest.MonkeyPatch) -> None:
    def prune(*_: Any, **__: Any) -> None:
        raise AssertionError("a prior was made")

    monkeypatch.setattr("leap_pl.prior.cache.prune", prune)


def test_a_resumed_run_reads_its_prior(
    finished: Run, stopped_run: Path, model_folder, text_file, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_to_prune(monkeypatch)
    before = (stopped_run / "checkpoints" / "prior.safetensors").stat().st_mtime_ns
    cli = main(fit_flags(model_folder, text_file, stopped_run, "--ckpt_path=last"))
    assert (stopped_run / "checkpoints" / "prior.safetensors").stat().st_mtime_ns == before
    assert cli.model.prior is not None
    assert from_prior(stopped_run) == from_prior(finished.folder)


@pytest.mark.parametrize("elsewhere", ["mask_export.folder", "checkpoint.dirpath"])
def test_a_prior_in_another_folder_is_found(
    finished: Run, stopped_run: Path, model_folder, text_file, monkeypatch: pytest.MonkeyPatch, elsewhere: str
) -> None:
    """Of ``mask_export.folder``, and of the checkpoint's, from which a new folder gets its own."""
    refuse_to_prune(monkeypatch)
    folder = stopped_run / "elsewhere"
    folder.mkdir()
    if elsewhere == "mask_export.folder":
        (stopped_run / "checkpoints" / "prior.safetensors").rename(folder / "prior.safetensors")
    checkpoint = stopped_run / "checkpoints" / "step=4.ckpt"
    words = fit_flags(model_folder, text_file, stopped_run, f"--ckpt_path={checkpoint}", f"--{elsewhere}={folder}")
    cli = main(words)
    assert cli.model.prior is not None
    prior = finished.folder / "checkpoints" / "prior.safetensors"
    assert (folder / "prior.safetensors").read_bytes() == prior.read_bytes()


@pytest.mark.parametrize("change", ["another", "gone", "damaged"])
def test_a_prior_that_is_not_there_is_made_anew_and_the_file_left_alone(
    finished: Run, stopped_run: Path, model_folder, text_file, change: str
) -> None:
    path = stopped_run / "checkpoints" / "prior.safetensors"
    prior = MaskSet.load(path)
    digest = prior.digest_of_bits()
    if change == "another":
        MaskSet({name: ~mask for name, mask in prior.masks.items()}, prior.provenance).save(path)
    elif change == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1])
    left = path.read_bytes() if path.exists() else None
    cli = main(fit_flags(model_folder, text_file, stopped_run, "--ckpt_path=last"))
    assert cli.model.prior.digest_of_bits() == digest
    assert from_prior(stopped_run) == from_prior(finished.folder)
    if left is not None:
        assert path.read_bytes() == left
    else:
        assert MaskSet.load(path).digest_of_bits() == digest
    assert (path.parent / "mask.safetensors").read_bytes() == finished.mask.read_bytes()


@pytest.mark.parametrize(
    "typed", [["--model.prior.method=none"], ["--model.prior.method=wanda", "--model.prior.sequences=2"]]
)
def test_another_prior_typed_anew_overwrites_nothing(
    finished: Run, stopped_run: Path, model_folder, text_file, typed: list[str]
) -> None:
    """It may be refused; else it does not act, and is not claimed."""
    try:
        main(fit_flags(model_folder, text_file, stopped_run, "--ckpt_path=last", *typed))
    except SystemExit:
        pass
    else:
        assert told(stopped_run)["prior"]["method"] == "magnitude"
        assert from_prior(stopped_run) == from_prior(finished.folder)
    prior = finished.folder / "checkpoints" / "prior.safetensors"
    assert (stopped_run / "checkpoints" / "prior.safetensors").read_bytes() == prior.read_bytes()


@pytest.mark.parametrize("old", [False, True])
def test_a_prior_that_cannot_be_had_costs_a_curve_and_one_warning(
    finished: Run, stopped_run: Path, model_folder, text_file, old: bool
) -> None:
    """Its digest in the checkpoint is of none there is; or an earlier version wrote none."""
    path = stopped_run / "checkpoints" / "step=4.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    settings = checkpoint["leap_pl"]["settings"]
    if old:
        del settings["prior_digests"]
    else:
        settings["prior_digests"] = {"prior": "0" * 64}
    torch.save(checkpoint, path)
    prior = (stopped_run / "checkpoints" / "prior.safetensors").read_bytes()
    with pytest.warns(UserWarning, match="the prior that this run started from is not available") as warned:
        main(fit_flags(model_folder, text_file, stopped_run, "--ckpt_path=last"))
    assert sum("is not available" in str(warning.message) for warning in warned) == 1
    assert (stopped_run / "checkpoints" / "prior.safetensors").read_bytes() == prior
    shown, whole = from_prior(stopped_run), from_prior(finished.folder)
    assert shown == {step: value for step, value in whole.items() if step <= 4}
    masks = [MaskSet.load(f / "checkpoints" / "mask.safetensors") for f in (stopped_run, finished.folder)]
    assert masks[0].digest_of_bits() == masks[1].digest_of_bits()


def test_settings_of_a_checkpoint_that_make_no_prior(tmp_path: Path) -> None:
    """A checkpoint is data: whatever its settings say, it costs the curve and nothing else."""
    for prior in (None, "text", {"method": "none"}, {"method": 3}, {"sequences": -1}, {"mask": str(tmp_path / "no")}):
        told = {"prior": prior, "prior_digests": {"prior": "0" * 64, "../../x": "1"}}
        with pytest.warns(UserWarning, match="is not available"):
            found = started_prior.started_prior(told, ["prior"], [tmp_path], "cache", lambda settings: {})
        assert found == {}
    assert started_prior.started_prior({"prior_digests": {}}, ["prior"], [tmp_path], "cache", lambda _: {}) == {}
    made: list[Prior] = []
    told = {"prior": {"method": "wanda", "cache_dir": "/hostile", "graded": True}, "prior_digests": {"prior": "0"}}
    with pytest.warns(UserWarning, match="the recomputed one differs too"):
        started_prior.started_prior(told, ["prior"], [], "cache", lambda settings: made.append(settings) or {})
    assert made == [Prior(method="wanda", cache_dir="cache")]


@pytest.mark.parametrize("method", ["magnitude", "none"])
def test_a_plain_trainer_has_the_prior_of_the_run_too(stopped_run: Path, model_folder, text_file, method: str) -> None:
    """It tells the module only late where it resumes from: a prior that was made meanwhile is replaced by the run's."""
    checkpoint = stopped_run / "checkpoints" / "step=4.ckpt"
    data = TextDataModule(str(model_folder), text=str(text_file), seq_length=32, batch_size=2, validation_sequences=4)
    trainer = L.Trainer(accelerator="cpu", max_steps=6, accumulate_grad_batches=2, gradient_clip_val=1.0, logger=False,
                        enable_checkpointing=False, enable_progress_bar=False, limit_val_batches=0)  # fmt: skip
    module = LeapModule(str(model_folder), prior=Prior(method=method), dtype="float32")
    if method == "none":
        with pytest.raises(UserError, match=r"model.prior.method was 'magnitude' and is 'none'"):
            trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
        return
    trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    prior = MaskSet.load(stopped_run / "checkpoints" / "prior.safetensors")
    assert module.prior is not None
    assert module.prior.digest_of_bits() == prior.digest_of_bits()
    config = module.mask_set().provenance.config
    assert (config["prior"]["method"], config["prior_digests"]) == ("magnitude", {"prior": prior.digest_of_bits()})
