"""Schedules: pure functions of the fraction t/T of the optimizer steps done."""

import math
from dataclasses import dataclass
from typing import Literal

Curve = Literal["linear", "cosine", "exponential", "constant"]


@dataclass(frozen=True)
class Schedule:
    """A value that moves from ``start`` to ``end`` over a run.

    ============  ==================================================  =========================
    curve         value at fraction x                                 needs
    ============  ==================================================  =========================
    linear        start + (end − start)·x
    cosine        end + (start − end)·(1 + cos πx)/2
    exponential   start·(end/start)ˣ                                  both above 0
    constant      start                                               ``end`` equal to ``start``
    ============  ==================================================  =========================

    Attributes:
        start: Value at the first step.
        end: Value after the last step.
        curve: How it goes from one to the other.
    """

    start: float
    end: float
    curve: Curve = "linear"

    def __post_init__(self) -> None:
        if self.curve == "exponential" and (self.start <= 0 or self.end <= 0):
            raise ValueError(f"an exponential schedule needs values above 0, not {self.start} to {self.end}.")
        if self.curve == "constant" and self.start != self.end:
            raise ValueError(f"a constant schedule cannot go from {self.start} to {self.end}; make them equal.")

    def __call__(self, fraction: float) -> float:
        """The value at ``fraction`` of the run, which is held within [0, 1]."""
        x = min(max(fraction, 0.0), 1.0)
        if self.curve == "linear":
            return self.start + (self.end - self.start) * x
        if self.curve == "cosine":
            return self.end + (self.start - self.end) * (1 + math.cos(math.pi * x)) / 2
        if self.curve == "exponential":
            return self.start * (self.end / self.start) ** x
        return self.start


def warmup_cosine(step: int, *, total: int, warmup: int) -> float:
    """Factor of the learning rate: up linearly over ``warmup`` steps, then down a cosine to 0 at ``total``.

    Args:
        step: Optimizer steps done.
        total: Of the run.
        warmup: Steps; the first of them has 1/warmup of the rate, not 0.
    """
    if step < warmup:
        return (step + 1) / warmup
    return Schedule(1.0, 0.0, "cosine")((step - warmup) / max(1, total - warmup))
