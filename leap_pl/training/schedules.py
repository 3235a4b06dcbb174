"""Schedules: pure functions of the fraction t/T of the optimizer steps done."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from leap_pl.errors import UserError
from leap_pl.inputs.ranges import Range

Curve = Literal["linear", "cosine", "exponential", "constant"]

# What a value that is annealed may be. The gates compute with α/τ and 1/τ in float32.
ANNEALED = {"alpha": Range(0, 1e6), "pattern_alpha": Range(0, 1e6), "tau": Range(1e-6, 1e6)}
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
        curve: How it goes from one to the other.
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
        """Return it as it is typed."""
        return f"{{start: {self.start}, end: {self.end}, curve: {self.curve}}}"

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


def check_annealed(group: str, **schedules: Schedule) -> None:
    """Make sure that schedules of the gates' logit scales and temperature go where these can be.

    Args:
        group: Where they are set, for the message, as ``annealing``.
        schedules: By the names in :data:`ANNEALED`.

    Raises:
        UserError: One begins or ends elsewhere.
    """
    for name, schedule in schedules.items():
        taken = ANNEALED[name]
        if schedule.start not in taken or schedule.end not in taken:
            why = f"; {WHY[name]}" if name in WHY and min(schedule.start, schedule.end) <= 0 else ""
            raise UserError(f"{group}.{name} goes from {schedule.start:g} to {schedule.end:g}{why}. Give {taken}.")


@dataclass(frozen=True)
class Annealing:
    """How the gates harden over a run: the schedules of the logit scale α and of the temperature τ.

    .. code-block:: yaml

        model:
          annealing:
            alpha: {start: 25, end: 350, curve: linear}
            tau: {start: 4, end: 0.05, curve: linear}

    All are functions of the optimizer steps done, over the number of steps of the run, so that a resumed run takes them
    up where they were. The defaults are LEAP's. MaskLLM's α goes from 100 to 500, and so does PATCH's in tile mode; in
    its joint mode the tiles have LEAP's and the patterns, whose scale is apart, MaskLLM's.

    Attributes:
        alpha: Logit scale α, 0 or above.
        tau: Temperature τ, above 0.
        pattern_alpha: (TileGate in joint mode) Logit scale of the patterns, 0 or above.
    """

    alpha: Schedule = Schedule(25.0, 350.0)
    tau: Schedule = Schedule(4.0, 0.05)
    pattern_alpha: Schedule = Schedule(100.0, 500.0)

    def __post_init__(self) -> None:
        # No curve leaves the range between its ends.
        check_annealed("model.annealing", alpha=self.alpha, tau=self.tau, pattern_alpha=self.pattern_alpha)

    def at(self, fraction: float) -> dict[str, float]:
        """Return what each schedule has come to at ``fraction`` of the run, by its name."""
        return {field.name: getattr(self, field.name)(fraction) for field in fields(self)}

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "Annealing":
        """Return the schedules that plain ``settings`` describe, as ``dataclasses.asdict`` writes them.

        Raises:
            UserError: They describe none.
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
            reason = " ".join(str(error).split())
        raise UserError(
            f"model.annealing is {str(settings)[:200]}, and no schedules ({reason[:200]}). "
            f"Give {', '.join(sorted(known))}, each as in {{start: 25, end: 350, curve: linear}}."
        )


# By what a module learned before the schedules were its own, where the callback that moved α and τ was left out.
UNMOVED = Annealing(*(Schedule(value, value) for value in (25.0, 4.0, 100.0)))


def learned_by(settings: Any) -> Annealing:
    """Return the schedules of the run that wrote a checkpoint with these identity ``settings``.

    Raises:
        UserError: They are damaged.
    """
    if not isinstance(settings, Mapping):
        return Annealing.of(settings)  # which refuses it
    told = settings.get("annealing")
    return UNMOVED if told is None else Annealing.of(told)


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
