"""``leap_pl export``: a checkpoint or a mask becomes a sparse Hugging Face folder."""

from typing import TYPE_CHECKING, Any

from leap_pl.cli.command import command
from leap_pl.errors import UserError
from leap_pl.escape import say

if TYPE_CHECKING:
    from leap_pl.masks import MaskSet


@command
def export_command(
    output_dir: str,
    ckpt_path: str | None = None,
    mask: str | None = None,
    model: str | None = None,
    revision: str | None = None,
    perplexity: str | None = None,
    force: bool = False,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Write a sparse Hugging Face checkpoint from what fit has learned, or from any MaskSet.

    The folder holds the base model with exact zeros where the mask removes a weight (safetensors, in the type
    the base model is stored in), its tokenizer and generation config, the mask itself (mask.safetensors), a
    model card (README.md) and the same facts for machines (leap_pl.json). What the mask removes is zero, n:m
    masks keep exactly n of every m, the kept weights are bit-identical to the base model's, and all of it is
    verified by reading the folder back before it gets its name. AutoModelForCausalLM.from_pretrained loads it
    alone.

    Args:
        output_dir: Folder to write. It appears whole or not at all, and never over another one without force.
        ckpt_path: A checkpoint of leap_pl fit.
        mask: A MaskSet file, instead of a checkpoint.
        model: The base model, if it is not where the checkpoint or mask says it was.
        revision: Of the base model on the hub; default: the one the mask was made for.
        perplexity: A result file of leap_pl evaluate of this very mask, whose perplexities go into the model card.
        force: Replace output_dir if there is something in it.
        trust_remote_code: Run code that comes with the base model; only of one that --model names.
    """
    from leap_pl.base_model.loading import name_of_model
    from leap_pl.export.hugging_face import export_model, unfinished

    masks = _read_masks(ckpt_path, mask)
    name = name_of_model(model, masks.provenance.base_model, trust_remote_code=trust_remote_code)
    facts = export_model(
        masks,
        output_dir,
        name,
        revision=revision or (masks.provenance.revision if model is None else None),
        perplexity=_read_results(perplexity, masks),
        force=force,
        trust_remote_code=trust_remote_code,
    )
    zeros = facts["zeros_of_base_model_among_kept"]
    say(
        f"{output_dir}: {unfinished(masks)}{facts['removed']:,} of {facts['gated']:,} gated weights removed "
        f"(sparsity {facts['sparsity']:.6f}), {zeros:,} kept weights were zero in the base model; "
        "read back and verified."
    )
    return facts


def _read_masks(ckpt_path: str | None, mask: str | None) -> "MaskSet":
    if (ckpt_path is None) == (mask is None):
        given = "Neither --ckpt_path nor --mask is given" if mask is None else "Both --ckpt_path and --mask are given"
        raise UserError(f"{given}, and exactly one says what to remove. Give one of them.")
    if mask is not None:
        from leap_pl.masks import MaskSet

        return MaskSet.load(mask)
    from leap_pl.checkpoints.layout import masks_from_checkpoint

    return masks_from_checkpoint(str(ckpt_path))


def _read_results(path: str | None, masks: "MaskSet") -> dict[str, Any]:
    """Read the perplexities of a result file, which is to be of ``masks``."""
    if path is None:
        return {}
    from leap_pl.evaluation.record import read_result

    result = read_result(path)
    results: dict[str, Any] = result["perplexity"]
    if not results:
        raise UserError(f"{path} holds no perplexity. Give a result of leap_pl evaluate --perplexity TEXT.")
    measured = result["model"].get("mask_digest")
    if measured != masks.digest_of_bits():
        which = "does not say of which mask it is" if measured is None else "is of another mask than the one given"
        raise UserError(f"{path} {which}. Evaluate this mask, leap_pl evaluate --mask … --output, and give that file.")
    return results
