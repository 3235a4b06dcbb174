"""MaskLLM's gate: one categorical variable for each group of m weights, over its patterns that keep n.

Paper: https://arxiv.org/abs/2409.17481. Legend of suffixes: P = patterns, Q = groups, M = elements of a group;
see :mod:`leap_pl.gates.groups`.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from types import FunctionType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from leap_pl.errors import UserError
from leap_pl.gates.compiled import compiled
from leap_pl.gates.gate import Gate, GateState
from leap_pl.gates.groups import Groups
from leap_pl.gates.noise import columns, element_bits, gumbel, noise_keys
from leap_pl.models import Weight
from leap_pl.patterns import NM, Pattern

Positions = tuple[int, ...]

FEW = 8  # patterns up to which they are written out in one kernel: all of m ≤ 4


class NMGate(Gate):
    """P = softmax((α·θ + g)/τ) over the n:m patterns of each group, M = Σ_p P_p·pattern_p, W̃ = M ⊙ W.

    .. code-block:: yaml

        model:
          sparsity: 0.5
          gate:
            class_path: NMGate
            init_args: {n: 2, m: 4, spread: 0.01, strength: 3.0}
          objective: {budget: 0}     # constant: every choice of patterns has one density
        annealing:
          alpha: {start: 100, end: 500}
          tau: {start: 4, end: 0.05}

    θ is one logit for each of the C(m, n) patterns of each group of m consecutive inputs (6 for the 4 weights of
    a 2:4 group), g Gumbel noise. The paper's logit scale κ is the house's α. The hard mask is the pattern of the
    highest logit: exactly n of every m, whatever the other groups do. ΣM is constant, so the sparsity budget
    contributes nothing. Inputs that m does not divide end in a short group: of its r inputs n·r/m are kept,
    rounded, as in one-shot pruning.
    """

    method: ClassVar[str] = "maskllm"

    def __init__(
        self, weight: Weight, state: GateState, n: int = 2, m: int = 4, spread: float = 0.01, strength: float = 3.0
    ) -> None:
        """Make a gate for ``weight``.

        Args:
            weight: The weight to gate.
            state: The state that the gates of the model share.
            n: Weights kept of each group.
            m: Consecutive inputs that make a group.
            spread: Standard deviation of the logits at the start.
            strength: How far one more position shared with the prior moves a pattern's logit at the start, in
                units of ``spread``.
        """
        super().__init__(weight, state)
        if spread <= 0 or strength < 0:
            raise ValueError(f"spread {spread} must be above 0 and strength {strength} not below 0.")
        self.n, self.m, self.spread, self.strength = n, m, spread, strength
        self.groups = Groups(n, m, self.shape, self.input_dim)
        device = weight.parameter.device
        self.logits = nn.Parameter(torch.zeros(self.groups.logits_shape, dtype=torch.float32, device=device))

    def settings(self) -> dict[str, Any]:
        """See :meth:`Gate.settings`."""
        return {"n": self.n, "m": self.m, "spread": self.spread, "strength": self.strength}

    def exact_sparsity(self, sparsity: float) -> float:
        """1 − n/m; see :meth:`Gate.exact_sparsity`."""
        pattern = self.groups.pattern
        if abs(sparsity - pattern.sparsity) > 1e-3:
            raise UserError(
                f"model.sparsity is {sparsity:g}, and {pattern} gates remove {pattern.sparsity:g}. "
                f"Set --model.sparsity {pattern.sparsity:g}, or another n and m."
            )
        return pattern.sparsity

    def prior_forms(self, sparsity: float) -> dict[str, Pattern]:
        """A prior of the gate's own pattern; see :meth:`Gate.prior_forms`."""
        return {"prior": NM(self.n, self.m)}

    def soften(self, weight: Tensor, key_0: Tensor, key_1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See :meth:`Gate.soften`."""
        alpha, tau = self.state.alpha, self.state.tau
        masked, energy = MaskedGroups.apply(self.logits, weight, self.groups, key_0, key_1, alpha / tau, 1 / tau)
        return masked, energy.new_tensor(self.groups.kept), energy

    @torch.no_grad()
    def start_from(self, prior: Tensor | None, seed: int) -> None:
        """Lean towards the patterns that share positions with ``prior``; see :meth:`Groups.start`."""
        generator = torch.Generator().manual_seed(noise_keys(seed, -1, 0, self.name)[0])
        self.logits.copy_(self.groups.start(prior, self.spread, self.strength, generator))

    def hard_mask(self) -> Tensor:
        """See :meth:`Gate.hard_mask`; the logits alone decide."""
        return self.groups.best(self.logits.detach())

    @classmethod
    def choose(cls, gates: Mapping[str, Any], sparsity: float) -> None:
        """Nothing to choose: every group has its n of m, and all together have the one sparsity."""

    @classmethod
    def sample_hard_masks(cls, gates: Mapping[str, Any], sparsity: float, stride: int) -> dict[str, Tensor]:
        """See :meth:`Gate.sample_hard_masks`; exact, and only the sampled groups are looked at."""
        return {name: gate.groups.sample_best(gate.logits.detach(), stride) for name, gate in gates.items()}

    @classmethod
    def curves(cls, gates: Mapping[str, Any], stride: int) -> dict[str, float]:
        """How decided the groups are: the mean of the highest softmax(αθ/τ), without noise; 1 is hard."""
        confidence, count = 0.0, 0
        for gate in gates.values():
            logits_PS = gate.logits.detach().flatten(1)[:, ::stride]
            sharpness = (gate.state.alpha / gate.state.tau).to(logits_PS.device)
            confidence += float((logits_PS * sharpness).softmax(0).amax(0).sum())
            count += logits_PS.shape[1]
        return {"mask/confidence": confidence / count}

    def extra_repr(self) -> str:
        """Shown when the model is printed."""
        return f"{tuple(self.shape)}, {self.groups.pattern}"


class MaskedGroups(torch.autograd.Function):
    """(θ, W) → (W̃, Σ(M·W)²), keeping neither mask, softmax nor noise for the backward pass.

    With gradients G of W̃ and b of Σ(M·W)², and d = G·W + 2b·M·W² the gradient of M:
    dθ_p = P_p·(Σ_{j∈p} d_j − Σ_j M_j·d_j)·α/τ.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        weight: Tensor,
        groups: Groups,
        key_0: Tensor,
        key_1: Tensor,
        slope: Tensor,
        sharpness: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Masked weight of the weight's shape and dtype, and the float32 sum."""
        ctx.save_for_backward(logits, weight, key_0, key_1, slope, sharpness)
        ctx.groups = groups
        logits_PQ, weight_QM = flat_patterns(logits), groups.split(weight)
        noise = columns(len(weight_QM), weight.device), key_0, key_1, slope, sharpness
        masked_QM, energy = pattern_kernels(groups.patterns).forward(logits_PQ, weight_QM, *noise)
        return groups.join(masked_QM), energy

    @staticmethod
    def backward(ctx: Any, grad_masked: Tensor, grad_energy: Tensor) -> Any:
        """The gradient of the logits; the weight is frozen."""
        logits, weight, *rest = ctx.saved_tensors
        groups: Groups = ctx.groups
        logits_PQ, weight_QM = flat_patterns(logits), groups.split(weight)
        noise = columns(len(weight_QM), weight.device), *rest
        grad_PQ = pattern_kernels(groups.patterns).backward(
            logits_PQ, weight_QM, groups.split(grad_masked), grad_energy, *noise
        )
        return grad_PQ.view(logits.shape), None, None, None, None, None, None


def flat_patterns(logits: Tensor) -> Tensor:
    """Logits as (P, Q), and no view: of a view, its base's shape would be compiled in."""
    return logits.reshape(len(logits), -1).data


class PatternKernels(NamedTuple):
    """How a weight is masked by patterns, and how the gradient comes back.

    ``forward(logits_PQ, weight_QM, *noise)`` → W̃ (Q, M) in the weight's dtype, Σ(M·W)² in float32;
    ``backward(logits_PQ, weight_QM, grad_masked_QM, grad_energy, *noise)`` → dθ (P, Q) in float32, with noise and
    probabilities made again. ``noise`` is the columns' numbers, the two keys, the slope α/τ and the sharpness 1/τ.
    """

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., Tensor]


