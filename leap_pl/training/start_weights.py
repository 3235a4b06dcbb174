"""Weights that training starts from in place of the base model's: a folder that a one-shot method has updated."""

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor, nn

from leap_pl.base_model.loading import load_model
from leap_pl.base_model.weights import Weight, check_finite_weights
from leap_pl.errors import UserError, listing
from leap_pl.gates import TrainedWeight
from leap_pl.inputs.hub import local_folder
from leap_pl.inputs.paths import expanded
from leap_pl.inputs.records import MASK
from leap_pl.inputs.register import note_input
from leap_pl.masks import MaskSet
from leap_pl.training.weights import Master

# Share of the kept weights: one-shot methods may set those to 0 whose inputs are 0 in all of their text.
MOST_ZEROS = 0.1


def check_start(folder: str) -> None:
    """Check that ``folder``, if it is one here, has a model, before anything is loaded.

    Raises:
        UserError: It is the folder of a run or of ``leap_pl prune``, or a file other than a GGUF one.
    """
    path = expanded(folder)
    if path.is_file() and path.suffix.lower() != ".gguf":
        raise UserError(
            f"model.weights {folder} is a file. Give a Hugging Face model folder; of the mask and weights of a run, "
            "leap_pl export --mask MASK --output_dir FOLDER makes one."
        )
    if not path.is_dir() or (path / "config.json").is_file():
        return
    own = path / "model"
    if (own / "config.json").is_file():
        raise UserError(f"model.weights {folder} has its model in a folder of its own. Give {own}.")
    raise UserError(
        f"model.weights {folder} is a folder without a config.json. Give a Hugging Face model folder; leap_pl export "
        "makes one of a run."
    )


class StartWeights:
    """Tensors of another model of the same family, by the names of the base model's."""

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        folder: str,
        masks: Mapping[str, Tensor] | None = None,
        others: Collection[str] = (),
    ) -> None:
        """Hold ``tensors``, none for a run that starts from the base model's.

        Args:
            tensors: Name → weight.
            folder: Folder that they were read from.
            masks: Masks in that folder.
            others: Names of those that are not the base model's.
        """
        self.tensors, self.folder, self.masks, self.others = tensors, folder, masks, others
        self._kept, self._zeros = 0, 0

    @classmethod
    def read(cls, folder: str, base: nn.Module, *, trust_remote_code: bool = False) -> "StartWeights":
        """Read the model ``folder``, of the same family as the ``base`` model.

        Raises:
            UserError: It cannot be read, or is packed.
        """
        from leap_pl.sparse.folder import is_packed  # asks for pydantic, which learning does without

        note_input(folder)
        if is_packed(local_folder(folder)):
            raise UserError(
                f"model.weights {folder} is packed. Unpack it: leap_pl export --model {folder} --output_dir FOLDER"
            )
        with torch.device("cpu"):  # Lightning's device of the run is the default here
            model = load_model(folder, trust_remote_code=trust_remote_code)
        check_finite_weights(model, f"model.weights {folder}")
        file = local_folder(folder, MASK) / MASK
        masks = MaskSet.load(file).masks if file.is_file() else None
        tensors = dict(model.named_parameters(remove_duplicate=False))  # a head may be tied in one of the two alone
        first: dict[int, str] = {}
        others = set()
        for name, own in base.named_parameters(remove_duplicate=False):
            tied = first.setdefault(id(own), name)
            if name in tensors and not _alike(tensors[name].detach(), own.detach().cpu()):
                # Of tied weights the run trains the first, and the others with it.
                same = tied in tensors and torch.equal(tensors[name].detach(), tensors[tied].detach())
                others.add(tied if same else name)
        return cls({name: tensor.detach() for name, tensor in tensors.items()}, folder, masks, others)

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

    def check(self, taken: Collection[str]) -> None:
        """Check what was read, once all weights are set.

        Args:
            taken: Names of the weights that the run trains.

        Raises:
            UserError: The mask keeps many weights that are 0 here alone; or others than those that the run trains are
                not the base model's, and would be lost.
        """
        lost = sorted(set(self.others).difference(taken))
        if lost:
            raise UserError(
                f"model.weights {self.folder} has other values than the base model of {listing(lost, 3)}, which this "
                "run does not train and would drop. Train them too, embeddings and head by "
                "--model.weight_training.embeddings true; or name the folder with --model.base_model as well."
            )
        if self._zeros > MOST_ZEROS * self._kept:
            raise UserError(
                f"model.weights {self.folder} has other zeros than the mask: {self._zeros:,} of the {self._kept:,} "
                "weights that the mask keeps are 0 there, and not in the base model. Give the weights that were made "
                "with this mask."
            )


def _alike(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are one in different data types: each may have been rounded to its own."""
    if one.shape != other.shape:
        return False
    if torch.equal(one.to(other.dtype), other) or torch.equal(other.to(one.dtype), one):
        return True
    if {one.dtype, other.dtype} != {torch.bfloat16, torch.float16}:
        return False
    # Of one tensor in float32. The absolute part is the finest step of float16.
    return torch.allclose(one.float(), other.float(), rtol=torch.finfo(torch.bfloat16).eps, atol=2**-24)
