"""The benchmark of what a run spends beside its steps."""

from pathlib import Path

import pytest

from benchmarks import loop


def test_shares_are_those_of_the_steps_that_count() -> None:
    durations = {
        "run_training_batch": [9.0, 1.0, 3.0],
        "[_TrainingEpochLoop].train_dataloader_next": [5.0, 0.5, 0.1, 7.0],  # a last one finds the end
        "[Callback]Cheap.on_train_batch_end": [8.0, 0.0, 0.04],
        "[Callback]Dear{'monitor': None}.on_train_batch_start": [8.0, 0.1, 0.1],
        "[Callback]Dear{'monitor': None}.on_train_batch_end": [8.0, 0.1, 0.1],
        "[Callback]Dear{'monitor': None}.on_train_start": [99.0],
        "[Strategy]SingleDeviceStrategy.backward": [1.0, 1.0, 1.0],
    }
    rows = {row["part"]: row for row in loop.shares(durations, 1)}
    assert list(rows) == ["step", "waiting for data", "Dear", "Cheap"]
    assert [row["ms_a_step"] for row in rows.values()] == pytest.approx([2000, 300, 200, 20])
    assert [row["percent_of_steps"] for row in rows.values()] == pytest.approx([100, 15, 10, 1])


@pytest.mark.usefixtures("eager")
def test_a_run_is_taken_apart(model_folder: Path, text_file: Path, tmp_path: Path, capsys) -> None:
    output = tmp_path / "loop.json"
    words = ["--model", str(model_folder), "--text", str(text_file), "--steps", "6", "--tokens", "32"]
    loop.main([*words, "--output", str(output)])
    told = capsys.readouterr().out
    for part in ("step", "waiting for data", "SparsityLogger", "StepProgress"):
        assert f"| {part} |" in told
    assert output.is_file()
