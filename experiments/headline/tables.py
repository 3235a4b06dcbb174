"""The tables of the report, in Markdown."""

import re
from collections.abc import Iterable, Mapping, Sequence
from statistics import mean, stdev

from experiments.headline.measured import Group, Measured, groups, titles_of
from leap_pl.comparison.differences import (
    Difference,
    accuracy_difference,
    mean_accuracy,
    mean_accuracy_stderr,
    perplexity_difference,
    shared_tasks,
)
from leap_pl.escape import terminal

_ERROR = "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}"  # keeps a figure and its error in one line
KEY = (
    "Perplexity: lower is better. Gap closed: the part of the reference's distance to the dense model that a row "
    "makes up for, (reference − row) / (reference − dense); the reference is marked *. Training tokens are those that "
    "a mask, and weights under it, were learned from. ± is one standard error; that of a difference is of paired "
    "windows or questions. Differences are to the best baseline of the same pattern; a row that has none is not among "
    "them."
)


# What guessing has. Most of ARC's questions have four answers.
CHANCE = {
    "arc_challenge": 0.25,
    "arc_easy": 0.25,
    "mmlu": 0.25,
    "openbookqa": 0.25,
    "piqa": 0.5,
    "winogrande": 0.5,
}


def calibration(found: Sequence[Measured]) -> str:
    """A sentence on the text that masks are made with before anything is learned; empty if none is."""
    tokens = sorted({m.cell["calibration_tokens"] for m in found} - {None, 0})
    numbers = " or ".join(f"{count:,}" for count in tokens)
    return f" Text that masks are calibrated on, those that learning starts from too: {numbers} tokens." * bool(tokens)


def main_table(group: Group, found: Sequence[Measured]) -> str:
    """One row a method of ``group``, among ``found``: what it learned from, perplexities, mean accuracy, and cost."""
    titles, tasks = titles_of(group.rows), shared_tasks(group.entries)
    heading = ["method", "sparsity, %", "training tokens"]
    heading += [f"perplexity, {title}" for title in titles.values()]
    heading += [*[f"mean accuracy of {len(tasks)}, %"] * bool(tasks), "minutes", "data types, made and measured"]
    cells, rows = {m.cell["name"]: m for m in found}, []
    for m in [*([group.dense] if group.dense else []), *group.rows]:
        row = [m.title + " *" * bool(m.cell["reference"]), f"{100 * m.entry.sparsity:.2f}", _tokens(m)]
        row += [*_perplexities(m, titles), *[_accuracy(m, tasks)] * bool(tasks)]
        rows.append([*row, *_cost(m, cells)])
    return markdown(heading, rows)


def difference_table(group: Group) -> str:
    """The rows that are no baselines, minus the best baseline of their pattern; empty where there is none of any.

    Beside each difference is the part of the reference's gap that is closed, where the group has a reference.
    """
    titles = titles_of([m for m in group.rows if not m.cell["baseline"]])
    gaps = bool(group.reference and group.dense)
    tasks, names = shared_tasks(group.entries), {m.entry.label: m.title for m in group.rows}
    rows = []
    for m in group.rows:
        if not m.cell["baseline"]:
            cells = []
            for role, title in titles.items():
                found = perplexity_difference(m.entry, group.entries, title, group.baselines)
                closed = group.gap_closed(m, role)
                cells += [_difference(found, names), *["" if closed is None else f"{100 * closed:.1f}%"] * gaps]
            accuracy = accuracy_difference(m.entry, group.entries, tasks, group.baselines)
            cells += [_difference(accuracy, names, 100)] * bool(tasks)
            if any(cells):
                rows.append([m.title, *cells])
    heading = ["minus the best baseline"]
    for title in titles.values():
        heading += [f"perplexity, {title}", *[_closed(group)] * gaps]
    heading += ["mean accuracy, points"] * bool(tasks)
    return markdown(heading, rows) if rows else ""


def _closed(group: Group) -> str:
    return f"{group.reference.title}'s gap closed" if group.reference else ""


def seeds_table(group: Group) -> str:
    """Mean and standard deviation of every row that was learned with several seeds; empty where none was."""
    repeated = [seeds for seeds in map(group.of_seeds, group.rows) if len(seeds) > 1]
    if not repeated:
        return ""
    titles, tasks = titles_of([m for seeds in repeated for m in seeds]), shared_tasks(group.entries)
    heading = ["method", "seeds"]
    for title in titles.values():
        heading += [f"perplexity, {title}", *[f"{_closed(group)}, %"] * bool(group.reference)]
    heading += [f"mean accuracy of {len(tasks)}, %"] * bool(tasks)
    rows = []
    for seeds in repeated:
        row = [seeds[0].title, ", ".join(str(m.seed) for m in seeds)]
        for role in titles:
            row.append(_spread([m.perplexity(role)["value"] if role in m.titles else None for m in seeds]))
            row += [_spread([group.gap_closed(m, role) for m in seeds], 100, 1)] * bool(group.reference)
        scores = [mean_accuracy(m.entry, tasks) if set(tasks) <= set(m.entry.tasks) else None for m in seeds]
        rows.append(row + [_spread(scores, 100)] * bool(tasks))
    return markdown(heading, rows)


def task_table(found: Sequence[Measured]) -> str:
    """Accuracy by task of every cell that has any; empty where none has."""
    by_sparsity = [m for m in found if m.is_dense] + [m for group in groups(found) for m in group.rows]
    scored = [m for m in by_sparsity if m.entry.tasks]
    tasks = sorted({task for m in scored for task, score in m.entry.tasks.items() if "acc" in score})
    rows = [["by chance", *(figure(CHANCE.get(task), None, 100, 1) for task in tasks)]]
    for m in scored:
        scores = [m.entry.tasks.get(task, {}) for task in tasks]
        rows.append([m.entry.label, *(figure(s.get("acc"), s.get("acc_stderr"), 100, 1) for s in scores)])
    return markdown(["accuracy, %", *tasks], rows) if tasks else ""


