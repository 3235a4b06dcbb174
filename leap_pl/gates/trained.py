"""Weights that are trained beside the frozen ones they start from, with a gate or without one."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from leap_pl.base_model.weights import Weight
from leap_pl.gates.learned import Learned

if TYPE_CHECKING:
    from leap_pl.gates.gate import Gate, GateState

PART = "trained."  # in the names of a trained weight's parameters, among those of its gate


class TrainedWeight(Learned, ABC):
    """Parameters that determine a trained weight together with the frozen one.

    A kind is a subclass, in the table of :mod:`leap_pl.training.weights`.
    """

    @abstractmethod
    def forward(self, base: Tensor) -> Tensor:
        """Return the trained weight, of the shape and dtype of the frozen weight ``base``, with its graph."""


class TrainedTensor(nn.Module):
    """Parametrization of a tensor that has no gate: it is trained, and the frozen one where gates are off."""

    def __init__(self, weight: Weight, trained: TrainedWeight, state: "GateState") -> None:
        """Read ``trained`` in place of the frozen ``weight``, unless the mode of the gates' ``state`` is ``dense``."""
        super().__init__()
        self.weight, self.trained, self.state = weight, trained, state

    def forward(self, base: Tensor) -> Tensor:
        """Return the tensor that the layer uses."""
        return base if self.state.mode == "dense" else self.trained(base)


def softened(gates: "Sequence[Gate]", weights: Sequence[Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return :meth:`.Gate.soften_all`, with the gradients of weights that are trained.

    A trained weight gets the gradient of its masked weight alone; the sums count it as a constant, so that the terms of
    the mask do not move weights.
    """
    trained = [index for index, gate in enumerate(gates) if gate.trained is not None]
    found = type(gates[0]).soften_all(gates, [weight.detach() for weight in weights] if trained else weights)
    if trained:
        tensors = [*(found[index][0] for index in trained), *(weights[index] for index in trained)]
        masked = ThroughMask.apply([gates[index] for index in trained], *tensors)
        for index, with_graph in zip(trained, masked, strict=True):
            found[index] = with_graph, *found[index][1:]
    return found


class ThroughMask(torch.autograd.Function):
    """Autograd function (W̃₁ … W̃ₙ, W₁ … Wₙ) → (W̃₁ … W̃ₙ) that passes gradients through the masks to the weights.

    A masked weight W̃ = M ⊙ W is linear in W: dW = M ⊙ dW̃. So the backward pass softens the gradients as the forward
    pass has softened the weights, by the same kernels and with the same noise, and stores no mask.
    """

    @staticmethod
    def forward(ctx: Any, gates: "Sequence[Gate]", *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return the masked weights as they are."""
        ctx.set_materialize_grads(False)
        ctx.gates, ctx.before = gates, gates[0].state.now()
        return tuple(masked.view_as(masked) for masked in tensors[: len(gates)])

    @staticmethod
    def backward(ctx: Any, *given: Tensor | None) -> Any:
        """Return the gradients of the masked weights, and those times their masks."""
        used = [index for index, grad in enumerate(given) if grad is not None]
        through: list[Tensor | None] = [None] * len(given)
        if used:
            gates, grads = [ctx.gates[index] for index in used], [given[index] for index in used]
            with gates[0].state.as_of(ctx.before):
                results = type(gates[0]).soften_all(gates, grads)
            for index, (masked, *_) in zip(used, results, strict=True):
                through[index] = masked
        return None, *given, *through
