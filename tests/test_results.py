"""The headline experiment on a tiny model: every kind of cell, going on, what is done again, the report."""

import json
import re
import shutil
import time
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from leap_pl.cli import main as leap_pl
from leap_pl.errors import UserError
from leap_pl.masks import MaskSet
from leap_pl.oneshot.prune import UPDATING
from leap_pl.results import report, running, steps
from leap_pl.results.__main__ import main
from leap_pl.results.experiment import laid_over, read_experiment
from leap_pl.results.report import shared_settings, without
from leap_pl.results.runner import Runner
from leap_pl.results.running import Ran, last_line, run_command

STEP = 2 * 32  # tokens
SCORED_CELLS = ("dense", "wanda-50", "admm-50", "leap-50", "update-50")
CELLS = "dense wanda-50 wanda-60 admm-50 admm-60 wanda-2of4-50 leap-50 leap-60 distill-50 update-50".split()  # noqa: SIM905


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
        "model": {"dtype": "float32", "prior": {"graded": True, "sequences": 2, "cache_dir": str(folder / "kept")}},
        "data": {"text": str(text), "seq_length": 32, "batch_size": 2, "validation_sequences": 2},
        "annealing": {"alpha": {"start": 100, "end": 350}, "tau": {"start": 1, "end": 0.05}},
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
            "update": {"sparsity": [0.5], "best_of": ["leap", "distill"], "prune": {"method": "admm"}},
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


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model_folder, text_file):
    """The whole experiment, done once, and the commands that it took."""
    folder = tmp_path_factory.mktemp("experiment")
    definition(folder, model_folder, text_file)
    with pytest.MonkeyPatch.context() as patch:
        ran = in_this_process(patch)
        assert results(folder) == 0
    return folder, ran


@pytest.fixture
def again(finished, tmp_path, monkeypatch):
    """A finished experiment to change, and the list of commands that run from now on."""
    for name in ("tiny.yaml", "learn.yaml"):
        shutil.copy(finished[0] / name, tmp_path / name)
    for name in ("runs", "docs"):
        shutil.copytree(finished[0] / name, tmp_path / name)
    # Pictures take seconds.
    monkeypatch.setattr(report, "_pictures", lambda found, docs: iter(()))
    return tmp_path, in_this_process(monkeypatch)


def verbs(ran):
    """Which command ran on which cell: the folder below ``runs``."""
    found = []
    for words in ran:
        output = (
            words[words.index("--output" if "--output" in words else "--output_dir") + 1]
            if words[0] != "fit"
            else words[2]
        )
        found.append((words[0], Path(output).parts[Path(output).parts.index("runs") + 1]))
    return found


# -- the whole of it ------------------------------------------------------------------------------------------


def test_every_cell_is_made_and_measured(finished):
    folder, ran = finished
    found = cells(folder)
    assert sorted(found) == sorted(CELLS)
    # dense: perplexity of two lengths, tasks of two limits; a cell at .6 has no tasks.
    assert [verb for verb, cell in verbs(ran) if cell == "dense"] == ["evaluate"] * 4
    assert [verb for verb, cell in verbs(ran) if cell == "admm-60"] == ["prune", "evaluate", "evaluate"]
    assert [verb for verb, cell in verbs(ran) if cell == "leap-50"] == ["fit"] + ["evaluate"] * 4
    like, unlike = (str(folder / f"{name}.jsonl") for name in ("like", "unlike"))
    for name, result in found.items():
        assert {like, unlike} <= set(result["perplexity"])
        assert (result["perplexity"][like]["tokens"], result["perplexity"][unlike]["tokens"]) == (256, 192)
        assert result["perplexity"][like]["seq_length"] == 32
        tasks = {"piqa": 4, "arc_easy": None} if name in SCORED_CELLS else {}
        assert {task: score["limit"] for task, score in result["tasks"].items()} == tasks
        assert result["model"]["fingerprint"] == found["dense"]["model"]["fingerprint"]
        assert result["sparsity"]["global"] == pytest.approx(result["cell"]["sparsity"] or 0, abs=0.02)
    assert (found["leap-50"]["cell"]["tokens"], found["distill-50"]["cell"]["tokens"]) == (6 * STEP, 4 * STEP)
    assert found["leap-50"]["cell"]["calibration_tokens"] == found["wanda-50"]["cell"]["calibration_tokens"] == 4 * 32
    assert found["distill-50"]["cell"]["settings"]["model"]["objective"] == {"lm": 0, "distillation": 1}
    assert [found[name]["method"] for name in ("dense", "wanda-50", "admm-50", "leap-50")] == [
        "dense",
        "wanda",
        "admm",
        "leap",
    ]


