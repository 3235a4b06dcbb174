"""Weights that were trained under a mask: a safetensors file beside the MaskSet, and their way into a model.

The file has the trained tensors by the names of the base model's parameters, in the data type that the run computed
with: gated weights with exact zeros where the mask removes them, and tensors without a mask, such as norms. The
header's metadata has

===================  ====================================================================================
``format``           ``leap_pl.KeptWeights``
``format_version``   ``1``
``mask_digest``      digest of the mask's bits (:meth:`leap_pl.masks.MaskSet.digest_of_bits`)
``record_digest``    SHA-256 of the settings in the mask's provenance, which runs under one mask differ in
``digests``          JSON: name of each tensor → SHA-256 of its bytes; weights of earlier versions have none
===================  ====================================================================================

The provenance of the mask says that weights were trained, on what and how: key ``train_weights`` of its settings.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from leap_pl.errors import UserError, one_line
from leap_pl.files import atomic_file
from leap_pl.files.tensor_file import damage_in_one_line, tensor_bytes, write_tensors
from leap_pl.inputs.hub import repository_of
from leap_pl.inputs.paths import expanded
from leap_pl.inputs.plain_values import plain, shown
from leap_pl.inputs.records import EARLIER, MASK, WEIGHTS, WEIGHTS_FORMAT, mask_in
from leap_pl.inputs.register import note_input
from leap_pl.masks.mask_set import STAYED, TRAINED, MaskSet

FORMAT_VERSION = 1
ANOTHER_COPY = "Use another copy of it, or give the run's checkpoint with --ckpt_path."


class KeptWeights:
    """Trained weights of a model, computed or read one at a time.

    Attributes:
        names: Names of the trained parameters.
        dtype: Data type that they were trained for; None: that of the model.
    """

    def __init__(
        self, names: Sequence[str], value: Callable[[str, Tensor], Tensor], dtype: torch.dtype | None = None
    ) -> None:
        """Hold the ``names``, and the function from a name and the base model's weight to the trained weight."""
        self.names, self.value, self.dtype = list(names), value, dtype

    @classmethod
    def beside(cls, mask: str | Path, masks: MaskSet) -> "KeptWeights | None":
        """Return the trained weights of the MaskSet file ``mask``, which is loaded as ``masks``; None: it has none.

        An exported model has them in its own files, and not beside its mask.

        Args:
            mask: MaskSet file, folder or hub id of one, as given to :meth:`MaskSet.load`.
            masks: The same, loaded.

        Raises:
            UserError: The mask's provenance says that weights were trained, and their file is missing, damaged, or of
                another mask.
        """
        if TRAINED not in masks.provenance.config:
            return None
        from safetensors import safe_open

        repository = repository_of(mask) if isinstance(mask, str) else None
        place = mask_in(mask)
        path = place.parent / (EARLIER[WEIGHTS] if place.name == EARLIER[MASK] else WEIGHTS)
        if repository is not None or (not path.is_file() and (path.parent / "config.json").is_file()):
            name, revision = repository or (path.parent, None)
            model = f"--model {name}" + ("" if revision is None else f" --revision {revision}")
            raise UserError(
                f"weights were trained under {mask}, and the exported model that it belongs to has them. Give {model} "
                "instead of the mask."
            )
        if not path.is_file():
            raise UserError(
                f"weights were trained under {mask}, and {path} is missing. Put it back, give the run's checkpoint "
                "with --ckpt_path, or write them from Python with module.save_weights(FILE, MASK)."
            )
        note_input(path)
        with damage_in_one_line(path, ANOTHER_COPY):
            file = safe_open(path, framework="pt")
            metadata, names = file.metadata() or {}, list(file.keys())
        if metadata.get("format") != WEIGHTS_FORMAT or metadata.get("format_version") != str(FORMAT_VERSION):
            raise UserError(
                f"{path} has no trained weights of format version {FORMAT_VERSION}. Give the run's checkpoint with "
                "--ckpt_path, or update leap_pl: pip install --upgrade leap_pl"
            )
        # Runs under one fixed mask differ in its record alone, which weights of earlier versions do not name.
        recorded = metadata.get("record_digest")
        other_run = recorded is not None and recorded != _digest_of_record(masks)
        if other_run or metadata.get("mask_digest") != masks.digest_of_bits():
            what = "run" if other_run else "mask"
            raise UserError(
                f"{path} has the weights of another {what} than {mask}. Keep the two files of a run together, or give "
                "its checkpoint with --ckpt_path."
            )
        digests = _read_digests(metadata.get("digests"), names, path)

        def value(name: str, _: Tensor) -> Tensor:
            tensor: Tensor = file.get_tensor(name)
            if digests is not None and _digest(tensor) != digests[name]:
                raise _damaged(path, f"{shown(name, 200)} does not match its digest")
            return tensor

        return cls(names, value)

    @torch.no_grad()
    def apply_(self, model: nn.Module, masks: MaskSet) -> None:
        """Set the trained weights of ``model`` in place, in its own data types, with exact zeros where masks remove.

        Raises:
            UserError: The model lacks a weight, or one is infinite or NaN.
        """
        parameters = dict(model.named_parameters())
        usual = getattr(model, "dtype", None)  # some families keep a few parameters in float32, also while they train
        for name in self.names:
            parameter = parameters.get(name)
            value = None if parameter is None else self._value(name, parameter.detach(), usual)
            if parameter is None or value is None or value.shape != parameter.shape:
                raise UserError(
                    f"the model has no weight {shown(name, 200)} of the shape that was trained. Give the base model "
                    "that the mask was made for."
                )
            value = value.to(parameter.device, parameter.dtype)
            if not bool(torch.isfinite(value).all()):
                raise UserError(
                    f"the trained weight {name} has values that are infinite or NaN in {parameter.dtype}. Train it "
                    "again, or load the model in another data type."
                )
            mask = masks.masks.get(name)
            parameter.data = value if mask is None else value.masked_fill(~mask.to(value.device), 0)

    def _value(self, name: str, base: Tensor, usual: torch.dtype | None) -> Tensor:
        """Return one trained weight; ``base`` is the base model's, and ``usual`` the dtype of most of its weights."""
        trained_for = base.dtype if self.dtype is None or base.dtype != usual else self.dtype
        try:
            return self.value(name, base.to(trained_for))
        except UserError:
            raise
        except Exception as error:  # damaged tensors can make anything fail
            raise UserError(
                f"the trained weight {shown(name, 200)} cannot be computed from what is stored of it "
                f"({shown(one_line(error), 120)}). Take another checkpoint, or another copy of the file."
            ) from error


