"""``leap_pl export``: export of a checkpoint or a mask to a sparse Hugging Face folder."""

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
    """Write a sparse Hugging Face checkpoint from a checkpoint of fit, or from any MaskSet.

    The folder has the base model with exact zeros where the mask removes a weight (safetensors, in the type
    the base model is stored in), its tokenizer and generation config, the mask itself (mask.safetensors), a
    model card (README.md) and the same facts in machine-readable form (leap_pl.json). Removed weights are zero,
    n:m masks keep exactly n of every m, kept weights are bit-identical to the base model's; all of it is verified
    by reading the folder back before it is renamed to output_dir. AutoModelForCausalLM.from_pretrained loads it
    without leap_pl.

    Args:
        output_dir: Folder to write, atomically. An existing folder is replaced only with force.
        ckpt_path: Checkpoint of leap_pl fit.
        mask: MaskSet file, instead of a checkpoint.
        model: Base model, if it is no longer in the place recorded in the checkpoint or mask.
        revision: Revision of the base model on the hub; default: the one that the mask was made for.
        perplexity: Result file of leap_pl evaluate for the same mask, whose perplexities go into the model card.
        force: Replace output_dir if it is not empty.
        trust_remote_code: Run code that comes with the base model; only for a model given with --model.
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
        raise UserError(f"{given}. Give exactly one of them.")
    if mask is not None:
        from leap_pl.masks import MaskSet

        return MaskSet.load(mask)
    from leap_pl.checkpoints.layout import masks_from_checkpoint

    return masks_from_checkpoint(str(ckpt_path))


def _read_results(path: str | None, masks: "MaskSet") -> dict[str, Any]:
    """Read the perplexities of a result file, which must have been measured with ``masks``."""
    if path is None:
        return {}
    from leap_pl.evaluation.record import read_result

    result = read_result(path)
    results: dict[str, Any] = result["perplexity"]
    if not results:
        raise UserError(f"{path} has no perplexity. Give a result of leap_pl evaluate --perplexity TEXT.")
    measured = result["model"].get("mask_digest")
    if measured != masks.digest_of_bits():
        fault = "does not record its mask" if measured is None else "was measured with a different mask"
        raise UserError(
            f"{path} {fault}. Run leap_pl evaluate --mask … --output … with this mask, and give its output."
        )
    return results
