"""SparseGPT: optimal brain surgeon, column by column. Shapes: O outputs, I inputs, B columns in a block."""

import torch
from torch import Tensor

from leap_pl.masks.patterns import NM, Pattern, Unstructured, choose, keep_highest
from leap_pl.oneshot.damping import Solution, with_damping
from leap_pl.oneshot.options import SparseGPTOptions


def sparsegpt(
    weight_OI: Tensor, hessian_II: Tensor, pattern: Pattern, options: SparseGPTOptions | None = None
) -> Solution:
    """Prune one matrix and update the kept weights (https://arxiv.org/abs/2301.00774).

    With H = mean over tokens of x xᵀ plus damping, and U the upper Cholesky factor of H⁻¹ (H⁻¹ = UᵀU), the
    columns are visited from left to right. Removing weight w of column j costs w²/U_jj², and the columns to the
    right compensate for it: W[:, k] −= (w/U_jj)·U_jk. The mask is chosen at the start of each block of columns,
    by the lowest cost over all rows of the block together; for N:M, at the start of each group of m columns, for
    each row separately.

    A block keeps round((1 − s)·O·(columns up to its end)) weights minus those kept in the blocks before it, so
    that the number over the whole matrix is exact.

    Args:
        weight_OI: Weight matrix, any floating dtype.
        hessian_II: Mean (or sum) over the calibration tokens of x xᵀ; its scale does not matter.
        pattern: Pattern of the mask.
        options: Settings; None is the paper's.

    Returns:
        The new fp32 weights, the mask, and the damping used. Columns of inputs that are always zero are
        set to zero.

    Raises:
        NotSolvableError: The Hessian gives no finite solution at any damping.
    """
    options = options or SparseGPTOptions()
    hessian_II = hessian_II.float()
    dead_I = hessian_II.diagonal() <= 0
    dense_OI = weight_OI.float().masked_fill(dead_I, 0)

    def solve(damping: float) -> tuple[Tensor, Tensor]:
        factor_II = _inverse_factor(hessian_II, dead_I, damping)
        return _sweep(dense_OI.clone(), factor_II, pattern, options.block_size)

    return with_damping(solve, options.damping)


def _inverse_factor(hessian_II: Tensor, dead_I: Tensor, damping: float) -> Tensor:
    """Return the upper Cholesky factor of the damped Hessian's inverse."""
    damped_II = hessian_II.clone()
    diagonal_I = damped_II.diagonal()  # a view
    mean = diagonal_I.mean()
    # A dead input is coupled to no other, so that any positive diagonal entry leaves the others unchanged.
    diagonal_I.masked_fill_(dead_I, 1.0)
    diagonal_I.add_(damping * mean)
    inverse_II = torch.cholesky_inverse(torch.linalg.cholesky(damped_II))
    return torch.linalg.cholesky(inverse_II, upper=True)


def _sweep(weight_OI: Tensor, factor_II: Tensor, pattern: Pattern, block_size: int) -> tuple[Tensor, Tensor]:
    O, I = weight_OI.shape  # noqa: E741  (the legend's letters)
    mask_OI = torch.ones_like(weight_OI, dtype=torch.bool)
    step = block_size
    if isinstance(pattern, NM):
        step = max(block_size // pattern.m, 1) * pattern.m
    for start in range(0, I, step):
        stop = min(start + step, I)
        block_OB, factor_BB = weight_OI[:, start:stop], factor_II[start:stop, start:stop]
        kept_OB, errors_OB = mask_OI[:, start:stop], torch.zeros_like(block_OB)
        diagonal_B = factor_BB.diagonal()
        if isinstance(pattern, Unstructured):
            count = pattern.kept(O * stop) - pattern.kept(O * start)
            cost_OB = (block_OB / diagonal_B) ** 2
            kept_OB.copy_(keep_highest(cost_OB.reshape(1, -1), count).view_as(cost_OB))
        for j in range(stop - start):
            if isinstance(pattern, NM) and j % pattern.m == 0:
                group = slice(j, j + pattern.m)
                kept_OB[:, group] = choose((block_OB[:, group] / diagonal_B[group]) ** 2, pattern, "row")
            column_O = block_OB[:, j]
            error_O = column_O.masked_fill(kept_OB[:, j], 0) / diagonal_B[j]
            errors_OB[:, j] = error_O
            block_OB[:, j:].addr_(error_O, factor_BB[j, j:], alpha=-1)
        weight_OI[:, stop:].addmm_(errors_OB, factor_II[start:stop, stop:], alpha=-1)
    return weight_OI.masked_fill_(~mask_OI, 0), mask_OI
