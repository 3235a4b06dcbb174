"""Export of a masked or sparse model as a Hugging Face folder, with exact zeros or packed."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from leap_pl.base_model.hub_kernels import NO_KERNELS, without_hub_kernels
from leap_pl.errors import UserError
from leap_pl.export.card import card_of, facts_of
from leap_pl.export.hub import shortened, without_paths
from leap_pl.export.usage import Format
from leap_pl.inputs import records
from leap_pl.inputs.hub import is_hub_id
from leap_pl.inputs.plain_values import plain
from leap_pl.masks.kept_weights import without_weights
from leap_pl.masks.mask_set import TRAINED

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from leap_pl.masks import MaskSet
    from leap_pl.masks.kept_weights import KeptWeights

Values = Literal["auto", "int8"]

SINGLE = "model.safetensors"  # of a model whose weights are in one file


def export_model(
    masks: "MaskSet | None",
    output_dir: str | Path,
    model: str,
    *,
    weights: "KeptWeights | None" = None,
    format: Format = "huggingface",
    values: Values = "auto",
    revision: str | None = None,
    perplexity: Mapping[str, Any] | None = None,
    hub_id: str | None = None,
    force: bool = False,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Write ``model`` with the weights removed that ``masks`` remove, or ``masks`` alone, and verify the result.

    Args:
        masks: Weights of the base model ``model`` to keep; None if ``model`` is sparse already, packed or with zeros.
        output_dir: Folder to write, atomically. An existing one is replaced only with ``force``.
        model: Hub id, folder or GGUF file of the base model that the masks were made for, or of the sparse model.
        weights: Trained weights to write in place of the base model's.
        format: ``huggingface``, with exact zeros, which plain transformers loads; ``packed`` (:mod:`leap_pl.sparse`);
            or ``mask``, the masks and no weights.
        values: Values of packed weights: ``auto``, those of the model (int8 if it is packed with these), or ``int8``,
            rounded.
        revision: Revision of ``model`` on the hub.
        perplexity: Perplexities of the masked model for the model card, as in a result of ``leap_pl evaluate``; with
            ``dense`` in a figure, that of the dense model by the same protocol.
        hub_id: Repository of the hub in which the folder will be published, for the model card. No file of the folder
            then has an absolute path in it.
        force: Replace ``output_dir`` if leap_pl wrote its contents; and pack a model that gains nothing by it.
        trust_remote_code: Run code that comes with ``model``.

    Returns:
        Contents of ``leap_pl.json`` in the folder.

    Raises:
        UserError: If the masks are of another model or do not follow their pattern, the model cannot be read or has
            links out of its folder, packing gains nothing, or the folder cannot be written.
    """
    from leap_pl.base_model.licence import licence_of
    from leap_pl.base_model.loading import load_model
    from leap_pl.base_model.tokenizer import save_tokenizer
    from leap_pl.base_model.tokenizer_files import check_links
    from leap_pl.base_model.weights import QUANTISED_ZEROS, ROUNDED, find_weights
    from leap_pl.files import atomic_folder
    from leap_pl.masks import MaskSet

    with atomic_folder(output_dir, force=force) as folder:  # first, so that a bad folder fails before the model loads
        if format != "mask":
            check_links(model)
        base = load_model(model, revision=revision, trust_remote_code=trust_remote_code)
        known: dict[str, Any] = {"perplexity": dict(perplexity)} if perplexity else {}
        if masks is None:
            from leap_pl.export.sparse_model import UNKNOWN, masks_of, recorded_facts
            from leap_pl.inputs.hub import local_folder
            from leap_pl.sparse.folder import has_int8

            masks = masks_of(model, base, revision=revision)
            known |= recorded_facts(model, masks, revision=revision)
            if has_int8(local_folder(model, revision=revision)) and format == "packed":
                values = "int8"
            if masks.provenance.method == UNKNOWN and format == "mask" and masks.sparsity < QUANTISED_ZEROS:
                raise UserError(
                    f"{model} is not sparse: {masks.sparsity:.1%} of its weights are 0. Name the mask with --mask, or "
                    "a checkpoint with --ckpt_path."
                )
            if format == "mask":  # nothing of the weights, nor of what was measured with them
                if TRAINED in masks.provenance.config or "updated_by" in known:
                    known.pop("perplexity", None)
                    known[records.ZEROS] = None  # of the base model they are not known
                exact = {text: of for text, of in known.pop("perplexity", {}).items() if "rounded_to" not in of}
                known |= {"perplexity": exact} if exact else {}
                known.pop("rounded_to", None)
                known.pop("updated_by", None)
                known.pop("trained_in", None)
                masks = without_weights(masks)
        else:
            masks.check(base)
            masks.check_form(find_weights(base, list(masks.masks)))  # 2:4 kernels give wrong results for other masks
            if is_hub_id(model) and model != masks.provenance.base_model:  # the same weights, by the check above
                masks = masks.with_provenance(base_model=model, revision=revision)
            if format == "mask":  # whose users have the base model's weights
                masks = without_weights(masks)
            elif weights is not None:
                weights.apply_(base, masks)
            elif TRAINED in masks.provenance.config:
                raise ValueError("weights were trained under these masks: pass them as weights")
        own_code = trust_remote_code and bool(getattr(base.config, "auto_map", None))
        if hub_id is not None:
            masks, known = without_paths(masks), shortened(known)
        facts = facts_of(masks, zeros_kept(masks, base)) | known
        if getattr(base, ROUNDED, False):
            facts["mixed_dtypes"] = True
        trained_in = None if weights is None else masks.provenance.config.get("dtype")
        if trained_in == "float32" and str(base.dtype) != "torch.float32":  # and rounded to the base model's
            facts["trained_in"] = trained_in
        if format != "mask":
            save_tokenizer(model, folder, revision=revision, trust_remote_code=trust_remote_code)
        if format == "packed":
            from leap_pl.export.packed import write_packed_model

            facts["packed"] = write_packed_model(base, masks, folder, int8=values == "int8", force=force)
            facts |= {"rounded_to": values} if values == "int8" else {}
        else:
            masks.save(folder / records.MASK)
            if MaskSet.load(folder / records.MASK).digest_of_bits() != facts["mask_digest"]:
                raise UserError(f"{records.MASK} does not read back as it was written. Check the disk of {output_dir}.")
        if format == "huggingface":
            kept_digests = _kept_digests(masks, base, () if weights is None else weights.names)
            _write_zeros(base, masks, folder)
            del base  # _verify loads the model again: do not hold two
            _verify(folder, masks, kept_digests, trust_remote_code)
        (folder / records.RECORD).write_text(json.dumps(plain(facts), indent=2) + "\n", encoding="utf-8")
        licence = {} if format == "mask" else licence_of(model, revision=revision)
        card = card_of(masks, facts, format=format, hub_id=hub_id, licence=licence, trust_remote_code=own_code)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return facts


