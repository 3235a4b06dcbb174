"""``leap_pl export``: export of a checkpoint, a mask or a sparse model to a sparse Hugging Face folder."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from leap_pl.cli.command import command
from leap_pl.errors import UserError, listing
from leap_pl.escape import say
from leap_pl.inputs.paths import behind_link

if TYPE_CHECKING:
    from leap_pl.masks import MaskSet
    from leap_pl.masks.kept_weights import KeptWeights


@command
def export_command(
    output_dir: str,
    ckpt_path: str | None = None,
    mask: str | None = None,
    model: str | None = None,
    format: Literal["huggingface", "packed", "mask"] = "huggingface",
    values: Literal["auto", "int8"] = "auto",
    revision: str | None = None,
    perplexity: str | None = None,
    push: str | None = None,
    private: bool = False,
    force: bool = False,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Write a sparse Hugging Face checkpoint from a checkpoint of fit, from any MaskSet, or from a sparse model.

    The folder has the base model with exact zeros where the mask removes a weight (safetensors, in the type
    the base model is stored in), its tokenizer and generation config, the mask itself (mask.safetensors), a
    model card (README.md) and the same facts in machine-readable form (leap_pl.json). Removed weights are zero,
    n:m masks keep exactly n of every m, kept weights are bit-identical to the base model's or, where a run has
    trained them, to what was trained (weights.safetensors beside the mask, or the checkpoint); all of it is verified
    by reading the folder back before it is renamed to output_dir. AutoModelForCausalLM.from_pretrained loads it
    without leap_pl.

    With format packed, the zeros are not stored: a weight is a bitmap and the kept values, smaller on the disk and
    in memory. Import leap_pl before from_pretrained loads such a folder. A model that is sparse already, whoever
    pruned it, is packed with model alone; a packed folder becomes an ordinary one with model alone and format
    huggingface. With format mask, the folder has the mask, its card and its facts, and no weights; with model alone,
    that of its zeros.

    With push, the verified folder, then without absolute paths in its files, is uploaded to the Hugging Face hub.

    Args:
        output_dir: Folder to write, atomically. An existing folder is replaced only with force.
        ckpt_path: Checkpoint of leap_pl fit or recover, such as RUN/checkpoints/last.ckpt.
        mask: MaskSet file, folder that has one, or hub id of one, instead of a checkpoint.
        model: Base model, if it is no longer in the place recorded in the checkpoint or mask; or, without these, a
            sparse model to pack or to read the mask of, or a packed one.
        format: Form of the weights: huggingface, zeros included, or packed; or the mask without them.
        values: Values of packed weights: auto, as the model has them, or int8 with a scale a row, which halves them
            and rounds them. Of a packed model with int8 values, auto is int8.
        revision: Revision of the base model on the hub; default: the one that the mask was made for. A local model has
            none.
        perplexity: Result files of leap_pl evaluate, separated by commas, whose perplexities go into the model card:
            one of the same mask and, if wanted, one of the dense model.
        push: Repository of the Hugging Face hub, USER/NAME, to upload the folder to; created if it does not exist, and
            public.
        private: Create a private repository, with push. One that exists must be private.
        force: Replace output_dir if it is not empty; and pack a model that becomes no smaller.
        trust_remote_code: Run code that comes with the base model; only for a model given with --model.
    """
    if values != "auto" and format != "packed":
        raise UserError(f"--values {values} is for packed weights. Add --format packed.")
    if push is None and private:
        raise UserError("--private is for a repository of the hub. Add --push USER/NAME.")
    from leap_pl.export.hub import check_push, push_folder

    if push is not None:
        check_push(push, private=private)
    ckpt_path = None if ckpt_path is None else behind_link(ckpt_path)
    masks = _read_masks(ckpt_path, mask, model, format, revision)
    from leap_pl.base_model.place import model_of
    from leap_pl.export.hugging_face import export_model
    from leap_pl.inputs.hub import check_revision
    from leap_pl.masks.kept_weights import without_weights

    alone = format == "mask"

    if masks is None and perplexity is not None:
        raise UserError("--perplexity is for a mask: give it with --mask or --ckpt_path.")
    made = None if masks is None else masks.provenance
    recorded = (str(model), revision) if made is None else (made.base_model, made.revision)
    check_revision(model or recorded[0], revision, "--revision")
    weights = None if masks is None or alone else _read_weights(ckpt_path, mask, masks)
    figures = {}
    if masks is not None:
        rounded_to = "int8" if values == "int8" else None
        figures = _read_results(perplexity, without_weights(masks) if alone else masks, rounded_to)
    name, revision = model_of((model, revision), recorded, trust_remote_code=trust_remote_code)
    facts = export_model(
        masks,
        output_dir,
        name,
        weights=weights,
        format=format,
        values=values,
        revision=revision,
        perplexity=figures,
        hub_id=push,
        force=force,
        trust_remote_code=trust_remote_code,
    )
    _report(output_dir, masks, facts)
    if push is not None:
        say(f"{push_folder(output_dir, push, private=private)}: uploaded.")
        _check_base_name(facts["provenance"]["base_model"])
    return facts


