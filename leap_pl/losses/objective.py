"""What a mask is learned against: LM and distillation losses, the sparsity budget, the weight term.

Legend of suffixes: T = predicted tokens, C = tokens of a chunk, V = vocabulary, D = hidden size.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from leap_pl.base_model.backbone import Head
from leap_pl.errors import UserError
from leap_pl.inputs.ranges import check_numbers
from leap_pl.kernels.compiled import compiled
from leap_pl.kernels.noise import columns


@dataclass(frozen=True)
class Objective:
    """Weights of the terms of the training loss; the defaults are the paper's (arXiv 2605.17289).

    loss = lm·CE + distillation·KL + budget·|mean M − ρ| − weight·(1 − t/T)·Σ‖M⊙W‖/Σ‖W‖

    Attributes:
        lm: Of the causal cross-entropy, in nats a token.
        distillation: Of KL(teacher ‖ student), in nats a token, times temperature²; the teacher is the dense
            base model, which costs a forward pass and no memory for weights.
        temperature: Of the distillation's softmaxes.
        budget: Of the distance of the mean mask to the target density ρ (λ_s).
        budget_scope: ``global``: one mean over all gated weights. ``layer``: one for each decoder block, the
            distances added.
        weight: Of the term that favours masks that keep large weights (λ_w); it fades to 0 over the run.
        chunk: Tokens whose logits exist at the same time. Memory is about 4·chunk·V bytes, twice that with
            distillation.
    """

    lm: float = 1.0
    distillation: float = 0.0
    temperature: float = 1.0
    budget: float = 7.0
    budget_scope: Literal["global", "layer"] = "global"
    weight: float = 10.0
    chunk: int = 512

    def __post_init__(self) -> None:
        negative = [k for k in ("lm", "distillation", "budget", "weight") if getattr(self, k) < 0]
        if negative:
            raise UserError(f"objective.{negative[0]} is {getattr(self, negative[0])}; a weight is 0 or more.")
        if self.lm == 0 and self.distillation == 0:
            raise UserError("objective.lm and objective.distillation are both 0: nothing to learn from. Raise one.")
        if self.temperature <= 0 or self.chunk < 1:
            raise UserError("objective.temperature must be above 0 and objective.chunk at least 1.")
        check_numbers(asdict(self), "model.objective.", "objective.")


def language_losses(
    hidden_TD: Tensor, targets_T: Tensor, head: Head, objective: Objective, teacher_TD: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The LM and distillation losses of some tokens, their logits made a chunk at a time.

    The gradient with respect to ``hidden_TD`` is taken in the forward pass, chunk by chunk, so that logits and
    their gradient never exist for more than ``objective.chunk`` tokens; the head is frozen and needs none.

    Args:
        hidden_TD: Last hidden states, after the final norm.
        targets_T: The token that follows each.
        head: Hidden states (C, D) → logits (C, V).
        objective: Weights, temperature and chunk.
        teacher_TD: The dense model's hidden states, where the distillation weight is not 0.

    Returns:
        lm·CE + distillation·KL (with gradient), CE, and KL·temperature² (both detached; KL is 0 without a
        teacher), each a float32 mean over the T tokens.
    """
    return _LanguageLosses.apply(hidden_TD, targets_T, head, objective, teacher_TD)


class _LanguageLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, targets_T: Tensor, head: Head, objective: Objective, teacher_TD: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        wants_grad, device = ctx.needs_input_grad[0], hidden_TD.device
        grad_TD = torch.empty_like(hidden_TD) if wants_grad else None
        lm = torch.zeros((), dtype=torch.float32, device=device)
        kl = torch.zeros_like(lm)
        scale = 1 / len(targets_T)
        # As tensors: of Python numbers each would be compiled in.
        weights = torch.tensor([objective.lm * scale, objective.distillation * scale, objective.temperature])
        lm_weight, kl_weight, temperature = weights.to(device, torch.float32).unbind()
        for start in range(0, len(targets_T), objective.chunk):
            part = slice(start, start + objective.chunk)
            hidden_CD = hidden_TD[part].detach().requires_grad_(wants_grad)
            with torch.set_grad_enabled(wants_grad):
                logits_CV = head(hidden_CD)
            target_C, token_V = targets_T[part].int(), columns(logits_CV.shape[-1], device)
            if teacher_TD is None:
                lm_sum, grad_CV = lm_loss(logits_CV.detach(), target_C, token_V, lm_weight)
            else:
                lm_sum, kl_sum, grad_CV = distillation_loss(
                    logits_CV.detach(), head(teacher_TD[part]), target_C, token_V, lm_weight, kl_weight, temperature
                )
                kl += kl_sum * scale
            lm += lm_sum * scale
            if grad_TD is not None:
                (grad_TD[part],) = torch.autograd.grad(logits_CV, hidden_CD, grad_CV)
        ctx.save_for_backward(*[] if grad_TD is None else [grad_TD])
        ctx.mark_non_differentiable(lm, kl)
        return objective.lm * lm + objective.distillation * kl, lm, kl

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> Any:
        (grad_TD,) = ctx.saved_tensors
        return grad_TD * grad_loss.to(grad_TD.dtype), None, None, None, None


