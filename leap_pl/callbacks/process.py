"""Settings of the whole process that make learning faster."""

import lightning as L
import torch

from leap_pl.callbacks.allocator import keep_freed_memory, release_freed_memory
from leap_pl.callbacks.denormals import flush_denormals, flushes_denormals


class ProcessSettings(L.Callback):
    """Callback that keeps freed memory for the next step, and flushes denormal numbers to zero during learning.

    The command line adds it to every run. The library does not change the process by itself; a program that needs the
    same speed adds the callback to its trainer: ``Trainer(callbacks=[ProcessSettings()])``.
    """

    _flushed: bool | None = None  # whether denormal numbers were flushed before; None: not changed yet

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Keep freed memory from now on, before the model is loaded."""
        keep_freed_memory()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Return to the system what loading and the prior have freed, and flush denormal numbers.

        Nearly closed gates give denormal numbers, which are slow on some processors.
        """
        release_freed_memory()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # of the prior's blocks
            if hasattr(torch.accelerator, "empty_host_cache"):  # locked memory, of what went from block to block
                torch.accelerator.empty_host_cache()
        self._flushed = flushes_denormals()
        flush_denormals()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Restore denormal numbers; Lightning calls no teardown after an exception."""
        self._restore()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Restore denormal numbers."""
        if stage == "fit":
            self._restore()

    def _restore(self) -> None:
        if self._flushed is False:
            flush_denormals(False)
        self._flushed = None
