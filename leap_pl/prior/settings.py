"""Prior: settings of the mask that learning starts from, its computation, and sharing it over ranks."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import InitVar, asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_warn

from leap_pl.distributed.strategy import RankZero
from leap_pl.errors import UserError, listing
from leap_pl.inputs.plain_values import plain_paths
from leap_pl.inputs.ranges import check_numbers
from leap_pl.masks import MaskSet
from leap_pl.masks.bits import pack, unpack
from leap_pl.masks.exported import exported_record
from leap_pl.oneshot.methods import DEFAULT, FALLBACK, INSTEAD, METHODS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from leap_pl.base_model.weights import Weight
    from leap_pl.masks.patterns import Pattern
    from leap_pl.prior.cache import CalibrationData


NO_METHOD = "none"  # no prior: logits without a lean
# Options of prune that its messages name → those of fit.
OF_PRUNE = {
    "dtype": "model.dtype",
    "fisher": "model.prior.fisher",
    "ignore": "model.ignore",
    "method": "model.prior.method",
    "targets": "model.targets",
    "text": "data.text",
}
CLOSE = 0.005  # difference of sparsities that rows which it does not divide may cause


@dataclass(frozen=True)
class Prior:
    """Settings of the mask towards which the initial logits lean.

    Attributes:
        method: Name of a one-shot method, as listed by ``leap_pl prune --help``; ``wanda`` is the paper's. The mask is
            computed at the target sparsity, in the form that the gates need (unstructured, n:m or both), from the run's
            calibration text. ``none``: no lean at all.
        mask: MaskSet file, folder that has one, or hub id of one, to use instead of a method.
        graded: Scale each logit's lean by Wanda's confidence in its weight, the distance of its score from the
            threshold, instead of ±1 (:mod:`leap_pl.prior.grading`); the mask may be of any method. It takes another
            walk over the model, whose result is cached like the mask, and a larger ``strength`` of the gate, which is
            a BernoulliGate.
        fisher: Strength of Fisher allocation in (0, 1]: weight tensors that matter less to the loss are pruned more; .5
            is a good start (:mod:`leap_pl.oneshot.fisher`). It runs the whole model forward and backward on the run's
            device. Not for masks of n:m form, whose sparsity is the same everywhere.
        masks: MaskSet files for the masks in addition to ``mask`` from which a kind of gate starts, instead of a
            method: form → file. TileGate's ``inner``, of n:m form, is for the tiles that are not dense.
        inner_mask: Former name of ``masks.inner``.
        sequences: Number of calibration sequences for the method.
        cache_dir: Folder of the cache of masks that methods computed, for later runs on the same model and text; None:
            nothing is cached.
    """

    method: str = DEFAULT
    mask: str | None = None
    graded: bool = False
    fisher: float | None = None
    masks: dict[str, str] | None = None
    inner_mask: InitVar[str | None] = None
    sequences: int = 128
    cache_dir: str | None = "~/.cache/leap_pl/priors"

    def __post_init__(self, inner_mask: str | None) -> None:
        for name in ("mask", "masks", "cache_dir"):
            object.__setattr__(self, name, plain_paths(getattr(self, name)))
        inner_mask = plain_paths(inner_mask)
        if inner_mask is not None:
            masks = {"inner": inner_mask} | (self.masks or {})
            if masks["inner"] != inner_mask:
                raise UserError(
                    f"prior.inner_mask is {inner_mask} and prior.masks.inner {masks['inner']}, and both are one "
                    "setting. Leave prior.inner_mask out."
                )
            object.__setattr__(self, "masks", masks)
        if "prior" in (self.masks or {}):
            raise UserError("prior.masks is for masks in addition to prior.mask. Give the prior itself as prior.mask.")
        if self.method not in (*METHODS, NO_METHOD):
            raise UserError(f"prior.method is {self.method!r}; give one of {', '.join((*METHODS, NO_METHOD))}.")
        if self.graded and self.method == NO_METHOD and self.mask is None:
            raise UserError(
                "prior.graded grades a mask, and prior.method is none. Leave one of them out, that of a config by "
                "--model.prior.graded false."
            )
        if self.fisher is not None and not 0 < self.fisher <= 1:
            raise UserError(f"prior.fisher is {self.fisher:g}; give a number above 0 and at most 1, or leave it out.")
        check_numbers(asdict(self), "model.prior.", "prior.")
        if self.fisher is not None and (self.method == NO_METHOD or self.mask is not None):
            given = "prior.method is none" if self.mask is None else "prior.mask is given"
            raise UserError(
                f"prior.fisher allocates the sparsity of prior.method, and {given}. Leave one of them out, that of a "
                "config by --model.prior.fisher null."
            )

    def make(
        self,
        model: "PreTrainedModel",
        weights: "Mapping[str, Weight]",
        forms: "Mapping[str, Pattern]",
        calibration: "Calibration",
    ) -> dict[str, MaskSet]:
        """Return the prior masks of ``weights``, one for each of ``forms``; none if the method is ``none``.

        Args:
            model: Dense base model; it is not changed.
            weights: Weights that will be gated.
            forms: Forms that the gates need (:meth:`leap_pl.gates.Gates.prior_forms`): ``prior``, at the target
                sparsity or of the gates' own pattern, and, for some gates, further ones.
            calibration: Text and device for the method.

        Raises:
            UserError: The mask file belongs to another model or other weights, or is not the recorded mask of a sparse
                base model; or there is no calibration text.
        """
        from leap_pl.masks.patterns import Unstructured
        from leap_pl.oneshot.fisher import FisherOptions
        from leap_pl.prior.cache import one_shot_prior

        allocation = None if self.fisher is None else FisherOptions(self.fisher)
        if allocation is not None and not isinstance(forms["prior"], Unstructured):
            raise UserError(
                f"prior.fisher: a mask of {forms['prior']} is equally sparse everywhere. Add --model.prior.fisher null."
            )
        files = {"prior": self.mask} | (self.masks or {})
        strange = [form for form in files if form not in forms]
        if strange:
            raise UserError(
                f"prior.masks.{strange[0]}: these gates start from {listing([*forms])} alone. Leave it out."
            )
        masks: dict[str, MaskSet] = {}
        for form, pattern in forms.items():
            file = files.get(form)
            if file is not None:
                masks[form] = MaskSet.load(file)
                # A sparse model's own mask is a start, too.
                if not masks[form].check(model, weights, or_applied=True):
                    _check_own(masks[form], file, calibration)
            elif self.method != NO_METHOD:
                fisher = allocation if form == "prior" else None
                reads = METHODS[self.method].needs is not None or fisher is not None
                if reads:
                    calibration.check(f"prior.method {self.method}" if fisher is None else "prior.fisher")
                with _options_of_fit(graded=self.graded):
                    given: dict[str, Any] = {**calibration.arguments(), "revision": calibration.revision}
                    made = one_shot_prior(model, weights, self.method, pattern, fisher=fisher, **given, **self._kept())
                masks[form] = calibration.recorded(made) if reads else made
        return masks

    def warn_of_others(self, masks: Mapping[str, MaskSet], forms: "Mapping[str, Pattern]") -> None:
        """Warn of ``masks`` that were given as files, and have another form or sparsity than ``forms``."""
        for form, file in ({"prior": self.mask} | (self.masks or {})).items():
            if file is not None and form in masks:
                _warn_of_other(masks[form], file, forms[form])

    def squares(
        self, model: "PreTrainedModel", weights: "Mapping[str, Weight]", calibration: "Calibration"
    ) -> dict[str, torch.Tensor] | None:
        """Return the mean squares of every weight's inputs, to grade the prior; None if it is not graded.

        Raises:
            UserError: There is no calibration text, or the model cannot be walked.
        """
        from leap_pl.prior.cache import input_squares

        if not self.graded:
            return None
        calibration.check("prior.graded")
        with _options_of_fit():
            return input_squares(model, weights, **calibration.arguments(), **self._kept())

    def _kept(self) -> dict[str, Any]:
        return {"sequences": self.sequences, "cache_dir": self.cache_dir}


@contextmanager
def _options_of_fit(*, graded: bool = False) -> Iterator[None]:
    """Name the options of ``fit`` in the messages of one-shot pruning, which name those of ``prune``.

    The method that needs no walk is the remedy for a model that cannot be walked, which grading would walk next.
    """
    try:
        yield
    except UserError as error:
        pattern = re.compile(rf"(?<![\w-])--({'|'.join(OF_PRUNE)})\b")
        whole = f"{INSTEAD} --model.prior.graded false" if graded else INSTEAD
        message = pattern.sub(lambda found: f"--{OF_PRUNE[found[1]]}", str(error).replace(INSTEAD, whole))
        raise UserError(message) from error


def _check_own(mask: MaskSet, file: str, calibration: "Calibration") -> None:
    """Check that ``mask`` is the one that a sparse base model is recorded to have.

    A mask that keeps a little more would fill some of its zeros.

    Raises:
        UserError: It is not.
    """
    base_model = calibration.base_model
    recorded = exported_record(base_model, revision=calibration.revision).get("mask_digest")
    if recorded is not None and recorded != mask.digest_of_bits():
        raise UserError(
            f"mask {file} is not the mask of base model {base_model}, whose zeros it would fill. Give the mask in that "
            "folder, or name the dense model with --model.base_model."
        )


def _warn_of_other(mask: MaskSet, file: str, pattern: "Pattern") -> None:
    """Warn if a ``mask`` that is given as the prior has another form or sparsity than the run's."""
    from leap_pl.masks.patterns import NM, Unstructured

    form = mask.provenance.config.get("pattern", "unstructured")
    if isinstance(pattern, NM) and form != str(pattern):
        rank_zero_warn(
            f"the prior {file} is {form}, and the run learns a mask of {pattern}: its logits start from that."
        )
    elif isinstance(pattern, Unstructured) and abs(mask.sparsity - pattern.sparsity) > CLOSE:
        rank_zero_warn(
            f"the prior {file} removes {mask.sparsity:.1%} of the weights, and the run is to remove "
            f"{pattern.sparsity:.1%}: learning starts from another sparsity. To start from this, make the prior with "
            f"--sparsity {pattern.sparsity:g}."
        )


