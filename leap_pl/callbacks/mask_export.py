"""The learned mask leaves the run as a MaskSet."""

from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from leap_pl.training.module import LeapModule


class MaskExport(L.Callback):
    """Write the prior at the start of fit and the learned mask at its end, beside the checkpoints.

    ``prior.safetensors`` and ``mask.safetensors`` are :class:`leap_pl.masks.MaskSet` files; the second has
    exactly the target sparsity. Gates of tiles have a second prior, ``prior-inner.safetensors``.
    """

    def __init__(self, folder: str | None = None) -> None:
        """Take the place of the files.

        Args:
            folder: By default the folder of the checkpoints.
        """
        self.folder = folder

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the prior, or the priors, if there is one."""
        assert isinstance(pl_module, LeapModule)
        if trainer.is_global_zero:
            for form, prior in pl_module.priors.items():
                prior.save(
                    self.place(trainer) / ("prior.safetensors" if form == "prior" else f"prior-{form}.safetensors")
                )

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the learned mask."""
        assert isinstance(pl_module, LeapModule)
        path = self.place(trainer) / "mask.safetensors"
        kept, total = pl_module.save_mask(path)
        rank_zero_info(f"mask: {path} (sparsity {1 - kept / total:.6f}, {total - kept:,} weights removed)")

    def place(self, trainer: L.Trainer) -> Path:
        """The folder the files go to."""
        if self.folder is not None:
            return Path(self.folder)
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is not None:
                return Path(callback.dirpath)
        return Path(trainer.log_dir or trainer.default_root_dir)
