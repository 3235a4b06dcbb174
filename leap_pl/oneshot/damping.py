"""Solving with Hessians that may be singular: damping raised until the answer is finite."""

import logging
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

TRIES = 5  # each ten times the last; at the end the diagonal outweighs any matrix of its mean


class Solution(NamedTuple):
    """What a method that changes weights answers.

    Attributes:
        weight: The new weights, (O, I), fp32, zero where removed.
        mask: Bool (O, I), True where kept.
        damping: The damping that was used: what was asked for, or a larger one where that failed.
    """

    weight: Tensor
    mask: Tensor
    damping: float


class NotSolvableError(ArithmeticError):
    """No damping gave finite weights."""


def with_damping(solve: Callable[[float], tuple[Tensor, Tensor]], damping: float) -> Solution:
    """Call ``solve(damping)`` with ten times the damping as long as it fails or answers with NaN or inf.

    Raises:
        NotSolvableError: All TRIES failed.
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
