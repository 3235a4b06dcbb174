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

KEY = (
    "Perplexity: lower is better. Gap closed: the part of the reference's distance to the dense model that a row "
    "makes up for, (reference − row) / (reference − dense); the reference is marked *. Training tokens are those a "
    "mask was learned from; calibration tokens were read by the one-shot method, or by the one that made the prior. "
    "Minutes are those of making the mask, without its prior's, on the machine below. ± is one standard error; that of "
    "a difference is of paired windows or questions. Differences are to the best baseline of the same pattern; a row "
    "that has none is not among them."
)


def main_table(group: Group) -> str:
    """One row a method: its cost, perplexities and mean accuracy."""
    titles = [group.rows[0].cell["texts"][role]["title"] for role in ROLES]
    tasks = shared_tasks(group.entries)
    heading = ["method", "sparsity, %", "training tokens", "calibration tokens"]
    for title in titles:
        heading += [f"perplexity, {title}", "gap closed"]
    heading += [f"mean accuracy of {len(tasks)}, %"] * bool(tasks) + ["minutes"]
    rows = []
    for m in [*([group.dense] if group.dense else []), *group.rows]:
        row = [m.title + " *" * bool(m.cell["reference"]), f"{100 * m.entry.sparsity:.2f}"]
        row += [f"{m.cell[key]:,}" if m.cell[key] else "" for key in ("tokens", "calibration_tokens")]
        for role in ROLES:
            found, closed = m.perplexity(role), group.gap_closed(m, role)
            row += [_figure(found["value"], found["stderr"]), "" if closed is None else f"{100 * closed:.1f}%"]
        row += [_accuracy(m, tasks)] * bool(tasks)
        row.append("" if m.cell["seconds"] is None else f"{m.cell['seconds'] / 60:.1f}")
        rows.append(row)
    return markdown(heading, rows)


def difference_table(group: Group) -> str:
    """The rows that are no baselines, minus the best baseline of their pattern; empty where there is none of any."""
    titles = [group.rows[0].cell["texts"][role]["title"] for role in ROLES]
    tasks, names = shared_tasks(group.entries), {m.entry.label: m.title for m in group.rows}
    rows = []
    for m in group.rows:
        if not m.cell["baseline"]:
            found = [perplexity_difference(m.entry, group.entries, title, group.baselines) for title in titles]
            cells = [_difference(difference, names) for difference in found]
            accuracy = accuracy_difference(m.entry, group.entries, tasks, group.baselines)
            cells += [_difference(accuracy, names, 100)] * bool(tasks)
            if any(cells):
                rows.append([m.title, *cells])
    heading = ["minus the best baseline", *(f"perplexity, {title}" for title in titles)]
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
    return f"{scale * value:.{digits}f}" + ("" if stderr is None else f" ± {scale * stderr:.{digits}f}")


def _difference(found: Difference | None, names: dict[str, str], scale: float = 1) -> str:
    if found is None:
        return ""
    error = "" if found.stderr is None else f" ± {scale * found.stderr:.2f}"
    return f"{scale * found.value:+.2f}{error} ({names[found.baseline]})"
