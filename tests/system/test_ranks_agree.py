"""Machines with copies of their own: a run begins only if all of its ranks have the same base model and text."""

from pathlib import Path

import pytest
from conftest import WORDS, fit_flags
from ranks import run_ranks
from scaled_runs import BRIEF, ddp
from tiny import tiny_folder

from leap_pl.cli.main import main


def learn(rank: int, models: list[str], texts: list[str], validation: list[str], folder: str) -> int:
    more = [f"--data.validation_text={validation[rank]}", "--data.validation_sequences=64"] if validation else []
    words = fit_flags(models[rank], texts[rank], Path(folder), *BRIEF, *ddp(2), *more)
    with pytest.raises(SystemExit) as stop:
        main(words)
    return int(str(stop.value.code))


@pytest.mark.parametrize("differs", ["base model", "text", "validation text"])
def test_ranks_that_have_other_files_do_not_learn(
    differs: str, model_folder: Path, text_file: Path, tmp_path: Path, eager: None
) -> None:
    models, texts, validation = [model_folder, model_folder], [text_file, text_file], []
    if differs == "text":
        (tmp_path / "rank-1").mkdir()
        texts[1] = tmp_path / "rank-1" / text_file.name
        changed = text_file.read_text().replace(WORDS[0], WORDS[1], 1)
        texts[1].write_text(changed)
    elif differs == "validation text":  # of which a machine has the older, shorter copy
        lines = text_file.read_text().splitlines(keepends=True)
        for rank, count in enumerate((len(lines), 3)):
            (tmp_path / f"rank-{rank}").mkdir()
            validation.append(str(tmp_path / f"rank-{rank}" / f"valid{text_file.suffix}"))
            Path(validation[rank]).write_text("".join(lines[:count]).replace(WORDS[0], WORDS[1]))
    else:
        models[1] = tiny_folder(tmp_path / "rank-1" / model_folder.name, seed=1)
    arguments = ([*map(str, models)], [*map(str, texts)], validation, str(tmp_path / "run"))
    assert run_ranks(2, learn, *arguments, folder=tmp_path / "said") == [2, 2]
    said = [(tmp_path / "said" / f"rank-{rank}.txt").read_text() for rank in (0, 1)]
    assert f"rank 1 has another {differs} than rank 0. Give every machine the same settings and files" in said[1]
    assert "another rank has other settings or files than rank 0" in said[0]
    assert not list((tmp_path / "run").rglob("*.ckpt"))


def learn_with(rank: int, model: str, text: str, folder: str, differs: str) -> int:
    more = [f"--model.optimizer.lr={0.1 * (1 + rank)}"] if differs == "settings" else ["--ckpt_path=last"]
    place = Path(folder, f"rank-{rank}") if differs == "checkpoint" else Path(folder)
    with pytest.raises(SystemExit) as stop:
        main(fit_flags(model, text, place, *BRIEF, *ddp(2), *more))
    return int(str(stop.value.code))


@pytest.mark.parametrize(
    ("differs", "said_of_it"),
    [("settings", "another model.optimizer than"), ("checkpoint", "another checkpoint to resume from than")],
)
def test_ranks_that_have_other_settings_or_checkpoints_do_not_learn(
    differs: str, said_of_it: str, model_folder: Path, text_file: Path, tmp_path: Path, eager: None
) -> None:
    """Each machine has its command line, and where folders are its own, rank 0 alone has written checkpoints."""
    run = tmp_path / "run"
    if differs == "checkpoint":
        more = ["--checkpoint.every_n_train_steps=1", "--trainer.accumulate_grad_batches=4"]
        words = fit_flags(model_folder, text_file, run / "rank-0", *BRIEF, *more)
        main(words)
        for name in ("last.ckpt", "step=2.ckpt", "mask.safetensors"):
            (run / "rank-0" / "checkpoints" / name).unlink()
    before = sorted(run.rglob("*.ckpt"))
    arguments = (str(model_folder), str(text_file), str(run), differs)
    assert run_ranks(2, learn_with, *arguments, folder=tmp_path / "said") == [2, 2]
    said = [(tmp_path / "said" / f"rank-{rank}.txt").read_text() for rank in (0, 1)]
    assert f"rank 1 has {said_of_it} rank 0. Give every machine the same settings" in said[1]
    assert "another rank has other settings or files than rank 0" in said[0]
    assert sorted(run.rglob("*.ckpt")) == before
