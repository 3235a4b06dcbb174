"""The learned mask leaves the run as a MaskSet, once it is learned."""

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from leap_pl.escape import terminal
from leap_pl.inputs.records import MASK
from leap_pl.prior.started_prior import prior_file
from leap_pl.training.module import LeapModule

EARLIER = "mask-earlier.safetensors"


class MaskExport(L.Callback):
    """Write the prior at the start of fit and the learned mask at its end, beside the checkpoints.

    ``prior.safetensors`` and ``mask.safetensors`` are :class:`leap_pl.masks.MaskSet` files; the second has
    exactly the target sparsity. A kind of gate that starts from more masks than one has the
    others in files of their own, as ``prior-inner.safetensors``.

    A run that ends before its last step (``trainer.max_time``, early stopping, a signal) writes no mask: its gates
    are still soft, and its checkpoint holds all there is. ``leap_pl export --ckpt_path`` makes a mask of one all the
    same, which tells its step. A ``mask.safetensors`` of an earlier run is set aside when learning begins, as
    ``mask-earlier.safetensors``; one that turns out to be the same is removed again.
    """

    def __init__(self, folder: str | None = None) -> None:
        """Take the place of the files.

        Args:
            folder: By default the folder of the checkpoints.
        """
        self.folder = folder
        self._begun = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Tell the module where its run may have left the prior, if it resumes."""
        assert isinstance(pl_module, LeapModule)
        self._begun = False
        if stage == "fit":
            pl_module.prior_folders.append(self.place(trainer))

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the prior, or the priors, if there is one. What a resumed run finds in their place stays as it is."""
        assert isinstance(pl_module, LeapModule)
        if trainer.is_global_zero:
            for form, prior in pl_module.priors.items():
                path = self.place(trainer) / prior_file(form)
                if pl_module.resumed is None or not path.exists():
                    prior.save(path)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set aside the mask of an earlier run, which nobody should take for this one's, when learning begins."""
        if self._begun:
            return
        self._begun = True
        path = self.place(trainer) / MASK
        if trainer.is_global_zero and trainer.global_step < trainer.max_steps and path.exists():
            path.replace(path.with_name(EARLIER))
            rank_zero_info(f"mask: {path} is of an earlier run, and is now called {EARLIER}.")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the learned mask, if learning is through."""
        assert isinstance(pl_module, LeapModule)
        if trainer.global_step < trainer.max_steps:
            return
        path = self.place(trainer) / MASK
        kept, total = pl_module.save_mask(path)
        earlier = path.with_name(EARLIER)
        if trainer.is_global_zero and earlier.exists() and earlier.read_bytes() == path.read_bytes():
            earlier.unlink()  # this run's own: it was stopped between its mask and its last checkpoint
        rank_zero_info(
            f"mask: {terminal(path)} (after step {trainer.global_step:,} of {trainer.max_steps:,}; sparsity "
            f"{1 - kept / total:.6f}, {total - kept:,} weights removed)"
        )

    def place(self, trainer: L.Trainer) -> Path:
        """The folder the files go to."""
        if self.folder is not None:
            return Path(self.folder)
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is not None:
                return Path(callback.dirpath)
        return Path(trainer.log_dir or trainer.default_root_dir)


def mask_place(trainer: L.Trainer) -> Path:
    """The folder that prior and mask of the run go to, also where nothing exports them."""
    exports = [callback for callback in trainer.callbacks if isinstance(callback, MaskExport)]  # type: ignore[attr-defined]
    return (exports[0] if exports else MaskExport()).place(trainer)
