"""What is known of a finished cell, in one file: a result file of ``leap_pl evaluate`` with more."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.headline.experiment import ROLES
from leap_pl.escape import say
from leap_pl.evaluation.record import read_result, write_result
from leap_pl.files import atomic_file
from leap_pl.oneshot.methods import DEFAULT, METHODS, method_named

if TYPE_CHECKING:
    from experiments.headline.experiment import Cell, Experiment
    from experiments.headline.progress import Progress
    from experiments.headline.steps import Step

SUPERSEDED = "superseded"  # folder of cells that other settings have taken the place of
UNKNOWN = "unknown"  # commit of what was measured in a folder that is no clone


def collect(progress: "Progress", folder: Path, *, moves: bool = True) -> int:
    """Write one file a finished cell into ``folder``; returns how many are there that are of today's settings.

    A file of a cell that is no longer in the experiment, or was made with other settings or inputs, is
    moved aside, and named, with ``moves``; else it is named alone.
    A file of a cell that was not made here stays as long as it belongs to the experiment as it is today, and takes from
    it how the cell is shown: rows may have been renamed, or put elsewhere, since it was made.
    """
    cells, there = progress.chosen([]), 0  # each after those that it needs
    for path in folder.glob("*.json"):
        if path.stem not in progress.experiment.cells:
            _put_aside(path, "is not a cell of the experiment", moves=moves)
    for cell in cells:
        path = folder / f"{cell.name}.json"
        if progress.is_finished(cell):
            write_cell(progress, cell, path)
            there += 1
        elif not progress.is_within_reach(cell):  # whether its file is of today's settings cannot be said
            if path.exists():
                there += 1
                _show_as_today(progress.experiment, cell, path)
        elif is_current(progress, cell, folder):
            there += 1
            _show_as_today(progress.experiment, cell, path)
        elif path.exists():
            _put_aside(path, "was made with other settings or inputs than today's", moves=moves)
    return there


def _show_as_today(experiment: "Experiment", cell: "Cell", path: Path) -> None:
    """Write into the file of ``cell`` how the experiment of today names it and where it puts it."""
    result = read_result(path)
    shown = result["cell"] | _shown(experiment, cell)
    if shown != result["cell"]:
        write_result(path, result | {"cell": shown})


def _put_aside(path: Path, why: str, *, moves: bool) -> None:
    aside = path.parent / SUPERSEDED / path.name  # another machine's cannot be made again here
    say(f"{path} {why}{f', and is moved to {aside.parent}' if moves else ''}", sys.stderr)
    if moves:
        aside.parent.mkdir(exist_ok=True)
        path.replace(aside)


def is_current(progress: "Progress", cell: "Cell", folder: Path) -> bool:
    """Whether there is a file of ``cell`` in ``folder`` that says what would be said if it were made here and now."""
    path = folder / f"{cell.name}.json"
    if not path.is_file():
        return False
    told = read_result(path).get("cell", {})
    if not all((folder / f"{name}.json").is_file() for name in cell.best_of):
        return False
    kept = progress.kept(cell) if cell.best_of else None
    if cell.best_of and (kept is None or kept.name != told.get("kept")):
        return False
    steps = progress.all_steps(cell, kept)
    return steps is not None and told.get("digests") == {step.name: step.digest for step in steps}


def write_cell(progress: "Progress", cell: "Cell", path: Path) -> None:
    """Write all that is known of the finished ``cell``.

    The evaluations of its steps are put together, and ``cell`` says what was done, with which settings.
    """
    from leap_pl.evaluation.tasks import mean_accuracy

    steps = progress.all_steps(cell)
    assert steps is not None
    measured = {step.name: read_result(step.output) for step in steps if step.words[:1] == ["evaluate"]}
    merged, *others = measured.values()
    commits = {name: str(result["commit"] or UNKNOWN) for name, result in measured.items()}
    for result in others:
        merged["perplexity"] |= result["perplexity"]
        merged["tasks"] |= result["tasks"]
        for name, seconds in result["times"]["seconds"].items():
            merged["times"]["seconds"][name] = round(merged["times"]["seconds"].get(name, 0) + seconds, 2)
    merged["mean"] = mean_accuracy(merged["tasks"])
    merged["cell"] = _told(progress, cell, steps) | {"commits": commits}
    write_result(path, merged)


def _told(progress: "Progress", cell: "Cell", steps: "list[Step]") -> dict[str, Any]:
    experiment, record = progress.experiment, progress.record(cell)
    kept = progress.kept(cell) if cell.best_of else None
    made = record.get("make", {})
    overlap = next((json.loads(s.output.read_text(encoding="utf-8")) for s in steps if s.name == "overlap"), None)
    return {
        **_shown(experiment, cell),
        "settings": _settings(progress, cell),
        "prior": cell.prior,
        "mask_of": cell.mask,
        "kept": kept and kept.name,
        "tokens": _tokens(progress, kept or cell),
        "calibration_tokens": _calibration(progress, cell),
        "seconds": round(made["seconds"], 1) if made else None,
        "peak_rss": made.get("peak_rss"),
        "digests": {step.name: step.digest for step in steps},
        "commands": [record[step.name]["words"] for step in steps if step.words],
        "overlap": overlap,
        "mask": told_mask(progress.steps.mask(cell)) if made else None,
    }


def _shown(experiment: "Experiment", cell: "Cell") -> dict[str, Any]:
    """How the experiment of today names ``cell`` and where it puts it in the report."""
    texts = experiment.texts
    return {
        "name": cell.name,
        "row": cell.row,
        "title": cell.title,
        "order": list(experiment.cells).index(cell.name),
        "sparsity": cell.sparsity,
        "table": cell.table,
        "text": cell.text,
        "repeat_of": cell.repeat_of,
        "compared_with": cell.compared_with if cell.compared_with in experiment.cells else None,
        "baseline": cell.baseline,
        "reference": cell.reference,
        "about": [*cell.model.about, *filter(None, (texts[role].about for role in cell.texts))],
        "texts": {role: {"text": texts[role].text, "title": texts[role].title or role} for role in ROLES + cell.texts},
    }


def told_mask(path: Path) -> str:
    """What tells whether two masks are the same: SHA-256 of their bits, whatever their provenance."""
    from leap_pl.masks import MaskSet

    return MaskSet.load(path).digest_of_bits()


def _settings(progress: "Progress", cell: "Cell") -> dict[str, Any]:
    """What ``cell`` was made with: options of prune, or the config of fit, as it was when it was made."""
    made = progress.record(cell).get("make", {})
    if "settings" in made:
        return dict(made["settings"])
    return progress.steps.fit_config(cell) if cell.fit is not None else dict(cell.prune or {})


def _tokens(progress: "Progress", cell: "Cell") -> int:
    """Tokens that a mask, and weights under it, were learned from."""
    if cell.fit is None:
        return 0
    config = _settings(progress, cell)
    before = 0 if cell.mask is None else _tokens(progress, progress.experiment.cells[cell.mask])
    return before + int(config["trainer"]["max_steps"] * progress.steps.tokens_of_step(config))


def _calibration(progress: "Progress", cell: "Cell") -> int:
    """Tokens that the one-shot part of ``cell`` read: its own, or that of its prior or mask."""
    source = cell.prior or cell.mask
    if source is not None:
        return _calibration(progress, progress.experiment.cells[source])
    if cell.fit is not None:
        config = _settings(progress, cell)
        prior = {"method": DEFAULT, "sequences": 128, **config["model"].get("prior", {})}
        reads = prior.get("mask") is None and prior["method"] in METHODS and METHODS[prior["method"]].needs is not None
        return int(prior["sequences"] * config["data"]["seq_length"]) if reads else 0
    if cell.prune is None or method_named(cell.prune.get("method", DEFAULT)).needs is None:
        return 0
    return int(cell.prune.get("sequences", 128) * cell.prune.get("seq_length", 2048))


def write_overlap(mask: Path, prior: Path, output: Path) -> None:
    """Write to ``output`` how far a learned mask agrees with its prior: IoU, by layer too, and bits that differ."""
    from leap_pl.comparison.entries import read_entries
    from leap_pl.comparison.overlap import overlap

    (first,), (second,) = read_entries([str(mask)]), read_entries([str(prior)])  # together, equal masks are one
    found = overlap(first, second)
    assert found is not None
    assert first.mask is not None
    assert second.mask is not None
    others = second.mask.masks
    changed = sum(int((bits ^ others[name]).sum()) for name, bits in first.mask.masks.items())
    told = {
        "iou": found.iou,
        "chance": found.chance,
        "layers": {str(layer): value for layer, value in found.layers.items()},
        "changed": changed / first.mask.total,
    }
    with atomic_file(output) as temporary:
        temporary.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
