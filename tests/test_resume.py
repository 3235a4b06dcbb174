"""A run that is stopped anywhere and goes on ends as the run that was never stopped: every bit, every curve."""

import multiprocessing
import os
import pickle
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fit_flags
from ranks import run_ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer
from tensorboard.summary.writer.record_writer import RecordWriter

from leap_pl.callbacks.checkpoints import requeue
from leap_pl.checkpoint_io import WholeCheckpointIO
from leap_pl.cli import main
from leap_pl.data.batches import BlockLoader
from leap_pl.errors import UserError
from leap_pl.module import LeapModule
from leap_pl.resume import newest_checkpoint

pytestmark = pytest.mark.usefixtures("eager")

STEPS, WINDOW = 4, 3  # optimizer steps, micro-batches in each


@pytest.fixture(scope="module", autouse=True)
def event_files_in_order() -> Iterator[None]:
    """Of two event files of one second and one process the later has the later name.

    TensorBoard reads them by name, and a name ends in a count over the process: 10 comes before 9.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(10**6))
        yield


@dataclass(frozen=True)
class Outcome:
    """Everything that a finished run leaves and that a stop must not change."""

    checkpoint: dict[str, Any]
    mask: bytes
    curves: dict[str, dict[int, float]]


def flags(model: Path, text: Any, folder: Path, *more: str) -> list[str]:
    return fit_flags(
        model,
        text,
        folder,
        f"--trainer.max_steps={STEPS}",
        f"--trainer.accumulate_grad_batches={WINDOW}",
        "--trainer.val_check_interval=6",  # every other step
        f"--model.prior.cache_dir={model.parent / 'priors'}",  # part of a mask's provenance
        "--sparsity_log.histogram_every_n_steps=1000",
        *more,
    )


def outcome(folder: Path) -> Outcome:
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    kept = ("state_dict", "optimizer_states", "lr_schedulers", "TextDataModule", "global_step", "leap_pl")
    told = {key: checkpoint[key] for key in kept}
    told["sparsity_log"] = checkpoint["callbacks"]["SparsityLogger"]
    loop = checkpoint["loops"]["fit_loop"]
    told["counters"] = loop["epoch_loop.batch_progress"], loop["epoch_loop.automatic_optimization.optim_progress"]
    return Outcome(told, (folder / "checkpoints" / "mask.safetensors").read_bytes(), curves(folder / "tensorboard"))


def curves(folder: Path) -> dict[str, dict[int, float]]:
    """Every scalar as TensorBoard reads it; a value that was drawn twice must be the same twice."""
    events = EventAccumulator(str(folder))
    events.Reload()
    read: dict[str, dict[int, float]] = {}
    for tag in events.Tags()["scalars"]:
        curve = read.setdefault(tag, {})
        for event in events.Scalars(tag):
            assert curve.setdefault(event.step, event.value) == event.value, tag
    return read


def differences(one: Any, other: Any, path: str = "") -> Iterator[str]:
    """Where two nested structures differ, tensors bit by bit."""
    if isinstance(one, torch.Tensor):
        if not (one.dtype == other.dtype and torch.equal(one, other)):
            yield path
    elif isinstance(one, dict):
        if list(one) != list(other):
            yield f"{path}: {set(one) ^ set(other)}"
        for key in one.keys() & other.keys():
            yield from differences(one[key], other[key], f"{path}/{key}")
    elif isinstance(one, list | tuple):
        if len(one) != len(other):
            yield f"{path}: {len(one)} and {len(other)}"
        for place, (a, b) in enumerate(zip(one, other, strict=False)):
            yield from differences(a, b, f"{path}/{place}")
    elif one != other:
        yield f"{path}: {one!r} and {other!r}"


def same(one: Outcome, other: Outcome) -> None:
    assert list(differences(one.checkpoint, other.checkpoint)) == []
    assert one.mask == other.mask
    assert list(differences(one.curves, other.curves)) == []


def at_call(monkeypatch: pytest.MonkeyPatch, method: str, number: int, act: Callable[[], Any]) -> None:
    """Act at the start of the ``number``-th call of a method of the module, from 1."""
    calls, real = [], getattr(LeapModule, method)

    def acting(self: LeapModule, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == number:
            act()
        return real(self, *arguments)

    monkeypatch.setattr(LeapModule, method, acting)


def send(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def stopped(words: list[str], status: int = 143) -> None:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == status
    for number in handlers:  # what stands there now passes on to what stood there before
        if signal.getsignal(number) != handlers[number]:
            signal.signal(number, handlers[number])


def kept(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("*.ckpt"))


@pytest.fixture(scope="module")
def never_stopped(model_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEAP_PL_COMPILE", "0")
        main(flags(model_folder, text_file, folder))
    return outcome(folder)


def test_the_curves_of_a_whole_run(never_stopped: Outcome) -> None:
    """What the other tests compare with is not empty."""
    assert list(never_stopped.curves["loss/lm"]) == [1, 2, 3, 4]
    assert list(never_stopped.curves["perplexity/hard"]) == [0, 1, 3]  # Lightning counts from 0
    assert never_stopped.checkpoint["leap_pl"]["settings"]["perplexity"] == pytest.approx(
        never_stopped.curves["perplexity/hard"][3]
    )
    assert never_stopped.checkpoint["TextDataModule"]["consumed"] == STEPS * WINDOW


# -- told to stop -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batch", [1, 3, 4, 5, 6, 7, 11, 12])
def test_sigterm_in_a_micro_batch(
    never_stopped: Outcome, model_folder, text_file, tmp_path: Path, monkeypatch, capfd, micro_batch: int
) -> None:
    words = flags(model_folder, text_file, tmp_path, "--ckpt_path=last")
    done = micro_batch // WINDOW
    with monkeypatch.context() as patch:
        at_call(patch, "training_step", micro_batch, send(signal.SIGTERM))
        if done < STEPS:
            stopped(words)
            assert f"step={done}.ckpt" in kept(tmp_path) or not done
        else:
            main(words)  # the last step is done: it finishes
    said = capfd.readouterr().err
    assert ("the run finishes" in said) == (done == STEPS)
    assert ("a checkpoint is written after this micro-batch" in said) == (done < STEPS)
    assert f"stopped at step {done} of 4" in said or done in (0, STEPS)
    main(words)
    assert ("starts afresh" if done == 0 else f"(step {done})") in capfd.readouterr().err
    same(outcome(tmp_path), never_stopped)


@pytest.mark.parametrize("batch", [1, 3, 4, 5])
def test_sigterm_in_validation(
    never_stopped: Outcome, model_folder, text_file, tmp_path: Path, monkeypatch, batch: int
) -> None:
    """Of two batches each: before the first step, after the second step, after the last."""
    words = flags(model_folder, text_file, tmp_path, "--ckpt_path=last")
    with monkeypatch.context() as patch:
        at_call(patch, "validation_step", batch, send(signal.SIGTERM))
        if batch < 5:
            stopped(words)
        else:
            main(words)
    newest = {1: [], 3: ["last.ckpt", "step=2.ckpt"], 4: ["last.ckpt", "step=2.ckpt"]}
    assert kept(tmp_path) == newest.get(batch, ["last.ckpt", "step=2.ckpt", "step=4.ckpt"])
    main(words)
    same(outcome(tmp_path), never_stopped)


def test_a_run_stopped_again_and_again(never_stopped: Outcome, model_folder, text_file, tmp_path: Path, monkeypatch):
    """Once in every step, each time two micro-batches after it went on; by either signal."""
    words = flags(model_folder, text_file, tmp_path, "--ckpt_path=last", "--checkpoint.save_top_k=2")
    for number, status in [(signal.SIGUSR1, 138), (signal.SIGTERM, 143), (signal.SIGUSR1, 138), (signal.SIGTERM, 143)]:
        with monkeypatch.context() as patch:
            at_call(patch, "training_step", 4, send(number))
            stopped(words, status) if len(kept(tmp_path)) < 3 or "step=3.ckpt" not in kept(tmp_path) else main(words)
        assert len(kept(tmp_path)) <= 3  # the newest two and the link, whatever was resumed from
    main(words)
    assert kept(tmp_path) == ["last.ckpt", "step=3.ckpt", "step=4.ckpt"]
    same(outcome(tmp_path), never_stopped)


def test_a_validation_amid_the_micro_batches_of_a_step(model_folder, text_file, tmp_path: Path, monkeypatch) -> None:
    """After micro-batches 4 and 8 of 3 a step: a stop in one, and one right behind it."""
    odd = "--trainer.val_check_interval=4"
    main(flags(model_folder, text_file, tmp_path / "whole", odd))
    whole = outcome(tmp_path / "whole")
    for method, call in (("validation_step", 4), ("training_step", 5)):
        folder = tmp_path / f"{method}-{call}"
        words = flags(model_folder, text_file, folder, odd, "--ckpt_path=last")
        with monkeypatch.context() as patch:
            at_call(patch, method, call, send(signal.SIGTERM))
            stopped(words)
        main(words)
        same(outcome(folder), whole)


def test_sigterm_before_learning_begins(model_folder, text_file, tmp_path: Path, monkeypatch, capsys) -> None:
    """While the prior is made: nothing is under way, so it ends there."""
    words = flags(model_folder, text_file, tmp_path, "--ckpt_path=last")
    with monkeypatch.context() as patch:
        at_call(patch, "configure_model", 1, send(signal.SIGTERM))
        stopped(words)
    assert "stopped before the first step was done" in capsys.readouterr().err
    assert kept(tmp_path) == []


def test_sigterm_while_it_waits_for_text(
    never_stopped: Outcome, model_folder, text_file, tmp_path: Path, monkeypatch
) -> None:
    """It does not wait for the text to come, and takes no half of a step along."""
    words = flags(model_folder, text_file, tmp_path, "--ckpt_path=last")
    with monkeypatch.context() as patch:
        at_batch(patch, 8, send(signal.SIGTERM))
        stopped(words)
    assert "step=2.ckpt" in kept(tmp_path)
    main(words)
    same(outcome(tmp_path), never_stopped)


def at_batch(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[], Any]) -> None:
    """Act when the ``number``-th batch of training text is fetched, from 1."""
    real = BlockLoader.__iter__

    def acting(self: BlockLoader) -> Iterator[Any]:
        for place, batch in enumerate(real(self), 1):
            if place == number:
                act()
            yield batch

    monkeypatch.setattr(BlockLoader, "__iter__", acting)


def test_text_that_dies_midway_loses_nothing(
    never_stopped: Outcome, model_folder, text_file, tmp_path: Path, monkeypatch, capsys
) -> None:
    def die() -> None:
        raise UserError("c4, shard 3, row 17: the network failed 5 times in a row.")

    words = flags(model_folder, text_file, tmp_path, "--ckpt_path=last")
    with monkeypatch.context() as patch:
        at_batch(patch, 9, die)
        stopped(words, 2)
    assert "row 17: the network failed" in capsys.readouterr().err
    assert kept(tmp_path) == ["last.ckpt", "step=2.ckpt"]
    main(words)
    same(outcome(tmp_path), never_stopped)


def stopped_rank(rank: int, words: list[str]) -> list[int]:
    """Rank 1 alone is told to stop, amid the second step; the exit status and the steps that were done."""
    done, real = [0], LeapModule.training_step

    def training_step(self: LeapModule, batch: Any, batch_idx: int) -> torch.Tensor:
        done[0] = self.global_step
        if rank == 1 and batch_idx == WINDOW:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, batch, batch_idx)

    LeapModule.training_step = training_step  # type: ignore[method-assign]
    try:
        main(words)
    except SystemExit as end:
        return [int(end.code or 0), done[0]]
    return [0, done[0]]


def test_ranks_stop_together(model_folder, text_file, tmp_path: Path) -> None:
    words = flags(model_folder, text_file, tmp_path, "--trainer.devices=2", "--trainer.strategy=ddp")
    assert run_ranks(2, stopped_rank, words, folder=tmp_path / "said", seconds=200) == [[143, 1], [143, 1]]
    assert kept(tmp_path) == ["last.ckpt", "step=1.ckpt"]
    stored = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert stored["TextDataModule"]["consumed"] == 2 * WINDOW  # of both ranks, in the step that was done
    assert "stopped at step 1" in (tmp_path / "said" / "rank-0.txt").read_text()


# -- workers, streams ---------------------------------------------------------------------------------------


@pytest.fixture
def streamed(text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A hub dataset of two shards, streamed."""
    import datasets

    real, lines = datasets.load_dataset, text_file.read_text().splitlines()
    files = [tmp_path / f"shard-{shard}.jsonl" for shard in range(2)]
    for shard, file in enumerate(files):
        file.write_text("\n".join(lines[shard::2]))

    def load(name: str, config: str | None, *, split: str, streaming: bool) -> Any:
        stored = [str(file) for file in files]
        return real("json", data_files=stored, split="train", streaming=streaming, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", load)
    return "some/text"


@pytest.mark.parametrize(("kind", "workers"), [("local", 2), ("streamed", 0), ("streamed", 2)])
def test_workers_and_streams(
    model_folder, text_file, tmp_path: Path, monkeypatch, request: pytest.FixtureRequest, kind: str, workers: int
) -> None:
    """The signal reaches the whole process group, as a scheduler sends it: the workers outlive it."""
    text = text_file if kind == "local" else request.getfixturevalue("streamed")
    more = [f"--data.num_workers={workers}", "--data.validation_split=train"]
    main(flags(model_folder, text, tmp_path / "whole", *more))
    words = flags(model_folder, text, tmp_path / "run", *more, "--ckpt_path=last")

    def to_all() -> None:
        for child in multiprocessing.active_children():
            os.kill(child.pid or 0, signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        at_call(patch, "training_step", 5, to_all)
        stopped(words)
    main(words)
    same(outcome(tmp_path / "run"), outcome(tmp_path / "whole"))


# -- which checkpoint ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_of_three(model_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run with all its checkpoints."""
    folder = tmp_path_factory.mktemp("three")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEAP_PL_COMPILE", "0")
        main(flags(model_folder, text_file, folder, "--checkpoint.every_n_train_steps=1"))
    return folder


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
    assert said.endswith("going on from " + str(folder / "checkpoints" / "step=2.ckpt") + " (step 2).")
    same(outcome(folder), never_stopped)


def test_all_checkpoints_damaged(run_of_three: Path, model_folder, text_file, tmp_path: Path, capsys) -> None:
    """To begin again over what may be rescued is not for the program to decide."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for step in (2, 3):
        (folder / f"step={step}.ckpt").write_bytes(b"PK")
    stopped(flags(model_folder, text_file, tmp_path, "--ckpt_path=last"), 2)
    (said,) = capsys.readouterr().err.splitlines()
    assert "no checkpoint in" in said
    assert "move them away to start afresh" in said


def test_last_needs_a_folder_that_stays(model_folder, text_file, tmp_path: Path, capsys) -> None:
    words = [word for word in flags(model_folder, text_file, tmp_path) if not word.startswith("--checkpoint.dirpath")]
    stopped([*words, "--ckpt_path=last"], 2)
    assert "--checkpoint.dirpath" in capsys.readouterr().err


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
    from leap_pl import masks

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
    assert "job 17 is in the queue again" in capsys.readouterr().err
    assert not list(Path.cwd().glob("hpc_ckpt*"))
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    main(words)
    assert "going on from" in capsys.readouterr().err
    same(outcome(tmp_path / "run"), never_stopped)


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
