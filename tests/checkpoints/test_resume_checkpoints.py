"""Which checkpoint a run goes on from, when checkpoints are written, and what SLURM makes of it."""

import errno
import gc
import io
import os
import pickle
import shutil
import signal
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import refused
from safetensors.torch import load_file, save_file
from stopped_runs import STEPS, Outcome, at_call, curves, flags, kept, outcome, same, send, stopped
from tensorboard.summary.writer.record_writer import RecordWriter
from tiny import tiny_folder, tiny_model

from leap_pl import LeapModule
from leap_pl.base_model import weights
from leap_pl.base_model.weights import find_weights
from leap_pl.callbacks.unfinished_run import requeue
from leap_pl.checkpoints.file import WholeCheckpointIO
from leap_pl.checkpoints.newest import newest_checkpoint
from leap_pl.checkpoints.states import check_states
from leap_pl.cli.main import main
from leap_pl.errors import UserError
from leap_pl.masks import MaskSet
from leap_pl.training import gated_module

pytestmark = pytest.mark.usefixtures("eager", "event_files_in_order")


# -- which checkpoint ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_of_three(model_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run with all its checkpoints."""
    folder = tmp_path_factory.mktemp("three")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEAP_PL_COMPILE", "0")
        main(flags(model_folder, text_file, folder, "--checkpoint.every_n_train_steps=1"))
    return folder


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_a_run_in_a_true_precision_resumes(precision: str, model_folder, text_file, tmp_path: Path) -> None:
    """With the data type that its model is loaded in, which is not that of the precision."""
    words = [f"--trainer.precision={precision}", "--model.dtype=float32", "--checkpoint.every_n_train_steps=1"]
    main(flags(model_folder, text_file, tmp_path / "run", *words))
    step = tmp_path / "run" / "checkpoints" / "step=2.ckpt"
    main(flags(model_folder, text_file, tmp_path / "again", *words, f"--ckpt_path={step}"))
    ends = [tmp_path / run / "checkpoints" / "last.ckpt" for run in ("run", "again")]
    logits, others = (torch.load(end, weights_only=True)["state_dict"] for end in ends)
    assert all(torch.equal(logits[name], others[name]) for name in logits)
    assert not all(
        torch.equal(logits[name], x) for name, x in torch.load(step, weights_only=True)["state_dict"].items()
    )
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert LeapModule.load_from_checkpoint(step).model.dtype == dtype
    loaded = LeapModule.load_from_checkpoint(step)
    assert loaded.learned_with()["model.dtype"] == str(dtype).removeprefix("torch.")
    measured = main(["validate", f"--ckpt_path={step}", "--trainer.accelerator=cpu", "--trainer.logger=false"])
    assert measured.model.model.dtype == dtype


@pytest.mark.parametrize("typed", ["float32", "float16"])
def test_a_checkpoint_of_an_earlier_version_in_a_true_precision(
    typed: str, model_folder, text_file, tmp_path: Path, capsys
) -> None:
    """It holds the data type after the conversion, which rounds float32 as loading does, and float16 otherwise."""
    words = ["--trainer.precision=bf16-true", "--model.dtype=float32", "--checkpoint.every_n_train_steps=1"]
    main(flags(model_folder, text_file, tmp_path / "run", *words))
    step = tmp_path / "run" / "checkpoints" / "step=2.ckpt"
    checkpoint = torch.load(step, weights_only=True)
    assert checkpoint["leap_pl"]["learned_with"]["model.dtype"] == "float32"
    checkpoint["leap_pl"]["learned_with"]["model.dtype"] = "bfloat16"
    torch.save(checkpoint, step)
    again = flags(model_folder, text_file, tmp_path / "again", *words, f"--model.dtype={typed}", f"--ckpt_path={step}")
    if typed == "float32":
        main(again)
        ends = [tmp_path / run / "checkpoints" / "last.ckpt" for run in ("run", "again")]
        logits, others = (torch.load(end, weights_only=True)["state_dict"] for end in ends)
        assert logits.keys() == others.keys()
        assert all(torch.equal(logits[name], others[name]) for name in logits)
        assert not (tmp_path / "again" / "checkpoints" / "step=2.ckpt").exists()  # not from the start
    else:
        assert "model.dtype was 'bfloat16' and is 'float16'" in refused(again, capsys)


