"""Gates outside any run: made for one weight or on a tiny model, what they hide, and the formula by hand."""

import math
from typing import Any

import torch
from tiny import VOCABULARY, tiny_model
from torch import Tensor, nn

from leap_pl.base_model.weights import Weight, find_weights
from leap_pl.gates import BernoulliGate, Gate, Gates, GateState, NMGate, attach
from leap_pl.kernels.noise import columns, element_bits, logistic

IDS = torch.randint(0, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))
# (shape, input_dim): Linear, Conv1D, stacked experts, those stored transposed; inputs that 4 divides and not.
PLACES = [((6, 16), 1), ((16, 6), 0), ((3, 5, 8), 2), ((3, 8, 5), 1)]
PLACES += [((6, 15), 1), ((14, 5), 0), ((2, 3, 9), 2), ((5, 3), 1)]


def gate_of(shape: tuple[int, ...], *, name: str = "w", state: GateState | None = None, **kw: float) -> BernoulliGate:
    module = nn.Module()
    module.weight = nn.Parameter(torch.zeros(shape), requires_grad=False)
    return BernoulliGate(Weight(name, module, "weight", None, name, len(shape) - 1), state or GateState(), **kw)


def state_at(alpha: float, tau: float, **kw: Any) -> GateState:
    state = GateState(**kw)
    state.anneal(alpha, tau)
    return state


def noise_of(gate: Gate) -> Tensor:
    """The gate's noise at this step, its float32 values as float64."""
    *rows, length = gate.logits.shape
    bits = element_bits(math.prod(rows), columns(length, torch.device("cpu")), *gate.keys())
    return logistic(bits).double().view(gate.logits.shape)


def gated(family: str = "llama", **changes: Any) -> tuple[nn.Module, dict[str, Weight], Gates[Any], GateState]:
    """A tiny model with gates on, started from the larger half of each weight's magnitudes."""
    model = tiny_model(family, **changes).requires_grad_(False)
    weights, state = find_weights(model), state_at(100.0, 1.0, seed=3)
    gates = attach(weights, BernoulliGate, state)
    for name, gate in gates.items():
        magnitude = weights[name].parameter.abs()
        gate.start_from(magnitude > magnitude.median(), seed=0)
    return model, weights, gates, state


def loss_of(model: Any, gates: Gates[Any]) -> Tensor:
    """A loss in which the masked weights and both sums of every gate take part."""
    loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    for i, gate in enumerate(gates.values()):
        assert gate.kept is not None
        loss = loss + (0.01 + i * 1e-3) * gate.kept / gate.logits.numel() - 0.05 * (gate.energy + 1e-6).sqrt()
    return loss


def gradients(model: Any, gates: Gates[Any]) -> dict[str, Tensor]:
    gates.clear()
    for gate in gates.values():
        gate.logits.grad = None
    loss_of(model, gates).backward()
    found = {name: gate.logits.grad for name, gate in gates.items()}
    assert all(grad is not None and grad.dtype == torch.float32 for grad in found.values())
    return {name: grad.clone() for name, grad in found.items() if grad is not None}


def nm_gate(
    shape: tuple[int, ...], n: int = 2, m: int = 4, *, dim: int | None = None, name: str = "w", **kw: Any
) -> NMGate:
    module = nn.Module()
    module.weight = nn.Parameter(torch.zeros(shape), requires_grad=False)
    state = kw.pop("state", None) or GateState()
    return NMGate(Weight(name, module, "weight", None, name, len(shape) - 1 if dim is None else dim), state, n, m, **kw)


def rows_of(tensor: Tensor, input_dim: int) -> list[Tensor]:
    """The tensor as a list of rows along its inputs."""
    return list(tensor.movedim(input_dim, -1).reshape(-1, tensor.shape[input_dim]))


def groups_of(mask: Tensor, input_dim: int, m: int) -> list[Tensor]:
    return [group for row in rows_of(mask, input_dim) for group in row.split(m)]


def is_exact(mask: Tensor, input_dim: int, n: int, m: int) -> bool:
    """Whether every group keeps n of m; a short one of r inputs, n·r/m rounded, halves up."""
    return all(int(group.sum()) == int(n * len(group) / m + 0.5) for group in groups_of(mask, input_dim, m))
