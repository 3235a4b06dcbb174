"""Export of a masked model as a Hugging Face folder that plain transformers loads."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leap_pl.errors import UserError, listing
from leap_pl.escape import markdown, markdown_code
from leap_pl.inputs import records
from leap_pl.inputs.plain_values import plain

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from leap_pl.masks import MaskSet
    from leap_pl.masks.patterns import Pattern, Tiled

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+", re.ASCII)


def export_model(
    masks: "MaskSet",
    output_dir: str | Path,
    model: str,
    *,
    revision: str | None = None,
    perplexity: Mapping[str, Any] | None = None,
    force: bool = False,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Write the base model ``model`` with exact zeros for the weights that ``masks`` remove, and verify the result.

    Args:
        masks: Weights to keep.
        output_dir: Folder to write, atomically. An existing one is replaced only with ``force``.
        model: Hub id, folder or GGUF file of the base model that the masks were made for.
        revision: Revision of the base model on the hub.
        perplexity: Perplexities of the masked model for the model card, as in a result of ``leap_pl evaluate``.
        force: Replace ``output_dir`` if leap_pl wrote its contents.
        trust_remote_code: Run code that comes with the base model.

    Returns:
        Contents of ``leap_pl.json`` in the folder.

    Raises:
        UserError: If the masks are of another model or do not follow their pattern, the model cannot be read, or the
            folder cannot be written.
    """
    from leap_pl.base_model.loading import load_model, load_tokenizer
    from leap_pl.export.zeros import zero_removed
    from leap_pl.files import atomic_folder

    with atomic_folder(output_dir, force=force) as folder:  # first, so that a bad folder fails before the model loads
        base = load_model(model, revision=revision, trust_remote_code=trust_remote_code)
        masks.check(base)
        _check_form(masks, base)
        kept_digests, base_zeros = _kept_digests(masks, dict(base.named_parameters()))
        base.save_pretrained(folder)
        if not zero_removed(folder, masks):  # the family's files are laid out differently from its model
            masks.apply_(base, check=False)
            base.save_pretrained(folder)
        load_tokenizer(model, revision=revision, trust_remote_code=trust_remote_code).save_pretrained(folder)
        masks.save(folder / records.MASK)
        facts = _facts(masks, base_zeros) | ({"perplexity": dict(perplexity)} if perplexity else {})
        del base  # _verify loads the model again: do not hold two
        (folder / records.RECORD).write_text(json.dumps(plain(facts), indent=2) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(_card(masks, facts), encoding="utf-8")
        _verify(folder, masks, kept_digests, trust_remote_code)
    return facts


def _form(masks: "MaskSet") -> "Pattern | Tiled":
    from leap_pl.masks.patterns import Unstructured, read_form

    return read_form(str(masks.provenance.config.get("pattern", "unstructured"))) or Unstructured(0.0)


def _check_form(masks: "MaskSet", base: "PreTrainedModel") -> None:
    """Check that every mask follows its recorded pattern exactly: 2:4 kernels give wrong results for other masks."""
    from leap_pl.base_model.weights import find_weights
    from leap_pl.masks.patterns import follows

    form = _form(masks)
    weights = find_weights(base, list(masks.masks))
    wrong = [name for name, mask in masks.masks.items() if not follows(mask, weights[name].input_dim, form)]
    if wrong:
        raise UserError(
            f"the mask is recorded as {form}, and {listing(wrong, 3)} is not. Make the mask again, or use another copy "
            "of the file."
        )


def _kept_digests(masks: "MaskSet", parameters: "dict[str, Tensor]") -> tuple[dict[str, str], int]:
    """Return a digest of the bits of each weight's kept elements, and how many of these are zero in the base model."""
    digests, zeros = {}, 0
    for name, mask in masks.masks.items():
        kept = parameters[name].detach()[mask]
        digests[name] = _digest(kept)
        zeros += int((kept == 0).sum())
    return digests, zeros


def _digest(tensor: "Tensor") -> str:
    import torch

    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def _verify(folder: Path, masks: "MaskSet", kept_digests: dict[str, str], trust_remote_code: bool) -> None:
    """Load the folder with plain transformers, and check that removed weights are zero and kept ones bit-identical.

    The files are not compared tensor by tensor, because some families store their weights under other names and in
    other shapes (experts one by one) than the model has them.

    Raises:
        UserError: If a weight differs.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=trust_remote_code)
    found = dict(model.named_parameters())
    for name, mask in masks.masks.items():
        weight = found[name].detach()
        if bool(weight[~mask].count_nonzero()) or _digest(weight[mask]) != kept_digests[name]:
            raise UserError(f"{name} does not read back as it was written. Check the disk of {folder.parent}.")


def _facts(masks: "MaskSet", base_zeros: int) -> dict[str, Any]:
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


def _card(masks: "MaskSet", facts: dict[str, Any]) -> str:
    """Return the model card: base model, sparsity, method and settings, as Markdown."""
    provenance = masks.provenance
    is_hub_id = HUB_ID.fullmatch(provenance.base_model) and not Path(provenance.base_model).exists()
    front = ["---", "library_name: transformers", "tags: [leap_pl, pruned, sparse]"]
    front += [f"base_model: {provenance.base_model}"] if is_hub_id else []
    revision = f" at revision {markdown_code(provenance.revision)}" if provenance.revision else ""
    data = provenance.config.get("data", {})
    lines = [
        *front,
        "---",
        "",
        f"# {markdown(Path(provenance.base_model).name)}, {facts['sparsity']:.0%} sparse",
        "",
        f"{markdown_code(provenance.base_model)}{revision} (weights fingerprint "
        f"{markdown_code(provenance.fingerprint)}) with "
        f"{facts['removed']:,} of {facts['gated']:,} weights of its decoder blocks set to zero: "
        f"{markdown(_words(_form(masks), facts['sparsity']))}. Kept weights are the base model's, bit for bit; "
        f"{facts['zeros_of_base_model_among_kept']:,} of them were zero already. "
        f"The mask was made by {markdown_code(provenance.method)} with leap_pl "
        f"{markdown(provenance.versions.get('leap_pl', ''))}; "
        f"`{records.MASK}` holds it alone.",
        "",
        "The base model's licence and terms apply.",
    ]
    early = unfinished(masks)
    if early:
        lines += ["", f"**Learning was not finished: {early.removesuffix('; ')}.**"]
    if data:
        lines += [
            "",
            f"Calibration text: {_text(data.get('text'))}, in blocks of {markdown(data.get('seq_length'))} tokens.",
        ]
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
