"""Runs that train weights: a finished one, the words that start another, and what is asked of their weights."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Run, fit_flags
from safetensors.torch import load_file

from leap_pl import MaskSet

FAST = ["--model.weight_training.lr=1e-2", "--model.weight_training.warmup_steps=1", "--trainer.max_steps=4"]

Flags = Callable[..., list[str]]


@pytest.fixture(scope="session")
def recover(finished_run: Run, model_folder: Path, text_file: Path) -> Flags:
    """The words of a tiny ``leap_pl recover`` of the finished run's mask."""

    def words(folder: Path, *more: str) -> list[str]:
        flags = [*fit_flags(model_folder, text_file, folder, *FAST, *more)]
        flags = [word for word in flags if not word.startswith("--model.prior.method")]
        return ["recover", *flags[1:], f"--model.mask={finished_run.mask.parent}"]

    return words


@pytest.fixture(scope="session")
def recovered(recover: Flags, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of four steps whose kept weights and norms are trained."""
    from leap_pl.cli.main import main

    folder = tmp_path_factory.mktemp("recovered")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEAP_PL_COMPILE", "0")
        main(recover(folder))
    return folder


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / "weights.safetensors")


def exact_zeros(tensors: dict[str, torch.Tensor], masks: MaskSet) -> None:
    """Zeros where the mask removes, and nowhere else: no weight of these models is exactly 0."""
    for name, mask in masks.masks.items():
        assert torch.equal(tensors[name] != 0, mask)
