"""The benchmark of the text that a run is fed with."""

import json
from pathlib import Path

from benchmarks import tokens


def test_every_way_is_measured(model_folder: Path, text_file: Path, tmp_path: Path, capsys) -> None:
    output = tmp_path / "tokens.json"
    words = ["--model", str(model_folder), "--text", str(text_file), "--tokens", "2048", "--seq_length", "32"]
    tokens.main([*words, "--ranks", "1", "2", "--workers", "0", "1", "--repeats", "1", "--output", str(output)])
    assert "| tokens_a_second |" in capsys.readouterr().out
    rows = json.loads(output.read_text())["rows"]
    assert [(row["ranks"], row["workers"], row["how"]) for row in rows] == [
        *((1, 0, "shared"), (1, 0, "threads"), (1, 1, "shared")),
        *((2, 0, "shared"), (2, 0, "everything"), (2, 1, "shared"), (2, 1, "everything")),
    ]
    assert all(row["tokens_a_second"] > 0 and row["processor_seconds"] > 0 for row in rows)
    assert rows[0]["faster"] == 1
