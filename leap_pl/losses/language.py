"""Fused LM and distillation losses, whose logits are computed one chunk of tokens at a time.

Legend of suffixes: T = predicted tokens, C = tokens in a chunk, V = vocabulary, D = hidden size.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from leap_pl.kernels.compiled import compiled, scalar
from leap_pl.kernels.gpu import has_kernels
from leap_pl.kernels.noise import columns

if TYPE_CHECKING:
    from leap_pl.losses.objective import Objective

Logits = Callable[[Tensor], Tensor]  # hidden states (C, D) → logits (C, V)


class LanguageLosses(NamedTuple):
    """Result of :func:`language_losses`: float32 means over the tokens.

    Attributes:
        weighted: Weighted sum lm·CE + distillation·KL·temperature², with its gradient.
        lm: Cross-entropy CE, detached.
        distillation: Divergence KL·temperature², detached; 0 without a teacher.
    """

    weighted: Tensor
    lm: Tensor
    distillation: Tensor


def language_losses(
    hidden_TD: Tensor,
    targets_T: Tensor,
    head: Logits,
    mix: "Objective",
    teacher_TD: Tensor | None = None,
    teacher_head: Logits | None = None,
    learned: Sequence[Tensor] = (),
) -> LanguageLosses:
    """Return the LM and distillation losses, computing the logits one chunk of tokens at a time.

    The gradients are computed in the forward pass, chunk by chunk, so that logits and their gradient never exist for
    more than ``mix.chunk`` tokens.

    Args:
        hidden_TD: Last hidden states, after the final norm.
        targets_T: Token that follows each.
        head: Function from hidden states (C, D) to logits (C, V).
        mix: Weights, temperature and chunk size.
        teacher_TD: Hidden states of the dense model, if the distillation weight is not 0.
        teacher_head: Head of the dense model, by default ``head``.
        learned: Parameters of the head that get a gradient; the others are frozen.
    """
    heads = head, teacher_head or head
    return LanguageLosses(*_Fused.apply(hidden_TD, targets_T, heads, mix, teacher_TD, *learned))


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        targets_T: Tensor,
        heads: tuple[Logits, Logits],
        mix: "Objective",
        teacher_TD: Tensor | None,
        *learned: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        (head, teacher_head), wants_grad, device = heads, any(ctx.needs_input_grad), hidden_TD.device
        sums = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in learned] if wants_grad else []
        small = hidden_TD.dtype == torch.float16
        grad_TD = torch.empty_like(hidden_TD, dtype=torch.float32 if small else None) if wants_grad else None
        lm = torch.zeros((), dtype=torch.float32, device=device)
        kl = torch.zeros_like(lm)
        scale = 1 / len(targets_T)
        # As tensors: the compiled functions would be recompiled for each Python number.
        temperature, late = scalar(mix.temperature), 1.0
        lm_weight, kl_weight = scalar(mix.lm * scale), scalar(mix.distillation * scale)
        for start in range(0, len(targets_T), mix.chunk):
            part = slice(start, start + mix.chunk)
            hidden_CD = hidden_TD[part].detach().requires_grad_(wants_grad)
            with torch.set_grad_enabled(wants_grad):
                logits_CV = head(hidden_CD)
            if torch.float16 in (hidden_TD.dtype, logits_CV.dtype) and late == 1:
                # Divided by the number of tokens, most gradients of logits would be too small for float16, and the
                # scaler's factor comes too late.
                late, lm_weight, kl_weight = scale, scalar(mix.lm), scalar(mix.distillation)
            target_C, token_V = targets_T[part].int(), columns(logits_CV.shape[-1], device)
            if teacher_TD is None:
                lm_sum, grad_CV = _lm_loss(logits_CV.detach(), target_C, token_V, lm_weight)
            else:
                dense_CV, weights = teacher_head(teacher_TD[part]), (lm_weight, kl_weight, temperature)
                lm_sum, kl_sum, grad_CV = _distillation_loss(logits_CV.detach(), dense_CV, target_C, token_V, *weights)
                kl += kl_sum * scale
            lm += lm_sum * scale
            if grad_TD is not None:
                # The graph of a gated head is also that of its budget, whose backward pass is still to come. Like that
                # one, this pass computes in the data types of the forward pass, whatever autocast would choose now.
                with torch.autocast(device.type, enabled=False):
                    found = torch.autograd.grad(logits_CV, (hidden_CD, *learned), grad_CV, retain_graph=bool(learned))
                grad_TD[part], *grads = found if late == 1 else (grad.float() * late for grad in found)
                for total, grad in zip(sums, grads, strict=True):
                    total += grad
        grads = [total.to(parameter.dtype) for total, parameter in zip(sums, learned, strict=False)]
        ctx.save_for_backward(*[] if grad_TD is None else [grad_TD, *grads])
        ctx.dtype = hidden_TD.dtype
        ctx.mark_non_differentiable(lm, kl)
        return mix.lm * lm + mix.distillation * kl, lm, kl

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> Any:
        # In float16 the loss may be scaled by more than the largest number, and bfloat16 rounds a third by .2%.
        grad_TD, *grads = (
            grad.float().mul_(grad_loss).to(grad.dtype) if grad.dtype.itemsize == 2 else grad * grad_loss.to(grad.dtype)
            for grad in ctx.saved_tensors
        )
        return grad_TD.to(ctx.dtype), None, None, None, None, *grads


def _lm_loss(logits_CV: Tensor, target_C: Tensor, token_V: Tensor, lm: Tensor) -> tuple[Tensor, Tensor]:
    if has_kernels(logits_CV.device):
        return torch.ops.leap_pl.lm_loss(logits_CV, target_C, float(lm))
    return lm_loss(logits_CV, target_C, token_V, lm)


def _distillation_loss(
    logits_CV: Tensor, teacher_CV: Tensor, target_C: Tensor, token_V: Tensor, *weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    if has_kernels(logits_CV.device):
        return torch.ops.leap_pl.distillation_loss(logits_CV, teacher_CV, target_C, *map(float, weights))
    return distillation_loss(logits_CV, teacher_CV, target_C, token_V, *weights)


@compiled
def lm_loss(logits_CV: Tensor, target_C: Tensor, token_V: Tensor, lm: Tensor) -> tuple[Tensor, Tensor]:
    """Return ΣCE, float32, and the gradient of ``lm``·ΣCE in the dtype of the logits: ∂CE/∂z = softmax(z) − onehot.

    Fused, it reads the logits three times, writes once, and allocates nothing else of their size.
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
    """Return ΣCE, Σ KL·temperature², and the gradient of their weighted sum.

    ∂CE/∂z = softmax(z) − onehot; ∂(t²·KL)/∂z = t·(softmax(z/t) − softmax(z_teacher/t)).
    """
    z_CV = logits_CV.float()
    log_p_CV = z_CV - z_CV.logsumexp(-1, keepdim=True)
    s_CV, q_CV = z_CV / temperature, teacher_CV.float() / temperature
    log_s_CV = s_CV - s_CV.logsumexp(-1, keepdim=True)
    log_q_CV = q_CV - q_CV.logsumexp(-1, keepdim=True)
    # A token that both rule out, with logits of −∞, adds nothing: 0·(−∞ + ∞) would be NaN.
    q_CV = log_q_CV.exp()
    kl_C = torch.where(q_CV > 0, q_CV * (log_q_CV - log_s_CV), 0.0).sum(-1)
    grad_CV = lm * (log_p_CV.exp() - (token_V == target_C[:, None]).float())
    grad_CV = grad_CV + distillation * temperature * (log_s_CV.exp() - q_CV)
    ce = -log_p_CV.gather(1, target_C[:, None].long()).sum()
    return ce, kl_C.sum() * temperature**2, grad_CV.to(logits_CV.dtype)
