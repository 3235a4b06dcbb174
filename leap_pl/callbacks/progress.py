"""Progress of a run in optimizer steps: a bar in a terminal, a line every so often in a file."""

import sys
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

from leap_pl.escape import say
from leap_pl.gates import FixedGate
from leap_pl.inputs.ranges import check_numbers
from leap_pl.losses.objective import TOTAL
from leap_pl.training.module import LeapModule

SECONDS_A_LINE = 30.0  # least time between two lines in a file
LINES = 100  # most lines in a file, without those after validations, and those that end a silence
SILENCE = 600.0  # seconds after which there is a line in any case: a long run must not look as if it hung


class StepProgress(ProgressBar):
    """Progress in one line: step, time left, LM loss of the last micro-batch, soft density, perplexities.

    The perplexities are those of the last validation: of the hard mask and, in brackets, of the dense model and of the
    prior. The time left leaves out the first step of the process, which compiles the kernels. In a terminal the line is
    a bar; elsewhere a line is printed after each validation, and every half minute to ten minutes.
    """

    def __init__(self, refresh_seconds: float = 1.0) -> None:
        """Set the refresh interval.

        Args:
            refresh_seconds: Minimum seconds between redraws of the bar.
        """
        super().__init__()
        check_numbers({"refresh_seconds": refresh_seconds}, "progress.")
        self.refresh_seconds = refresh_seconds
        self.bar: tqdm | None = None
        self.enabled = True
        self._shown = (0, 0.0)  # step and time of the last line
        self._step = 0  # the last that was seen to end
        self._measured: tuple[int, float] | None = None  # step and time from which the speed is measured

    def disable(self) -> None:
        """Disable the display; Lightning calls this on all ranks but the first."""
        self.enabled = False

    def enable(self) -> None:
        """Enable the display."""
        self.enabled = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Announce the first step, starting at the current one in a resumed run."""
        self._measured, self._shown = None, (trainer.global_step, time.monotonic())
        self._step = trainer.global_step
        if self.enabled and sys.stderr.isatty():
            self._draw(trainer, "first step")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advance after an optimizer step."""
        step = trainer.global_step
        if not self.enabled or step == self._step:
            return
        self._step = step
        assert isinstance(pl_module, LeapModule)
        if self._measured is None:
            self._measured = (step, time.monotonic())
            if self.bar is not None:
                self.bar.leave = False
                self.bar.close()
                self._draw(trainer, _doing(pl_module))
        if self.bar is None:
            self._print_if_due(trainer, pl_module)
            return
        self.bar.update(step - self.bar.n)
        # The values are on the device: reading them only when the line is redrawn saves host syncs.
        if self.bar.last_print_n == self.bar.n or self.bar.n == self.bar.total:
            self.bar.set_postfix_str(_values(pl_module), refresh=False)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show that validation is running."""
        if self.bar is not None:
            self.bar.set_description("validating")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the perplexities, and that learning continues."""
        assert isinstance(pl_module, LeapModule)
        if self.bar is not None:
            self.bar.set_postfix_str(_values(pl_module), refresh=False)
            self.bar.set_description(_doing(pl_module))
        elif self.enabled and self._measured is not None:
            self._print(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Close the bar, leaving its last line."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Close the bar, so that it does not overwrite the error message."""
        self.on_train_end(trainer, pl_module)

    def _draw(self, trainer: L.Trainer, words: str) -> None:
        self.bar = tqdm(
            total=trainer.max_steps,
            initial=trainer.global_step,
            desc=words,
            unit="step",
            mininterval=self.refresh_seconds,
            smoothing=0,  # the mean speed, validations included
            dynamic_ncols=True,
        )

    def _print_if_due(self, trainer: L.Trainer, module: LeapModule) -> None:
        """Print a line if the last one is long ago."""
        step, at = self._shown
        seconds, share = time.monotonic() - at, LINES * (trainer.global_step - step)
        if seconds >= SILENCE or (seconds >= SECONDS_A_LINE and share >= trainer.max_steps):
            self._print(trainer, module)

    def _print(self, trainer: L.Trainer, module: LeapModule) -> None:
        assert self._measured is not None
        step, now = trainer.global_step, time.monotonic()
        from_step, start = self._measured
        left = ""
        if from_step < step < trainer.max_steps:
            seconds = (now - start) / (step - from_step) * (trainer.max_steps - step)
            left = f", {tqdm.format_interval(seconds)} left"
        self._shown = (step, now)
        say(f"step {step:,} of {trainer.max_steps:,}{left}: {_values(module)}", sys.stderr)


def _doing(module: L.LightningModule) -> str:
    """Return what learns, for the bar."""
    assert isinstance(module, LeapModule)
    if isinstance(module.gates.first, FixedGate):
        return "training the weights"
    return "learning mask and weights" if module.trained else "learning the mask"


def _values(module: LeapModule) -> str:
    """Return the LM loss (the total without one), the soft density and the perplexities of the last validation.

    The total would mislead: it rises over a good run, in which the term that rewards kept weights fades.
    """
    words = []
    name = "lm" if "lm" in module.terms else TOTAL
    if module.terms:
        words.append(f"{'loss/lm' if name == 'lm' else 'loss'} {float(module.terms[name]):.3f}")
    kept = module.gates.kept.values()
    if kept:
        words.append(f"density {float(sum(k.detach() for k in kept)) / sum(module.sizes.values()):.3f}")
    perplexities = module.validation.summary(module.global_step)
    return ", ".join([*words, *([perplexities] if perplexities else [])])
