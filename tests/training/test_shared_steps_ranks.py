"""Shared steps of rows and columns on the command line: on two ranks as in one process, and resumed."""

from pathlib import Path

import pytest
import torch
from conftest import fit_flags
from ranks import run_ranks
from scaled_runs import logits_of_runs, sharded

from leap_pl.cli.main import main
from leap_pl.masks import MaskSet

SHARED = ["--model.optimizer=SharedAdamW", "--model.optimizer.rows=2", "--model.optimizer.columns=1.5"]
PACKED = [
    "--model.optimizer=PackedAdamW",
    "--model.optimizer.rows=2",
    "--model.optimizer.columns=1.5",
    "--model.logits_dtype=bfloat16",
]


def test_two_ranks(model_folder: Path, text_file: Path, tmp_path: Path, eager: None) -> None:
    def flags(name: str, *more: str) -> list[str]:
        return fit_flags(model_folder, text_file, tmp_path / name, *more)

    two = ["--trainer.devices=2", "--trainer.accumulate_grad_batches=1"]
    runs = {"ddp": flags("ddp", *SHARED, *two, "--trainer.strategy=ddp")}
    for name, settings in (("shared", SHARED), ("packed", PACKED)):
        runs[f"{name}"] = flags(name, *settings, *two, *sharded(2))
        before = tmp_path / name / "checkpoints" / "step=4.ckpt"
        runs[f"{name} resumed"] = flags(f"{name} resumed", *settings, *two, *sharded(2), f"--ckpt_path={before}")
    one, other = run_ranks(2, logits_of_runs, runs, folder=tmp_path / "said", seconds=300)
    alone = logits_of_runs(0, {"alone": flags("alone", *SHARED)})["alone"]
    plain = logits_of_runs(0, {"plain": flags("plain")})["plain"]
    for weight, logits in alone.items():
        assert not torch.allclose(logits, plain[weight], atol=1e-3)
        for name in ("ddp", "shared"):
            torch.testing.assert_close(one[name][weight], logits, rtol=1e-3, atol=2e-5)
        for name in runs:
            assert torch.equal(one[name][weight], other[name][weight])
        for name in ("shared", "packed"):
            assert torch.equal(one[name][weight], one[f"{name} resumed"][weight])
    assert one["packed"][weight].dtype == torch.bfloat16


@pytest.mark.parametrize("settings", [SHARED, PACKED])
def test_a_run_that_is_resumed_is_the_same(
    settings: list[str],
    model_folder: Path,
    text_file: Path,
    tmp_path: Path,
    eager: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = logits_of_runs(0, {"whole": fit_flags(model_folder, text_file, tmp_path / "whole", *settings)})["whole"]
    before = tmp_path / "whole" / "checkpoints" / "step=2.ckpt"
    words = fit_flags(model_folder, text_file, tmp_path / "resumed", *settings, f"--ckpt_path={before}")
    resumed = logits_of_runs(0, {"resumed": words})["resumed"]
    for weight, logits in whole.items():
        assert torch.equal(logits, resumed[weight])
    changed = fit_flags(
        model_folder,
        text_file,
        tmp_path / "changed",
        *settings,
        "--model.optimizer.rows=0",
        f"--ckpt_path={before}",
    )
    with pytest.raises(SystemExit):
        main(changed)
    assert "model.optimizer.rows was 2.0 and is 0" in capsys.readouterr().err
    told = MaskSet.load(tmp_path / "resumed" / "checkpoints" / "mask.safetensors").provenance.config["optimizer"]
    assert (told["rows"], told["columns"]) == (2, 1.5)
    name = settings[0].partition("=")[2].rpartition(".")[2]
    assert told["class"] == name
