"""Weights that are trained beside the frozen ones they start from, with a gate or without one."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from leap_pl.base_model.weights import Weight
from leap_pl.errors import UserError
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


def softened(gates: "Sequence[Gate]", frozen: Sequence[Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return :meth:`.Gate.soften_all` of the ``frozen`` weights, or of those that are trained in their place.

    A trained weight gets the gradient of its masked weight alone; the sums count it as a constant, so that the terms of
    the mask do not move weights. The backward pass of the gates computes it again from its parameters, which are in
    memory anyway.
    """
    trained = [index for index, gate in enumerate(gates) if gate.trained is not None]
    if not trained:
        return type(gates[0]).soften_all(gates, frozen)
    weights = [gate.current(weight) for gate, weight in zip(gates, frozen, strict=True)]
    constant = [weight.detach() for weight in weights]
    again = _Again([(gates[index].trained, frozen[index], constant[index]) for index in trained])
    with saved_tensors_hooks(again.pack, again.unpack):
        found = type(gates[0]).soften_all(gates, constant)
    tensors = [*(found[index][0] for index in trained), *(weights[index] for index in trained)]
    masked = ThroughMask.apply([gates[index] for index in trained], *tensors)
    for index, with_graph in zip(trained, masked, strict=True):
        found[index] = with_graph, *found[index][1:]
    return found


@torch.no_grad()
def check_linear(gate: "Gate", weight: Tensor) -> None:
    """Check that the soft mask of ``gate`` is the same for every weight and in every call, as its gradient needs.

    Gates from outside may compute theirs otherwise, and learn with it while the weights are frozen.

    Raises:
        UserError: It is not.
    """
    kind = type(gate)
    ((mask, *_),), ((masked, *_),) = (kind.soften_all([gate], [given]) for given in (torch.ones_like(weight), weight))
    mask, masked, limits = mask.float(), masked.float(), torch.finfo(weight.dtype)
    expected = mask * weight.float()
    if ((masked - expected).abs() > 4 * limits.eps * torch.maximum(masked.abs(), expected.abs()) + limits.tiny).any():
        raise UserError(
            f"{kind.__name__} computes its soft mask from the weight, or another one in each call with the same keys. "
            "Weights cannot be trained with it, which get their gradient through the mask: set --model.train_weights "
            "none, or take all random numbers from the keys that soften is given, and nothing from the weight."
        )


class _Again:
    """Hooks by which autograd keeps no trained weight for a backward pass, but computes it again there.

    They refer to no gate: its sums have the graph that holds the hooks, and neither would ever be freed.
    """

    def __init__(self, weights: "Sequence[tuple[TrainedWeight | None, Tensor, Tensor]]") -> None:
        """Know ``weights`` by their memory: what is trained, the frozen weight, and the value computed from both."""
        self._made = {value.data_ptr(): (trained, base) for trained, base, value in weights}

    def pack(self, tensor: Tensor) -> Any:
        """Return what is kept in place of ``tensor``: how to compute it, if it is a trained weight in any shape."""
        trained, base = self._made.get(tensor.data_ptr(), (None, tensor))
        same = trained is not None and tensor.is_contiguous() and tensor.numel() == base.numel()
        return (trained, base, tensor.shape) if same else tensor.detach()

    def unpack(self, kept: Any) -> Tensor:
        """Return the tensor of which :meth:`pack` has returned ``kept``."""
        if isinstance(kept, Tensor):
            return kept
        trained, base, shape = kept
        with torch.no_grad():
            value: Tensor = trained(base)
        return value.view(shape)


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
