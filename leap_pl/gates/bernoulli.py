"""LEAP's gate: one Bernoulli variable for each weight, relaxed by a Gumbel-sigmoid.

Paper: https://arxiv.org/abs/2605.17289. Legend of suffixes: R, C = rows and columns of one weight: all
dimensions but the last, and the last.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from leap_pl.base_model.weights import Weight
from leap_pl.gates.collection import Gates
from leap_pl.gates.gate import Gate, GateState
from leap_pl.inputs.ranges import check_numbers
from leap_pl.kernels.compiled import compiled, rows
from leap_pl.kernels.gpu import has_kernels
from leap_pl.kernels.noise import columns, element_bits, initial_noise, logistic_in_bits
from leap_pl.kernels.powers import exp2
from leap_pl.masks.top_k import Cut, exact_top_k

MAX_WEIGHTS = 32  # weights of one autograd node, and so of one launch


class BernoulliGates(Gates["BernoulliGate"]):
    """All Bernoulli gates of a model: one threshold (cut) for all their logits."""

    def choose(self, sparsity: float) -> None:
        """Keep the round((1 − sparsity)·N) highest of the N logits of all gates, ties by index."""
        cuts = exact_top_k(self.held(), self.numel - round(sparsity * self.numel))
        for gate, cut in zip(self.values(), cuts, strict=True):
            gate.cut = cut

    def sample_hard_masks(self, sparsity: float, stride: int) -> dict[str, Tensor]:
        """Return samples of the hard masks (:meth:`.Gates.sample_hard_masks`); the cut is that of the samples."""
        samples = self.samples(stride)
        together = torch.cat(list(samples.values()))  # ranked as they are apart, with fewer host syncs
        (cut,) = exact_top_k([together], len(together) - round(sparsity * len(together)))
        masks = cut.mask(together).split([len(sample) for sample in samples.values()])
        return dict(zip(samples, masks, strict=True))

    def curves(self, stride: int) -> dict[str, float]:
        """Return the share of logits above 0: the density a cut at 0 would give."""
        above = torch.cat(list(self.samples(stride).values())) > 0
        return {"density/logits_above_0": float(above.sum() / above.numel())}


class BernoulliGate(Gate):
    """LEAP's gate: M = σ((α·θ + g)/τ), W̃ = M ⊙ W, with one logit θ for each weight and g ~ Logistic(0, 1).

    .. code-block:: yaml

        gate:
          class_path: BernoulliGate
          init_args: {spread: 0.014, strength: 3.0}

    The noise is the difference of two Gumbel variables, as in the authors' code; with one Gumbel variable, as
    printed in the paper, the density would start at .534 instead of one half. Training always uses the soft mask;
    the hard mask keeps the highest logits, exactly as many as the sparsity leaves.
    """

    collection = BernoulliGates
    takes_grades = True

    def __init__(self, weight: Weight, state: GateState, spread: float = 0.014, strength: float = 3.0) -> None:
        """Create a gate for ``weight``.

        Args:
            weight: Weight to gate.
            state: State shared by the gates of the model.
            spread: Standard deviation of the initial logits.
            strength: Shift of an initial logit away from 0 by the prior, in units of ``spread``; the maximum of it,
                for a graded prior.
        """
        super().__init__(weight, state)
        check_numbers({"spread": spread, "strength": strength}, "model.gate.")
        self.spread, self.strength = spread, strength
        self.logits = nn.Parameter(torch.zeros(self.shape, dtype=torch.float32, device=weight.parameter.device))
        self.cut = Cut(0.0, 0)

    def settings(self) -> dict[str, Any]:
        """Return spread and strength; see :meth:`Gate.settings`."""
        return {"spread": self.spread, "strength": self.strength}

    def soften(self, weight: Tensor, key_0: Tensor, key_1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the relaxed masked weight and its sums; see :meth:`Gate.soften`."""
        noise = Noise((int(key_0), int(key_1)), self.state.slope, self.state.sharpness)
        masked, kept, energy = MaskedWeights.apply(noise, self.logits, weight)
        return masked, kept, energy

    @classmethod
    def soften_all(
        cls, gates: "Sequence[BernoulliGate]", weights: Sequence[Tensor]
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Compute the weights of a block in one autograd node, and on a GPU in one launch; see :meth:`Gate.soften_all`.

        Logits of one data type and weights of one data type make one node, of at most MAX_WEIGHTS weights.
        """
        logits = [gate.logits for gate in gates]
        alike: dict[Any, list[int]] = {}
        for index, (logit, weight) in enumerate(zip(logits, weights, strict=True)):
            alike.setdefault((logit.dtype, weight.dtype, weight.device), []).append(index)
        if len(alike) == 1 and len(gates) <= MAX_WEIGHTS:
            return list(_softened(gates, [*logits, *weights]))
        softened: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        for found in alike.values():
            for start in range(0, len(found), MAX_WEIGHTS):
                some = found[start : start + MAX_WEIGHTS]
                tensors = [*(logits[i] for i in some), *(weights[i] for i in some)]
                softened |= zip(some, _softened([gates[i] for i in some], tensors), strict=True)
        return [softened[index] for index in range(len(gates))]

    @torch.no_grad()
    def start_from(self, prior: Tensor | None, seed: int) -> None:
        """Initialise θ = N(0, spread²) ± strength·spread, with plus where the mask ``prior`` keeps the weight.

        A graded prior (float, −1 to 1) shifts the logit by strength·spread·prior.
        """
        start = initial_noise(self.shape, self.spread, seed, self.name)
        if prior is not None:
            lean = prior.cpu().to(torch.float32)
            if prior.dtype == torch.bool:
                lean = lean * 2 - 1
            start += lean * (self.strength * self.spread)
        self.logits.copy_(start)

    def hard_mask(self) -> Tensor:
        """Return the mask of the logits above the cut; see :meth:`Gate.hard_mask`."""
        return self.cut.mask(self.held())


def _softened(gates: Sequence[BernoulliGate], tensors: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield masked weight and sums of each gate from one autograd node; ``tensors`` are logits, then weights."""
    state, count = gates[0].state, len(gates)
    keys = [key for gate in gates for key in gate.key_numbers()]
    results = MaskedWeights.apply(Noise(tuple(keys), state.slope, state.sharpness), *tensors)
    return zip(results[:count], results[count : 2 * count], results[2 * count :], strict=True)


class Noise:
    """Arguments of the mask kernels: the noise keys of each weight, and the annealed slope and sharpness.

    Attributes:
        keys: Two noise keys for each weight.
        slope: α/τ, float32 scalar tensor on the CPU.
        sharpness: 1/τ, likewise.
    """

    def __init__(self, keys: tuple[int, ...], slope: Tensor, sharpness: Tensor) -> None:
        self.keys, self.slope, self.sharpness = keys, slope, sharpness

    @cached_property
    def pairs(self) -> tuple[Tensor, ...]:
        """Return the two keys of each weight as an int32 tensor on the CPU."""
        return torch.tensor(self.keys, dtype=torch.int32, device="cpu").view(-1, 2).unbind()


class MaskedWeights(torch.autograd.Function):
    """Autograd function (θ₁ … θₙ, W₁ … Wₙ) → (W̃₁ … W̃ₙ, ΣM₁ … ΣMₙ, Σ(M₁·W₁)² … Σ(Mₙ·Wₙ)²).

    The backward pass recomputes masks and noise. For each weight, with m = M and the gradients G of W̃, a of ΣM and b
    of Σ(M·W)²: dθ = (G·W + a + 2b·m·W²) · m(1 − m) · α/τ.
    """

    @staticmethod
    def forward(ctx: Any, noise: Noise, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return the masked weights, in their weights' shapes and dtypes, and the sums in float32."""
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        # Never written to, not even the column numbers, which all steps share: it need not be checked for changes.
        ctx.noise = noise
        logits, weights = _halves(tensors)
        if has_kernels(weights[0].device):
            slope, sharpness = float(noise.slope), float(noise.sharpness)
            masked, sums = torch.ops.leap_pl.mask_forward(logits, weights, noise.keys, slope, sharpness)
            return *masked, *sums.unbind()
        calls = [
            (rows(logit), rows(weight), columns(weight.shape[-1], weight.device), keys)
            for logit, weight, keys in zip(logits, weights, noise.pairs, strict=True)
        ]
        masked_RC, kept, energy = zip(*mask_forward.each(calls, (noise.slope, noise.sharpness)), strict=True)
        return *map(_shaped, masked_RC, weights), *kept, *energy

    @staticmethod
    def backward(ctx: Any, *given: Tensor | None) -> Any:
        """Return the gradients of the logits; the weights are frozen."""
        noise: Noise = ctx.noise
        logits, weights = _halves(ctx.saved_tensors)
        count = len(weights)
        zeros = _zeros(2, weights[0].device)  # not one: a kernel's arguments are different tensors
        masked = [torch.zeros_like(w) if g is None else g for g, w in zip(given, weights, strict=False)]
        kept = [zeros[0] if grad is None else grad for grad in given[count : 2 * count]]
        energy = [zeros[1] if grad is None else grad for grad in given[2 * count :]]
        if has_kernels(weights[0].device):
            slope, sharpness = float(noise.slope), float(noise.sharpness)
            sums = torch.stack([*kept, *energy])
            grads = torch.ops.leap_pl.mask_backward(logits, weights, masked, sums, noise.keys, slope, sharpness)
        else:
            calls = [
                (rows(logit), rows(weight), rows(grad), *sums, columns(weight.shape[-1], weight.device), keys)
                for logit, weight, grad, keys, *sums in zip(
                    logits, weights, masked, noise.pairs, kept, energy, strict=True
                )
            ]
            grads = map(_shaped, mask_backward.each(calls, (noise.slope, noise.sharpness)), logits)
        return None, *grads, *[None] * count


def _shaped(tensor_RC: Tensor, like: Tensor) -> Tensor:
    return tensor_RC if like.ndim == 2 else tensor_RC.view(like.shape)  # a view takes half as long as a kernel's call


def _halves(tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    half = len(tensors) // 2
    return tensors[:half], tensors[half:]


@lru_cache(maxsize=16)
def _zeros(count: int, device: torch.device) -> tuple[Tensor, ...]:
    return torch.zeros(count, dtype=torch.float32, device=device).unbind()


def soft_mask(
    logits_RC: Tensor, column_C: Tensor, key_0: Tensor, key_1: Tensor, slope: Tensor, sharpness: Tensor
) -> Tensor:
    """Compute M = σ((αθ + g)/τ) in float32, from the ``slope`` α/τ and the ``sharpness`` 1/τ."""
    noise_RC = logistic_in_bits(element_bits(logits_RC.shape[0], column_C, key_0, key_1))
    down = slope * -1.4426950408889634  # −log₂ e
    return 1 / (1 + exp2(down * logits_RC.to(torch.float32) - sharpness * noise_RC))


@partial(compiled, varying=2)
def mask_forward(
    logits_RC: Tensor,
    weight_RC: Tensor,
    column_C: Tensor,
    keys: Tensor,
    slope: Tensor,
    sharpness: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute W̃ in the weight's dtype, ΣM and Σ(M·W)² in float32.

    On a CPU the operations after the noise, which needs rows and columns, run on flattened tensors: torch.compile
    then makes two loops, with the x of 2ˣ between them in the cache, as it does for the backward pass by itself.
    A single loop would stall at each vector on the long chain of operations, and take a third longer.
    """
    mask, weight = soft_mask(logits_RC, column_C, keys[0], keys[1], slope, sharpness), weight_RC
    if mask.is_cpu:
        mask, weight = mask.view(-1), weight.reshape(-1)
    masked = mask * weight.to(torch.float32)
    # First along each row, if there are rows: a sum over all elements at once compiles to slower code.
    return masked.to(weight.dtype).view(weight_RC.shape), mask.sum(-1).sum(), (masked * masked).sum(-1).sum()


@partial(compiled, varying=3)  # autograd makes gradients of the dtypes and sizes of what they belong to
def mask_backward(
    logits_RC: Tensor,
    weight_RC: Tensor,
    grad_masked_RC: Tensor,
    grad_kept: Tensor,
    grad_energy: Tensor,
    column_C: Tensor,
    keys: Tensor,
    slope: Tensor,
    sharpness: Tensor,
) -> Tensor:
    """Compute dθ in the logits' dtype; noise and mask are recomputed."""
    kind = logits_RC.dtype
    mask_RC = soft_mask(logits_RC, column_C, keys[0], keys[1], slope, sharpness)
    weight_RC = weight_RC.to(torch.float32)
    grad_masked_RC = grad_masked_RC.to(torch.float32) + 2 * grad_energy * mask_RC * weight_RC
    return ((grad_masked_RC * weight_RC + grad_kept) * (mask_RC - mask_RC * mask_RC) * slope).to(kind)
