"""The report: docs/results.md and its pictures, from the cells' JSON files and from nothing else."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.headline import making
from experiments.headline.experiment import SHOWN, UNSTRUCTURED
from experiments.headline.measured import Measured, by_model, groups, read_cells
from experiments.headline.overview import best_rows, draw_overview, losses, verdict
from experiments.headline.pairs import NOTE, pairs_table
from experiments.headline.tables import (
    KEY,
    calibration,
    difference_table,
    main_table,
    overview_table,
    seeds_table,
    task_table,
)
from leap_pl.masks.patterns import has_form

if TYPE_CHECKING:
    from leap_pl.comparison.drawing import Picture

FAR_OFF = 10  # times the reference's perplexity
NOTES = "notes.md"  # what did not work; written by hand
ON_TEST = ("arc_easy", "arc_challenge", "openbookqa")  # tasks whose published figures are of the test split
SEEDS = (
    "Learned with several seeds (the gates' noise and the order of the text): mean and standard deviation over them."
)


def write_report(cells: Path, docs: Path) -> Path:
    """Write the report beside the folder ``docs``, and pictures and how it was made into it; returns its path.

    Args:
        cells: Folder of the cells' files.
        docs: Folder of the rest. If ``notes.md`` is in it, the report has a link to that.

    Raises:
        UserError: The cells cannot be read or do not fit together, or another page is where the report belongs.
    """
    found = read_cells(cells)
    before = making.shown_files(docs)
    docs.mkdir(parents=True, exist_ok=True)
    notes = f" [What did not work]({docs.name}/{NOTES})." if (docs / NOTES).is_file() else ""
    models = by_model(found)
    parts = [
        f"# {docs.name.replace('_', ' ').capitalize()}",
        *_overview(found, docs),
        "## About these figures",
        f"{KEY}{calibration(found)}",
        *dict.fromkeys(sentence for measured in found for sentence in measured.cell["about"]),
        f"[Protocol, hardware, configs and commands]({docs.name}/{making.PAGE}).{notes}",
        f"Written by `{making.command_of(docs)}`; every figure is from the files in [`{docs.name}/cells`]({docs.name}"
        f"/cells), and `{making.command_to_write(docs)}` writes this page again from them.",
    ]
    for number, (model, rows) in enumerate(models.items()):
        parts += [f"## {model}", *_tables(rows, docs), *_pictures(rows, docs, docs / model if number else docs)]
    path = docs.with_name(f"{docs.name}.md")  # a name may have a dot: docs/results-0.2
    making.write_page(path, parts)
    making.write_making(found, docs)
    for old in before - making.shown_files(docs):
        old.unlink()
    return path


def _overview(found: Sequence[Measured], docs: Path) -> Iterator[str]:
    rows, lead = best_rows(found), verdict(found)
    if lead:
        yield lead
    yield overview_table(rows, found)
    yield (
        "Shown are the dense model; the method that does not learn with the lowest perplexity (geometric mean of the "
        "first two texts), and that with the best mean accuracy, if it is another; and, for each number of training "
        "tokens, of the learned masks with the most seeds, that with the lowest perplexity on the validation text, in "
        "the mean over seeds. Rows that train weights are further below. "
        "Minutes include those of the mask that a row starts from; machines differed, and some did other work beside, "
        "so rows are not compared by them. Figures are of one seed; the tables below have the mean over seeds of rows "
        "with several."
    )
    picture = draw_overview(rows, docs)
    if picture is not None:
        yield _shown(picture, docs, docs)
    told = losses(found, rows)
    if told:
        yield "## Where learning loses"
        yield "\n".join(f"- {sentence}" for sentence in told)


def _tables(found: Sequence[Measured], docs: Path) -> Iterator[str]:
    for group in groups(found):
        yield f"### {group.heading}"
        yield main_table(group, found)
        yield difference_table(group)
        seeds = seeds_table(group)
        if seeds:
            yield SEEDS
            yield seeds
    pairs = pairs_table(found)
    if pairs:
        yield "### What a change is worth"
        yield NOTE
        yield pairs
    scores = task_table(found)
    if scores:
        yield "### Accuracy by task"
        yield scores
        yield (
            f"A quick look where [the protocol]({docs.name}/{making.PAGE}#protocol) names a limit: the first questions "
            "of each task only."
        )
        yield from _other_splits(found)


def _other_splits(found: Sequence[Measured]) -> Iterator[str]:
    """Sentence on the tasks that are asked on another split than lm-eval's, and than published figures are of."""
    splits = {(task, score["split"]) for m in found for task, score in m.entry.tasks.items()}
    other = [task for task in ON_TEST if (task, "validation") in splits]
    if other:
        yield (
            f"Questions of the validation split, which is what the package has: {', '.join(other)}. Published figures "
            "are of the test split, and not to be compared with these."
        )


