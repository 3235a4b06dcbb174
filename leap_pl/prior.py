"""The mask that learning starts from."""

from collections.abc import Mapping
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
    from leap_pl.patterns import Pattern


@dataclass(frozen=True)
class Prior:
    """Which mask the logits lean towards at the start.

    Attributes:
        method: ``wanda`` (the paper's), ``magnitude``, ``sparseswaps``, ``sparsegpt`` or ``admm``: made at the
            target sparsity, and in the form that the gates want (unstructured, n:m or both), from the run's own
            calibration text. ``none``: no lean at all.
        mask: A MaskSet file instead of a method.
        inner_mask: (TileGate) A MaskSet file of n:m form for the tiles that are not dense, instead of a method.
        sequences: Calibration sequences of the method.
        cache_dir: Where masks made from a method are kept for the next run on the same model and text.
    """

    method: Literal["wanda", "magnitude", "sparseswaps", "sparsegpt", "admm", "none"] = "wanda"
    mask: str | None = None
    inner_mask: str | None = None
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
        forms: "Mapping[str, Pattern]",
        data: "TextDataModule | None",
        device: torch.device,
        progress: bool = True,
    ) -> dict[str, MaskSet]:
        """The prior masks of ``weights``, one for each of ``forms``; none where the method is ``none``.

        Args:
            model: The dense base model; its weights are unchanged afterwards.
            weights: The weights that will be gated.
            base_model: The model's name, for the mask's provenance.
            forms: What the gates ask for (:meth:`leap_pl.gates.Gate.prior_forms`): ``prior``, at the target
                sparsity or of the gates' own pattern, and, for some gates, ``inner``.
            data: Where calibration text comes from; magnitude needs none.
            device: Where the method computes.
            progress: Show a progress bar.

        Raises:
            UserError: The mask file belongs to another model or other weights, or there is no text to
                calibrate on.
        """
        if self.inner_mask is not None and "inner" not in forms:
            raise UserError("prior.inner_mask is for gates of tiles (model.gate TileGate). Leave it out.")
        files = {"prior": self.mask, "inner": self.inner_mask}
        masks: dict[str, MaskSet] = {}
        for form, pattern in forms.items():
            file = files[form]
            if file is not None:
                masks[form] = MaskSet.load(file)
                masks[form].check(model, weights)
            elif self.method != "none":
                masks[form] = self._make(model, weights, pattern, base_model, data, device, progress)
        return masks

    def _make(
        self,
        model: "PreTrainedModel",
        weights: "dict[str, Weight]",
        pattern: "Pattern",
        base_model: str,
        data: "TextDataModule | None",
        device: torch.device,
        progress: bool,
    ) -> MaskSet:
        """The mask of one form, by the method."""
        assert self.method != "none"
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
            pattern,
            base_model=base_model,
            sequences=self.sequences,
            data=data,
            cache_dir=self.cache_dir,
            device=device,
            progress=progress,
        )


class SharedPrior:
    """The masks of priors that rank zero holds, given to every rank one weight at a time, a bit an element."""

    def __init__(self, priors: Mapping[str, MaskSet], rank_zero: RankZero) -> None:
        """Take the ``priors`` of rank zero by their forms; on the other ranks there are none."""
        self.priors, self.rank_zero = priors, rank_zero
        self.forms: list[str] = rank_zero.tell(list(priors))

    def masks(self, name: str, shape: torch.Size) -> dict[str, torch.Tensor]:
        """The mask of the weight ``name`` in each form there is; every rank asks in the same order."""
        return {form: self._mask(self.priors.get(form), name, shape) for form in self.forms}

    def _mask(self, prior: MaskSet | None, name: str, shape: torch.Size) -> torch.Tensor:
        if self.rank_zero.alone:
            assert prior is not None
            return prior.masks[name]
        bits = pack(prior.masks[name]) if prior is not None else None
        return unpack(self.rank_zero.share(bits, (shape.numel() + 7) // 8), list(shape))

    def close(self) -> None:
        """No more masks are asked for."""
        self.rank_zero.close()
