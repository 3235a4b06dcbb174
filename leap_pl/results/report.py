"""The report: docs/results.md and its pictures, from the cells' JSON files and from nothing else."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from leap_pl.comparison.differences import (
    Difference,
    accuracy_difference,
    mean_accuracy,
    mean_accuracy_stderr,
    perplexity_difference,
    shared_tasks,
)
from leap_pl.comparison.entries import Entry, check_protocols, entry_of_result
from leap_pl.errors import UserError
from leap_pl.evaluation.record import read_result
from leap_pl.files import atomic_file

NOTES = "notes.md"  # what is written by hand, and stays
ROLES = ("like", "unlike")


@dataclass(frozen=True)
class Measured:
    """A finished cell: its file, the same as an entry of a comparison, and what it says of its making."""

    result: dict[str, Any]
    entry: Entry
    cell: dict[str, Any]

    def perplexity(self, role: str) -> dict[str, Any]:
        """What was measured on the text of ``role``."""
        return dict(self.result["perplexity"][self.cell["texts"][role]])


def read_cells(folder: Path) -> list[Measured]:
    """The cells in ``folder``, in the order of the experiment.

    Raises:
        UserError: There is none, one cannot be read, or two were measured in different ways.
    """
    found = []
    for path in sorted(folder.glob("*.json")):
        result = read_result(path)
        if "cell" not in result:
            raise UserError(f"{path} is a result, but of no cell of the experiment. Take it out of {folder}.")
        cell = result["cell"]
        entry = replace(entry_of_result(str(path), result), method=cell["title"], label=_label(cell))
        found.append(Measured(result, entry, cell))
    if not found:
        raise UserError(f"{folder} holds no finished cell. Run make results first.")
    check_protocols([measured.entry for measured in found])
    return sorted(found, key=lambda measured: measured.cell["order"])


def _label(cell: dict[str, Any]) -> str:
    if cell["sparsity"] is None:
        return str(cell["title"])
    return f"{cell['title']}, {100 * cell['sparsity']:g}%"


def write_report(cells: Path, docs: Path) -> Path:
    """Write the report beside the folder ``docs``, and pictures and configs into it; returns its path.

    Args:
        cells: Folder of the cells' files.
        docs: Folder of pictures, of the configs, and of ``notes.md``, which is taken in and not written.

    Raises:
        UserError: The cells cannot be read or do not fit together.
    """
    found = read_cells(cells)
    docs.mkdir(parents=True, exist_ok=True)
    for old in [*docs.glob("*.png"), *docs.glob("*.svg"), *docs.glob("configs/*.yaml")]:
        old.unlink()
    parts = [
        "# Results",
        "Written by `make results` from the files in "
        f"[`{docs.name}/cells`]({docs.name}/cells); `python -m leap_pl.results --report --from {docs / 'cells'}` "
        "writes it again from those.",
        *found[0].cell["about"],
        *_tables(found),
        *_pictures(found, docs),
        *_protocol(found),
        *_hardware(found),
        *_configs(found, docs),
        *_commands(found),
        "## What did not work",
        _notes(docs / NOTES),
    ]
    path = docs.with_suffix(".md")
    with atomic_file(path) as temporary:
        temporary.write_text("\n\n".join(part.strip("\n") for part in parts if part) + "\n", encoding="utf-8")
    return path


# -- tables ---------------------------------------------------------------------------------------------------


def _tables(found: Sequence[Measured]) -> Iterator[str]:
    dense = next((m for m in found if m.cell["sparsity"] is None), None)
    tasks = shared_tasks([m.entry for m in found])
    groups: dict[tuple[float, str], list[Measured]] = {}
    for measured in found:
        if measured.cell["sparsity"] is not None:
            groups.setdefault((measured.cell["sparsity"], measured.cell["table"]), []).append(measured)
    for (sparsity, table), group in groups.items():
        yield f"## {100 * sparsity:g}%{'' if table == 'unstructured' else ', ' + table}"
        yield _table(group, dense, tasks)
        yield _differences(group, tasks)
    yield (
        "Perplexity: lower is better. Gap closed: the part of the reference's distance to the dense model that a row "
        "makes up for, (reference − row) / (reference − dense). Training tokens are those a mask was learned from; "
        "calibration tokens are read by the one-shot method, or by the one that made the prior. Minutes are those "
        "of making the mask, without its prior's. ± is one standard error."
    )


def _table(group: Sequence[Measured], dense: Measured | None, tasks: list[str]) -> str:
    reference = next((m for m in group if m.cell["row"] == m.cell["reference"]), None)
    scored = any(m.entry.tasks for m in group)
    heading = ["method", "sparsity, %", "training tokens", "calibration tokens"]
    for role in ROLES:
        heading += [f"perplexity, {role}", "gap closed"]
    heading += ["mean accuracy, %"] * scored + ["minutes"]
    rows = []
    for m in [*([dense] if dense else []), *group]:
        row = [m.cell["title"], f"{100 * m.entry.sparsity:.2f}"]
        row += [f"{m.cell[key]:,}" if m.cell[key] else "" for key in ("tokens", "calibration_tokens")]
        for role in ROLES:
            figure = m.perplexity(role)
            row += [_figure(figure["value"], figure["stderr"]), _percent(gap_closed(m, reference, dense, role))]
        if scored:
            has = bool(tasks) and all(task in m.entry.tasks for task in tasks)
            row.append(_figure(mean_accuracy(m.entry, tasks), mean_accuracy_stderr(m.entry, tasks), 100) if has else "")
        row.append("" if m.cell["seconds"] is None else f"{m.cell['seconds'] / 60:.1f}")
        rows.append(row)
    return _markdown(heading, rows)


def gap_closed(row: Measured, reference: Measured | None, dense: Measured | None, role: str) -> float | None:
    """(reference − row) / (reference − dense) in perplexity; None for those two themselves."""
    if reference is None or dense is None or row is reference or row is dense:
        return None
    values = [m.perplexity(role)["value"] for m in (reference, row, dense)]
    return float((values[0] - values[1]) / (values[0] - values[2]))


def _differences(group: Sequence[Measured], tasks: list[str]) -> str:
    """Rows that are no baselines, minus the best baseline."""
    entries = [m.entry for m in group]
    baselines = {m.entry.method for m in group if m.cell["baseline"]}
    rows = []
    for m in group:
        if m.cell["baseline"]:
            continue
        row = [m.cell["title"]]
        for role in ROLES:
            row.append(_difference(perplexity_difference(m.entry, entries, m.cell["texts"][role], baselines), 1))
        row.append(_difference(accuracy_difference(m.entry, entries, tasks, baselines), 100))
        rows.append(row)
    heading = ["minus the best baseline", *(f"perplexity, {role}" for role in ROLES), "mean accuracy, points"]
    return _markdown(heading, rows) if rows and baselines else ""


def _markdown(heading: list[str], rows: list[list[str]]) -> str:
    lines = [heading, ["---", *["---:"] * (len(heading) - 1)], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _figure(value: float, stderr: float | None, scale: float = 1) -> str:
    return f"{scale * value:.2f}" + ("" if stderr is None else f" ± {scale * stderr:.2f}")


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}%"


def _difference(found: Difference | None, scale: float) -> str:
    if found is None:
        return ""
    error = "" if found.stderr is None else f" ± {scale * found.stderr:.2f}"
    return f"{scale * found.value:+.2f}{error} ({found.baseline.split(',')[0]})"


# -- pictures -------------------------------------------------------------------------------------------------


def _pictures(found: Sequence[Measured], docs: Path) -> Iterator[str]:
    from leap_pl.comparison.overlap import Overlap
    from leap_pl.comparison.pictures import draw_all, draw_overlaps

    learned = [m for m in found if m.cell["overlap"] is not None]
    best = min(learned, key=lambda m: (m.cell["sparsity"], m.perplexity("validation")["value"]), default=None)
    shown = [m for m in found if m.cell["table"] == "unstructured"]
    entries = [m.entry if m is best else replace(m.entry, densities={}) for m in shown]
    entries = [replace(e, perplexity={t: e.perplexity[t] for t in _texts(found)}) for e in entries]
    pictures = draw_all(entries, {m.entry.method for m in found if m.cell["baseline"]}, docs)
    titles = {m.cell["name"]: m.entry.label for m in found}
    overlaps = [
        Overlap(
            m.entry.label,
            titles.get(m.cell["prior"], m.cell["prior"]),
            m.cell["overlap"]["iou"],
            m.cell["overlap"]["chance"],
            {int(layer): value for layer, value in m.cell["overlap"]["layers"].items()},
        )
        for m in learned
    ]
    pictures += draw_overlaps(overlaps, docs)
    yield "## Pictures"
    for picture in pictures:
        yield f"![{picture.caption}]({docs.name}/{picture.stem}.png)"
        yield picture.caption
    if learned:
        shares = [f"{m.entry.label}: {m.cell['overlap']['changed']:.2%}" for m in learned]
        yield f"Mask bits that differ from the prior: {'; '.join(shares)}."


def _texts(found: Sequence[Measured]) -> list[str]:
    return [found[0].cell["texts"][role] for role in ROLES]


# -- what the figures depend on ---------------------------------------------------------------------------------


def _protocol(found: Sequence[Measured]) -> Iterator[str]:
    yield "## Protocol"
    for role in ROLES:
        figure, text = found[0].perplexity(role), found[0].cell["texts"][role]
        yield (
            f"Perplexity, {role}: the first {figure['tokens']:,} tokens of `{text}`, documents joined by a blank line, "
            f"in windows of {figure['seq_length']} tokens, stride {figure['stride']}, mean over all predicted tokens; "
            f"weights and computation in {found[0].result['model']['dtype']}."
        )
    scores: dict[str, dict[str, Any]] = {}
    for measured in found:
        scores |= measured.entry.tasks
    if scores:
        said = [
            f"{task}: {score['samples']} questions of {score['split']}"
            + ("" if score["limit"] is None else f" (limit {score['limit']})")
            for task, score in sorted(scores.items())
        ]
        yield (
            "Zero-shot accuracy (`acc`) by lm-eval's own prompts, the mean giving each task the same weight. "
            f"A limit of a group is one of each of its tasks. {'; '.join(said)}."
        )
    yield (
        "A learned row's hard mask keeps exactly the asked share of the weights, and the kept ones are the base "
        "model's. Of several learned rows the better is chosen by perplexity on the validation text, never by the "
        "texts above."
    )


def _hardware(found: Sequence[Measured]) -> Iterator[str]:
    yield "## Hardware and versions"
    seen: dict[str, list[str]] = {}
    for m in found:
        told = m.result["hardware"]
        where = told.get("gpu") or f"{told['processor']} ({told['cores']} cores, {told['threads']} threads)"
        versions = ", ".join(f"{name} {version}" for name, version in sorted(m.result["versions"].items()))
        seen.setdefault(f"{where}; {versions}; commit {m.result['commit']}", []).append(m.cell["name"])
    for said, names in seen.items():
        yield f"{said}: {', '.join(names) if len(seen) > 1 else 'all cells'}."
    peaks = [f"{m.cell['name']} {m.cell['peak_rss'] / 2**30:.1f} GiB" for m in found if m.cell["peak_rss"]]
    if peaks:
        yield f"Most memory while a mask was made: {', '.join(peaks)}."


def _configs(found: Sequence[Measured], docs: Path) -> Iterator[str]:
    learned = [m for m in found if "trainer" in m.cell["settings"]]
    if not learned:
        return
    (docs / "configs").mkdir(exist_ok=True)
    for m in learned:
        with atomic_file(docs / "configs" / f"{m.cell['name']}.yaml") as temporary:
            temporary.write_text(yaml.safe_dump(m.cell["settings"], sort_keys=False), encoding="utf-8")
    yield "## Configs of the learned rows"
    shared = _shared([m.cell["settings"] for m in learned])
    yield f"Each in full in [`{docs.name}/configs`]({docs.name}/configs). What all of them say:"
    yield _fenced(yaml.safe_dump(shared, sort_keys=False), "yaml")
    for m in learned:
        yield f"`{m.cell['name']}` says besides:"
        yield _fenced(yaml.safe_dump(_without(m.cell["settings"], shared), sort_keys=False), "yaml")


def _shared(settings: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What all of ``settings`` say alike."""
    first, *others = settings
    shared: dict[str, Any] = {}
    for key, value in first.items():
        if not all(key in other for other in others):
            continue
        values = [other[key] for other in others]
        if isinstance(value, dict) and all(isinstance(v, dict) for v in values):
            below = _shared([value, *values])
            shared |= {key: below} if below else {}
        elif all(v == value for v in values):
            shared[key] = value
    return shared


def _without(settings: dict[str, Any], shared: dict[str, Any]) -> dict[str, Any]:
    """What ``settings`` say and ``shared`` does not."""
    left: dict[str, Any] = {}
    for key, value in settings.items():
        if key not in shared:
            left[key] = value
        elif isinstance(value, dict) and (below := _without(value, shared[key])):
            left[key] = below
    return left


def _commands(found: Sequence[Measured]) -> Iterator[str]:
    yield "## Commands"
    yield (
        "`make results` runs these. A learned cell's `fit.yaml` is the config above; a stopped one goes on with "
        "`--ckpt_path` and its last checkpoint."
    )
    lines = []
    for m in found:
        lines += [f"# {m.cell['name']}", *(f"leap_pl {' '.join(words)}" for words in m.cell["commands"])]
    yield _fenced("\n".join(lines), "bash")


def _fenced(text: str, language: str) -> str:
    return f"```{language}\n{text.strip()}\n```"


def _notes(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else f"Nothing is written down yet (in `{path.name}`)."
