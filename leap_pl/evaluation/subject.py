"""What is evaluated: a base model, an exported checkpoint, a MaskSet over its base model, or a training checkpoint."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from leap_pl.base_model.loading import Dtype, load_model, load_tokenizer, name_of_model
from leap_pl.base_model.vocabulary import check_tokenizer, vocabulary_of
from leap_pl.base_model.weights import find_weights, model_fingerprint
from leap_pl.errors import UserError
from leap_pl.inputs import records
from leap_pl.inputs.plain_values import read_json
from leap_pl.masks import MaskSet, split_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class Subject:
    """A model in memory, ready to be measured, and where it comes from.

    Attributes:
        model: The masked model, in eval mode, on the CPU.
        tokenizer: Its tokenizer.
        base_model: Name of the base model.
        revision: Of the base model on the hub.
        fingerprint: Of the base model's weights, before anything was removed; None where it is not known.
        method: What removed the weights; ``dense`` for a base model.
        origin: What was given: ``model``, ``mask``, ``ckpt_path``.
        config: Settings of the method.
        asked: The sparsity that was asked for.
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
    """Load what the flags of ``leap_pl evaluate`` name.

    Raises:
        UserError: Nothing or too much is named, it cannot be read, or the mask belongs to another model.
    """
    if mask is not None and ckpt_path is not None:
        raise UserError("Both --mask and --ckpt_path are given, and each says what to remove. Choose one.")
    if mask is None and ckpt_path is None:
        if model is None:
            raise UserError("Nothing to evaluate. Give --model (hub id, folder, GGUF file), --mask or --ckpt_path.")
        return _plain(model, revision=revision, dtype=dtype, trust_remote_code=trust_remote_code)
    masks = MaskSet.load(mask) if mask is not None else _masks_of_checkpoint(str(ckpt_path))
    told = masks.provenance
    # A revision belongs to the name it was recorded with.
    revision = revision or told.revision if model is None else revision
    name = name_of_model(model, told.base_model, trust_remote_code=trust_remote_code)
    loaded = load_model(name, revision=revision, dtype=dtype, trust_remote_code=trust_remote_code)
    masks.apply_(loaded)
    return Subject(
        model=loaded,
        tokenizer=_tokenizer_of(loaded, name, revision=revision, trust_remote_code=trust_remote_code),
        base_model=told.base_model,
        revision=revision,
        fingerprint=told.fingerprint,
        method=told.method,
        origin={"model": model, "mask": mask, "ckpt_path": ckpt_path},
        config=told.config,
        asked=told.sparsity,
        mask_digest=masks.digest_of_bits(),
    )


def _masks_of_checkpoint(path: str) -> MaskSet:
    from leap_pl.checkpoints.layout import masks_from_checkpoint

    return masks_from_checkpoint(path)


def _plain(name: str, *, revision: str | None, dtype: Dtype, trust_remote_code: bool) -> Subject:
    told = exported_record(name)  # first: to refuse it takes no time
    loaded = load_model(name, revision=revision, dtype=dtype, trust_remote_code=trust_remote_code)
    return Subject(
        model=loaded,
        tokenizer=_tokenizer_of(loaded, name, revision=revision, trust_remote_code=trust_remote_code),
        base_model=told.get("base_model", name),
        revision=told.get("revision", revision),
        # An exported checkpoint names the fingerprint of what it was made from; its own would say nothing.
        fingerprint=told.get("fingerprint") if told else model_fingerprint(loaded),
        method=told.get("method", "dense"),
        origin={"model": name, "mask": None, "ckpt_path": None},
        config=told.get("config", {}),
        asked=told.get("sparsity"),
        mask_digest=told.get("mask_digest"),
    )


def _tokenizer_of(
    model: "PreTrainedModel", name: str, *, revision: str | None, trust_remote_code: bool
) -> "PreTrainedTokenizerBase":
    tokenizer = load_tokenizer(name, revision=revision, trust_remote_code=trust_remote_code)
    check_tokenizer(tokenizer, vocabulary_of(model), name)
    return tokenizer


def exported_record(name: str | Path) -> dict[str, Any]:
    """Return the provenance that an exported folder holds, with its ``mask_digest``; nothing for any other model.

    Raises:
        UserError: The record cannot be read, or is no provenance.
    """
    from leap_pl.masks.provenance_schema import provenance_fields

    path = Path(name).expanduser() / records.RECORD
    if not os.path.lexists(path):
        return {}
    try:
        record = read_json(path)
        known = isinstance(record, dict)
        if known and "provenance" not in record and records.KEY in record:
            return {}  # a folder of another kind says of itself no more than who wrote it
        fields = provenance_fields(record.get("provenance", record) if known else record)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{path} cannot be read ({reason}). Export the checkpoint again.") from error
    digest = record.get("mask_digest")
    return {**fields, "mask_digest": digest if isinstance(digest, str) else None}


def realised_sparsity(model: nn.Module) -> dict[str, Any]:
    """Zeros over all in the linear weights of the decoder blocks, as they are in memory.

    Counted in the weights and not taken from a mask, so that a mask over its base model and the checkpoint
    exported from it give the same numbers; a weight that the base model has at zero counts too.

    Returns:
        ``global``; ``layers`` (decoder block → sparsity); ``projections``; ``weights`` (name → sparsity);
        ``counted``, the number of weights.
    """
    zeros: dict[str, dict[str, list[int]]] = {"layers": {}, "projections": {}, "weights": {}}
    everything = [0, 0]
    for name, weight in find_weights(model).items():
        count = [int((weight.parameter == 0).sum()), weight.parameter.numel()]
        layer, projection = split_name(name)
        for kind, key in (("layers", str(layer)), ("projections", projection), ("weights", name)):
            into = zeros[kind].setdefault(key, [0, 0])
            into[0], into[1] = into[0] + count[0], into[1] + count[1]
        everything = [everything[0] + count[0], everything[1] + count[1]]
    shares: dict[str, Any] = {
        kind: {key: removed / total for key, (removed, total) in counts.items()} for kind, counts in zeros.items()
    }
    return {"global": everything[0] / everything[1], "counted": everything[1], **shares}
