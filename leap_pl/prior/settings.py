"""The mask that learning starts from."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from leap_pl.distributed.strategy import RankZero
from leap_pl.errors import UserError
from leap_pl.inputs.ranges import check_numbers
from leap_pl.masks.mask_set import MaskSet, pack, unpack

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from leap_pl.base_model.weights import Weight
    from leap_pl.gates import Gate
    from leap_pl.masks.patterns import Pattern
    from leap_pl.prior.cache import CalibrationData


@dataclass(frozen=True)
class Prior:
    """Which mask the logits lean towards at the start.

    Attributes:
        method: ``wanda`` (the paper's), ``magnitude``, ``sparseswaps``, ``sparsegpt`` or ``admm``: made at the
            target sparsity, and in the form that the gates want (unstructured, n:m or both), from the run's own
            calibration text. ``none``: no lean at all.
        mask: A MaskSet file instead of a method.
        graded: (BernoulliGate) Let each logit lean the farther, the surer Wanda is of its weight, whatever the
            method of the mask: by its score's distance from the cut instead of ±1
            (:mod:`leap_pl.prior.grading`). It takes another walk over the model, which is kept like the mask, and
            a larger ``strength`` of the gate.
        fisher: Let the method prune each weight tensor the more, the less the loss depends on it, this far: above 0,
            and at most 1; .5 is a good start (:mod:`leap_pl.oneshot.fisher`). It runs the whole model forward and
            backward on the run's device. Not for masks of n:m form, whose sparsity is the same everywhere.
        inner_mask: (TileGate) A MaskSet file of n:m form for the tiles that are not dense, instead of a method.
        sequences: Calibration sequences of the method.
        cache_dir: Where masks made from a method are kept for the next run on the same model and text.
    """

    method: Literal["wanda", "magnitude", "sparseswaps", "sparsegpt", "admm", "none"] = "wanda"
    mask: str | None = None
    graded: bool = False
    fisher: float | None = None
    inner_mask: str | None = None
    sequences: int = 128
    cache_dir: str = "~/.cache/leap_pl/priors"

    def __post_init__(self) -> None:
        if self.sequences < 1:
            raise UserError(f"prior.sequences is {self.sequences}; it takes at least 1 to calibrate on.")
        if self.graded and self.method == "none" and self.mask is None:
            raise UserError("prior.graded grades a mask, and prior.method is none. Leave one of them out.")
        if self.fisher is not None and not 0 < self.fisher <= 1:
            raise UserError(f"prior.fisher is {self.fisher:g}; give a number above 0 and at most 1, or leave it out.")
        check_numbers(asdict(self), "model.prior.", "prior.")
        if self.fisher is not None and (self.method == "none" or self.mask is not None):
            given = "prior.method is none" if self.mask is None else "prior.mask is given"
            raise UserError(f"prior.fisher allocates the sparsity of prior.method, and {given}. Leave one of them out.")

    def make(
        self,
        model: "PreTrainedModel",
        weights: "Mapping[str, Weight]",
        forms: "Mapping[str, Pattern]",
        calibration: "Calibration",
    ) -> dict[str, MaskSet]:
        """The prior masks of ``weights``, one for each of ``forms``; none where the method is ``none``.

        Args:
            model: The dense base model; its weights are unchanged afterwards.
            weights: The weights that will be gated.
            forms: What the gates ask for (:meth:`leap_pl.gates.Gate.prior_forms`): ``prior``, at the target
                sparsity or of the gates' own pattern, and, for some gates, ``inner``.
            calibration: On what the method computes.

        Raises:
            UserError: The mask file belongs to another model or other weights, or there is no text to
                calibrate on.
        """
        from leap_pl.masks.patterns import Unstructured
        from leap_pl.oneshot.fisher import FisherOptions
        from leap_pl.prior.cache import one_shot_prior

        allocation = None if self.fisher is None else FisherOptions(self.fisher)
        if allocation is not None and not isinstance(forms["prior"], Unstructured):
            raise UserError(f"prior.fisher: a mask of {forms['prior']} is equally sparse everywhere. Leave it out.")
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
                fisher = allocation if form == "prior" else None
                if self.method != "magnitude" or fisher is not None:
                    calibration.check(f"prior.method {self.method}" if fisher is None else "prior.fisher")
                masks[form] = one_shot_prior(
                    model, weights, self.method, pattern, fisher=fisher, **vars(calibration), **self._kept()
                )
        return masks

    def squares(
        self, model: "PreTrainedModel", weights: "Mapping[str, Weight]", calibration: "Calibration"
    ) -> dict[str, torch.Tensor] | None:
        """The mean squares of every weight's inputs that grade the prior; None where it is not graded.

        Raises:
            UserError: There is no text to calibrate on, or the model cannot be walked.
        """
        from leap_pl.prior.cache import input_squares

        if not self.graded:
            return None
        calibration.check("prior.graded")
        return input_squares(model, weights, **vars(calibration), **self._kept())

    def _kept(self) -> dict[str, Any]:
        return {"sequences": self.sequences, "cache_dir": self.cache_dir}


@dataclass(frozen=True)
class Calibration:
    """On what a prior is computed.

    Attributes:
        base_model: The model's name, for the mask's provenance.
        data: Where calibration text comes from.
        device: Where the method computes.
        progress: Show a progress bar.
    """

    base_model: str
    data: "CalibrationData | None"
    device: torch.device
    progress: bool = True

    def check(self, what: str) -> None:
        """Make sure that there is text.

        Raises:
            UserError: There is none, and ``what`` needs it.
        """
        if self.data is None:
            raise UserError(
                f"{what} needs calibration text and there is no data module. "
                "Give fit a TextDataModule, or take the prior 'magnitude' or a MaskSet file, without grades."
            )


def make_and_share(
    settings: Prior,
    model: "PreTrainedModel",
    weights: "Mapping[str, Weight]",
    gate: "Gate",
    sparsity: float,
    calibration: Calibration,
) -> "SharedPrior":
    """What ``settings`` make of ``model`` on rank zero, for every rank to take from.

    Args:
        settings: Which prior.
        model: The dense base model.
        weights: Those that will be gated.
        gate: Of one of them: its kind says in which forms it wants a prior, and takes or refuses it.
        sparsity: The target.
        calibration: On what a method computes.

    Raises:
        UserError: As :meth:`Prior.make` does; or the gate does not take what is asked for.
    """
    if settings.graded and not gate.takes_grades:
        raise UserError(f"prior.graded is for BernoulliGate, and the gate is {type(gate).__name__}. Leave it out.")

    def make() -> tuple[dict[str, MaskSet], dict[str, torch.Tensor] | None]:
        priors = settings.make(model, weights, gate.prior_forms(sparsity), calibration)
        gate.check_priors(priors)
        return priors, settings.squares(model, weights, calibration)

    rank_zero = RankZero()
    priors, squares = rank_zero.make(make) or ({}, None)
    return SharedPrior(priors, rank_zero, squares)


class SharedPrior:
    """The priors that rank zero holds, given to every rank one weight at a time, a bit an element."""

    def __init__(
        self, priors: Mapping[str, MaskSet], rank_zero: RankZero, squares: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        """Take the priors of rank zero; on the other ranks there are none.

        Args:
            priors: By their forms.
            rank_zero: Shares them.
            squares: Mean squares of each weight's inputs, where the form ``prior`` is to be graded.

        Attributes:
            digests: Of each form, which tells it from any other mask (:meth:`MaskSet.digest_of_bits`); on every rank.
        """
        self.priors, self.rank_zero, self.squares = priors, rank_zero, squares
        self.forms: list[str] = rank_zero.tell(list(priors))
        self.graded: bool = rank_zero.tell(squares is not None)
        self.digests: dict[str, str] = rank_zero.tell({form: mask.digest_of_bits() for form, mask in priors.items()})

    def of(self, name: str, weight: "Weight") -> dict[str, torch.Tensor]:
        """What the gate of ``weight`` starts from, in each form there is; every rank asks in the same order.

        Returns:
            Form → bool mask of the weight's shape, or of the form ``prior`` the float32 lean where it is graded.
        """
        shape = weight.parameter.shape
        found = {form: self._mask(self.priors.get(form), name, shape) for form in self.forms}
        if self.graded and "prior" in found:
            from leap_pl.prior.grading import graded_lean

            squares = self._squares(name, torch.Size([*shape[:-2], shape[weight.input_dim]]))
            mask_OI, weight_OI = (x.movedim(weight.input_dim, -1).cpu() for x in (found["prior"], weight.parameter))
            found["prior"] = graded_lean(mask_OI, weight_OI, squares).movedim(-1, weight.input_dim)
        return found

    def _squares(self, name: str, shape: torch.Size) -> torch.Tensor:
        own = None if self.squares is None else self.squares[name]
        if self.rank_zero.alone:
            assert own is not None
            return own
        numbers = None if own is None else own.contiguous().view(torch.uint8).flatten()
        return self.rank_zero.share(numbers, shape.numel() * 4).view(torch.float32).view(shape)

    def _mask(self, prior: MaskSet | None, name: str, shape: torch.Size) -> torch.Tensor:
        if self.rank_zero.alone:
            assert prior is not None
            return prior.masks[name]
        bits = pack(prior.masks[name]) if prior is not None else None
        return unpack(self.rank_zero.share(bits, (shape.numel() + 7) // 8), list(shape))

    def close(self) -> None:
        """No more masks are asked for."""
        self.rank_zero.close()
