"""The mask that learning starts from."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from leap_pl.errors import UserError
from leap_pl.masks import MaskSet

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from leap_pl.data import TextDataModule
    from leap_pl.models import Weight


@dataclass(frozen=True)
class Prior:
    """Which mask the logits lean towards at the start.

    Attributes:
        method: ``wanda`` (the paper's), ``magnitude``, ``sparsegpt`` or ``admm``: made at the target sparsity
            from the run's own calibration text. ``none``: no lean at all.
        mask: A MaskSet file instead of a method.
        sequences: Calibration sequences of the method.
        cache_dir: Where masks made from a method are kept for the next run on the same model and text.
    """

    method: Literal["wanda", "magnitude", "sparsegpt", "admm", "none"] = "wanda"
    mask: str | None = None
    sequences: int = 128
    cache_dir: str = "~/.cache/leap_pl/priors"

    def __post_init__(self) -> None:
        if self.sequences < 1:
            raise ValueError(f"prior.sequences is {self.sequences}; it takes at least 1 to calibrate on.")

    def make(
        self,
        model: "PreTrainedModel",
        weights: "dict[str, Weight]",
        *,
        base_model: str,
        sparsity: float,
        data: "TextDataModule | None",
        device: torch.device,
        progress: bool = True,
    ) -> MaskSet | None:
        """The prior mask of ``weights`` at ``sparsity``, or None where the method is ``none``.

        Args:
            model: The dense base model; its weights are unchanged afterwards.
            weights: The weights that will be gated.
            base_model: The model's name, for the mask's provenance.
            sparsity: The target sparsity.
            data: Where calibration text comes from; magnitude needs none.
            device: Where the method computes.
            progress: Show a progress bar.

        Raises:
            UserError: The mask file belongs to another model or other weights, or there is no text to
                calibrate on.
        """
        if self.mask is not None:
            mask = MaskSet.load(self.mask)
            mask.check(model, weights)
            return mask
        if self.method == "none":
            return None
        if self.method != "magnitude" and data is None:
            raise UserError(
                f"prior.method {self.method} needs calibration text and there is no data module. "
                "Give fit a TextDataModule, or take the prior 'magnitude' or a MaskSet file."
            )
        from leap_pl.oneshot.prior import one_shot_prior

        return one_shot_prior(
            model,
            weights,
            self.method,
            sparsity,
            base_model=base_model,
            sequences=self.sequences,
            data=data,
            cache_dir=self.cache_dir,
            device=device,
            progress=progress,
        )
