"""What a mask looks like: any weights of a group, or n of every m consecutive inputs.

Shapes: O outputs, I inputs, G groups, S elements of a group.
"""

import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from leap_pl.errors import UserError

Grouping = Literal["matrix", "row"]

_FEW = 8  # m up to which ranking by pairwise comparison is faster than selection


@dataclass(frozen=True)
class Unstructured:
    """Any weights of a group; the method says what a group is.

    Attributes:
        sparsity: Removed over all, 0 to 1. A group of S elements keeps round((1 − sparsity)·S).
    """

    sparsity: float

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise UserError(f"sparsity {self.sparsity} makes no sense: give a number from 0 to below 1.")

    def __str__(self) -> str:
        return "unstructured"

    def kept(self, size: int) -> int:
        """How many of ``size`` elements stay."""
        return round((1 - self.sparsity) * size)


@dataclass(frozen=True)
class NM:
    """``n`` kept of every ``m`` consecutive inputs of an output (2:4, 4:8 …).

    Where ``m`` does not divide the number of inputs, the last group is short: of its r inputs it keeps
    n·r/m, rounded to the nearest number, halves up.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m:
            raise UserError(
                f"pattern {self.n}:{self.m} makes no sense: n of every m weights are kept, 0 < n < m, as in 2:4."
            )

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def sparsity(self) -> float:
        """Removed over all."""
        return 1 - self.n / self.m

    def kept(self, size: int) -> int:
        """How many of a group of ``size`` ≤ m inputs stay."""
        return (2 * self.n * size + self.m) // (2 * self.m)


Pattern = Unstructured | NM


def parse_pattern(text: str | None, sparsity: float) -> Pattern:
    """``2:4`` → ``NM(2, 4)``; None → ``Unstructured(sparsity)``.

    Raises:
        UserError: ``text`` is not two whole numbers n < m with a colon between them.
    """
    if text is None:
        return Unstructured(sparsity)
    match = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", text)
    if match is None:
        raise UserError(f"pattern {text!r} is not n:m, as in 2:4. Leave it out for unstructured pruning.")
    return NM(int(match[1]), int(match[2]))


def choose(score_OI: Tensor, pattern: Pattern, grouping: Grouping) -> Tensor:
    """The mask that keeps the highest scores.

    Args:
        score_OI: Scores without NaN.
        pattern: How many stay. For N:M the groups are the pattern's own.
        grouping: Whether unstructured weights compete over the whole ``matrix`` or within a ``row``.

    Returns:
        Bool (O, I), True where kept. Of equal scores the lower index stays.
    """
    O, I = score_OI.shape  # noqa: E741  (the legend's letters)
    if isinstance(pattern, Unstructured):
        if grouping == "matrix":
            return keep_highest(score_OI.reshape(1, -1), pattern.kept(O * I)).view(O, I)
        return keep_highest(score_OI, pattern.kept(I))
    whole = I // pattern.m * pattern.m
    parts = []
    if whole:
        groups_GS = score_OI[:, :whole].reshape(-1, pattern.m)
        parts.append(_keep_of_few(groups_GS, pattern.n).view(O, whole))
    if whole < I:
        parts.append(_keep_of_few(score_OI[:, whole:], pattern.kept(I - whole)))
    return torch.cat(parts, dim=1)


def keep_highest(score_GS: Tensor, k: int) -> Tensor:
    """Bool (G, S): the ``k`` highest of every row, exactly; of equal scores the lower index stays."""
    G, S = score_GS.shape
    if k <= 0 or k >= S:
        return torch.full((G, S), k > 0, dtype=torch.bool, device=score_GS.device)
    threshold_G1 = score_GS.kthvalue(S - k + 1, dim=1, keepdim=True).values
    kept_GS = score_GS > threshold_G1
    missing_G1 = k - kept_GS.sum(1, keepdim=True)
    ties_GS = score_GS == threshold_G1
    if bool((ties_GS.sum(1, keepdim=True) > missing_G1).any()):
        ties_GS &= ties_GS.cumsum(1) <= missing_G1
    return kept_GS | ties_GS


def _keep_of_few(score_GS: Tensor, k: int) -> Tensor:
    """:func:`keep_highest` for a great many small groups."""
    S = score_GS.shape[1]
    if S > _FEW:
        return keep_highest(score_GS, k)
    columns = [column.contiguous() for column in score_GS.unbind(1)]
    ranks = [torch.zeros_like(column, dtype=torch.int8) for column in columns]
    for i in range(S):
        for j in range(i + 1, S):
            j_wins = columns[j] > columns[i]
            ranks[i] += j_wins
            ranks[j] += ~j_wins
    return torch.stack([rank < k for rank in ranks], dim=1)