def _read_digests(text: str | None, names: Sequence[str], path: Path) -> Mapping[str, Any] | None:
    """Return the digests in the header of the file ``path``, of exactly the tensors ``names``; None: it has none.

    Raises:
        UserError: They are not of these.
    """
    if text is None:
        return None
    try:
        digests = json.loads(text)
    except (ValueError, RecursionError):
        digests = None
    if not isinstance(digests, dict) or digests.keys() != set(names):
        raise _damaged(path, "its digests are not those of its tensors")
    return digests


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(f"{path} is truncated or damaged ({reason}). {ANOTHER_COPY}")


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor_bytes(tensor)).hexdigest()


def _digest_of_record(masks: MaskSet) -> str:
    return hashlib.sha256(json.dumps(plain(masks.provenance.config), sort_keys=True).encode()).hexdigest()


def without_weights(masks: MaskSet) -> MaskSet:
    """Return the masks alone, whose provenance has nothing of trained weights, nor figures measured with them."""
    return for_other_weights(masks) if TRAINED in masks.provenance.config else masks


def for_other_weights(masks: MaskSet) -> MaskSet:
    """Return the masks without what their provenance says of the weights under them and of figures of both.

    That of a mask under which a run only trained weights becomes what it was before that run.
    """
    dropped, config = {TRAINED, "perplexity", "perplexity_of"}, masks.provenance.config
    while isinstance(stayed := config.get(STAYED), dict) and isinstance(before := stayed.get("config"), dict):
        config = before
    return masks.with_provenance(config={name: value for name, value in config.items() if name not in dropped})


def write_weights(
    path: str | Path,
    headers: Mapping[str, tuple[torch.dtype, torch.Size]],
    weight: Callable[[str], Tensor],
    mask: str | Path,
) -> None:
    """Write trained weights that are computed one at a time.

    Args:
        path: File to write, atomically; the same weights give the same bytes.
        headers: Name → dtype and shape of the weight.
        weight: Name → the weight; called once for each, in the order of sorted names.
        mask: MaskSet file of the mask that they belong to.

    Raises:
        UserError: The file cannot be written.
    """
    metadata = {"format": WEIGHTS_FORMAT, "format_version": str(FORMAT_VERSION)}
    masks = MaskSet.load(mask)
    metadata |= {"mask_digest": masks.digest_of_bits(), "record_digest": _digest_of_record(masks)}
    names = sorted(headers)
    digests = dict.fromkeys(names, "0" * 64)  # as long as those that are written at the end

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in names:
            tensor = weight(name)
            digests[name] = _digest(tensor)
            yield name, tensor
            del tensor  # before the next one is computed

    with atomic_file(expanded(path)) as temporary:
        layout = {name: headers[name] for name in names}
        write_tensors(temporary, layout, tensors(), lambda: metadata | {"digests": json.dumps(digests)})
