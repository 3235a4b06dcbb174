"""Facts of an exported model, in machine-readable form and as its model card."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leap_pl.escape import markdown, markdown_code
from leap_pl.inputs import records
from leap_pl.masks.kept_weights import TRAINED

if TYPE_CHECKING:
    from leap_pl.masks import MaskSet
    from leap_pl.masks.patterns import Pattern, Tiled

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+", re.ASCII)


def form_of(masks: "MaskSet") -> "Pattern | Tiled":
    """Return the form that is recorded for masks: n:m, tiled or unstructured."""
    from leap_pl.masks.patterns import Unstructured, read_form

    return read_form(str(masks.provenance.config.get("pattern", "unstructured"))) or Unstructured(0.0)


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
        "zeros_of_base_model_among_kept": base_zeros,
        "sparsity_by_layer": {key: 1 - density for key, density in masks.densities("layer").items()},
        "sparsity_by_projection": {key: 1 - density for key, density in masks.densities("projection").items()},
    }


def card_of(masks: "MaskSet", facts: Mapping[str, Any]) -> str:
    """Return the model card: base model, sparsity, method and settings, as Markdown."""
    provenance = masks.provenance
    is_hub_id = HUB_ID.fullmatch(provenance.base_model) and not Path(provenance.base_model).exists()
    front = ["---", "library_name: transformers", "tags: [leap_pl, pruned, sparse]"]
    front += [f"base_model: {provenance.base_model}"] if is_hub_id else []
    revision = f" at revision {markdown_code(provenance.revision)}" if provenance.revision else ""
    data = provenance.config.get("data", {})
    packed = facts.get("packed")
    lines = [
        *front,
        "---",
        "",
        f"# {markdown(Path(provenance.base_model).name)}, {facts['sparsity']:.0%} sparse",
        "",
        f"{markdown_code(provenance.base_model)}{revision} (weights fingerprint "
        f"{markdown_code(provenance.fingerprint)}) with "
        f"{facts['removed']:,} of {facts['gated']:,} weights of its decoder blocks set to zero: "
        f"{markdown(_words(form_of(masks), facts['sparsity']))}. {_kept(facts, provenance.config)} "
        f"The mask was made by {markdown_code(provenance.method)} with leap_pl "
        f"{markdown(provenance.versions.get('leap_pl', ''))}; "
        f"{'the bitmaps of the packed weights hold it' if packed else f'`{records.MASK}` holds it alone'}.",
        *([] if packed is None else _packed_lines(packed)),
        "",
        "The base model's licence and terms apply.",
    ]
    early = unfinished(masks)
    if early:
        lines += ["", f"**Learning was not finished: {early.removesuffix('; ')}.**"]
    if data:
        text = "Training text" if TRAINED in provenance.config else "Calibration text"
        lines += ["", f"{text}: {_text(data.get('text'))}, in blocks of {markdown(data.get('seq_length'))} tokens."]
    lines += _validation_lines(provenance.config)
    if "perplexity" in facts:
        lines += ["", "## Perplexity", "", "| text | perplexity | window, tokens | stride |", "|---|---|---|---|"]
        lines += [
            f"| {markdown(name)} | {result['value']:.3f} | {result['seq_length']} | {result['stride']} |"
            for name, result in facts["perplexity"].items()
        ]
    lines += ["", "## Sparsity by decoder layer", "", "| layer | sparsity |", "|---|---|"]
    lines += [f"| {markdown(layer)} | {sparsity:.4f} |" for layer, sparsity in facts["sparsity_by_layer"].items()]
    lines += ["", "## Sparsity by projection", "", "| projection | sparsity |", "|---|---|"]
    lines += [f"| {markdown(name)} | {sparsity:.4f} |" for name, sparsity in facts["sparsity_by_projection"].items()]
    settings = {"sparsity": provenance.sparsity, **provenance.config, "versions": provenance.versions}
    lines += ["", "## Settings", "", "```json", json.dumps(settings, indent=2), "```", ""]
    return "\n".join(lines)


def _kept(facts: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    zeros, training = facts["zeros_of_base_model_among_kept"], config.get(TRAINED)
    if isinstance(training, dict):
        rounded = f", then rounded to {facts['rounded_to']}" if "rounded_to" in facts else ""
        return (
            f"**Weights were trained** ({markdown_code(training.get('kind'))}) under the mask{rounded}; "
            f"{zeros:,} of those that it keeps are zero."
        )
    if "rounded_to" in facts:
        return (
            f"Kept weights are the base model's, rounded to {facts['rounded_to']}; {zeros:,} of them were zero already."
        )
    return f"Kept weights are the base model's, bit for bit; {zeros:,} of them were zero already."


def _packed_lines(packed: Mapping[str, Any]) -> list[str]:
    """Return lines that say how a packed folder is loaded."""
    return [
        "",
        f"**These weights are packed**: {packed['bytes_per_weight']:.2f} bytes a weight of the decoder blocks, dense "
        f"{packed['dense_bytes_per_weight']:g}. They need leap_pl (`pip install leap_pl`), which is imported first:",
        "",
        "```python",
        "import leap_pl",
        "from transformers import AutoModelForCausalLM",
        "",
        'model = AutoModelForCausalLM.from_pretrained("this folder", dtype="auto")',
        "```",
        "",
        "`leap_pl export --model THIS_FOLDER --format huggingface --output_dir OTHER` makes a folder of it that "
        "transformers loads alone.",
    ]


def unfinished(masks: "MaskSet") -> str:
    """Return a note with the step of a mask that was taken before learning was finished, else an empty string."""
    steps, of = (masks.provenance.config.get(name) for name in ("steps", "max_steps"))
    if not (isinstance(steps, int) and isinstance(of, int) and steps < of):
        return ""
    return f"the mask is of step {steps:,} of {of:,}; "


def _validation_lines(config: Mapping[str, Any]) -> list[str]:
    """Return lines with the perplexities of the run's last validation, omitting those without a known protocol."""
    from leap_pl.training.validation import Measured

    of = config.get("perplexity_of")
    hard = Measured.read(config.get("perplexity"), of)
    dense = Measured.read(config.get("dense_perplexity"), config.get("dense_perplexity_of"))
    if hard is None:
        return []
    shown = f"{hard.value:.2f} under the mask"
    if dense is not None and dense.of == hard.of:
        shown += f", {dense.value:.2f} dense"
    step, steps = dict(of or {}).get("step"), config.get("max_steps")
    when = "" if step == steps else f" after step {step} of {steps}"
    windows = f"{hard.sequences} blocks of {hard.seq_length:g} tokens"
    return ["", f"Perplexity on the run's validation text ({windows}{when}): {shown}."]


def _words(form: "Pattern | Tiled", sparsity: float) -> str:
    from leap_pl.masks.patterns import NM, Tiled

    if isinstance(form, NM):
        return (
            f"a {form} sparsity of {sparsity:.6f}: of every {form.m} consecutive inputs of an output, {form.n} are kept"
        )
    if isinstance(form, Tiled):
        return f"a sparsity of {sparsity:.6f} in {form}"
    return f"an unstructured sparsity of {sparsity:.6f}"


def _text(text: Any) -> str:
    return ", ".join(markdown_code(name) for name in ([text] if isinstance(text, str) else text or ["unknown"]))
