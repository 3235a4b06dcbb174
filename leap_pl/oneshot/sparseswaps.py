"""SparseSwaps: a mask improved by swapping weights.

Shapes: O outputs, I inputs, L rows still improving, G groups of M inputs within which weights are swapped: those of an
n:m pattern, or one of all.
"""

import torch
from torch import Tensor
from torch.nn import functional

from leap_pl.masks.patterns import NM, Pattern
from leap_pl.oneshot.wanda import wanda_mask

ROUNDS = 100
LIVE = 0.7  # finished rows are dropped once the share of rows still improving is below this


def sparseswaps_mask(weight_OI: Tensor, gram_II: Tensor, pattern: Pattern, rounds: int = ROUNDS) -> Tensor:
    """Return Wanda's mask, improved row by row by 1-swaps (https://arxiv.org/abs/2512.10922).

    The error of a row is E = dᵀCd, with d its removed weights (0 where kept) and C = Σ x xᵀ. Removing i and
    restoring j changes it by

        ΔE = (w_i²C_ii + 2w_i(Cd)_i) + (w_j²C_jj − 2w_j(Cd)_j) − 2w_iw_jC_ij.

    In each round every group of a row chooses the best single weight for one side of a swap and the exact best partner
    for it, and the row swaps the best of these pairs if that lowers E. The side that is chosen first alternates, and a
    row is finished when neither order helps. (The paper tries all pairs, which costs M times as much per swap.) Wanda
    uses only the diagonal of C; swaps take correlations of inputs into account. No kept weight changes, and the number
    of kept weights of each row is unchanged.

    Args:
        weight_OI: Weight matrix, any floating dtype.
        gram_II: Sum (or mean) over the calibration tokens of x xᵀ.
        pattern: Pattern of the mask; weights of an n:m pattern are swapped within their group.
        rounds: Largest number of swaps in a row.

    Returns:
        Bool (O, I), True where kept; no row has a larger E than under Wanda's mask.
    """
    gram_II = gram_II.float()
    gram_II = gram_II / gram_II.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    mask_OI = wanda_mask(weight_OI, gram_II.diagonal(), pattern)
    inputs = weight_OI.shape[1]
    size = pattern.m if isinstance(pattern, NM) else inputs
    missing = -inputs % size  # inputs of the last group
    whole_II = functional.pad(gram_II, (0, missing, 0, missing)) if missing else gram_II
    cross_GMM = whole_II.unflatten(0, (-1, size)).unflatten(2, (-1, size)).diagonal(dim1=0, dim2=2).movedim(-1, 0)
    group_G = torch.arange(len(cross_GMM), device=weight_OI.device)

    def grouped(of_LI: Tensor) -> Tensor:
        return (functional.pad(of_LI, (0, missing)) if missing else of_LI).unflatten(1, (-1, size))

    weight_LI, kept_LI = weight_OI.float(), mask_OI.clone()
    place_L = torch.arange(weight_OI.shape[0], device=weight_OI.device)
    pull_LI = weight_LI.masked_fill(kept_LI, 0) @ gram_II  # Cd
    failed_L = torch.zeros_like(place_L)
    for number in range(rounds):
        alone_LI = weight_LI.square() * gram_II.diagonal()
        cost_LI = alone_LI + torch.where(kept_LI, 2, -2) * weight_LI * pull_LI  # ΔE of moving each weight alone
        sides = [grouped(side_LI) for side_LI in ((kept_LI, ~kept_LI) if number % 2 else (~kept_LI, kept_LI))]
        cost_LGM, weight_LGM = grouped(cost_LI), grouped(weight_LI)
        change_LG, first_LG = cost_LGM.masked_fill(~sides[0], float("inf")).min(2)
        both_LGM = cost_LGM - 2 * weight_LGM.gather(2, first_LG[..., None]) * weight_LGM * cross_GMM[group_G, first_LG]
        rest_LG, second_LG = both_LGM.masked_fill_(~sides[1], float("inf")).min(2)
        change_L, best_L = (change_LG + rest_LG).min(1)
        first_L, second_L = (
            best_L * size + place_LG.gather(1, best_L[:, None])[:, 0] for place_LG in (first_LG, second_LG)
        )

        better_L = change_L < 0
        for chosen_L in (first_L, second_L):
            kept_L1 = kept_LI.gather(1, chosen_L[:, None])
            step_L1 = torch.where(kept_L1, 1, -1) * weight_LI.gather(1, chosen_L[:, None]) * better_L[:, None]
            pull_LI += step_L1 * gram_II[chosen_L]
            kept_LI.scatter_(1, chosen_L[:, None], kept_L1 ^ better_L[:, None])
        failed_L = torch.where(better_L, 0, failed_L + 1)
        live_L = failed_L < 2
        if not bool(live_L.any()):
            break
        if float(live_L.float().mean()) < LIVE:
            mask_OI[place_L] = kept_LI
            place_L, weight_LI, pull_LI = place_L[live_L], weight_LI[live_L], pull_LI[live_L]
            kept_LI, failed_L = kept_LI[live_L], failed_L[live_L]
    mask_OI[place_L] = kept_LI
    return mask_OI
