"""Settings of a run that do not act beside its others: refused where typed, warned of where a config gives them."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from lightning.pytorch.utilities import rank_zero_warn

from leap_pl.cli.arguments import plain
from leap_pl.errors import UserError, listing
from leap_pl.gates import BernoulliGate, NMGate, TileGate
from leap_pl.inputs.register import current
from leap_pl.oneshot.methods import METHODS
from leap_pl.prior.settings import NO_METHOD


class Idle(NamedTuple):
    """Row of the table of settings that act only beside others.

    Attributes:
        of_mask: Whether it is a setting of learning a mask.
        why: Function of all settings that returns why the setting does not act; None if it acts, or may act.
    """

    of_mask: bool
    why: Callable[[Mapping[str, Any]], str | None]


def _method(settings: Mapping[str, Any]) -> str | None:
    given = settings.get("model.prior.mask") and settings.get("model.prior.method") != NO_METHOD
    return "model.prior.mask is given" if given and _single(settings) else None


def _sequences(settings: Mapping[str, Any]) -> str | None:
    if settings.get("model.prior.graded") or settings.get("model.prior.fisher") is not None:
        return None
    method = settings.get("model.prior.method")
    if settings.get("model.prior.mask") and _single(settings):
        return "model.prior.mask is given, and not graded"
    reads = method != NO_METHOD and (method not in METHODS or METHODS[method].needs is not None)
    return None if reads else f"model.prior.method {method} reads no text"


def _temperature(settings: Mapping[str, Any]) -> str | None:
    return None if settings.get("model.objective.distillation") else "model.objective.distillation is 0"


def _budget_scope(settings: Mapping[str, Any]) -> str | None:
    return None if settings.get("model.objective.budget") else "model.objective.budget is 0"


def _pattern_alpha(settings: Mapping[str, Any]) -> str | None:
    gate = _gate(settings)
    if gate == TileGate.__name__:
        joint = settings.get("model.gate.init_args.mode") != "tile"
        return None if joint else "the gates are in tile mode, and it is of joint mode"
    return "the gates have no patterns" if _single(settings) else None


IDLE = {
    "model.prior.method": Idle(True, _method),
    "model.prior.sequences": Idle(True, _sequences),
    "model.objective.temperature": Idle(False, _temperature),
    "model.objective.budget_scope": Idle(True, _budget_scope),
    "model.annealing.pattern_alpha": Idle(True, _pattern_alpha),
}


def check_idle(settings: Mapping[str, Any], defaults: Mapping[str, Any], *, fixes: bool) -> None:
    """Check that every setting that is typed acts; warn of those that do not and that a config gives.

    A setting at its default is left alone: it may take back what a config gives.

    Args:
        settings: All settings of the run, by their paths.
        defaults: Their defaults; of a resumed run, the settings that it was learned with.
        fixes: Whether the mask stays as it is, of whose settings :class:`.RecoverCLI` takes care.

    Raises:
        UserError: A setting that is typed does not act.
    """
    register = current()
    typed = frozenset[str]() if register is None else register.typed
    for name, row in IDLE.items():
        if (fixes and row.of_mask) or plain(settings.get(name)) == plain(defaults.get(name)):
            continue
        why = row.why(settings)
        if why is None:
            continue
        given = sorted(option for option in typed if option == name or option.startswith(f"{name}."))
        if given:
            raise UserError(
                f"{listing([f'--{option}' for option in given])} would not be used: {why}. Leave out what is not meant."
            )
        rank_zero_warn(f"{name} is not used: {why}.")


def _single(settings: Mapping[str, Any]) -> bool:
    """Return whether the gates start from one mask and have one schedule; others, also from outside, may have more."""
    return _gate(settings) in (None, BernoulliGate.__name__, NMGate.__name__)


def _gate(settings: Mapping[str, Any]) -> str | None:
    """Return the name of the class of the gates; None: the default."""
    gate = settings.get("model.gate")
    if gate is None:
        return None
    path = settings.get("model.gate.class_path") or getattr(gate, "__name__", "")
    return str(path).rpartition(".")[2]
