"""The table of rows beside those that they were changed from: paired differences."""

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import mean, stdev
from typing import Any

from experiments.headline.measured import Measured, of_seeds, titles_of
from experiments.headline.tables import figure, markdown
from leap_pl.comparison.differences import answers_of, perplexity_difference_to, shared_tasks
from leap_pl.comparison.entries import Entry

NOTE = (
    "Each row minus the row that it was changed from: perplexity in percent of the latter's, and mean accuracy in "
    "points. Of a row with several seeds it is their mean, in each window and question. ± is one "
    "standard error over pairs of windows or questions; what another seed would change is not part of it. Where data "
    "types of the two rows differ, as the tables above have them, or the grading of their priors, as is said of these "
    "figures at the beginning, that is part of the difference."
)


def pairs_table(found: Sequence[Measured]) -> str:
    """One line for each row of one model that is compared with another; empty where none is.

    Args:
        found: All cells of the model.
    """
    cells = {m.cell["name"]: m for m in found}
    pairs = [
        (m, cells[m.cell["compared_with"]])
        for m in found
        if m.repeat_of is None and m.cell.get("compared_with") in cells
    ]
    if not pairs:
        return ""
    titles = titles_of([m for pair in pairs for m in pair])
    scored = any(_tasks(*pair) for pair in pairs)
    heading = ["row", "minus", "seeds", *(f"perplexity, {title}, %" for title in titles.values())]
    heading += ["mean accuracy, points"] * scored
    lines = []
    for m, other in pairs:
        both = of_seeds(m, found), of_seeds(other, found)
        line = [m.entry.label, other.entry.label, " and ".join(str(len(seeds)) for seeds in both)]
        line += [_perplexity(*both, role, title) for role, title in titles.items()]
        lines.append(line + [_accuracy(*both)] * scored)
    return markdown(heading, lines)


def _perplexity(rows: Sequence[Measured], others: Sequence[Measured], role: str, title: str) -> str:
    if not all(role in m.titles for m in (*rows, *others)):
        return ""
    gap = perplexity_difference_to(_mean_entry(rows, title), _mean_entry(others, title), title)
    return figure(gap.relative, gap.relative_stderr, 100, 1, signed=True)


def _mean_entry(rows: Sequence[Measured], title: str) -> Entry:
    """The entry of the first of ``rows``, with the mean over all of what each window has, and of all windows."""
    figures = [m.entry.perplexity[title] for m in rows]
    nll = mean(float(told["nll"]) for told in figures)
    averaged: dict[str, Any] = figures[0] | {"nll": nll, "value": math.exp(nll)}
    windows = [told.get("window_nll", []) for told in figures]
    averaged["window_nll"] = [mean(window) for window in zip(*windows, strict=True)] if _alike(windows) else []
    return replace(rows[0].entry, perplexity={title: averaged})


def _alike(parts: Sequence[Sequence[Any]]) -> bool:
    return len({len(part) for part in parts}) == 1


def _accuracy(rows: Sequence[Measured], others: Sequence[Measured]) -> str:
    """The difference of the mean accuracies over the tasks that all have; its error from the questions of both."""
    tasks = _tasks(*rows, *others)
    if not tasks:
        return ""
    gaps = [
        mean(float(m.entry.tasks[task]["acc"]) for m in rows) - mean(float(m.entry.tasks[task]["acc"]) for m in others)
        for task in tasks
    ]
    errors = [_task_error(rows, others, task) for task in tasks]
    known = [error for error in errors if error is not None]
    error = math.hypot(*known) / len(tasks) if len(known) == len(tasks) else None
    return figure(mean(gaps), error, 100, 1, signed=True)


def _task_error(rows: Sequence[Measured], others: Sequence[Measured], task: str) -> float | None:
    answers = [answers_of(m.entry.tasks[task]) for m in (*rows, *others)]
    if not _alike(answers) or len(answers[0]) < 2:
        return None
    ours, theirs = answers[: len(rows)], answers[len(rows) :]
    gaps = [
        mean(map(int, a)) - mean(map(int, b))
        for a, b in zip(zip(*ours, strict=True), zip(*theirs, strict=True), strict=True)
    ]
    return stdev(gaps) / math.sqrt(len(gaps))


def _tasks(*rows: Measured) -> list[str]:
    return shared_tasks([m.entry for m in rows]) if all(m.entry.tasks for m in rows) else []
