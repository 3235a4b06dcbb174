"""The headline experiment on a tiny model: every kind of cell, going on, what is done again, the report."""

import json
import math
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny_experiment import (
    CELLS,
    SCORED_CELLS,
    STEP,
    cells,
    change,
    in_this_process,
    results,
    runner,
    verbs,
)

from experiments.headline import running
from experiments.headline.definition import read_experiment
from experiments.headline.runner import Runner
from experiments.headline.running import last_line, run_command
from leap_pl.errors import UserError
from leap_pl.evaluation.record import read_result, write_result
from leap_pl.masks import MaskSet

# -- the whole of it ------------------------------------------------------------------------------------------


def test_every_cell_is_made_and_measured(experiment_done):
    folder, ran = experiment_done
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
        dense = found["other-dense" if name.startswith("other") else "dense"]
        assert result["model"]["fingerprint"] == dense["model"]["fingerprint"]
        assert result["sparsity"]["global"] == pytest.approx(result["cell"]["sparsity"] or 0, abs=0.02)
    assert (found["leap-50"]["cell"]["tokens"], found["distill-50"]["cell"]["tokens"]) == (6 * STEP, 4 * STEP)
    assert found["leap-50"]["cell"]["calibration_tokens"] == found["wanda-50"]["cell"]["calibration_tokens"] == 4 * 32
    assert found["other-wanda-60"]["cell"]["calibration_tokens"] == 2 * 32
    assert found["distill-50"]["cell"]["settings"]["model"]["objective"] == {"lm": 0, "distillation": 1}
    assert [found[name]["method"] for name in ("dense", "wanda-50", "admm-50", "leap-50")] == [
        "dense",
        "wanda",
        "admm",
        "leap",
    ]


def test_pattern_and_prior_are_what_the_row_says(experiment_done):
    folder, _ = experiment_done
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


def test_weights_are_updated_under_the_better_mask(experiment_done):
    folder, _ = experiment_done
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


def test_weights_are_trained_under_the_mask_of_another_row(experiment_done):
    folder, ran = experiment_done
    assert [verb for verb, cell in verbs(ran) if cell == "recover-60"] == ["recover", "evaluate", "evaluate"]
    found, made = cells(folder), folder / "runs" / "recover-60" / "made"
    names = ("leap-60", "recover-60")
    mask, trained = (MaskSet.load(folder / "runs" / name / "made" / "mask.safetensors") for name in names)
    assert trained.digest_of_bits() == mask.digest_of_bits()
    assert (made / "weights.safetensors").is_file()
    told, of_mask = found["recover-60"]["cell"], found["leap-60"]["cell"]
    assert (told["mask_of"], told["prior"], told["overlap"]) == ("leap-60", None, None)
    assert told["tokens"] == of_mask["tokens"] + 2 * STEP  # in all
    assert told["calibration_tokens"] == of_mask["calibration_tokens"]
    settings = yaml.safe_load((folder / "runs" / "recover-60" / "recover.yaml").read_text())["model"]
    # Of the shared config, what is not of learning a mask; no sparsity, which is the mask's.
    assert settings == {
        "base_model": of_mask["settings"]["model"]["base_model"],
        "dtype": "float32",
        "mask": str(folder / "runs" / "leap-60" / "made" / "mask.safetensors"),
        "weight_training": {"lr": 0.01},
    }
    like = str(folder / "like.jsonl")
    assert found["recover-60"]["perplexity"][like]["value"] != found["leap-60"]["perplexity"][like]["value"]


def test_weights_are_trained_from_those_that_the_row_of_the_mask_wrote(again):
    folder, ran = again
    change(folder / "tiny.yaml", "rows", "recover", "mask", to="admm")
    assert results(folder, "--only", "recover-60") == 0
    assert next(verb for verb, _ in verbs(ran)) == "recover"
    cell = cells(folder)["recover-60"]
    weights = folder / "runs" / "admm-60" / "made" / "model"
    assert Path(cell["cell"]["settings"]["model"]["weights"]) == weights
    assert cell["cell"]["mask"] == cells(folder)["admm-60"]["cell"]["mask"]


def test_a_second_run_runs_nothing_and_writes_the_same(experiment_done, monkeypatch):
    folder, _ = experiment_done
    ran = in_this_process(monkeypatch)
    before = {path: path.read_bytes() for path in (folder / "docs").rglob("*") if path.is_file()}
    assert results(folder) == 0
    assert ran == []
    assert {path: path.read_bytes() for path in (folder / "docs").rglob("*") if path.is_file()} == before


# -- what is done again ---------------------------------------------------------------------------------------


