"""The figures in the repository are those of its cells."""

import json
import re
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from experiments.headline.definition import read_experiment
from experiments.headline.measured import read_cells
from experiments.headline.report import write_report
from leap_pl.errors import UserError
from leap_pl.evaluation.local_tasks import PAPER_TASKS

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"


@pytest.mark.parametrize("page", ["results", "tasks_in_full"])
def test_the_report_is_that_of_the_cells_and_the_notes(tmp_path: Path, page: str) -> None:
    docs, shipped = tmp_path / "docs" / page, ROOT / "docs" / page
    docs.mkdir(parents=True)
    for notes in shipped.glob("notes.md"):
        shutil.copy(notes, docs)
    written = write_report(shipped / "cells", docs)
    assert written.read_text(encoding="utf-8") == shipped.with_suffix(".md").read_text(encoding="utf-8")
    made = [(folder / "making.md").read_text(encoding="utf-8") for folder in (docs, shipped)]
    assert made[0] == made[1]
    for kind in ("*.svg", "configs/*.yaml"):
        here, there = ({path.relative_to(folder) for path in folder.glob(kind)} for folder in (shipped, docs))
        assert here == there != set()
    for path in (docs / "configs").glob("*.yaml"):
        assert path.read_bytes() == (shipped / "configs" / path.name).read_bytes(), path.name


@pytest.mark.parametrize(
    ("document", "column"), [("README.md", "mean accuracy of 6 tasks"), ("docs/gates.md", "how-to (unlike)")]
)
def test_tables_tell_figures_of_the_cells(document: str, column: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    tables = re.findall(r"^(\|.*\| cell \|\n\|[-|]+\n(?:\|.*\|\n)+)", text, re.MULTILINE)
    assert len(tables) == 1
    assert column in tables[0]
    for table in tables:
        columns, _, *rows = ([cell.strip(" *`") for cell in line.split("|")[1:-1]] for line in table.splitlines())
        assert len(rows) >= 4
        for row in rows:
            told = dict(zip(columns, row, strict=True))
            cell = json.loads((RESULTS / "cells" / f"{told['cell']}.json").read_text(encoding="utf-8"))
            values = {Path(path).parts[1]: text["value"] for path, text in cell["perplexity"].items() if "test" in path}
            assert told["Wikipedia (like)"] == f"{values['wikipedia']:.2f}"
            assert told["how-to (unlike)"] == f"{values['howto']:.2f}"
            assert re.sub(r"\D", "", told["sparsity"]) == told["cell"].rpartition("-")[2].replace("dense", "")
            if "mean accuracy of 6 tasks" in told:
                mean = cell["mean"]  # of the sparsities that are for perplexity only there is none
                accuracy = f"{mean['value']:.1%} ± {100 * mean['stderr']:.1f}" if mean else ""
                assert told["mean accuracy of 6 tasks"] == accuracy


def test_the_readme_tells_the_protocol_of_the_cells() -> None:
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    cell = json.loads((RESULTS / "cells" / "leap-both-50.json").read_text(encoding="utf-8"))
    found = re.search(r"Perplexity on ([\d,]+) tokens .* windows of (\d+); .* on ([\d,]+) questions", text)
    assert found
    tokens, window, asked = (int(number.replace(",", "")) for number in found.groups())
    assert {(measured["tokens"], measured["seq_length"]) for measured in cell["perplexity"].values()} == {
        (tokens, window)
    }
    assert sum(task["samples"] for task in cell["tasks"].values()) == asked
    assert f"{cell['tasks']['piqa']['samples']} of each task and {cell['tasks']['mmlu']['samples']} of MMLU" in text


def test_the_cells_are_those_of_the_shipped_experiment() -> None:
    experiment = read_experiment(ROOT / "configs" / "results" / "headline.yaml")
    told = [json.loads(path.read_text(encoding="utf-8"))["cell"] for path in (RESULTS / "cells").glob("*.json")]
    expected = {name: (order, cell.title) for order, (name, cell) in enumerate(experiment.cells.items())}
    # Cells that are not made yet, of which the experiment estimates the minutes, are left out.
    more = {name for name, cell in experiment.cells.items() if cell.minutes is not None}
    left_out = more - {cell["name"] for cell in told}
    assert {cell["name"]: (cell["order"], cell["title"]) for cell in told} == {
        name: shown for name, shown in expected.items() if name not in left_out
    }


def test_the_tasks_in_full_are_asked_of_rows_of_the_shipped_experiment() -> None:
    folder = ROOT / "configs" / "results"
    headline, full = (read_experiment(folder / f"{name}.yaml") for name in ("headline", "in_full"))
    assert set(full.tasks) == set(PAPER_TASKS)
    assert {task: limit for task, limit in full.tasks.items() if limit is not None} == {"mmlu": 50}
    for name, cell in full.cells.items():
        other = headline.cells[name]
        assert (cell.prune, cell.fit, cell.prior, cell.mask) == (other.prune, other.fit, other.prior, other.mask)
        assert cell.tasks
    # Steps are told apart by the number of tokens in their names.
    assert not {text.max_tokens for text in full.texts.values()} & {t.max_tokens for t in headline.texts.values()}


def group_of(result: dict[str, Any]) -> tuple[Any, ...]:
    """What a gap is closed within: model, form, text and sparsity."""
    cell = result["cell"]
    return (result["model"]["base_model"], cell["table"], cell.get("text"), cell["sparsity"])


@cache
def figures() -> dict[str, list[str]]:
    """Of every cell of the headline experiment the perplexities of its two texts as documents show them, and then the
    mean accuracy, the parts of ADMM's gap to the dense model that are closed, and the share of bits that changed.
    """
    read = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in (RESULTS / "cells").glob("*.json")}
    perplexity = {
        name: [result["perplexity"][result["cell"]["texts"][role]["text"]]["value"] for role in ("like", "unlike")]
        for name, result in read.items()
    }
    found = {name: [f"{value:.2f}" for value in values] for name, values in perplexity.items()}
    for name, result in read.items():
        if result.get("mean"):
            found[name].append(f"{100 * result['mean']['value']:.1f}%")
        model = next((f"{model}-" for model in ("gemma", "qwen") if name.startswith(f"{model}-")), "")
        group = [other for other, one in read.items() if one["cell"]["reference"] and group_of(one) == group_of(result)]
        assert len(group) <= 1, group
        for reference in group:
            compared = (perplexity[cell] for cell in (name, f"{model}dense", reference))
            for value, dense, admm in zip(*compared, strict=True):
                found[name].append(f"{(admm - value) / (admm - dense):.1%}")
        if result["cell"]["overlap"]:
            found[name].append(f"{result['cell']['overlap']['changed']:.1%}")
    return found


