"""What is compared: result files, MaskSets and exported checkpoints, in one form and checked against each other."""

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from leap_pl.errors import UserError, listing
from leap_pl.escape import terminal
from leap_pl.evaluation.record import read_result
from leap_pl.inputs.plain_values import shown
from leap_pl.inputs.records import MASK
from leap_pl.masks import MaskSet, split_name

MOST_CELLS = 1 << 20  # layers by projections: a hundred layers with 256 experts that are stored one by one have 77,000


@dataclass(frozen=True)
class Entry:
    """One thing that is compared.

    Attributes:
        source: The file or folder that was named.
        label: Its name in tables and pictures, unique among what is compared.
        method: ``dense``, ``wanda``, ``leap`` …
        base_model: Name of the base model, as it was given. This and every other name here is plain text, with what a
            terminal would act on written out; ``source`` alone is as it was typed.
        fingerprint: Of the base model's weights.
        sparsity: Realised, 0 to 1.
        pattern: The form of the mask, as :mod:`leap_pl.masks.patterns` writes it: ``unstructured``, ``2:4`` …
        perplexity: Text → what ``leap_pl evaluate`` says of it.
        tasks: Task → what it says of that.
        densities: (decoder block, projection) → kept over all; empty for a dense model.
        mask: The mask itself, where it is at hand.
        model: A short name of the base model, the same for all that have its fingerprint, and for no others.
    """

    source: str
    label: str
    method: str
    base_model: str
    fingerprint: str | None
    sparsity: float
    pattern: str = "unstructured"
    perplexity: dict[str, dict[str, Any]] = field(default_factory=dict)
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    densities: dict[tuple[int, str], float] = field(default_factory=dict)
    mask: MaskSet | None = None
    model: str = ""

    @property
    def kind(self) -> str:
        """The method, and the pattern where that is n:m: ``wanda``, ``wanda 2:4``."""
        told = self.pattern in self.method or not re.fullmatch(r"\d+:\d+", self.pattern)
        return self.method if told else f"{self.method} {self.pattern}"


def read_entries(sources: Sequence[str]) -> list[Entry]:
    """Read what is named, give each a label of its own, and make sure that their figures can share columns.

    Raises:
        UserError: Something cannot be read, or figures were measured by different protocols.
    """
    twice = [source for source, count in Counter(sources).items() if count > 1]
    if twice:
        raise UserError(f"{listing(twice)} is named twice. Name each once.")
    entries = _labelled(_named([_read(source) for source in sources]))
    entries.sort(key=lambda entry: (entry.model, entry.sparsity, entry.method, entry.source))
    check_protocols(entries)
    return entries


def _read(source: str) -> Entry:
    path = Path(source)
    if path.is_dir():
        if (path / MASK).is_file():
            return _of_mask(source, MaskSet.load(path / MASK))
        raise UserError(
            f"{source} holds no {MASK}, so leap_pl has not written it. Name result files (.json), MaskSet files "
            "(.safetensors), checkpoints (.ckpt) or exported folders."
        )
    if path.suffix == ".safetensors":
        return _of_mask(source, MaskSet.load(path))
    if path.suffix == ".ckpt":
        from leap_pl.checkpoints.layout import masks_from_checkpoint

        return _of_mask(source, masks_from_checkpoint(path))
    if not path.is_file():
        raise UserError(f"{source}: there is no such file. Name result files of leap_pl evaluate, masks or folders.")
    result = read_result(path)
    return entry_of_result(source, result, _mask_at_hand(source, result["model"]))


def _of_mask(source: str, mask: MaskSet) -> Entry:
    kept: dict[tuple[int, str], list[int]] = {}
    for name, bits in mask.masks.items():
        layer, projection = split_name(name)
        if layer is not None:
            count = kept.setdefault((layer, projection), [0, 0])
            count[0], count[1] = count[0] + int(bits.sum()), count[1] + bits.numel()
    told = mask.provenance
    return Entry(
        source=source,
        label="",
        method=terminal(told.method),
        base_model=terminal(told.base_model),
        fingerprint=told.fingerprint,
        sparsity=mask.sparsity,
        pattern=terminal(told.config.get("pattern", "unstructured")),
        densities=_table_of(
            {(layer, terminal(projection)): k / n for (layer, projection), (k, n) in kept.items()}, source
        ),
        mask=mask,
    )


def entry_of_result(source: str, result: dict[str, Any], mask: MaskSet | None = None) -> Entry:
    """Return what ``result`` says, which :func:`read_result` read from ``source``; it has no label yet."""
    model = result["model"]
    densities: dict[tuple[int, str], float] = {}
    for name, sparsity in result["sparsity"]["weights"].items():
        layer, projection = split_name(name)
        if layer is not None and result["method"] != "dense":
            densities[layer, terminal(projection)] = 1 - float(sparsity)
    return Entry(
        source=source,
        label="",
        method=terminal(result["method"]),
        base_model=terminal(model["base_model"]),
        fingerprint=model["fingerprint"],
        sparsity=float(result["sparsity"]["global"]),
        pattern=terminal(result.get("config", {}).get("pattern", "unstructured")),
        perplexity={terminal(name): figure for name, figure in result["perplexity"].items()},
        tasks={terminal(name): figure for name, figure in result["tasks"].items()},
        densities=_table_of(densities, source),
        mask=mask,
    )