def cost_table(found: Sequence[Measured]) -> str:
    """What each cell took to make."""
    rows = []
    for m in found:
        calibration, seconds, peak = (m.cell[key] for key in ("calibration_tokens", "seconds", "peak_rss"))
        passes = (m.result["config"].get("data") or {}).get("passes") if m.has_config else None
        row = [f"`{m.cell['name']}`", m.model, _tokens(m), str(passes or ""), f"{calibration:,}" if calibration else ""]
        row += ["" if seconds is None else f"{seconds / 60:.1f}", f"{peak / 2**30:.1f}" if peak else ""]
        steps = m.cell["settings"].get("trainer", {}).get("max_steps")
        rows.append([*row, f"{seconds / steps:.2f}" if seconds and steps else ""])
    heading = ["cell", "model", "training tokens", "passes", "calibration tokens", "minutes", "memory, GiB"]
    heading += ["seconds a step"]
    return markdown(heading, rows)


def overview_table(rows: Sequence[Measured], found: Sequence[Measured]) -> str:
    """The rows ``rows`` of ``found`` in one table, with what they cost."""
    scored = [m.entry for m in found if m.entry.tasks]
    tasks = shared_tasks(scored) if scored else []
    texts = any(m.cell.get("text") is not None for m in found)
    heading = ["model", "sparsity, %", "method", *["text"] * texts]
    titles = titles_of(found)
    heading += [f"perplexity, {title}" for title in titles.values()]
    heading += [f"mean accuracy of {len(tasks)}, %"] * bool(tasks)
    heading += ["training tokens", "minutes", "seed", "data types, made and measured"]
    cells, lines = {m.cell["name"]: m for m in found}, []
    for m in rows:
        minutes, dtypes = _cost(m, cells)
        text = "" if m.is_dense else m.cell.get("text") or m.cell["texts"]["like"]["title"].split(" (")[0]
        line = [m.model, f"{100 * (m.cell['sparsity'] or 0):g}", m.title, *[text] * texts]
        line += [*_perplexities(m, titles), *[_accuracy(m, tasks)] * bool(tasks)]
        line += [_tokens(m), minutes, _seed(m, found), dtypes]
        lines.append(line)
    return markdown(heading, lines)


def markdown(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, the first column to the left; what is in the cells makes no links and no HTML."""
    lines = [heading, ["---", *["---:"] * (len(heading) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(_escaped, line)) + " |" for line in lines)


def _escaped(cell: str) -> str:
    """Return ``cell`` without links and HTML: a task or a model can have any name. Code and stars are the table's."""
    return re.sub(r"([\[\]|])", r"\\\1", terminal(cell)).replace("<", "&lt;")


def _tokens(measured: Measured) -> str:
    return f"{measured.cell['tokens']:,}" if measured.cell["tokens"] else ""


def _perplexities(measured: Measured, roles: Iterable[str]) -> list[str]:
    found = [measured.perplexity(role) if role in measured.titles else {} for role in roles]
    return [figure(told.get("value"), told.get("stderr")) for told in found]


def seconds_in_all(measured: Measured, cells: Mapping[str, Measured]) -> float | None:
    """Seconds that making a cell took, with those that it is made from; None where one of them is not known."""
    own = measured.cell["seconds"]
    before = [name for name in map(measured.cell.get, ("prior", "mask_of", "kept")) if name is not None]
    others = [seconds_in_all(cells[name], cells) if name in cells else None for name in before]
    return None if own is None or None in others else own + sum(other for other in others if other is not None)


def _cost(measured: Measured, cells: Mapping[str, Measured]) -> list[str]:
    """The minutes that making it took, and the data types that it was made and measured in."""
    seconds, kept = seconds_in_all(measured, cells), cells.get(measured.cell["kept"] or "")
    dtypes = [*(kept.dtypes[:1] if kept else []), *measured.dtypes]
    return ["" if seconds is None else f"{seconds / 60:.0f}", ", ".join(dtypes)]


def _accuracy(measured: Measured, tasks: list[str]) -> str:
    if not tasks or not all(task in measured.entry.tasks for task in tasks):
        return ""
    return figure(mean_accuracy(measured.entry, tasks), mean_accuracy_stderr(measured.entry, tasks), 100)


def _seed(measured: Measured, found: Sequence[Measured]) -> str:
    """The seed that the figures are of, and of how many seeds the row has some."""
    more = sum(m.repeat_of == measured.cell["name"] for m in found)
    return str(measured.seed) + (f" (of {1 + more})" if more else "")


def _spread(values: Sequence[float | None], scale: float = 1, digits: int = 2) -> str:
    """Mean and standard deviation; empty where a value is missing."""
    known = [value for value in values if value is not None]
    return figure(mean(known), stdev(known), scale, digits) if len(known) == len(values) else ""


def figure(
    value: float | None, stderr: float | None, scale: float = 1, digits: int = 2, *, signed: bool = False
) -> str:
    """``scale`` times the value and its error, if they are known; ``signed``: with a plus, too."""
    if value is None:
        return ""
    shown = f"{round(scale * value, digits) + 0.0:{'+' if signed else ''}.{digits}f}"  # no -0.0
    return shown + ("" if stderr is None else f"{_ERROR}{scale * stderr:.{digits}f}")


def _difference(found: Difference | None, names: dict[str, str], scale: float = 1) -> str:
    if found is None:
        return ""
    return f"{figure(found.value, found.stderr, scale, signed=True)} ({names[found.baseline]})"