@dataclass(frozen=True)
class Calibration:
    """Model name, text and device for the computation of a prior.

    Attributes:
        base_model: Name of the model, for the mask's provenance.
        data: Source of the calibration text; None without a data module.
        device: Device on which the method computes.
        progress: Show a progress bar.
        revision: Revision of the model on the hub, for the mask's provenance.
        record: What the mask's provenance says of the text of ``data``, on which it was calibrated.
    """

    base_model: str
    data: "CalibrationData | None"
    device: torch.device
    progress: bool = True
    revision: str | None = None
    record: Mapping[str, Any] | None = None

    def arguments(self) -> dict[str, Any]:
        """Return what the functions of :mod:`leap_pl.prior.cache` take of this."""
        return {name: getattr(self, name) for name in ("base_model", "data", "device", "progress")}

    def recorded(self, mask: MaskSet) -> MaskSet:
        """Return ``mask``, which was calibrated on the text, with that in its provenance, as ``prune`` has it there."""
        return mask.with_provenance(config={**(self.record or {}), **mask.provenance.config})

    def check(self, what: str) -> None:
        """Check that there is calibration text, which ``what`` needs.

        Raises:
            UserError: There is no text.
        """
        if self.data is None or not hasattr(self.data, "stream"):
            found = (
                "there is no data module" if self.data is None else f"{type(self.data).__name__} has no stream of it"
            )
            raise UserError(
                f"{what} needs calibration text, and {found}. Give fit a TextDataModule, or set "
                f"prior.method to {FALLBACK!r} or prior.mask to a MaskSet file, without prior.graded and prior.fisher."
            )