def _report(output_dir: str, masks: "MaskSet | None", facts: dict[str, Any]) -> None:
    from leap_pl.export.card import unfinished
    from leap_pl.inputs import records
    from leap_pl.masks.mask_set import TRAINED
    from leap_pl.oneshot.methods import changes_weights

    zeros, early = facts[records.ZEROS], "" if masks is None else unfinished(masks)
    changed = TRAINED in facts["provenance"]["config"] or "updated_by" in facts
    method = facts["provenance"]["method"]
    if masks is not None and not changed and changes_weights(method):
        say(
            f"leap_pl export: the mask is that of {method} alone. The weights that {method} changed are in the folder "
            "model, which leap_pl prune wrote beside it.",
            sys.stderr,
        )
    rounded = f"were zero before they were rounded to {facts.get('rounded_to')}"
    which = rounded if "rounded_to" in facts else "are zero" if changed else "were zero in the base model"
    kept = "" if zeros is None else f", {zeros:,} kept weights {which}"
    say(
        f"{output_dir}: {early}{facts['removed']:,} of {facts['gated']:,} gated weights removed "
        f"(sparsity {facts['sparsity']:.6f}){kept}; read back and verified."
    )
    if "packed" in facts:
        packed = facts["packed"]
        size = sum(file.stat().st_size for file in Path(output_dir).glob("model*.safetensors"))
        say(
            f"packed: {packed['bytes_per_weight']:.3f} bytes a gated weight ({packed['values']}), dense "
            f"{packed['dense_bytes_per_weight']:g}; the model files have {size / 1e6:,.0f} MB, dense "
            f"{(size + packed['dense_bytes'] - packed['bytes']) / 1e6:,.0f} MB."
        )


def _read_masks(
    ckpt_path: str | None, mask: str | None, model: str | None, format: str, revision: str | None
) -> "MaskSet | None":
    """Return the mask that the options name; None for a model that is sparse already."""
    if ckpt_path is None and mask is None and model is not None:
        from leap_pl.inputs.hub import local_folder
        from leap_pl.sparse.folder import is_packed

        if format in ("packed", "mask") or is_packed(local_folder(model, revision=revision)):
            return None
    if (ckpt_path is None) == (mask is None):
        given = "Neither --ckpt_path nor --mask is given" if mask is None else "Both --ckpt_path and --mask are given"
        alone = " A sparse model needs neither: --model MODEL --format packed, or mask." if mask is None else ""
        raise UserError(f"{given}. Give exactly one of them.{alone}")
    if mask is not None:
        from leap_pl.masks import MaskSet

        return MaskSet.load(mask)
    from leap_pl.checkpoints.layout import masks_from_checkpoint

    return masks_from_checkpoint(str(ckpt_path))


def _read_weights(ckpt_path: str | None, mask: str | None, masks: "MaskSet") -> "KeptWeights | None":
    """Return the weights that were trained under ``masks``, if any were."""
    if mask is not None:
        from leap_pl.masks.kept_weights import KeptWeights

        return KeptWeights.beside(mask, masks)
    from leap_pl.training.checkpoint_weights import weights_from_checkpoint

    return weights_from_checkpoint(str(ckpt_path))


def _check_base_name(base_model: str) -> None:
    """Warn if others do not find the base model under the name that the published mask records."""
    from leap_pl.inputs.hub import is_hub_id

    if not is_hub_id(base_model):
        say(
            f"leap_pl export: the base model is recorded as {base_model}, which is no hub id: others must give it with "
            "--model. To record its hub id, export again with --model ORG/NAME, from where that names no folder.",
            sys.stderr,
        )


