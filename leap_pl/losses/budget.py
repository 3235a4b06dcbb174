"""Sparsity budget and kept norm: the terms of the loss that are computed from the gates' sums."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from leap_pl.losses.term import MicroBatch, Term


def sparsity_budget(
    kept: Mapping[str, Tensor], sizes: Mapping[str, int], density: float, groups: Iterable[Iterable[str]]
) -> Tensor:
    """Return Σ over groups of |mean M − ρ|: the distance of each group's mean mask to the target density.

    Args:
        kept: Weight name → ΣM, scalars with their gradients.
        sizes: Weight name → number of elements.
        density: Target density ρ.
        groups: Names of the weights that share a mean: one group for a global budget, else one for each decoder
            block.
    """
    distances = []
    for group in groups:
        names = list(group)
        mean = torch.stack([kept[name] for name in names]).sum() / sum(sizes[name] for name in names)
        distances.append((mean - density).abs())
    return torch.stack(distances).sum()


def budget_groups(layers: Mapping[str, int | None], scope: Literal["global", "layer"]) -> list[list[str]]:
    """Return the names of the weights that share a mean in :func:`sparsity_budget`.

    Args:
        layers: Weight name → index of its decoder block, or None outside the blocks.
        scope: ``global``: one group for all. ``layer``: one group for each block, and one for the weights outside.
    """
    groups: dict[int | None, list[str]] = {}
    for name, layer in layers.items():
        groups.setdefault(None if scope == "global" else layer, []).append(name)
    return list(groups.values())


def kept_norm(energy: Iterable[Tensor], norm: float) -> Tensor:
    """Return Σ_l ‖M_l ⊙ W_l‖_F / Σ_l ‖W_l‖_F, from each weight's Σ(M·W)² and the dense sum ``norm``."""
    # The gradient of a square root is infinite at 0, and NaN for a weight whose mask is nearly zero.
    return torch.stack(list(energy)).clamp_min(1e-20).sqrt().sum() / norm


@dataclass(frozen=True)
class Budget(Term):
    """Term that pulls the mean mask towards the target density.

    Attributes:
        weight: Weight of the term, λ_s.
        scope: Scope of the mean; ``global``: one over all gated weights. ``layer``: one for each decoder block.
    """

    weight: float
    scope: Literal["global", "layer"] = "global"
    name = "budget"
    measured_at_zero = True

    def value(self, batch: MicroBatch) -> Tensor:
        """Return the distance of :func:`sparsity_budget`."""
        return sparsity_budget(batch.kept, batch.sizes, batch.density, budget_groups(batch.layers, self.scope))


@dataclass(frozen=True)
class KeptNorm(Term):
    """Term that rewards masks which keep large weights, decaying to 0 over the run.

    Attributes:
        weight: Reward at the start of the run, λ_w.
    """

    weight: float
    name = "kept_norm"
    measured_at_zero = True

    def weight_at(self, fraction: float) -> float:
        """Return −λ_w·(1 − t/T)."""
        return -(self.weight * (1 - fraction))

    def value(self, batch: MicroBatch) -> Tensor:
        """Return the share that :func:`kept_norm` computes."""
        return kept_norm(batch.energy.values(), batch.dense_norm)
