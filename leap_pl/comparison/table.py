"""Table of a comparison, one row per entry, as text, Markdown and CSV."""

import csv
import io
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leap_pl.base_model.prefix import in_words
from leap_pl.comparison.differences import (
    Difference,
    accuracy_difference,
    has_accuracies,
    mean_accuracy,
    mean_accuracy_stderr,
    perplexity_difference,
    shared_tasks,
)
from leap_pl.comparison.entries import Entry
from leap_pl.escape import markdown, terminal
from leap_pl.inputs.plain_values import plain

ROUNDING = 0.005  # largest difference by rounding between densities with the same target
DIFFERENCE = "− best baseline"  # heading of the column after a figure
MOST_SPELLED_OUT = 1e9  # larger figures, of broken models, are written with an exponent
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what text that a spreadsheet computes begins with
PAGE = 8  # columns that fit the width of a page


@dataclass(frozen=True)
class Table:
    """Table with formatted cells for readers, and values with full precision for machines.

    Attributes:
        headings: Headings of the formatted columns; the first column names the row.
        rows: Formatted cells.
        keys: Names of the CSV's columns.
        values: Values of the CSV's columns.
        notes: Notes needed to read the figures.
        parts: Indices of ``headings``, split into tables that are narrow enough for a page.
    """

    headings: list[str]
    rows: list[list[str]]
    keys: list[str]
    values: list[list[str | float | None]]
    notes: list[str]
    parts: list[list[int]]

    def tables(self, parts: list[list[int]] | None = None) -> list[list[list[str]]]:
        """Return headings and rows of each part, without the rows that have no figure in a part after the first."""
        found = []
        for number, columns in enumerate(self.parts if parts is None else parts):
            rows = [[row[n] for n in columns] for row in self.rows]
            found.append([[self.headings[n] for n in columns], *(row for row in rows if number == 0 or any(row[1:]))])
        return found

    def markdown(self) -> str:
        """Return Markdown tables followed by the notes."""
        written = []
        for headings, *rows in self.tables():
            lines = [
                map(markdown, headings),
                ["---", *["---:"] * (len(headings) - 1)],
                *(map(markdown, r) for r in rows),
            ]
            written.append("\n".join("| " + " | ".join(cells) + " |" for cells in lines))
        return "\n\n".join([*written, *map(markdown, self.notes)]) + "\n"

    def csv(self) -> str:
        """Return CSV with one column per figure and numbers in full precision."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(_no_formula(plain(key)) for key in self.keys)  # a file may have a name that is no Unicode
        writer.writerows(["" if value is None else _no_formula(plain(value)) for value in row] for row in self.values)
        return buffer.getvalue()

    def text(self, width: int | None = None) -> str:
        """Return text for the terminal, split into tables of at most ``width`` characters a line if it is given."""
        widths = [max(len(line[n]) for line in (self.headings, *self.rows)) for n in range(len(self.headings))]
        parts = (
            [list(range(len(widths)))]
            if width is None
            else _fitting(widths, width, {n for n, h in enumerate(self.headings) if h == DIFFERENCE})
        )
        written = []
        for columns, (headings, *rows) in zip(parts, self.tables(parts), strict=True):
            rule = ["-" * widths[n] for n in columns]
            lines = [
                [cell.rjust(widths[n]) if n else cell.ljust(widths[n]) for n, cell in zip(columns, line, strict=True)]
                for line in (headings, rule, *rows)
            ]
            written.append("\n".join("  ".join(line).rstrip() for line in lines))
        notes = ["\n".join(textwrap.fill(note, width) if width else note for note in self.notes)] if self.notes else []
        return "\n\n".join([*written, *notes])


def _no_formula(value: Any) -> Any:
    """Return ``value`` for a cell of CSV: text that a spreadsheet would compute gets an apostrophe before it."""
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value


def _fitting(widths: list[int], width: int, tied: set[int]) -> list[list[int]]:
    """Split columns into parts that fit ``width``, each starting with column 0 and keeping ``tied`` ones together.

    A column in ``tied`` stays in the part of the one before it.
    """
    groups: list[list[int]] = []
    for n in range(1, len(widths)):
        if n in tied:
            groups[-1].append(n)
        else:
            groups.append([n])
    parts = [[0]]
    for group in groups:
        if len(parts[-1]) > 1 and sum(widths[n] + 2 for n in parts[-1] + group) - 2 > width:
            parts.append([0])
        parts[-1] += group
    return parts


@dataclass(frozen=True)
class _Column:
    """Formatted column with its CSV columns.

    Attributes:
        heading: Heading of the formatted column.
        keys: Names of the CSV columns.
        read: Function from an entry to its formatted cell and a value for each key.
    """

    heading: str
    keys: list[str]
    read: Callable[[Entry], tuple[str, list[str | float | None]]]


def make_table(entries: Sequence[Entry], baselines: Collection[str]) -> Table:
    """Return the table of ``entries``, with differences to the best of the methods ``baselines``."""
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
    # Omit columns without a figure, and the column of a single task, which equals the mean.
    shown = [n for n in range(len(columns)) if any(row[n][0] for row in read) and columns[n].keys[0] not in twice]
    single = [place for place, n in enumerate(shown) if columns[n].keys[0].startswith("tasks.")]
    rest = [place for place in range(len(shown)) if place not in single]
    return Table(
        headings=[terminal(columns[n].heading) for n in shown],
        rows=[[terminal(row[n][0]) for n in shown] for row in read],
        keys=[key for column in columns for key in column.keys],
        values=[[value for _, values in row for value in values] for row in read],
        notes=[terminal(note) for note in _notes(entries, texts, tasks, baselines)],
        parts=[rest, [0, *single]] if single and len(shown) > PAGE else [rest + single],
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
        _Column(DIFFERENCE, [f"{key}.minus_baseline", f"{key}.minus_baseline_stderr"], difference),
    ]


def _accuracy_columns(tasks: list[str], entries: Sequence[Entry], baselines: Collection[str]) -> list[_Column]:
    def figure(entry: Entry) -> tuple[str, list[str | float | None]]:
        if not has_accuracies(entry, tasks):
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
        _Column(DIFFERENCE, ["accuracy.minus_baseline", "accuracy.minus_baseline_stderr"], difference),
    ]


def _task_column(task: str) -> _Column:
    def figure(entry: Entry) -> tuple[str, list[str | float | None]]:
        found = entry.tasks.get(task, {})
        value, stderr = found.get("acc"), found.get("acc_stderr")
        return _figure(value, stderr, 1, 100), [value, stderr]

    return _Column(f"{task}, %", [f"tasks.{task}.acc", f"tasks.{task}.acc_stderr"], figure)


def short_names(texts: Sequence[str]) -> dict[str, str]:
    """Map each text to its file name, or to its whole path if two share a file name."""
    counts = Counter(Path(text).name for text in texts)
    return {text: Path(text).name if counts[Path(text).name] == 1 else text for text in texts}


def all_texts(entries: Sequence[Entry]) -> list[str]:
    """Return every text that a perplexity was measured on, in order of first appearance."""
    return list(dict.fromkeys(text for entry in entries for text in entry.perplexity))


def is_level(entry: Entry) -> bool:
    """Return whether a mask has the same density everywhere, up to rounding, so that a heat map would show nothing.

    Rounding to whole weights a row depends on a projection's width, and is the same in every layer.
    """
    by_projection: dict[str, list[float]] = {}
    for (_, projection), density in entry.densities.items():
        by_projection.setdefault(projection, []).append(density)
    spreads = [max(densities) - min(densities) for densities in by_projection.values()]
    whole = max(entry.densities.values()) - min(entry.densities.values())
    return max(spreads) < 1e-6 and whole < ROUNDING


def _notes(entries: Sequence[Entry], texts: list[str], tasks: list[str], baselines: Collection[str]) -> list[str]:
    """Return the notes needed to read the figures."""
    notes = []
    models = sorted({entry.model for entry in entries})
    if len(models) > 1:
        notes.append(
            f"The rows are of {len(models)} base models, {', '.join(models)}: compare rows of one model only, as the "
            "differences do."
        )
    for text in texts:
        found = next(entry.perplexity[text] for entry in entries if text in entry.perplexity)
        windows = ", ".join([f"windows of {found['seq_length']} tokens", *in_words(found)])
        part = " of its held-out part" if found.get("share") == "held_out" else ""
        part += f" of its configuration {found['config_name']}" if found.get("config_name") else ""
        part += f" of its split {found['split']}" if found.get("split") else ""
        notes.append(
            f"Perplexity on {text}: {windows}, stride {found['stride']}, {found['tokens']:,} tokens{part}. Lower is "
            "better."
        )
    limits = sorted({found["limit"] for entry in entries for found in entry.tasks.values() if found["limit"]})
    if limits:
        notes.append(
            f"Accuracy is a quick look, at the first {' or '.join(map(str, limits))} questions of each task only."
        )
    others = sorted({task for entry in entries for task, found in entry.tasks.items() if "acc" not in found})
    if others:
        notes.append(f"Not shown: {', '.join(others)}, which have no accuracy; their scores are in the result files.")
    if tasks:
        splits = {task: next(e.tasks[task]["split"] for e in entries if task in e.tasks) for task in tasks}
        over = "Mean accuracy over " if len(tasks) > 1 else "Accuracy on "
        notes.append(over + ", ".join(f"{task} ({split})" for task, split in splits.items()) + ".")
    if texts or tasks:
        notes.append(
            f"± is one standard error. Best baseline: the best of {', '.join(sorted(baselines))} at the same "
            "sparsity; the error of a difference is that of paired windows or questions."
        )
    of_dtype: dict[str, list[str]] = {}
    for entry in entries:
        if entry.measured and entry.dtype is not None:
            of_dtype.setdefault(entry.dtype, []).append(entry.label)
    if len(of_dtype) > 1:
        named = "; ".join(f"in {dtype} {', '.join(labels)}" for dtype, labels in sorted(of_dtype.items()))
        notes.append(f"Not all were measured in one data type, and part of a difference may be rounding: {named}.")
    level = [entry.label for entry in entries if entry.densities and is_level(entry)]
    if level:
        notes.append(f"Of the same density in every decoder layer and projection, and not drawn: {', '.join(level)}.")
    return notes


def _pair(difference: Difference | None) -> list[str | float | None]:
    return [None, None] if difference is None else [difference.value, difference.stderr]


def _figure(value: float | None, stderr: float | None, digits: int, scale: float = 1) -> str:
    if value is None:
        return ""
    error = "" if stderr is None else f" ± {spelled(scale * stderr, digits)}"
    return f"{spelled(scale * value, digits)}{error}"


def spelled(value: float, digits: int, sign: str = "") -> str:
    """Return ``value`` with ``digits`` decimals, or with an exponent if its magnitude is large."""
    return f"{value:{sign}.{digits}f}" if abs(value) < MOST_SPELLED_OUT else f"{value:{sign}.3g}"


def _difference(difference: Difference | None, scale: float) -> str:
    if difference is None:
        return ""
    error = "" if difference.stderr is None else f" ± {spelled(scale * difference.stderr, 2)}"
    # The baseline's sparsity is omitted, since it is that of the row; of a label with a file name, that is enough.
    named = re.search(r"\((.*)\)$", difference.baseline)
    baseline = named[1] if named else re.sub(r" [0-9]+%", "", difference.baseline, count=1)
    return f"{spelled(scale * difference.value, 2, '+')}{error} ({baseline})"
