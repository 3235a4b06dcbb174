"""Differences to the best baseline on the same windows and questions, with paired standard errors.

The errors of two models on the same windows and questions are correlated, so the standard error of their paired
differences is much smaller than that of a difference of independent measurements.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from leap_pl.comparison.entries import Entry

SAME_SPARSITY = 0.01  # entries that differ by less are compared as of the same sparsity


@dataclass(frozen=True)
class Difference:
    """Difference of a figure to the best baseline's.

    Attributes:
        value: Figure minus the baseline's, in the figure's unit.
        stderr: Paired standard error of ``value``; None if it is not known.
        baseline: Label of the baseline.
        of: Figure of the baseline.
        relative_stderr: Paired standard error of :attr:`relative`, to which the baseline's own error belongs; None if
            it is not known, as of accuracies.
    """

    value: float
    stderr: float | None
    baseline: str
    of: float
    relative_stderr: float | None = None

    @property
    def relative(self) -> float:
        """Return the difference as a share of the baseline's figure."""
        return self.value / self.of


def perplexity_difference(
    entry: Entry, entries: Sequence[Entry], text: str, baselines: Collection[str]
) -> Difference | None:
    """Return the perplexity of ``entry`` on ``text`` minus the best baseline's at its sparsity; negative is better.

    Returns:
        None if ``entry`` or every baseline lacks a perplexity on ``text``.
    """
    rivals = [r for r in _rivals(entry, entries, baselines) if text in r.perplexity]
    if text not in entry.perplexity or not rivals:
        return None
    return perplexity_difference_to(entry, min(rivals, key=lambda rival: float(rival.perplexity[text]["value"])), text)


def perplexity_difference_to(entry: Entry, baseline: Entry, text: str) -> Difference:
    """Return the perplexity of ``entry`` on ``text`` minus that of ``baseline``, of whatever method and pattern.

    The errors are not known where the windows of either are not known, or their numbers differ.
    """
    a, b = entry.perplexity[text], baseline.perplexity[text]
    windows_a, windows_b = a.get("window_nll", []), b.get("window_nll", [])
    stderr = relative_stderr = None
    if len(windows_a) == len(windows_b):
        # Delta method: exp(mean) is linear in small deviations of the windows, with the perplexity as slope. The mean
        # is over tokens: of windows that overlap, the first predicts more than the others.
        weights = _weights_of_windows(len(windows_a), a)
        moved = [
            (w * (x - a["nll"]), w * (y - b["nll"])) for x, y, w in zip(windows_a, windows_b, weights, strict=True)
        ]
        stderr = _stderr([a["value"] * x - b["value"] * y for x, y in moved])
        # A ratio is the exponential of a difference of means: what both share in a window cancels.
        relative_stderr = _stderr([a["value"] / b["value"] * (x - y) for x, y in moved])
    return Difference(a["value"] - b["value"], stderr, baseline.label, b["value"], relative_stderr)


def _weights_of_windows(windows: int, figure: Mapping[str, Any]) -> list[float]:
    """Return the weight of each of the ``windows`` of a perplexity in its mean, 1 on average.

    Each but the first predicts the tokens of one stride, or as many as the first if that has fewer.
    """
    stride, predicted = figure.get("stride"), figure.get("predicted")
    if not (stride and predicted and windows):
        return [1.0] * windows
    mean = predicted / windows
    later = min(stride / mean, 1.0)
    return [windows - (windows - 1) * later, *[later] * (windows - 1)]


def accuracy_difference(
    entry: Entry, entries: Sequence[Entry], tasks: Sequence[str], baselines: Collection[str]
) -> Difference | None:
    """Return the mean accuracy of ``entry`` over ``tasks`` minus the best baseline's at its sparsity.

    Returns:
        None if ``entry`` or every baseline lacks one of ``tasks``.
    """
    if not tasks or not has_accuracies(entry, tasks):
        return None
    rivals = [r for r in _rivals(entry, entries, baselines) if has_accuracies(r, tasks)]
    if not rivals:
        return None
    best = max(rivals, key=lambda rival: mean_accuracy(rival, tasks))
    errors = [_task_stderr(entry.tasks[task], best.tasks[task]) for task in tasks]
    known = [error for error in errors if error is not None]
    return Difference(
        mean_accuracy(entry, tasks) - mean_accuracy(best, tasks),
        math.sqrt(sum(e * e for e in known)) / len(tasks) if len(known) == len(errors) else None,
        best.label,
        mean_accuracy(best, tasks),
    )


def shared_tasks(entries: Sequence[Entry]) -> list[str]:
    """Return the tasks with an accuracy in every entry that has any, over which means are comparable."""
    sets = [{task for task, found in entry.tasks.items() if "acc" in found} for entry in entries]
    return sorted(set.intersection(*filter(None, sets))) if any(sets) else []


def has_accuracies(entry: Entry, tasks: Sequence[str]) -> bool:
    """Return whether ``entry`` has the accuracy of each of ``tasks``."""
    return all("acc" in entry.tasks.get(task, {}) for task in tasks)


def mean_accuracy(entry: Entry, tasks: Sequence[str]) -> float:
    """Return the mean of ``acc`` over ``tasks``, each with the same weight."""
    return sum(float(entry.tasks[task]["acc"]) for task in tasks) / len(tasks)


def mean_accuracy_stderr(entry: Entry, tasks: Sequence[str]) -> float | None:
    """Return the standard error of :func:`mean_accuracy`; None if a task has none."""
    errors = [entry.tasks[task].get("acc_stderr") for task in tasks]
    known = [float(error) for error in errors if error is not None]
    return math.sqrt(sum(e * e for e in known)) / len(tasks) if len(known) == len(errors) else None


def _rivals(entry: Entry, entries: Sequence[Entry], baselines: Collection[str]) -> list[Entry]:
    return [
        other
        for other in entries
        if other is not entry
        and other.method in baselines
        and entry.method not in ("dense", *baselines)
        and other.model == entry.model
        and other.pattern == entry.pattern
        and abs(other.sparsity - entry.sparsity) < SAME_SPARSITY
    ]


def _task_stderr(a: dict[str, Any], b: dict[str, Any]) -> float | None:
    answers_a, answers_b = answers_of(a), answers_of(b)
    if not answers_a or len(answers_a) != len(answers_b):
        return None
    return _stderr([int(x) - int(y) for x, y in zip(answers_a, answers_b, strict=True)])


def answers_of(task: Mapping[str, Any]) -> str:
    """Return for each question of a task 1 or 0, right or wrong.

    Returns:
        None of them if they are not its accuracy, as of shares that were cut to 0.
    """
    answers = str(task.get("correct", ""))
    right = answers.count("1") / max(len(answers), 1)
    return answers if abs(right - task.get("acc", right)) < 0.5 / max(len(answers), 1) else ""


def _stderr(values: Sequence[float]) -> float | None:
    if len(values) < 2:
        return None
    mean = sum(values) / len(values)
    # A product overflows to infinity, whereas a power raises.
    error = math.sqrt(sum((v - mean) * (v - mean) for v in values) / (len(values) - 1) / len(values))
    return error if math.isfinite(error) else None  # infinite for the perplexities of broken models
