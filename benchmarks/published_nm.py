"""MaskLLM's mask as its formulas say it, materialised, to be compared with :class:`leap_pl.gates.NMGate`.

The logits of a weight are (groups, patterns). All of the weight's softmaxes are formed at once and kept by autograd
until the backward pass, as are the mask and the noise:

    P = softmax((κ·logits + g) / τ),   g = −log e,  e ~ Exp(1),   M = P · patterns,   W̃ = M ⊙ W

As in its public code (github.com/NVlabs/MaskLLM), the softmax is torch's own Gumbel-softmax.
"""

from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from leap_pl.base_model.weights import Weight
from leap_pl.gates import Gate, Gates, GateState


class PublishedNM(Gate):
    """A parametrization that passes a weight as a gate does; its noise is torch's own."""

    collection = Gates

    def __init__(self, weight: Weight, state: GateState, n: int = 2, m: int = 4, spread: float = 0.01) -> None:
        """Make it for a ``weight`` whose inputs come last and are whole groups of ``m``."""
        super().__init__(weight, state)
        patterns = [[float(j in kept) for j in range(m)] for kept in combinations(range(m), n)]
        device = weight.parameter.device
        self.patterns_PM = torch.tensor(patterns, device=device)
        self.n, self.m, self.spread = n, m, spread
        groups = weight.parameter.numel() // m
        self.logits = nn.Parameter(torch.randn(groups, len(patterns), device=device) * spread)

    def settings(self) -> dict[str, Any]:
        """See :meth:`Gate.settings`."""
        return {"n": self.n, "m": self.m, "spread": self.spread}

    def soften(self, weight: Tensor, key_0: Tensor, key_1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See :meth:`Gate.soften`."""
        P_QP = functional.gumbel_softmax(self.logits * self.state.alpha, tau=float(self.state.tau), dim=-1)
        mask = (P_QP @ self.patterns_PM).view(weight.shape)
        masked = mask * weight
        return masked.to(weight.dtype), mask.sum(), masked.float().square().sum()

    @torch.no_grad()
    def start_from(self, prior: Tensor | None, seed: int) -> None:
        """N(0, spread²), without a prior."""
        self.logits.normal_(std=self.spread, generator=torch.Generator(self.logits.device).manual_seed(seed))

    def hard_mask(self) -> Tensor:
        """See :meth:`Gate.hard_mask`: the pattern of the highest logit."""
        return self.patterns_PM[self.logits.argmax(-1)].view(self.shape) > 0
