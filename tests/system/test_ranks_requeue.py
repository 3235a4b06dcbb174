"""A rank that has ended ends all others under srun: none ends before the job is in the queue again."""

import os
import signal
import time
from pathlib import Path

import pytest
from conftest import fit_flags
from ranks import run_ranks
from scaled_runs import BRIEF, ddp

from leap_pl.callbacks import checkpoints
from leap_pl.cli.main import main
from leap_pl.training.module import LeapModule


def stopped(rank: int, model: str, text: str, folder: str) -> tuple[float, float]:
    """Learn until a signal in the first micro-batch; return when the job was put into the queue, and the rank ended."""
    requeued = [0.0]

    def requeue() -> None:
        time.sleep(1)
        requeued[0] = time.time()

    step = LeapModule.training_step

    def until_it_stops(self: LeapModule, batch: object, batch_idx: int) -> object:
        os.kill(os.getpid(), signal.SIGUSR1)
        return step(self, batch, batch_idx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LeapModule, "training_step", until_it_stops)
        patch.setattr(checkpoints, "requeuing", lambda _: Slurm())
        patch.setattr(checkpoints, "requeue", requeue)
        with pytest.raises(SystemExit) as stop:
            main(fit_flags(model, text, Path(folder), *BRIEF, *ddp(2)))
    assert stop.value.code == 138
    return requeued[0], time.time()


class Slurm:
    requeue_signal = signal.SIGUSR1


def test_no_rank_ends_before_the_job_is_in_the_queue_again(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    (requeued, _), (never, ended) = run_ranks(
        2, stopped, str(model_folder), str(text_file), str(tmp_path / "run"), folder=tmp_path / "said"
    )
    assert never == 0 < requeued < ended
