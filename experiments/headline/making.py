"""How the figures of the report were made: docs/results/making.md, and the configs beside it."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from experiments.headline.cells import UNKNOWN
from experiments.headline.measured import Measured, by_model, titles_of
from experiments.headline.tables import cost_table
from leap_pl.base_model.prefix import in_words
from leap_pl.errors import UserError, listing
from leap_pl.escape import markdown, terminal
from leap_pl.files import atomic_file

PAGE = "making.md"
TITLE = "# How the results were made"  # first line of that page
WRITTEN = "Written by `make results"  # what the report says of itself
HEADLINE = "results"  # folder of documents of the headline experiment
# Folder of documents that is shipped → definition in configs/results.
DEFINITIONS = {HEADLINE: "headline.yaml", "tasks_in_full": "in_full.yaml"}


def write_making(found: Sequence[Measured], docs: Path) -> None:
    """Write into ``docs`` the page of protocol, hardware, configs and commands, and the configs of learned rows."""
    parts = [
        TITLE,
        f"Of the tables and pictures in [{docs.name}](../{docs.name}.md).",
        *_protocol(found),
        "## Cost",
        cost_table(found),
        "Passes are those over the training text, the last one begun, where they were recorded: a text that is read "
        "twice is fitted better than learned from. Calibration tokens were read by the one-shot method, or by the one "
        "that made the prior. Minutes and memory, the most that was held, are those of what a row adds to the mask "
        "that it begins from, or keeps. Seconds a step are those minutes by optimizer steps, start and validations "
        "included.",
        *_machines(found),
        *_configs(found, docs / "configs"),
        *_commands(found, command_of(docs)),
    ]
    write_page(docs / PAGE, parts)


def command_of(docs: Path) -> str:
    """The command that makes the cells of ``docs``: of a folder that is not shipped, with a name for its definition."""
    if _is_shipped(docs, HEADLINE):
        return "make results"
    config, place = "DEFINITION.yaml", docs.as_posix()
    if _is_shipped(docs, *DEFINITIONS):
        config, place = f"configs/results/{DEFINITIONS[docs.name]}", f"docs/{docs.name}"
    return f'make results ARGS="--config {config} --docs {place}"'


def command_to_write(docs: Path) -> str:
    """The command that writes the report of ``docs`` again from the files of its cells."""
    place = f"docs/{docs.name}" if _is_shipped(docs, *DEFINITIONS) else docs.as_posix()
    named = "" if _is_shipped(docs, HEADLINE) else f" --docs {place}"
    return f"python -m experiments.headline --report --from {place}/cells{named}"


def _is_shipped(docs: Path, *names: str) -> bool:
    """Whether ``docs`` is a folder of one of these names in the documents of a clone."""
    return docs.parts[-2:] in [("docs", name) for name in names]


def shown_files(docs: Path) -> set[Path]:
    """Return pictures and configs in ``docs`` that the report and its page of making show, if they were written before.

    Raises:
        UserError: Where a page is to be written there is another.
    """
    found = set()
    for page, sign in ((docs.with_name(f"{docs.name}.md"), WRITTEN), (docs / PAGE, TITLE)):
        if page.exists():
            text = page.read_text(encoding="utf-8", errors="replace")
            if sign not in text:
                raise UserError(f"{page} is not of a report, and would be replaced. Name another folder with --docs.")
            for link in re.findall(r"\]\(([^()]+\.(?:svg|yaml))\)", text):
                file = page.parent / link
                if ".." not in Path(link).parts and file.is_relative_to(docs) and file.is_file():
                    found.add(file)
    return found


def write_page(path: Path, parts: Sequence[str]) -> None:
    """Write the Markdown ``parts``, those that are empty left out, to ``path``."""
    with atomic_file(path) as temporary:
        temporary.write_text("\n\n".join(part.strip("\n") for part in parts if part) + "\n", encoding="utf-8")


def _protocol(found: Sequence[Measured]) -> Iterator[str]:
    yield "## Protocol"
    for role, title in titles_of(found).items():
        said: dict[str, list[str]] = {}
        for model, rows in by_model(found).items():
            measured = next((row for row in rows if role in row.titles), None)
            if measured is not None:
                said.setdefault(_perplexity_protocol(measured, role), []).append(model)
        for words, models in said.items():
            yield f"Perplexity, {title}{f', {listing(models)}' if len(said) > 1 else ''}: {words}"
    scores: dict[str, dict[str, Any]] = {}
    for measured in found:
        scores |= measured.entry.tasks
    if scores:
        limits = [
            f"{markdown(task)} {score['samples']:,} questions of {markdown(score['split'])}"
            + ("" if score["limit"] is None else f" (limit {score['limit']})")
            for task, score in sorted(scores.items())
        ]
        yield (
            "Zero-shot accuracy (`acc`) by lm-eval's own prompts; the mean gives each task the same weight. The limit "
            f"of a group is one of each of its tasks. {'; '.join(limits)}."
        )
    yield (
        "A learned mask keeps exactly the asked share of the weights (one of tiles, as near to it as its tiles allow), "
        "and what it keeps are the base model's, bit for bit; SparseGPT, ADMM, the weight update and training weights "
        "change what they keep. Which of several learned masks is best is decided on the validation text, on none of "
        "the texts and tasks above."
    )
    for measured in found:
        if measured.cell["kept"]:
            yield f"{measured.entry.label}: the mask of `{measured.cell['kept']}`."
        if measured.cell.get("mask_of"):
            yield f"{measured.entry.label}: the mask of `{measured.cell['mask_of']}`."
    yield from _made_again(found)


def _made_again(found: Sequence[Measured]) -> Iterator[str]:
    """Which cells began from a mask whose bits are not, or may not be, those of the cell that it is named after."""
    cells = {m.cell["name"]: m.cell for m in found}
    other: list[str] = []
    unknown: list[str] = []
    for m in found:
        name = m.cell.get("prior") or m.cell.get("mask_of")
        began = (m.result["config"].get("prior_digests") or {}).get("prior") if m.has_config else None
        if name is None or name not in cells or not m.has_config:
            continue
        named = cells[name].get("mask")
        if None in (began, named):
            unknown.append(f"`{m.cell['name']}` (`{name}`)")
        elif began != named:
            other.append(f"`{m.cell['name']}` (`{name}`)")
    if other or unknown:
        yield (
            "A mask that a row begins from is made by the commands of the cell that it is named after, on the machine "
            "of the row: on other processors a few bits of it come out otherwise."
            + (f" They did for {', '.join(other)}." if other else "")
            + (f" Whether they did is not known for {', '.join(unknown)}." if unknown else "")
        )


def _perplexity_protocol(measured: Measured, role: str) -> str:
    figure, text = measured.perplexity(role), measured.cell["texts"][role]["text"]
    begun, dtype = "".join(f", {words}" for words in in_words(figure)), measured.result["model"]["dtype"]
    return (
        f"the first {figure['tokens']:,} tokens of `{text}`, documents joined by a blank line, in windows of "
        f"{figure['seq_length']} tokens{begun}, stride {figure['stride']}, mean over all predicted tokens; weights and "
        f"computation of the evaluation in {dtype}."
    )


def _machines(found: Sequence[Measured]) -> Iterator[str]:
    yield "## Hardware and versions"
    yield "Those of the evaluation; a mask may have been made with an earlier commit, and on another machine."
    seen: dict[str, list[str]] = {}
    for m in found:
        told = m.result["hardware"]
        where = told.get("gpu") or f"{told['processor']} ({told['cores']} cores, {told['threads']} threads)"
        versions = ", ".join(f"{name} {version}" for name, version in sorted(m.result["versions"].items()))
        seen.setdefault(markdown(f"{where}; {versions}; {_commits(m)}"), []).append(f"`{m.cell['name']}`")
    for said, names in seen.items():
        yield f"{'All cells' if len(seen) == 1 else ', '.join(names)}: {said}."
    types: dict[str, list[str]] = {}
    for m in found:
        if m.has_config and "dtype" in m.result["config"]:
            types.setdefault(markdown(m.result["config"]["dtype"]), []).append(f"`{m.cell['name']}`")
    if types:
        by_type = [f"{dtype} ({', '.join(names)})" for dtype, names in sorted(types.items())]
        yield f"Weights and computation while a mask was learned, or weights trained: {'; '.join(by_type)}."


def _commits(measured: Measured) -> str:
    """The commit that a cell was measured with; if not all of it was at once, which step with which."""
    commit = measured.result["commit"] or UNKNOWN
    others = {step: other for step, other in measured.cell.get("commits", {}).items() if other != commit}
    return ", ".join([f"commit {commit}", *(f"{step} with {other}" for step, other in others.items())])


def _configs(found: Sequence[Measured], folder: Path) -> Iterator[str]:
    learned = [m for m in found if m.has_config]
    if not learned:
        return
    folder.mkdir(exist_ok=True)
    for m in learned:
        with atomic_file(folder / f"{m.cell['name']}.yaml") as temporary:
            temporary.write_text(yaml.safe_dump(m.cell["settings"], sort_keys=False), encoding="utf-8")
    yield "## Configs of the learned rows"
    yield "\n".join(f"- {m.entry.label}: [{m.cell['name']}.yaml]({folder.name}/{m.cell['name']}.yaml)" for m in learned)


def _commands(found: Sequence[Measured], command: str) -> Iterator[str]:
    yield "## Commands"
    yield (
        f"`{command}` runs these. `fit.yaml` and `recover.yaml` are the configs above; one that was stopped goes on "
        "with `--ckpt_path` and its last checkpoint."
    )
    lines = []
    for m in found:
        lines += [f"# {m.cell['name']}", *(terminal(f"leap_pl {' '.join(words)}") for words in m.cell["commands"])]
    yield "\n".join(["```bash", *lines, "```"])
