"""Mask that a run leaves as it is: what a MaskSet says of gate, sparsity and targets."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from leap_pl.checkpoints.identity import Identity
from leap_pl.errors import UserError, listing
from leap_pl.gates import BernoulliGate, FixedGate
from leap_pl.inputs.paths import expanded
from leap_pl.inputs.plain_values import shown
from leap_pl.inputs.records import MASK, mask_in
from leap_pl.inputs.register import current, is_typed
from leap_pl.masks import MaskSet
from leap_pl.masks.exported import exported_record
from leap_pl.masks.mask_set import TRAINED
from leap_pl.oneshot.methods import METHODS
from leap_pl.prior import Prior
from leap_pl.prior.started_prior import DIGESTS


@dataclass(frozen=True)
class FixedMask:
    """Settings of a module whose mask is fixed.

    Attributes:
        file: MaskSet file.
        gate: Function that makes the gate of a weight, with the form that the mask has.
        sparsity: Share of the gated weights that the mask removes.
        asked: The one that it was made for, which rows may not divide into; None if it is not known.
        targets: Names of the weights that it covers.
        learned: Whether it may have been learned; else a one-shot method made it.
        trained: Whether weights that it keeps were trained.
        digest: Digest of its bits.
        base_model: Name of the base model that it was made for.
    """

    file: str
    gate: "partial[FixedGate]"
    sparsity: float
    asked: float | None
    targets: list[str]
    learned: bool
    trained: bool
    digest: str
    base_model: str

    def is_finished(self, base_model: str, weights: str | None, revision: str | None = None) -> bool:
        """Return whether training starts where the mask was learned, or weights trained, for as much as is known.

        Args:
            base_model: Name of the run's base model.
            weights: Folder of the weights that it starts from, if they are not the base model's.
            revision: Revision of the base model on the hub.

        Raises:
            UserError: The record or the mask beside those weights is damaged.
        """
        if self.learned:
            return True
        record = exported_record(weights or base_model, revision=None if weights else revision)
        if record:  # of the weights themselves, whatever the record of this mask says
            return TRAINED in (record.get("config") or {}) and record["mask_digest"] == self.digest
        if not self.trained or weights is not None:
            return self.trained
        beside = expanded(base_model) / MASK  # one exported model may be both
        return self.file == base_model or (beside.is_file() and MaskSet.load(beside).digest_of_bits() == self.digest)

    def check_settings(self, sparsity: float, targets: Sequence[str] | None, ignore: Sequence[str]) -> None:
        """Check that no setting contradicts what the mask says; those of a resumed run are the mask's.

        Raises:
            UserError: One does.
        """
        contrary = [
            *(["model.sparsity"] if self._contradicts(sparsity) else []),
            *(["model.targets"] if targets is not None and list(targets) != self.targets else []),
            *(["model.ignore"] if ignore else []),
        ]
        if contrary:
            raise UserError(
                f"model.mask sets which weights are kept, and {listing(contrary)} would not be used. Leave out what is "
                "not meant."
            )

    def check_same(self, identity: Identity) -> bool:
        """Check that the run of a checkpoint had this mask, whatever its name.

        Args:
            identity: Identity in the checkpoint.

        Returns:
            Whether it had; False if the checkpoint does not say which mask it had.

        Raises:
            UserError: It had another one.
        """
        digests, prior = identity.settings.get(DIGESTS), identity.learned_with.get("model.prior")
        was = digests.get("prior") if isinstance(digests, dict) else None
        if was is not None and was != self.digest:
            named = f", {prior['mask']}" if isinstance(prior, dict) and prior.get("mask") else ""
            raise UserError(
                f"model.mask {self.file} is another mask than that of the checkpoint{named}. Leave it out to resume; "
                "for another mask, start a new run without --ckpt_path."
            )
        return was is not None

    def warn_of_unused(self, gate: Any, prior: Prior) -> None:
        """Warn of settings of a mask to learn, if there is no command line, which tells of them itself."""
        named = [
            *(["gate"] if getattr(gate, "func", gate) not in (BernoulliGate, FixedGate) else []),
            *(["prior"] if replace(prior, mask=None, cache_dir=None) != Prior(mask=None, cache_dir=None) else []),
        ]
        if named and current() is None:
            rank_zero_warn(f"not used: {listing(named)}, since mask {self.file} stays as it is.")

    def check_names(self, model: nn.Module) -> None:
        """Check that ``model`` has the weights that the mask covers; its fingerprint is compared later.

        Raises:
            UserError: It lacks some.
        """
        existing = dict(model.named_parameters())
        missing = [repr(shown(name, 200)) for name in self.targets if name not in existing]
        if missing:
            raise UserError(
                f"model.mask {self.file} was made for {shown(self.base_model, 400)}, and the base model of this run, a "
                f"{type(model).__name__}, has no weight {listing(missing, 3)}. Set model.base_model to the one that "
                "the mask was made for, or name another mask."
            )

    def _contradicts(self, sparsity: float) -> bool:
        """Return whether ``sparsity`` is neither the mask's nor a default that nobody typed."""
        return sparsity not in (self.sparsity, self.asked) and (sparsity != 0.5 or is_typed("model.sparsity"))

    @classmethod
    def of_prior(cls, gate: Any, prior: Prior) -> "FixedMask | None":
        """Return the mask that gates without logits start from and stay at, if ``prior`` names its file."""
        return cls.read(prior.mask) if getattr(gate, "func", gate) is FixedGate and prior.mask is not None else None

    @classmethod
    def read(cls, name: str) -> "FixedMask":
        """Read the MaskSet file ``name``, that in a folder of a run, of prune or of export, or that of a hub id.

        Raises:
            UserError: There is no MaskSet, or it is damaged; or the folder is packed.
        """
        from leap_pl.sparse.folder import is_packed  # asks for pydantic, which learning does without

        path = expanded(name)
        if is_packed(path):
            raise UserError(
                f"model.mask {name} is packed. Unpack it: leap_pl export --model {name} --output_dir FOLDER"
            )
        file = str(mask_in(path)) if path.exists() else name
        if path.is_dir() and file == str(path):
            raise UserError(
                f"model.mask {name} is a folder without a {MASK}. Name a MaskSet file, or a folder that has one; a "
                f"sparse model's mask is read off by leap_pl export --model {name} --format mask --output_dir FOLDER"
            )
        masks = MaskSet.load(file)
        pattern = str(masks.provenance.config.get("pattern", "unstructured"))
        learned, trained = masks.provenance.method not in METHODS, TRAINED in masks.provenance.config
        asked = masks.provenance.sparsity
        gate, digest = partial(FixedGate, pattern=pattern), masks.digest_of_bits()
        of = masks.provenance.base_model
        return cls(file, gate, masks.sparsity, asked, list(masks.masks), learned, trained, digest, of)


def starts_finished(base_model: str, weights: str | None, revision: str | None, fixed: FixedMask | None) -> bool:
    """Return whether training starts from weights that were trained before, or under a fixed mask that was learned.

    Args:
        base_model: Name of the run's base model.
        weights: Folder of the weights that it starts from, if they are not the base model's.
        revision: Revision of the base model on the hub.
        fixed: Mask of the run, if it stays as it is.

    Raises:
        UserError: The record or the mask beside those weights is damaged.
    """
    if fixed is not None:
        return fixed.is_finished(base_model, weights, revision)
    record = exported_record(weights or base_model, revision=None if weights else revision)
    return TRAINED in (record.get("config") or {})
