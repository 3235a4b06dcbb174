"""RunPrior: the mask that a run starts from, made for a new run and found again for a resumed one."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leap_pl.base_model.weights import Weight
from leap_pl.checkpoints.identity import Identity, read_identity
from leap_pl.checkpoints.layout import load_checkpoint
from leap_pl.distributed.strategy import RankZero
from leap_pl.errors import UserError
from leap_pl.gates import FixedGate, Gates
from leap_pl.inputs.plain_values import check_depth
from leap_pl.masks.mask_set import STAYED, MaskSet
from leap_pl.masks.patterns import NM, Unstructured, read_form
from leap_pl.prior.settings import Calibration, Prior, SharedPrior
from leap_pl.prior.started_prior import DIGESTS, started_prior

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from leap_pl.masks import MaskSet


class RunPrior:
    """Prior of a run, in each form that its gates start from.

    Attributes:
        settings: Settings that it is made with.
        masks: Form → mask, on rank zero once the model is loaded for a fit; for a resumed run, those that it started
            from, without any that are unavailable.
        digests: Form → digest of its mask, on every rank.
        folders: Folders to look for a resumed run's prior in, after its checkpoint's folder.
        resumed: Identity in the checkpoint that the run resumes from; None for a new run.
        fixed: Provenance of the mask, if it is not learned.
    """

    def __init__(self, settings: Prior) -> None:
        """Store the settings; :meth:`make` or :meth:`find` does the rest."""
        self.settings = settings
        self.masks: dict[str, MaskSet] = {}
        self.digests: dict[str, str] = {}
        self.folders: list[Path] = []
        self.resumed: Identity | None = None
        self.fixed: dict[str, Any] | None = None

    def make(
        self,
        model: "PreTrainedModel",
        weights: Mapping[str, Weight],
        gates: Gates[Any],
        sparsity: float,
        calibration: Calibration,
    ) -> SharedPrior:
        """Make the prior of a new run on rank zero, and return it for all ranks.

        Args:
            model: Dense base model.
            weights: Weights that will be gated.
            gates: Gates of some of them, which answer for their kind.
            sparsity: Target sparsity.
            calibration: Text and device for a method.

        Raises:
            UserError: The prior cannot be made, or the gates cannot start from it.
        """
        if self.settings.graded and not gates.first.takes_grades:
            kind = gates.describe()["class_path"]
            raise UserError(
                f"prior.graded is for BernoulliGate, and the gate is {kind}. Add --model.prior.graded false."
            )

        by_method = isinstance(gates.first, FixedGate) and self.settings.mask is None
        form = read_form(gates.form) if by_method else None
        if by_method and not isinstance(form, NM | Unstructured):
            raise UserError(
                f"model.gate.pattern is {gates.form}, and prior.method makes masks that are unstructured or n:m. Give "
                "one such as 2:4, or name a mask with --model.mask."
            )
        if isinstance(form, NM) and abs(sparsity - form.sparsity) > 1e-3:
            raise UserError(
                f"model.sparsity is {sparsity:g}, and a mask of {form} removes {form.sparsity:g}. Set "
                f"--model.sparsity {form.sparsity:g}, or name a mask with --model.mask."
            )

        def masks_and_squares() -> "tuple[dict[str, MaskSet], dict[str, Tensor] | None]":
            forms = gates.prior_forms(sparsity)
            priors = self.settings.make(model, weights, forms, calibration)
            gates.check_priors(priors)
            if isinstance(gates.first, FixedGate):  # whose mask stays what it is
                _check_fixed(priors["prior"], weights, gates.form, sparsity)
            else:
                self.settings.warn_of_others(priors, forms)
            packed = {form: mask.packed() for form, mask in priors.items()}  # the run holds them to its end
            return packed, self.settings.squares(model, weights, calibration)

        rank_zero = RankZero()
        priors, squares = rank_zero.make(masks_and_squares) or ({}, None)
        shared = SharedPrior(priors, rank_zero, squares)
        self.masks, self.digests = dict(shared.priors), shared.digests
        if isinstance(gates.first, FixedGate):
            made = shared.priors["prior"].provenance if shared.rank_zero.here else None
            fixed = None if made is None else {key: getattr(made, key) for key in ("method", "sparsity", "config")}
            self.fixed = shared.rank_zero.broadcast(fixed)
        return shared

    def find(
        self,
        path: Path,
        model: "PreTrainedModel",
        weights: Mapping[str, Weight],
        gates: Gates[Any],
        fingerprint: str,
        calibration: Calibration,
    ) -> SharedPrior:
        """Find the prior of the run that the checkpoint ``path`` is of; return an empty one, since that has the logits.

        Args:
            path: Checkpoint that the run resumes from.
            model: Dense base model.
            weights: Weights that will be gated.
            gates: Gates of some of them.
            fingerprint: Fingerprint of ``model``: of another one's checkpoint nothing is looked for.
            calibration: Text and device, should the prior have to be made again.
        """
        found = read_identity(load_checkpoint(path, check_tensors=False), path)
        rank_zero = RankZero()
        shared = SharedPrior({}, rank_zero)
        if (found.fingerprint, found.gate["class_path"]) == (fingerprint, gates.describe()["class_path"]):
            forms = gates.prior_forms(found.sparsity)
            make = partial(Prior.make, model=model, weights=weights, forms=forms, calibration=calibration)
            rank_zero.make(lambda: self.resume(found, path, gates, make))
            if not rank_zero.here:
                self.resume(found, path, gates, None)
        return shared

    def resume(
        self,
        found: Identity,
        path: Path,
        gates: Gates[Any],
        make: "Callable[[Prior], Mapping[str, MaskSet]] | None",
    ) -> None:
        """Take identity and digests of the resumed run; with ``make``, which is of rank zero, find its masks too."""
        digests = found.settings.get(DIGESTS)
        self.resumed, self.digests = found, dict(digests) if isinstance(digests, dict) else {}
        if make is not None:
            folders = [*dict.fromkeys([path.resolve().parent, path.parent, *self.folders])]
            forms = gates.prior_forms(found.sparsity)
            self.masks = started_prior(found.settings, forms, folders, self.settings.cache_dir, make)

    def record(self) -> dict[str, Any]:
        """Return what the provenance of the run's mask says of it: settings as they were in effect, and digests."""
        stored = None if self.resumed is None else self.resumed.settings.get("prior")
        recorded: dict[str, Any] = {"prior": stored or asdict(self.settings)}
        recorded |= {DIGESTS: self.digests} if self.digests else {}
        return recorded | ({} if self.fixed is None else {STAYED: self.fixed})


def _check_fixed(masks: MaskSet, weights: Mapping[str, Weight], form: str, sparsity: float) -> None:
    """Check that ``masks``, which stay, are of the run's ``form`` and ``sparsity``, and can be recorded.

    Raises:
        UserError: They are not.
    """
    masks.check_form({name: weight for name, weight in weights.items() if name in masks.masks})
    asked = masks.provenance.sparsity  # which rows may not divide into
    rounding = 1e-3 if asked is None else max(1e-3, abs(masks.sparsity - asked))
    if masks.form() != (read_form(form) or Unstructured(0.0)) or abs(masks.sparsity - sparsity) > rounding:
        raise UserError(
            f"the mask that stays is {masks.form()} with sparsity {masks.sparsity:g}, and the run's {form} with "
            f"{sparsity:g}. Give it as mask=FILE (--model.mask), from which both follow, and not as that of a prior."
        )
    try:
        check_depth({"provenance": {"config": {STAYED: {"config": masks.provenance.config}}}})
    except ValueError as error:
        raise UserError(
            f"the record of the mask that stays has all masks and weights before it, and {error}. Save it without: "
            "MaskSet.load(MASK), then .with_provenance(config={}).save(FILE)."
        ) from error
