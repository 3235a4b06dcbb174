"""Gate of a mask that stays as it is, for training the weights that it keeps."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from leap_pl.base_model.weights import Weight
from leap_pl.errors import UserError
from leap_pl.gates.collection import Gates
from leap_pl.gates.gate import Gate, GateState
from leap_pl.kernels.norms import norm_of
from leap_pl.masks.bits import pack
from leap_pl.masks.patterns import NM, Pattern, Unstructured, read_form


class FixedGates(Gates["FixedGate"]):
    """All fixed gates of a model."""

    @property
    def form(self) -> str:
        """Return the pattern of the mask."""
        return self.first.pattern

    def prior_forms(self, sparsity: float) -> dict[str, Pattern]:
        """Return the form of the mask, which is the prior; see :meth:`.Gates.prior_forms`."""
        form = read_form(self.first.pattern)
        return {"prior": form if isinstance(form, NM) else Unstructured(sparsity)}

    def check_priors(self, priors: Mapping[str, Any]) -> None:
        """Check that there is a mask; see :meth:`.Gates.check_priors`."""
        if "prior" not in priors:
            raise UserError(
                "a FixedGate needs a mask, and prior.method is none. Name one with --model.mask, or a one-shot method "
                "with --model.prior.method."
            )

    def choose(self, sparsity: float) -> None:
        """Check that the mask is known, which no ``sparsity`` changes.

        Raises:
            UserError: No mask was set, as in a validation without a checkpoint.
        """
        if not any(bool(gate.held("bits").any()) for gate in self.values()):
            raise UserError("the fixed mask is not known. Give a checkpoint of leap_pl recover with --ckpt_path.")

    def samples(self, stride: int) -> dict[str, Tensor]:
        """Return nothing: there are no logits."""
        return {}

    def sample_hard_masks(self, sparsity: float, stride: int) -> dict[str, Tensor]:
        """Return samples of the masks without unpacking the rest; see :meth:`.Gates.sample_hard_masks`."""
        return {name: gate.sample_hard_mask(stride) for name, gate in self.items()}


class FixedGate(Gate):
    """Gate that learns nothing: its mask is that of the prior, whatever made it, and stays.

    .. code-block:: yaml

        model:
          mask: runs/quickstart/checkpoints/mask.safetensors
          train_weights: kept

    ``model.mask`` sets the gate, the prior, the sparsity and the targets; a one-shot method of ``model.prior`` may make
    the mask instead. The bits are packed, an eighth of a byte for each weight.
    """

    collection = FixedGates

    bits: Tensor

    def __init__(self, weight: Weight, state: GateState, pattern: str = "unstructured") -> None:
        """Create a gate for ``weight``.

        Args:
            weight: Weight to gate.
            state: State shared by the gates of the model.
            pattern: Form of the mask, as its MaskSet records it: unstructured, or a pattern such as 2:4.
        """
        super().__init__(weight, state)
        read_form(pattern)  # raises if n of m cannot be
        self.pattern = pattern
        count = (self.shape.numel() + 7) // 8
        self.register_buffer("bits", torch.zeros(count, dtype=torch.uint8, device=weight.parameter.device))

    def settings(self) -> dict[str, Any]:
        """Return the pattern; see :meth:`Gate.settings`."""
        return {"pattern": self.pattern}

    def soften(self, weight: Tensor, key_0: Tensor, key_1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the weight with exact zeros, and its sums; see :meth:`Gate.soften`."""
        mask = self.hard_mask()
        masked = weight.masked_fill(~mask, 0)
        return masked, mask.sum(dtype=torch.float32), norm_of(masked) ** 2

    @torch.no_grad()
    def start_from(self, prior: Tensor | None, seed: int) -> None:
        """Set the mask to ``prior``; see :meth:`Gate.start_from`."""
        if prior is not None:
            self.bits.copy_(pack(prior))

    def hard_mask(self) -> Tensor:
        """Return the mask; see :meth:`Gate.hard_mask`."""
        return mask_of(self.held("bits"), self.shape)

    def sample_hard_mask(self, stride: int) -> Tensor:
        """Return every ``stride``-th element of :meth:`hard_mask`, flattened."""
        index = torch.arange(0, self.shape.numel(), stride, device=self.bits.device)
        return (self.bits[index // 8] & _eight(self.bits.device)[index % 8]) != 0

    def extra_repr(self) -> str:
        """Return the summary that is shown when the model is printed."""
        return f"{tuple(self.shape)}, {self.pattern}"


def mask_of(bits: Tensor, shape: torch.Size) -> Tensor:
    """Return the bool mask of ``shape`` that the packed ``bits`` of a :class:`FixedGate` are."""
    mask = (bits[:, None] & _eight(bits.device)).ne_(0).view(torch.bool)  # in place: a byte for each weight, once
    return mask.view(-1)[: shape.numel()].view(shape)


@lru_cache(maxsize=16)
def _eight(device: torch.device) -> Tensor:
    """Return the bits of a byte, the lowest first, as :func:`leap_pl.masks.bits.pack` orders them."""
    return torch.tensor([1 << place for place in range(8)], dtype=torch.uint8, device=device)
