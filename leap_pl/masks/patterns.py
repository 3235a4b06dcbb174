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


@dataclass(frozen=True, eq=False)
class ByRow(Unstructured):
    """Any weights, of some rows more than of others, by methods whose weights compete within a row.

    Other methods see the sparsity alone.

    Attributes:
        kept_rows: How many weights of each row stay, LongTensor (O,).
    """

    kept_rows: Tensor


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


@dataclass(frozen=True)
class Tiled:
    """Square tiles of a matrix, each of them dense or n:m (PATCH).

    Attributes:
        nm: Of the tiles that are not dense; its groups do not begin anew with a tile.
        size: Rows and columns of a tile. Those at the edges may be smaller.
    """

    nm: NM
    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UserError(f"tile {self.size} makes no sense: a tile has 1 row and column or more, as 128.")

    def __str__(self) -> str:
        return f"{self.size}x{self.size} tiles, dense or {self.nm}"


def read_form(text: str) -> Pattern | Tiled | None:
    """The form of a mask from its own words (``str(form)``); None where they are none of this project's."""
    if text == "unstructured":
        return Unstructured(0.0)
    match = re.fullmatch(r"(?:(\d+)x\1 tiles, dense or )?(\d+):(\d+)", text)
    if match is None:
        return None
    nm = NM(int(match[2]), int(match[3]))
    return nm if match[1] is None else Tiled(nm, int(match[1]))


def follows(mask: Tensor, input_dim: int, form: Pattern | Tiled) -> bool:
    """Whether a weight's mask has the ``form`` it is said to have, exactly.

    Args:
        mask: Bool, of the weight's shape.
        input_dim: The dimension its layer's inputs run along.
        form: Unstructured masks may be anything; of an n:m mask every group of m keeps n (a short one what
            :meth:`NM.kept` says); a tiled one is n:m wherever a group lies in no dense tile.
    """
    if isinstance(form, Unstructured):
        return True
    nm = form.nm if isinstance(form, Tiled) else form
    mask_OI = mask.movedim(input_dim, -1)
    free_OI = torch.zeros_like(mask_OI) if isinstance(form, NM) else _in_full_tiles(mask_OI, form.size)
    whole = mask_OI.shape[-1] // nm.m * nm.m
    for part, size in ((slice(0, whole), nm.m), (slice(whole, None), mask_OI.shape[-1] - whole)):
        if size and mask_OI[..., part].numel():
            kept_G = mask_OI[..., part].reshape(-1, size).sum(1)
            free_G = free_OI[..., part].reshape(-1, size).any(1)
            if not bool(((kept_G == nm.kept(size)) | free_G).all()):
                return False
    return True


def _in_full_tiles(mask_OI: Tensor, size: int) -> Tensor:
    """Bool: the elements of the tiles that are kept whole."""
    full = torch.zeros_like(mask_OI)
    for rows in range(0, mask_OI.shape[-2], size):
        for columns in range(0, mask_OI.shape[-1], size):
            place = (..., slice(rows, rows + size), slice(columns, columns + size))
            full[place] = mask_OI[place].flatten(-2).all(-1)[..., None, None]
    return full


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
        if isinstance(pattern, ByRow):
            return _keep_of_each(score_OI, pattern.kept_rows.to(score_OI.device))
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


def _keep_of_each(score_GS: Tensor, k_G: Tensor) -> Tensor:
    """:func:`keep_highest` with a k for each row."""
    order_GS = score_GS.sort(dim=1, descending=True, stable=True).indices
    first_GS = torch.arange(score_GS.shape[1], device=score_GS.device) < k_G[:, None]
    return torch.zeros_like(first_GS).scatter_(1, order_GS, first_GS)


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
