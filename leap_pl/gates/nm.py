"""MaskLLM's gate: one categorical variable for each group of m weights, over its patterns that keep n.

Paper: https://arxiv.org/abs/2409.17481. Legend of suffixes: P = patterns, Q = groups, M = elements of a group;
see :mod:`leap_pl.gates.groups`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from leap_pl.base_model.weights import Weight
from leap_pl.distributed.shards import gathered
from leap_pl.errors import UserError
from leap_pl.gates.gate import Gate, GateState
from leap_pl.gates.groups import Groups
from leap_pl.gates.pattern_kernels import pattern_kernels
from leap_pl.inputs.ranges import check_numbers
from leap_pl.kernels.noise import columns, noise_keys
from leap_pl.masks.patterns import NM, Pattern


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
            raise UserError(f"spread {spread} must be above 0 and strength {strength} not below 0.")
        NM(n, m)  # first, for it says more of what is wrong
        check_numbers({"n": n, "m": m, "spread": spread, "strength": strength}, "model.gate.")
        self.n, self.m, self.spread, self.strength = n, m, spread, strength
        self.groups = Groups(n, m, self.shape, self.input_dim)
        device = weight.parameter.device
        logits = torch.zeros(self.groups.logits_shape, dtype=torch.float32, device=device)
        self.logits = nn.Parameter(self.groups.forbid_(logits))

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

    @classmethod
    def form(cls, settings: Mapping[str, Any]) -> str:
        """n:m; see :meth:`Gate.form`."""
        return f"{settings['n']}:{settings['m']}"

    def soften(self, weight: Tensor, key_0: Tensor, key_1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See :meth:`Gate.soften`."""
        state = self.state
        return MaskedGroups.apply(self.logits, weight, self.groups, key_0, key_1, state.slope, state.sharpness)

    @torch.no_grad()
    def start_from(self, prior: Tensor | None, seed: int) -> None:
        """Lean towards the patterns that share positions with ``prior``; see :meth:`Groups.start`."""
        generator = torch.Generator().manual_seed(noise_keys(seed, -1, 0, self.name)[0])
        self.logits.copy_(self.groups.start(prior, self.spread, self.strength, generator))

    def hard_mask(self) -> Tensor:
        """See :meth:`Gate.hard_mask`; the logits alone decide."""
        return self.groups.best(gathered(self.held()))

    @classmethod
    def choose(cls, gates: Mapping[str, Any], sparsity: float) -> None:
        """Nothing to choose: every group has its n of m, and all together have the one sparsity."""

    @classmethod
    def sample_hard_masks(cls, gates: Mapping[str, Any], sparsity: float, stride: int) -> dict[str, Tensor]:
        """See :meth:`Gate.sample_hard_masks`; exact, and only the sampled groups are looked at."""
        return {name: gate.groups.sample_best(gathered(gate.logits.detach()), stride) for name, gate in gates.items()}

    @classmethod
    def curves(cls, gates: Mapping[str, Any], stride: int) -> dict[str, float]:
        """How decided the groups are: the mean of the highest softmax(αθ/τ), without noise; 1 is hard."""
        state = next(iter(gates.values())).state
        samples = [gathered(gate.logits.detach()).flatten(1)[:, ::stride] for gate in gates.values()]
        return {"patterns/confidence": confidence(samples, state.slope)}

    def extra_repr(self) -> str:
        """Shown when the model is printed."""
        return f"{tuple(self.shape)}, {self.groups.pattern}"


class MaskedGroups(torch.autograd.Function):
    """(θ, W) → (W̃, ΣM, Σ(M·W)²), keeping neither mask, softmax nor noise for the backward pass.

    ΣM is constant, and its gradient nothing. With gradients G of W̃ and b of Σ(M·W)², and d = G·W + 2b·M·W² that
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
        """Masked weight of the weight's shape and dtype, and the two float32 sums."""
        ctx.save_for_backward(logits, weight, key_0, key_1, slope, sharpness)
        ctx.groups = groups
        logits_PQ, weight_QM = flat_patterns(logits), groups.split(weight)
        noise = columns(len(weight_QM), weight.device), key_0, key_1, slope, sharpness
        masked_QM, energy = pattern_kernels(groups.patterns).forward(logits_PQ, weight_QM, None, *noise)
        return groups.join(masked_QM), energy.new_tensor(groups.kept), energy

    @staticmethod
    def backward(ctx: Any, grad_masked: Tensor, grad_kept: Tensor, grad_energy: Tensor) -> Any:
        """The gradient of the logits; the weight is frozen."""
        logits, weight, *rest = ctx.saved_tensors
        groups: Groups = ctx.groups
        logits_PQ, weight_QM = flat_patterns(logits), groups.split(weight)
        noise = columns(len(weight_QM), weight.device), *rest
        grad_PQ, _ = pattern_kernels(groups.patterns).backward(
            logits_PQ, weight_QM, None, groups.split(grad_masked), grad_energy, *noise
        )
        return grad_PQ.view(logits.shape), None, None, None, None, None, None


def flat_patterns(logits: Tensor) -> Tensor:
    """Logits as (P, Q), and no view: of a view, its base's shape would be compiled in."""
    return logits.reshape(len(logits), -1).data


def confidence(samples: Sequence[Tensor], slope: Tensor) -> float:
    """How decided groups with the logits ``samples`` (P, any number) are: see :meth:`NMGate.curves`."""
    highest = [(logits_PS.float() * slope.to(logits_PS.device)).softmax(0).amax(0) for logits_PS in samples]
    return float(torch.cat(highest).mean())
