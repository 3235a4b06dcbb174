"""ADMM pruning, and ADMM weight update for a given mask. Shapes: O outputs, I inputs."""

import torch
from torch import Tensor

from leap_pl.masks.patterns import Pattern, Unstructured, choose
from leap_pl.oneshot.damping import Solution, with_damping
from leap_pl.oneshot.options import AdmmOptions


def admm_prune(weight_OI: Tensor, hessian_II: Tensor, pattern: Pattern, options: AdmmOptions | None = None) -> Solution:
    """Prune one matrix and update the kept weights (https://arxiv.org/abs/2401.02938).

    Minimises ‖XW'ᵀ − XWᵀ‖² over W' with the pattern's zeros. With XX = Σ x xᵀ scaled to unit diagonal by
    n_j = sqrt(XX_jj), W ← W·n, and the ridge λ on the diagonal (towards the dense weights), each iteration
    does Z = (W + U) ⊙ mask; U += W − Z; W = (XY + ρ(Z − U))·(XX + ρI)⁻¹, XY being the dense W times XX.
    Inputs with less than a hundredth of the median's energy have a larger ridge, RARE·median(XX_jj)/XX_jj − 1 more.
    Iteration k of the first K = ``mask_iterations`` chooses the mask by the highest |W + U|, unstructured
    over the whole matrix at the sparsity s − s(1 − k/K)³, which grows to s. The result is Z/n.

    Args:
        weight_OI: Weight matrix, any floating dtype.
        hessian_II: Sum (or mean) over the calibration tokens of x xᵀ.
        pattern: Pattern of the mask; an N:M pattern holds from the first iteration on.
        options: Settings; None is the paper's.

    Returns:
        The new fp32 weights, the mask, and the ridge used. Weights of inputs that are always zero are removed
        first; those that are kept are unchanged.

    Raises:
        NotSolvableError: The Hessian gives no finite solution at any ridge.
    """
    options = options or AdmmOptions()

    def solve(ridge: float) -> tuple[Tensor, Tensor]:
        problem = _Problem(weight_OI, hessian_II, ridge, options.rho)
        return problem.iterate(options.iterations, pattern, options.mask_iterations, None)

    return with_damping(solve, options.ridge)


def admm_update(weight_OI: Tensor, hessian_II: Tensor, mask_OI: Tensor, options: AdmmOptions | None = None) -> Solution:
    """Update the kept weights of one matrix for a given mask: :func:`admm_prune` with a fixed mask.

    Args:
        weight_OI: Dense weight matrix, any floating dtype.
        hessian_II: Sum (or mean) over the calibration tokens of x xᵀ, with x the layer's inputs in the pruned
            model.
        mask_OI: Bool, True where kept.
        options: Settings; None is the paper's.

    Returns:
        The new fp32 weights, the given mask, and the ridge used. Kept weights of inputs that are always zero
        are unchanged.

    Raises:
        NotSolvableError: The Hessian gives no finite solution at any ridge.
    """
    options = options or AdmmOptions()

    def solve(ridge: float) -> tuple[Tensor, Tensor]:
        problem = _Problem(weight_OI, hessian_II, ridge, options.rho)
        return problem.iterate(options.iterations, None, 0, mask_OI)

    return with_damping(solve, options.ridge)


# Share of the median input's energy below which weights are held to the dense ones by more than the ridge. In the
# scaled problem every input counts alike: weights of one that the text hardly uses are fitted to noise, and are divided
# by its tiny scale. Inputs above are solved as in the paper.
RARE = 0.01
MOST = 1e6  # of the added ridge, at which weights stay the dense ones


class _Problem:
    """Scaled least-squares problem of one matrix, with its inverse precomputed."""

    def __init__(self, weight_OI: Tensor, hessian_II: Tensor, ridge: float, rho: float) -> None:
        self.dense_OI, self.rho = weight_OI.float(), rho
        energy_I = hessian_II.diagonal().float().clamp(min=0)
        scale_I = energy_I.sqrt()
        self.dead_I = scale_I == 0
        self.scale_I = scale_I.masked_fill(self.dead_I, 1.0)
        scaled_II = hessian_II.float() / self.scale_I / self.scale_I[:, None]
        scaled_II.diagonal().masked_fill_(self.dead_I, 1.0)
        self.start_OI = (self.dense_OI * self.scale_I).masked_fill_(self.dead_I, 0)
        used_I = energy_I[~self.dead_I]
        rare_I = RARE * used_I.median() / energy_I - 1 if used_I.numel() else torch.zeros_like(energy_I)
        ridge_I = ridge + rare_I.clamp(0, MOST).masked_fill(self.dead_I, 0)
        self.target_OI = self.start_OI @ scaled_II
        self.target_OI += ridge_I * self.start_OI
        scaled_II.diagonal().add_(ridge_I + rho)
        self.inverse_II = torch.cholesky_inverse(torch.linalg.cholesky(scaled_II))

    def iterate(
        self, iterations: int, pattern: Pattern | None, mask_iterations: int, mask_OI: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Run the iterations, and return the weights in their original scale and the mask."""
        current_OI, dual_OI = self.start_OI, torch.zeros_like(self.start_OI)
        for k in range(1, iterations + 1):
            sum_OI = current_OI + dual_OI
            if pattern is not None and (mask_OI is None or k <= mask_iterations):
                mask_OI = choose(sum_OI.abs(), _at(pattern, k, mask_iterations), "matrix")
            assert mask_OI is not None
            projected_OI = sum_OI.masked_fill(~mask_OI, 0)
            dual_OI = sum_OI - projected_OI
            current_OI = (self.target_OI + self.rho * (projected_OI - dual_OI)) @ self.inverse_II
        assert mask_OI is not None
        result_OI = (current_OI + dual_OI) / self.scale_I
        result_OI = torch.where(self.dead_I, self.dense_OI, result_OI)
        return result_OI.masked_fill_(~mask_OI, 0), mask_OI


def _at(pattern: Pattern, k: int, mask_iterations: int) -> Pattern:
    """Return the pattern for iteration ``k``, counted from 1."""
    if not isinstance(pattern, Unstructured) or k >= mask_iterations:
        return pattern
    return Unstructured(pattern.sparsity * (1 - (1 - k / mask_iterations) ** 3))
