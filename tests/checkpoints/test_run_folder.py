"""The folder of a run: another run in it is refused or replaced, a finished one says so, what is not ours stays."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import Run, fit_flags, refused
from folders import tree
from hostile_files import Trap
from lightning.pytorch import Trainer
from stopped_runs import at_call, send, stopped

from leap_pl.callbacks import Checkpoints, MaskExport
from leap_pl.checkpoints.run_folder import Leftover
from leap_pl.cli.main import main
from leap_pl.data import TextDataModule
from leap_pl.errors import UserError
from leap_pl.inputs import records
from leap_pl.masks import MaskSet
from leap_pl.prior import Prior
from leap_pl.training.module import LeapModule

pytestmark = pytest.mark.usefixtures("eager")

ALL = {f"step={step}.ckpt" for step in (2, 4, 6)} | {
    "last.ckpt",
    "mask.safetensors",
    "prior.safetensors",
    "leap_pl.json",
}


@pytest.fixture
def run(finished: Run, tmp_path: Path) -> Path:
    """A copy of a finished run of six steps; its folder of checkpoints."""
    shutil.copytree(finished.checkpoint.parent, tmp_path / "checkpoints", symlinks=True)
    return tmp_path / "checkpoints"


def short(model: Path, text: Path, folder: Path, *more: str) -> list[str]:
    return fit_flags(model, text, folder, "--trainer.max_steps=1", "--data.validation_sequences=0", *more)


def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever loads a model fails: what is told is told before."""

    def load(*_: object, **__: object) -> None:
        raise AssertionError("a model is loaded")

    monkeypatch.setattr("leap_pl.training.gated_module.load_model", load)


def test_validation_text_is_looked_at_before_a_model_is_loaded(
    model_folder, text_file, tmp_path: Path, capsys, monkeypatch
) -> None:
    no_model(monkeypatch)
    (tmp_path / "short.txt").write_text("short")
    words = fit_flags(model_folder, text_file, tmp_path)
    for file, said in (("nowhere.jsonl", "nowhere.jsonl"), ("short.txt", "short.txt is too short")):
        told = refused([*words, f"--data.validation_text={tmp_path / file}"], capsys)
        assert said in told
    for off in ("--trainer.limit_val_batches=0", "--data.validation_sequences=0"):
        with pytest.raises(AssertionError, match="a model is loaded"):
            main([*words, f"--data.validation_text={tmp_path / 'short.txt'}", off])


def test_a_run_keeps_a_record_of_its_checkpoints(finished: Run) -> None:
    told = json.loads((finished.checkpoint.parent / "leap_pl.json").read_text())["folder"]
    names = ["last.ckpt", "leap_pl.json", "step=2.ckpt", "step=4.ckpt", "step=6.ckpt"]
    assert told == {"format": "leap_pl.folder", "format_version": 1, "verb": "fit", "files": names}


def test_another_run_is_refused_before_anything_is_loaded(run: Path, model_folder, text_file, capsys, monkeypatch):
    before = tree(run)
    no_model(monkeypatch)
    said = refused(short(model_folder, text_file, run.parent), capsys)
    assert f"{run} holds another run (last.ckpt, step=2.ckpt, step=4.ckpt, step=6.ckpt, and 1 more)" in said
    assert "--ckpt_path last" in said
    assert "--force" in said
    assert tree(run) == before


def test_so_is_one_resumed_from_elsewhere(finished: Run, run: Path, model_folder, text_file, capsys) -> None:
    elsewhere = finished.folder / "checkpoints" / "step=4.ckpt"
    words = fit_flags(model_folder, text_file, run.parent, f"--ckpt_path={elsewhere}")
    assert "holds another run" in refused(words, capsys)


def test_a_mask_alone_is_another_run(run: Path, model_folder, text_file, tmp_path: Path, capsys) -> None:
    for path in (*run.glob("*.ckpt"), run / "leap_pl.json"):
        path.unlink()
    before = tree(run)
    assert "holds another run (mask.safetensors)" in refused(short(model_folder, text_file, tmp_path), capsys)
    words = short(model_folder, text_file, tmp_path / "b", f"--mask_export.folder={run}")
    assert f"{run} holds another run (mask.safetensors)" in refused(words, capsys)
    assert tree(run) == before


def test_a_mask_without_a_checkpoint_is_no_end(run: Path, model_folder, text_file, tmp_path: Path, capsys) -> None:
    """Killed between the mask and its only checkpoint, the run does both again."""
    for path in (*run.glob("*.ckpt"), run / "leap_pl.json"):
        path.unlink()
    main(short(model_folder, text_file, tmp_path, "--ckpt_path=last"))
    assert "yet: starting a new run." in capsys.readouterr().err
    assert (run / "step=1.ckpt").is_file()


