"""Plots of a comparison, as SVG, readable in greyscale and with colour blindness."""

import math
from collections import Counter
from collections.abc import Collection, Sequence
from itertools import combinations, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leap_pl.comparison.differences import (
    SAME_SPARSITY,
    Difference,
    accuracy_difference,
    has_accuracies,
    mean_accuracy,
    mean_accuracy_stderr,
    perplexity_difference,
    shared_tasks,
)
from leap_pl.comparison.drawing import (
    CHARACTER,
    COLOURS,
    MARKERS,
    MOST_INCHES,
    WIDEST,
    Picture,
    drawing,
    figure_of,
    literal,
    save,
    slug,
)
from leap_pl.comparison.entries import Entry
from leap_pl.comparison.overlap import Overlap, overlap
from leap_pl.comparison.table import all_texts, is_level, short_names, spelled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FARTHEST = 1e100  # largest magnitude that is drawn


def draw_all(entries: Sequence[Entry], baselines: Collection[str], folder: Path) -> list[Picture]:
    """Draw all pictures of ``entries`` into ``folder``, and return them in reading order."""
    with drawing():
        pictures = draw_perplexities(entries, folder)
        texts, tasks = all_texts(entries), shared_tasks(entries)
        scored = [entry for entry in entries if tasks and has_accuracies(entry, tasks)]
        if scored:
            errors = {entry.label: mean_accuracy_stderr(entry, tasks) for entry in scored}
            points = [(e, 100 * mean_accuracy(e, tasks), _times(errors[e.label], 100)) for e in scored]
            one = f"accuracy on {literal(tasks[0])}, %"
            ylabel = f"mean accuracy of {len(tasks)} tasks, %" if len(tasks) > 1 else one
            figure = _against_sparsity(points, ylabel, logarithmic=False)
            caption = (
                f"Accuracy ({', '.join(tasks)}) against sparsity; higher is better. Bars: one standard error. "
                "Methods at one sparsity are drawn a little apart, and listed by their value there."
            )
            pictures.append(save(figure, folder, "accuracy", caption))
        pictures += _differences(entries, baselines, texts, tasks, folder)
        uneven = [entry for entry in entries if entry.densities and not is_level(entry)]
        reach = max((_reach(entry) for entry in uneven), default=0.0)
        # One order of rows and columns for all: results and masks list their weights differently.
        layers = sorted({layer for entry in uneven for layer, _ in entry.densities})
        projections = sorted({projection for entry in uneven for _, projection in entry.densities})
        for number, entry in enumerate(uneven):
            caption = (
                f"Density (kept over all) of {entry.label} by decoder layer and projection. Every mask's scale is "
                "centred on its own density and equally wide."
            )
            figure = _density(entry, reach, layers, projections)
            pictures.append(save(figure, folder, f"density-{number + 1}-{slug(entry.label)}", caption))
        for stem, overlaps in _overlaps_by_sparsity(entries).items():
            pictures += draw_overlaps(overlaps, folder, stem)
        return pictures


def draw_perplexities(entries: Sequence[Entry], folder: Path, stem: str = "perplexity") -> list[Picture]:
    """Draw perplexity against sparsity, one picture for each text that any of ``entries`` was measured on."""
    pictures = []
    with drawing():
        for number, (text, name) in enumerate(short_names(all_texts(entries)).items(), 1):
            points = [
                (e, _drawn(e.perplexity[text]["value"]), _times(e.perplexity[text]["stderr"], 1))
                for e in entries
                if text in e.perplexity
            ]
            figure = _against_sparsity(points, f"perplexity on {literal(name)}", logarithmic=True)
            caption = (
                f"Perplexity on {text} against sparsity; logarithmic, lower is better. Bars: one standard error. "
                "Methods at one sparsity are drawn a little apart, and listed by their value there."
            )
            pictures.append(save(figure, folder, f"{stem}-{number}-{slug(Path(text).stem)}", caption))
    return pictures


