"""A run that is stopped anywhere and goes on ends as the run that was never stopped: every bit, every curve."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from stopped_runs import STEPS, WINDOW, Outcome, at_call, flags, kept, outcome, same, send, stopped

from leap_pl.cli.main import main
from leap_pl.data.batches import BlockLoader
from leap_pl.errors import UserError
from leap_pl.training.module import LeapModule

pytestmark = pytest.mark.usefixtures("eager", "event_files_in_order")


def test_the_curves_of_a_whole_run(never_stopped: Outcome) -> None:
    """What the other tests compare with is not empty."""
    assert list(never_stopped.curves["loss/lm"]) == [1, 2, 3, 4]
    assert list(never_stopped.curves["perplexity/hard"]) == [0, 2, 4]
    assert never_stopped.checkpoint["leap_pl"]["settings"]["perplexity"] == pytest.approx(
        never_stopped.curves["perplexity/hard"][4]
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
    assert ("starting a new run" if done == 0 else f"(step {done})") in capfd.readouterr().err
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
    """Once in every step, each time two micro-batches after it went on; by each signal."""
    words = flags(model_folder, text_file, tmp_path, "--ckpt_path=last", "--checkpoint.save_top_k=2")
    for number, status in [(signal.SIGUSR1, 138), (signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGTERM, 143)]:
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


@pytest.mark.parametrize(
    ("kind", "workers", "number"),
    [
        ("local", 2, signal.SIGTERM),
        ("local", 2, signal.SIGINT),
        ("streamed", 0, signal.SIGTERM),
        ("streamed", 2, signal.SIGTERM),
    ],
)
def test_workers_and_streams(
    model_folder, text_file, tmp_path: Path, monkeypatch, request, kind: str, workers: int, number: int
) -> None:
    """The signal reaches the whole process group, as a scheduler or a terminal sends it: the workers outlive it."""
    text = text_file if kind == "local" else request.getfixturevalue("streamed")
    more = [f"--data.num_workers={workers}", "--data.validation_split=train"]
    main(flags(model_folder, text, tmp_path / "whole", *more))
    words = flags(model_folder, text, tmp_path / "run", *more, "--ckpt_path=last")

    def to_all() -> None:
        children.extend(multiprocessing.active_children())
        for child in children:
            os.kill(child.pid or 0, number)
        os.kill(os.getpid(), number)

    children: list[Any] = []
    with monkeypatch.context() as patch:
        at_call(patch, "training_step", 5, to_all)
        stopped(words, 128 + number)
    assert len(children) >= workers
    main(words)
    same(outcome(tmp_path / "run"), outcome(tmp_path / "whole"))
