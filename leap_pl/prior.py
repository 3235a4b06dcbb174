"""The mask that learning starts from."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from leap_pl.errors import UserError
from leap_pl.masks import MaskSet, pack, unpack
from leap_pl.parallel import RankZero

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


class SharedPrior:
    """The masks of a prior that rank zero holds, given to every rank one weight at a time, a bit an element."""

    def __init__(self, prior: MaskSet | None, rank_zero: RankZero) -> None:
        """Take the ``prior`` of rank zero; on the other ranks it is None."""
        self.prior, self.rank_zero = prior, rank_zero
        self.there = bool(rank_zero.tell(prior is not None))

    def mask(self, name: str, shape: torch.Size) -> torch.Tensor | None:
        """The mask of the weight ``name``, None where there is no prior; every rank asks in the same order."""
        if not self.there:
            return None
        if self.rank_zero.alone:
            assert self.prior is not None
            return self.prior.masks[name]
        bits = pack(self.prior.masks[name]) if self.prior is not None else None
        return unpack(self.rank_zero.share(bits, (shape.numel() + 7) // 8), list(shape))

    def close(self) -> None:
        """No more masks are asked for."""
        self.rank_zero.close()