def _read_results(paths: str | None, masks: "MaskSet", rounded_to: str | None = None) -> dict[str, Any]:
    """Read the perplexities of result files: one must have been measured with ``masks``, another may be dense.

    Args:
        paths: Files, separated by commas; None: there are none.
        masks: Masks that are exported.
        rounded_to: Data type that the weights are rounded to; a figure may be of rounded ones, and then says so.

    Returns:
        Text → figure under the mask, with that of the dense model by the same protocol as ``dense``.
    """
    if paths is None:
        return {}
    from leap_pl.comparison.entries import check_protocols, entry_of_result, perplexity_protocol
    from leap_pl.evaluation.record import read_result
    from leap_pl.inputs.plain_values import shown
    from leap_pl.inputs.register import listed
    from leap_pl.masks.mask_set import TRAINED
    from leap_pl.oneshot.methods import rounded_method

    results = {path: read_result(path) for path in listed(paths)}
    digest = masks.digest_of_bits()
    figures: dict[str, Any] = {}
    dense: dict[str, dict[str, Any]] = {}
    trained = TRAINED in masks.provenance.config
    for path, result in results.items():
        if not result["perplexity"]:
            raise UserError(f"{path} has no perplexity. Give a result of leap_pl evaluate --perplexity TEXT.")
        measured = result["model"].get("mask_digest")
        rounded = rounded_to is not None and result["method"].endswith(rounded_method("", rounded_to))
        if measured == digest and not _same_weights(result, masks, rounded_to if rounded else None):
            raise UserError(
                f"{path} was measured with this mask and other weights ({shown(result['method'])}): trained, updated "
                "or rounded ones, or those of another run. Run leap_pl evaluate on the mask or checkpoint that is "
                "exported, and give its output."
            )
        if measured == digest:
            mark: dict[str, Any] = {"rounded_to": rounded_to} if rounded else {}
            mark |= _in_dtype(result)
            named = any(result["model"].get(name) is not None for name in ("mask", "ckpt_path"))
            if trained and named and mark.get("dtype") == "float32":  # an export rounds them to the base model's type
                mark["as_trained"] = True
            figures |= {text: figure | mark for text, figure in result["perplexity"].items()}
        elif len(results) > 1 and _is_dense(result, masks):
            dense |= {text: figure | _in_dtype(result) for text, figure in result["perplexity"].items()}
        else:
            fault = "does not record its mask" if measured is None else "was measured with a different mask"
            raise UserError(
                f"{path} {fault}. Run leap_pl evaluate --mask … --output … with this mask, and give its output."
            )
    if not figures:
        raise UserError("--perplexity names dense results alone. Add one of leap_pl evaluate --mask with this mask.")
    check_protocols([entry_of_result(path, result) for path, result in results.items()])
    # The same text may have been named by another path.
    by_protocol = {str(perplexity_protocol(figure)): figure for figure in dense.values()}
    of_dense = {
        text: dense.get(text, by_protocol.get(str(perplexity_protocol(figure)))) for text, figure in figures.items()
    }
    if dense and not any(of_dense.values()):
        raise UserError(
            f"--perplexity: the dense results are of {listing(sorted(dense), 3)}, and those with the mask of "
            f"{listing(sorted(figures), 3)}. Measure both on the same texts."
        )
    return {text: figure | _beside(of_dense[text]) for text, figure in figures.items()}


def _in_dtype(result: dict[str, Any]) -> dict[str, Any]:
    """Return the data type that a result was measured in, if it is known."""
    dtype = result["model"].get("dtype")
    return {} if dtype is None else {"dtype": dtype}


def _beside(dense: dict[str, Any] | None) -> dict[str, Any]:
    """Return what a figure under a mask records of that of the ``dense`` model."""
    if dense is None:
        return {}
    return {"dense": dense["value"]} | ({"dense_dtype": dense["dtype"]} if "dtype" in dense else {})


def _is_dense(result: dict[str, Any], masks: "MaskSet") -> bool:
    """Return whether ``result`` is of the base model of ``masks``, which may have been sparse before."""
    from leap_pl.export.sparse_model import UNKNOWN

    base = result["method"] in ("dense", UNKNOWN) and result["model"].get("mask_digest") is None
    return bool(base and result["model"]["fingerprint"] == masks.provenance.fingerprint)


def _same_weights(result: dict[str, Any], masks: "MaskSet", rounded_to: str | None) -> bool:
    """Return whether a result is of the base model's weights, as ``masks`` are, or of those of the same run.

    Args:
        result: Result with the same mask.
        masks: Masks that are exported.
        rounded_to: Data type that its weights are rounded to.
    """
    from leap_pl.inputs.plain_values import plain
    from leap_pl.masks.mask_set import TRAINED
    from leap_pl.oneshot.methods import of_mask_alone, rounded_method

    method = masks.provenance.method
    alone = method if TRAINED in masks.provenance.config else of_mask_alone(method)
    # Version 0.1.0 called the mask alone by the method.
    named = any(result["model"].get(name) is not None for name in ("mask", "ckpt_path"))
    if result["method"] not in (rounded_method(alone, rounded_to), method if named else None):
        return False
    run = [TRAINED, "objective", "steps", "seed", "data", "optimizer", "lr_scheduler", "dtype", "logits_dtype"]
    run += ["precision", "gradient_clip_val", "gradient_clip_algorithm"]
    measured, made = (
        {name: plain(config.get(name)) for name in run} | {"base": base} if TRAINED in config else {}
        for config, base in (
            (result.get("config") or {}, result["model"]["fingerprint"]),
            (masks.provenance.config, masks.provenance.fingerprint),
        )
    )
    return measured == made
