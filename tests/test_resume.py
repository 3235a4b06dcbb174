"""A run that is stopped anywhere and goes on ends as the run that was never stopped: every bit, every curve."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fit_flags
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from leap_pl.cli import main
from leap_pl.module import LeapModule

pytestmark = pytest.mark.usefixtures("eager")

STEPS, WINDOW = 4, 3  # optimizer steps, micro-batches in each


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


@pytest.mark.parametrize("micro_batch", range(1, STEPS * WINDOW + 1))
def test_sigterm_in_any_micro_batch(
    never_stopped: Outcome, model_folder, text_file, tmp_path: Path, monkeypatch, capsys, micro_batch: int
) -> None:
    words = flags(model_folder, text_file, tmp_path, "--ckpt_path=last")
    with monkeypatch.context() as patch:
        at_call(patch, "training_step", micro_batch, send(signal.SIGTERM))
        if micro_batch < STEPS * WINDOW:
            stopped(words)
            done = micro_batch // WINDOW
            assert f"step={done}.ckpt" in kept(tmp_path) or not done
            assert ("SIGTERM: stopped" in (error := capsys.readouterr().err)) and error.count("leap_pl fit") == 2
        else:
            main(words)  # the last step is done: it finishes
    main(words)
    said = capsys.readouterr().err
    assert "starts afresh" in said if micro_batch < WINDOW else "going on from" in said
    same(outcome(tmp_path), never_stopped)


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5, 6])
def test_sigterm_in_validation(
    never_stopped: Outcome, model_folder, text_file, tmp_path: Path, monkeypatch, capsys, batch: int
) -> None:
    """Two batches each: before the first step, after the second, after the fourth."""
    words = flags(model_folder, text_file, tmp_path, "--ckpt_path=last")
    with monkeypatch.context() as patch:
        at_call(patch, "validation_step", batch, send(signal.SIGTERM))
        if batch <= 4:
            stopped(words)
        else:
            main(words)
    assert kept(tmp_path) == {0: [], 1: ["last.ckpt", "step=2.ckpt"]}.get((batch - 1) // 2, ["last.ckpt", "step=2.ckpt", "step=4.ckpt"])
    main(words)
    same(outcome(tmp_path), never_stopped)
