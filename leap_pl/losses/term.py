"""Abstract term of the loss, and the micro-batch from which terms are computed.

Letters of shapes: B = batch, L = sequence length, T = predicted tokens, C = tokens in a chunk, D = hidden size,
V = vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from leap_pl.base_model.backbone import Head
from leap_pl.gates.gate import Gate
from leap_pl.losses.language import LanguageLosses


@dataclass(frozen=True)
class MicroBatch:
    """Values available to the terms of the loss after the forward pass of one micro-batch.

    Attributes:
        input_ids: Tokens (B, L).
        hidden: Last hidden states (T, D), after the final norm, of the tokens that have a next one; with gradient.
        targets: Token that follows each, (T).
        teacher: Hidden states (T, D) of the dense model; None if no term needs them.
        head: Function from hidden states (C, D) to logits (C, V).
        language: LM and distillation losses; None if neither has a weight.
        gates: Weight name → gate, with its logits.
        kept: Weight name → ΣM, a scalar with its gradient.
        energy: Weight name → Σ(M·W)², a scalar with its gradient.
        sizes: Weight name → number of elements.
        layers: Weight name → index of its decoder block; None outside the blocks.
        density: Target density ρ.
        dense_norm: Sum Σ‖W‖ over the gated weights.
        fraction: Share of the run that is done, from 0 to below 1.
    """

    input_ids: Tensor
    hidden: Tensor
    targets: Tensor
    teacher: Tensor | None
    head: Head
    language: LanguageLosses | None
    gates: Mapping[str, Gate]
    kept: Mapping[str, Tensor]
    energy: Mapping[str, Tensor]
    sizes: Mapping[str, int]
    layers: Mapping[str, int | None]
    density: float
    dense_norm: float
    fraction: float


class Term(ABC):
    """Abstract term of the loss, which adds weight · value.

    A subclass has a ``name`` and defines :meth:`value`. Its settings are the arguments of its constructor, stored as
    attributes of the same names (as in a dataclass), by which a checkpoint describes it.

    Attributes:
        name: Name in messages and of its curve, ``loss/NAME``.
        weight: Factor of the value. At 0 the value is not computed, and the term costs nothing.
        needs_teacher: Whether the value depends on ``teacher``, which costs a forward pass.
        measured_at_zero: Whether to compute the value for its curve, without gradient, even if the weight is 0.
    """

    name: str
    weight: float
    needs_teacher: bool = False
    measured_at_zero: bool = False

    def __init__(self, weight: float = 1.0) -> None:
        """Set the weight."""
        self.weight = weight

    def weight_at(self, fraction: float) -> float:
        """Return the factor of the value at ``fraction`` of the run; override it for a weight that changes."""
        return self.weight

    @abstractmethod
    def value(self, batch: MicroBatch) -> Tensor:
        """Return the unweighted value, a scalar with its gradient."""
