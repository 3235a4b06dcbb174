"""MaskLLM's gate: one categorical variable for each group of m weights, over the patterns that keep n of them.

Paper: https://arxiv.org/abs/2409.17481. Legend of suffixes: P = patterns, Q = groups, M = elements of a group;
see :mod:`leap_pl.gates.groups`.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from leap_pl.base_model.weights import Weight
from leap_pl.distributed.shards import gathered
from leap_pl.errors import UserError
from leap_pl.gates.collection import Gates
from leap_pl.gates.gate import Gate, GateState
from leap_pl.gates.groups import Groups, scaled
from leap_pl.gates.pattern_kernels import pattern_kernels
from leap_pl.inputs.ranges import check_numbers
from leap_pl.kernels.noise import columns, initial_noise
from leap_pl.masks.patterns import NM, Pattern


class NMGates(Gates["NMGate"]):
    """All n:m gates of a model; each group keeps n of m, so there is no joint choice."""

    @property
    def form(self) -> str:
        """Return the pattern, n:m."""
        return str(self.first.groups.pattern)

    def exact_sparsity(self, sparsity: float) -> float:
        """Return 1 − n/m; see :meth:`.Gates.exact_sparsity`."""
        pattern = self.first.groups.pattern
        if abs(sparsity - pattern.sparsity) > 1e-3:
            raise UserError(
                f"model.sparsity is {sparsity:g}, and {pattern} gates remove {pattern.sparsity:g}. "
                f"Set --model.sparsity {pattern.sparsity:g}, or another n and m."
            )
        return pattern.sparsity

    def prior_forms(self, sparsity: float) -> dict[str, Pattern]:
        """Return a prior of the gates' own pattern; see :meth:`.Gates.prior_forms`."""
        return {"prior": self.first.groups.pattern}

    def sample_hard_masks(self, sparsity: float, stride: int) -> dict[str, Tensor]:
        """Sample the hard masks exactly, computing the sampled groups only; see :meth:`.Gates.sample_hard_masks`."""
        return {name: gate.groups.sample_best(gathered(gate.logits.detach()), stride) for name, gate in self.items()}

    def curves(self, stride: int) -> dict[str, float]:
        """Return the confidence of the groups: the mean of their maximum of softmax(αθ/τ), without noise; 1 is hard."""
        # Copies: a view would hold the logits of the whole model, which a sharded run gathers one weight at a time.
        samples = [gathered(gate.logits.detach()).flatten(1)[:, ::stride].clone() for gate in self.values()]
        return {"patterns/confidence": confidence(samples, self.first.state.slope)}


