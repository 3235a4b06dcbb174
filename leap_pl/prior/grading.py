"""Graded priors: initial logits scaled by Wanda's confidence in each weight, instead of plain signs.

Shapes: … stacked experts or nothing, O outputs, I inputs.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from leap_pl.base_model.weights import Weight
from leap_pl.oneshot.prune import bar, by_block
from leap_pl.oneshot.walk import Walk, WalkOptions
from leap_pl.oneshot.wanda import wanda_scores

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LEAST = 0.08
"""Smallest size of a lean, as a fraction of the largest, so that noise alone flips few bits (dev/tuning.md)."""

_TINY = torch.finfo(torch.float32).tiny  # lower bound of a score, whose logarithm is taken


@torch.no_grad()
def graded_lean(mask_OI: Tensor, weight_OI: Tensor, mean_square_I: Tensor) -> Tensor:
    """Return the lean of each weight's logit, from −1 to 1, with the mask's sign and a size given by Wanda's score.

    lean = ±(a + (1 − a)·tanh(max(0, ±log(score/cut)))), a = :data:`LEAST`, + where the mask keeps the weight. The score
    is Wanda's, |W_ij|·sqrt(mean x_j²); the cut of a row that keeps k weights is the geometric mean of its k-th and
    (k+1)-th highest scores. Weights with scores near the cut thus start near the decision boundary, and weights with
    scores many times above or below it start far away. Where another method keeps a weight with a score below the cut,
    or removes one above it, that one starts near the boundary too: of such a weight the two say opposite things.

    Args:
        mask_OI: Bool (…, O, I), from any method.
        weight_OI: Dense weight (…, O, I), any floating dtype.
        mean_square_I: Mean square of each input over the calibration tokens, (I,), or (…, I) for stacked experts.

    Returns:
        Float32 (…, O, I).
    """
    mean_square_I = mean_square_I.unsqueeze(-2) if mean_square_I.ndim > 1 else mean_square_I
    log_OI = wanda_scores(weight_OI, mean_square_I).clamp_min(_TINY).log()
    ordered_OI = log_OI.sort(-1).values
    I = mask_OI.shape[-1]  # noqa: E741  (the legend's letter)
    removed_O1 = I - mask_OI.sum(-1, keepdim=True)
    # In rows that keep all or nothing, the cut has a score on one side only.
    above_O1 = ordered_OI.gather(-1, removed_O1.clamp_max(I - 1))
    below_O1 = ordered_OI.gather(-1, (removed_O1 - 1).clamp_min(0))
    distance_OI = log_OI - (above_O1 + below_O1) / 2
    distance_OI = torch.where(mask_OI, distance_OI, -distance_OI).clamp_min_(0)  # 0 where mask and score disagree
    lean_OI = distance_OI.tanh_().mul_(1 - LEAST).add_(LEAST)
    return torch.where(mask_OI, lean_OI, -lean_OI)


def measure_input_squares(
    model: "PreTrainedModel",
    weights: Mapping[str, Weight],
    blocks_NT: Tensor,
    walk: WalkOptions | None = None,
    progress: bool = True,
) -> dict[str, Tensor]:
    """Measure the mean square of every input of every weight in one walk of the dense model.

    Args:
        model: Dense base model without gates; it is not changed.
        weights: Weights to measure, all within the decoder blocks.
        blocks_NT: Calibration tokens, LongTensor[sequences, seq_length].
        walk: Batch size and device.
        progress: Show a progress bar.

    Returns:
        Weight name → float32 (I,), or (experts, I) for stacked experts. For an expert that no token reached all values
        are 1, so that its scores are its weights' magnitudes.

    Raises:
        UserError: If the model cannot be walked, or inputs are not finite.
    """
    matrices = by_block(model, weights)
    walk = replace(walk or WalkOptions(), keep=True, instead="Give --model.prior.graded false")
    squares: dict[str, Tensor] = {}
    with Walk(model, blocks_NT, walk) as dense_walk:
        for index in bar(dense_walk, progress, "grading"):
            found = dense_walk.observe(index, matrices[index], gram=False, advance=True)
            for matrix in matrices[index]:
                statistics = found.get(matrix.name)
                square_I = (
                    torch.ones(matrix.size, dtype=torch.float32, device="cpu")
                    if statistics is None
                    else statistics.mean_square.cpu()
                )
                if matrix.expert is None:
                    squares[matrix.weight.name] = square_I
                else:
                    shape = (matrix.weight.parameter.shape[0], matrix.size)
                    stacked = torch.empty(shape, dtype=torch.float32, device="cpu")
                    squares.setdefault(matrix.weight.name, stacked)[matrix.expert] = square_I
    return {name: squares[name] for name in weights}
