"""Facts of an exported model, in machine-readable form and as its model card."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from leap_pl.base_model.prefix import in_words
from leap_pl.errors import listing
from leap_pl.escape import markdown, markdown_code
from leap_pl.export.hub import shortened
from leap_pl.export.method import citation, decisive_settings
from leap_pl.export.usage import Format, usage
from leap_pl.inputs import records
from leap_pl.inputs.hub import is_hub_id
from leap_pl.inputs.plain_values import shown
from leap_pl.masks.mask_set import SPARSE_BASE, STAYED, TRAINED

if TYPE_CHECKING:
    from leap_pl.masks import MaskSet
    from leap_pl.masks.patterns import Pattern, Tiled


def facts_of(masks: "MaskSet", base_zeros: int) -> dict[str, Any]:
    """Return the facts of a model under masks, for ``leap_pl.json`` and the card.

    Args:
        masks: Weights that are kept.
        base_zeros: Number of kept weights that are zero in the base model.
    """
    kept, total = masks.kept, masks.total
    return {
        "provenance": asdict(masks.provenance),
        "mask_digest": masks.digest_of_bits(),
        "gated": total,
        "removed": total - kept,
        "sparsity": 1 - kept / total,
        records.ZEROS: base_zeros,
        "sparsity_by_layer": {key: 1 - density for key, density in masks.densities("layer").items()},
        "sparsity_by_projection": {key: 1 - density for key, density in masks.densities("projection").items()},
    }


def card_of(
    masks: "MaskSet",
    facts: Mapping[str, Any],
    *,
    format: Format = "huggingface",
    hub_id: str | None = None,
    licence: Mapping[str, str] | None = None,
    trust_remote_code: bool = False,
) -> str:
    """Return the model card, as Markdown: what the export is, how to use it, figures, how it was made, and citation.

    Local files and folders are named by their last part, so that a card that is published does not show the paths of
    its author's machine.

    Args:
        masks: Masks of the export.
        facts: Contents of its ``leap_pl.json``.
        format: Format of the export.
        hub_id: Repository that it will be published in, for the lines that load it.
        licence: Licence of the base model (:func:`leap_pl.base_model.licence.licence_of`).
        trust_remote_code: Whether the model needs code that comes with it.
    """
    alone = format == "mask"
    sections = [
        _metadata(masks, alone, licence or {}),
        f"# {'Mask of ' if alone else ''}{markdown(_base_name(masks))}, {facts['sparsity']:.0%} sparse",
        _summary(masks, facts, format),
        usage(masks, facts, format, hub_id or "USER/NAME", trust_remote_code=trust_remote_code),
        _perplexities(masks.provenance.config, facts),
        _making(masks, facts),
        "## Licence",
        "The mask has none of the base model's weights. The base model's licence applies to the model it is used with."
        if alone
        else "The base model's licence and terms apply.",
        citation(masks.provenance.method),
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def _metadata(masks: "MaskSet", alone: bool, licence: Mapping[str, str]) -> str:
    base = masks.provenance.base_model
    lines = ["---", f"library_name: {'leap_pl' if alone else 'transformers'}", "pipeline_tag: text-generation"]
    lines += [f"base_model: {base}"] if is_hub_id(base) else []
    lines += [f"{key}: {value}" for key, value in licence.items()]
    return "\n".join([*lines, "tags: [leap_pl, pruned, sparse]", "---"])


def _summary(masks: "MaskSet", facts: Mapping[str, Any], format: Format) -> str:
    from leap_pl.export.sparse_model import UNKNOWN

    made = masks.provenance
    linked = f"[{made.base_model}](https://huggingface.co/{made.base_model})"
    revision = f" at revision {markdown_code(made.revision)}" if made.revision else ""
    what = f"{linked if is_hub_id(made.base_model) else markdown_code(_base_name(masks))}{revision}"
    counts = f"{facts['removed']:,} of {facts['gated']:,} weights of its decoder blocks"
    form = markdown(_words(masks.form(), facts["sparsity"]))
    version = markdown(made.versions.get("leap_pl", ""))
    how = "read off the model's zeros" if made.method == UNKNOWN else f"made by {markdown_code(made.method)}"
    method = f"The mask was {how} with leap_pl {version}".rstrip()
    early = unfinished(masks)
    warning = f"\n\n**Learning was not finished: {early.removesuffix('; ')}.**" if early else ""
    if format == "mask":
        return (
            f"A mask for {what} that removes {counts}: {form}. It has one bit a weight, and is refused on any other "
            f"model. {method}.{warning}"
        )
    held = "the bitmaps of the packed weights hold it" if format == "packed" else f"`{records.MASK}` holds it alone"
    return f"{what} with {counts} set to zero: {form}. {_kept(facts, made.config)} {method}; {held}.{warning}"


def _kept(facts: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    zeros, training = facts[records.ZEROS], config.get(TRAINED)
    rounded = f", then rounded to {facts['rounded_to']}" if "rounded_to" in facts else ""
    are = "were zero before that" if rounded else "are zero"
    if isinstance(training, dict):
        return (
            f"**Weights were trained** ({markdown_code(training.get('kind'))}) under the mask{rounded}; "
            f"{zeros:,} of those that it keeps {are}."
        )
    if "updated_by" in facts:
        by = markdown_code(facts["updated_by"])
        return f"**Kept weights were changed** by {by}{rounded}; {zeros:,} of them {are}."
    how = "some of them rounded from another data type" if facts.get("mixed_dtypes") is True else "bit for bit"
    how = f"rounded to {facts['rounded_to']}" if rounded else how
    return f"Kept weights are the base model's, {how}; {zeros:,} of them were zero already."


def _perplexities(config: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    figures, validation = facts.get("perplexity", {}), _validation(config)
    if not figures and not validation:
        return ""
    table = ["| text | sparse | dense | window, tokens | stride |", "|---|---|---|---|---|"] if figures else []
    for name, figure in figures.items():
        dense = f"{figure['dense']:.3f}" if "dense" in figure else "–"
        windows = ", ".join([str(figure["seq_length"]), *in_words(figure)])
        name = f"{shortened(name)}{_part_of_text(figure)}"
        cells = (markdown(name), f"{figure['value']:.3f}", dense, windows, figure["stride"])
        table.append(f"| {' | '.join(map(str, cells))} |")
    if "trained_in" in facts and validation:
        how = f"in {facts['trained_in']}"
        if "mixed" in str(precision := config.get("precision")):
            how = f"with {facts['trained_in']} weights and precision {markdown(str(precision))}"
        validation += f" Measured {how}, before the weights were rounded to the base model's type."
    rounded = facts.get("rounded_to")
    before = bool(validation) or not all("rounded_to" in figure for figure in figures.values())
    exact = ""
    if rounded is not None and before:
        after = [name for name, figure in figures.items() if "rounded_to" in figure]
        exact = f"Measured before the weights were rounded to {rounded}"
        exact += f", but for {listing([markdown(shortened(name)) for name in after])}." if after else "."
    dtypes = _dtypes(figures, "trained_in" in facts)
    return "\n\n".join(filter(None, ("## Perplexity", "\n".join(table), dtypes, validation, exact)))


def _dtypes(figures: Mapping[str, Any], rounded: bool) -> str:
    """Return which data types the figures were measured in, as far as they are known.

    Args:
        figures: Text → figure.
        rounded: Whether trained weights were rounded to the base model's type afterwards.
    """
    found: dict[str, list[str]] = {}
    for name, figure in figures.items():
        dtype, dense = (str(figure[key]) if key in figure else None for key in ("dtype", "dense_dtype"))
        if dtype is not None:
            how = f"in {markdown(shown(dtype, 40))}"
            how += ", before the weights were rounded to the base model's type" * (rounded and "as_trained" in figure)
            how += f", and the dense model in {markdown(shown(dense, 40))}" if dense not in (None, dtype) else ""
            found.setdefault(how, []).append(markdown(shortened(name)))
    if len(found) == 1:
        return f"Measured {next(iter(found))}."
    return " ".join(f"On {listing(names)}: measured {how}." for how, names in found.items())


def _part_of_text(figure: Mapping[str, Any]) -> str:
    """Return which part of a text was measured, in brackets; an empty string for a whole one."""
    parts = ["its held-out part"] if figure.get("share") == "held_out" else []
    names = {"config_name": "configuration", "split": "split", "text_column": "column"}
    parts += [f"{name} {figure[key]}" for key, name in names.items() if figure.get(key)]
    first = figure.get("tokens") if figure.get("max_tokens") is not None else None
    parts += [f"the first {first:,} tokens"] if isinstance(first, int) else []
    return f" ({', '.join(parts)})" if parts else ""


def _validation(config: Mapping[str, Any]) -> str:
    """Return the perplexities of the run's last validation; an empty string where their protocol is not known."""
    from leap_pl.training.validation import Measured

    of = config.get("perplexity_of")
    hard = Measured.read(config.get("perplexity"), of)
    dense = Measured.read(config.get("dense_perplexity"), config.get("dense_perplexity_of"))
    if hard is None:
        return ""
    figures = f"{hard.value:.2f} under the mask"
    if dense is not None and dense.of == hard.of:
        figures += f", {dense.value:.2f} {'of the base model, which is sparse' if config.get(SPARSE_BASE) else 'dense'}"
    step, steps = dict(of or {}).get("step"), config.get("max_steps")
    when = "" if step == steps else f" after step {markdown(step)} of {markdown(steps)}"
    of_blocks = [f"{hard.sequences} blocks of {hard.seq_length:g} tokens", *in_words(config.get("data", {}))]
    windows = ", ".join(of_blocks)
    return f"Perplexity on the run's validation text ({windows}{when}): {figures}."


