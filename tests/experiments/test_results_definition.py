"""What a definition of the headline experiment may say, and what is told of one that says something else."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_experiment import CELLS, cells, change, results, runner, verbs, write

from experiments.headline.__main__ import main
from experiments.headline.definition import read_experiment
from experiments.headline.digests import identity
from experiments.headline.experiment import laid_over
from experiments.headline.runner import Runner
from leap_pl.errors import UserError


def test_the_shipped_definition():
    folder = Path(__file__).parents[2] / "configs" / "results"
    experiment = read_experiment(folder / "headline.yaml")
    models = {"": {}, "gemma": {}, "qwen": {}}
    for cell in experiment.cells.values():
        if cell.repeat_of is None:
            models[cell.model.name].setdefault(cell.row, []).append(cell.sparsity)
    repeated = (
        "leap-both-60",
        "leap-with-weights-60",
        "leap-both-mixture-60",
        "leap-shared-mixture-60",
    )  # no model's own
    repeats = {cell.name for cell in experiment.cells.values() if cell.repeat_of is not None}
    assert repeats == {f"{name}-seed-{seed}" for name in repeated for seed in (1, 2)}
    rows, gemma, qwen = models.values()
    for row in ("magnitude", "wanda", "sparsegpt", "admm", "leap-lm", "leap-distill", "leap-update"):
        assert rows[row] == [0.5, 0.6, 0.7]
    methods = ("wanda", "wanda-fisher", "sparsegpt", "admm", "admm-fisher", "leap-both")
    assert gemma == {"dense": [None], **{row: [0.5, 0.6] for row in methods}, "leap-both-without-bos": [0.6]}
    leap, without = (experiment.cells[f"gemma-{row}-60"] for row in ("leap-both", "leap-both-without-bos"))
    assert leap.prior == without.prior == "gemma-wanda-fisher-60"
    assert without.fit == {**leap.fit, "data": {"bos": "none"}}
    assert without.compared_with == leap.name
    # Rows of which a model has the other one too; of Qwen there is no mask of Wanda's alone.
    compared = {cell.name: cell.compared_with for cell in experiment.cells.values() if cell.compared_with}
    assert set(compared.values()) - set(experiment.cells) == {"qwen-wanda-60"}
    assert (compared["leap-with-weights-70"], compared["leap-both-mixture-60"]) == ("leap-both-70", "leap-both-60")
    assert leap.model.evaluate == {**experiment.cells["dense"].model.evaluate, "batch_size": 2, "dtype": "bfloat16"}
    assert qwen == {"dense": [None], **{row: [0.6] for row in ("wanda-fisher", "admm", "leap-both")}}
    largest = experiment.cells["qwen-leap-both-60"]
    assert (largest.tokens, largest.fit["model"]["logits_dtype"], largest.prior) == (
        100_000,
        "bfloat16",
        "qwen-wanda-fisher-60",
    )
    tasks = {cell.name for cell in experiment.cells.values() if not cell.tasks}
    assert tasks == {name for name in experiment.cells if name.endswith(("-70", "-45")) or name.startswith("qwen")}
    for row in ("magnitude-2of4", "wanda-2of4", "sparsegpt-2of4", "admm-2of4", "maskllm"):
        assert rows[row] == [0.5]
        assert experiment.cells[f"{row}-50"].table == "2:4"
    assert rows["patch"] == rows["leap-any"] == [0.45]
    assert set(experiment.tasks) == {"mmlu", "piqa", "arc_easy", "arc_challenge", "winogrande", "openbookqa"}
    thousands = {cell.tokens // 1000 for cell in experiment.cells.values() if cell.fit is not None}
    assert thousands == {100, 125, 250, 375, 500, 1500, 2000}
    for first, second, sparsities, total in (
        ("leap-half", "leap-then-weights", (60,), 500_000),
        ("leap-three-quarters", "leap-then-weights-quarter", (50, 60, 70), 500_000),
        ("leap-three-quarters-longer", "leap-then-weights-quarter-longer", (60,), 2_000_000),
    ):
        for sparsity in sparsities:
            learned, trained = (experiment.cells[f"{row}-{sparsity}"] for row in (first, second))
            assert (learned.tokens + trained.tokens, trained.mask) == (total, learned.name)
    for row in ("recover-wanda-fisher", "recover-wanda-fisher-longer", "lora-wanda-fisher"):
        assert experiment.cells[f"{row}-60"].mask == "wanda-fisher-60"
    assert rows["recover-wanda-fisher"] == rows["recover-admm"] == rows["leap-with-weights"] == [0.5, 0.6, 0.7]
    for row in ("wanda-fisher", "admm", "leap-both"):
        mixed, ours = (experiment.cells[f"{name}-60"] for name in (f"{row}-mixture", row))
        assert (mixed.text, ours.text, mixed.table) == ("text of several kinds", None, ours.table)
    assert mixed.fit == {**ours.fit, "data": {"text": "assets/mixture/train.jsonl"}}
    assert mixed.prior == "wanda-fisher-mixture-60"
    assert experiment.cells["leap-with-weights-60"].fit["model"]["train_weights"] == "kept"


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
        (("rows", "recover", "mask"), "nothing", "needs nothing-60, which no row makes"),
        (("rows", "recover", "prior"), "wanda", "leave the prior out"),
        (("rows", "leap", "seeds"), 1, "seeds of row leap in .* Give a list of whole numbers"),
        (("rows", "leap", "seeds"), [True], "Give a list of whole numbers"),
        (("rows", "leap", "seeds"), [1, 1], "makes leap-50-seed-1 twice"),
        (("rows", "leap", "each"), {0.5: {"seeds": [-1]}}, "Give a list of whole numbers"),
        (("rows", "wanda", "seeds"), [1], "row wanda in .* has seeds, which are of learning"),
        (("rows", "wanda", "each"), {0.5: {"seeds": [1]}}, "has seeds, which are of learning"),
        (("rows", "update", "best_of"), ["recover"], "needs recover-50, which no row makes"),
        (("rows", "leap", "compared_with"), "gone", "compared_with of row leap in .* is 'gone'. Name another row"),
        (("rows", "leap", "compared_with"), "leap", "compared_with of row leap in .* is 'leap'. Name another row"),
        (("models", "other", "rows", "wanda", "compared_with"), ["leap"], "is .'leap'.. Name another"),
        (("rows", "Big"), {}, "small letters"),
        (("learn", "tokens"), "many", "number of tokens"),
        (("learn", "config"), "nowhere.yaml", "nowhere.yaml cannot be read"),
        (("texts", "like"), {"max_tokens": 5}, "lacks text"),
        (("texts", "Other"), "x", "text Other in .* small letters"),
        (("rows", "leap", "texts"), ["other"], "leap-50 in .* names the text other. It has no further texts"),
        (("rows", "leap", "texts"), ["like"], "names the text like"),
        (("rows", "leap", "texts"), "other", "Give a list of names"),
        (("rows", "leap", "each"), {0.5: {"texts": ["other"]}}, "leap-50 in .* names the text other"),
        (("rows", "leap", "each"), {60: {}}, "each of row leap in .* names 60. Give a sparsity"),
        (("rows", "leap", "each"), {"0.6": {}}, "each of row leap in .* names '0.6'"),
        (("rows", "leap", "each"), [0.6], "each of row leap in .* Give what is different by sparsity"),
        (
            ("texts",),
            {"validation": {"text": "a", "max_tokens": 7}, "like": {"text": "b"}, "unlike": {"text": "a"}},
            "validation and unlike of texts in .* are one file, a, with 7 and all tokens. Give both the same",
        ),
        (("tasks_at",), 0.5, "tasks_at in .* is 0.5. Give a list of sparsities"),
        (("tasks",), ["piqa"], "is to be a mapping"),
        (("models", "other", "rows", "wanda", "minutes"), "long", "row wanda in model other in .* whole number"),
        (("models", "other", "row"), {}, "model other in .* says row"),
        (("models", "Big"), {"base_model": "x", "rows": {}}, "small letters"),
        (("rows", "wanda", "prune"), "wanda", "prune of row wanda in .* Give its options, as in .method: wanda"),
        (("rows", "leap", "each"), {0.5: {"fit": "x"}}, "fit of row leap in .* is 'x'. Give its options"),
        (("models", "other", "rows", "wanda"), ["x"], r"row wanda of model other in .* is \['x'\]. Give its settings"),
        (("about",), "One sentence.", "about of the experiment is 'One sentence.'. Give a list of sentences"),
        (("about",), ["<b>"], "about of the experiment is '<b>': it should be plain text, without any of"),
        (("rows", "wanda", "title"), "[x](y)", "title of row wanda in .* should be plain text"),
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


def test_missing_tasks_are_named_and_nothing_is_lost(again, capsys):
    folder, _ = again
    change(folder / "tiny.yaml", "evaluate", "tasks_folder", to=str(folder / "gone"))
    assert results(folder, "--report") == 2
    said = capsys.readouterr().err
    assert re.search(r"gone has no piqa, arc_easy\. Texts and tasks are laid out by make assets", said)
    assert sorted(cells(folder)) == sorted(CELLS)


def test_a_missing_base_model_loses_nothing(again, capsys):
    folder, _ = again
    change(folder / "tiny.yaml", "target", to="assets")
    change(folder / "tiny.yaml", "base_model", to=str(folder / "gone"))
    assert results(folder, "--report") == 0
    assert "gone is not there. Lay it out with make assets." in capsys.readouterr().err
    assert sorted(cells(folder)) == sorted(CELLS)


@pytest.mark.parametrize("docs", ["docs/results", "docs/tasks_in_full", None])
def test_another_definition_has_figures_of_its_own(docs, again, capsys, monkeypatch):
    folder, _ = again
    docs = [] if docs is None else ["--docs", str(Path(__file__).parents[2] / docs)]
    monkeypatch.chdir(Path(__file__).parents[2])
    assert main(["--config", str(folder / "tiny.yaml"), "--list", *docs]) == 2
    assert "would take their place. Name another folder with --docs." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "changed"),
    [
        ("like.jsonl", {"perplexity-256"}),
        ("tasks/piqa/validation.jsonl", {"tasks-4"}),
        ("model/tokenizer.json", {"make", "perplexity-256", "perplexity-192", "tasks-4", "tasks-all"}),
    ],
)
def test_what_a_step_reads_is_told_by_its_content(again, experiment_done, model_folder, file, changed):
    """A text, questions or a base model that is replaced under the same name makes its figures old ones."""
    folder, _ = again
    for name in ("like.jsonl", "tasks"):
        from_, to = experiment_done[0] / name, folder / name
        (shutil.copytree if from_.is_dir() else shutil.copy)(from_, to)
    shutil.copytree(model_folder, folder / "model")
    change(folder / "tiny.yaml", "base_model", to=str(folder / "model"))
    change(folder / "tiny.yaml", "texts", "like", "text", to=str(folder / "like.jsonl"))
    change(folder / "tiny.yaml", "evaluate", "tasks_folder", to=str(folder / "tasks"))

    def digests(name):
        found = runner(folder)
        cell = found.experiment.cells[name]
        make = found.steps.make(cell)
        steps = [*([make] if make else []), *found.steps.measures(cell, make and make.digest)]
        return {step.name: step.digest for step in steps}

    before = {name: digests(name) for name in ("dense", "wanda-50")}
    with (folder / file).open("a") as opened:
        opened.write("\n")
    for name, steps in before.items():
        after = digests(name)
        assert {step for step in steps if steps[step] != after[step]} == changed & steps.keys()


def test_weights_are_updated_again_under_another_mask(again):
    folder, _ = again

    def digest_of_update():
        found = runner(folder)
        update, kept = (found.experiment.cells[name] for name in ("update-50", "leap-50"))
        return found.steps.make(update, kept).digest

    before = digest_of_update()
    change(folder / "tiny.yaml", "rows", "leap", "fit", to={"model": {"seed": 3}})
    assert digest_of_update() != before


@pytest.mark.parametrize(
    ("row", "key"),
    [("wanda", "prune.layer_sparsity"), ("admm", "prune.mask"), ("leap", "fit.model.prior.masks.inner"),
     ("leap", "fit.model.prior.mask"), ("recover", "fit.model.weights")],
)  # fmt: skip
def test_files_that_settings_name_are_told_by_their_content(again, row, key):
    folder, _ = again
    file = folder / "file"
    change(folder / "tiny.yaml", "rows", row, *key.split("."), to=str(file))
    if key == "fit.model.prior.mask":
        change(folder / "tiny.yaml", "rows", row, "prior", to=None)
    digests = []
    for content in ("one", "two", "one"):
        file.write_text(content)
        made = runner(folder)
        digests.append(made.steps.make(made.experiment.cells[f"{row}-60"]).digest)
    assert digests[0] == digests[2] != digests[1]


@pytest.mark.parametrize(
    ("keys", "to"),
    [
        (("texts", "like", "text"), "nowhere.jsonl"),
        (("prune", "text"), "nowhere.jsonl"),
        (("prune", "text"), "nowhere*.jsonl"),
        (("rows", "wanda", "prune", "text"), "nowhere.jsonl"),
        (("rows", "leap", "fit", "data"), {"text": ["nowhere.jsonl"]}),
        (("rows", "leap", "fit", "data"), {"validation_text": "nowhere.jsonl"}),
        (("models", "other", "prune", "text"), "nowhere.jsonl"),
    ],
)
def test_a_missing_text_is_named_and_nothing_is_lost(again, capsys, monkeypatch, keys, to):
    folder, _ = again
    monkeypatch.chdir(folder)
    change(folder / "tiny.yaml", *keys, to=to)
    assert results(folder, "--report") == 2
    said = capsys.readouterr().err
    assert re.search(r"nowhere.*\. Texts and tasks are laid out by make assets assets-eval assets-mixture\.$", said)
    assert said.count("\n") == 1
    assert sorted(cells(folder)) == sorted(CELLS)


def test_texts_may_be_patterns_and_of_the_hub(again):
    folder, _ = again
    change(folder / "tiny.yaml", "rows", "wanda", "prune", "text", to=str(folder / "*.yaml.jsonl"))
    change(folder / "tiny.yaml", "rows", "admm", "prune", "text", to="user/text-v1.5")
    change(folder / "tiny.yaml", "texts", "like", "text", to="wikitext2")
    (folder / "a.yaml.jsonl").write_text('{"text": "a"}\n')
    experiment = read_experiment(folder / "tiny.yaml")
    before = Runner(experiment, folder / "runs").steps.make(experiment.cells["wanda-50"]).digest
    (folder / "a.yaml.jsonl").write_text('{"text": "b"}\n')
    assert Runner(experiment, folder / "runs").steps.make(experiment.cells["wanda-50"]).digest != before


def test_another_class_brings_its_own_settings():
    below = {"gate": {"class_path": "A", "init_args": {"a": 1}}, "x": {"y": 1}}
    same = laid_over(below, {"gate": {"class_path": "A", "init_args": {"b": 2}}})
    other = laid_over(below, {"gate": {"class_path": "B"}})
    assert same["gate"] == {"class_path": "A", "init_args": {"a": 1, "b": 2}}
    assert other == {"gate": {"class_path": "B"}, "x": {"y": 1}}
    assert below["gate"]["class_path"] == "A"


def test_a_definition_may_be_like_another(again):
    folder, ran = again
    change(folder / "tiny.yaml", "rows", "leap", "compared_with", to="admm")
    rows = {"dense": None, "wanda": {"sparsity": [0.6]}, "leap": {"sparsity": [0.6]}}
    told = {"like": "tiny.yaml", "evaluate": {"dtype": "bfloat16"}, "tasks": {"piqa": None}, "rows": rows}
    told["texts"] = {role: {"max_tokens": 128} for role in ("like", "unlike", "validation")}
    models = {"other": {"rows": {"wanda": None}, "about": ["This model is other."]}}
    write(folder / "full.yaml", told | {"tasks_at": [0, 0.6], "models": models, "about": ["All questions."]})
    experiment = read_experiment(folder / "full.yaml")
    for cell, added in (("dense", "All questions."), ("other-wanda-60", "This model is other.")):
        about = read_experiment(folder / "tiny.yaml").cells[cell].model.about
        assert about
        assert experiment.cells[cell].model.about == [*about, added]
    assert list(experiment.cells) == ["dense", "wanda-60", "leap-60", "other-wanda-60"]
    assert "admm-60" not in experiment.cells  # a row may be compared with one that is left out here
    assert experiment.cells["leap-60"].compared_with == "admm-60"
    assert experiment.cells["other-wanda-60"].model.evaluate["batch_size"] == 2
    assert experiment.tasks == {"piqa": None, "arc_easy": None}
    assert experiment.cells["dense"].model.evaluate["dtype"] == "bfloat16"
    assert experiment.cells["leap-60"].fit == read_experiment(folder / "tiny.yaml").cells["leap-60"].fit
    # A model may have a row that its definition has for it alone.
    write(folder / "alone.yaml", told | {"rows": {"dense": None}, "models": models})
    alone = read_experiment(folder / "alone.yaml").cells
    assert list(alone) == ["dense", "other-wanda-60"]
    of_other = read_experiment(folder / "tiny.yaml").cells["other-wanda-60"]
    assert alone["other-wanda-60"] == replace(of_other, model=alone["other-wanda-60"].model)
    # Masks of the other one are not made again, and its measurements stay.
    more = ("--config", str(folder / "full.yaml"), "--docs", str(folder / "docs" / "full"))
    assert results(folder, *more) == 0
    assert {verb for verb, _ in verbs(ran)} == {"evaluate"}
    found = json.loads((folder / "docs" / "full" / "cells" / "leap-60.json").read_text())
    assert (found["tasks"]["piqa"]["limit"], found["model"]["dtype"]) == (None, "bfloat16")
    ran.clear()
    assert results(folder) == 0
    assert ran == []


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"rows": {"gone": None}}, "rows of .*other.yaml names gone, which .*tiny.yaml has not"),
        ({"models": {"gone": {"rows": {}}}}, "models of .*other.yaml names gone"),
        ({"models": {"other": {"rows": {"leap": None}}}}, "rows of model other in .* names leap, which .*tiny.yaml"),
        ({"models": {"other": ["dense"]}}, "model other in .* is to be a mapping"),
        ({"models": {"other": {"rows": ["dense"]}}}, "rows in model other in .* is to be a mapping"),
        ({"like": "full.yaml"}, "like another. Name that one"),
        ({"like": "damaged.yaml"}, "rows in .*damaged.yaml is to be a mapping"),
    ],
)
def test_mistakes_in_a_definition_like_another(again, told, words):
    folder, _ = again
    write(folder / "full.yaml", {"like": "tiny.yaml"})
    write(folder / "damaged.yaml", {"rows": ["dense"]})
    write(folder / "other.yaml", {"like": "tiny.yaml", "rows": {"dense": None}} | told)
    with pytest.raises(UserError, match=words):
        read_experiment(folder / "other.yaml")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_how_a_folder_was_made_is_no_content_of_it(tmp_path, name):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    before = identity(str(tmp_path))
    (tmp_path / "SOURCES.md").write_text("made by a later version", encoding="utf-8")
    (tmp_path / "leap_pl.json").write_text("{}", encoding="utf-8")
    assert identity(str(tmp_path)) == before
    (tmp_path / name).write_text('{"rope_theta": 1.0, "transformers_version": "5.24.0"}', encoding="utf-8")
    with_settings = identity(str(tmp_path))
    assert with_settings != before
    (tmp_path / name).write_text('{"rope_theta": 1.0, "transformers_version": "5.30"}', encoding="utf-8")
    assert identity(str(tmp_path)) == with_settings
    (tmp_path / name).write_text('{"rope_theta": 2.0, "transformers_version": "5.24.0"}', encoding="utf-8")
    assert identity(str(tmp_path)) != with_settings
    for damaged in ("{", "[1]"):
        (tmp_path / name).write_text(damaged, encoding="utf-8")
        assert identity(str(tmp_path)) not in (before, with_settings)
