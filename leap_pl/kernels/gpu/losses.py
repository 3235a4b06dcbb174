"""LM and distillation losses of a chunk of tokens on a GPU, with their gradient: one program for each token.

Each program reads its row of logits twice: for the normalisers, which are updated block by block, and for the gradient.
Legend of suffixes: C = tokens of the chunk, V = vocabulary; B = one block of a row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # tokens of the vocabulary at a time


@triton.jit
def _normalise(highest, total, score_B):
    """Return the maximum and Σ exp(score − maximum) after another block; −inf is a score beyond the vocabulary."""
    new = tl.maximum(highest, tl.max(score_B))
    base = tl.where(new == -float("inf"), 0.0, new)  # of scores that are all −inf; −inf − −inf would be NaN
    return new, total * tl.exp(highest - base) + tl.sum(tl.exp(score_B - base))


@triton.jit
def _lm(logits, targets, losses, grads, lm, vocabulary, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * vocabulary
    highest, total = -float("inf"), 0.0
    for first in range(0, vocabulary, BLOCK):
        token_B = first + tl.arange(0, BLOCK)
        z_B = tl.load(logits + row + token_B, token_B < vocabulary, -float("inf")).to(tl.float32)
        highest, total = _normalise(highest, total, z_B)
    normaliser = highest + tl.log(total)
    target = tl.load(targets + tl.program_id(0))
    tl.store(losses + tl.program_id(0), normaliser - tl.load(logits + row + target).to(tl.float32))
    for first in range(0, vocabulary, BLOCK):
        token_B = first + tl.arange(0, BLOCK)
        z_B = tl.load(logits + row + token_B, token_B < vocabulary, 0).to(tl.float32)
        grad_B = lm * (tl.exp(z_B - normaliser) - (token_B == target).to(tl.float32))
        tl.store(grads + row + token_B, grad_B.to(grads.dtype.element_ty), token_B < vocabulary)


@triton.jit
def _distillation(
    logits, teachers, targets, losses, divergences, grads, lm, distillation, temperature, vocabulary,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * vocabulary
    highest, total = -float("inf"), 0.0  # of the student; at the temperature; of the teacher at the temperature
    highest_s, total_s = -float("inf"), 0.0
    highest_q, total_q = -float("inf"), 0.0
    for first in range(0, vocabulary, BLOCK):
        token_B = first + tl.arange(0, BLOCK)
        z_B = tl.load(logits + row + token_B, token_B < vocabulary, -float("inf")).to(tl.float32)
        q_B = tl.load(teachers + row + token_B, token_B < vocabulary, -float("inf")).to(tl.float32) / temperature
        highest, total = _normalise(highest, total, z_B)
        highest_s, total_s = _normalise(highest_s, total_s, z_B / temperature)
        highest_q, total_q = _normalise(highest_q, total_q, q_B)
    normaliser, of_s, of_q = highest + tl.log(total), highest_s + tl.log(total_s), highest_q + tl.log(total_q)
    target = tl.load(targets + tl.program_id(0))
    tl.store(losses + tl.program_id(0), normaliser - tl.load(logits + row + target).to(tl.float32))
    divergence_B = tl.zeros([BLOCK], tl.float32)
    for first in range(0, vocabulary, BLOCK):
        token_B = first + tl.arange(0, BLOCK)
        inside_B = token_B < vocabulary
        z_B = tl.load(logits + row + token_B, inside_B, 0).to(tl.float32)
        log_s_B = z_B / temperature - of_s
        log_q_B = tl.load(teachers + row + token_B, inside_B, 0).to(tl.float32) / temperature - of_q
        q_B = tl.exp(log_q_B)
        divergence_B += tl.where(inside_B & (q_B > 0), q_B * (log_q_B - log_s_B), 0)
        grad_B = lm * (tl.exp(z_B - normaliser) - (token_B == target).to(tl.float32))
        grad_B += distillation * temperature * (tl.exp(log_s_B) - q_B)
        tl.store(grads + row + token_B, grad_B.to(grads.dtype.element_ty), inside_B)
    tl.store(divergences + tl.program_id(0), tl.sum(divergence_B) * temperature * temperature)


def lm_loss(logits_CV: Tensor, target_C: Tensor, lm: float) -> tuple[Tensor, Tensor]:
    """Return ΣCE, float32, and the gradient of ``lm``·ΣCE; see :func:`leap_pl.losses.language.lm_loss`."""
    logits_CV = logits_CV.contiguous()
    losses_C, grad_CV = _losses_of(logits_CV), torch.empty_like(logits_CV)
    count, vocabulary = logits_CV.shape
    with torch.cuda.device_of(logits_CV):
        _lm[(count,)](logits_CV, target_C, losses_C, grad_CV, lm, vocabulary, BLOCK, num_warps=8)
    return losses_C.sum(), grad_CV


def distillation_loss(
    logits_CV: Tensor, teacher_CV: Tensor, target_C: Tensor, lm: float, distillation: float, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ΣCE, Σ KL·temperature², and the gradient of their weighted sum.

    See :func:`leap_pl.losses.language.distillation_loss`.
    """
    logits_CV, teacher_CV = logits_CV.contiguous(), teacher_CV.contiguous()
    losses_C, divergences_C, grad_CV = _losses_of(logits_CV), _losses_of(logits_CV), torch.empty_like(logits_CV)
    count, vocabulary = logits_CV.shape
    with torch.cuda.device_of(logits_CV):
        _distillation[(count,)](
            logits_CV, teacher_CV, target_C, losses_C, divergences_C, grad_CV,
            lm, distillation, temperature, vocabulary, BLOCK, num_warps=8,
        )  # fmt: skip
    return losses_C.sum(), divergences_C.sum(), grad_CV


def _losses_of(logits_CV: Tensor) -> Tensor:
    return torch.empty(len(logits_CV), dtype=torch.float32, device=logits_CV.device)


torch.library.define("leap_pl::lm_loss", "(Tensor logits, Tensor targets, float lm) -> (Tensor, Tensor)")
torch.library.define(
    "leap_pl::distillation_loss",
    "(Tensor logits, Tensor teachers, Tensor targets, float lm, float distillation, float temperature) "
    "-> (Tensor, Tensor, Tensor)",
)
torch.library.impl("leap_pl::lm_loss", "cuda", lm_loss)
torch.library.impl("leap_pl::distillation_loss", "cuda", distillation_loss)


@torch.library.register_fake("leap_pl::lm_loss")
def _shapes_lm(logits: Tensor, targets: Tensor, lm: float) -> tuple[Tensor, Tensor]:
    return logits.new_empty((), dtype=torch.float32), torch.empty_like(logits)


@torch.library.register_fake("leap_pl::distillation_loss")
def _shapes_distillation(
    logits: Tensor, teachers: Tensor, targets: Tensor, lm: float, distillation: float, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    ce, kl = (logits.new_empty((), dtype=torch.float32) for _ in range(2))
    return ce, kl, torch.empty_like(logits)
