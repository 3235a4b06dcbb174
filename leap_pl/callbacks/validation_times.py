"""Callback that spreads validations evenly over a run, the last after the last step."""

from typing import Any

import lightning as L

TIMES = 10


class ValidationTimes(L.Callback):
    """Callback that validates about ten times a run, and in any case after its last step.

    The command line adds it where ``trainer.val_check_interval`` is not set. A short run validates less often, so that
    validation reads no more blocks than learning does. What is learned does not depend on validation.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Set the interval, in micro-batches, at which Lightning validates."""
        batches = int(sum(trainer.num_val_batches))
        times = max(1, min(TIMES, trainer.max_steps * trainer.accumulate_grad_batches // max(1, batches)))
        trainer.val_check_batch = -(-trainer.max_steps // times) * trainer.accumulate_grad_batches

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Make the last micro-batch end an interval."""
        if batch_idx + 1 == trainer.max_steps * trainer.accumulate_grad_batches:
            trainer.val_check_batch = batch_idx + 1