def _table_of(densities: dict[tuple[int, str], float], source: str) -> dict[tuple[int, str], float]:
    """Make sure that ``densities``, by layer and projection, are a table that can be laid out."""
    layers, projections = ({cell[place] for cell in densities} for place in (0, 1))
    if len(layers) * len(projections) > MOST_CELLS:
        raise UserError(
            f"{source} names {len(layers):,} decoder layers and {len(projections):,} projections, more than any model "
            "has. Evaluate again with --output, or make the mask again."
        )
    return densities


def _mask_at_hand(source: str, model: dict[str, Any]) -> MaskSet | None:
    """The mask that a result was measured with, if it is still where it was and the same."""
    for place in (model["mask"], str(Path(model["name"], MASK))):
        if place is not None and os.path.isfile(place):  # noqa: PTH113  (Path raises on what is too long for a path)
            try:
                mask = MaskSet.load(place)
            except UserError as error:
                raise UserError(f"{source} names the mask it was measured with, and {error}") from error
            same = mask.provenance.fingerprint == model["fingerprint"]
            # Results of older versions do not say which mask it was.
            return mask if same and mask.digest_of_bits() == model.get("mask_digest") else None
    return None


def _named(entries: list[Entry]) -> list[Entry]:
    """Give each entry the name of its model: one model is often reached by several paths, and is one all the same."""
    names: dict[str, str] = {}  # fingerprint, or the name where there is none → the shortest name it goes by
    for entry in entries:
        known = names.setdefault(entry.fingerprint or entry.base_model, entry.base_model)
        names[entry.fingerprint or entry.base_model] = min(known, entry.base_model, key=lambda name: (len(name), name))
    for shorter in (
        {key: Path(name).name for key, name in names.items()},
        names,
        {key: f"{Path(name).name} {key}" for key, name in names.items()},
    ):
        if len(set(shorter.values())) == len(names):
            break
    else:  # names that were made up to be mistaken for others
        shorter = {key: key for key in names}
    return [replace(entry, model=shorter[entry.fingerprint or entry.base_model]) for entry in entries]


def _labelled(entries: list[Entry]) -> list[Entry]:
    models = {entry.model for entry in entries}
    labels = []
    for entry in entries:
        label = entry.method if entry.method == "dense" else f"{entry.kind} {entry.sparsity:.0%}"
        labels.append(label if len(models) == 1 else f"{label}, {entry.model}")
    counts = Counter(labels)
    labels = [
        label if counts[label] == 1 else f"{label} ({terminal(Path(entry.source).stem)})"
        for label, entry in zip(labels, entries, strict=True)
    ]
    counts = Counter(labels)
    return [
        replace(entry, label=label if counts[label] == 1 else f"{label} ({terminal(entry.source)})")
        for label, entry in zip(labels, entries, strict=True)
    ]


def check_protocols(entries: Sequence[Entry]) -> None:
    """Make sure that what stands in one column was measured in one way.

    Raises:
        UserError: Two differ; the message says which, and in what.
    """
    for kind, read in (("perplexity", _perplexity_protocol), ("accuracy", _task_protocol)):
        seen: dict[str, tuple[Entry, dict[str, Any]]] = {}
        for entry in entries:
            figures = entry.perplexity if kind == "perplexity" else entry.tasks
            for name, figure in figures.items():
                protocol = read(figure)
                other, expected = seen.setdefault(name, (entry, protocol))
                differing = [key for key in protocol if protocol[key] != expected[key]]
                if "tokenizer" in differing:
                    differing = [key for key in differing if key != "text"]  # other tokens of, maybe, the same text
                if differing:
                    said = ", ".join(
                        f"{key} ({shown(str(expected[key]))} and {shown(str(protocol[key]))})" for key in differing
                    )
                    raise UserError(
                        f"the {kind} on {shown(name)} in {other.source} and in {entry.source} cannot stand in one "
                        f"column: they differ in {said}. Evaluate both with the same flags, or compare them apart."
                    )


def _perplexity_protocol(figure: dict[str, Any]) -> dict[str, Any]:
    tokenizer = figure["tokenizer"]
    return {
        "seq_length": figure["seq_length"],
        "stride": figure["stride"],
        "tokenizer": f"{tokenizer['vocabulary']:,} entries with digest {tokenizer['digest']}",
        "text": f"{figure['tokens']:,} tokens with digest {figure['text_digest']}",
    }


def _task_protocol(figure: dict[str, Any]) -> dict[str, Any]:
    protocol = {key: figure[key] for key in ("split", "limit", "num_fewshot", "version", "samples")}
    return protocol | {"limit": figure["limit"] or "no limit"}