@cache
def pattern_kernels(patterns: tuple[Positions, ...]) -> PatternKernels:
    """The kernels for groups with these ``patterns``."""
    return _few_patterns(patterns) if len(patterns) <= FEW else _many_patterns(patterns)


def _few_patterns(patterns: tuple[Positions, ...]) -> PatternKernels:
    """Everything in one pass over memory, the patterns written out one by one."""
    holders = holders_of(patterns)

    def forward(
        logits_PQ: Tensor,
        weight_QM: Tensor,
        column_Q: Tensor,
        key_0: Tensor,
        key_1: Tensor,
        slope: Tensor,
        sharpness: Tensor,
    ) -> tuple[Tensor, Tensor]:
        probabilities = relax(logits_PQ, column_Q, key_0, key_1, slope, sharpness, len(patterns))
        masks = inclusion(probabilities, holders)
        masked = [mask_Q * weight_QM[:, j].to(torch.float32) for j, mask_Q in enumerate(masks)]
        energy_Q = added([masked_Q * masked_Q for masked_Q in masked])
        return torch.stack([masked_Q.to(weight_QM.dtype) for masked_Q in masked], 1), energy_Q.sum()

    def backward(
        logits_PQ: Tensor,
        weight_QM: Tensor,
        grad_masked_QM: Tensor,
        grad_energy: Tensor,
        column_Q: Tensor,
        key_0: Tensor,
        key_1: Tensor,
        slope: Tensor,
        sharpness: Tensor,
    ) -> Tensor:
        probabilities = relax(logits_PQ, column_Q, key_0, key_1, slope, sharpness, len(patterns))
        masks = inclusion(probabilities, holders)
        grads = []
        for j, mask_Q in enumerate(masks):
            weight_Q = weight_QM[:, j].to(torch.float32)
            grad_Q = grad_masked_QM[:, j].to(torch.float32)
            grads.append((grad_Q + 2 * grad_energy * mask_Q * weight_Q) * weight_Q)
        return through_softmax(probabilities, masks, grads, slope, patterns)

    name = f"{len(patterns[0])}_of_{len(holders)}"
    return PatternKernels(
        compiled(own_code(forward, f"nm_forward_{name}")), compiled(own_code(backward, f"nm_backward_{name}"))
    )


