"""Kernels of n:m groups: a softmax over patterns, alone (MaskLLM) or with the tiles of PATCH.

Legend of suffixes: P = patterns, Q = groups, M = elements of a group; ``noise`` is the column numbers, the two
keys, the slope α/τ and the sharpness 1/τ. With m_j the probability that position j is kept, the sum of the softmax
over the patterns that keep it, and T the probability that the group's tile is dense (0 without tiles), the mask is
M_j = T + (1 − T)·m_j.

torch.compile makes these kernels on every device. On a GPU each weight is a launch of its own: the gates here are
baselines, of many numbers of patterns, and Bernoulli gates are what is learned at scale
(:mod:`leap_pl.kernels.gpu`).
"""

from collections.abc import Callable, Sequence
from functools import cache
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from leap_pl.gates.groups import pattern_table, scaled
from leap_pl.kernels.compiled import compiled
from leap_pl.kernels.noise import element_bits, gumbel, gumbel_in_bits
from leap_pl.kernels.powers import exp2
from leap_pl.kernels.precision import full_float32

Positions = tuple[int, ...]

FEW = 8  # the largest number of patterns that one kernel unrolls: enough for all m ≤ 4


class PatternKernels(NamedTuple):
    """Forward and backward kernels that mask a weight by patterns.

    ``forward(logits_PQ, weight_QM, tile_Q, *noise)`` → W̃ (Q, M) in the weight's dtype, Σ(M·W)² in float32;
    ``backward(logits_PQ, weight_QM, tile_Q, grad_masked_QM, grad_energy, *noise)`` → the gradients of θ (P, Q) and of
    T (Q); noise and softmax are recomputed.

    Without tiles ``tile_Q`` and its gradient are None. They do not compute ΣM: Σ_j m_j is n.
    """

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor | None]]


@cache
def pattern_kernels(patterns: tuple[Positions, ...], tiled: bool = False) -> PatternKernels:
    """Return the kernels for groups with these ``patterns`` from :func:`itertools.combinations`."""
    return _few_patterns(patterns, tiled) if len(patterns) <= FEW else _many_patterns(patterns)


