"""Sparsity patterns of a mask: unstructured, n:m, tiles that are dense or n:m; choose and verify masks of a pattern.

Shapes: O outputs, I inputs, G groups, S elements of a group.
"""

import re
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from leap_pl.errors import UserError

Grouping = Literal["matrix", "row"]

_FEW = 8  # m up to which ranking by pairwise comparison is faster than selection


@dataclass(frozen=True)
class Unstructured:
    """Unstructured sparsity: any weights of a group; the method defines the groups.

    Attributes:
        sparsity: Removed over all, 0 to 1. A group of S elements keeps round((1 − sparsity)·S).
    """

    sparsity: float

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise UserError(f"sparsity {self.sparsity} is invalid: give a number from 0 to below 1.")

    def __str__(self) -> str:
        return "unstructured"

    def kept(self, size: int) -> int:
        """Return the number of kept elements out of ``size``."""
        return round((1 - self.sparsity) * size)


@dataclass(frozen=True, eq=False)
class ByRow(Unstructured):
    """Unstructured sparsity with a different number of kept weights for each row.

    It applies to methods whose weights compete within a row; other methods use only the sparsity.

    Attributes:
        kept_rows: Number of kept weights of each row, LongTensor (O,).
    """

    kept_rows: Tensor


@dataclass(frozen=True)
class NM:
    """N:M sparsity: ``n`` of every ``m`` consecutive inputs of an output are kept (2:4, 4:8 …).

    If ``m`` does not divide the number of inputs, the last group is short: it keeps n·r/m of its r inputs,
    rounded to the nearest integer, halves up.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m:
            raise UserError(
                f"pattern {self.n}:{self.m} is invalid: n of every m weights are kept, 0 < n < m, as in 2:4."
            )

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def sparsity(self) -> float:
        """Return the sparsity, removed over all."""
        return (self.m - self.n) / self.m

    def kept(self, size: int) -> int:
        """Return the number of kept inputs of a group of ``size`` ≤ m."""
        return (2 * self.n * size + self.m) // (2 * self.m)


Pattern = Unstructured | NM


@dataclass(frozen=True)
class Tiled:
    """Square tiles of a matrix, each either dense or n:m (PATCH).

    Attributes:
        nm: Pattern of the tiles that are not dense; its groups are counted along the whole row, not within a tile.
        size: Rows and columns of a tile. Tiles at the edges may be smaller.
    """

    nm: NM
    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UserError(f"tile {self.size} is invalid: a tile has at least 1 row and column, such as 128.")

    def __str__(self) -> str:
        return f"{self.size}x{self.size} tiles, dense or {self.nm}"


def read_form(text: str) -> Pattern | Tiled | None:
    """Parse the form of a mask from its string (``str(form)``); return None if it is not a form of this project."""
    if text == "unstructured":
        return Unstructured(0.0)
    match = re.fullmatch(r"(?:(\d+)x\1 tiles, dense or )?(\d+):(\d+)", text)
    if match is None:
        return None
    nm = NM(int(match[2]), int(match[3]))
    return nm if match[1] is None else Tiled(nm, int(match[1]))


def follows(mask: Tensor, input_dim: int, form: Pattern | Tiled) -> bool:
    """Return whether a weight's mask has exactly the given ``form``.

    Args:
        mask: Bool tensor of the weight's shape.
        input_dim: Input dimension of the weight.
        form: Form to verify. Any mask is unstructured; in an n:m mask every group of m keeps n (a short group
            :meth:`NM.kept`); a tiled mask is n:m in every group that touches no dense tile.
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


def has_form(recorded: str, form: str) -> bool:
    """Return whether a mask that is ``recorded`` as of one form has the other, both as their strings.

    Bits of a mask differ from one that has not its form before anything is learned. Any mask is unstructured.
    """
    return form in ("unstructured", recorded)


def _in_full_tiles(mask_OI: Tensor, size: int) -> Tensor:
    """Return a bool tensor that is True in the tiles that are kept as a whole."""
    rows, columns = mask_OI.shape[-2:]
    height, width = min(size, rows), min(size, columns)  # of a tile: padding takes no more memory than the mask
    padded = F.pad(mask_OI, (0, -columns % width, 0, -rows % height), value=True)
    tiles = padded.unflatten(-1, (-1, width)).unflatten(-3, (-1, height))  # (…, row of tiles, row, tile, column)
    full = tiles.all(-1, keepdim=True).all(-3, keepdim=True).expand_as(tiles)
    return full.flatten(-4, -3).flatten(-2, -1)[..., :rows, :columns]


def parse_pattern(text: str | None, sparsity: float) -> Pattern:
    """Parse ``2:4`` as ``NM(2, 4)``, and None as ``Unstructured(sparsity)``.

    Raises:
        UserError: ``text`` is not two integers n < m separated by a colon.
    """
    if text is None:
        return Unstructured(sparsity)
    match = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", text)
    if match is None:
        raise UserError(f"pattern {text!r} is not n:m, as in 2:4. Leave it out for unstructured pruning.")
    return NM(int(match[1]), int(match[2]))


def choose(score_OI: Tensor, pattern: Pattern, grouping: Grouping) -> Tensor:
    """Return the mask that keeps the highest scores.

    Args:
        score_OI: Scores without NaN.
        pattern: Sparsity pattern of the mask; N:M defines its own groups.
        grouping: Whether unstructured weights compete over the whole ``matrix`` or within a ``row``.

    Returns:
        Bool (O, I), True where kept. Of equal scores the lower index is kept.
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
    """Return bool (G, S) with exactly the ``k`` highest of every row; of equal scores the lower index is kept."""
    G, S = score_GS.shape
    if k <= 0 or k >= S:
        return torch.full((G, S), k > 0, dtype=torch.bool, device=score_GS.device)
    if score_GS.is_cpu:
        threshold_G1 = score_GS.kthvalue(S - k + 1, dim=1, keepdim=True).values
    else:  # CUDA's kthvalue is not deterministic, which Trainer(deterministic=True) refuses, and slower than a sort
        threshold_G1 = score_GS.sort(dim=1).values[:, S - k, None]
    kept_GS = score_GS > threshold_G1
    missing_G1 = k - kept_GS.sum(1, keepdim=True)
    ties_GS = score_GS == threshold_G1
    if bool((ties_GS.sum(1, keepdim=True) > missing_G1).any()):
        ties_GS &= ties_GS.cumsum(1) <= missing_G1
    return kept_GS | ties_GS


def _keep_of_each(score_GS: Tensor, k_G: Tensor) -> Tensor:
    """Keep the highest scores as :func:`keep_highest` does, with a separate k for each row."""
    order_GS = score_GS.sort(dim=1, descending=True, stable=True).indices
    first_GS = torch.arange(score_GS.shape[1], device=score_GS.device) < k_G[:, None]
    return torch.zeros_like(first_GS).scatter_(1, order_GS, first_GS)


def _keep_of_few(score_GS: Tensor, k: int) -> Tensor:
    """Keep the highest scores as :func:`keep_highest` does, optimized for many small groups."""
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