def _many_patterns(patterns: tuple[Positions, ...]) -> PatternKernels:
    """In several passes, with the softmax of this one weight in memory.

    Written out one by one, 70 patterns take minutes to compile, and the backward pass is no faster.
    """
    holders = holders_of(patterns)
    table_PM = torch.zeros(len(patterns), len(holders))
    for j, keeping in enumerate(holders):
        table_PM[list(keeping), j] = 1

    def relaxed(logits_PQ: Tensor, *noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        table = table_PM.to(logits_PQ.device)
        P_PQ = torch.softmax(pattern_scores(logits_PQ, *noise), 0)
        return P_PQ, (table.T @ P_PQ).T, table

    def forward(logits_PQ: Tensor, weight_QM: Tensor, *noise: Tensor) -> tuple[Tensor, Tensor]:
        _, mask_QM, _ = relaxed(logits_PQ, *noise)
        masked_QM = mask_QM * weight_QM.to(torch.float32)
        return masked_QM.to(weight_QM.dtype), masked_QM.square().sum()

    def backward(
        logits_PQ: Tensor, weight_QM: Tensor, grad_masked_QM: Tensor, grad_energy: Tensor, *noise: Tensor
    ) -> Tensor:
        P_PQ, mask_QM, table = relaxed(logits_PQ, *noise)
        weight_QM = weight_QM.to(torch.float32)
        grad_QM = (grad_masked_QM.to(torch.float32) + 2 * grad_energy * mask_QM * weight_QM) * weight_QM
        mean_Q = (grad_QM * mask_QM).sum(1)
        *_, slope, _ = noise
        return (table @ grad_QM.T).sub_(mean_Q).mul_(P_PQ).mul_(slope)

    return PatternKernels(forward, backward)


@compiled
def pattern_scores(
    logits_PQ: Tensor, column_Q: Tensor, key_0: Tensor, key_1: Tensor, slope: Tensor, sharpness: Tensor
) -> Tensor:
    """(P, Q): (αθ + g)/τ, float32; the noise is that of :func:`relax`."""
    return slope * logits_PQ + sharpness * gumbel(element_bits(logits_PQ.shape[0], column_Q, key_0, key_1))


def own_code(kernel: Callable[..., Any], name: str) -> Callable[..., Any]:
    """``kernel`` under another name, with a code object of its own.

    torch.compile counts recompilations by code object, and would take the kernels of several patterns, which
    are closures over one code, for one kernel compiled too often.
    """
    assert isinstance(kernel, FunctionType)
    code = kernel.__code__.replace(co_name=name)
    return FunctionType(code, kernel.__globals__, name, kernel.__defaults__, kernel.__closure__)


def relax(
    logits_PQ: Tensor, column_Q: Tensor, key_0: Tensor, key_1: Tensor, slope: Tensor, sharpness: Tensor, count: int
) -> list[Tensor]:
    """P_p = softmax_p((αθ_p + g_p)/τ), float32, one flat tensor for each of ``count`` patterns."""
    # Row p of element_bits(count, …): with p in the key, no rows are made that would have to be kept.
    noise = [gumbel(element_bits(1, column_Q, key_0 ^ p, key_1)[0]) for p in range(count)]
    scores = [slope * logits_PQ[p] + sharpness * noise[p] for p in range(count)]
    highest_Q = scores[0]
    for score_Q in scores[1:]:
        highest_Q = torch.maximum(highest_Q, score_Q)
    powers = [torch.exp(score_Q - highest_Q) for score_Q in scores]
    share_Q = 1 / added(powers)
    return [power_Q * share_Q for power_Q in powers]


def inclusion(probabilities: Sequence[Tensor], holders: Sequence[Positions]) -> list[Tensor]:
    """M_j = Σ over the patterns that keep position j, one flat tensor for each position."""
    return [added([probabilities[p] for p in keeping]) for keeping in holders]


def holders_of(patterns: Sequence[Positions]) -> tuple[Positions, ...]:
    """For each position of a group, the numbers of the ``patterns`` that keep it."""
    size = 1 + patterns[-1][-1]  # the last of the combinations keeps the last position
    return tuple(tuple(p for p, kept in enumerate(patterns) if j in kept) for j in range(size))


def through_softmax(
    probabilities: Sequence[Tensor],
    masks: Sequence[Tensor],
    grads: Sequence[Tensor],
    slope: Tensor,
    patterns: Sequence[Positions],
) -> Tensor:
    """(P, Q): dθ from the gradients of the M_j."""
    mean_Q = added([mask_Q * grad_Q for mask_Q, grad_Q in zip(masks, grads, strict=True)])
    return torch.stack(
        [
            P_Q * (added([grads[j] for j in positions]) - mean_Q) * slope
            for P_Q, positions in zip(probabilities, patterns, strict=True)
        ]
    )


def added(terms: Sequence[Tensor]) -> Tensor:
    """Their sum, without the zero that sum() begins with."""
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total
