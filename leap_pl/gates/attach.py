"""Gates are put on a model's weights, and taken off again."""

from collections.abc import Mapping

from torch import nn
from torch.nn.utils import parametrize

from leap_pl.gates.gate import Gate, GateFactory, GateState
from leap_pl.models import Weight


def attach(weights: Mapping[str, Weight], make_gate: GateFactory, state: GateState) -> dict[str, Gate]:
    """Freeze ``weights`` and register a gate on each as a parametrization.

    The model stays what it was: its class, its forward, the names of its modules. Stacked experts, whose
    module reads its weight once for each expert, have the masked weight made once for each of its calls.

    Returns:
        Weight name → gate, in the order of ``weights``.
    """
    gates: dict[str, Gate] = {}
    for name, weight in weights.items():
        weight.parameter.requires_grad_(False)
        gate = make_gate(weight, state)
        # unsafe: no trial run of the gate. Shape and dtype are its contract, and a run costs a full pass.
        parametrize.register_parametrization(weight.module, weight.tensor, gate, unsafe=True)
        gates[name] = gate
        if weight.parameter.ndim == 3:
            _once_a_call(weight.module, gate)
    return gates


def detach(weights: Mapping[str, Weight]) -> None:
    """Take the gates off; every weight is again the plain frozen parameter it was, bit by bit."""
    for weight in weights.values():
        if parametrize.is_parametrized(weight.module, weight.tensor):
            parametrize.remove_parametrizations(weight.module, weight.tensor, leave_parametrized=False)


def _once_a_call(module: nn.Module, gate: Gate) -> None:
    """Keep the gate's masked weight from the start to the end of each call of ``module``."""
    module.register_forward_pre_hook(lambda *_: gate.begin_call())
    module.register_forward_hook(lambda *_: gate.end_call(), always_call=True)
