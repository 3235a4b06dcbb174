"""The report of the headline experiment: its figures are those of the cells."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from report_tables import number, section, spread_of, table_rows
from tiny_experiment import SCORED_CELLS, STEP, cells, change, results, runner, verbs

from experiments.headline import overview
from experiments.headline.__main__ import main
from experiments.headline.cells import UNKNOWN
from experiments.headline.measured import Group, groups, read_cells
from experiments.headline.overview import best_rows, draw_overview, losses, verdict
from experiments.headline.tables import difference_table
from leap_pl.cli.main import main as leap_pl
from leap_pl.comparison import drawing
from leap_pl.comparison.differences import Difference
from leap_pl.evaluation.record import read_result, write_result


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
        sparsity, tokens, like, unlike, accuracy, in_all, dtypes = main_rows[title]
        model, told_tokens, passes, calibration, minutes, memory, of_a_step = costs[f"`{name}`"]
        result = found[name]
        assert passes == ("1" if name in ("leap-50", "distill-50") else "")
        assert model == "llama"
        assert number(sparsity) == pytest.approx(100 * result["sparsity"]["global"], abs=0.005)
        assert [number(like), number(unlike)] == pytest.approx(value[name], abs=0.005)
        assert number(like.split("±")[1].strip()) == pytest.approx(result["perplexity"][texts[0]]["stderr"], abs=0.005)
        if name in SCORED_CELLS:
            assert number(accuracy) == pytest.approx(100 * result["mean"]["value"], abs=0.005)
        else:
            assert accuracy == ""
        assert tokens == told_tokens
        assert dtypes.split(", ")[-1] == result["model"]["dtype"]
        assert (in_all == "") == (name == "dense")
        assert name == "dense" or number(in_all) >= round(result["cell"]["seconds"] / 60)  # with what it is made from
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
    (learned,) = re.findall(r"while a mask was learned, or weights trained: float32 \((.*?)\)\.", making)
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
    opening, losses, about, ours, other = re.split(r"\n## ", page)
    assert losses.startswith("Where learning loses\n")
    assert ours.startswith("llama\n")
    assert other.startswith("other-model\n")
    assert all(sentence in about for cell in found.values() for sentence in cell["cell"]["about"])
    rows = table_rows(opening)
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
    assert learned["data types, made and measured"] == "float32, float32"
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
    rows = table_rows(page)
    assert rows[0][3] == "text"
    assert [(row[2], row[3]) for row in rows[2:7]] == [
        ("dense", ""), ("Wanda", "alike"), ("LEAP, LM", "alike"), ("admm", "prose"), ("distill", "prose")
    ]  # fmt: skip


def test_a_row_is_learned_with_further_seeds(again):
    folder, ran = again
    change(folder / "tiny.yaml", "rows", "leap", "each", to={0.5: {"seeds": [1, 2]}})
    assert results(folder) == 0
    assert verbs(ran) == [
        (verb, f"leap-50-seed-{seed}")
        for seed in (1, 2)
        for verb in ("fit", "evaluate", "evaluate", "evaluate", "evaluate")
    ]
    found = cells(folder)
    seeds = [found[name] for name in ("leap-50", "leap-50-seed-1", "leap-50-seed-2")]
    assert [result["config"]["seed"] for result in seeds] == [0, 1, 2]
    assert [result["cell"]["repeat_of"] for result in seeds] == [None, "leap-50", "leap-50"]
    assert seeds[1]["cell"]["settings"]["data"]["seed"] == 1
    assert len({result["cell"]["mask"] for result in seeds}) == 3
    page = (folder / "docs" / "results.md").read_text()
    main_rows, _, repeated = section(page, "50%")
    assert len(main_rows) == 6
    assert list(repeated) == ["LEAP, LM"]
    told, like, _, _, gap, accuracy = repeated["LEAP, LM"]
    assert told == "0, 1, 2"
    text, other = (seeds[0]["cell"]["texts"][role]["text"] for role in ("like", "unlike"))
    values = [result["perplexity"][text]["value"] for result in seeds]
    assert spread_of(like) == pytest.approx([np.mean(values), np.std(values, ddof=1)], abs=0.005)
    far, dense, *values = [
        result["perplexity"][other]["value"] for result in (found["admm-50"], found["dense"], *seeds)
    ]
    closed = [100 * (far - value) / (far - dense) for value in values]
    assert spread_of(gap) == pytest.approx([np.mean(closed), np.std(closed, ddof=1)], abs=0.05)
    scores = [100 * result["mean"]["value"] for result in seeds]
    assert spread_of(accuracy) == pytest.approx([np.mean(scores), np.std(scores, ddof=1)], abs=0.005)
    heading, _, *overview = table_rows(page)
    column = heading.index("seed")
    assert {row[2]: row[column] for row in overview[:4]}["LEAP, LM"] == "0 (of 3)"
    assert sum(row[2] == "LEAP, LM" for row in overview) == 2  # once at each sparsity
    making = (folder / "docs" / "results" / "making.md").read_text()
    assert "- LEAP, LM, 50%, seed 2: [leap-50-seed-2.yaml](configs/leap-50-seed-2.yaml)" in making


def test_further_texts_are_measured_of_the_rows_that_name_them(again):
    folder, ran = again
    before = {path.name: path.read_bytes() for path in (folder / "docs" / "results" / "cells").glob("*.json")}
    more = {"text": str(folder / "docs" / "more.jsonl"), "max_tokens": 128, "title": "more", "about": "A third text."}
    Path(more["text"]).write_text(
        "".join(json.dumps({"text": f"number {n} " * 20}) + "\n" for n in range(9)), encoding="utf-8"
    )
    change(folder / "tiny.yaml", "texts", "more", to=more)
    for row, share in (("leap", {0.5: {"texts": ["more"]}}), ("admm", {0.5: {"texts": ["more"]}})):
        change(folder / "tiny.yaml", "rows", row, "each", to=share)
    change(folder / "tiny.yaml", "rows", "dense", "texts", to=["more"])
    assert results(folder) == 0
    measured = ["dense", "admm-50", "leap-50", "other-dense"]  # rows of further models are as those of their names
    assert verbs(ran) == [("evaluate", name) for name in measured]
    after = {path.name: path.read_bytes() for path in (folder / "docs" / "results" / "cells").glob("*.json")}
    assert {name for name in before if before[name] != after[name]} == {f"{name}.json" for name in measured}
    found, page = cells(folder), (folder / "docs" / "results.md").read_text()
    value = {name: found[name]["perplexity"][more["text"]]["value"] for name in measured}
    assert all(found[name]["perplexity"][more["text"]]["tokens"] == 128 for name in measured)
    assert "A third text." in page.split("\n## About these figures\n")[1].split("\n## ")[0]
    headings, _, *overview = table_rows(page)
    shown = {row[2]: row[headings.index("perplexity, more")] for row in overview[:4]}  # at 50%
    expected = {"dense": value["dense"], "Wanda": None, "admm": value["admm-50"], "distill": None}
    expected["LEAP, LM"] = value["leap-50"]
    assert {"dense", "distill", "LEAP, LM"} < set(shown)
    assert {title: number(cell) if cell else None for title, cell in shown.items()} == {
        title: expected[title] and pytest.approx(expected[title], abs=0.005) for title in shown
    }
    main_rows, differences = section(page, "50%")
    assert number(main_rows["admm *"][4]) == pytest.approx(value["admm-50"], abs=0.005)
    assert main_rows["Wanda"][4] == main_rows["distill"][4] == ""
    assert number(differences["LEAP, LM"][4]) == pytest.approx(value["leap-50"] - value["admm-50"], abs=0.005)
    gap = (value["admm-50"] - value["leap-50"]) / (value["admm-50"] - value["dense"])
    assert number(differences["LEAP, LM"][5]) == pytest.approx(100 * gap, abs=0.05)
    assert "perplexity, more" not in re.split(r"\n### ", page.split("\n### 60%\n")[1])[0]
    assert "Perplexity, more, llama: the first 128 tokens" in (folder / "docs" / "results" / "making.md").read_text()


def mean_of_texts(result, folder):
    values = [result["perplexity"][str(folder / f"{name}.jsonl")]["value"] for name in ("like", "unlike")]
    return values[0] * values[1]


def test_page_says_where_what_is_learned_loses(experiment_done):
    folder, _ = experiment_done
    found, page = cells(folder), (folder / "docs" / "results.md").read_text()
    told = page.split("## Where learning loses\n")[1].split("\n## ")[0].strip().splitlines()
    texts = {name: str(folder / f"{name}.jsonl") for name in ("like", "unlike")}
    learned = ("leap-50", "distill-50", "leap-60")  # those of the first table
    multiples = (
        told[0]
        .removeprefix("- The learned masks above have ")
        .removesuffix(", as times of the dense model's perplexity.")
    )
    for span, text in zip(multiples.split(", "), texts.values(), strict=True):
        values = [found[name]["perplexity"][text]["value"] for name in learned]
        dense = found["dense"]["perplexity"][text]["value"]
        assert [float(value) for value in re.findall(r"\d+\.\d\d", span)] == pytest.approx(
            [value / dense for value in (min(values), max(values))], abs=0.005
        )
    assert told[-1].startswith("- Learning took ")


@pytest.mark.parametrize("swapped", [False, True])
def test_rows_worse_than_the_best_baseline_are_named(experiment_done, swapped):
    folder, _ = experiment_done
    found = [
        replace(m, cell={**m.cell, "baseline": m.cell["baseline"] is not swapped and not m.is_dense})
        for m in read_cells(folder / "docs" / "results" / "cells")
        if m.model == "llama"
    ]
    told, worse, alike, better, compared = "\n".join(losses(found, best_rows(found))), 0, 0, 0, 0
    for group in groups(found):
        for title, like, _, unlike, _, *accuracy in table_rows(difference_table(group))[2:]:
            name = f"{title}, {group.heading}"
            for text, cell in (("alike", like), ("unlike", unlike)):
                value, error = spread_of(cell)
                assert (f"{name}, {text} ({value:+.2f})" in told) == (value > 2 * error)
                worse += value > 2 * error
                better += value < -2 * error
                compared += 1
            if any(accuracy):
                value, error = spread_of(accuracy[0])
                assert (f"{name} ({value:+.1f})" in told) == (value <= 2 * error)
                alike += value <= 2 * error
    assert worse > 0 if swapped else worse == 0
    assert f"in {better} of {compared} comparisons of a row on a text" in verdict(found)
    assert ("more than 2 standard errors above" in told) == bool(worse)
    assert ("less than 2 standard errors above" in told) == bool(alike)


@pytest.mark.parametrize(("wrong", "named"), [(10, True), (3, False)])
def test_a_single_task_that_loses_is_named(experiment_done, wrong, named):
    """By pairs of questions: 10 more of 100 are 10 ± 3 points, 3 more are 3 ± 1.7."""
    folder, _ = experiment_done
    found = {m.cell["name"]: m for m in read_cells(folder / "docs" / "results" / "cells")}

    def row(name, fewer):
        correct = {"lost": "0" * fewer + "1" * (100 - fewer), "kept": "10" * 50}
        tasks = {task: {"acc": bits.count("1") / 100, "correct": bits} for task, bits in correct.items()}
        return replace(found[name], entry=replace(found[name].entry, tasks=tasks))

    said = "\n".join(losses([row("leap-50", wrong), row("wanda-50", 0)], []))
    assert (
        "In single tasks, more than 2 standard errors below the baseline that is best at it, in 1 of 2" in said
    ) == named
    assert (f", lost (-{wrong}.0)." in said) == named


def test_learned_masks_above_trained_weights_of_a_one_shot_mask_are_named(experiment_done):
    """Of the same number of tokens alone: another row has the same figures, and is not compared."""
    folder, _ = experiment_done
    found = {m.cell["name"]: m for m in read_cells(folder / "docs" / "results" / "cells")}
    learned, baseline = found["leap-50"], found["wanda-50"]
    assert learned.cell["tokens"]
    assert baseline.cell["baseline"]
    for factor, tokens, named in ((0.5, 1, 2), (2.0, 1, 0), (0.5, 2, 0)):
        figures = {
            title: {**figure, "value": factor * figure["value"]} for title, figure in learned.entry.perplexity.items()
        }
        trained = replace(
            learned,
            entry=replace(learned.entry, label="weights alone", perplexity=figures),
            cell={
                **learned.cell,
                "name": "recover-wanda-50",
                "mask_of": "wanda-50",
                "tokens": tokens * learned.cell["tokens"],
                "settings": {**learned.cell["settings"], "model": {"mask": "mask.safetensors"}},
            },
        )
        said = "\n".join(losses([learned, baseline, trained], []))
        assert said.count(", weights alone)") == named
        if named:
            for figure in figures.values():  # a figure is by its half more than its half
                more = re.escape(format(figure["value"], "+.2f"))
                assert re.search(rf"\({more}\xa0±\xa0[\d.]+, weights alone\)", said)


def test_a_row_without_a_baseline_of_its_form_is_compared_with_those_of_others(experiment_done):
    folder, _ = experiment_done
    found = [
        m for m in read_cells(folder / "docs" / "results" / "cells") if m.cell["name"] in ("wanda-2of4-50", "leap-50")
    ]
    learned, baseline = sorted(found, key=lambda m: m.cell["name"])
    baseline = replace(baseline, cell={**baseline.cell, "baseline": True})
    for factor, told in ((3.0, True), (0.3, False)):
        figures = {
            title: {**figure, "value": factor * baseline.entry.perplexity[title]["value"], "stderr": 0.01}
            for title, figure in learned.entry.perplexity.items()
        }
        rows = [
            replace(learned, entry=replace(learned.entry, perplexity=figures), cell={**learned.cell, "table": "2:4"})
        ]
        said = "\n".join(losses([*rows, baseline], []))
        assert said.count("to a mask of another form)") == (2 if told else 0)
        assert f"in {0 if told else 2} of 2 comparisons of a row on a text" in verdict([*rows, baseline])


def test_a_loss_to_a_mask_of_another_form_is_judged_by_pairs_of_windows(experiment_done):
    """A row that is .02 worse in each of 48 windows is worse, however much the windows differ from one another."""
    folder, _ = experiment_done
    found = {m.cell["name"]: m for m in read_cells(folder / "docs" / "results" / "cells")}
    hard = np.random.default_rng(0).normal(3, 0.3, 48).tolist()

    def row(name, by, windows, baseline):
        nll = np.mean(hard) + by
        figure = {"value": np.exp(nll), "stderr": np.exp(nll) * np.std(hard) / 48**0.5, "nll": nll}
        figure["window_nll"] = [x + by for x in hard[:windows]]
        entry = replace(found[name].entry, perplexity=dict.fromkeys(found[name].entry.perplexity, figure))
        return replace(found[name], entry=entry, cell={**found[name].cell, "table": "2:4", "baseline": baseline})

    for windows, listed in ((48, 2), (47, 0), (0, 0)):
        rows = [row("leap-50", 0.02, windows, False), row("wanda-2of4-50", 0, 48, True)]
        assert "\n".join(losses(rows, [])).count("to a mask of another form)") == listed


def test_agreement_with_a_prior_of_another_form_is_not_told(experiment_done, tmp_path):
    """Bits that the form decides are no bits that were learned."""
    docs, path, result = copied_cell(experiment_done, tmp_path, "leap-50")

    def told():
        """Of the page that is written again, the rows whose bits are told, and those in the picture."""
        assert main(["--report", "--from", str(docs / "cells"), "--docs", str(docs)]) == 0
        page = (tmp_path / "docs" / "results.md").read_text()
        (line,) = re.findall(r"^Mask bits that differ from the prior: (.*)\.$", page, re.MULTILINE)
        picture = (docs / "overlap.svg").read_text()
        drawn = {label for label in ("LEAP, LM, 50%", "LEAP, LM, 60%") if f"{label} ∩" in picture}
        return set(re.findall(r"LEAP, LM, \d\d%", line)), drawn

    assert told() == ({"LEAP, LM, 50%", "LEAP, LM, 60%"},) * 2
    result["config"]["pattern"] = "8x8 tiles, dense or 2:4"
    path.write_text(json.dumps(result))
    assert told() == ({"LEAP, LM, 60%"},) * 2


def test_a_mask_that_was_made_again_with_other_bits_is_named(experiment_done, tmp_path):
    folder, _ = experiment_done
    docs = tmp_path / "docs" / "results"

    def page(digest):
        """The report with another digest of the mask that the recovered row begins from; None: none is known."""
        shutil.rmtree(docs, ignore_errors=True)
        shutil.copytree(folder / "docs" / "results" / "cells", docs / "cells")
        for name, key in (("leap-60", "mask"), ("wanda-50", "mask")):
            path = docs / "cells" / f"{name}.json"
            result = json.loads(path.read_text())
            result["cell"][key] = digest if name == "leap-60" and digest != "same" else result["cell"][key]
            path.write_text(json.dumps(result))
        assert main(["--report", "--from", str(docs / "cells"), "--docs", str(docs)]) == 0
        return (docs / "making.md").read_text()

    assert "`recover-60` (`leap-60`)" not in page("same")
    assert "They did for `recover-60` (`leap-60`)." in page("0" * 16)
    assert "not known for `recover-60` (`leap-60`)." in page(None)


def test_picture_of_the_overview_holds_every_point(experiment_done, tmp_path, monkeypatch):
    """Also where a row is below the dense model."""
    folder, _ = experiment_done
    drawn = []
    monkeypatch.setattr(drawing, "save", lambda figure, *_: drawn.append(figure))
    draw_overview(best_rows(read_cells(folder / "docs" / "results" / "cells")), tmp_path)
    (figure,) = drawn
    shown = [x for axes in figure.axes for line in axes.lines for x in line.get_xdata()]
    low, high = figure.axes[0].get_xlim()
    assert min(shown) < 1  # of these random models one is
    assert low < min(shown) <= max(shown) < high


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


def test_a_report_replaces_its_own_files_alone(experiment_done, tmp_path, capsys, without_pictures):
    docs = tmp_path / "docs" / "results"
    shutil.copytree(experiment_done[0] / "docs" / "results", docs)
    shutil.copy(experiment_done[0] / "docs" / "results.md", docs.with_name("results.md"))
    drawn = {path.name for path in docs.glob("*.svg")} - {"overview.svg"}
    assert len(drawn) > 3
    (docs / "mine.svg").write_text("mine")
    (docs / "configs" / "mine.yaml").write_text("mine")
    (docs / "cells" / "leap-60.json").unlink()
    assert main(["--report", "--from", str(docs / "cells"), "--docs", str(docs)]) == 0
    assert {path.name for path in docs.glob("*.svg")} == {"overview.svg", "mine.svg"}  # the page shows no others now
    assert {path.name for path in (docs / "configs").iterdir()} == {
        *("leap-50.yaml", "distill-50.yaml", "recover-60.yaml", "mine.yaml")
    }
    (tmp_path / "notes.md").write_text("# My notes\n")
    (tmp_path / "notes").mkdir()
    capsys.readouterr()
    assert main(["--report", "--from", str(docs / "cells"), "--docs", str(tmp_path / "notes")]) == 2
    assert "notes.md is not of a report, and would be replaced. Name another folder" in capsys.readouterr().err
    assert (tmp_path / "notes.md").read_text() == "# My notes\n"
    assert not list((tmp_path / "notes").iterdir())


@pytest.mark.parametrize(
    ("keys", "to", "said"),
    [
        (("cell", "name"), "/tmp/elsewhere", "small letters"),
        (("cell", "name"), "leap-50", "is the file of leap-50. Give it that name, or take it out"),
        (("cell", "title"), "<script>alert(1)</script>", "should be plain text"),
        (("cell", "title"), "\x1b[31mred", "should be plain text"),
        (("cell", "text"), "![](x)", "should be plain text"),
        (("cell", "about"), ["[link](x)"], "should be plain text"),
        (("cell", "prior"), "`x`", "small letters"),
        (("model", "base_model"), "somewhere/..", "has no name"),
        (("model", "base_model"), "some/<b>", "the base model's name should be plain text"),
        (("hardware",), None, "hardware"),
        (("commit",), None, "lacks commit"),
        (("seed",), None, "lacks seed"),
        (("mean",), None, "lacks mean"),
        (("model", "dtype"), None, "lacks model.dtype"),
        (("hardware", "cores"), None, "cores"),
    ],
)
def test_a_file_that_is_no_cells_is_refused_in_one_line(experiment_done, tmp_path, capsys, keys, to, said):
    """A file of results is from anywhere: it names no path, and its words have no effect in a page or a terminal."""
    docs, path, result = copied_cell(experiment_done, tmp_path, "leap-60")
    place = result
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = to
    if to is None:
        del place[keys[-1]]
    path.write_text(json.dumps(result))
    assert main(["--report", "--from", str(docs / "cells"), "--docs", str(docs)]) == 2
    message = capsys.readouterr().err
    assert said in message
    assert message.count("\n") == 1
    assert "\x1b" not in message
    assert [path.name for path in docs.iterdir()] == ["cells"]


def test_names_of_tasks_make_no_markup(experiment_done, tmp_path):
    docs, path, result = copied_cell(experiment_done, tmp_path, "wanda-50")
    result["tasks"]["<b>[x](y)"] = result["tasks"]["piqa"]
    path.write_text(json.dumps(result))
    assert main(["--report", "--from", str(docs / "cells"), "--docs", str(docs)]) == 0
    for page in (docs.with_name("results.md"), docs / "making.md"):
        told = page.read_text()
        assert "&lt;b" in told
        assert "<b>" not in told
        assert "[x](y)" not in told


def copied_cell(experiment_done, tmp_path, name):
    """A copy of the documents with all cells, and of one cell its file and what that holds, to change."""
    docs = tmp_path / "docs" / "results"
    shutil.copytree(experiment_done[0] / "docs" / "results" / "cells", docs / "cells")
    path = docs / "cells" / f"{name}.json"
    return docs, path, json.loads(path.read_text())


@pytest.mark.usefixtures("without_pictures")
def test_a_step_that_was_measured_with_another_commit_is_named(experiment_done, tmp_path):
    docs, path, result = copied_cell(experiment_done, tmp_path, "leap-50")
    assert len(result["cell"]["commits"]) > 1
    assert set(result["cell"]["commits"].values()) == {result["commit"]}
    result["cell"]["commits"] |= {"text-more": "another"}
    path.write_text(json.dumps(result))
    assert main(["--report", "--from", str(docs / "cells"), "--docs", str(docs)]) == 0
    (line,) = [line for line in (docs / "making.md").read_text().splitlines() if line.startswith("`leap-50`: ")]
    assert line.endswith(f"commit {result['commit']}, text-more with another.")


@pytest.mark.usefixtures("without_pictures")
def test_a_commit_that_is_not_known(experiment_done, tmp_path):
    """As of an archive, or of an installed package."""
    docs, path, result = copied_cell(experiment_done, tmp_path, "leap-50")
    result["commit"] = None
    result["cell"]["commits"] = dict.fromkeys(result["cell"]["commits"], UNKNOWN)
    path.write_text(json.dumps(result))
    assert main(["--report", "--from", str(docs / "cells"), "--docs", str(docs)]) == 0
    (line,) = [line for line in (docs / "making.md").read_text().splitlines() if line.startswith("`leap-50`: ")]
    assert line.endswith("; commit unknown.")


@pytest.mark.parametrize("name", ["results", "tasks_in_full", "results-0.2"])
@pytest.mark.usefixtures("without_pictures")
def test_a_report_elsewhere_says_how_it_is_made(name, experiment_done, tmp_path):
    """In a folder whose name has a dot, too."""
    cells_of = experiment_done[0] / "docs" / "results" / "cells"
    docs = tmp_path / name
    shutil.copytree(cells_of, docs / "cells")
    assert main(["--report", "--from", str(docs / "cells"), "--docs", str(docs)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {name, f"{name}.md"}
    page = (tmp_path / f"{name}.md").read_text()
    assert f'Written by `make results ARGS="--config DEFINITION.yaml --docs {docs}"`' in page
    (again,) = re.findall(r"`python -m experiments.headline (--report [^`]*)`", page)
    assert main(again.split()) == 0
    assert (tmp_path / f"{name}.md").read_text() == page


def test_models_of_one_name_are_refused(experiment_done, tmp_path, capsys):
    """Figures of one would be compared with those of the other."""
    shutil.copytree(experiment_done[0] / "docs" / "results" / "cells", tmp_path / "cells")
    for path in (tmp_path / "cells").glob("other-*.json"):
        result = json.loads(path.read_text())
        result["model"]["base_model"] = "elsewhere/llama"
        path.write_text(json.dumps(result))
    assert main(["--report", "--from", str(tmp_path / "cells"), "--docs", str(tmp_path / "mine")]) == 2
    assert re.search(r"several models that are called llama \(.*llama, elsewhere/llama\)", capsys.readouterr().err)


def test_a_difference_whose_error_is_not_known_is_no_difference(experiment_done, monkeypatch):
    folder, _ = experiment_done
    found = read_cells(folder / "docs" / "results" / "cells")
    for name in ("perplexity_difference", "accuracy_difference"):
        monkeypatch.setattr(overview, name, lambda *_: Difference(-5.0, None, "Wanda", 10.0))
    assert re.search(r"in 0 of \d+ comparisons of a row on a text, and a higher mean accuracy in 0 of", verdict(found))
    monkeypatch.setattr(overview, "perplexity_difference", lambda *_: Difference(5.0, None, "Wanda", 10.0))
    monkeypatch.setattr(overview, "accuracy_difference", lambda *_: Difference(0.5, None, "Wanda", 0.4))
    told = "\n".join(losses(found, best_rows(found)))
    assert "above the best baseline: " not in told
    assert re.search(r"In mean accuracy, (\d+) of \1 rows are less than", told)


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
