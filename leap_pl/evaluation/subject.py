"""Models to evaluate: a base model, an exported folder, a MaskSet on its base model, or a training checkpoint."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from leap_pl.base_model.loading import Dtype, load_model
from leap_pl.base_model.place import model_of
from leap_pl.base_model.tokenizer import load_tokenizer
from leap_pl.base_model.vocabulary import check_tokenizer, vocabulary_of
from leap_pl.base_model.weights import find_weights, is_sparse, model_fingerprint
from leap_pl.errors import UserError, warn_once
from leap_pl.export.sparse_model import UNKNOWN, is_as_recorded, recorded_facts
from leap_pl.inputs.hub import check_revision
from leap_pl.inputs.paths import behind_link, expanded
from leap_pl.inputs.records import RECORD, mask_in
from leap_pl.masks import MaskSet, split_name
from leap_pl.masks.exported import exported_record
from leap_pl.masks.kept_weights import KeptWeights, without_weights
from leap_pl.masks.mask_set import TRAINED
from leap_pl.masks.weight_groups import shares
from leap_pl.oneshot.methods import of_mask_alone, rounded_method

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class Subject:
    """Model in memory, ready to be evaluated, with its provenance.

    Attributes:
        model: Masked model, in eval mode, on the CPU.
        tokenizer: Tokenizer of the model.
        base_model: Name of the base model.
        revision: Revision of the base model on the hub.
        fingerprint: Fingerprint of the base model's dense weights; None if it is not known.
        method: Pruning method; ``dense`` for a base model.
        origin: Arguments that named the model: ``model``, ``mask``, ``ckpt_path``.
        config: Settings of the method.
        asked: Target sparsity.
        mask_digest: SHA-256 of the bits of the mask (:meth:`leap_pl.masks.MaskSet.digest_of_bits`); None without one.
    """

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    base_model: str
    revision: str | None
    fingerprint: str | None
    method: str
    origin: dict[str, str | None]
    config: dict[str, Any] = field(default_factory=dict)
    asked: float | None = None
    mask_digest: str | None = None


def load_subject(
    *,
    model: str | None = None,
    mask: str | None = None,
    ckpt_path: str | None = None,
    revision: str | None = None,
    dtype: Dtype = "auto",
    trust_remote_code: bool = False,
) -> Subject:
    """Load the model that the flags of ``leap_pl evaluate`` name.

    Args:
        model: Hub id, folder or GGUF file.
        mask: MaskSet file, folder that has one, or hub id of one, to apply.
        ckpt_path: Training checkpoint whose hard mask to apply.
        revision: Revision of ``model`` on the hub.
        dtype: Data type of the weights.
        trust_remote_code: Run code that comes with the model.

    Raises:
        UserError: If nothing is named, or both ``mask`` and ``ckpt_path`` are; if a file cannot be read; or if the mask
            belongs to another model.
    """
    if mask is not None and ckpt_path is not None:
        raise UserError("--mask and --ckpt_path are both given, and each gives a mask. Choose one.")
    if mask is None and ckpt_path is None:
        if model is None:
            raise UserError("Nothing to evaluate. Give --model (hub id, folder, GGUF file), --mask or --ckpt_path.")
        return _plain(model, revision=revision, dtype=dtype, trust_remote_code=trust_remote_code)
    weights: KeptWeights | None  # read before the model is loaded, so that missing ones are found in time
    if mask is not None:
        if expanded(mask).is_dir():
            mask = str(mask_in(mask))  # a result names the file that was read
        masks = MaskSet.load(mask)
        weights = KeptWeights.beside(mask, masks)
    else:
        from leap_pl.checkpoints.layout import masks_from_checkpoint
        from leap_pl.training.checkpoint_weights import weights_from_checkpoint

        checkpoint = behind_link(str(ckpt_path))
        masks, weights = masks_from_checkpoint(checkpoint), weights_from_checkpoint(checkpoint)
    provenance = masks.provenance
    asked, recorded = revision, (provenance.base_model, provenance.revision)
    name, revision = model_of((model, asked), recorded, trust_remote_code=trust_remote_code)
    check_revision(name, asked, "--revision")
    loaded = load_model(name, revision=revision, dtype=dtype, trust_remote_code=trust_remote_code)
    without_weights(masks).apply_(loaded)
    masks.check_form(find_weights(loaded, list(masks.masks)))
    if weights is not None:
        weights.apply_(loaded, masks)
    return Subject(
        model=loaded,
        tokenizer=_tokenizer_of(loaded, name, revision=revision, trust_remote_code=trust_remote_code),
        base_model=provenance.base_model,
        revision=revision,
        fingerprint=provenance.fingerprint,
        method=of_mask_alone(provenance.method) if weights is None else provenance.method,
        origin={"model": model, "mask": mask, "ckpt_path": ckpt_path},
        config=provenance.config,
        asked=provenance.sparsity,
        mask_digest=masks.digest_of_bits(),
    )


def _method_of_record(record: dict[str, Any], name: str, revision: str | None) -> str:
    """Return the method of an exported model, whose weights may be those of the method or the base model's."""
    method, facts = str(record.get("method", "dense")), recorded_facts(name, revision=revision)
    updated = facts.get("updated_by")
    if TRAINED not in (record.get("config") or {}):
        if updated is None:
            method = of_mask_alone(method)
        elif updated != method:
            method += f" (weights of {updated})"
    return rounded_method(method, facts.get("rounded_to"))