@compiled
def lm_loss(logits_CV: Tensor, target_C: Tensor, token_V: Tensor, lm: Tensor) -> tuple[Tensor, Tensor]:
    """ΣCE, float32, and the gradient of ``lm``·ΣCE in the dtype of the logits: ∂CE/∂z = softmax(z) − onehot.

    Fused, the logits are read three times and written once, and nothing else is as large as they are.
    """
    z_CV = logits_CV.float()
    log_p_CV = z_CV - z_CV.logsumexp(-1, keepdim=True)
    grad_CV = lm * (log_p_CV.exp() - (token_V == target_C[:, None]).float())
    return -log_p_CV.gather(1, target_C[:, None].long()).sum(), grad_CV.to(logits_CV.dtype)


@compiled
def distillation_loss(
    logits_CV: Tensor,
    teacher_CV: Tensor,
    target_C: Tensor,
    token_V: Tensor,
    lm: Tensor,
    distillation: Tensor,
    temperature: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """ΣCE, Σ KL·temperature², and the gradient of their weighted sum.

    ∂CE/∂z = softmax(z) − onehot; ∂(t²·KL)/∂z = t·(softmax(z/t) − softmax(z_teacher/t)).
    """
    z_CV = logits_CV.float()
    log_p_CV = z_CV - z_CV.logsumexp(-1, keepdim=True)
    s_CV, q_CV = z_CV / temperature, teacher_CV.float() / temperature
    log_s_CV = s_CV - s_CV.logsumexp(-1, keepdim=True)
    log_q_CV = q_CV - q_CV.logsumexp(-1, keepdim=True)
    kl_C = (log_q_CV.exp() * (log_q_CV - log_s_CV)).sum(-1)
    grad_CV = lm * (log_p_CV.exp() - (token_V == target_C[:, None]).float())
    grad_CV = grad_CV + distillation * temperature * (log_s_CV.exp() - log_q_CV.exp())
    ce = -log_p_CV.gather(1, target_C[:, None].long()).sum()
    return ce, kl_C.sum() * temperature**2, grad_CV.to(logits_CV.dtype)


def sparsity_budget(
    kept: Mapping[str, Tensor], sizes: Mapping[str, int], density: float, groups: Iterable[Iterable[str]]
) -> Tensor:
    """Σ over groups of |mean M − ρ|: the distance of each group's mean mask to the target density.

    Args:
        kept: Weight name → ΣM, scalars with their gradients.
        sizes: Weight name → number of elements.
        density: ρ.
        groups: Names of the weights that share a mean: one group for a global budget, one for each decoder
            block otherwise.
    """
    distances = []
    for group in groups:
        names = list(group)
        mean = torch.stack([kept[name] for name in names]).sum() / sum(sizes[name] for name in names)
        distances.append((mean - density).abs())
    return torch.stack(distances).sum()


def budget_groups(layers: Mapping[str, int | None], scope: Literal["global", "layer"]) -> list[list[str]]:
    """The names of the weights that share a mean in :func:`sparsity_budget`.

    Args:
        layers: Weight name → index of its decoder block, or None outside the blocks.
        scope: ``global``: all of them are one group; else those of each block are one, and those outside.
    """
    groups: dict[int | None, list[str]] = {}
    for name, layer in layers.items():
        groups.setdefault(None if scope == "global" else layer, []).append(name)
    return list(groups.values())


def kept_norm(energy: Iterable[Tensor], norm: float) -> Tensor:
    """Σ_l ‖M_l ⊙ W_l‖_F / Σ_l ‖W_l‖_F, from each weight's Σ(M·W)² and the dense sum ``norm``."""
    # The gradient of a square root at 0 is infinite: a weight whose mask is all but zero would make it NaN.
    return torch.stack(list(energy)).clamp_min(1e-20).sqrt().sum() / norm
