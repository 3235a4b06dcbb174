"""Callback that validates after the last step of a run, and spreads other validations evenly over it."""

import math
from typing import Any

import lightning as L

from leap_pl.callbacks.lightning_internals import ends_step, stops_at_the_end, validate_at
from leap_pl.errors import UserError

TIMES = 10


class ValidationTimes(L.Callback):
    """Callback that validates after the last step of a run and, unless the trainer says when, about ten times before.

    A short run validates less often, so that validation reads no more blocks than learning does. What is learned does
    not depend on validation.
    """

    def __init__(self, spread: bool | None = None) -> None:
        """Set whether to ``spread`` validations; else those before the last follow ``trainer.val_check_interval``.

        Args:
            spread: None spreads them if the trainer has no interval of its own.
        """
        self.spread = spread
        self._spreads = False  # in this run
        self._every: int | None = None  # epochs, as the trainer was given

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Let Lightning count the interval over epochs: its other callbacks act at validations then, too.

        Raises:
            UserError: EarlyStopping is listed before, and has decided already to act at the end of the only epoch.
        """
        if stage != "fit":
            return
        # 1.0 is Lightning's default, and 1 a micro-batch; a trainer that validates by the clock has no such attribute.
        interval = getattr(trainer, "val_check_interval", None)
        usual = isinstance(interval, float) and interval == 1.0
        self._spreads = usual if self.spread is None else self.spread
        if not self._spreads:
            return
        callbacks = list(trainer.callbacks)  # type: ignore[attr-defined]
        if any(map(stops_at_the_end, callbacks[: callbacks.index(self)])):
            raise UserError("EarlyStopping would act at the end of the run alone. List it after ValidationTimes.")
        self._every, trainer.check_val_every_n_epoch = trainer.check_val_every_n_epoch, None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Set the interval, in micro-batches, at which Lightning validates."""
        if not self._spreads:
            return
        batches = sum(trainer.num_val_batches)
        if batches == 0:  # other callbacks act at the end of the epoch, where nothing is validated
            trainer.check_val_every_n_epoch = self._every
        counted = max(1, int(batches)) if math.isfinite(batches) else 1
        times = max(1, min(TIMES, trainer.max_steps * trainer.accumulate_grad_batches // counted))
        interval = -(-trainer.max_steps // times) * trainer.accumulate_grad_batches
        trainer.val_check_batch = interval

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Make the last micro-batch end an interval."""
        if trainer.global_step + 1 == trainer.max_steps and ends_step(trainer, batch_idx):
            validate_at(trainer, batch_idx + 1)
