"""Same seed, same machine: same mask. What does not change it, and what does."""

from pathlib import Path

import pytest
import torch
from conftest import Run, fit_flags

from leap_pl.checkpoints.layout import load_checkpoint
from leap_pl.cli.main import main
from leap_pl.kernels.compiled import can_compile, compile_seconds
from leap_pl.masks import MaskSet

pytestmark = pytest.mark.usefixtures("eager")


def learned(model: Path, text: Path, finished: Run, folder: Path, *more: str) -> tuple[dict[str, torch.Tensor], bytes]:
    """The logits and the mask file of the run ``finished``, with other settings."""
    words = fit_flags(model, text, folder, f"--model.prior.cache_dir={finished.folder / 'priors'}", *more)
    main(words)
    return ends(folder / "checkpoints")


def ends(checkpoints: Path) -> tuple[dict[str, torch.Tensor], bytes]:
    logits = load_checkpoint(checkpoints / "last.ckpt")["state_dict"]
    return logits, (checkpoints / "mask.safetensors").read_bytes()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_the_same_run_gives_the_same_file(finished: Run, model_folder, text_file, tmp_path: Path) -> None:
    """Not the same mask alone: the same bytes."""
    logits, file = learned(model_folder, text_file, finished, tmp_path)
    before, mask = ends(finished.checkpoint.parent)
    assert same(logits, before)
    assert file == mask


def test_what_does_not_change_the_mask(finished: Run, model_folder, text_file, tmp_path: Path) -> None:
    """How text is fetched, how memory is spared, and how often a run is looked at; all of it at once."""
    more = ["--data.num_workers=2", "--model.activation_checkpointing=true", "--trainer.val_check_interval=3"]
    more += ["--sparsity_log.every_n_steps=4", "--sparsity_log.samples=100", "--checkpoint.every_minutes=1e-6"]
    more += ["--seed_everything=99", "--trainer.num_sanity_val_steps=0", "--trainer.log_every_n_steps=1"]
    logits, _ = learned(model_folder, text_file, finished, tmp_path, *more)
    assert same(logits, ends(finished.checkpoint.parent)[0])
    masks = MaskSet.load(tmp_path / "checkpoints" / "mask.safetensors").masks
    assert same(masks, MaskSet.load(finished.mask).masks)


@pytest.mark.parametrize(
    "more",
    [
        ["--model.seed=1"],
        ["--data.seq_length=64"],
        ["--data.batch_size=1", "--trainer.accumulate_grad_batches=4"],  # other noise: it goes by micro-batch
        ["--model.dtype=bfloat16"],
    ],
)
def test_what_changes_it(finished: Run, model_folder, text_file, tmp_path: Path, more: list[str]) -> None:
    logits, _ = learned(model_folder, text_file, finished, tmp_path, *more)
    assert not same(logits, ends(finished.checkpoint.parent)[0])


def furthest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def test_a_compiler_changes_it_to_rounding(
    finished: Run, model_folder, text_file, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LEAP_PL_COMPILE", "1")
    if not can_compile(torch.device("cpu")):
        pytest.skip("there is no compiler")
    logits, _ = learned(model_folder, text_file, finished, tmp_path)
    before, _ = ends(finished.checkpoint.parent)
    assert any(name.startswith("mask_forward") for name in compile_seconds())
    assert furthest(logits, before) < 1e-4  # a run moves logits by 1e-3 a step


def test_threads_change_it_to_rounding(finished: Run, model_folder, text_file, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2 if threads == 1 else 1)
    try:
        logits, _ = learned(model_folder, text_file, finished, tmp_path)
    finally:
        torch.set_num_threads(threads)
    assert furthest(logits, ends(finished.checkpoint.parent)[0]) < 1e-4
