"""What a mask is learned against: LM and distillation losses, the sparsity budget, the weight term.

Legend of suffixes: T = predicted tokens, C = tokens of a chunk, V = vocabulary, D = hidden size.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

States = Callable[[Tensor], Tensor]
Head = Callable[[Tensor], Tensor]


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
        chunk: Tokens whose logits exist at the same time. Memory is about 12·chunk·V bytes.
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
            raise ValueError(f"objective.{negative[0]} is {getattr(self, negative[0])}; a weight is 0 or more.")
        if self.lm == 0 and self.distillation == 0:
            raise ValueError("objective.lm and objective.distillation are both 0: nothing to learn from. Raise one.")
        if self.temperature <= 0 or self.chunk < 1:
            raise ValueError("objective.temperature must be above 0 and objective.chunk at least 1.")


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
        wants_grad = ctx.needs_input_grad[0]
        grad_TD = torch.empty_like(hidden_TD) if wants_grad else None
        lm = torch.zeros((), dtype=torch.float32, device=hidden_TD.device)
        kl = torch.zeros_like(lm)
        scale = 1 / len(targets_T)
        for start in range(0, len(targets_T), objective.chunk):
            part = slice(start, start + objective.chunk)
            hidden_CD = hidden_TD[part].detach().requires_grad_(wants_grad)
            with torch.set_grad_enabled(wants_grad):
                logits_CV = head(hidden_CD)
            teacher_CV = head(teacher_TD[part]) if teacher_TD is not None else None
            lm_sum, kl_sum, grad_CV = _losses_and_grad(logits_CV.detach(), targets_T[part], teacher_CV, objective)
            lm += lm_sum * scale
            kl += kl_sum * scale
            if grad_TD is not None:
                (grad_TD[part],) = torch.autograd.grad(logits_CV, hidden_CD, (grad_CV * scale).to(logits_CV.dtype))
        ctx.save_for_backward(*[] if grad_TD is None else [grad_TD])
        ctx.mark_non_differentiable(lm, kl)
        return objective.lm * lm + objective.distillation * kl, lm, kl

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> Any:
        (grad_TD,) = ctx.saved_tensors
        return grad_TD * grad_loss.to(grad_TD.dtype), None, None, None, None


def _losses_and_grad(
    logits_CV: Tensor, targets_C: Tensor, teacher_CV: Tensor | None, objective: Objective
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over the chunk of CE and of KL·temperature², and the gradient of their weighted sum, float32.

    ∂CE/∂z = softmax(z) − onehot; ∂(t²·KL)/∂z = t·(softmax(z/t) − softmax(z_teacher/t)).
    """
    logits_CV = logits_CV.float()
    log_p_CV = logits_CV.log_softmax(-1)
    lm = -log_p_CV.gather(1, targets_C[:, None]).sum()
    if teacher_CV is None:
        grad_CV = log_p_CV.exp_().mul_(objective.lm)
        kl = torch.zeros_like(lm)
    else:
        t = objective.temperature
        log_q_CV = (teacher_CV.float() / t).log_softmax(-1)
        log_s_CV = log_p_CV if t == 1 else (logits_CV / t).log_softmax(-1)
        q_CV = log_q_CV.exp()
        kl = (q_CV * (log_q_CV - log_s_CV)).sum() * t**2
        grad_CV = (log_s_CV.exp() - q_CV).mul_(objective.distillation * t)
        if objective.lm:
            grad_CV += log_p_CV.exp_().mul_(objective.lm)
    if objective.lm:
        ones_C1 = torch.full((len(targets_C), 1), -objective.lm, device=grad_CV.device, dtype=grad_CV.dtype)
        grad_CV.scatter_add_(1, targets_C[:, None], ones_C1)
    return lm, kl, grad_CV


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


def kept_norm(energy: Iterable[Tensor], norm: float) -> Tensor:
    """Σ_l ‖M_l ⊙ W_l‖_F / Σ_l ‖W_l‖_F, from each weight's Σ(M·W)² and the dense sum ``norm``."""
    # The gradient of a square root at 0 is infinite: a weight whose mask is all but zero would make it NaN.
    return torch.stack(list(energy)).clamp_min(1e-20).sqrt().sum() / norm


def split_model(model: nn.Module) -> tuple[States, Head]:
    """``model`` as two functions: token ids (B, L) → last hidden states (B, L, D), and those (C, D) → logits (C, V).

    The second one scales and soft-caps as the families do, and is checked against the model's own logits.
    A family that makes them in yet another way is taken whole: its logits stand in for the hidden states, at
    the price of their memory, with a warning.
    """
    causal: Any = model
    projection = causal.get_output_embeddings()
    config = causal.config.get_text_config()
    times = getattr(config, "logit_scale", None) or 1.0  # Cohere
    over = getattr(config, "logits_scaling", None) or 1.0  # Granite
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2 and later

    def states(input_ids: Tensor) -> Tensor:
        return causal.base_model(input_ids=input_ids, use_cache=False).last_hidden_state

    def head(hidden_CD: Tensor) -> Tensor:
        logits_CV = projection(hidden_CD)
        if times != 1 or over != 1:
            logits_CV = logits_CV * times / over
        return logits_CV if cap is None else cap * torch.tanh(logits_CV / cap)

    if projection is not None and _agrees(causal, states, head):
        return states, head
    warnings.warn(
        f"{type(model).__name__} makes its logits in a way that is not known here: the loss is taken from its own "
        "logits, which exist whole for each micro-batch (tokens × vocabulary × 4 bytes, several times over).",
        stacklevel=2,
    )
    return (lambda input_ids: causal(input_ids=input_ids, use_cache=False).logits), (lambda logits_CV: logits_CV)


@torch.no_grad()
def _agrees(causal: Any, states: States, head: Head) -> bool:
    ids = torch.arange(8, device=next(causal.parameters()).device)[None]
    was_training = causal.training
    causal.eval()
    expected = causal(input_ids=ids, use_cache=False).logits[0].float()
    try:
        found = head(states(ids)[0]).float()
    except (AttributeError, RuntimeError, TypeError):
        return False
    finally:
        causal.train(was_training)
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=0.02, atol=0.02)
