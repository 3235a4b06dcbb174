"""Sparsities of the decoder blocks: read from a list or a file, or allocated by OWL."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from leap_pl.errors import UserError
from leap_pl.inputs.paths import expanded
from leap_pl.inputs.reading import MOST_SETTINGS, read_regular
from leap_pl.inputs.register import note_input
from leap_pl.oneshot.inputs import Matrix
from leap_pl.oneshot.walk import Walk
from leap_pl.oneshot.wanda import wanda_scores

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class OwlOptions:
    """Settings of OWL, outlier-weighed layer-wise sparsity (https://arxiv.org/abs/2310.05175).

    Attributes:
        threshold: M: a weight is an outlier if its Wanda score is above M times its block's mean score.
        spread: λ: the sparsities differ by at most 2λ.
    """

    threshold: float = 5.0
    spread: float = 0.08

    def __post_init__(self) -> None:
        if not 0 < self.threshold < math.inf:
            raise UserError(f"OWL with a threshold of {self.threshold:g}: give a number above 0.")
        if not 0 <= self.spread < 1:
            raise UserError(f"OWL with a spread of {self.spread:g}: give a number from 0 to below 1.")


def read_layer_sparsities(source: str | Path | Sequence[float]) -> list[float]:
    """Read one sparsity for each decoder block, from a list, a JSON file with a list, or a text file of numbers.

    Raises:
        UserError: The file does not exist or holds something else, or a number is not from 0 to below 1.
    """
    if isinstance(source, str | Path):
        path = expanded(source)
        note_input(path)
        read = read_regular(path, most=MOST_SETTINGS, what="--layer_sparsity")
        try:
            text = read.decode("utf-8").strip()
            numbers = json.loads(text) if text.startswith("[") else text.split()
            sparsities = [float(number) for number in numbers]
        except (ValueError, TypeError, RecursionError, OverflowError) as error:
            raise UserError(
                f"{path} does not hold layer sparsities ({error}). Give a JSON list or a text file, with one number "
                "for each decoder block."
            ) from error
    else:
        sparsities = [float(number) for number in source]
    wrong = [s for s in sparsities if not 0 <= s < 1]
    if wrong or not sparsities:
        raise UserError(
            f"--layer_sparsity has {f'the number {wrong[0]:g}' if wrong else 'no number'}; give numbers from 0 to "
            "below 1, one for each decoder block."
        )
    return sparsities


def owl_sparsities(
    walk: Walk, matrices: Sequence[Sequence[Matrix]], sparsity: float, options: OwlOptions | None = None
) -> list[float]:
    """Allocate ``sparsity`` over the decoder blocks by their shares of outliers (OWL).

    With D_l the share of outliers among all Wanda scores of block l, the density of a block is 2λ·(D_l −
    min D)/(max D − min D), shifted so that the mean over all weights is 1 − ``sparsity``.

    Args:
        walk: Walk of the dense model over the calibration tokens, used for nothing else.
        matrices: Matrices that will be pruned, for each block.
        sparsity: Sparsity over all matrices together.
        options: Settings; None is the paper's.

    Returns:
        One sparsity for each block.

    Raises:
        UserError: A block's sparsity would be below 0 or not below 1.
    """
    options = options or OwlOptions()
    shares: list[float | None] = []
    sizes = [sum(matrix.view(matrix.weight.parameter).numel() for matrix in block) for block in matrices]
    for index in walk:
        shares.append(_outlier_share(walk, index, matrices[index], options.threshold))
    known = [share for share in shares if share is not None]
    lowest, width = min(known, default=0.0), max(known, default=0.0) - min(known, default=0.0)
    densities = [None if share is None else 2 * options.spread * (share - lowest) / (width or 1) for share in shares]
    counted = [(density, size) for density, size in zip(densities, sizes, strict=True) if density is not None]
    mean = sum(density * size for density, size in counted) / max(sum(size for _, size in counted), 1)
    # Blocks of which nothing is known have the overall sparsity.
    allocated = [sparsity if density is None else sparsity + mean - density for density in densities]
    if min(allocated) < 0 or max(allocated) >= 1:
        raise UserError(
            f"OWL allocates sparsities from {min(allocated):.3f} to {max(allocated):.3f} for --sparsity {sparsity:g}, "
            "and a sparsity is from 0 to below 1. Lower --owl_spread."
        )
    return allocated


def _outlier_share(walk: Walk, index: int, matrices: Sequence[Matrix], threshold: float) -> float | None:
    """Return the share of outliers among the scores of a block; None if it has none, as without weights to prune."""
    found = walk.observe(index, matrices, gram=False, advance=True)
    scores: list[Tensor] = [
        wanda_scores(matrix.dense(), found[matrix.name].mean_square).flatten()
        for matrix in matrices
        if matrix.name in found
    ]
    if not scores:
        return None
    every = torch.cat(scores)
    return float((every > threshold * every.mean()).float().mean())
