"""What a change is worth: rows of the headline experiment beside those that they were changed from, over seeds."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from report_tables import section, spread_of
from tiny_experiment import cells

from experiments.headline.__main__ import main
from experiments.headline.measured import Group, read_cells
from leap_pl.evaluation.record import write_result


def test_a_row_is_compared_with_the_one_that_it_was_changed_from(experiment_done, tmp_path):
    """Of several seeds with the mean, window by window and question by question."""
    folder, _ = experiment_done
    docs = tmp_path / "docs" / "results"
    shutil.copytree(folder / "docs" / "results" / "cells", docs / "cells")
    found = cells(folder)
    again = json.loads(json.dumps(found["leap-50"]))  # another seed
    again["cell"] |= {"name": "leap-50-seed-1", "repeat_of": "leap-50", "order": 99}
    for figure in again["perplexity"].values():
        figure["window_nll"] = [x + 0.01 * (n % 3) for n, x in enumerate(figure["window_nll"])]
        figure["nll"] = float(np.mean(figure["window_nll"]))
        figure["value"] = float(np.exp(figure["nll"]))
    task = again["tasks"]["piqa"]
    task["correct"] = "".join("01"[digit == "0"] for digit in task["correct"])
    task["acc"] = task["correct"].count("1") / len(task["correct"])
    write_result(docs / "cells" / "leap-50-seed-1.json", again)
    for name, other in (("leap-50", "update-50"), ("distill-50", "leap-50"), ("wanda-50", "gone-50")):
        found[name]["cell"]["compared_with"] = other
        write_result(docs / "cells" / f"{name}.json", found[name])
    assert main(["--report", "--from", str(docs / "cells"), "--docs", str(docs)]) == 0
    (rows,) = section((tmp_path / "docs" / "results.md").read_text(), "What a change is worth")
    assert list(rows) == ["LEAP, LM, 50%", "distill, 50%"]
    other, seeds, like, unlike, accuracy = rows["LEAP, LM, 50%"]
    assert (other, seeds) == ("update, 50%", "2 and 1")
    for name, cell in (("like", like), ("unlike", unlike)):
        ours, more, theirs = (
            np.array(result["perplexity"][str(folder / f"{name}.jsonl")]["window_nll"])
            for result in (found["leap-50"], again, found["update-50"])
        )
        gaps = (ours + more) / 2 - theirs
        ratio = np.exp(gaps.mean())
        error = ratio * gaps.std(ddof=1) / len(gaps) ** 0.5
        assert spread_of(cell) == pytest.approx([100 * (ratio - 1), 100 * error], abs=0.06)
    gaps, variance = [], 0
    for name in ("piqa", "arc_easy"):
        ours, more, theirs = (
            np.array([int(digit) for digit in result["tasks"][name]["correct"]])
            for result in (found["leap-50"], again, found["update-50"])
        )
        of_task = (ours + more) / 2 - theirs
        gaps.append(of_task.mean())
        variance += of_task.var(ddof=1) / len(of_task)
    assert spread_of(accuracy) == pytest.approx([100 * np.mean(gaps), 100 * variance**0.5 / 2], abs=0.06)
    assert rows["distill, 50%"][:2] == ["LEAP, LM, 50%", "1 and 2"]
    assert rows["distill, 50%"][4] == ""  # no tasks are measured of it


def test_best_learned_row_is_one_of_those_with_the_most_seeds(experiment_done):
    folder, _ = experiment_done
    learned = next(m for m in read_cells(folder / "docs" / "results" / "cells") if m.cell["name"] == "leap-50")

    def row(name, value, repeat_of=None):
        text = learned.cell["texts"]["validation"]["text"]
        perplexity = learned.result["perplexity"] | {text: {"value": value}}
        cell = {**learned.cell, "name": name, "repeat_of": repeat_of}
        return replace(learned, cell=cell, result={**learned.result, "perplexity": perplexity})

    rows, repeats = [row("a", 9.0), row("b", 12.0), row("c", 11.0)], [row("b-1", 8.0, "b"), row("c-1", 11.0, "c")]
    group = Group(0.5, "unstructured", None, rows, None)
    assert [m.cell["name"] for m in group.best_learned_by_tokens] == ["a"]
    assert [m.cell["name"] for m in replace(group, repeats=repeats).best_learned_by_tokens] == ["b"]
    assert [m.cell["name"] for m in replace(group, repeats=repeats[1:]).best_learned_by_tokens] == ["c"]
