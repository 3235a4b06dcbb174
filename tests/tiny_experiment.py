"""The headline experiment on a tiny model: its definition, done once, and copies to change."""

import json
import shutil
import time
from pathlib import Path

import pytest
import yaml
from tiny import tiny_folder

from experiments.headline import report, running
from experiments.headline.__main__ import main
from experiments.headline.definition import read_experiment
from experiments.headline.runner import Runner
from experiments.headline.running import Ran
from leap_pl.cli.main import main as leap_pl
from leap_pl.errors import UserError

STEP = 2 * 32  # tokens
SCORED_CELLS = ("dense", "wanda-50", "admm-50", "leap-50", "update-50")
CELLS = "dense wanda-50 wanda-60 admm-50 admm-60 wanda-2of4-50 leap-50 leap-60 distill-50 update-50".split()  # noqa: SIM905
CELLS += ["recover-60", "other-dense", "other-wanda-60"]


def definition(folder, model, text):
    """A tiny experiment with a cell of every kind, in ``folder``."""
    piqa = [{"goal": f"cut {n}", "sol1": "a knife", "sol2": "a spoon", "label": n % 2} for n in range(6)]
    arc = [{"question": "Which is hot?", "choices": {"text": ["ice", "fire"], "label": ["A", "B"]}, "answerKey": "B"}]
    for task, rows in (("piqa", piqa), ("arc_easy", arc * 3)):
        path = folder / "tasks" / task / "validation.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = text.read_text().splitlines()
    for name, part in {"like": lines[:20], "unlike": lines[20:40], "validation": lines[40:]}.items():
        (folder / f"{name}.jsonl").write_text("\n".join(part) + "\n")
    learn = {
        "model": {
            "dtype": "float32",
            "annealing": {"alpha": {"start": 100, "end": 350}, "tau": {"start": 1, "end": 0.05}},
            "prior": {"graded": True, "sequences": 2, "cache_dir": str(folder / "kept")},
        },
        "data": {"text": str(text), "seq_length": 32, "batch_size": 2, "validation_sequences": 2},
        "trainer": {"accelerator": "cpu", "val_check_interval": 100},
    }
    told = {
        "base_model": str(model),
        "about": ["A tiny random model."],
        "texts": {
            "validation": {"text": str(folder / "validation.jsonl"), "max_tokens": 256},
            "like": {"text": str(folder / "like.jsonl"), "max_tokens": 256, "title": "alike"},
            "unlike": {"text": str(folder / "unlike.jsonl"), "max_tokens": 192},
        },
        "evaluate": {"seq_length": 32, "batch_size": 4, "dtype": "float32", "tasks_folder": str(folder / "tasks")},
        "tasks": {"piqa": 4, "arc_easy": None},
        "tasks_at": [0, 0.5],
        "prune": {"text": str(text), "seq_length": 32, "sequences": 4, "dtype": "float32"},
        "learn": {"config": "learn.yaml", "tokens": 6 * STEP + 5, "checkpoint_tokens": 2 * STEP},
        "rows": {
            "dense": {},
            "wanda": {"title": "Wanda", "sparsity": [0.5, 0.6], "prune": {"method": "wanda"}, "baseline": True},
            "admm": {"sparsity": [0.5, 0.6], "prune": {"method": "admm"}, "baseline": True, "reference": True},
            "wanda-2of4": {
                "sparsity": [0.5],
                "table": "2:4",
                "tasks": False,
                "prune": {"method": "wanda", "pattern": "2:4"},
            },
            "leap": {"title": "LEAP, LM", "sparsity": [0.5, 0.6], "prior": "wanda", "fit": {}},
            "distill": {
                "sparsity": [0.5],
                "prior": "wanda",
                "tokens": 4 * STEP,
                "tasks": False,
                "fit": {
                    "model": {
                        "objective": {"lm": 0, "distillation": 1},
                        "gate": {"class_path": "leap_pl.gates.BernoulliGate"},
                    }
                },
            },
            # Weights are trained under the learned mask.
            "recover": {
                "sparsity": [0.6],
                "mask": "leap",
                "tokens": 2 * STEP,
                "fit": {"model": {"weight_training": {"lr": 0.01}}},
            },
            "update": {"sparsity": [0.5], "best_of": ["leap", "distill"], "prune": {"method": "admm"}},
        },
        "models": {
            "other": {
                "base_model": str(tiny_folder(folder / "other-model", seed=1, prefix=1)),
                "target": "assets-other",
                "about": ["Another tiny random model, whose texts begin with a token."],
                "evaluate": {"batch_size": 2},
                "prune": {"sequences": 2},
                "rows": {"dense": {"tasks": False}, "wanda": {"sparsity": [0.6], "minutes": 3}},
            }
        },
    }
    write(folder / "learn.yaml", learn)
    write(folder / "tiny.yaml", told)


def write(path, told):
    path.write_text(yaml.safe_dump(told, sort_keys=False))


def change(path, *keys, to):
    told = yaml.safe_load(path.read_text())
    place = told
    for key in keys[:-1]:
        place = place.setdefault(key, {})
    place[keys[-1]] = to
    write(path, told)


def results(folder, *more):
    return main(
        [
            *("--config", str(folder / "tiny.yaml")),
            *("--folder", str(folder / "runs")),
            *("--docs", str(folder / "docs" / "results"), *more),
        ]
    )


def runner(folder):
    return Runner(read_experiment(folder / "tiny.yaml"), folder / "runs")


def cells(folder):
    return {path.stem: json.loads(path.read_text()) for path in (folder / "docs" / "results" / "cells").glob("*.json")}


def in_this_process(patch):
    """Let commands run without a process of their own, which takes seconds to start; returns them as they come."""
    ran = []

    def run(words, log, caption, keep=()):
        ran.append(words)
        began = time.monotonic()
        try:
            leap_pl(words)
        except SystemExit as error:
            raise UserError(f"{caption}: leap_pl failed") from error
        return Ran(time.monotonic() - began, 1 << 30)

    patch.setattr(running, "run_command", run)
    patch.setenv("LEAP_PL_COMPILE", "0")
    return ran


@pytest.fixture(scope="session")
def experiment_done(tmp_path_factory, model_folder, text_file):
    """The whole experiment, done once, and the commands that it took."""
    folder = tmp_path_factory.mktemp("experiment")
    definition(folder, model_folder, text_file)
    with pytest.MonkeyPatch.context() as patch:
        ran = in_this_process(patch)
        assert results(folder) == 0
    return folder, ran


@pytest.fixture
def without_pictures(monkeypatch):
    """They take seconds."""
    monkeypatch.setattr(report, "_pictures", lambda *_: iter(()))


@pytest.fixture
def again(experiment_done, tmp_path, monkeypatch, without_pictures):
    """A finished experiment to change, and the list of commands that run from now on."""
    for name in ("tiny.yaml", "learn.yaml"):
        shutil.copy(experiment_done[0] / name, tmp_path / name)
    for name in ("runs", "docs"):
        shutil.copytree(experiment_done[0] / name, tmp_path / name)
    return tmp_path, in_this_process(monkeypatch)


def verbs(ran):
    """Which command ran on which cell: the folder below ``runs``."""
    found = []
    for words in ran:
        output = (
            words[words.index("--output" if "--output" in words else "--output_dir") + 1]
            if words[0] not in ("fit", "recover")
            else words[2]
        )
        found.append((words[0], Path(output).parts[Path(output).parts.index("runs") + 1]))
    return found
