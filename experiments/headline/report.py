"""The report: docs/results.md, its pictures and configs, from the cells' JSON files and from nothing else."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from experiments.headline.experiment import UNSTRUCTURED
from experiments.headline.measured import ROLES, Measured, groups, read_cells
from experiments.headline.tables import KEY, difference_table, main_table, task_table
from leap_pl.base_model.prefix import in_words
from leap_pl.files import atomic_file

FAR_OFF = 10  # times the reference's perplexity
NOTES = "notes.md"  # what is written by hand, and stays


def write_report(cells: Path, docs: Path) -> Path:
    """Write the report beside the folder ``docs``, and pictures and configs into it; returns its path.

    Args:
        cells: Folder of the cells' files.
        docs: Folder of pictures, of the configs, and of ``notes.md``, which is taken in and never written.

    Raises:
        UserError: The cells cannot be read or do not fit together.
    """
    found = read_cells(cells)
    docs.mkdir(parents=True, exist_ok=True)
    for old in [*docs.glob("*.png"), *docs.glob("*.svg"), *docs.glob("configs/*.yaml")]:
        old.unlink()
    parts = [
        "# Results",
        f"Written by `make results`; every figure is from the files in [`{docs.name}/cells`]({docs.name}/cells), and "
        "`python -m experiments.headline --report --from docs/results/cells` writes this page again from them.",
        *found[0].cell["about"],
        *_tables(found),
        *_pictures(found, docs),
        *_protocol(found),
        *_machines(found),
        *_configs(found, docs),
        *_commands(found),
        "## What did not work",
        _notes(docs / NOTES),
    ]
    path = docs.with_suffix(".md")
    with atomic_file(path) as temporary:
        temporary.write_text("\n\n".join(part.strip("\n") for part in parts if part) + "\n", encoding="utf-8")
    return path


def _tables(found: Sequence[Measured]) -> Iterator[str]:
    for group in groups(found):
        yield f"## {group.heading}"
        yield main_table(group)
        yield difference_table(group)
    yield KEY
    scores = task_table(found)
    if scores:
        yield "## Accuracy by task"
        yield scores
        yield "A quick look where a limit is named below: the first questions of each task only."


# -- pictures -------------------------------------------------------------------------------------------------


def _pictures(found: Sequence[Measured], docs: Path) -> Iterator[str]:
    from leap_pl.comparison.overlap import Overlap
    from leap_pl.comparison.pictures import draw_all, draw_overlaps, draw_perplexities

    tables = groups(found)
    best = [group.best_learned for group in tables if group.table == UNSTRUCTURED]
    far = _far_off(found)
    near = {
        m.cell["name"]: replace(m.entry, perplexity={} if m.title in far else m.entry.perplexity, densities={})
        for m in found
    }
    entries = [
        replace(near[m.cell["name"]], densities=m.entry.densities if m in best else {})
        for m in sorted(found, key=lambda m: m.cell["sparsity"] or 0)
        if m.cell["table"] == UNSTRUCTURED
    ]
    pictures = draw_all(entries, {title for group in tables for title in group.baselines}, docs)
    formed = [m for m in found if m.cell["table"] != UNSTRUCTURED]
    if formed:
        dense = [m for m in found if m.is_dense]
        drawn = draw_perplexities([near[m.cell["name"]] for m in dense + formed], docs, "forms")
        names = " and ".join(dict.fromkeys(m.cell["table"] for m in formed))
        pictures += [replace(picture, caption=f"{picture.caption} Tables: {names}.") for picture in drawn]
    labels = {m.cell["name"]: m.entry.label for m in found}
    agreeing = [m for m in found if m.cell["overlap"] is not None]
    overlaps = []
    for m in agreeing:
        told, prior = m.cell["overlap"], m.cell["prior"]
        layers = {int(layer): value for layer, value in told["layers"].items()}
        overlaps.append(Overlap(m.entry.label, labels.get(prior, prior), told["iou"], told["chance"], layers))
    pictures += draw_overlaps(overlaps, docs)
    yield "## Pictures"
    yield "Each is there as SVG too. Densities are those of the best learned mask of each sparsity, by validation text."
    if far:
        yield (
            f"Perplexities of {', '.join(sorted(far))} are in the tables alone: they are more than {FAR_OFF} times the "
            "reference's everywhere, and would press the others together."
        )
    for picture in pictures:
        yield f"![{picture.caption}]({docs.name}/{picture.stem}.png)"
        yield picture.caption
    if agreeing:
        shares = [f"{m.entry.label}: {m.cell['overlap']['changed']:.2%}" for m in agreeing]
        yield f"Mask bits that differ from the prior: {'; '.join(shares)}."


def _far_off(found: Sequence[Measured]) -> set[str]:
    """Titles of the rows that are far above the reference at every sparsity and on every text."""
    near, seen = set(), set()
    for group in groups(found):
        for m in group.rows if group.reference else ():
            seen.add(m.title)
            assert group.reference is not None
            if any(m.perplexity(r)["value"] <= FAR_OFF * group.reference.perplexity(r)["value"] for r in ROLES):
                near.add(m.title)
    return seen - near


# -- what the figures depend on -------------------------------------------------------------------------------


def _protocol(found: Sequence[Measured]) -> Iterator[str]:
    yield "## Protocol"
    for role in ROLES:
        figure, text = found[0].perplexity(role), found[0].cell["texts"][role]
        begun = "".join(f", {words}" for words in in_words(figure))
        yield (
            f"Perplexity, {text['title']}: the first {figure['tokens']:,} tokens of `{text['text']}`, documents joined "
            f"by a blank line, in windows of {figure['seq_length']} tokens{begun}, stride {figure['stride']}, mean "
            "over all predicted tokens; weights and computation of the evaluation in "
            f"{found[0].result['model']['dtype']}."
        )
    scores: dict[str, dict[str, Any]] = {}
    for measured in found:
        scores |= measured.entry.tasks
    if scores:
        said = [
            f"{task} {score['samples']:,} questions of {score['split']}"
            + ("" if score["limit"] is None else f" (limit {score['limit']})")
            for task, score in sorted(scores.items())
        ]
        yield (
            "Zero-shot accuracy (`acc`) by lm-eval's own prompts; the mean gives each task the same weight. The limit "
            f"of a group is one of each of its tasks. {'; '.join(said)}."
        )
    yield (
        "A learned mask keeps exactly the asked share of the weights, and what it keeps are the base model's, bit for "
        "bit; SparseGPT, ADMM and the weight update change what they keep. Which of several learned masks is best is "
        "decided on the validation text, on none of the texts and tasks above."
    )
    for measured in found:
        if measured.cell["kept"]:
            yield f"{measured.entry.label}: the mask of `{measured.cell['kept']}`."


def _machines(found: Sequence[Measured]) -> Iterator[str]:
    yield "## Hardware and versions"
    seen: dict[str, list[str]] = {}
    for m in found:
        told = m.result["hardware"]
        where = told.get("gpu") or f"{told['processor']} ({told['cores']} cores, {told['threads']} threads)"
        versions = ", ".join(f"{name} {version}" for name, version in sorted(m.result["versions"].items()))
        seen.setdefault(f"{where}; {versions}; commit {m.result['commit']}", []).append(f"`{m.cell['name']}`")
    for said, names in seen.items():
        yield f"{'All cells' if len(seen) == 1 else ', '.join(names)}: {said}."
    types: dict[str, list[str]] = {}
    for m in found:
        if m.is_learned and "dtype" in m.result["config"]:
            types.setdefault(m.result["config"]["dtype"], []).append(f"`{m.cell['name']}`")
    if types:
        by_type = [f"{dtype} ({', '.join(names)})" for dtype, names in sorted(types.items())]
        yield f"Weights and computation while a mask was learned: {'; '.join(by_type)}."
    peaks = [f"`{m.cell['name']}` {m.cell['peak_rss'] / 2**30:.1f} GiB" for m in found if m.cell["peak_rss"]]
    if peaks:
        yield f"Most memory held while a mask was made: {', '.join(peaks)}."


def _configs(found: Sequence[Measured], docs: Path) -> Iterator[str]:
    learned = [m for m in found if m.is_learned]
    if not learned:
        return
    (docs / "configs").mkdir(exist_ok=True)
    for m in learned:
        with atomic_file(docs / "configs" / f"{m.cell['name']}.yaml") as temporary:
            temporary.write_text(yaml.safe_dump(m.cell["settings"], sort_keys=False), encoding="utf-8")
    shared = shared_settings([m.cell["settings"] for m in learned])
    yield "## Configs of the learned rows"
    yield f"Each lies in full in [`{docs.name}/configs`]({docs.name}/configs). What all of them say:"
    yield _fenced(yaml.safe_dump(shared, sort_keys=False), "yaml")
    for m in learned:
        own = without(m.cell["settings"], shared)
        if own:
            yield f"`{m.cell['name']}` says besides:"
            yield _fenced(yaml.safe_dump(own, sort_keys=False), "yaml")


def shared_settings(settings: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What all of ``settings`` say alike."""
    first, *others = settings
    shared: dict[str, Any] = {}
    for key, value in first.items():
        if not all(key in other for other in others):
            continue
        values = [other[key] for other in others]
        if isinstance(value, dict) and all(isinstance(v, dict) for v in values):
            below = shared_settings([value, *values])
            shared |= {key: below} if below else {}
        elif all(v == value for v in values):
            shared[key] = value
    return shared


def without(settings: dict[str, Any], shared: dict[str, Any]) -> dict[str, Any]:
    """What ``settings`` say and ``shared`` does not."""
    left: dict[str, Any] = {}
    for key, value in settings.items():
        if key not in shared:
            left[key] = value
        elif isinstance(value, dict) and (below := without(value, shared[key])):
            left[key] = below
    return left


def _commands(found: Sequence[Measured]) -> Iterator[str]:
    yield "## Commands"
    yield (
        "`make results` runs these, `make results ARGS='--only leap-lm-60'` a part of them. `fit.yaml` is the config "
        "of that name above; a fit that was stopped goes on with `--ckpt_path` and its last checkpoint."
    )
    lines = []
    for m in found:
        lines += [f"# {m.cell['name']}", *(f"leap_pl {' '.join(words)}" for words in m.cell["commands"])]
    yield _fenced("\n".join(lines), "bash")


def _fenced(text: str, language: str) -> str:
    return f"```{language}\n{text.strip()}\n```"


def _notes(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else f"Nothing is written down yet (in `{path.name}`)."
