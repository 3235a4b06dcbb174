"""The report of the headline experiment: its figures are those of the cells; and what a definition may say."""

import re
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from tiny_experiment import CELLS, SCORED_CELLS, STEP, cells, change, results, runner

from experiments.headline.__main__ import main
from experiments.headline.definition import read_experiment
from experiments.headline.experiment import laid_over
from experiments.headline.measured import Group, read_cells
from experiments.headline.tables import difference_table
from leap_pl.cli.main import main as leap_pl
from leap_pl.evaluation.record import read_result, write_result

# -- the report -----------------------------------------------------------------------------------------------


def number(cell):
    return float(re.match(r"[-+]?[\d.,]+", cell)[0].replace(",", ""))


def section(page, heading):
    """The rows of the tables below a heading: first cell → cells, as the page shows them."""
    text = re.split(r"\n###? ", page.split(f"# {heading}\n")[1])[0]
    parts = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    ends = [n for n, row in enumerate(parts) if row[0] == "---"] + [len(parts) + 1]
    return [{row[0]: row[1:] for row in parts[start + 1 : end - 1]} for start, end in pairwise(ends)]


def test_figures_of_the_report_are_those_of_the_cells(experiment_done):
    folder, _ = experiment_done
    found, page = cells(folder), (folder / "docs" / "results.md").read_text()
    texts = [str(folder / f"{name}.jsonl") for name in ("like", "unlike")]
    value = {name: [result["perplexity"][text]["value"] for text in texts] for name, result in found.items()}
    making = (folder / "docs" / "results" / "making.md").read_text()
    (main_rows, differences), (costs,) = section(page, "50%"), section(making, "Cost")
    titles = {"dense": "dense", "Wanda": "wanda-50", "admm *": "admm-50"}
    titles |= {"LEAP, LM": "leap-50", "distill": "distill-50", "update": "update-50"}
    assert list(main_rows) == list(titles)
    for title, name in titles.items():
        sparsity, tokens, like, unlike, accuracy = main_rows[title]
        model, told_tokens, calibration, minutes, memory, of_a_step = costs[f"`{name}`"]
        result = found[name]
        assert model == "llama"
        assert number(sparsity) == pytest.approx(100 * result["sparsity"]["global"], abs=0.005)
        assert [number(like), number(unlike)] == pytest.approx(value[name], abs=0.005)
        assert number(like.split("±")[1].strip()) == pytest.approx(result["perplexity"][texts[0]]["stderr"], abs=0.005)
        if name in SCORED_CELLS:
            assert number(accuracy) == pytest.approx(100 * result["mean"]["value"], abs=0.005)
        else:
            assert accuracy == ""
        assert tokens == told_tokens
        assert (tokens, calibration) == tuple(
            f"{result['cell'][key]:,}" if result["cell"][key] else "" for key in ("tokens", "calibration_tokens")
        )
        if name != "dense":
            assert number(minutes) == pytest.approx(result["cell"]["seconds"] / 60, abs=0.05)
            assert number(memory) == pytest.approx(result["cell"]["peak_rss"] / 2**30, abs=0.05)
        if name == "leap-50":
            assert number(of_a_step) == pytest.approx(result["cell"]["seconds"] / 6, abs=0.005)
        elif not name.startswith(("leap", "distill", "recover")):
            assert of_a_step == ""
    assert list(differences) == ["LEAP, LM", "distill", "update"]
    for title, (like, like_gap, _, unlike_gap, accuracy) in differences.items():
        for gap, reference, dense, of_row in zip(
            (like_gap, unlike_gap), value["admm-50"], value["dense"], value[titles[title]], strict=True
        ):
            assert number(gap) == pytest.approx(100 * (reference - of_row) / (reference - dense), abs=0.05)
        best = min(value["wanda-50"][0], value["admm-50"][0])
        assert number(like) == pytest.approx(value[titles[title]][0] - best, abs=0.005)
        if title == "distill":
            assert accuracy == ""
            continue
        mean = max(found[name]["mean"]["value"] for name in ("wanda-50", "admm-50"))
        assert number(accuracy) == pytest.approx(100 * (found[titles[title]]["mean"]["value"] - mean), abs=0.005)
    # Without tasks, and of another pattern.
    of_60, differences = section(page, "60%")
    assert list(of_60) == ["dense", "Wanda", "admm *", "LEAP, LM", "recover"]
    assert of_60["recover"][1] == f"{8 * STEP}"
    assert list(differences) == ["LEAP, LM", "recover"]
    assert "recover, 60%: the mask of `leap-60`." in making
    assert list(section(page, "50%, 2:4")[0]) == ["dense", "wanda-2of4"]
    (learned,) = re.findall(r"while a mask was learned: float32 \((.*?)\)\.", making)
    assert set(learned.split(", ")) == {"`leap-50`", "`leap-60`", "`distill-50`", "`recover-60`"}
    (by_task,) = section(page, "Accuracy by task")
    assert number(by_task["Wanda, 50%"][1]) == pytest.approx(100 * found["wanda-50"]["tasks"]["piqa"]["acc"], abs=0.05)