class SharedPrior:
    """Priors that rank zero holds and shares with every rank, one weight at a time, with one bit an element.

    Attributes:
        digests: Form → digest of its mask (:meth:`MaskSet.digest_of_bits`), on every rank.
    """

    def __init__(
        self, priors: Mapping[str, MaskSet], rank_zero: RankZero, squares: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        """Hold the priors on rank zero; the other ranks hold none.

        Args:
            priors: Form → prior, empty on the other ranks.
            rank_zero: Object that shares values of rank zero with the other ranks.
            squares: Mean squares of each weight's inputs, if the form ``prior`` is graded.
        """
        self.priors, self.rank_zero, self.squares = priors, rank_zero, squares
        self.forms: list[str] = rank_zero.broadcast(list(priors))
        self.graded: bool = rank_zero.broadcast(squares is not None)
        self.digests: dict[str, str] = rank_zero.broadcast(
            {form: mask.digest_of_bits() for form, mask in priors.items()}
        )

    def of(self, name: str, weight: "Weight") -> dict[str, torch.Tensor]:
        """Return the priors of ``weight`` in each form; every rank must call this in the same order.

        Returns:
            Form → bool mask of the weight's shape; for the form ``prior``, the float32 lean if it is graded.
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
        """End the sharing, after the last call of :meth:`of`."""
        self.rank_zero.close()
