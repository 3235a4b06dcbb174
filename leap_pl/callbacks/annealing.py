"""Annealing: the relaxed mask hardens as the run goes on."""

from dataclasses import asdict
from typing import Any

import lightning as L

from leap_pl.errors import UserError
from leap_pl.training.module import LeapModule
from leap_pl.training.schedules import Schedule


class Annealing(L.Callback):
    """Set the logit scale α and the temperature τ of the gates from the optimizer step.

    Both are pure functions of ``trainer.global_step / trainer.max_steps``, so a resumed run goes on where it
    was; the number of steps is kept in the checkpoint, and another one is refused.

    .. code-block:: yaml

        annealing:
          alpha: {start: 25, end: 350, curve: linear}
          tau: {start: 4, end: 0.05, curve: linear}

    The defaults are LEAP's. MaskLLM's α goes from 100 to 500, and so does PATCH's in tile mode; in its joint mode
    the tiles have LEAP's and the patterns, whose scale is apart, MaskLLM's.
    """

    def __init__(
        self,
        alpha: Schedule = Schedule(25.0, 350.0),  # noqa: B008  (frozen)
        tau: Schedule = Schedule(4.0, 0.05),  # noqa: B008  (frozen)
        pattern_alpha: Schedule = Schedule(100.0, 500.0),  # noqa: B008  (frozen)
    ) -> None:
        """Take the two schedules.

        Args:
            alpha: Of the logit scale; the paper's by default.
            tau: Of the temperature; the paper's by default.
            pattern_alpha: (TileGate in joint mode) Of the logit scale of the patterns; PATCH's by default.
        """
        if min(tau.start, tau.end) <= 0:
            raise UserError(f"annealing.tau goes from {tau.start} to {tau.end}; a temperature is above 0.")
        self.alpha, self.tau, self.pattern_alpha = alpha, tau, pattern_alpha

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Tell the schedules to the mask's provenance."""
        assert isinstance(pl_module, LeapModule)
        schedules = {"alpha": self.alpha, "tau": self.tau, "pattern_alpha": self.pattern_alpha}
        pl_module.told["annealing"] = {name: asdict(schedule) for name, schedule in schedules.items()}

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Before each micro-batch; α and τ move only with the optimizer step."""
        self.anneal(pl_module, trainer.global_step / trainer.max_steps)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A resumed run may validate before it trains."""
        if trainer.max_steps > 0:
            self.anneal(pl_module, trainer.global_step / trainer.max_steps)

    def anneal(self, module: L.LightningModule, fraction: float) -> None:
        """Set the module's gates to where they are at ``fraction`` of the run."""
        assert isinstance(module, LeapModule)
        module.state.anneal(self.alpha(fraction), self.tau(fraction), self.pattern_alpha(fraction))
