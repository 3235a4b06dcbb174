"""Attaching gates to a model's weights as parametrizations, detaching them, and restoring them from a checkpoint."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from leap_pl.base_model.weights import Weight
from leap_pl.errors import UserError, listing
from leap_pl.gates.calls import Call
from leap_pl.gates.collection import Gates
from leap_pl.gates.gate import Gate, GateFactory, GateState
from leap_pl.gates.trained import TrainedTensor, TrainedWeight
from leap_pl.inputs.classes import imported_kinds
from leap_pl.kernels import backward_pass


def attach(
    weights: Mapping[str, Weight], make_gate: GateFactory, state: GateState, dtype: torch.dtype = torch.float32
) -> Gates[Any]:
    """Freeze ``weights`` and register a gate on each as a parametrization.

    The model keeps its class, its forward and the names of its modules. The masked weights of a decoder block are
    computed once in each of its calls (:class:`.Call`). Logits are held in ``dtype``.

    Returns:
        The gates, in the order of ``weights``.
    """
    gates: dict[str, Gate] = {}
    for name, weight in weights.items():
        weight.parameter.requires_grad_(False)
        gate = make_gate(weight, state)
        gate.store_as(dtype)
        # unsafe: skips the trial run of the gate, which costs a full pass. Shape and dtype are the gate's contract.
        parametrize.register_parametrization(weight.module, weight.tensor, gate, unsafe=True)
        gates[name] = gate
    callers: dict[nn.Module, dict[str, Gate]] = {}
    for name, gate in gates.items():
        weight = weights[name]
        if weight.block is not None and backward_pass.known():
            callers.setdefault(weight.block, {})[name] = gate
        elif weight.parameter.ndim == 3:  # stacked experts are read once for each expert
            callers.setdefault(weight.module, {})[name] = gate
    for module, of in callers.items():
        call = Call(module, weights, of)
        for gate in of.values():
            gate.share(call)
    return Gates.of(gates)


def check_settings(gate: Gate) -> None:
    """Check that the settings of ``gate``, which checkpoints store, have every argument of its constructor.

    Raises:
        TypeError: One is missing, for example that of a subclass which does not extend ``settings``.
    """
    parameters = inspect.signature(type(gate)).parameters
    positional = [name for name, found in parameters.items() if found.kind is found.POSITIONAL_OR_KEYWORD]
    arguments = positional[2:]  # after weight and state
    arguments += [name for name, found in parameters.items() if found.kind is found.KEYWORD_ONLY]
    lacking = [name for name in arguments if name not in gate.settings()]
    if lacking:
        raise TypeError(
            f"{type(gate).__name__}.settings() lacks {', '.join(lacking)}: checkpoints would not say with what the "
            "gates were made. Return them too."
        )


def attach_trained(weight: Weight, trained: TrainedWeight, state: GateState) -> TrainedTensor:
    """Freeze a ``weight`` that has no gate, and register ``trained`` in its place as a parametrization."""
    weight.parameter.requires_grad_(False)
    tensor = TrainedTensor(weight, trained, state)
    parametrize.register_parametrization(weight.module, weight.tensor, tensor, unsafe=True)
    return tensor


def detach(weights: Mapping[str, Weight]) -> None:
    """Remove the gates; every weight is again the plain frozen parameter it was before, bit for bit."""
    for weight in weights.values():
        if parametrize.is_parametrized(weight.module, weight.tensor):
            gate: Any = weight.chain[0]
            _give_own_class(weight.module)
            parametrize.remove_parametrizations(weight.module, weight.tensor, leave_parametrized=False)
            if gate.call is not None and gate.call.serves(gate):
                gate.call.remove()


def _give_own_class(module: Any) -> None:
    """Give a parametrized module a class that it shares with no deep copy, which would lose its weight with it."""
    kind = type(module)
    attributes = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    module.__class__ = type(kind.__name__, kind.__bases__, attributes)


def guard_saving(model: Any) -> None:
    """Make ``save_pretrained`` of a transformers model raise UserError while gates are attached.

    It would write their tensors in the place of the weights, and a loader would initialise those at random.
    """
    model.save_pretrained = partial(_save_without_gates, model)


def _save_without_gates(model: Any, *arguments: Any, **settings: Any) -> Any:
    if any(parametrize.is_parametrized(module) for module in model.modules()):
        raise UserError(
            "this model has gates, and save_pretrained would write them in place of its weights. Write the mask with "
            "module.save_mask('FOLDER/mask.safetensors'), weights that were trained with "
            "module.save_weights('FOLDER/weights.safetensors', 'FOLDER/mask.safetensors'), and the sparse model with "
            "leap_pl export --mask FOLDER."
        )
    return type(model).save_pretrained(model, *arguments, **settings)


def restore(kind: str, settings: Mapping[str, Any], tensors: Mapping[str, "Stored"]) -> Gates[Any]:
    """Restore gates without a model from stored logits, which suffice to choose their hard masks.

    Args:
        kind: Name of the gate's class.
        settings: Keyword arguments of the gate's class.
        tensors: Weight name → stored tensors of its gate.

    Raises:
        UserError: The kind is unknown, or the tensors do not have the shapes that this kind gives them.
    """
    kinds = gate_kinds()
    if kind not in kinds:
        raise UserError(
            f"the kind of gate {kind!r} is unknown (known: {listing(sorted(kinds))}). A file never has code imported: "
            "if it is yours, give the mask.safetensors of the run in the place of its checkpoint."
        )
    gates: dict[str, Gate] = {}
    for name, stored in tensors.items():
        # A weight that has a shape and no storage.
        module = nn.Module()
        module.weight = nn.Parameter(torch.empty(stored.shape, device="meta"), requires_grad=False)
        gate = kinds[kind](Weight(name, module, "weight", None, name, stored.input_dim), GateState(), **settings)
        tensors_found = {"logits": stored.logits, **stored.beside}
        for part, expected in gate.stored().items():
            found = tensors_found.get(part)
            if found is None or found.shape != expected.shape:
                fault = "missing" if found is None else f"of shape {tuple(found.shape)}"
                raise UserError(f"{name}: stored {part} {fault}; expected shape {tuple(expected.shape)}.")
            if stored.read is not None:
                continue
            learned = isinstance(getattr(gate, part), nn.Parameter)
            setattr(gate, part, nn.Parameter(found) if learned else found)
        gate.read = stored.read
        gates[name] = gate
    return Gates.of(gates)


@dataclass(frozen=True)
class Stored:
    """Stored state of one gated weight, as read from a checkpoint.

    Attributes:
        logits: Logits in float32 or bfloat16, of the shape that the kind of gate gives them; None: it has none.
        shape: Shape of the weight.
        input_dim: Input dimension of the weight, as in :class:`leap_pl.base_model.weights.Weight`.
        beside: Further tensors that the kind of gate stores (:meth:`Gate.stored`), by name.
        read: Function that reads a stored tensor by its name, where the tensors here are on the meta device and only
            give the shapes; None: the tensors here are the stored ones.
    """

    logits: Tensor | None
    shape: tuple[int, ...]
    input_dim: int
    beside: Mapping[str, Tensor] = field(default_factory=dict)
    read: Callable[[str], Tensor] | None = None


def gate_kinds() -> dict[str, type[Gate]]:
    """Return the kinds of gates by class name: those of this package, and those defined in other imported modules."""
    return imported_kinds(Gate)
