"""The table of a comparison: one row for each thing compared, in text, Markdown and CSV."""

import csv
import io
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from leap_pl.comparison.differences import (
    Difference,
    accuracy_difference,
    mean_accuracy,
    mean_accuracy_stderr,
    perplexity_difference,
    shared_tasks,
)
from leap_pl.comparison.entries import Entry

LEVEL = 0.005  # densities nearer than this are one


@dataclass(frozen=True)
class Table:
    """Headings and rows for the eye, and the same with full precision for machines."""

    headings: list[str]
    rows: list[list[str]]
    keys: list[str]
    values: list[list[str | float | None]]
    notes: list[str]

    def markdown(self) -> str:
        """As a Markdown table with its notes below."""
        lines = [self.headings, ["---", *["---:"] * (len(self.headings) - 1)], *self.rows]
        table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        return table + "\n\n" + "\n\n".join(self.notes) + "\n"

    def csv(self) -> str:
        """As CSV, one column a figure, numbers in full precision."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(self.keys)
        writer.writerows(["" if value is None else value for value in row] for row in self.values)
        return buffer.getvalue()

    def text(self) -> str:
        """For the terminal."""
        lines = [self.headings, *self.rows]
        widths = [max(len(line[column]) for line in lines) for column in range(len(self.headings))]
        aligned = [
            "  ".join(
                cell.ljust(width) if column == 0 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        rule = "  ".join("-" * width for width in widths)
        return "\n".join([aligned[0], rule, *aligned[1:], *(["", *self.notes] if self.notes else [])])


@dataclass(frozen=True)
class _Column:
    """One heading, the keys that it is in the CSV, and how a row is read: its cell, and a value for each key."""

    heading: str
    keys: list[str]
    read: Callable[[Entry], tuple[str, list[str | float | None]]]


def make_table(entries: Sequence[Entry], baselines: Collection[str]) -> Table:
    """The table of ``entries``; ``baselines`` are the methods whose best is the measure of the others."""
    texts, tasks = all_texts(entries), shared_tasks(entries)
    columns = [
        _Column("model", ["label", "method", "base_model", "source"], _describe),
        _Column("sparsity, %", ["sparsity"], lambda entry: (f"{100 * entry.sparsity:.2f}", [entry.sparsity])),
    ]
    for text, name in short_names(texts).items():
        columns += _perplexity_columns(text, name, entries, baselines)
    if tasks:
        columns += _accuracy_columns(tasks, entries, baselines)
    columns += [_task_column(task) for task in sorted({task for entry in entries for task in entry.tasks})]
    twice = [f"tasks.{task}.acc" for task in tasks] if len(tasks) == 1 else []
    read = [[column.read(entry) for column in columns] for entry in entries]
    # A column that is empty in every row tells a reader nothing, nor does the only task beside the mean of one.
    shown = [n for n in range(len(columns)) if any(row[n][0] for row in read) and columns[n].keys[0] not in twice]
    return Table(
        headings=[columns[n].heading for n in shown],
        rows=[[row[n][0] for n in shown] for row in read],
        keys=[key for column in columns for key in column.keys],
        values=[[value for _, values in row for value in values] for row in read],
        notes=_notes(entries, texts, tasks, baselines),
    )


def _describe(entry: Entry) -> tuple[str, list[str | float | None]]:
    return entry.label, [entry.label, entry.method, entry.base_model, entry.source]


def _perplexity_columns(text: str, name: str, entries: Sequence[Entry], baselines: Collection[str]) -> list[_Column]:
    def figure(entry: Entry) -> tuple[str, list[str | float | None]]:
        found = entry.perplexity.get(text, {})
        value, stderr = found.get("value"), found.get("stderr")
        return _figure(value, stderr, 2), [value, stderr]

    def difference(entry: Entry) -> tuple[str, list[str | float | None]]:
        found = perplexity_difference(entry, entries, text, baselines)
        return _difference(found, 1), _pair(found)

    key = f"perplexity.{text}"
    return [
        _Column(f"perplexity, {name}", [f"{key}.value", f"{key}.stderr"], figure),
        _Column("− best baseline", [f"{key}.minus_baseline", f"{key}.minus_baseline_stderr"], difference),
    ]


def _accuracy_columns(tasks: list[str], entries: Sequence[Entry], baselines: Collection[str]) -> list[_Column]:
    def figure(entry: Entry) -> tuple[str, list[str | float | None]]:
        if not all(task in entry.tasks for task in tasks):
            return "", [None, None]
        value, stderr = mean_accuracy(entry, tasks), mean_accuracy_stderr(entry, tasks)
        return _figure(value, stderr, 2, 100), [value, stderr]

    def difference(entry: Entry) -> tuple[str, list[str | float | None]]:
        found = accuracy_difference(entry, entries, tasks, baselines)
        return _difference(found, 100), _pair(found)

    return [
        _Column(
            f"mean accuracy of {len(tasks)} tasks, %" if len(tasks) > 1 else f"{tasks[0]}, %",
            ["accuracy.value", "accuracy.stderr"],
            figure,
        ),
        _Column("− best baseline", ["accuracy.minus_baseline", "accuracy.minus_baseline_stderr"], difference),
    ]


def _task_column(task: str) -> _Column:
    def figure(entry: Entry) -> tuple[str, list[str | float | None]]:
        found = entry.tasks.get(task, {})
        value, stderr = found.get("acc"), found.get("acc_stderr")
        return _figure(value, stderr, 1, 100), [value, stderr]

    return _Column(f"{task}, %", [f"tasks.{task}.acc", f"tasks.{task}.acc_stderr"], figure)


def short_names(texts: Sequence[str]) -> dict[str, str]:
    """Each text's file name, or the whole path where two share a file name."""
    counts = Counter(Path(text).name for text in texts)
    return {text: Path(text).name if counts[Path(text).name] == 1 else text for text in texts}


