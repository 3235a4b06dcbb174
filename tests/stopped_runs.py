"""Runs that are stopped: what a finished one leaves, how one is stopped, and whether two left the same."""

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fit_flags
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from leap_pl.checkpoints.signals import STOPPING
from leap_pl.cli.main import main
from leap_pl.training.module import LeapModule

STEPS, WINDOW = 4, 3  # optimizer steps, micro-batches in each


@pytest.fixture(scope="session")
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
    handlers = {number: signal.getsignal(number) for number in STOPPING}
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == status
    for number in handlers:  # what stands there now passes on to what stood there before
        if signal.getsignal(number) != handlers[number]:
            signal.signal(number, handlers[number])


def kept(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("*.ckpt"))


@pytest.fixture(scope="session")
def never_stopped(
    event_files_in_order: None, model_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Outcome:
    """What a run leaves that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEAP_PL_COMPILE", "0")
        main(flags(model_folder, text_file, folder))
    return outcome(folder)
