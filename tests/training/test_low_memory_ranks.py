"""Bfloat16 logits and packed moments on two ranks: equal where each holds all, resumable where they are sharded."""

from pathlib import Path

import pytest
import torch
from conftest import fit_flags
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from ranks import run_ranks
from scaled_runs import logits_of_runs, sharded

from leap_pl.checkpoints.layout import load_checkpoint
from leap_pl.errors import UserError
from leap_pl.training import optimizers

LOW = ["--model.logits_dtype=bfloat16", "--model.optimizer=PackedAdamW", "--model.optimizer.lr=2e-3"]


@pytest.mark.parametrize("folder", ["false", "true"])
def test_two_ranks(
    model_folder: Path, text_file: Path, tmp_path: Path, eager: None, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flags(name: str, *more: str) -> list[str]:
        return fit_flags(model_folder, text_file, tmp_path / name, *LOW, "--trainer.devices=2", *more)

    by_two = sharded(2, folder=folder == "true")
    before = tmp_path / "sharded" / "checkpoints" / "step=4.ckpt"
    runs = {"sharded": flags("sharded", *by_two), "resumed": flags("resumed", *by_two, f"--ckpt_path={before}")}
    if folder == "false":
        runs["ddp"] = flags("ddp", "--trainer.strategy=ddp")
    one, other = run_ranks(2, logits_of_runs, runs, folder=tmp_path / "said", seconds=300)
    refuses_moments_of_version_0_1(before, monkeypatch)
    for name in runs:
        for weight, logits in one[name].items():
            assert logits.dtype == torch.bfloat16
            assert torch.equal(logits, other[name][weight])  # both ranks have the same
            assert torch.equal(one["sharded"][weight], one["resumed"][weight])


def refuses_moments_of_version_0_1(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the key that this version saves is taken for the former one."""
    found, strategy = load_checkpoint(checkpoint), ModelParallelStrategy()
    optimizers.check_state(found, checkpoint, strategy)
    with monkeypatch.context() as patch:
        patch.setattr(optimizers, "FORMER_MOMENTS", optimizers.MOMENTS)
        optimizers.check_state(found, checkpoint, DDPStrategy())
        with pytest.raises(UserError, match=r"step=4.ckpt has moments of PackedAdamW as leap_pl 0\.1\.0 packed them"):
            optimizers.check_state(found, checkpoint, strategy)