def test_pattern_and_prior_are_what_the_row_says(finished):
    folder, _ = finished
    mask = MaskSet.load(folder / "runs" / "wanda-2of4-50" / "made" / "mask.safetensors")
    for bits in mask.masks.values():
        assert (bits.view(-1, 4).sum(1) == 2).all()
    learned = MaskSet.load(folder / "runs" / "leap-60" / "made" / "mask.safetensors")
    prior = MaskSet.load(folder / "runs" / "leap-60" / "made" / "prior.safetensors")
    wanda = MaskSet.load(folder / "runs" / "wanda-60" / "made" / "mask.safetensors")
    assert all((bits == wanda.masks[name]).all() for name, bits in prior.masks.items())
    assert learned.provenance.config["prior"]["graded"] is True  # of the shared config, beside the row's mask
    assert any(file.name.startswith("squares-") for file in (folder / "kept").iterdir())
    told = cells(folder)["leap-60"]["cell"]
    differing = sum(int((bits != wanda.masks[name]).sum()) for name, bits in learned.masks.items())
    assert told["overlap"]["changed"] == pytest.approx(differing / learned.total)
    assert differing > 0
    assert not (folder / "runs" / "leap-60" / "checkpoints").exists()


def test_weights_are_updated_under_the_better_mask(finished):
    folder, _ = finished
    found = cells(folder)
    text = str(folder / "validation.jsonl")
    better = min(("leap-50", "distill-50"), key=lambda name: found[name]["perplexity"][text]["value"])
    told = found["update-50"]["cell"]
    assert told["kept"] == better
    assert told["tokens"] == found[better]["cell"]["tokens"]
    kept = MaskSet.load(folder / "runs" / better / "made" / "mask.safetensors")
    mask = MaskSet.load(folder / "runs" / "update-50" / "made" / "mask.safetensors")
    assert all((bits == mask.masks[name]).all() for name, bits in kept.masks.items())
    like = str(folder / "like.jsonl")
    assert found["update-50"]["perplexity"][like]["value"] != found[better]["perplexity"][like]["value"]


def test_a_second_run_runs_nothing_and_writes_the_same(finished, monkeypatch):
    folder, _ = finished
    ran = in_this_process(monkeypatch)
    before = {path: path.read_bytes() for path in (folder / "docs").rglob("*") if path.is_file()}
    assert results(folder) == 0
    assert ran == []
    assert {path: path.read_bytes() for path in (folder / "docs").rglob("*") if path.is_file()} == before


# -- what is done again ---------------------------------------------------------------------------------------


MEASURED = ["perplexity-256", "perplexity-192"]
SCORED = ["tasks-4", "tasks-all"]