def _making(masks: "MaskSet", facts: Mapping[str, Any]) -> str:
    settings = decisive_settings(masks.provenance)
    table = [f"| {name} | {markdown_code(shown(value, 200), cell=True)} |" for name, value in settings.items()]
    projections = facts["sparsity_by_projection"]
    shares = [f"| {markdown(name)} | {sparsity:.4f} |" for name, sparsity in projections.items()]
    layers = facts["sparsity_by_layer"]
    low, high = (extreme(layers, key=layers.__getitem__) for extreme in (min, max))
    sections = (
        "## How it was made",
        "\n".join(["| setting | value |", "|---|---|", *table]),
        "\n".join(["| projection | sparsity |", "|---|---|", *shares]),
        f"By decoder layer, the sparsity is from {layers[low]:.4f} (layer {markdown(low)}) to {layers[high]:.4f} "
        f"(layer {markdown(high)}). `{records.RECORD}` has that of each layer, and all settings.",
    )
    return "\n\n".join(sections)


def unfinished(masks: "MaskSet") -> str:
    """Return a note with the step of a mask, and of weights under it, that are of an unfinished run; else "".

    The settings of weights alone have those of the mask that stayed as it was.
    """
    notes = ""
    config: Any = masks.provenance.config
    while isinstance(config, Mapping):
        stayed = config.get(STAYED)
        steps, of = config.get("steps"), config.get("max_steps")
        if isinstance(steps, int) and isinstance(of, int) and steps < of:
            what = "the mask is" if stayed is None else "the weights are"
            notes += f"{what} of step {steps:,} of {of:,}; "
        config = stayed.get("config") if isinstance(stayed, Mapping) else None
    return notes


def _base_name(masks: "MaskSet") -> str:
    """Return the base model's name without its owner or folder."""
    name = masks.provenance.base_model
    return PurePath(name).name or name


def _words(form: "Pattern | Tiled", sparsity: float) -> str:
    from leap_pl.masks.patterns import NM, Tiled

    if isinstance(form, NM):
        return (
            f"a {form} sparsity of {sparsity:.6f}: of every {form.m} consecutive inputs of an output, {form.n} are kept"
        )
    if isinstance(form, Tiled):
        return f"a sparsity of {sparsity:.6f} in {form}"
    return f"an unstructured sparsity of {sparsity:.6f}"
