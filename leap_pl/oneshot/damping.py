"""Damping of singular Hessians: raised until the solution is finite."""

import logging
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

TRIES = 5  # each with ten times the damping of the one before, until the diagonal outweighs the rest of any Hessian


class Solution(NamedTuple):
    """Result of a method that updates weights.

    Attributes:
        weight: New weights, (O, I), fp32, zero where removed.
        mask: Bool (O, I), True where kept.
        damping: Damping that was used: the requested one, or a larger one if that failed.
    """

    weight: Tensor
    mask: Tensor
    damping: float


class NotSolvableError(ArithmeticError):
    """No damping gave finite weights."""


def with_damping(solve: Callable[[float], tuple[Tensor, Tensor]], damping: float) -> Solution:
    """Call ``solve(damping)``, with ten times the damping after each failure and each result with NaN or infinity.

    Raises:
        NotSolvableError: All :data:`TRIES` failed.
    """
    for value in _ladder(damping):
        try:
            weight_OI, mask_OI = solve(value)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            continue
        if bool(torch.isfinite(weight_OI).all()):
            return Solution(weight_OI, mask_OI, value)
    raise NotSolvableError(f"no damping from {damping:g} to {value:g} gives finite weights")


def _ladder(damping: float) -> Iterator[float]:
    yield damping
    start = damping if damping > 0 else 1e-4
    for step in range(1, TRIES):
        yield start * 10**step
