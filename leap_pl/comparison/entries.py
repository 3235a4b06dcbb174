"""Entries of a comparison: result files, MaskSets, checkpoints and exported folders, read into one form and checked."""

import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from leap_pl.errors import UserError
from leap_pl.escape import terminal
from leap_pl.evaluation.record import UNFINISHED, read_result
from leap_pl.inputs.hub import repository_of
from leap_pl.inputs.paths import expanded
from leap_pl.inputs.plain_values import shown
from leap_pl.inputs.records import MASK, mask_in
from leap_pl.masks import MaskSet, split_name
from leap_pl.masks.mask_set import TRAINED
from leap_pl.masks.weight_groups import shares
from leap_pl.sparse.folder import is_packed, read_masks

MOST_CELLS = 1 << 20  # layers × projections; a hundred layers with 256 experts stored one by one have 77,000


@dataclass(frozen=True)
class Entry:
    """Entry of a comparison.

    All names but ``source``, which is as typed, are plain text with terminal control characters escaped.

    Attributes:
        source: File, folder or hub repository that was named.
        label: Name in tables and plots, unique within the comparison.
        method: Pruning method: ``dense``, ``wanda``, ``leap`` …
        base_model: Recorded name of the base model.
        fingerprint: Fingerprint of the base model's weights.
        sparsity: Realised sparsity, 0 to 1.
        pattern: Pattern of the mask, as :mod:`leap_pl.masks.patterns` writes it: ``unstructured``, ``2:4`` …
        perplexity: Text → its entry in a result of ``leap_pl evaluate``.
        tasks: Task → its entry in a result of ``leap_pl evaluate``.
        densities: (decoder block, projection) → density; empty for a dense model.
        mask: Mask, if it is available.
        model: Short name of the base model, shared by exactly the entries with the same fingerprint.
        bits: Digest of the mask's bits, also if the mask itself is not available; None if it is not known.
        also: Further sources that were named and have the same mask.
        dtype: Data type of the weights when the figures were measured; None if there are none, or it is not known.
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
    bits: str | None = None
    also: tuple[str, ...] = ()
    dtype: str | None = None

    @property
    def kind(self) -> str:
        """Return the method, followed by the pattern if that is n:m: ``wanda``, ``wanda 2:4``."""
        implied = self.pattern in self.method or not re.fullmatch(r"\d+:\d+", self.pattern)
        return self.method if implied else f"{self.method} {self.pattern}"

    @property
    def measured(self) -> bool:
        """Return whether the entry has figures of an evaluation."""
        return bool(self.perplexity or self.tasks)


def read_entries(sources: Sequence[str]) -> list[Entry]:
    """Read ``sources``, assign unique labels, and check that figures in one column share a protocol.

    Masks and texts are known by their content: a mask that is named beside a result measured with it makes no entry of
    its own, and a text has one name, whatever paths the results have for it.

    Raises:
        UserError: If a source cannot be read, or figures were measured by different protocols.
    """
    places: dict[str, str] = {}
    for source in sources:
        place = _place(source)
        if place in places:
            first = places[place]
            named = f"{source} is named twice" if first == source else f"{first} and {source} are the same"
            raise UserError(f"{named}. Name each once.")
        places[place] = source
    entries = _labelled(_named(_with_one_name_a_text(_merged([_read(source) for source in sources]))))
    entries.sort(key=lambda e: (e.model, round(e.sparsity, 2), e.kind != e.method, e.kind, e.source))
    check_protocols(entries)
    return entries


def _place(source: str) -> str:
    """Return what a source is known by: its place, whatever path leads there, or its hub id."""
    try:
        return str(expanded(source).resolve(strict=True))
    except (OSError, RuntimeError, ValueError):  # no such file, links in a circle, no name of a file
        return source


def _read(source: str) -> Entry:
    path = expanded(source)
    if path.is_dir() and path.suffix != ".ckpt":
        if mask_in(path) != path:
            return _of_mask(source, MaskSet.load(path))
        if is_packed(path):
            return _of_mask(source, read_masks(path))
        raise UserError(
            f"{source} is a folder without a {MASK}. Name result files (.json), MaskSet files (.safetensors), "
            "checkpoints (.ckpt), or folders of an export or a run."
        )
    if path.suffix == ".safetensors" or repository_of(source) is not None:
        return _of_mask(source, MaskSet.load(source))
    if path.suffix == ".ckpt":
        from leap_pl.checkpoints.layout import masks_from_checkpoint

        return _of_mask(source, masks_from_checkpoint(path))
    if not path.is_file():
        raise UserError(f"{source}: there is no such file. Name result files of leap_pl evaluate, masks or folders.")
    result = read_result(path)
    if result.get(UNFINISHED):
        warnings.warn(f"{source} lacks figures: its evaluation failed after those that it has.", stacklevel=2)
    return entry_of_result(source, result, _mask_at_hand(source, result["model"]))


def _merged(entries: list[Entry]) -> list[Entry]:
    """Merge each mask into the results that were measured with it or, if there are none, into the first equal mask."""
    measured = {(entry.fingerprint, entry.bits) for entry in entries if entry.bits and entry.measured}
    merged: list[Entry] = []
    for entry in sorted(entries, key=lambda entry: not entry.measured):
        key = (entry.fingerprint, entry.bits)
        equal = [n for n, other in enumerate(merged) if entry.bits and (other.fingerprint, other.bits) == key]
        if entry.measured or not equal:
            merged.append(entry)
        for n in [] if entry.measured else equal if key in measured else equal[:1]:
            merged[n] = replace(merged[n], mask=merged[n].mask or entry.mask, also=(*merged[n].also, entry.source))
    return merged


def _with_one_name_a_text(entries: list[Entry]) -> list[Entry]:
    """Return the entries with one name for a text of one protocol: the shortest of those in the results."""

    def protocol(figure: dict[str, Any]) -> str:
        return str(perplexity_protocol(figure))

    of_name: dict[str, set[str]] = {}
    for entry in entries:
        for name, figure in entry.perplexity.items():
            of_name.setdefault(name, set()).add(protocol(figure))
    names: dict[str, str] = {}
    for name in sorted(of_name, key=lambda name: (len(name), name)):
        for only in of_name[name] if len(of_name[name]) == 1 else ():  # else it is the name of another text, too
            names.setdefault(only, name)
    return [
        replace(entry, perplexity={names.get(protocol(f), name): f for name, f in entry.perplexity.items()})
        for entry in entries
    ]


def _of_mask(source: str, mask: MaskSet) -> Entry:
    def place(name: str) -> list[tuple[int, str]]:
        layer, projection = split_name(name)
        return [] if layer is None else [(layer, terminal(projection))]

    provenance = mask.provenance
    return Entry(
        source=source,
        label="",
        method=_method(provenance.method, provenance.config),
        base_model=terminal(provenance.base_model),
        fingerprint=provenance.fingerprint,
        sparsity=mask.sparsity,
        pattern=terminal(provenance.config.get("pattern", "unstructured")),
        densities=_table_of(shares(mask.counts(), place), source),
        mask=mask,
        bits=mask.digest_of_bits(),
    )


def entry_of_result(source: str, result: dict[str, Any], mask: MaskSet | None = None) -> Entry:
    """Return an entry, without a label yet, of the ``result`` that :func:`read_result` read from ``source``."""
    model = result["model"]
    densities: dict[tuple[int, str], float] = {}
    for name, sparsity in result["sparsity"]["weights"].items():
        layer, projection = split_name(name)
        if layer is not None and result["method"] != "dense":
            densities[layer, terminal(projection)] = 1 - float(sparsity)
    return Entry(
        source=source,
        label="",
        method=_method(result["method"], result.get("config") or {}),
        base_model=terminal(model["base_model"]),
        fingerprint=model["fingerprint"],
        sparsity=float(result["sparsity"]["global"]),
        pattern=terminal(result.get("config", {}).get("pattern", "unstructured")),
        perplexity={terminal(name): figure for name, figure in result["perplexity"].items()},
        tasks={terminal(name): figure for name, figure in result["tasks"].items()},
        densities=_table_of(densities, source),
        mask=mask,
        bits=model.get("mask_digest"),
        dtype=None if model.get("dtype") is None else terminal(model["dtype"]),
    )


def _method(name: str, config: Mapping[str, Any]) -> str:
    """Return the name of a method; where weights were trained as well, it is no longer that method, nor a baseline."""
    return terminal(name if TRAINED not in config else f"{name} + trained weights")


def _table_of(densities: dict[tuple[int, str], float], source: str) -> dict[tuple[int, str], float]:
    """Return ``densities`` after checking that their table of layers and projections is of a plausible size.

    Raises:
        UserError: If the table has more than ``MOST_CELLS`` cells.
    """
    layers, projections = ({cell[place] for cell in densities} for place in (0, 1))
    if len(layers) * len(projections) > MOST_CELLS:
        raise UserError(
            f"{source} names {len(layers):,} decoder layers and {len(projections):,} projections, more than any model "
            "has. Evaluate again with --output, or make the mask again."
        )
    return densities


def _mask_at_hand(source: str, model: dict[str, Any]) -> MaskSet | None:
    """Return the mask that a result was measured with, if its file still exists and is unchanged."""
    named = (model["mask"], str(Path(model["name"], MASK)))
    # os.path, because Path raises on what is too long for a path
    found: list[tuple[str, Callable[[str], MaskSet]]] = [
        (place, MaskSet.load)
        for place in named
        if place is not None and os.path.isfile(place)  # noqa: PTH113
    ]
    found += [(model["name"], read_masks)] if is_packed(model["name"]) else []
    for place, read in found[:1]:
        try:
            mask = read(place)
        except UserError as error:
            raise UserError(f"{source} names the mask it was measured with, and {error}") from error
        same = mask.provenance.fingerprint == model["fingerprint"]
        # Results of older versions have no digest of their mask.
        return mask if same and mask.digest_of_bits() == model.get("mask_digest") else None
    return None


def _named(entries: list[Entry]) -> list[Entry]:
    """Return the entries with a short model name each, the same for all names and paths of one model."""
    names: dict[str, str] = {}  # fingerprint, or the name if there is none → the model's shortest name
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
    else:  # names crafted to collide
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
    """Check that all figures in one column were measured by the same protocol.

    Raises:
        UserError: If two differ; the message names both and the differing settings.
    """
    for kind, read in (("perplexity", perplexity_protocol), ("accuracy", _task_protocol)):
        seen: dict[str, tuple[Entry, dict[str, Any]]] = {}
        for entry in entries:
            figures = entry.perplexity if kind == "perplexity" else entry.tasks
            for name, figure in figures.items():
                protocol = read(figure)
                other, expected = seen.setdefault(name, (entry, protocol))
                differing = [key for key in protocol if protocol[key] != expected[key]]
                if expected.get("questions") is None:  # results of earlier versions have no digest of theirs
                    seen[name] = entry, protocol
                if None in (expected.get("questions"), protocol.get("questions")):
                    differing = [key for key in differing if key != "questions"]
                if {"tokenizer", "bos"} & {*differing}:
                    differing = [key for key in differing if key != "text"]  # the same text may have other tokens
                if differing:
                    settings = ", ".join(
                        f"{key} ({shown(str(expected[key]))} and {shown(str(protocol[key]))})" for key in differing
                    )
                    advice = "Evaluate both with the same flags"
                    sources = [of.tasks[name].get("source") for of in (other, entry)] if kind == "accuracy" else []
                    if {*sources} == {"local", "hub"} and {*differing} <= {"split", "samples", "questions"}:
                        # The same flags, from two working directories, do that.
                        advice = "Read both from the same place: --tasks_folder FOLDER, or hub"
                    raise UserError(
                        f"the {kind} on {shown(name)} in {other.source} and in {entry.source} cannot share a column: "
                        f"they differ in {settings}. {advice}, or compare them separately."
                    )


def perplexity_protocol(figure: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a perplexity depends on beside the model: equal ones are of the same tokens, whatever their name."""
    tokenizer = figure["tokenizer"]
    return {
        "seq_length": figure["seq_length"],
        "stride": figure["stride"],
        "bos": figure.get("bos", "first"),  # of earlier versions, and wherever the tokenizer puts nothing before a text
        "tokenizer": f"{tokenizer['vocabulary']:,} entries with digest {tokenizer['digest']}",
        "text": f"{figure['tokens']:,} tokens with digest {figure['text_digest']}",
    }


def _task_protocol(figure: dict[str, Any]) -> dict[str, Any]:
    protocol = {key: figure[key] for key in ("split", "limit", "num_fewshot", "version", "samples")}
    shown = {"limit": figure["limit"] or "no limit", "bos": figure.get("bos", "every")}
    return protocol | shown | {"questions": figure.get("questions_digest")}