def test_a_run_goes_on_with_a_copy_of_its_model(run_of_three: Path, model_folder, text_file, tmp_path: Path) -> None:
    """In a folder of another name, whose tokenizer has the same vocabulary."""
    copied = shutil.copytree(model_folder, tmp_path / "another name")
    step = run_of_three / "checkpoints" / "step=2.ckpt"
    main([*flags(copied, text_file, tmp_path / "run"), f"--ckpt_path={step}"])
    found = MaskSet.load(tmp_path / "run" / "checkpoints" / "mask.safetensors").digest_of_bits()
    assert found == MaskSet.load(run_of_three / "checkpoints" / "mask.safetensors").digest_of_bits()


@pytest.mark.parametrize("changed", ["norm", "embeddings"])
def test_a_model_that_differs_outside_its_blocks_is_another(
    run_of_three: Path, model_folder, text_file, tmp_path: Path, capsys, changed: str
) -> None:
    """As one whose norms, or embeddings, were trained: its blocks have the same fingerprint."""
    other = shutil.copytree(model_folder, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    name = {"norm": "model.norm.weight", "embeddings": "model.embed_tokens.weight"}[changed]
    tensors[name] = 2 * tensors[name]
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    step = run_of_three / "checkpoints" / "step=2.ckpt"
    words = flags(other, text_file, tmp_path / "run")
    of_validation = [w for w in words if not w.startswith(("--model.optimizer", "--trainer.max_steps"))][1:]
    for command in ([*words, f"--ckpt_path={step}"], ["validate", *of_validation, f"--ckpt_path={step}"]):
        assert "has the same weights in its decoder blocks, but other norms, biases, embeddings or head" in refused(
            command, capsys
        )
    with pytest.raises(UserError, match="other norms"):
        LeapModule.load_from_checkpoint(step, base_model=str(other))
    # A checkpoint of a version that did not store it tells them apart no more, and its figures are measured again.
    stored = torch.load(step, weights_only=True)
    dense = stored["leap_pl"]["dense_perplexity"]
    del stored["leap_pl"]["rest"], stored["leap_pl"]["dense_perplexity_of"]["rest"]
    torch.save(stored, tmp_path / "older.ckpt")
    main([*words, f"--ckpt_path={tmp_path / 'older.ckpt'}"])
    assert MaskSet.load(tmp_path / "run/checkpoints/mask.safetensors").provenance.config["dense_perplexity"] != dense


@pytest.mark.parametrize("damage", ["torn", "empty", "flipped", "pickle"])
def test_a_damaged_newest_checkpoint(
    never_stopped: Outcome, run_of_three: Path, model_folder, text_file, tmp_path: Path, capsys, damage: str
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run_of_three, folder, symlinks=True)
    for name in ("step=4.ckpt", "mask.safetensors"):
        (folder / "checkpoints" / name).unlink()
    newest = folder / "checkpoints" / "step=3.ckpt"
    (folder / "checkpoints" / "last.ckpt").unlink()
    (folder / "checkpoints" / "last.ckpt").symlink_to(newest.name)
    whole = newest.read_bytes()
    harm = {"torn": whole[: len(whole) // 2], "empty": b"", "pickle": pickle.dumps({"state_dict": {}})}
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    newest.write_bytes(harm.get(damage, bytes(flipped)))
    main(flags(model_folder, text_file, folder, "--ckpt_path=last"))
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("leap_pl fit: ")]
    assert "step=3.ckpt is " in said
    assert said.endswith("Fallback: resuming from " + str(folder / "checkpoints" / "step=2.ckpt") + " (step 2).")
    same(outcome(folder), never_stopped)


def test_a_checkpoint_that_cannot_be_read_now_is_not_taken_for_a_damaged_one(
    run_of_three: Path, model_folder, text_file, tmp_path: Path, capsys, monkeypatch
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run_of_three, folder, symlinks=True)
    opened = zipfile.ZipFile

    class Unreadable(io.FileIO):
        def read(self, size: int = -1) -> bytes:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def open_zip(file: Any, *more: Any, **settings: Any) -> Any:
        return opened(Unreadable(file) if str(file).endswith("step=4.ckpt") else file, *more, **settings)

    monkeypatch.setattr("leap_pl.checkpoints.layout.zipfile.ZipFile", open_zip)
    before = kept(folder)
    stopped(flags(model_folder, text_file, folder, "--ckpt_path=last"), 2)
    (said,) = capsys.readouterr().err.splitlines()
    assert f"{folder / 'checkpoints' / 'step=4.ckpt'} cannot be read now (Input/output error)" in said
    assert kept(folder) == before


@pytest.mark.parametrize("named", ["last", "step=3.ckpt", "last.ckpt"])
def test_a_run_whose_checkpoints_are_links_to_another_disk_goes_on(
    named: str, never_stopped: Outcome, run_of_three: Path, model_folder, text_file, tmp_path: Path
) -> None:
    folder, archive = tmp_path / "run", tmp_path / "archive"
    shutil.copytree(run_of_three, folder, symlinks=True)
    archive.mkdir()
    for name in ("step=4.ckpt", "mask.safetensors"):
        (folder / "checkpoints" / name).unlink()
    for file in (folder / "checkpoints").glob("step=*.ckpt"):
        shutil.move(file, archive / file.name)
        file.symlink_to(archive / file.name)
    last = folder / "checkpoints" / "last.ckpt"
    last.unlink()
    last.symlink_to("step=3.ckpt")
    path = named if named == "last" else folder / "checkpoints" / named
    main(flags(model_folder, text_file, folder, f"--ckpt_path={path}"))
    same(outcome(folder), never_stopped)
    assert (archive / "step=3.ckpt").is_file()


def test_all_checkpoints_damaged(run_of_three: Path, model_folder, text_file, tmp_path: Path, capsys) -> None:
    """To begin again over what may be rescued is not for the program to decide."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for step in (2, 3):
        (folder / f"step={step}.ckpt").write_bytes(b"PK")
    stopped(flags(model_folder, text_file, tmp_path, "--ckpt_path=last"), 2)
    (said,) = capsys.readouterr().err.splitlines()
    assert "no checkpoint in" in said
    assert "move them away to start a new run" in said


def test_last_needs_a_folder_that_stays(model_folder, text_file, tmp_path: Path, capsys) -> None:
    words = [word for word in flags(model_folder, text_file, tmp_path) if not word.startswith("--checkpoint.dirpath")]
    stopped([*words, "--ckpt_path=last"], 2)
    assert "--checkpoint.dirpath" in capsys.readouterr().err


def test_a_run_of_a_version_that_gated_more_goes_on_with_it(text_file: Path, tmp_path: Path, monkeypatch) -> None:
    """Routers that are linear layers were among the default."""
    base = tiny_folder(tmp_path / "model", tie_word_embeddings=False)
    former = list(find_weights(tiny_model("llama", tie_word_embeddings=False)))[:-1]
    with monkeypatch.context() as patch:  # a default of other weights
        every = weights.find_weights
        patch.setattr(gated_module, "find_weights", lambda model, targets=None, ignore=(): every(model, former, ignore))
        main(flags(base, text_file, tmp_path / "run", "--checkpoint.every_n_train_steps=1"))
    step = tmp_path / "run" / "checkpoints" / "step=2.ckpt"
    main(flags(base, text_file, tmp_path / "again", f"--ckpt_path={step}"))
    masks = [MaskSet.load(tmp_path / run / "checkpoints" / "mask.safetensors") for run in ("run", "again")]
    assert list(masks[0].masks) == list(masks[1].masks) == former
    assert masks[0].digest_of_bits() == masks[1].digest_of_bits()
    assert list(LeapModule.load_from_checkpoint(step).gates) == former


def test_states_of_any_optimizer_of_torch_are_read() -> None:
    """Some have words among their settings."""
    parameter = torch.nn.Parameter(torch.zeros(2, 2))
    state = torch.optim.Muon([parameter], adjust_lr_fn="match_rms_adamw").state_dict()
    check_states({"optimizer_states": [state]}, "a.ckpt")
    state["param_groups"][0]["lr"] = {"a": 1}
    with pytest.raises(UserError, match=r"a\.ckpt: optimizer_states.*lr"):
        check_states({"optimizer_states": [state]}, "a.ckpt")


def test_another_number_of_samples_leaves_a_gap_in_one_curve(
    run_of_three: Path, model_folder, text_file, tmp_path: Path
) -> None:
    """Bits of the mask that the run was stopped with are then other bits than those of the next log."""
    stopped_at = run_of_three / "checkpoints" / "step=2.ckpt"
    main(flags(model_folder, text_file, tmp_path, f"--ckpt_path={stopped_at}", "--sparsity_log.samples=500"))
    whole, resumed = (curves(run / "tensorboard")["mask/changed_since_last_log"] for run in (run_of_three, tmp_path))
    assert (list(whole)[-2:], list(resumed)) == ([3, 4], [4])


def test_last_in_a_config_and_for_validation(run_of_three: Path, model_folder, text_file, tmp_path: Path, capsys):
    words = flags(model_folder, text_file, run_of_three)[1:]
    kept = [word for word in words if word.startswith(("--data", "--trainer.acc", "--checkpoint.dirpath"))]
    (tmp_path / "config.yaml").write_text("ckpt_path: last\n")
    cli = main(
        [
            "validate",
            f"--config={tmp_path / 'config.yaml'}",
            *kept,
            "--model.base_model",
            str(model_folder),
            "--trainer.logger=false",
            f"--trainer.default_root_dir={tmp_path}",
        ]
    )
    assert cli.model.dtype_name == "float32"  # out of the checkpoint
    assert "step=4.ckpt (step 4)" in capsys.readouterr().err
    kept = [word.replace(str(run_of_three), str(tmp_path)) for word in kept]
    stopped(["validate", *kept, "--model.base_model", str(model_folder), "--ckpt_path=last"], 2)
    assert "there is no checkpoint in" in capsys.readouterr().err


def test_newest_is_by_time_and_then_by_step(tmp_path: Path) -> None:
    """A second run in a folder is newer than the first, however far that had come."""
    torch.save({}, tmp_path / "step=9.ckpt")
    for name in ("step=10.ckpt", "step=2000.ckpt"):
        shutil.copy(tmp_path / "step=9.ckpt", tmp_path / name)
    (tmp_path / "last.ckpt").symlink_to("step=9.ckpt")
    (tmp_path / "gone.ckpt").symlink_to("nowhere.ckpt")
    (tmp_path / "folder.ckpt").mkdir()
    for name, at in (("step=9.ckpt", 200), ("step=10.ckpt", 200), ("step=2000.ckpt", 100)):
        os.utime(tmp_path / name, (at, at))
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found[0].name == "step=10.ckpt"
    assert newest_checkpoint(tmp_path / "nothing") is None


# -- when checkpoints are written ---------------------------------------------------------------------------


def test_one_at_least_so_often(model_folder, text_file, tmp_path: Path) -> None:
    """However short the time, only whole steps; the newest two stay; the link is to the newest."""
    words = flags(model_folder, text_file, tmp_path, "--checkpoint.every_minutes=1e-6")
    words = [word for word in words if not word.startswith(("--checkpoint.every_n", "--checkpoint.save_top_k"))]
    main(words)
    assert kept(tmp_path) == ["last.ckpt", "step=3.ckpt", "step=4.ckpt"]
    assert (tmp_path / "checkpoints" / "last.ckpt").readlink() == Path("step=4.ckpt")
    main([*words[:-1], "--checkpoint.every_minutes=0", f"--checkpoint.dirpath={tmp_path / 'b' / 'checkpoints'}"])
    assert kept(tmp_path / "b") == ["last.ckpt", "step=2.ckpt", "step=4.ckpt"]  # at validations


def test_a_run_that_resumes_with_another_interval_keeps_the_newest_two(model_folder, text_file, tmp_path: Path) -> None:
    words = flags(model_folder, text_file, tmp_path, "--checkpoint.every_n_train_steps=1")
    words = [word for word in words if not word.startswith("--checkpoint.save_top_k")]
    with pytest.MonkeyPatch.context() as patch:
        at_call(patch, "training_step", 10, send(signal.SIGTERM))  # of three a step
        stopped(words)
    assert kept(tmp_path) == ["last.ckpt", "step=2.ckpt", "step=3.ckpt"]
    main([*words, "--checkpoint.every_n_train_steps=4", "--ckpt_path=last"])
    assert kept(tmp_path) == ["last.ckpt", "step=3.ckpt", "step=4.ckpt"]


def test_a_run_that_resumes_with_fewer_checkpoints_to_keep(model_folder, text_file, tmp_path: Path) -> None:
    """Lightning removes one only where there are exactly as many as are kept."""
    words = flags(model_folder, text_file, tmp_path, "--checkpoint.every_n_train_steps=1")
    words = [word for word in words if not word.startswith("--checkpoint.save_top_k")]
    with pytest.MonkeyPatch.context() as patch:
        at_call(patch, "training_step", 10, send(signal.SIGTERM))  # of three a step
        stopped([*words, "--checkpoint.save_top_k=3"])
    assert kept(tmp_path) == ["last.ckpt", "step=1.ckpt", "step=2.ckpt", "step=3.ckpt"]
    with pytest.MonkeyPatch.context() as patch:
        at_call(patch, "training_step", 1, send(signal.SIGTERM))  # within the step: nothing new is written
        stopped([*words, "--checkpoint.save_top_k=1", "--ckpt_path=last"])
    assert "step=3.ckpt" in kept(tmp_path)
    main([*words, "--checkpoint.save_top_k=1", "--ckpt_path=last"])
    assert kept(tmp_path) == ["last.ckpt", "step=4.ckpt"]


def test_a_run_that_resumes_with_curves_at_other_steps(model_folder, text_file, tmp_path: Path) -> None:
    """The step that it was stopped after, and that would now be drawn, is not drawn from a part of the next one."""
    words = flags(model_folder, text_file, tmp_path, "--checkpoint.every_n_train_steps=1")
    with pytest.MonkeyPatch.context() as patch:
        at_call(patch, "training_step", 10, send(signal.SIGTERM))
        stopped([*words, "--sparsity_log.every_n_steps=2"])
    main([*words, "--sparsity_log.every_n_steps=3", "--ckpt_path=last"])
    assert set(curves(tmp_path / "tensorboard")["schedule/learning_rate"]) == {1, 2, 4}


def test_curves_are_on_the_disk_before_the_checkpoint(model_folder, text_file, tmp_path: Path, monkeypatch) -> None:
    """A run that is killed right behind a checkpoint does not draw again what lies before it."""
    seen: dict[int, int] = {}

    def saving(self: WholeCheckpointIO, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        seen[checkpoint["global_step"]] = max(curves(tmp_path / "tensorboard")["schedule/learning_rate"])  # logged last
        real(self, checkpoint, path, storage_options)

    real = WholeCheckpointIO.save_checkpoint
    monkeypatch.setattr(WholeCheckpointIO, "save_checkpoint", saving)
    monkeypatch.setattr("tensorboard.summary.writer.event_file_writer.RecordWriter.write", slowly)
    main(flags(model_folder, text_file, tmp_path, "--checkpoint.every_n_train_steps=1"))
    assert seen == {1: 1, 2: 2, 3: 3, 4: 4}


def slowly(self: Any, data: bytes, write: Callable[..., None] = RecordWriter.write) -> None:
    """A disk on which TensorBoard's own thread falls behind."""
    time.sleep(0.02)
    write(self, data)


def test_the_best_by_another_measure_and_the_newest(model_folder, text_file, tmp_path: Path) -> None:
    """The logits grow worse here; the newest is written all the same, since the mask comes from it."""
    more = ["--checkpoint.monitor=perplexity/hard", "--checkpoint.mode=max", "--checkpoint.save_top_k=1"]
    words = [w for w in flags(model_folder, text_file, tmp_path, *more) if "every_n" not in w or "checkpoint" not in w]
    main(words)
    last = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == STEPS
    assert len(kept(tmp_path)) == 2


def test_the_last_checkpoint_comes_behind_the_mask(model_folder, text_file, tmp_path: Path, monkeypatch) -> None:
    """Killed while the mask is written, the run goes on to write it: no checkpoint says that it was finished."""
    from leap_pl.masks import mask_set as masks

    def die(path: Path, *rest: Any) -> Any:
        if Path(path).name == "mask.safetensors":
            raise KeyError("killed")
        return real(path, *rest)

    real = masks.write_masks
    words = flags(model_folder, text_file, tmp_path, "--ckpt_path=last")
    with monkeypatch.context() as patch:
        patch.setattr(masks, "write_masks", die)
        with pytest.raises(KeyError):
            main(words)
    assert kept(tmp_path) == ["last.ckpt", "step=2.ckpt"]
    main(words)
    assert (tmp_path / "checkpoints" / "mask.safetensors").exists()


def test_the_link_is_to_the_one_that_is_gone_on_from(run_of_three: Path, model_folder, text_file, tmp_path: Path):
    """A run that was killed between its last checkpoint and the link to it has nothing to do but to link it."""
    folder = tmp_path / "run"
    shutil.copytree(run_of_three, folder, symlinks=True)
    link = folder / "checkpoints" / "last.ckpt"
    link.unlink()
    link.symlink_to("step=3.ckpt")
    main(flags(model_folder, text_file, folder, "--ckpt_path=last"))
    assert link.readlink() == Path("step=4.ckpt")


def test_leftovers_of_a_killed_run_are_cleared_away(model_folder, text_file, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / ".step=77.ckpt.abc.part").write_bytes(b"half")
    main(flags(model_folder, text_file, tmp_path, "--trainer.max_steps=1"))
    assert not list((tmp_path / "checkpoints").glob(".*"))


# -- SLURM --------------------------------------------------------------------------------------------------


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job of one task, and a ``scontrol`` that writes down what it is told."""
    for name, value in {
        "JOB_ID": "17",
        "NTASKS": "1",
        "JOB_NAME": "prune",
        "LOCALID": "0",
        "NODEID": "0",
        "PROCID": "0",
        "JOB_NODELIST": "localhost",
    }.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    script = tmp_path / "bin" / "scontrol"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/scontrol.log\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    return tmp_path / "scontrol.log"


def test_a_slurm_job_goes_back_into_the_queue_and_on(
    never_stopped: Outcome, model_folder, text_file, tmp_path: Path, monkeypatch, slurm: Path, capsys
) -> None:
    words = flags(model_folder, text_file, tmp_path / "run")  # no --ckpt_path: SLURM runs the same script again
    with monkeypatch.context() as patch:
        at_call(patch, "training_step", 5, send(signal.SIGUSR1))
        stopped(words, 138)
    assert slurm.read_text() == "requeue 17\n"
    assert "job 17 was requeued." in capsys.readouterr().err
    assert not list(Path.cwd().glob("hpc_ckpt*"))
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    main(words)
    assert "resuming from" in capsys.readouterr().err
    same(outcome(tmp_path / "run"), never_stopped)


def test_a_requeued_job_resumes_from_its_own_checkpoint_and_not_from_the_one_it_began_with(
    never_stopped: Outcome, model_folder, text_file, tmp_path: Path, monkeypatch, slurm: Path, capsys
) -> None:
    """Whose script types the checkpoint of another run."""
    began = flags(model_folder, text_file, tmp_path / "first")
    with monkeypatch.context() as patch:
        at_call(patch, "training_step", 3, send(signal.SIGUSR1))
        stopped(began, 138)
    (first,) = {path.resolve() for path in (tmp_path / "first" / "checkpoints").glob("last.ckpt")}
    words = [*flags(model_folder, text_file, tmp_path / "run"), f"--ckpt_path={first}"]
    with monkeypatch.context() as patch:
        at_call(patch, "training_step", 3, send(signal.SIGUSR1))
        stopped(words, 138)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    capsys.readouterr()
    main(words)
    assert f"resuming from {tmp_path / 'run' / 'checkpoints'}" in capsys.readouterr().err
    assert outcome(tmp_path / "run").mask == never_stopped.mask  # its first curves are the other run's


def test_a_run_stopped_before_its_first_step_elsewhere_has_a_checkpoint_of_its_own(
    never_stopped: Outcome, model_folder, text_file, tmp_path: Path, monkeypatch
) -> None:
    """Where it goes on from another folder's, whose step it has not left."""
    main(flags(model_folder, text_file, tmp_path / "first"))
    words, own = flags(model_folder, text_file, tmp_path / "second"), tmp_path / "second" / "checkpoints"
    with monkeypatch.context() as patch:
        at_call(patch, "training_step", 2, send(signal.SIGTERM))
        stopped([*words, f"--ckpt_path={tmp_path / 'first' / 'checkpoints' / 'step=2.ckpt'}"])
    assert torch.load(own / "last.ckpt", weights_only=True)["global_step"] == 2
    assert (own / "last.ckpt").resolve().parent == own
    main([*words, "--ckpt_path=last"])
    assert outcome(tmp_path / "second").mask == never_stopped.mask


def test_a_slurm_job_without_a_folder_of_its_own_is_not_requeued(
    model_folder, text_file, tmp_path: Path, monkeypatch, slurm: Path, capsys
) -> None:
    """It would not find its checkpoints; a job that SLURM itself starts again begins anew, and says so."""
    words = [word for word in flags(model_folder, text_file, tmp_path) if not word.startswith("--checkpoint.dirpath")]
    with monkeypatch.context() as patch:
        at_call(patch, "training_step", 5, send(signal.SIGUSR1))
        stopped(words, 138)
    assert not slurm.exists()
    said = capsys.readouterr().err
    assert "the job is not requeued. Set --checkpoint.dirpath for that." in said
    assert "Resume with --ckpt_path last --checkpoint.dirpath " in said
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    words = flags(model_folder, text_file, tmp_path / "anew")  # as a logger's new version is another folder
    with pytest.warns(UserWarning, match="names no folder: a new run starts"):
        main([word for word in words if not word.startswith("--checkpoint.dirpath")])
    assert list((tmp_path / "anew").rglob("mask.safetensors"))


def test_a_slurm_job_that_is_cancelled_is_not_requeued(
    model_folder, text_file, tmp_path: Path, monkeypatch, slurm: Path
) -> None:
    at_call(monkeypatch, "training_step", 5, send(signal.SIGTERM))
    stopped(flags(model_folder, text_file, tmp_path / "run"))
    assert not slurm.exists()
    assert kept(tmp_path / "run") == ["last.ckpt", "step=1.ckpt"]


def test_an_array_job_and_a_requeue_that_fails(tmp_path: Path, monkeypatch, slurm: Path, capsys) -> None:
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "5")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    requeue()
    assert slurm.read_text() == "requeue 5_3\n"
    monkeypatch.setenv("PATH", "")
    requeue()
    assert "job 5_3 could not be requeued" in capsys.readouterr().err


def test_the_checkpoint_that_a_run_resumes_from_can_be_removed_during_it(
    run_of_three: Path, model_folder, text_file, tmp_path: Path, monkeypatch
) -> None:
    """Mapped, it would stay on the disk until the run ends."""
    folder = tmp_path / "run"
    shutil.copytree(run_of_three, folder, symlinks=True)
    for name in ("step=4.ckpt", "step=3.ckpt", "last.ckpt", "mask.safetensors"):
        (folder / "checkpoints" / name).unlink(missing_ok=True)
    held = []
    real = LeapModule.on_train_start

    def noted(self: LeapModule) -> None:
        gc.collect()
        held.append("step=2.ckpt" in Path("/proc/self/maps").read_text())
        real(self)

    monkeypatch.setattr(LeapModule, "on_train_start", noted)
    main([*flags(model_folder, text_file, folder), "--ckpt_path=last"])
    assert held == [False]
