"""A progress bar that counts what a mask is learned in: optimizer steps."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

from leap_pl.inputs.ranges import check_numbers
from leap_pl.losses.objective import TOTAL
from leap_pl.training.module import LeapModule


class StepProgress(ProgressBar):
    """One line: step, time left, the last micro-batch's loss, soft density, perplexities once measured."""

    def __init__(self, refresh_seconds: float = 1.0) -> None:
        """Take the pace.

        Args:
            refresh_seconds: Between redraws.
        """
        super().__init__()
        check_numbers({"refresh_seconds": refresh_seconds}, "progress.")
        self.refresh_seconds = refresh_seconds
        self.bar: tqdm | None = None
        self.enabled = True

    def disable(self) -> None:
        """Called on all ranks but the first."""
        self.enabled = False

    def enable(self) -> None:
        """Draw again."""
        self.enabled = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the bar, at the step a resumed run begins with."""
        if not self.enabled:
            return
        self.bar = tqdm(
            total=trainer.max_steps,
            initial=trainer.global_step,
            desc="learning the mask",
            unit="step",
            mininterval=self.refresh_seconds,
            dynamic_ncols=True,
        )

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move with the optimizer step."""
        if self.bar is None or trainer.global_step == self.bar.n:
            return
        assert isinstance(pl_module, LeapModule)
        self.bar.update(trainer.global_step - self.bar.n)
        # The numbers live on the device: they are fetched only when the line is redrawn.
        if self.bar.last_print_n == self.bar.n or self.bar.n == self.bar.total:
            kept = pl_module.gates.kept.values()
            density = float(sum(k.detach() for k in kept)) / sum(pl_module.sizes.values())
            shown = {"loss": f"{float(pl_module.terms[TOTAL]):.3f}", "density": f"{density:.3f}"}
            if "perplexity/hard" in trainer.callback_metrics:
                shown["perplexity"] = f"{float(trainer.callback_metrics['perplexity/hard']):.2f}"
            self.bar.set_postfix(shown, refresh=False)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say what takes the time."""
        if self.bar is not None:
            self.bar.set_description("validating")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Back to learning."""
        if self.bar is not None:
            self.bar.set_description("learning the mask")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the last line standing."""
        if self.bar is not None:
            self.bar.close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Do not draw over the message."""
        self.on_train_end(trainer, pl_module)