def _few_patterns(patterns: tuple[Positions, ...], tiled: bool) -> PatternKernels:
    """Return kernels that do everything in one pass over memory, with the patterns unrolled."""
    holders = _holders(patterns)

    def forward(logits_PQ: Tensor, weight_QM: Tensor, tile_Q: Tensor | None, *noise: Tensor) -> tuple[Tensor, Tensor]:
        masks = _under(tile_Q, _inclusion(_relax(logits_PQ, len(patterns), *noise), holders))
        masked = [mask_Q * weight_QM[:, j].to(torch.float32) for j, mask_Q in enumerate(masks)]
        energy_Q = _added([masked_Q * masked_Q for masked_Q in masked])
        return torch.stack([masked_Q.to(weight_QM.dtype) for masked_Q in masked], 1), energy_Q.sum()

    def backward(
        logits_PQ: Tensor,
        weight_QM: Tensor,
        tile_Q: Tensor | None,
        grad_masked_QM: Tensor,
        grad_energy: Tensor,
        *noise: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        probabilities = _relax(logits_PQ, len(patterns), *noise)
        inner = _inclusion(probabilities, holders)
        grads = []
        for j, mask_Q in enumerate(_under(tile_Q, inner)):
            weight_Q = weight_QM[:, j].to(torch.float32)
            grad_Q = grad_masked_QM[:, j].to(torch.float32)
            grads.append((grad_Q + 2 * grad_energy * mask_Q * weight_Q) * weight_Q)
        # Through the softmax: dθ_p = P_p·(Σ_{j∈p} d_j − Σ_j m_j·d_j)·(1 − T)·α/τ.
        mean_Q = _added([inner[j] * grad_Q for j, grad_Q in enumerate(grads)])
        slope = noise[3]
        grad_tile_Q = None
        if tile_Q is not None:
            grad_tile_Q = _added(grads) - mean_Q
            slope = slope * (1 - tile_Q)
        grads_P = [
            P_Q * (_added([grads[j] for j in positions]) - mean_Q) * slope
            for P_Q, positions in zip(probabilities, patterns, strict=True)
        ]
        return torch.stack([grad_Q.to(logits_PQ.dtype) for grad_Q in grads_P]), grad_tile_Q

    name = f"{'tile_' if tiled else ''}nm_%s_{len(patterns[0])}_of_{len(holders)}"
    return PatternKernels(
        compiled(_own_code(forward, name % "forward")), compiled(_own_code(backward, name % "backward"))
    )


def _many_patterns(patterns: tuple[Positions, ...]) -> PatternKernels:
    """Return kernels that take several passes, with the softmax of one weight in memory.

    Unrolled, 70 patterns take minutes to compile, and the backward pass is no faster.
    """
    n, m = len(patterns[0]), len(_holders(patterns))

    def relaxed(logits_PQ: Tensor, *noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        table = pattern_table(n, m, logits_PQ.device, torch.float32)
        P_PQ = torch.softmax(_scores(logits_PQ, *noise), 0)
        with torch.autocast(P_PQ.device.type, enabled=False), full_float32():
            return P_PQ, (table.T @ P_PQ).T, table

    def forward(logits_PQ: Tensor, weight_QM: Tensor, tile_Q: Tensor | None, *noise: Tensor) -> tuple[Tensor, Tensor]:
        _, inner_QM, _ = relaxed(logits_PQ, *noise)
        masked_QM = under(tile_Q, inner_QM) * weight_QM.to(torch.float32)
        return masked_QM.to(weight_QM.dtype), masked_QM.square().sum()

    def backward(
        logits_PQ: Tensor,
        weight_QM: Tensor,
        tile_Q: Tensor | None,
        grad_masked_QM: Tensor,
        grad_energy: Tensor,
        *noise: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        P_PQ, inner_QM, table = relaxed(logits_PQ, *noise)
        weight_QM = weight_QM.to(torch.float32)
        mask_QM = under(tile_Q, inner_QM)
        grad_QM = (grad_masked_QM.to(torch.float32) + 2 * grad_energy * mask_QM * weight_QM) * weight_QM
        mean_Q = (grad_QM * inner_QM).sum(1)
        with full_float32():
            grad_PQ = (table @ grad_QM.T).sub_(mean_Q).mul_(P_PQ).mul_(noise[3])
        if tile_Q is None:
            return grad_PQ, None
        return grad_PQ.mul_(1 - tile_Q), grad_QM.sum(1) - mean_Q

    def under(tile_Q: Tensor | None, inner_QM: Tensor) -> Tensor:
        return torch.stack(_under(tile_Q, inner_QM.unbind(1)), 1)

    return PatternKernels(forward, backward)


@compiled
def _scores(
    logits_PQ: Tensor, column_Q: Tensor, key_0: Tensor, key_1: Tensor, slope: Tensor, sharpness: Tensor
) -> Tensor:
    """Compute (αθ + g)/τ, (P, Q) in float32, with the same noise as :func:`_relax`."""
    return scaled(logits_PQ, slope) + sharpness * gumbel(element_bits(logits_PQ.shape[0], column_Q, key_0, key_1))


def _relax(
    logits_PQ: Tensor, count: int, column_Q: Tensor, key_0: Tensor, key_1: Tensor, slope: Tensor, sharpness: Tensor
) -> list[Tensor]:
    """Compute P_p = softmax_p((αθ_p + g_p)/τ) in float32, a flat tensor for each of ``count`` patterns; base 2."""
    # Row p of element_bits(count, …): with p in the key, the (P, Q) noise need not be stored.
    noise = [gumbel_in_bits(element_bits(1, column_Q, key_0 ^ p, key_1)[0]) for p in range(count)]
    slope = slope * 1.4426950408889634  # log₂ e
    scores = [scaled(logits_PQ[p], slope) + sharpness * noise[p] for p in range(count)]
    highest_Q = scores[0]
    for score_Q in scores[1:]:
        highest_Q = torch.maximum(highest_Q, score_Q)
    powers = [exp2(score_Q - highest_Q) for score_Q in scores]
    share_Q = 1 / _added(powers)
    return [power_Q * share_Q for power_Q in powers]


def _inclusion(probabilities: Sequence[Tensor], holders: Sequence[Positions]) -> list[Tensor]:
    """Compute m_j, the sum over the patterns that keep position j: one flat tensor for each position."""
    return [_added([probabilities[p] for p in keeping]) for keeping in holders]


def _under(tile_Q: Tensor | None, inner: Sequence[Tensor]) -> list[Tensor]:
    """Compute M_j = T + (1 − T)·m_j."""
    return list(inner) if tile_Q is None else [tile_Q + (1 - tile_Q) * mask_Q for mask_Q in inner]


def _holders(patterns: Sequence[Positions]) -> tuple[Positions, ...]:
    """Return, for each position of a group, the indices of the ``patterns`` that keep it."""
    size = 1 + patterns[-1][-1]  # the last of the combinations keeps the last position
    return tuple(tuple(p for p, kept in enumerate(patterns) if j in kept) for j in range(size))


def _added(terms: Sequence[Tensor]) -> Tensor:
    """Return the sum of ``terms``, without the zero that sum() starts from."""
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def _own_code(kernel: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Return a copy of ``kernel`` with another name and its own code object.

    torch.compile counts recompilations by code object. The kernels of different patterns are closures that share one
    code object, and together they would exceed its limit.
    """
    assert isinstance(kernel, FunctionType)
    code = kernel.__code__.replace(co_name=name)
    return FunctionType(code, kernel.__globals__, name, kernel.__defaults__, kernel.__closure__)