MEASURED = ["perplexity-256", "perplexity-192"]
SCORED = ["tasks-4", "tasks-all"]
REMADE = ["make", *MEASURED]


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
            {"leap-60": ["make", "overlap", *MEASURED], "recover-60": REMADE},
        ),
        # A prior takes with it what was learned from it.
        (
            "tiny.yaml",
            ("rows", "wanda", "each"),
            {0.6: {"prune": {"sequences": 3}}},
            {
                "wanda-60": ["make", *MEASURED],
                "leap-60": ["make", "overlap", *MEASURED],
                "recover-60": REMADE,  # and a mask the weights under it
                "other-wanda-60": REMADE,  # laid over that row
            },
        ),
        ("tiny.yaml", ("models", "other", "rows", "wanda", "prune"), {"sequences": 3}, {"other-wanda-60": REMADE}),
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
    assert said["leap-60"].split()[1:] == [f"{6 * STEP + 5:,}", "tokens", "0", "min", "done"]
    assert said["admm-60"].endswith("left: make, perplexity-256, perplexity-192")
    assert said["update-50"].endswith("waits for leap-50, distill-50")
    # A row alone says how many minutes it takes.
    assert said[f"{(6 + 4 + 2) * STEP + 5:,}"].endswith("; about 3 minutes")
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
    # One that is not told of is made, from the mask of what it needs, and nothing else.
    (folder / "docs" / "results" / "cells" / "leap-60.json").unlink()
    assert results(folder) == 0
    assert verbs(ran) == [("prune", "wanda-60"), ("fit", "leap-60"), *[("evaluate", "leap-60")] * 2]
    assert sorted(cells(folder)) == sorted(before)
    assert cells(folder)["wanda-60"] == before["wanda-60"]
    assert "the mask made here" not in capsys.readouterr().err
    # The best of others is known without making them: that one's mask is made, from its prior's.
    ran.clear()
    kept = before["update-50"]["cell"]["kept"]
    (folder / "docs" / "results" / "cells" / "update-50.json").unlink()
    of_another_processor = before["wanda-50"] | {"cell": before["wanda-50"]["cell"] | {"mask": "another"}}
    (folder / "docs" / "results" / "cells" / "wanda-50.json").write_text(json.dumps(of_another_processor))
    assert results(folder) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "the mask made here is not" in line]
    assert len(said) == 1
    assert "wanda-50: the mask" in said[0]
    assert verbs(ran)[:3] == [("prune", "wanda-50"), ("fit", kept), ("prune", "update-50")]
    assert {cell for _, cell in verbs(ran)[3:]} == {"update-50"}
    assert sorted(cells(folder)) == sorted(before)
    assert cells(folder)["update-50"]["cell"]["kept"] == kept
    # Other settings make it new.
    ran.clear()
    change(folder / "tiny.yaml", "rows", "admm", "each", to={0.6: {"prune": {"sequences": 3}}})
    assert results(folder) == 0
    assert {cell for _, cell in verbs(ran)} == {"admm-60"}


def test_a_cell_made_elsewhere_is_shown_as_the_experiment_shows_it_today(again):
    folder, ran = again
    shutil.rmtree(folder / "runs")
    before = cells(folder)
    change(folder / "tiny.yaml", "rows", "leap", "title", to="another name")
    change(folder / "tiny.yaml", "rows", "admm", "sparsity", to=[0.5])  # those below it move up
    assert results(folder) == 0
    assert ran == []
    after, experiment = cells(folder), list(runner(folder).experiment.cells)
    assert sorted(after) == sorted(experiment) == sorted(before.keys() - {"admm-60"})
    for name, told in after.items():
        title = "another name" if name.startswith("leap") else before[name]["cell"]["title"]
        shown = {"title": title, "order": experiment.index(name)}
        assert told == before[name] | {"cell": before[name]["cell"] | shown}
    assert "another name" in (folder / "docs" / "results.md").read_text()


def test_a_cell_of_other_settings_is_named_and_stays_with_a_report(again, capsys):
    folder, _ = again
    path = folder / "docs" / "results" / "cells" / "admm-60.json"
    change(folder / "tiny.yaml", "rows", "admm", "each", to={0.6: {"prune": {"sequences": 3}}})
    (path.parent / "strange.json").write_bytes(path.read_bytes())
    aside = path.parent / "superseded"
    for more, moved in ((["--report"], False), (["--only", "dense"], True)):
        results(folder, *more)
        said, then = capsys.readouterr().err, f", and is moved to {aside}" * moved
        assert f"admm-60.json was made with other settings or inputs than today's{then}\n" in said
        assert f"strange.json is not a cell of the experiment{then}\n" in said
        for name in ("admm-60.json", "strange.json"):
            assert (path.parent / name).exists() is not moved
            assert (aside / name).exists() is moved


def test_a_model_that_is_not_there_is_left_out_and_its_cells_stay(again, capsys):
    folder, ran = again
    change(folder / "tiny.yaml", "models", "other", "base_model", to=str(folder / "nowhere"))
    before = cells(folder)
    assert results(folder) == 0
    said = f"2 cells of other are left out: {folder / 'nowhere'} is not there. Lay it out with make assets-other."
    assert said in capsys.readouterr().err
    assert cells(folder) == before
    assert results(folder, "--only", "other-*") == 1
    assert ran == []
    capsys.readouterr()
    assert results(folder, "--list") == 0
    listed = capsys.readouterr().out.splitlines()
    assert "other-wanda-60 3 min needs make assets-other" in [" ".join(line.split()) for line in listed]
    # How they are shown needs no model.
    change(folder / "tiny.yaml", "models", "other", "about", to=["Another sentence."])
    results(folder, "--report")
    shown = cells(folder)["other-wanda-60"]
    assert shown["cell"]["about"][0] == "Another sentence."
    assert shown == before["other-wanda-60"] | {
        "cell": before["other-wanda-60"]["cell"] | {"about": shown["cell"]["about"]}
    }