class NMGate(Gate):
    """MaskLLM's gate: P = softmax((α·θ + g)/τ) over the patterns of a group, M = Σ_p P_p·pattern_p, W̃ = M ⊙ W.

    .. code-block:: yaml

        model:
          sparsity: 0.5
          gate:
            class_path: NMGate
            init_args: {n: 2, m: 4, spread: 0.01, strength: 3.0}
          objective: {budget: 0}     # constant: every choice of patterns has the same density
          annealing:
            alpha: {start: 100, end: 500}
            tau: {start: 4, end: 0.05}

    θ is one logit for each of the C(m, n) patterns of each group of m consecutive inputs (6 for the 4 weights of
    a 2:4 group), g is Gumbel noise. α is the paper's logit scale κ. The hard mask is the pattern of the highest
    logit: exactly n of every m, independently of the other groups. ΣM is constant, so the sparsity budget
    contributes nothing. Where m does not divide the inputs, the last group is short: of its r inputs n·r/m are
    kept, rounded, as in one-shot pruning.
    """

    collection = NMGates
    method: ClassVar[str] = "maskllm"

    def __init__(
        self, weight: Weight, state: GateState, n: int = 2, m: int = 4, spread: float = 0.01, strength: float = 3.0
    ) -> None:
        """Create a gate for ``weight``.

        Args:
            weight: Weight to gate.
            state: State shared by the gates of the model.
            n: Number of weights kept in each group.
            m: Number of consecutive inputs in a group.
            spread: Standard deviation of the initial logits.
            strength: Shift of a pattern's initial logit for each position it shares with the prior, in units of
                ``spread``.
        """
        super().__init__(weight, state)
        NM(n, m)  # first, because its message is more specific
        check_numbers({"n": n, "m": m, "spread": spread, "strength": strength}, "model.gate.")
        self.n, self.m, self.spread, self.strength = n, m, spread, strength
        self.groups = Groups(n, m, self.shape, self.input_dim)
        device = weight.parameter.device
        logits = torch.zeros(self.groups.logits_shape, dtype=torch.float32, device=device)
        self.logits = nn.Parameter(self.groups.forbid_(logits))

    def settings(self) -> dict[str, Any]:
        """Return n, m, spread and strength; see :meth:`Gate.settings`."""
        return {"n": self.n, "m": self.m, "spread": self.spread, "strength": self.strength}

    def soften(self, weight: Tensor, key_0: Tensor, key_1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the relaxed masked weight and its sums; see :meth:`Gate.soften`."""
        state = self.state
        return MaskedGroups.apply(self.logits, weight, self.groups, key_0, key_1, state.slope, state.sharpness)

    @torch.no_grad()
    def start_from(self, prior: Tensor | None, seed: int) -> None:
        """Initialise the logits, shifted to patterns that share positions with ``prior`` (:meth:`Groups.shift_`)."""
        start = initial_noise(self.groups.logits_shape, self.spread, seed, self.name)
        self.logits.copy_(self.groups.shift_(start, prior, self.strength * self.spread))

    def hard_mask(self) -> Tensor:
        """Return the mask of the patterns with the highest logits; see :meth:`Gate.hard_mask`."""
        return self.groups.best(gathered(self.held()))

    def extra_repr(self) -> str:
        """Return the summary that is shown when the model is printed."""
        return f"{tuple(self.shape)}, {self.groups.pattern}"


class MaskedGroups(torch.autograd.Function):
    """Autograd function (θ, W) → (W̃, ΣM, Σ(M·W)²) whose backward pass recomputes mask, softmax and noise.

    ΣM is constant, so its gradient is zero. With the gradients G of W̃ and b of Σ(M·W)², and d = G·W + 2b·M·W² that
    of M: dθ_p = P_p·(Σ_{j∈p} d_j − Σ_j M_j·d_j)·α/τ.
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
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the masked weight, in the weight's shape and dtype, and the two sums in float32."""
        ctx.save_for_backward(logits, weight, key_0, key_1, slope, sharpness)
        ctx.groups = groups
        logits_PQ, weight_QM = flat_patterns(logits), groups.split(weight)
        noise = columns(len(weight_QM), weight.device), key_0, key_1, slope, sharpness
        masked_QM, energy = pattern_kernels(groups.patterns).forward(logits_PQ, weight_QM, None, *noise)
        return groups.join(masked_QM), torch.full_like(energy, groups.kept), energy

    @staticmethod
    def backward(ctx: Any, grad_masked: Tensor, grad_kept: Tensor, grad_energy: Tensor) -> Any:
        """Return the gradient of the logits; the weight is frozen."""
        logits, weight, *rest = ctx.saved_tensors
        groups: Groups = ctx.groups
        logits_PQ, weight_QM = flat_patterns(logits), groups.split(weight)
        noise = columns(len(weight_QM), weight.device), *rest
        grad_PQ, _ = pattern_kernels(groups.patterns).backward(
            logits_PQ, weight_QM, None, groups.split(grad_masked), grad_energy, *noise
        )
        return grad_PQ.view(logits.shape), None, None, None, None, None, None


def flat_patterns(logits: Tensor) -> Tensor:
    """Return the logits as (P, Q) that is no view: torch.compile specialises on the shape of a view's base."""
    return logits.reshape(len(logits), -1).data


def confidence(samples: Sequence[Tensor], slope: Tensor) -> float:
    """Return the confidence (:meth:`NMGates.curves`) of groups with the logits ``samples``, each (P, any number)."""
    highest = [scaled(logits_PS, slope).softmax(0).amax(0) for logits_PS in samples]
    return float(torch.cat(highest).mean())
