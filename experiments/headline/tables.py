"""The tables of the report, in Markdown."""

from collections.abc import Sequence

from experiments.headline.measured import ROLES, Group, Measured, groups
from leap_pl.comparison.differences import (
    Difference,
    accuracy_difference,
    mean_accuracy,
    mean_accuracy_stderr,
    perplexity_difference,
    shared_tasks,
)

_ERROR = "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}"  # keeps a figure and its error in one line
KEY = (
    "Perplexity: lower is better. Gap closed: the part of the reference's distance to the dense model that a row "
    "makes up for, (reference − row) / (reference − dense); the reference is marked *. Training tokens are those a "
    "mask was learned from. ± is one standard error; that of a difference is of paired windows or questions. "
    "Differences are to the best baseline of the same pattern; a row that has none is not among them."
)


def main_table(group: Group) -> str:
    """One row a method: what it learned from, perplexities and mean accuracy."""
    titles = [group.rows[0].cell["texts"][role]["title"] for role in ROLES]
    tasks = shared_tasks(group.entries)
    heading = ["method", "sparsity, %", "training tokens"]
    heading += [f"perplexity, {title}" for title in titles]
    heading += [f"mean accuracy of {len(tasks)}, %"] * bool(tasks)
    rows = []
    for m in [*([group.dense] if group.dense else []), *group.rows]:
        row = [m.title + " *" * bool(m.cell["reference"]), f"{100 * m.entry.sparsity:.2f}"]
        row.append(f"{m.cell['tokens']:,}" if m.cell["tokens"] else "")
        row += [_figure(m.perplexity(role)["value"], m.perplexity(role)["stderr"]) for role in ROLES]
        row += [_accuracy(m, tasks)] * bool(tasks)
        rows.append(row)
    return markdown(heading, rows)


def difference_table(group: Group) -> str:
    """The rows that are no baselines, minus the best baseline of their pattern; empty where there is none of any.

    Beside each difference is the part of the reference's gap that is closed, where the group has a reference.
    """
    titles = {role: group.rows[0].cell["texts"][role]["title"] for role in ROLES}
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
        heading += [f"perplexity, {title}", *["gap closed"] * gaps]
    heading += ["mean accuracy, points"] * bool(tasks)
    return markdown(heading, rows) if rows else ""


def task_table(found: Sequence[Measured]) -> str:
    """Accuracy by task of every cell that has any; empty where none has."""
    by_sparsity = [m for m in found if m.is_dense] + [m for group in groups(found) for m in group.rows]
    scored = [m for m in by_sparsity if m.entry.tasks]
    tasks = sorted({task for m in scored for task, score in m.entry.tasks.items() if "acc" in score})
    rows = []
    for m in scored:
        scores = [m.entry.tasks.get(task, {}) for task in tasks]
        rows.append([m.entry.label, *(_figure(s.get("acc"), s.get("acc_stderr"), 100, 1) for s in scores)])
    return markdown(["accuracy, %", *tasks], rows) if tasks else ""


def cost_table(found: Sequence[Measured]) -> str:
    """What each cell took to make."""
    rows = []
    for m in found:
        row = [f"`{m.cell['name']}`"]
        row += [f"{m.cell[key]:,}" if m.cell[key] else "" for key in ("tokens", "calibration_tokens")]
        row.append("" if m.cell["seconds"] is None else f"{m.cell['seconds'] / 60:.1f}")
        rows.append([*row, f"{m.cell['peak_rss'] / 2**30:.1f}" if m.cell["peak_rss"] else ""])
    return markdown(["cell", "training tokens", "calibration tokens", "minutes", "memory, GiB"], rows)


def markdown(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, the first column to the left."""
    lines = [heading, ["---", *["---:"] * (len(heading) - 1)], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _accuracy(measured: Measured, tasks: list[str]) -> str:
    if not tasks or not all(task in measured.entry.tasks for task in tasks):
        return ""
    return _figure(mean_accuracy(measured.entry, tasks), mean_accuracy_stderr(measured.entry, tasks), 100)


def _figure(value: float | None, stderr: float | None, scale: float = 1, digits: int = 2) -> str:
    if value is None:
        return ""
    return f"{scale * value:.{digits}f}" + ("" if stderr is None else f"{_ERROR}{scale * stderr:.{digits}f}")


def _difference(found: Difference | None, names: dict[str, str], scale: float = 1) -> str:
    if found is None:
        return ""
    error = "" if found.stderr is None else f"{_ERROR}{scale * found.stderr:.2f}"
    return f"{scale * found.value:+.2f}{error} ({names[found.baseline]})"