def test_a_row_without_a_baseline_of_its_pattern_has_no_difference(experiment_done):
    folder, _ = experiment_done
    found = {measured.cell["name"]: measured for measured in read_cells(folder / "docs" / "results" / "cells")}
    rows = [found[name] for name in ("wanda-50", "leap-50", "wanda-2of4-50")]
    table = difference_table(Group(0.5, "unstructured", None, rows, found["dense"])).splitlines()
    assert [line.split("|")[1].strip() for line in table[2:]] == ["LEAP, LM"]
    assert difference_table(Group(0.5, "2:4", None, rows[2:], found["dense"])) == ""


def test_models_are_apart_below_one_table_of_all(experiment_done):
    folder, _ = experiment_done
    found, page = cells(folder), (folder / "docs" / "results.md").read_text()
    opening, ours, other = re.split(r"\n## ", page)
    assert ours.startswith("llama\n")
    assert other.startswith("other-model\n")
    assert all(sentence in opening for cell in found.values() for sentence in cell["cell"]["about"])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in opening.splitlines() if line.startswith("|")]
    assert [row[:3] for row in rows[2:]] == [
        ["llama", "0", "dense"],
        ["llama", "50", min(("Wanda", "admm"), key=lambda row: mean_of_texts(found[f"{row.lower()}-50"], folder))],
        ["llama", "50", "distill"],
        ["llama", "50", "LEAP, LM"],
        ["llama", "60", min(("Wanda", "admm"), key=lambda row: mean_of_texts(found[f"{row.lower()}-60"], folder))],
        ["llama", "60", "LEAP, LM"],
        ["other-model", "0", "dense"],
        ["other-model", "60", "Wanda"],
    ]
    learned = dict(zip(rows[0], rows[5], strict=True))
    seconds = sum(found[name]["cell"]["seconds"] for name in ("wanda-50", "leap-50"))
    assert number(learned["perplexity, unlike"]) == pytest.approx(
        found["leap-50"]["perplexity"][str(folder / "unlike.jsonl")]["value"], abs=0.005
    )
    assert (learned["training tokens"], learned["seed"]) == (f"{6 * STEP:,}", "0")
    assert number(learned["minutes"]) == pytest.approx(seconds / 60, abs=0.5)
    assert learned["data types"] == "float32, float32"
    assert "](results/other-model/perplexity-1-alike.svg)" in other
    assert "other-model/" not in ours
    making = (folder / "docs" / "results" / "making.md").read_text()
    assert re.search(r"Perplexity, alike, llama: .* windows of 32 tokens, stride 32,", making)
    assert re.search(r"Perplexity, alike, other-model: .* each beginning with BOS, stride 31,", making)


def test_rows_from_another_text_are_a_table_of_their_own(experiment_done, tmp_path):
    folder, _ = experiment_done
    docs = tmp_path / "docs" / "results"
    shutil.copytree(folder / "docs" / "results" / "cells", docs / "cells")
    for name in ("admm-50", "distill-50"):
        result = read_result(docs / "cells" / f"{name}.json")
        result["cell"]["text"] = "prose"
        write_result(docs / "cells" / f"{name}.json", result)
    assert main(["--report", "--from", str(docs / "cells"), "--docs", str(docs)]) == 0
    page = (tmp_path / "docs" / "results.md").read_text()
    assert list(section(page, "50%, from prose")[0]) == ["dense", "admm *", "distill"]
    assert "distill" not in section(page, "50%")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("|")]
    assert rows[0][-1] == "text"
    assert [(row[2], row[-1]) for row in rows[2:7]] == [
        ("dense", ""), ("Wanda", "alike"), ("LEAP, LM", "alike"), ("admm", "prose"), ("distill", "prose")
    ]  # fmt: skip


def mean_of_texts(result, folder):
    values = [result["perplexity"][str(folder / f"{name}.jsonl")]["value"] for name in ("like", "unlike")]
    return values[0] * values[1]


def test_report_is_written_again_from_the_cells_alone(experiment_done, tmp_path):
    folder, _ = experiment_done
    docs = tmp_path / "docs" / "results"
    shutil.copytree(folder / "docs" / "results" / "cells", docs / "cells")
    (docs / "notes.md").write_text("By hand: nothing helped.\n")
    assert main(["--report", "--from", str(docs / "cells"), "--docs", str(docs)]) == 0
    page, before = (tmp_path / "docs" / "results.md").read_text(), (folder / "docs" / "results.md").read_text()
    notes = " [What did not work](results/notes.md)."
    assert notes not in before
    assert page.replace(notes, "") == before
    assert (docs / "notes.md").read_text() == "By hand: nothing helped.\n"
    assert (docs / "making.md").read_text() == (folder / "docs" / "results" / "making.md").read_text()
    pictures = set(re.findall(r"\(results/([a-z0-9/-]+\.svg)\)", page))
    assert {"perplexity-1-alike.svg", "perplexity-2-unlike.svg", "accuracy.svg", "overlap.svg"} < pictures
    forms = [(folder / "docs" / "results" / f"forms-{name}.svg").read_text() for name in ("1-alike", "2-unlike")]
    assert all("wanda-2of4 2:4" in told and "LEAP, LM" not in told for told in forms)
    assert {"forms-1-alike.svg", "forms-2-unlike.svg"} < pictures
    assert len([name for name in pictures if name.startswith("density")]) == 2  # the best at each sparsity
    for name in pictures:
        assert (docs / name).read_bytes() == (folder / "docs" / "results" / name).read_bytes()


