"""A rank that dies ends the job, and the job says which one it was and where its words are."""

import os
import signal
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from conftest import fit_flags
from ranks import PRELOAD
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from leap_pl.cli import fit as trainer_cli
from leap_pl.cli.main import main
from leap_pl.distributed.strategy import lost_a_rank
from leap_pl.errors import UserError


def fit(flags: list[str], dies: str) -> None:
    """``leap_pl fit`` on a rank of torchrun's agent; rank 1 is killed, or fails, in the second step."""
    from leap_pl.training.module import LeapModule

    os.environ["LEAP_PL_COMPILE"] = "0"
    step = LeapModule.training_step

    def until_it_dies(self, batch, batch_idx):
        if os.environ["RANK"] == "1" and self.global_step == 1:
            if dies == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise UserError("the words of the rank that failed")
        return step(self, batch, batch_idx)

    LeapModule.training_step = until_it_dies
    main(flags)


@pytest.fixture
def handlers_as_they_were() -> Iterator[None]:
    """Torchrun's agent sets some, and leaves them."""
    before = {
        number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHELASTIC_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGHUP,SIGQUIT")
        yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers_as_they_were")
@pytest.mark.parametrize("dies", ["killed", "failing"])
def test_torchrun_ends_the_job_and_names_the_rank(model_folder, text_file, tmp_path: Path, dies: str) -> None:
    """Torchrun's agent itself; the ranks are forked from a process that has imported everything."""
    get_context("forkserver").set_forkserver_preload(PRELOAD)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        run_id=dies,
        max_restarts=0,
        monitor_interval=0.1,
        start_method="forkserver",
        logs_specs=DefaultLogsSpecs(log_dir=str(tmp_path / "logs"), redirects=Std.ALL),
    )
    flags = fit_flags(model_folder, text_file, tmp_path / "run", "--trainer.devices=2", "--trainer.strategy=ddp")
    with pytest.raises(ChildFailedError) as failed:
        elastic_launch(config, fit)(flags, dies)
    rank, failure = failed.value.get_first_failure()
    assert (rank, failure.exitcode) == (1, {"killed": -signal.SIGKILL, "failing": 2}[dies])
    (words,) = (tmp_path / "logs").rglob("1/stderr.log")
    if dies == "failing":
        assert words.read_text().splitlines()[-1] == "leap_pl fit [rank 1]: the words of the rank that failed"


def test_the_others_say_that_a_rank_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = "[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:63380. This is typically caused by"
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert lost_a_rank(RuntimeError(gone))
    assert lost_a_rank(torch.distributed.DistNetworkError("Connection reset by peer"))
    assert not lost_a_rank(RuntimeError("expected m1 and m2 to have the same dtype"))
    monkeypatch.setattr(trainer_cli, "make_cli", raises(RuntimeError(gone)))
    with pytest.raises(UserError, match="another rank has ended, and its own message says why"):
        trainer_cli.run(["fit"])
    monkeypatch.setattr(trainer_cli, "make_cli", raises(RuntimeError("of our own")))
    with pytest.raises(RuntimeError, match="of our own"):
        trainer_cli.run(["fit"])


def raises(error: Exception) -> Callable[..., None]:
    def function(*_: object, **__: object) -> None:
        raise error

    return function
