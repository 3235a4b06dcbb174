"""Callback that writes the prior and the mask of a run as MaskSets, and the weights that it has trained."""

from filecmp import cmp
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from leap_pl.callbacks.lightning_internals import SavingCheckpoint
from leap_pl.errors import UserError
from leap_pl.escape import terminal
from leap_pl.inputs.paths import expanded
from leap_pl.inputs.records import EARLIER, MASK, WEIGHTS
from leap_pl.masks.kept_weights import without_weights
from leap_pl.prior.started_prior import prior_file
from leap_pl.training.module import LeapModule


class MaskExport(L.Callback):
    """Callback that writes the prior at the start of fit and the learned mask at its end.

    ``prior.safetensors`` and ``mask.safetensors`` are :class:`leap_pl.masks.MaskSet` files; the second has
    exactly the target sparsity. Further masks that a kind of gate starts from have files such as
    ``prior-inner.safetensors``. Trained weights are in ``weights.safetensors`` (:mod:`leap_pl.masks.kept_weights`).

    A run that ends before its last step (``trainer.max_time``, early stopping, a signal) writes no mask: its gates
    are still soft, and its checkpoint has the complete state. ``leap_pl export --ckpt_path`` can export a mask from
    such a checkpoint, with the step in its provenance. A ``mask.safetensors`` of an earlier run is renamed to
    ``mask-earlier.safetensors`` when learning begins, and removed at the end if it equals the new one; a
    ``weights.safetensors`` is renamed likewise.

    Attributes:
        folder: Folder of the files; None is that of the checkpoints.
        written: Path and sparsity of the mask, once it is written.
    """

    def __init__(self, folder: str | None = None) -> None:
        """Set the folder of the files.

        Args:
            folder: Folder of the files; by default that of the checkpoints.
        """
        self.folder = folder
        self.written: tuple[Path, float] | None = None
        self._begun = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give the module the folder in which a resumed run looks for its prior.

        Raises:
            UserError: A trial of a few steps would replace the mask of a run.
        """
        assert isinstance(pl_module, LeapModule)
        if stage == "fit":
            if trainer.fast_dev_run:  # type: ignore[attr-defined]
                raise UserError(
                    "trainer.fast_dev_run would write the mask of its few steps in place of that of the run. Leave "
                    "MaskExport out of the trial."
                )
            self._begun, self.written = False, None
            pl_module.run_prior.folders.append(self.place(trainer))

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Write the priors when learning begins, and rename the mask of an earlier run, which is then not this run's.

        Not before: until then the run can be refused, and must leave another run's files as they are.
        """
        assert isinstance(pl_module, LeapModule)
        if self._begun:
            return
        self._begun, place = True, self.place(trainer)  # which all ranks find together
        if trainer.is_global_zero:
            self._write_priors(place, pl_module)
            self._set_aside(place)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the learned mask, if the run is finished."""
        assert isinstance(pl_module, LeapModule)
        if trainer.global_step >= trainer.max_steps:
            self._write_mask(trainer, pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the mask of a finished run that has lost it: Lightning trains no step, and calls no other hook."""
        assert isinstance(pl_module, LeapModule)
        if trainer.global_step >= trainer.max_steps and self.written is None:
            place = self.place(trainer)
            if trainer.is_global_zero:
                self._set_aside(place)
            self._write_mask(trainer, pl_module)

    def _write_priors(self, place: Path, module: LeapModule) -> None:
        """Write the priors, if there are any; a resumed run leaves existing files as they are."""
        for form, prior in module.run_prior.masks.items():
            path = place / prior_file(form)
            if module.run_prior.resumed is None or not path.exists():
                without_weights(prior).save(path)  # those trained under it before are not this run's, beside it

    def _set_aside(self, place: Path) -> None:
        for name, earlier in EARLIER.items():
            path = place / name
            if path.exists():
                path.replace(path.with_name(earlier))
                rank_zero_info(f"mask: {path} is from an earlier run, and was renamed to {earlier}.")

    def _write_mask(self, trainer: L.Trainer, pl_module: LeapModule) -> None:
        path = self.place(trainer) / MASK
        kept, total = pl_module.save_mask(path)
        self.written = (path, 1 - kept / total)
        if pl_module.trained:
            pl_module.save_weights(path.with_name(WEIGHTS), path)
        for file, earlier in ((path.with_name(name), path.with_name(then)) for name, then in EARLIER.items()):
            if trainer.is_global_zero and earlier.exists() and file.exists() and cmp(earlier, file, shallow=False):
                earlier.unlink()  # from this run, which was stopped between writing its mask and its last checkpoint
        rank_zero_info(
            f"mask: {terminal(path)} (after step {trainer.global_step:,} of {trainer.max_steps:,}; sparsity "
            f"{1 - kept / total:.6f}, {total - kept:,} weights removed)"
        )

    def place(self, trainer: L.Trainer) -> Path:
        """Return the folder of the files."""
        if self.folder is not None:
            return expanded(self.folder)
        # Those of the run first: another ModelCheckpoint may keep the best of a metric elsewhere.
        for callback in sorted(trainer.checkpoint_callbacks, key=lambda one: not isinstance(one, SavingCheckpoint)):
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is not None:
                return Path(callback.dirpath)
        return expanded(trainer.log_dir or trainer.default_root_dir)


def mask_place(trainer: L.Trainer) -> Path:
    """Return the folder of the run's prior and mask, with or without a MaskExport."""
    exports = [callback for callback in trainer.callbacks if isinstance(callback, MaskExport)]  # type: ignore[attr-defined]
    return (exports[0] if exports else MaskExport()).place(trainer)
