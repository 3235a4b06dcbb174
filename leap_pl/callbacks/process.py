"""Settings of the whole process that make learning faster."""

import lightning as L

from leap_pl.callbacks.allocator import keep_freed_memory
from leap_pl.callbacks.denormals import flush_denormals


class ProcessSettings(L.Callback):
    """Keep freed memory, and take denormal numbers for 0 while a mask is learned.

    The command line adds it to every run. A library leaves the process alone, so that a program which wants the same
    speed adds it to its own trainer: ``Trainer(callbacks=[ProcessSettings()])``.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Keep what is freed from here on: the model is not loaded yet."""
        keep_freed_memory()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Flush denormal numbers, which nearly shut gates make, and which make some processors slow."""
        flush_denormals()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave denormal numbers as they were; Lightning tears nothing down after an exception."""
        flush_denormals(False)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave denormal numbers as they were."""
        if stage == "fit":
            flush_denormals(False)
