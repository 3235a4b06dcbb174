"""Progress bar that counts optimizer steps."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

from leap_pl.inputs.ranges import check_numbers
from leap_pl.losses.objective import TOTAL
from leap_pl.training.module import LeapModule


class StepProgress(ProgressBar):
    """Progress bar in one line: step, time left, loss of the last micro-batch, soft density, hard perplexity."""

    def __init__(self, refresh_seconds: float = 1.0) -> None:
        """Set the refresh interval.

        Args:
            refresh_seconds: Minimum seconds between redraws.
        """
        super().__init__()
        check_numbers({"refresh_seconds": refresh_seconds}, "progress.")
        self.refresh_seconds = refresh_seconds
        self.bar: tqdm | None = None
        self.enabled = True

    def disable(self) -> None:
        """Disable the bar; Lightning calls this on all ranks but the first."""
        self.enabled = False

    def enable(self) -> None:
        """Enable the bar."""
        self.enabled = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the bar, starting at the current step in a resumed run."""
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
        """Advance the bar after an optimizer step."""
        if self.bar is None or trainer.global_step == self.bar.n:
            return
        assert isinstance(pl_module, LeapModule)
        self.bar.update(trainer.global_step - self.bar.n)
        # The values are on the device: reading them only when the line is redrawn saves host syncs.
        if self.bar.last_print_n == self.bar.n or self.bar.n == self.bar.total:
            kept = pl_module.gates.kept.values()
            density = float(sum(k.detach() for k in kept)) / sum(pl_module.sizes.values())
            shown = {"loss": f"{float(pl_module.terms[TOTAL]):.3f}", "density": f"{density:.3f}"}
            if "perplexity/hard" in trainer.callback_metrics:
                shown["perplexity"] = f"{float(trainer.callback_metrics['perplexity/hard']):.2f}"
            self.bar.set_postfix(shown, refresh=False)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show that validation is running."""
        if self.bar is not None:
            self.bar.set_description("validating")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show that learning continues."""
        if self.bar is not None:
            self.bar.set_description("learning the mask")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Close the bar, leaving its last line."""
        if self.bar is not None:
            self.bar.close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Close the bar, so that it does not overwrite the error message."""
        self.on_train_end(trainer, pl_module)