# -- pictures -------------------------------------------------------------------------------------------------


def _pictures(found: Sequence[Measured], docs: Path, folder: Path) -> Iterator[str]:
    """Pictures of the cells of one model, which are drawn into ``folder``: ``docs``, or one in it."""
    from leap_pl.comparison.overlap import Overlap
    from leap_pl.comparison.pictures import draw_all, draw_overlaps, draw_perplexities

    found = [m for m in found if m.repeat_of is None]
    folder.mkdir(exist_ok=True)
    tables = groups(found)
    best = [group.best_learned for group in tables if group.table == UNSTRUCTURED and group.text is None]
    far = _far_off(found)
    near = {
        m.cell["name"]: replace(m.entry, perplexity={} if m.title in far else _of_roles(m), densities={}) for m in found
    }
    entries = [
        replace(near[m.cell["name"]], densities=m.entry.densities if m in best else {})
        for m in sorted(found, key=lambda m: m.cell["sparsity"] or 0)
        if m.cell["table"] == UNSTRUCTURED and m.cell.get("text") is None
    ]
    pictures = draw_all(entries, {title for group in tables for title in group.baselines}, folder)
    formed = [m for m in found if m.cell["table"] != UNSTRUCTURED]
    if formed:
        dense = [m for m in found if m.is_dense]
        drawn = draw_perplexities([near[m.cell["name"]] for m in dense + formed], folder, "forms")
        names = " and ".join(dict.fromkeys(m.cell["table"] for m in formed))
        pictures += [replace(picture, caption=f"{picture.caption} Tables: {names}.") for picture in drawn]
    labels = {m.cell["name"]: m.entry.label for m in found}
    patterns = {m.cell["name"]: m.entry.pattern for m in found}
    # How far a mask is from a prior of another form says little of what it learned.
    agreeing = [
        m
        for m in found
        if m.cell["overlap"] is not None and has_form(patterns.get(m.cell["prior"], ""), m.entry.pattern)
    ]
    overlaps = []
    for m in agreeing:
        told, prior = m.cell["overlap"], m.cell["prior"]
        layers = {int(layer): value for layer, value in told["layers"].items()}
        overlaps.append(Overlap(m.entry.label, labels.get(prior, prior), told["iou"], told["chance"], layers))
    pictures += draw_overlaps(overlaps, folder)
    yield "### Pictures"
    yield "Densities are those of the best learned mask of each sparsity, by validation text, of those with most seeds."
    if far:
        yield (
            f"Perplexities of {', '.join(sorted(far))} are in the tables alone: they are more than {FAR_OFF} times the "
            "reference's everywhere, and would press the others together."
        )
    for picture in pictures:
        yield _shown(picture, folder, docs)
    if agreeing:
        shares = [f"{m.entry.label}: {m.cell['overlap']['changed']:.2%}" for m in agreeing]
        yield f"Mask bits that differ from the prior: {'; '.join(shares)}."


def _shown(picture: "Picture", folder: Path, docs: Path) -> str:
    """The picture in ``folder`` with its caption, in the Markdown of the page beside ``docs``."""
    path = (folder / picture.file).relative_to(docs.parent).as_posix()
    return f"![{picture.caption}]({path})\n\n{picture.caption}"


def _of_roles(measured: Measured) -> dict[str, Any]:
    """Perplexities on the texts that every cell is measured on: pictures show no others."""
    return {measured.titles[role]: measured.entry.perplexity[measured.titles[role]] for role in SHOWN}


def _far_off(found: Sequence[Measured]) -> set[str]:
    """Titles of the rows that are far above the reference at every sparsity and on every text."""
    near, seen = set(), set()
    for group in groups(found):
        for m in group.rows if group.reference else ():
            seen.add(m.title)
            assert group.reference is not None
            if any(m.perplexity(r)["value"] <= FAR_OFF * group.reference.perplexity(r)["value"] for r in SHOWN):
                near.add(m.title)
    return seen - near