def draw_overlaps(overlaps: list[Overlap], folder: Path, stem: str = "overlap") -> list[Picture]:
    """Draw the overlaps of masks by layer; nothing if there are none."""
    if not overlaps:
        return []
    caption = (
        "Where two masks agree: weights that both keep, over weights that either keeps (IoU), by decoder "
        "layer. Chance is the IoU of independent masks of the same densities."
    )
    with drawing():
        return [save(_overlaps(overlaps), folder, stem, caption)]


def _against_sparsity(points: list[tuple[Entry, float, float | None]], ylabel: str, *, logarithmic: bool) -> "Figure":
    """Draw one line per method against sparsity, and the dense model as a horizontal reference line.

    Rows of one method at one sparsity have a line each. The legend lists the lines by their last values, as they lie.
    """
    several_models = len({entry.model for entry, _, _ in points}) > 1
    names = {e.label: f"{e.kind}, {e.model}" if several_models else e.kind for e, _, _ in points}
    rows = Counter((names[entry.label], f"{entry.sparsity:.0%}") for entry, _, _ in points)
    series: dict[str, list[tuple[float, float, float]]] = {}
    dense: dict[str, float] = {}
    for entry, value, stderr in points:
        name = names[entry.label]
        if entry.method == "dense":
            dense[name] = value
        else:
            name = name if rows[name, f"{entry.sparsity:.0%}"] == 1 else entry.label
            series.setdefault(name, []).append((100 * entry.sparsity, value, stderr or 0.0))
    # Large enough for the legend, which is to the right of the axes.
    longest = max(len(literal(name)) for name in [*series, *dense])
    figure, axes = figure_of(max(6.4, 5.0 + CHARACTER * longest), max(4.0, 0.8 + 0.22 * len({**series, **dense})))
    shown = sorted({round(x) for line in series.values() for x, _, _ in line})
    beside = {x: sorted(name for name, line in series.items() if x in {round(at) for at, _, _ in line}) for x in shown}
    drawn: list[tuple[float, Any]] = []  # last value and line
    for n, (name, line) in enumerate(sorted(series.items())):
        xs, ys, errors = zip(*sorted(line), strict=True)
        bars = axes.errorbar(
            [x + _apart(beside[round(x)].index(name), len(beside[round(x)]), shown) for x in xs],
            ys,
            yerr=errors,
            label=literal(name),
            color=COLOURS[n % len(COLOURS)],
            # Lines of the same colour differ in marker and dash.
            marker=MARKERS[(n + n // len(COLOURS)) % len(MARKERS)],
            linestyle=("-", "--", ":", "-.")[n // len(COLOURS) % 4],
            capsize=3,
            linewidth=1.5,
            elinewidth=1,
            markersize=6,
        )
        drawn.append((ys[-1], bars))
    for n, (name, value) in enumerate(sorted(dense.items())):
        rule = axes.axhline(
            value,
            color="0.35",
            linestyle=("--", ":", "-.")[n % 3],
            linewidth=1.2,
            label=f"{literal(name)} ({spelled(value, 2)})",
        )
        drawn.append((value, rule))
    if logarithmic:
        _logarithmic(axes, [value for _, value, _ in points])
    if series:
        axes.margins(x=0.08)
        if len(shown) <= 8:
            axes.set_xticks(shown)
        if len(shown) == 1:  # otherwise the axis would zoom in on tiny differences of the realised sparsities
            axes.set_xlim(shown[0] - 5, shown[0] + 5)
    else:
        axes.set_xlim(0, 100)
    axes.set_xlabel("sparsity, %")
    axes.set_ylabel(ylabel)
    axes.grid(color="0.9", linewidth=0.8)
    handles = [line for _, line in sorted(drawn, key=lambda one: -one[0])]
    axes.legend(handles=handles, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _apart(place: int, places: int, shown: list[int]) -> float:
    """Return how far from its sparsity, in percent, a point is drawn that is one of several there.

    Otherwise a point, or the wide error bar of an accuracy, could hide another. A step is about a marker's width,
    unless so many points would come near those of the next sparsity.
    """
    reach = shown[-1] - shown[0] or 10
    gap = min((right - left for left, right in pairwise(shown)), default=reach)
    return min(0.02 * reach, 0.4 * gap / max(1, places - 1)) * (place - (places - 1) / 2)


def _logarithmic(axes: Any, values: list[float]) -> None:
    """Make the y axis logarithmic, labelled with plain numbers, with enough ticks on any range."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    wide = max(values) / min(values) > 100
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    if min(values) < max(values):
        span = (max(values) / min(values)) ** 0.06
        axes.set_ylim(min(values) / span, max(values) * span)


def _differences(
    entries: Sequence[Entry], baselines: Collection[str], texts: list[str], tasks: list[str], folder: Path
) -> list[Picture]:
    panels: list[tuple[str, list[tuple[str, Difference]], bool]] = []  # the last: relative to the baseline
    for text, name in short_names(texts).items():
        found = [(literal(e.label), d) for e in entries if (d := perplexity_difference(e, entries, text, baselines))]
        panels.append((f"Δ perplexity, % (left is better)\n{literal(name)}", found, True))
    found = [(literal(e.label), d) for e in entries if (d := accuracy_difference(e, entries, tasks, baselines))]
    mean = "mean accuracy" if len(tasks) > 1 else "accuracy"
    panels.append((f"Δ {mean}, percentage points\n(right is better)", found, False))
    panels = [panel for panel in panels if panel[1]]
    if not panels:
        return []
    from matplotlib.figure import Figure

    rows = max(len(found) for _, found, _ in panels)
    longest = max(max(len(label), 2 + len(literal(d.baseline))) for _, found, _ in panels for label, d in found)
    width = max(3.6, 2.4 + CHARACTER * longest)
    across = max(1, min(len(panels), int((WIDEST - 1.2) / width)))
    down = -(-len(panels) // across)
    size = (min(width * across + 1.2, MOST_INCHES), min((1.5 + 0.5 * rows) * down, MOST_INCHES))
    figure = Figure(figsize=size, layout="constrained")
    places = figure.subplots(down, across, squeeze=False).flat
    for axes in places[len(panels) :]:
        axes.remove()
    for axes, (title, found, relative) in zip(places[: len(panels)], panels, strict=True):
        axes.axvline(0, color="0.35", linestyle="--", linewidth=1.2)
        for row, (_, difference) in enumerate(found):
            value, stderr = difference.value, difference.stderr
            if relative:
                value, stderr = difference.relative, difference.relative_stderr
            axes.errorbar(
                _times(value, 100),
                row,
                xerr=_times(stderr, 100),
                marker="o",
                color=COLOURS[0],
                capsize=3,
            )
        axes.set_yticks(
            range(len(found)), [f"{label}\n− {literal(difference.baseline)}" for label, difference in found]
        )
        axes.set_ylim(len(found) - 0.5, -0.5)
        axes.set_xlabel(title)
        axes.margins(x=0.15)
        axes.grid(axis="x", color="0.9", linewidth=0.8)
    caption = (
        "Difference to the best baseline at the same sparsity, of perplexities as a share of the baseline's. Bars: one "
        "standard error, from pairs of windows and of questions; that of a share takes in the baseline's."
    )
    return [save(figure, folder, "differences", caption)]


def _reach(entry: Entry) -> float:
    """Return the largest distance of a cell's density from the whole mask's."""
    return max(abs(density - (1 - entry.sparsity)) for density in entry.densities.values())


def _density(entry: Entry, reach: float, layers: list[int], projections: list[str]) -> "Figure":
    grid = [[entry.densities.get((layer, projection), float("nan")) for layer in layers] for projection in projections]
    whole = 1 - entry.sparsity
    return _heat_map(
        grid,
        [str(layer) for layer in layers],
        [literal(projection) for projection in projections],
        xlabel="decoder layer",
        colour="density (kept over all)",
        title=f"{literal(entry.label)}: density {whole:.3f}",
        limits=(whole - reach, whole + reach),
    )


def _overlaps_by_sparsity(entries: Sequence[Entry]) -> dict[str, list[Overlap]]:
    """Return the overlaps of each picture by its stem: one picture for each sparsity that several masks have.

    Masks of different sparsities, whose overlap is bounded, are compared only if no two have the same sparsity.
    """
    masked = [entry for entry in entries if entry.mask is not None]
    pairs = [(a, b) for a, b in combinations(masked, 2) if a.model == b.model]
    alike = [(a, b) for a, b in pairs if abs(a.sparsity - b.sparsity) < SAME_SPARSITY]
    several = len({f"{a.sparsity:.0%}" for a, _ in alike}) > 1
    pictures: dict[str, list[Overlap]] = {}
    for a, b in alike or pairs:
        found = overlap(a, b)
        if found is not None and found.layers:  # not of heads alone
            pictures.setdefault(f"overlap-{100 * a.sparsity:.0f}" if several else "overlap", []).append(found)
    return pictures


def _overlaps(overlaps: list[Overlap]) -> "Figure":
    layers = sorted({layer for found in overlaps for layer in found.layers})
    grid = [[found.layers.get(layer, float("nan")) for layer in layers] for found in overlaps]
    names = [
        f"{literal(found.first)} ∩ {literal(found.second)}\n{found.iou:.3f} in all (chance {found.chance:.3f})"
        for found in overlaps
    ]
    return _heat_map(
        grid, [str(layer) for layer in layers], names, xlabel="decoder layer", colour="IoU of kept weights", row=0.46
    )


def _heat_map(
    grid: list[list[float]],
    columns: list[str],
    rows: list[str],
    *,
    xlabel: str,
    colour: str,
    title: str | None = None,
    limits: tuple[float, float] | None = None,
    row: float = 0.38,
) -> "Figure":
    """Draw ``grid`` as a heat map with rows ``row`` inches high, in cividis, which is readable with colour blindness.

    Values are written into the cells if there are at most 12 columns.
    """
    from matplotlib.ticker import ScalarFormatter

    # Widen the figure for the rows' names, which are to the left of the cells.
    longest = max(len(line) for name in rows for line in name.splitlines())
    width = max(4.8, 1.4 + CHARACTER * longest + 0.26 * len(columns))
    figure, axes = figure_of(width, max(1.5 + row * len(rows), 2.6))
    low, high = limits or (None, None)
    image = axes.imshow(grid, cmap="cividis", aspect="auto", vmin=low, vmax=high)
    axes.set_yticks(range(len(rows)), rows)
    step = max(1, -(-len(columns) // 32))
    axes.set_xticks(range(0, len(columns), step), columns[::step])
    axes.set_xlabel(xlabel)
    if title:
        axes.set_title(title, fontsize="medium")
    if len(columns) <= 12:
        low, high = image.get_clim()
        digits = min(4, max(2, 1 - math.floor(math.log10(high - low)))) if high > low else 2
        for place, line in enumerate(grid):
            for column, value in enumerate(line):
                shade = "black" if value > (low + high) / 2 else "white"
                axes.text(column, place, f"{value:.{digits}f}", ha="center", va="center", fontsize="small", color=shade)
    figure.colorbar(image, ax=axes, label=colour, format=ScalarFormatter(useOffset=False))
    return figure


def _times(value: float | None, scale: float) -> float | None:
    return None if value is None else _drawn(scale * value)


def _drawn(value: float) -> float:
    """Return ``value`` clamped to the range that is drawn, which only figures of broken models exceed."""
    return max(-FARTHEST, min(float(value), FARTHEST))