def test_another_best_makes_the_cell_that_kept_the_former(again):
    folder, _ = again
    told = folder / "docs" / "results" / "cells"
    progress = Runner(read_experiment(folder / "tiny.yaml"), folder / "runs", told)
    update = progress.experiment.cells["update-50"]
    assert progress.is_told(update)
    former = cells(folder)["update-50"]["cell"]["kept"]
    (other,) = {*update.best_of} - {former}
    result = read_result(told / f"{other}.json")
    result["perplexity"][str(folder_of(result) / "validation.jsonl")] |= {"value": 1.5, "nll": math.log(1.5)}
    write_result(told / f"{other}.json", result)
    assert progress.kept(update).name == other
    assert not progress.is_told(update)
    assert [cell.name for cell in progress.left(progress.chosen(["update-50"]))][-1] == "update-50"


def test_a_candidate_that_is_made_again_makes_the_best_of_it_wanted(again):
    folder, _ = again
    (folder / "docs" / "results" / "cells" / "distill-50.json").unlink()
    progress = Runner(read_experiment(folder / "tiny.yaml"), folder / "runs", folder / "docs" / "results" / "cells")
    assert {"distill-50", "update-50"} <= {cell.name for cell in progress.left(progress.chosen([]))}


def folder_of(result):
    return Path(result["cell"]["texts"]["like"]["text"]).parent


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
    assert any(re.match(r"writes |first step |step \d+ of ", line) for line in shown)  # what the process says

    ran = in_this_process(monkeypatch)
    session = found.record(cell)["make"]
    saved_seconds = saved.stat().st_mtime - session["began"]
    assert 0 < saved_seconds <= session["ended"] - session["began"]
    os.utime(saved, (session["ended"] + 3600,) * 2)  # as a copy of the folder has it
    assert results(folder, "--only", "leap-60") == 0
    assert ran[0] == ["fit", "--config", str(folder / "runs" / "leap-60" / "fit.yaml"), "--ckpt_path", ran[0][-1]]
    stopped = MaskSet.load(found.steps.mask(cell))
    told = cells(folder)["leap-60"]["cell"]
    assert told["tokens"] == 60 * STEP
    assert saved_seconds < told["seconds"] < 3600  # what the stopped session saved counts too, and no more than it took

    shutil.rmtree(folder / "runs" / "leap-60")
    (folder / "docs" / "results" / "cells" / "leap-60.json").unlink()
    assert results(folder, "--only", "leap-60") == 0
    assert "--ckpt_path" not in ran[-3]
    whole = MaskSet.load(found.steps.mask(cell))
    assert all((bits == whole.masks[name]).all() for name, bits in stopped.masks.items())


def test_a_stopped_cell_whose_settings_have_changed_begins_anew(again):
    folder, ran = again
    record = folder / "runs" / "leap-60" / "steps.json"
    told = json.loads(record.read_text())
    del told["make"]["finished"]
    record.write_text(json.dumps(told))
    old = folder / "runs" / "leap-60" / "checkpoints" / "step=4.ckpt"
    old.parent.mkdir()
    old.write_bytes(b"of the former settings")
    change(folder / "tiny.yaml", "rows", "leap", "each", to={0.6: {"tokens": 3 * STEP}})
    assert results(folder, "--only", "leap-60") == 0
    (fit,) = [words for words in ran if words[0] == "fit"]
    assert fit[-1] == "--force"
    assert "--ckpt_path" not in fit
    assert not old.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="by Linux's own count")
def test_memory_is_that_of_the_process_alone(tmp_path, monkeypatch):
    """This process, from which it is started, has had more; and an open file goes with it."""
    started, popen = [], subprocess.Popen

    def noted(*words, **options):
        started.append(options["pass_fds"])
        return popen(*words, **options)

    monkeypatch.setattr(subprocess, "Popen", noted)
    with (tmp_path / "lock").open("w") as lock:
        ran = run_command(["export", "--help"], tmp_path / "log", "help", [lock.fileno()])
        assert started == [[lock.fileno()]]
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert 5 << 20 < ran.peak_rss < 150 << 20 < own
    assert 0 < ran.seconds < 60


def test_what_learns_may_end_in_its_own_time(monkeypatch, capsys):
    monkeypatch.setattr(running, "END_SECONDS", 0.0)
    for learns, status, seconds in ((True, 3, 0.5), (False, -9, 60)):
        code = f"import signal, sys, time\nsignal.signal(15, lambda *_: (time.sleep({seconds}), sys.exit(3)))\n"
        code += "print(1, flush=True)\ntime.sleep(60)"
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        process.stdout.readline()
        running._end(process, learns=learns)
        assert process.returncode == status
    assert "waiting for a checkpoint; once more ends at once" in capsys.readouterr().err


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