def test_configs_in_the_report_are_those_that_ran(experiment_done):
    folder, _ = experiment_done
    docs = folder / "docs" / "results"
    page = (docs / "making.md").read_text()
    links = re.findall(r"\[(\S+)\.yaml\]\((\S+)\)", page)
    assert links == [(name, f"configs/{name}.yaml") for name in ("leap-50", "leap-60", "distill-50", "recover-60")]
    for name, link in links:
        verb = "recover" if name == "recover-60" else "fit"
        ran = yaml.safe_load((folder / "runs" / name / f"{verb}.yaml").read_text())
        assert yaml.safe_load((docs / link).read_text()) == ran
    for words in runner(folder).record(runner(folder).experiment.cells["leap-50"]).values():
        assert f"leap_pl {' '.join(words['words'])}" in page


def test_cells_can_be_compared_as_they_are(experiment_done, tmp_path, capsys):
    folder, _ = experiment_done
    files = [str(path) for path in (folder / "docs" / "results" / "cells").glob("*-50.json")]
    leap_pl(["compare", *[f"--results+={path}" for path in files], "--output_dir", str(tmp_path / "page")])
    assert "leap 50% (leap-50)" in capsys.readouterr().out


# -- the definition -------------------------------------------------------------------------------------------


def test_the_shipped_definition():
    folder = Path(__file__).parents[2] / "configs" / "results"
    experiment = read_experiment(folder / "headline.yaml")
    models = {"": {}, "gemma": {}, "qwen": {}}
    for cell in experiment.cells.values():
        models[cell.model.name].setdefault(cell.row, []).append(cell.sparsity)
    rows, gemma, qwen = models.values()
    for row in ("magnitude", "wanda", "sparsegpt", "admm", "leap-lm", "leap-distill", "leap-update"):
        assert rows[row] == [0.5, 0.6, 0.7]
    methods = ("wanda", "wanda-fisher", "sparsegpt", "admm", "admm-fisher", "leap-both")
    assert gemma == {"dense": [None], **{row: [0.5, 0.6] for row in methods}, "leap-both-without-bos": [0.6]}
    leap, without = (experiment.cells[f"gemma-{row}-60"] for row in ("leap-both", "leap-both-without-bos"))
    assert leap.prior == without.prior == "gemma-wanda-fisher-60"
    assert without.fit == {**leap.fit, "data": {"bos": "none"}}
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
    assert thousands == {100, 125, 250, 375, 500, 2000}
    for first, second in (("leap-half", "leap-then-weights"), ("leap-three-quarters", "leap-then-weights-quarter")):
        learned, trained = (experiment.cells[f"{row}-60"] for row in (first, second))
        assert (learned.tokens + trained.tokens, trained.mask) == (500_000, learned.name)
    for row in ("recover-wanda-fisher", "recover-wanda-fisher-longer", "lora-wanda-fisher"):
        assert experiment.cells[f"{row}-60"].mask == "wanda-fisher-60"
    assert rows["recover-wanda-fisher"] == rows["recover-admm"] == rows["leap-with-weights"] == [0.5, 0.6, 0.7]
    for row in ("wanda-fisher", "admm", "leap-both"):
        mixed, ours = (experiment.cells[f"{name}-60"] for name in (f"{row}-mixture", row))
        assert (mixed.text, ours.text, mixed.table) == ("Wikipedia and Brown", None, ours.table)
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
        (("rows", "update", "best_of"), ["recover"], "needs recover-50, which no row makes"),
        (("rows", "Big"), {}, "small letters"),
        (("learn", "tokens"), "many", "number of tokens"),
        (("learn", "config"), "nowhere.yaml", "nowhere.yaml cannot be read"),
        (("texts", "like"), {"max_tokens": 5}, "lacks text"),
        (("texts", "other"), "x", "says other"),
        (("tasks",), ["piqa"], "is to be a mapping"),
        (("models", "other", "rows", "wanda", "minutes"), "long", "row wanda in model other in .* whole number"),
        (("models", "other", "row"), {}, "model other in .* says row"),
        (("models", "Big"), {"base_model": "x", "rows": {}}, "small letters"),
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
