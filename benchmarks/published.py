"""LEAP's mask as its published code forms it, written anew from the formulas, to be compared with.

The mask of every weight of the model is made at once, in the logits' dtype, by a softmax over a last dimension
of two (keep, drop) with a Gumbel variable for each, and autograd keeps what it needs of all of it until the
backward pass:

    P = softmax(([αθ, 0] + [g₁, g₀]) / τ),   M = P[..., 0],   g = −log(−log u)

Sum and norm that the regularizers need are taken of the finished masks.
"""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from leap_pl.weights import Weight


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
        """New masks for the next forward pass; returns mean M and Σ‖M⊙W‖ with their gradients."""
        kept, norms, total = [], [], 0
        for name, logits in self.logits.items():
            mask = gumbel_softmax_mask(logits, alpha, tau)
            self.given[name].mask = mask
            kept.append(mask.sum(dtype=torch.float32))
            norms.append((mask * self.dense[name]).float().norm())
            total += mask.numel()
        return torch.stack(kept).sum() / total, torch.stack(norms).sum()


def gumbel_softmax_mask(logits: Tensor, alpha: float, tau: float) -> Tensor:
    """P[..., 0] of the two-way Gumbel-softmax; shape and dtype of ``logits``."""
    pair = torch.stack([logits * alpha, torch.zeros_like(logits)], dim=-1)
    uniform = torch.rand_like(pair, dtype=torch.float32).clamp_(1e-7, 1 - 1e-7)
    gumbel = -torch.log(-torch.log(uniform))
    return torch.softmax((pair + gumbel.to(pair.dtype)) / tau, dim=-1)[..., 0]
