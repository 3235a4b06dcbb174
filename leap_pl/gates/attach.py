"""Gates are put on a model's weights, and taken off again."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from leap_pl.base_model.weights import Weight
from leap_pl.errors import UserError, listing
from leap_pl.gates.collection import Gates
from leap_pl.gates.gate import Gate, GateFactory, GateState
from leap_pl.inputs.classes import imported_kinds


def attach(
    weights: Mapping[str, Weight], make_gate: GateFactory, state: GateState, dtype: torch.dtype = torch.float32
) -> Gates[Any]:
    """Freeze ``weights`` and register a gate on each as a parametrization.

    The model stays what it was: its class, its forward, the names of its modules. Stacked experts, whose
    module reads its weight once for each expert, have the masked weight made once for each of its calls. Logits
    are held in ``dtype``.

    Returns:
        The gates, in the order of ``weights``.
    """
    gates: dict[str, Gate] = {}
    for name, weight in weights.items():
        weight.parameter.requires_grad_(False)
        gate = make_gate(weight, state)
        gate.store_as(dtype)
        # unsafe: no trial run of the gate. Shape and dtype are its contract, and a run costs a full pass.
        parametrize.register_parametrization(weight.module, weight.tensor, gate, unsafe=True)
        gates[name] = gate
        if weight.parameter.ndim == 3:
            _once_a_call(weight.module, gate)
    return Gates.of(gates)


def detach(weights: Mapping[str, Weight]) -> None:
    """Take the gates off; every weight is again the plain frozen parameter it was, bit by bit."""
    for weight in weights.values():
        if parametrize.is_parametrized(weight.module, weight.tensor):
            chains: Any = weight.module.parametrizations
            gate = chains[weight.tensor][0]
            parametrize.remove_parametrizations(weight.module, weight.tensor, leave_parametrized=False)
            for hook in gate.hooks:
                hook.remove()
            gate.hooks.clear()


def restore(kind: str, settings: Mapping[str, Any], tensors: Mapping[str, "Stored"]) -> Gates[Any]:
    """Return gates without a model, from stored logits: enough to choose their hard masks.

    Args:
        kind: Name of the gate's class.
        settings: Its keyword arguments.
        tensors: Weight name → what is stored of it.

    Raises:
        UserError: There is no such kind, or the logits have not the shape it gives a weight.
    """
    make = gate_kind(kind)
    gates: dict[str, Gate] = {}
    for name, stored in tensors.items():
        # A weight that has a shape and no storage.
        module = nn.Module()
        module.weight = nn.Parameter(torch.empty(stored.shape, device="meta"), requires_grad=False)
        gate = make(Weight(name, module, "weight", None, name, stored.input_dim), GateState(), **settings)
        tensors_found = {"logits": stored.logits, **stored.beside}
        for part, expected in gate.stored().items():
            found = tensors_found.get(part)
            if found is None or found.shape != expected.shape:
                shape = "not there" if found is None else tuple(found.shape)
                raise UserError(f"{name}: its {part} are {shape}, and should be {tuple(expected.shape)}.")
            if stored.read is not None:
                continue
            learned = isinstance(getattr(gate, part), nn.Parameter)
            setattr(gate, part, nn.Parameter(found) if learned else found)
        gate.read = stored.read
        gates[name] = gate
    return Gates.of(gates)


@dataclass(frozen=True)
class Stored:
    """What a checkpoint holds of one gated weight.

    Attributes:
        logits: Float32 or bfloat16, of the shape that the kind of gate gives them.
        shape: Of the weight.
        input_dim: Of the weight, as in :class:`leap_pl.base_model.weights.Weight`.
        beside: What else the kind of gate stores (:meth:`Gate.stored`).
        read: Reads one of them by its name, where the tensors here are on the meta device and only tell shapes.
    """

    logits: Tensor
    shape: tuple[int, ...]
    input_dim: int
    beside: Mapping[str, Tensor] = field(default_factory=dict)
    read: Callable[[str], Tensor] | None = None


def gate_kind(name: str) -> type[Gate]:
    """The class of gates called ``name``.

    Raises:
        UserError: There is no such kind.
    """
    kinds = gate_kinds()
    if name not in kinds:
        raise UserError(f"gates of kind {name!r} are not known here (known: {listing(sorted(kinds))}).")
    return kinds[name]


def gate_kinds() -> dict[str, type[Gate]]:
    """Return the kinds of gates by the names of their classes: those of this package, and those imported since."""
    return imported_kinds(Gate)


def _once_a_call(module: nn.Module, gate: Gate) -> None:
    """Keep the gate's masked weight from the start to the end of each call of ``module``."""
    gate.hooks.append(module.register_forward_pre_hook(lambda *_: gate.begin_call()))
    gate.hooks.append(module.register_forward_hook(lambda *_: gate.end_call(), always_call=True))
