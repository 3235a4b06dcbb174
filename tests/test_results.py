"""The headline experiment on a tiny model: all kinds of cells, resume, what is run again, and the report."""

import json
import time

import pytest
import yaml

from leap_pl.cli import main as leap_pl
from leap_pl.errors import UserError
from leap_pl.results import running
from leap_pl.results.__main__ import main
from leap_pl.results.experiment import read_experiment
from leap_pl.results.running import Ran

TOKENS = 6 * 2 * 32  # six steps


def definition(folder, model, text):
    """A tiny experiment with a cell of every kind, written to ``folder``."""
    piqa = [{"goal": f"cut {n}", "sol1": "a knife", "sol2": "a spoon", "label": n % 2} for n in range(6)]
    arc = [{"question": "Which is hot?", "choices": {"text": ["ice", "fire"], "label": ["A", "B"]}, "answerKey": "B"}]
    for task, rows in (("piqa", piqa), ("arc_easy", arc * 3)):
        path = folder / "tasks" / task / "validation.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = text.read_text().splitlines()
    (folder / "unlike.jsonl").write_text("\n".join(lines[:20]) + "\n")
    (folder / "validation.jsonl").write_text("\n".join(lines[20:40]) + "\n")
    learn = {
        "model": {"dtype": "float32"},
        "data": {"text": str(text), "seq_length": 32, "batch_size": 2, "validation_sequences": 2},
        "annealing": {"alpha": {"start": 100, "end": 350}, "tau": {"start": 1, "end": 0.05}},
        "trainer": {"accelerator": "cpu", "val_check_interval": 100},
    }
    told = {
        "base_model": str(model),
        "about": ["A tiny random model."],
        "texts": {
            "validation": {"text": str(folder / "validation.jsonl"), "max_tokens": 256},
            "like": {"text": str(text), "max_tokens": 256},
            "unlike": {"text": str(folder / "unlike.jsonl"), "max_tokens": 192},
        },
        "evaluate": {"seq_length": 32, "batch_size": 4, "dtype": "float32", "tasks_folder": str(folder / "tasks")},
        "tasks": {"piqa": 4, "arc_easy": None},
        "tasks_at": [0, 0.5],
        "prune": {"text": str(text), "seq_length": 32, "sequences": 4, "dtype": "float32"},
        "learn": {"config": "learn.yaml", "tokens": TOKENS, "checkpoint_tokens": 2 * 2 * 32},
        "rows": {
            "dense": {},
            "wanda": {"sparsity": [0.5, 0.6], "prune": {"method": "wanda"}, "baseline": True},
            "admm": {"title": "ADMM", "sparsity": [0.5, 0.6], "prune": {"method": "admm"}, "baseline": True},
            "wanda-2of4": {"sparsity": [0.5], "table": "2:4", "prune": {"method": "wanda", "pattern": "2:4"}},
            "leap": {"title": "LEAP", "sparsity": [0.5, 0.6], "prior": "wanda", "fit": {}},
            "distill": {
                "sparsity": [0.5],
                "prior": "wanda",
                "fit": {"model": {"objective": {"lm": 0, "distillation": 1}}},
            },
            "update": {"sparsity": [0.5], "best_of": ["leap", "distill"], "prune": {"method": "admm"}},
        },
    }
    write(folder / "learn.yaml", learn)
    write(folder / "tiny.yaml", told)
    return folder / "tiny.yaml"


def write(path, told):
    path.write_text(yaml.safe_dump(told, sort_keys=False))


def change(path, *keys, to):
    told = yaml.safe_load(path.read_text())
    place = told
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = to
    write(path, told)


@pytest.fixture
def ran(monkeypatch, eager):
    """Commands run in this process, and are listed."""
    words = []

    def run(command, log, caption, keep=()):
        words.append(command)
        began = time.monotonic()
        try:
            leap_pl(command)
        except SystemExit as error:
            raise UserError(f"{caption} failed") from error
        return Ran(time.monotonic() - began, 1)

    monkeypatch.setattr(running, "run_command", run)
    return words


def flags(folder):
    return ["--config", str(folder / "tiny.yaml"), "--folder", str(folder / "runs"), "--docs", str(folder / "docs")]


def test_all_of_it(ran, tmp_path, model_folder, text_file, capsys):
    path = definition(tmp_path, model_folder, text_file)
    assert main(flags(tmp_path)) == 0
    cells = {p.stem: json.loads(p.read_text()) for p in (tmp_path / "docs" / "cells").glob("*.json")}
    assert sorted(cells) == sorted(read_experiment(path).cells)
    print(ran)
    report = (tmp_path / "docs.md").read_text()
    print(report)
    # Nothing is run twice.
    count = len(ran)
    assert main(flags(tmp_path)) == 0
    assert len(ran) == count