def _write_zeros(base: "PreTrainedModel", masks: "MaskSet", folder: Path) -> None:
    from leap_pl.export.zeros import zero_removed

    base.save_pretrained(folder)
    if not zero_removed(folder, masks):  # the family's files are laid out differently from its model
        masks.apply_(base, check=False)
        base.save_pretrained(folder)
    write_index(folder)


def write_index(folder: Path) -> None:
    """Write the index of a model in one file, which transformers does without.

    vLLM and others read every ``*.safetensors`` of a folder that no index leaves out, and the mask's tensors have the
    names of weights.
    """
    from safetensors import safe_open

    model, index = folder / SINGLE, folder / f"{SINGLE}.index.json"
    if not model.is_file() or index.exists():
        return
    with safe_open(model, framework="pt") as file:
        names = sorted(file.keys())
    with model.open("rb") as file:
        header = 8 + int.from_bytes(file.read(8), "little")
    size = model.stat().st_size - header
    content = {"metadata": {"total_size": size}, "weight_map": dict.fromkeys(names, SINGLE)}
    index.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def zeros_kept(masks: "MaskSet", base: "PreTrainedModel") -> int:
    """Return how many kept weights are zero in ``base``."""
    parameters = dict(base.named_parameters())
    return sum(int((parameters[name].detach()[mask] == 0).sum()) for name, mask in masks.masks.items())


def _kept_digests(masks: "MaskSet", base: "PreTrainedModel", trained: Iterable[str]) -> dict[str, str]:
    """Return a digest of the bits of each weight's kept elements, and of the ``trained`` weights without a mask."""
    parameters = {name: parameter.detach() for name, parameter in base.named_parameters()}
    digests = {name: _digest(parameters[name][mask]) for name, mask in masks.masks.items()}
    return digests | {name: _digest(parameters[name]) for name in trained if name not in digests}


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

    with nullcontext() if trust_remote_code else without_hub_kernels():
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", trust_remote_code=trust_remote_code, **NO_KERNELS
        )
    found = dict(model.named_parameters())
    for name, digest in kept_digests.items():
        weight, mask = found[name].detach(), masks.masks.get(name)
        kept, removed = (weight, weight[:0]) if mask is None else (weight[mask], weight[~mask])
        if bool(removed.count_nonzero()) or _digest(kept) != digest:
            raise UserError(f"{name} does not read back as it was written. Check the disk of {folder.parent}.")