@pytest.mark.parametrize(
    ("file", "keys", "to", "expected"),
    [
        ("tiny.yaml", ("rows", "leap", "title"), "another name", {}),
        ("learn.yaml", ("progress", "refresh_seconds"), 5, {}),
        ("learn.yaml", ("trainer", "val_check_interval"), 3, {}),
        ("tiny.yaml", ("texts", "unlike", "max_tokens"), 160, {name: ["perplexity-160"] for name in CELLS}),
        ("tiny.yaml", ("tasks", "piqa"), 5, {name: ["tasks-5"] for name in SCORED_CELLS}),
        ("tiny.yaml", ("evaluate", "num_fewshot"), 1, dict.fromkeys(SCORED_CELLS, SCORED)),
        ("tiny.yaml", ("evaluate", "stride"), 16, dict.fromkeys(CELLS, MEASURED)),
        (
            "tiny.yaml",
            ("rows", "distill", "fit", "model", "warmup_steps"),
            2,
            {"distill-50": ["make", "overlap", *MEASURED], "update-50": None},
        ),
        (
            "tiny.yaml",
            ("rows", "leap", "each"),
            {0.6: {"fit": {"data": {"seed": 3}}}},
            {"leap-60": ["make", "overlap", *MEASURED]},
        ),
        # A prior takes with it what was learned from it.
        (
            "tiny.yaml",
            ("rows", "wanda", "each"),
            {0.6: {"prune": {"sequences": 3}}},
            {"wanda-60": ["make", *MEASURED], "leap-60": ["make", "overlap", *MEASURED]},
        ),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_a_changed_setting_does_again_what_it_touches(again, file, keys, to, expected):
    folder, _ = again
    change(folder / file, *keys, to=to)
    found, left = runner(folder), {}
    for cell in found.experiment.cells.values():
        steps_of = found.all_steps(cell)
        undone = None if steps_of is None else [step.name for step in steps_of if not found.is_done(cell, step)]
        if undone != []:
            left[cell.name] = undone
    if left.get("update-50", []) is None:
        # What it keeps is known once the others are measured again.
        expected = {**expected, "update-50": None}
    assert left == expected


def test_other_settings_put_a_learned_cell_away_and_the_old_ones_take_it_back(again):
    folder, ran = again
    before = cells(folder)["leap-60"]
    change(folder / "tiny.yaml", "rows", "leap", "each", to={0.6: {"tokens": 3 * STEP}})
    assert results(folder, "--only", "leap-60") == 0
    assert ("fit", "leap-60") in verbs(ran)
    assert cells(folder)["leap-60"]["cell"]["tokens"] == 3 * STEP
    ran.clear()
    change(folder / "tiny.yaml", "rows", "leap", "each", to={})
    assert results(folder, "--only", "leap-60") == 0
    assert ran == []
    assert cells(folder)["leap-60"] == before


def test_only_some_cells_and_what_they_need(again, capsys):
    folder, ran = again
    shutil.rmtree(folder / "runs")
    shutil.rmtree(folder / "docs")
    assert results(folder, "--only", "leap-6*", "--only", "dense") == 0
    assert {cell for _, cell in verbs(ran)} == {"dense", "wanda-60", "leap-60"}
    assert sorted(cells(folder)) == ["dense", "leap-60", "wanda-60"]
    capsys.readouterr()
    assert results(folder, "--list") == 0
    said = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert said["leap-60"].endswith(f"{6 * STEP + 5:,} tokens  done")
    assert said["admm-60"].endswith("left: make, perplexity-256, perplexity-192")
    assert said["update-50"].endswith("waits for leap-50, distill-50")
    assert said[f"{6 * STEP + 5 + 4 * STEP:,}"]
    assert results(folder, "--only", "nothing") == 2
    assert "fits no cell" in capsys.readouterr().err


def test_a_cell_made_elsewhere_is_not_made_again(again, capsys):
    folder, ran = again
    before = cells(folder)
    shutil.rmtree(folder / "runs")  # another machine, to which only the cells' files came
    assert results(folder) == 0
    assert ran == []
    assert cells(folder) == before
    capsys.readouterr()
    assert results(folder, "--list") == 0
    *said, left = capsys.readouterr().out.splitlines()
    assert all(line.endswith("  done") for line in said)
    assert left.startswith("0 training tokens")
    # One that is not told of is made, with what it needs, and nothing else.
    (folder / "docs" / "results" / "cells" / "leap-60.json").unlink()
    assert results(folder) == 0
    assert {cell for _, cell in verbs(ran)} == {"wanda-60", "leap-60"}
    assert sorted(cells(folder)) == sorted(before)
    # Other settings make it new.
    ran.clear()
    change(folder / "tiny.yaml", "rows", "admm", "each", to={0.6: {"prune": {"sequences": 3}}})
    assert results(folder) == 0
    assert {cell for _, cell in verbs(ran)} == {"admm-60"}


def test_one_that_fails_stops_only_what_needs_it(again, capsys):
    folder, _ = again
    change(folder / "tiny.yaml", "rows", "wanda", "each", to={0.5: {"prune": {"no_such_option": 1}}})
    assert results(folder) == 1
    said = capsys.readouterr().err
    assert "leap-50: needs wanda-50, which failed" in said
    assert "update-50: needs leap-50, distill-50, which failed" in said
    assert sorted(cells(folder)) == sorted({*CELLS} - {"wanda-50", "leap-50", "distill-50", "update-50"})


# -- stopping and going on ------------------------------------------------------------------------------------


def test_a_stopped_learned_cell_goes_on_and_ends_the_same(again, monkeypatch):
    folder, _ = again
    monkeypatch.setattr(running, "run_command", run_command)  # processes again
    change(folder / "tiny.yaml", "rows", "leap", "each", to={0.6: {"tokens": 60 * STEP}})
    change(folder / "tiny.yaml", "learn", "checkpoint_tokens", to=5 * STEP)
    found = runner(folder)
    cell = found.experiment.cells["leap-60"]
    shown = []

    def stop(progress):
        shown.append(last_line(progress.log))
        if found.steps.checkpoint(cell) is not None:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(running._Progress, "show", stop)
        with pytest.raises(KeyboardInterrupt):
            results(folder, "--only", "leap-60")
    saved = found.steps.checkpoint(cell)
    assert saved is not None
    assert not found.is_finished(cell)
    assert any("goes on from step=" in line for line in found.lines([cell]))
    assert any("learning the mask" in line for line in shown)

    ran = in_this_process(monkeypatch)
    saved_seconds = saved.stat().st_mtime - found.record(cell)["make"]["began"]
    assert results(folder, "--only", "leap-60") == 0
    assert ran[0] == ["fit", "--config", str(folder / "runs" / "leap-60" / "fit.yaml"), "--ckpt_path", ran[0][-1]]
    stopped = MaskSet.load(found.steps.mask(cell))
    told = cells(folder)["leap-60"]["cell"]
    assert told["tokens"] == 60 * STEP
    assert told["seconds"] > saved_seconds > 0  # what the stopped session saved counts too

    shutil.rmtree(folder / "runs" / "leap-60")
    (folder / "docs" / "results" / "cells" / "leap-60.json").unlink()
    assert results(folder, "--only", "leap-60") == 0
    assert "--ckpt_path" not in ran[-3]
    whole = MaskSet.load(found.steps.mask(cell))
    assert all((bits == whole.masks[name]).all() for name, bits in stopped.masks.items())


def test_a_process_that_fails_is_told_in_one_line(tmp_path):
    with pytest.raises(UserError, match=r"dense: leap_pl evaluate failed: .*Nothing to measure.*log"):
        run_command(["evaluate", "--model", "x"], tmp_path / "log", "dense")


def test_two_at_once_are_refused(again, capsys):
    folder, _ = again
    import fcntl

    with (folder / "runs" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert results(folder) == 2
    assert "another process works in" in capsys.readouterr().err


# -- the report -----------------------------------------------------------------------------------------------


def number(cell):
    return float(re.match(r"[-+]?[\d.,]+", cell)[0].replace(",", ""))


def section(page, heading):
    """The rows of the tables below a heading: first cell → cells, as the page shows them."""
    text = page.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    parts = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    ends = [n for n, row in enumerate(parts) if row[0] == "---"] + [len(parts) + 1]
    return [{row[0]: row[1:] for row in parts[start + 1 : end - 1]} for start, end in pairwise(ends)]


def test_figures_of_the_report_are_those_of_the_cells(finished):
    folder, _ = finished
    found, page = cells(folder), (folder / "docs" / "results.md").read_text()
    texts = [str(folder / f"{name}.jsonl") for name in ("like", "unlike")]
    value = {name: [result["perplexity"][text]["value"] for text in texts] for name, result in found.items()}
    main_rows, differences = section(page, "50%")
    titles = {"dense": "dense", "Wanda": "wanda-50", "admm *": "admm-50"}
    titles |= {"LEAP, LM": "leap-50", "distill": "distill-50", "update": "update-50"}
    assert list(main_rows) == list(titles)
    for title, name in titles.items():
        sparsity, tokens, calibration, like, like_gap, unlike, unlike_gap, accuracy, minutes = main_rows[title]
        result = found[name]
        assert number(sparsity) == pytest.approx(100 * result["sparsity"]["global"], abs=0.005)
        assert [number(like), number(unlike)] == pytest.approx(value[name], abs=0.005)
        assert number(like.split("±")[1].strip()) == pytest.approx(result["perplexity"][texts[0]]["stderr"], abs=0.005)
        if name in SCORED_CELLS:
            assert number(accuracy) == pytest.approx(100 * result["mean"]["value"], abs=0.005)
        else:
            assert accuracy == ""
        assert (tokens, calibration) == tuple(
            f"{result['cell'][key]:,}" if result["cell"][key] else "" for key in ("tokens", "calibration_tokens")
        )
        for gap, n in ((like_gap, 0), (unlike_gap, 1)):
            if name in ("dense", "wanda-50", "admm-50"):
                assert gap == ""
            else:
                reference, dense = value["admm-50"][n], value["dense"][n]
                closed = (reference - value[name][n]) / (reference - dense)
                assert number(gap) == pytest.approx(100 * closed, abs=0.05)
        if name != "dense":
            assert number(minutes) == pytest.approx(result["cell"]["seconds"] / 60, abs=0.05)
    assert list(differences) == ["LEAP, LM", "distill", "update"]
    for title, (like, _, accuracy) in differences.items():
        best = min(value["wanda-50"][0], value["admm-50"][0])
        assert number(like) == pytest.approx(value[titles[title]][0] - best, abs=0.005)
        if title == "distill":
            assert accuracy == ""
            continue
        mean = max(found[name]["mean"]["value"] for name in ("wanda-50", "admm-50"))
        assert number(accuracy) == pytest.approx(100 * (found[titles[title]]["mean"]["value"] - mean), abs=0.005)
    # Without tasks, and of another pattern.
    assert list(section(page, "60%")[0]) == ["dense", "Wanda", "admm *", "LEAP, LM"]
    assert list(section(page, "50%, 2:4")[0]) == ["dense", "wanda-2of4"]
    (learned,) = re.findall(r"while a mask was learned: float32 \((.*?)\)\.", page)
    assert set(learned.split(", ")) == {"`leap-50`", "`leap-60`", "`distill-50`"}
    (by_task,) = section(page, "Accuracy by task")
    assert number(by_task["Wanda, 50%"][1]) == pytest.approx(100 * found["wanda-50"]["tasks"]["piqa"]["acc"], abs=0.05)


def test_report_is_written_again_from_the_cells_alone(finished, tmp_path):
    folder, _ = finished
    docs = tmp_path / "docs" / "results"
    shutil.copytree(folder / "docs" / "results" / "cells", docs / "cells")
    (docs / "notes.md").write_text("By hand: nothing helped.\n")
    assert main(["--report", "--from", str(docs / "cells"), "--docs", str(docs)]) == 0
    page, before = (tmp_path / "docs" / "results.md").read_text(), (folder / "docs" / "results.md").read_text()
    head, _, notes = page.partition("## What did not work\n\n")
    assert head == before.partition("## What did not work\n\n")[0]
    assert notes == (docs / "notes.md").read_text() == "By hand: nothing helped.\n"
    pictures = set(re.findall(r"\(results/([a-z0-9-]+\.png)\)", page))
    assert {"perplexity-1-alike.png", "perplexity-2-unlike.png", "accuracy.png", "overlap.png"} < pictures
    assert len([name for name in pictures if name.startswith("density")]) == 2  # the best at each sparsity
    for name in pictures:
        assert (docs / name).read_bytes() == (folder / "docs" / "results" / name).read_bytes()


def test_configs_in_the_report_are_those_that_ran(finished):
    folder, _ = finished
    docs = folder / "docs" / "results"
    page = docs.with_suffix(".md").read_text()
    parts = [yaml.safe_load(part) for part in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)]
    names = re.findall(r"`(\S+)` says besides", page)
    assert names == ["leap-50", "leap-60", "distill-50"]
    for name, own in zip(names, parts[1:], strict=True):
        ran = yaml.safe_load((folder / "runs" / name / "fit.yaml").read_text())
        assert laid_over(parts[0], own) == ran == yaml.safe_load((docs / "configs" / f"{name}.yaml").read_text())
    for words in runner(folder).record(runner(folder).experiment.cells["leap-50"]).values():
        assert f"leap_pl {' '.join(words['words'])}" in page


def test_cells_can_be_compared_as_they_are(finished, tmp_path, capsys):
    folder, _ = finished
    files = [str(path) for path in (folder / "docs" / "results" / "cells").glob("*-50.json")]
    leap_pl(["compare", *[f"--results+={path}" for path in files], "--output_dir", str(tmp_path / "page")])
    assert "leap 50% (leap-50)" in capsys.readouterr().out


def test_shared_and_own_settings_make_the_whole():
    settings = [{"a": {"x": 1, "y": 2}, "b": [1], "c": 3}, {"a": {"x": 1, "y": 3}, "b": [1]}]
    shared = shared_settings(settings)
    assert shared == {"a": {"x": 1}, "b": [1]}
    assert [laid_over(shared, without(one, shared)) for one in settings] == settings


# -- the definition -------------------------------------------------------------------------------------------


def test_the_shipped_definition():
    folder = Path(__file__).parents[1] / "configs" / "results"
    experiment = read_experiment(folder / "headline.yaml")
    rows = {cell.row: [] for cell in experiment.cells.values()}
    for cell in experiment.cells.values():
        rows[cell.row].append(cell.sparsity)
    for row in ("magnitude", "wanda", "sparsegpt", "admm", "leap-lm"):
        assert rows[row] == [0.5, 0.6, 0.7]
    assert rows["leap-distill"] == rows["leap-update"] == [0.5, 0.6]
    tasks = {cell.name for cell in experiment.cells.values() if not cell.tasks}
    assert tasks == {name for name in experiment.cells if name.endswith(("-70", "-45"))}
    for row in ("magnitude-2of4", "wanda-2of4", "sparsegpt-2of4", "admm-2of4", "maskllm"):
        assert rows[row] == [0.5]
        assert experiment.cells[f"{row}-50"].table == "2:4"
    assert rows["patch"] == rows["leap-any"] == [0.45]
    assert set(experiment.tasks) == {"mmlu", "piqa", "arc_easy", "arc_challenge", "winogrande", "openbookqa"}
    assert {cell.tokens for cell in experiment.cells.values() if cell.fit is not None} == {500_000, 2_000_000}
    assert steps.UPDATING == UPDATING


@pytest.mark.parametrize(
    ("keys", "to", "said"),
    [
        (("rows", "wanda", "sparsty"), [0.5], "row wanda in .* says sparsty"),
        (("rows", "wanda", "sparsity"), 0.5, "Give a list of numbers"),
        (("rows", "wanda", "sparsity"), [50], "between 0 and 1"),
        (("rows", "wanda", "fit"), {}, "both prune and fit"),
        (("rows", "dense", "sparsity"), [0.5], "has prune or fit"),
        (("rows", "wanda-2of4", "prune", "pattern"), 124, "in quotes"),
        (("rows", "leap", "prior"), "sparsegpt", "needs sparsegpt-50, which no row makes"),
        (("rows", "leap", "prior"), "distill", "needs distill-60|a prior is a one-shot row's mask"),
        (("rows", "update", "best_of"), ["wanda"], "best_of names learned rows"),
        (("rows", "leap", "tokens"), -1, "at least 1"),
        (("rows", "Big"), {}, "small letters"),
        (("learn", "tokens"), "many", "number of tokens"),
        (("learn", "config"), "nowhere.yaml", "nowhere.yaml cannot be read"),
        (("texts", "like"), {"max_tokens": 5}, "lacks text"),
        (("texts", "other"), "x", "says other"),
        (("tasks",), ["piqa"], "is to be a mapping"),
    ],
)
def test_mistakes_in_a_definition_are_told_in_one_line(again, capsys, keys, to, said):
    folder, ran = again
    change(folder / "tiny.yaml", *keys, to=to)
    assert results(folder, "--list") == 2
    message = capsys.readouterr().err
    assert re.search(said, message)
    assert message.count("\n") == 1
    assert not ran


def test_a_missing_text_is_named_and_nothing_is_lost(again, capsys):
    folder, _ = again
    change(folder / "tiny.yaml", "texts", "like", "text", to="nowhere.jsonl")
    assert results(folder, "--report") == 2
    assert "make assets assets-eval" in capsys.readouterr().err
    assert sorted(cells(folder)) == sorted(CELLS)


def test_another_class_brings_its_own_settings():
    below = {"gate": {"class_path": "A", "init_args": {"a": 1}}, "x": {"y": 1}}
    same = laid_over(below, {"gate": {"class_path": "A", "init_args": {"b": 2}}})
    other = laid_over(below, {"gate": {"class_path": "B"}})
    assert same["gate"] == {"class_path": "A", "init_args": {"a": 1, "b": 2}}
    assert other == {"gate": {"class_path": "B"}, "x": {"y": 1}}
    assert below["gate"]["class_path"] == "A"
