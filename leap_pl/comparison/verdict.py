"""Verdict of a comparison in one sentence: the best result at each sparsity."""

from collections.abc import Collection, Sequence

from leap_pl.comparison.differences import (
    SAME_SPARSITY,
    accuracy_difference,
    has_accuracies,
    mean_accuracy,
    perplexity_difference,
    shared_tasks,
)
from leap_pl.comparison.entries import Entry
from leap_pl.comparison.table import all_texts, short_names, spelled
from leap_pl.escape import terminal


def verdict(entries: Sequence[Entry], baselines: Collection[str]) -> str:
    """Return the result with the lowest perplexity on the first text at each sparsity, in a sentence.

    Without a perplexity it is the highest mean accuracy; the sentence is empty if nothing was measured.
    """
    texts, tasks = all_texts(entries), shared_tasks(entries)
    if texts:
        return terminal(_of_text(entries, texts[0], short_names(texts)[texts[0]], baselines))
    return terminal(_of_tasks(entries, tasks, baselines)) if tasks else ""


def _of_text(entries: Sequence[Entry], text: str, name: str, baselines: Collection[str]) -> str:
    def value(entry: Entry) -> float:
        return float(entry.perplexity[text]["value"])

    measured = [entry for entry in entries if text in entry.perplexity]
    dense = {entry.model: value(entry) for entry in measured if entry.method == "dense"}
    parts = []
    for group in _at_one_sparsity(measured):
        best = min(group, key=value)
        words = [spelled(value(best), 2)]
        found = perplexity_difference(best, entries, text, baselines)
        words += [] if found is None else [_against(found.relative, found.baseline)]
        words += [f"dense {spelled(dense[best.model], 2)}"] if best.model in dense else []
        parts.append(f"{best.label} with {', '.join(words)}")
    return f"Lowest perplexity on {name}: {'; '.join(parts)}." if parts else ""


def _of_tasks(entries: Sequence[Entry], tasks: Sequence[str], baselines: Collection[str]) -> str:
    def value(entry: Entry) -> float:
        return mean_accuracy(entry, tasks)

    measured = [entry for entry in entries if has_accuracies(entry, tasks)]
    dense = {entry.model: value(entry) for entry in measured if entry.method == "dense"}
    parts = []
    for group in _at_one_sparsity(measured):
        best = max(group, key=value)
        words = [f"{value(best):.1%}"]
        found = accuracy_difference(best, entries, tasks, baselines)
        words += [] if found is None else [f"{100 * found.value:+.1f} points against {found.baseline}"]
        words += [f"dense {dense[best.model]:.1%}"] if best.model in dense else []
        parts.append(f"{best.label} with {', '.join(words)}")
    return f"Highest mean accuracy: {'; '.join(parts)}." if parts else ""


def _at_one_sparsity(entries: Sequence[Entry]) -> list[list[Entry]]:
    """Return the pruned entries in groups of one base model and, as in the table, of one sparsity."""
    groups: list[list[Entry]] = []
    for entry in entries:
        if entry.method != "dense":
            alike = (of for of in groups if of[0].model == entry.model and _same(of[0].sparsity, entry.sparsity))
            if (group := next(alike, None)) is None:
                groups.append(group := [])
            group.append(entry)
    return groups


def _same(sparsity: float, other: float) -> bool:
    return abs(sparsity - other) < SAME_SPARSITY


def _against(relative: float, baseline: str) -> str:
    return f"{abs(relative):.0%} {'below' if relative < 0 else 'above'} {baseline}"
