"""LEAP's mask as its public code forms it (github.com/Paramathic/patch), written anew, to be compared with.

Before each forward pass the mask of every weight of the model is made, in the logits' dtype, by torch's Gumbel-softmax
over a last dimension of two (drop, keep), and autograd keeps what it needs of all of it until the backward pass:

    P = softmax((α·[0, θ] + [g₀, g₁]) / τ),   M = P[..., 1],   g = −log e,  e ~ Exp(1)

There a weight is a tile of 1 × 1, and its mask is repeated over the rows and the columns of its tile: two copies. Sum
and norms that the regularizers need are taken of the finished masks, and each time those of the dense weights too.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from leap_pl.base_model.weights import Weight


class Given(nn.Module):
    """A parametrization that multiplies the weight by a mask it is given before each forward pass."""

    mask: Tensor

    def forward(self, weight: Tensor) -> Tensor:
        """M ⊙ W, in the weight's dtype."""
        return self.mask * weight


class PublishedMasks:
    """The gated model of the published formulation: logits in bfloat16, masks materialised."""

    def __init__(self, weights: dict[str, Weight], spread: float = 0.014) -> None:
        self.weights = weights
        self.logits = {
            name: nn.Parameter(torch.randn_like(weight.parameter, dtype=torch.bfloat16) * spread)
            for name, weight in weights.items()
        }
        self.dense = {name: weight.parameter for name, weight in weights.items()}
        self.given = {name: Given() for name in weights}
        for name, weight in weights.items():
            weight.parameter.requires_grad_(False)
            parametrize.register_parametrization(weight.module, weight.tensor, self.given[name], unsafe=True)

    def sample(self, alpha: float, tau: float) -> tuple[Tensor, Tensor]:
        """New masks for the next forward pass; returns mean M and Σ‖M⊙W‖ / Σ‖W‖ with their gradients."""
        kept, norms, dense_norms, total = [], [], [], 0
        for name, logits in self.logits.items():
            mask = gumbel_softmax_mask(logits, alpha, tau)
            self.given[name].mask = mask
            kept.append(mask.sum().float())
            norms.append((mask * self.dense[name]).norm().float())
            dense_norms.append(self.dense[name].norm().float())
            total += mask.numel()
        return torch.stack(kept).sum() / total, torch.stack(norms).sum() / torch.stack(dense_norms).sum()


def gumbel_softmax_mask(logits: Tensor, alpha: float, tau: float) -> Tensor:
    """P[..., 1] of the two-way Gumbel-softmax, shape and dtype of ``logits``."""
    pair = torch.cat([torch.zeros_like(logits).unsqueeze(-1), logits.unsqueeze(-1)], dim=-1) * alpha
    mask = functional.gumbel_softmax(pair, tau=tau, dim=-1)[..., 1]
    # The public code repeats masks over tiles, and LEAP's are of 1 × 1: two copies that it pays for.
    return mask.repeat_interleave(1, dim=0).repeat_interleave(1, dim=1)
