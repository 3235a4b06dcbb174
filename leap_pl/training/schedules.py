"""Schedules: pure functions of the fraction t/T of completed optimizer steps."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from leap_pl.errors import UserError, one_line
from leap_pl.inputs.plain_values import display
from leap_pl.inputs.ranges import Range

Curve = Literal["linear", "cosine", "exponential", "constant"]

# Valid ranges of annealed values. The gates compute with α/τ and 1/τ in float32.
ANNEALED = {"alpha": Range(0, 1e6), "tau": Range(1e-6, 1e6), "pattern_alpha": Range(0, 1e6)}
WHY = {"tau": "a temperature is above 0"}


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
        curve: Shape of the curve from ``start`` to ``end``.
    """

    start: float
    end: float
    curve: Curve = "linear"

    def __post_init__(self) -> None:
        if self.curve not in get_args(Curve):
            raise UserError(f"there is no curve {self.curve!r}. Give one of {', '.join(get_args(Curve))}.")
        for value in (self.start, self.end):
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise UserError(f"a schedule goes from {self.start} to {self.end}; give finite numbers.")
        if self.curve == "exponential" and (self.start <= 0 or self.end <= 0):
            raise UserError(f"an exponential schedule needs values above 0, not {self.start} to {self.end}.")
        if self.curve == "constant" and self.start != self.end:
            raise UserError(f"a constant schedule cannot go from {self.start} to {self.end}; make them equal.")

    def __str__(self) -> str:
        """Return the schedule as it is written in a config."""
        return f"{{start: {self.start}, end: {self.end}, curve: {self.curve}}}"

    def __call__(self, fraction: float) -> float:
        """Return the value at ``fraction`` of the run, which is clamped to [0, 1]."""
        x = min(max(fraction, 0.0), 1.0)
        if self.curve == "linear":
            return self.start + (self.end - self.start) * x
        if self.curve == "cosine":
            return self.end + (self.start - self.end) * (1 + math.cos(math.pi * x)) / 2
        if self.curve == "exponential":
            return self.start * (self.end / self.start) ** x
        return self.start


@dataclass(frozen=True)
class Annealing:
    """Schedules of the logit scale α and the temperature τ, which harden the gates over a run.

    .. code-block:: yaml

        model:
          annealing:
            alpha: {start: 25, end: 350, curve: linear}
            tau: {start: 4, end: 0.05, curve: linear}

    All are functions of the completed optimizer steps divided by the number of steps of the run, so that they continue
    exactly in a resumed run. The defaults are LEAP's. In MaskLLM and in PATCH's tile mode α goes from 100 to 500; in
    PATCH's joint mode the tiles use LEAP's α, and the patterns, which have their own scale, use MaskLLM's.

    Attributes:
        alpha: Logit scale α, 0 or above.
        tau: Temperature τ, above 0.
        pattern_alpha: (TileGate in joint mode) Logit scale of the patterns, 0 or above.
    """

    alpha: Schedule = Schedule(25.0, 350.0)
    tau: Schedule = Schedule(4.0, 0.05)
    pattern_alpha: Schedule = Schedule(100.0, 500.0)

    def __post_init__(self) -> None:
        # Every curve stays between its start and its end.
        for name, valid in ANNEALED.items():
            schedule: Any = getattr(self, name)
            if type(schedule) is not Schedule:  # of which checkpoints hold nothing else
                raise UserError(
                    f"model.annealing.{name} is {display(schedule)}; give Schedule(START, END) of "
                    "leap_pl.training.schedules."
                )
            if schedule.start not in valid or schedule.end not in valid:
                why = f"; {WHY[name]}" if name in WHY and min(schedule.start, schedule.end) <= 0 else ""
                raise UserError(
                    f"model.annealing.{name} goes from {schedule.start:g} to {schedule.end:g}{why}. Give {valid}."
                )

    def at(self, fraction: float) -> dict[str, float]:
        """Return the value of each schedule at ``fraction`` of the run, by name."""
        return {field.name: getattr(self, field.name)(fraction) for field in fields(self)}

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "Annealing":
        """Return the schedules that plain ``settings`` describe, in the form of ``dataclasses.asdict``.

        Raises:
            UserError: The settings do not describe schedules.
        """
        known = {field.name for field in fields(cls)}
        try:
            unknown = set(settings) - known
            if not unknown:
                return cls(**{name: Schedule(**schedule) for name, schedule in settings.items()})
            reason = f"unknown: {', '.join(sorted(map(str, unknown)))}"
        except UserError:
            raise
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            reason = one_line(error)
        raise UserError(
            f"model.annealing is {str(settings)[:200]}, which does not describe schedules ({reason[:200]}). "
            f"Give {', '.join(sorted(known))}, each as in {{start: 25, end: 350, curve: linear}}."
        )


# Constant values with which earlier versions learned if their annealing callback was left out.
UNMOVED = Annealing(*(Schedule(value, value) for value in (25.0, 4.0, 100.0)))


def learned_by(settings: Any) -> Annealing:
    """Return the schedules of the run that wrote a checkpoint with these identity ``settings``.

    Raises:
        UserError: The settings are damaged.
    """
    if not isinstance(settings, Mapping):
        return Annealing.of(settings)  # raises
    annealing = settings.get("annealing")
    return UNMOVED if annealing is None else Annealing.of(annealing)


def warmup_cosine(step: int, *, total: int, warmup: int) -> float:
    """Return the factor of the learning rate: linear warmup over ``warmup`` steps, then a cosine to 0 at ``total``.

    Args:
        step: Number of completed optimizer steps.
        total: Number of optimizer steps of the run.
        warmup: Number of warmup steps; the first has 1/warmup of the rate, not 0.
    """
    if step < warmup:
        return (step + 1) / warmup
    return Schedule(1.0, 0.0, "cosine")((step - warmup) / max(1, total - warmup))
