"""What the report opens with: the best rows of every model in one table and one picture, and where they lose."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.headline.experiment import UNSTRUCTURED
from experiments.headline.measured import Group, Measured, by_model, groups
from experiments.headline.tables import figure, seconds_in_all
from leap_pl.comparison.differences import (
    SAME_SPARSITY,
    accuracy_difference,
    perplexity_difference,
    perplexity_difference_to,
    shared_tasks,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from leap_pl.comparison.drawing import Picture

SPARSITIES = (0.5, 0.6)
LETTERS = 90  # longest name in the picture
SURE = 2  # standard errors from which on two rows are told apart
TICKS = (0.1, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 7, 10, 20, 50, 100, 1000)


def best_rows(found: Sequence[Measured]) -> list[Measured]:
    """Of every model the dense one and, at :data:`SPARSITIES`, the best baselines and learned rows of each text."""
    rows = []
    for of_model in by_model(found).values():
        rows += [m for m in of_model if m.is_dense]
        for group in sorted(groups(of_model), key=lambda group: group.sparsity):
            if group.table == UNSTRUCTURED and group.sparsity in SPARSITIES:
                rows += [*group.best_baselines, *group.best_learned_by_tokens]
    return rows


def draw_overview(rows: Sequence[Measured], folder: Path) -> "Picture | None":
    """Draw how many times the dense model's the perplexities of ``rows`` are, on every text; None without any."""
    from leap_pl.comparison.drawing import CHARACTER, COLOURS, MARKERS, drawing, literal, save

    models = {model: times for model, of_model in by_model(rows).items() if (times := _times_dense(of_model))}
    if not models:
        return None
    titles = list(dict.fromkeys(title for times in models.values() for of_row in times.values() for title in of_row))
    labels = [literal(label, LETTERS) for times in models.values() for label in times]
    with drawing():
        from matplotlib.figure import Figure

        heights = [0.6 + len(times) for times in models.values()]
        size = (5.0 + CHARACTER * max(map(len, labels)), 1.2 + 0.27 * sum(heights) + 0.25 * len(models))
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(len(models), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        for axes, (model, times) in zip(panels, models.items(), strict=True):
            for n, title in enumerate(titles):
                points = [(of_row[title], y) for y, of_row in enumerate(times.values()) if title in of_row]
                axes.plot(
                    *zip(*points, strict=True) if points else ((), ()),
                    MARKERS[n % len(MARKERS)],
                    color=COLOURS[n % len(COLOURS)],
                    label=literal(title),
                )
            axes.set_yticks(range(len(times)), [literal(label, LETTERS) for label in times])
            axes.set_ylim(len(times) - 0.4, -0.6)
            axes.axvline(1, color="0.35", linestyle="--", linewidth=1.2)
            axes.set_title(literal(model), fontsize="medium", loc="left")
            axes.grid(color="0.9", linewidth=0.8)
        every = [of_row for times in models.values() for of_row in times.values()]
        _ticks(panels[-1], [times for of_row in every for times in of_row.values()])
        panels[-1].set_xlabel("perplexity ÷ the dense model's (left is better; logarithmic)")
        handles, names = panels[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper right", ncols=len(titles), frameon=False)
        caption = (
            "Perplexity of the rows of the table above, divided by the dense model's on the same text; logarithmic, "
            "lower is better. The dashed line is the dense model."
        )
        return save(figure, folder, "overview", caption)


def verdict(found: Sequence[Measured]) -> str:
    """A sentence on how many rows that learn are better than the best baseline; empty where none can be compared.

    In perplexity a row that has no baseline of its form is compared to those of other forms, as :func:`losses` does.
    """
    better, perplexities, accurate, accuracies = 0, 0, 0, 0
    for group, m in _of_learning(found):
        for title in m.titles.values():
            gap = perplexity_difference(m.entry, group.entries, title, group.baselines)
            more = _to_other_forms(m, group, title) if gap is None else (gap.value, gap.stderr)
            perplexities += more is not None
            better += more is not None and _is_above(-more[0], more[1])
        score = accuracy_difference(m.entry, group.entries, shared_tasks(group.entries), group.baselines)
        accuracies += score is not None
        accurate += score is not None and _is_above(score.value, score.stderr)
    if not perplexities:
        return ""
    told = (
        f"What was learned has a lower perplexity than the best method that does not learn, by more than {SURE} "
        f"standard errors, in {better} of {perplexities} comparisons of a row on a text"
    )
    return told + (f", and a higher mean accuracy in {accurate} of {accuracies}." if accuracies else ".")


def _is_above(value: float, stderr: float | None) -> bool:
    """Whether a difference is more than :data:`SURE` standard errors above 0; one whose error is not known is not."""
    return stderr is not None and value > SURE * stderr


def _of_learning(found: Sequence[Measured]) -> Iterator[tuple[Group, Measured]]:
    """The rows that are no baselines, each with its group."""
    for of_model in by_model(found).values():
        for group in groups(of_model):
            yield from ((group, m) for m in group.rows if not m.cell["baseline"])


def losses(found: Sequence[Measured], rows: Sequence[Measured]) -> list[str]:
    """Sentences on where what is learned is worse: than the dense model, than a baseline, and in minutes.

    Args:
        found: All cells.
        rows: Those of :func:`best_rows`.
    """
    told = []
    several = len(by_model(found)) > 1
    by_text: dict[str, list[float]] = {}
    for of_model in by_model(rows).values():
        for of_row in _times_dense([m for m in of_model if m.is_dense or m.is_learned]).values():
            for title, times in of_row.items():
                by_text.setdefault(title, []).append(times)
    if by_text:
        spans = [f"{_span(times, '.2f')} on {title}" for title, times in by_text.items()]
        told.append(f"The learned masks above have {', '.join(spans)}, as times of the dense model's perplexity.")
    worse, alike, compared = [], [], 0
    below, asked = [], 0
    for group, m in _of_learning(found):
        name = f"{m.model}, {m.entry.label}" if several else m.entry.label
        for title in m.titles.values():
            gap = perplexity_difference(m.entry, group.entries, title, group.baselines)
            if gap is not None and _is_above(gap.value, gap.stderr):
                worse.append(f"{name}, {title} ({gap.value:+.2f})")
            elif gap is None and (other := _to_other_forms(m, group, title)) is not None and _is_above(*other):
                worse.append(f"{name}, {title} ({other[0]:+.2f}, to a mask of another form)")
        score = accuracy_difference(m.entry, group.entries, shared_tasks(group.entries), group.baselines)
        if score is not None:
            compared += 1
            if not _is_above(score.value, score.stderr):
                alike.append(f"{name} ({100 * score.value:+.1f})")
        for task in shared_tasks(group.entries):
            score = accuracy_difference(m.entry, group.entries, [task], group.baselines)
            if score is not None:
                asked += 1
                if _is_above(-score.value, score.stderr):
                    below.append(f"{name}, {task} ({100 * score.value:+.1f})")
    if worse:
        told.append(f"In perplexity, more than {SURE} standard errors above the best baseline: {'; '.join(worse)}.")
    if alike:
        told.append(
            f"In mean accuracy, {len(alike)} of {compared} rows are less than {SURE} standard errors above the best "
            f"baseline (difference in points): {'; '.join(alike)}."
        )
    if below:
        told.append(
            f"In single tasks, more than {SURE} standard errors below the baseline that is best at it, in "
            f"{len(below)} of {asked} comparisons (difference in points): {'; '.join(below)}."
        )
    trained = [line for of_model in by_model(found).values() for line in _above_trained_weights(of_model)]
    if trained:
        told.append(f"Above weights that were trained for as many tokens under a one-shot mask: {'; '.join(trained)}.")
    cells = {m.cell["name"]: m for m in found}
    minutes = {
        learned: [s / 60 for m in rows if m.is_learned is learned and (s := seconds_in_all(m, cells)) is not None]
        for learned in (True, False)
    }
    if all(minutes.values()):
        told.append(f"Learning took {_span(minutes[True])} minutes, the best baselines {_span(minutes[False])}.")
    return told


def _above_trained_weights(of_model: Sequence[Measured]) -> Iterator[str]:
    """Rows with a higher perplexity than the trained weights of a one-shot mask, from as much of the same text."""
    for group in groups(of_model):
        one_shot = {m.cell["name"] for m in group.rows if m.cell["baseline"]}
        trained = [m for m in group.rows if m.cell.get("mask_of") in one_shot]
        for m in (m for m in group.rows if not m.cell["baseline"] and m not in trained):
            for other in (o for o in trained if o.cell["tokens"] == m.cell["tokens"]):
                for role, title in m.titles.items():
                    if role in other.titles:
                        more = perplexity_difference_to(m.entry, other.entry, title)
                        if more.value > 0:
                            told = figure(more.value, more.stderr, signed=True)
                            yield f"{m.entry.label}, {title} ({told}, {other.entry.label})"


def _to_other_forms(measured: Measured, group: Group, title: str) -> tuple[float, float | None] | None:
    """How much worse a row that has no baseline of its form is than the best of other forms at its sparsity.

    Returns:
        The difference, and its standard error, paired where windows are known, else from those of both figures, if they
        are; None without a baseline.
    """
    own = measured.entry.perplexity.get(title)
    others = [
        m.entry
        for m in group.rows
        if m.cell["baseline"] and title in m.entry.perplexity
        if m.entry.pattern != measured.entry.pattern
        if abs(m.entry.sparsity - measured.entry.sparsity) < SAME_SPARSITY
    ]
    if own is None or not others:
        return None
    best = min(others, key=lambda other: float(other.perplexity[title]["value"]))
    gap = perplexity_difference_to(measured.entry, best, title)
    if gap.stderr is not None:
        return gap.value, gap.stderr
    errors = own["stderr"], best.perplexity[title]["stderr"]
    return gap.value, None if None in errors else math.hypot(*errors)


def _span(values: Sequence[float], form: str = ".0f") -> str:
    """The least and the greatest value, or the only one."""
    least, most = (format(value, form) for value in (min(values), max(values)))
    return least if least == most else f"{least} to {most}"


def _times_dense(of_model: Sequence[Measured]) -> dict[str, dict[str, float]]:
    """Label → text → perplexity by the dense model's, of the other rows of one model; empty without the dense one."""
    dense = next((m for m in of_model if m.is_dense), None)
    if dense is None:
        return {}
    return {
        m.entry.label: {
            title: m.perplexity(role)["value"] / dense.perplexity(role)["value"]
            for role, title in m.titles.items()
            if role in dense.titles
        }
        for m in of_model
        if not m.is_dense
    }


def _ticks(axes: "Axes", shown: Sequence[float]) -> None:
    """Make the x axis logarithmic, with 1 and all of ``shown`` in it, labelled with plain numbers."""
    from matplotlib.ticker import FixedLocator, NullFormatter, StrMethodFormatter

    axes.set_xscale("log")
    low, high = 0.95 * min(1, *shown), 1.1 * max(1.1, *shown)
    axes.set_xlim(low, high)
    axes.xaxis.set_major_locator(FixedLocator([tick for tick in TICKS if low <= tick <= high]))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