def all_texts(entries: Sequence[Entry]) -> list[str]:
    """Every text that a perplexity was measured on, in order of first appearance."""
    return list(dict.fromkeys(text for entry in entries for text in entry.perplexity))


def is_level(entry: Entry) -> bool:
    """Whether a mask keeps the same share everywhere, so that a picture of where it prunes shows nothing."""
    return max(entry.densities.values()) - min(entry.densities.values()) < LEVEL


def _notes(entries: Sequence[Entry], texts: list[str], tasks: list[str], baselines: Collection[str]) -> list[str]:
    """What must be known to read the figures."""
    notes = []
    for text in texts:
        found = next(entry.perplexity[text] for entry in entries if text in entry.perplexity)
        notes.append(
            f"Perplexity on {text}: windows of {found['seq_length']} tokens, stride {found['stride']}, "
            f"{found['tokens']:,} tokens. Lower is better."
        )
    limits = sorted({found["limit"] for entry in entries for found in entry.tasks.values() if found["limit"]})
    if limits:
        notes.append(
            f"Accuracy is a quick look, at the first {', '.join(map(str, limits))} questions of each task only."
        )
    if tasks:
        splits = {task: next(e.tasks[task]["split"] for e in entries if task in e.tasks) for task in tasks}
        over = "Mean accuracy over " if len(tasks) > 1 else "Accuracy on "
        notes.append(over + ", ".join(f"{task} ({split})" for task, split in splits.items()) + ".")
    if texts or tasks:
        notes.append(
            f"± is one standard error. Best baseline: the best of {', '.join(sorted(baselines))} at the same "
            "sparsity; the error of a difference is that of paired windows or questions."
        )
    level = [entry.label for entry in entries if entry.densities and is_level(entry)]
    if level:
        notes.append(f"Of one density in every decoder layer and projection, and not drawn: {', '.join(level)}.")
    return notes


def _pair(difference: Difference | None) -> list[str | float | None]:
    return [None, None] if difference is None else [difference.value, difference.stderr]


def _figure(value: float | None, stderr: float | None, digits: int, scale: float = 1) -> str:
    if value is None:
        return ""
    error = "" if stderr is None else f" ± {scale * stderr:.{digits}f}"
    return f"{scale * value:.{digits}f}{error}"


def _difference(difference: Difference | None, scale: float) -> str:
    if difference is None:
        return ""
    error = "" if difference.stderr is None else f" ± {scale * difference.stderr:.2f}"
    return f"{scale * difference.value:+.2f}{error} ({difference.baseline})"