def _method_of_weights(model: "PreTrainedModel") -> str:
    """Return the method of a model without a record: a sparse one may be of any."""
    return UNKNOWN if is_sparse(find_weights(model, once=True)) else "dense"


def _plain(name: str, *, revision: str | None, dtype: Dtype, trust_remote_code: bool) -> Subject:
    record = exported_record(name, revision=revision)  # first, so that a damaged record fails before the model loads
    loaded = load_model(name, revision=revision, dtype=dtype, trust_remote_code=trust_remote_code)
    if record and not is_as_recorded(name, loaded, revision=revision):
        warn_once(
            f"{name}: the zeros of its weights are not those of the mask that its {RECORD} is of, so that it is "
            "measured as a model without a record."
        )
        record = {}
    return Subject(
        model=loaded,
        tokenizer=_tokenizer_of(loaded, name, revision=revision, trust_remote_code=trust_remote_code),
        base_model=record.get("base_model", name),
        revision=record.get("revision", revision),
        # An exported model records the fingerprint of its base model; that of the masked weights identifies nothing.
        fingerprint=record.get("fingerprint") if record else model_fingerprint(loaded),
        method=_method_of_record(record, name, revision) if record else _method_of_weights(loaded),
        origin={"model": name, "mask": None, "ckpt_path": None},
        config=record.get("config", {}),
        asked=record.get("sparsity"),
        mask_digest=record.get("mask_digest"),
    )


def _tokenizer_of(
    model: "PreTrainedModel", name: str, *, revision: str | None, trust_remote_code: bool
) -> "PreTrainedTokenizerBase":
    tokenizer = load_tokenizer(name, revision=revision, trust_remote_code=trust_remote_code)
    check_tokenizer(tokenizer, vocabulary_of(model), name)
    return tokenizer


def realised_sparsity(model: nn.Module) -> dict[str, Any]:
    """Return the fraction of zeros in the linear weights of the decoder blocks of ``model``.

    Zeros are counted in the weights and not in a mask, so that a mask on its base model and the folder exported from it
    give the same numbers; weights that are zero in the base model count too.

    Returns:
        ``global``: sparsity of all weights; ``layers``, ``projections`` and ``weights``: decoder block, projection and
        weight name → sparsity; ``counted``: the number of weights.
    """
    zeros = {
        name: (int((weight.parameter == 0).sum()), weight.parameter.numel())
        for name, weight in find_weights(model, once=True).items()
    }
    removed, counted = (sum(numbers) for numbers in zip(*zeros.values(), strict=True))
    return {
        "global": removed / counted,
        "counted": counted,
        "layers": shares(zeros, lambda name: [str(split_name(name)[0])]),
        "projections": shares(zeros, lambda name: [split_name(name)[1]]),
        "weights": shares(zeros, lambda name: [name]),
    }
