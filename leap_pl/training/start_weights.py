"""Weights that training starts from in place of the base model's: a folder that a one-shot method has updated."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from leap_pl.base_model.loading import load_model
from leap_pl.base_model.weights import Weight
from leap_pl.errors import UserError
from leap_pl.gates import TrainedWeight
from leap_pl.inputs.hub import local_folder
from leap_pl.inputs.records import MASK
from leap_pl.inputs.register import note_input
from leap_pl.masks import MaskSet
from leap_pl.training.weights import Master

# Share of the kept weights: one-shot methods may set those to 0 whose inputs are 0 in all of their text.
MOST_ZEROS = 0.1


class StartWeights:
    """Tensors of another model of the same family, by the names of the base model's."""

    def __init__(self, tensors: Mapping[str, Tensor], folder: str, masks: Mapping[str, Tensor] | None = None) -> None:
        """Hold ``tensors``, none for a run that starts from the base model's, their ``folder`` and its ``masks``."""
        self.tensors, self.folder, self.masks = tensors, folder, masks
        self._kept, self._zeros = 0, 0

    @classmethod
    def read(cls, folder: str, *, trust_remote_code: bool = False) -> "StartWeights":
        """Read the model ``folder``.

        Raises:
            UserError: It cannot be read, or is packed.
        """
        from leap_pl.sparse.folder import is_packed  # asks for pydantic, which learning does without

        note_input(folder)
        if is_packed(local_folder(folder)):
            raise UserError(
                f"model.weights {folder} is packed. Unpack it: leap_pl export --model {folder} --output_dir FOLDER"
            )
        model = load_model(folder, trust_remote_code=trust_remote_code)
        file = local_folder(folder, MASK) / MASK
        masks = MaskSet.load(file).masks if file.is_file() else None
        return cls({name: parameter.detach() for name, parameter in model.named_parameters()}, folder, masks)

    def set_(self, trained: TrainedWeight, weight: Weight, mask: Callable[[], Tensor] | None = None) -> None:
        """Start the ``trained`` form of a weight from its tensor here; without tensors it stays as it is.

        Args:
            trained: Trained weight.
            weight: Frozen weight.
            mask: Function that returns its fixed mask; None: it has no gate.

        Raises:
            UserError: The tensor is missing, of another shape, or not 0 where the mask removes the weight; or the
                folder has another mask.
        """
        if not self.tensors:
            return
        found, shape = self.tensors.get(weight.name), weight.parameter.shape
        if found is None or found.shape != shape:
            raise UserError(
                f"model.weights {self.folder} has no weight {weight.name} of the shape {tuple(shape)}. Give a folder "
                "of the same model as --model.base_model."
            )
        if mask is not None:
            mask_OI = mask().cpu()
            strange = int(found[~mask_OI].count_nonzero())
            if strange:
                raise UserError(
                    f"model.weights {self.folder} has other zeros than the mask: {strange:,} weights of {weight.name}, "
                    "which the mask removes, are not 0. Give the weights that were made with this mask."
                )
            if self.masks is not None and not torch.equal(self.masks.get(weight.name, mask_OI), mask_OI):
                raise UserError(
                    f"model.weights {self.folder} has a mask of its own, and the run another one, as of {weight.name}. "
                    "Give the weights that were made with this mask."
                )
            if self.masks is None:
                self._kept += int(mask_OI.sum())
                self._zeros += int((mask_OI & (found == 0) & (weight.parameter.cpu() != 0)).sum())
        assert isinstance(trained, Master)
        trained.start_at(found)

    def check(self) -> None:
        """Check that the mask is that of the weights, once all are set: it may not keep many that are 0 here alone.

        Raises:
            UserError: It does.
        """
        if self._zeros > MOST_ZEROS * self._kept:
            raise UserError(
                f"model.weights {self.folder} has other zeros than the mask: {self._zeros:,} of the {self._kept:,} "
                "weights that the mask keeps are 0 there, and not in the base model. Give the weights that were made "
                "with this mask."
            )