def test_force_replaces_a_run_and_nothing_else(run: Path, model_folder, text_file, tmp_path: Path) -> None:
    (run / "notes.txt").write_text("mine")
    old = tree(run)
    cli = main(short(model_folder, text_file, tmp_path, "--force", "--model.prior.method=none"))
    assert set(tree(run)) == {"step=1.ckpt", "last.ckpt", "mask.safetensors", "leap_pl.json", "notes.txt"}
    assert (run / "notes.txt").read_text() == "mine"
    assert (run / "mask.safetensors").read_bytes() != old["mask.safetensors"]
    assert records.recorded(run) == {"step=1.ckpt", "last.ckpt", "leap_pl.json"}
    assert cli.config["fit"].force is False  # in the config that is saved beside the logs


def test_force_leaves_the_old_run_until_the_new_one_begins(run: Path, model_folder, text_file, tmp_path: Path, capsys):
    """A slip of the finger after --force costs nothing."""
    before = tree(run)
    for wrong in ("--data.seq_length=129", f"--data.text={tmp_path / 'gone.jsonl'}", "--model.targets=[re:.*q_prj]"):
        refused(short(model_folder, text_file, tmp_path, "--force", wrong), capsys)
    assert tree(run) == before


@pytest.mark.parametrize("stranger", ["notes.ckpt", "mask.safetensors", "prior.safetensors", "leap_pl.json"])
def test_force_removes_nothing_that_leap_pl_did_not_write(
    run: Path, model_folder, text_file, tmp_path: Path, capsys, stranger: str
) -> None:
    if stranger == "notes.ckpt":
        torch.save({"state_dict": {}, "hostile": Trap(tmp_path / "ran")}, run / stranger)
    else:
        (run / stranger).write_text('{"provenance": {}}')
    before = tree(run)
    said = refused(short(model_folder, text_file, tmp_path, "--force"), capsys)
    assert stranger in said or "was written by leap_pl export" in said
    assert tree(run) == before
    assert not (tmp_path / "ran").exists()


def test_force_replaces_runs_without_a_record(run: Path, model_folder, text_file, tmp_path: Path) -> None:
    """Of an older version: checkpoints are told by their format."""
    (run / "leap_pl.json").unlink()
    main(short(model_folder, text_file, tmp_path, "--force"))
    assert set(tree(run)) == {"step=1.ckpt", "last.ckpt", "mask.safetensors", "prior.safetensors", "leap_pl.json"}


@pytest.mark.parametrize("path", ["last", "{run}/step=4.ckpt", "{run}/last.ckpt"])
def test_force_and_resume_exclude_each_other(run: Path, model_folder, text_file, tmp_path: Path, capsys, path: str):
    before = tree(run)
    words = fit_flags(model_folder, text_file, tmp_path, "--force", f"--ckpt_path={path.format(run=run)}")
    assert "Choose one" in refused(words, capsys)
    assert tree(run) == before


def test_a_finished_run_names_its_mask_at_once(run: Path, model_folder, text_file, capsys, monkeypatch) -> None:
    before = tree(run)
    no_model(monkeypatch)
    assert main(fit_flags(model_folder, text_file, run.parent, "--ckpt_path=last")) is None
    (said,) = capsys.readouterr().err.splitlines()
    assert f"the run in {run} is finished: step=6.ckpt (step 6) is its last checkpoint" in said
    assert said.endswith(f"its mask, of sparsity 0.5, is {run / 'mask.safetensors'}.")
    assert tree(run) == before


def test_what_is_not_finished_goes_on(run: Path, model_folder, text_file, capsys, monkeypatch) -> None:
    """Without its mask, with another run's, or asked for anew with other settings."""
    words = fit_flags(model_folder, text_file, run.parent, "--ckpt_path=last")
    mask = MaskSet.load(run / "mask.safetensors")
    no_model(monkeypatch)
    longer = {**mask.provenance.config, "max_steps": mask.provenance.config["max_steps"] + 1}
    for others in (None, {"sparsity": 0.6}, {"fingerprint": "0" * 16}, {"config": longer}):
        (run / "mask.safetensors").unlink(missing_ok=True)
        if others is not None:
            mask.with_provenance(**others).save(run / "mask.safetensors")
        with pytest.raises(AssertionError, match="a model is loaded"):
            main(words)
    mask.save(run / "mask.safetensors")
    with pytest.raises(SystemExit):
        main([*words, "--model.seed=7"])
    said = capsys.readouterr().err
    assert "is finished" not in said
    assert "model.seed was 0 and is 7" in said