@pytest.mark.parametrize(
    "document",
    [
        "README.md",
        "docs/results/notes.md",
        "docs/gates.md",
        "docs/recipes.md",
        "docs/text.md",
        "docs/learn_weights.md",
        "docs/after_learning.md",
        "dev/tuning.md",
    ],
)
def test_figures_that_name_their_cell_are_the_cells(document: str) -> None:
    """Rows of tables that name a cell show its figures, and so does what reads `13.54 and 27.84 (cell)`."""
    text, checked = (ROOT / document).read_text(encoding="utf-8"), 0
    for line in text.splitlines():
        cells = [cell.strip(" *") for cell in line.strip().strip("|").split("|")]
        named = re.findall(r"`([\w-]+)`", line)
        if line.startswith("|") and len(named) == 1 and named[0] in figures():
            shown = [re.match(r"[\d.]+%?(?= ±|$)", cell) for cell in cells]
            numbers = [found[0] for found in shown if found and "." in found[0]]
            assert numbers, line
            assert set(numbers) <= set(figures()[named[0]]), line
            perplexities = [number for number in numbers if not number.endswith("%")]
            assert perplexities == [one for one in figures()[named[0]][:2] if one in perplexities], line
            checked += 1
    for like, unlike, name in re.findall(r"([\d.]+)\s+and\s+([\d.]+)\s+\(`([\w-]+)`", text):
        assert [like, unlike] == figures()[name][:2], name
        checked += 1
    assert checked


@pytest.mark.parametrize(
    ("document", "begin"),
    [("README.md", "- *More questions.*"), ("docs/results/notes.md", "- **All questions of the tasks**")],
)
def test_accuracies_on_all_questions_are_those_of_their_cells(document: str, begin: str) -> None:
    (_, told) = (ROOT / document).read_text(encoding="utf-8").split(begin)
    shown = re.findall(r"\d\d\.\d%", told.split("\n- ")[0])
    cells = (json.loads(path.read_text()) for path in (ROOT / "docs/tasks_in_full/cells").glob("*.json"))
    means = {f"{100 * cell['mean']['value']:.1f}%" for cell in cells if "mean" in cell}
    assert len(shown) > 6
    assert set(shown) <= means


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda cell: cell.pop("title"), "'title' is missing or invalid (required)"),
        (lambda cell: cell.update(order="first"), "'order'"),
        (lambda cell: cell.update(sparsity=50), "'sparsity'"),
        (lambda cell: cell.update(about={"class_path": "os.system"}), "'about'"),
        (lambda cell: cell["texts"].pop("unlike"), "the perplexity on the text of 'unlike'"),
        (lambda cell: cell["texts"]["like"].update(text="other.jsonl"), "the perplexity on the text of 'like'"),
        (lambda cell: cell.update(overlap={"iou": 2}), "'overlap > iou'"),
        (lambda cell: cell.update(commands="rm"), "'commands'"),
    ],
)
def test_a_damaged_cell_is_told_in_one_line(tmp_path: Path, change, words: str) -> None:
    result = json.loads((RESULTS / "cells" / "leap-distill-50.json").read_text(encoding="utf-8"))
    change(result["cell"])
    path = tmp_path / "leap-distill-50.json"
    path.write_text(json.dumps(result))
    with pytest.raises(UserError) as caught:
        read_cells(tmp_path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