@pytest.mark.parametrize("another", [False, True])
def test_a_finished_run_that_has_lost_its_mask_writes_it_again(
    run: Path, model_folder, text_file, capsys, another: bool
) -> None:
    mask = run / "mask.safetensors"
    before = mask.read_bytes()
    other = MaskSet.load(mask).with_provenance(sparsity=0.6)
    mask.unlink()
    if another:
        other.save(mask)
    main(fit_flags(model_folder, text_file, run.parent, "--ckpt_path=last"))
    assert mask.read_bytes() == before
    assert (run / "mask-earlier.safetensors").exists() == another
    said = capsys.readouterr().out
    assert f"mask {mask}; next: leap_pl export" in said
    assert ", prior " in said


def test_the_end_of_a_killed_run_is_tidied(run: Path, model_folder, text_file) -> None:
    """Killed right behind its last checkpoint, before the link to it."""
    (run / "last.ckpt").unlink()
    (run / "last.ckpt").symlink_to("step=4.ckpt")
    (run / ".last.ckpt.77.part").write_text("half")
    assert main(fit_flags(model_folder, text_file, run.parent, "--ckpt_path=last")) is None
    assert set(tree(run)) == ALL
    assert (run / "last.ckpt").readlink() == Path("step=6.ckpt")


def test_a_linked_folder_of_checkpoints_is_followed(model_folder, text_file, tmp_path: Path, monkeypatch) -> None:
    """Written, resumed in, and the checkpoint that was resumed from goes as everywhere."""
    (tmp_path / "data").mkdir()
    (tmp_path / "checkpoints").symlink_to(tmp_path / "data")
    words = fit_flags(model_folder, text_file, tmp_path, "--checkpoint.save_top_k=1", "--ckpt_path=last")
    with monkeypatch.context() as patch:
        at_call(patch, "training_step", 7, send(15))
        stopped(words)
    main(words)
    assert (tmp_path / "checkpoints").is_symlink()
    assert set(tree(tmp_path / "data")) == ALL - {"step=2.ckpt", "step=4.ckpt"}


def test_a_job_that_slurm_has_requeued_replaces_once(run: Path, model_folder, text_file, tmp_path, monkeypatch, capsys):
    """The script says --force each time it is started: the second time there is the job's own run."""
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    words = short(model_folder, text_file, tmp_path, "--force")
    main(words)
    assert records.job_of(run) == "17"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert main(words) is None
    assert "is finished" in capsys.readouterr().err
    monkeypatch.setenv("SLURM_JOB_ID", "18")  # requeued before it had replaced anything
    main(words)
    assert records.job_of(run) == "18"


def test_a_program_is_refused_as_well(run: Path, model_folder, text_file, tmp_path: Path) -> None:
    """A plain Trainer with these callbacks; unless it resumes."""
    before = tree(run)

    def fit(**settings: object) -> None:
        module = LeapModule(str(model_folder), prior=Prior(method="none"), dtype="float32")
        data = TextDataModule(str(model_folder), str(text_file), seq_length=32, validation_sequences=0)
        callbacks = [MaskExport(), Checkpoints(str(run))]
        trainer = Trainer(callbacks=callbacks, max_steps=2, logger=False, accelerator="cpu", barebones=False)
        trainer.fit(module, datamodule=data, **settings)  # type: ignore[arg-type]

    with pytest.raises(UserError, match="holds another run"):
        fit()
    assert tree(run) == before


def test_what_another_run_has_put_there_since_stays(tmp_path: Path) -> None:
    """What --force replaces is listed before the prior is made, and removed when learning begins."""
    path, new = tmp_path / "mask.safetensors", tmp_path / "new"
    path.write_text("old")
    left = Leftover.of(path)
    new.write_text("another run's")
    new.replace(path)
    left.remove()
    assert path.read_text() == "another run's"
    Leftover.of(path).remove()
    assert not path.exists()


def test_folders_of_a_sharded_run_are_removed(tmp_path: Path) -> None:
    """And the link to the newest, which leads to a folder."""
    (tmp_path / "step=2.ckpt").mkdir()
    (tmp_path / "step=2.ckpt" / "part").write_text("x")
    (tmp_path / "last.ckpt").symlink_to("step=2.ckpt")
    for left in [Leftover.of(path) for path in sorted(tmp_path.iterdir())]:
        left.remove()
    assert not list(tmp_path.iterdir())
