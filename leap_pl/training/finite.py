"""Detection of infinite and NaN losses, gradients and logits before they enter a checkpoint, with their place."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from leap_pl.distributed.shards import Ranks, gathered, own_part
from leap_pl.errors import UserError, listing
from leap_pl.gates import PART
from leap_pl.kernels.norms import is_large, norm_of

Place = tuple[str, str]  # a weight's name, and the attribute of its gate


class NonFiniteError(UserError):
    """Error for an infinite or NaN loss term, gradient or logit; its message has the step and the place."""

    def __init__(self, step: int, where: str, dtype: torch.dtype | None = None) -> None:
        remedy = (
            "Lower the learning rate (model.optimizer.init_args.lr; of trained weights model.weight_training.lr), or "
            "set trainer.gradient_clip_val."
        )
        if dtype == torch.float16:
            remedy = "Activations can exceed 65504, the largest float16 number: set --model.dtype bfloat16 or float32."
        found = f"training failed at step {step}: {where}. The run stops; checkpoints before that step are intact."
        super().__init__(f"{found} {remedy}")


def check_terms(terms: Mapping[str, Tensor], step: int, dtype: torch.dtype | None) -> None:
    """Check that the terms of a loss are finite.

    Args:
        terms: Name → scalar.
        step: Optimizer step, for the message.
        dtype: Dtype of the model, for the remedy.

    Raises:
        NonFiniteError: A term is infinite or NaN.
    """
    values = read_together(terms)
    broken = [f"{name} = {value:g}" for name, value in values.items() if not math.isfinite(value)]
    if broken:
        raise NonFiniteError(step, ", ".join(broken), dtype)


def check_logits(learned: Mapping[Place, Tensor], step: int) -> None:
    """Check that the logits, and the parameters of trained weights, are finite on all ranks.

    Raises:
        NonFiniteError: One is infinite or NaN.
    """
    for name, part in _broken({place: logits.detach() for place, logits in learned.items()}):
        what = "trained weights" if part.startswith(PART) else "logits"
        raise NonFiniteError(step, f"the {what} of {name} are infinite or NaN")


def check_gradients(learned: Mapping[Place, Tensor], step: int, dtype: torch.dtype | None, norm: Tensor) -> None:
    """Check that gradients are finite, with one host sync for their ``norm`` of :func:`norm_of_gradients`.

    Raises:
        NonFiniteError: A gradient is infinite or NaN, or their norm overflows.
    """
    if not bool(torch.isfinite(gathered(norm))):
        broken = [name for name, _ in _broken(_gradients(learned))]
        where = f"the gradients of {listing(broken, 2)} are infinite or NaN" if broken else "the gradients overflow"
        raise NonFiniteError(step, where, dtype)


def check_norms(norms: Sequence[tuple[int, Tensor]], dtype: torch.dtype | None) -> None:
    """Check that the gradients of past steps were finite, with one host sync for all of them.

    Args:
        norms: Pairs of a step and the norm of its gradients.
        dtype: Dtype of the model, for the remedy.

    Raises:
        NonFiniteError: Gradients were infinite or NaN, or their norm overflowed; it names the first such step.
    """
    if norms:
        fine = torch.isfinite(torch.stack([gathered(norm) for _, norm in norms])).tolist()
        for (step, _), good in zip(norms, fine, strict=True):
            if not good:
                raise NonFiniteError(step, "gradients are infinite or NaN, or overflow together", dtype)


def read_together(scalars: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the values of ``scalars``, with a single host sync."""
    read = {name: float(value) for name, value in scalars.items() if value.is_cpu}
    there = {name: value.detach().float() for name, value in scalars.items() if name not in read}
    if there:
        read |= dict(zip(there, torch.stack(list(there.values())).tolist(), strict=True))
    return {name: read[name] for name in scalars}


def norm_of_gradients(learned: Mapping[Place, Tensor]) -> Tensor:
    """Return the norm of all gradients, sharded as they are, without a host sync."""
    gradients = list(_gradients(learned).values())
    # torch returns the norm of bfloat16 gradients in bfloat16, whose error of half a percent clipping would hand on.
    if any(is_large(gradient) or gradient.dtype.itemsize == 2 for gradient in gradients):
        return torch.linalg.vector_norm(torch.stack([norm_of(gradient) for gradient in gradients]))
    return nn.utils.get_total_norm(gradients)


def _gradients(learned: Mapping[Place, Tensor]) -> dict[Place, Tensor]:
    return {place: logits.grad for place, logits in learned.items() if logits.grad is not None}


def _broken(tensors: Mapping[Place, Tensor]) -> list[Place]:
    """Return the places of the tensors that have an infinite or NaN element on any rank."""
    parts = [own_part(tensor) for tensor in tensors.values()]
    # A finite sum proves that all elements are finite, in one pass and with one sync. Another sum may have overflowed.
    sums = torch.stack([part.sum(dtype=torch.float32) for part in parts]).isfinite().tolist() if parts else []
    flags = [int(not (fine or bool(part.isfinite().all()))) for part, fine in zip(parts, sums, strict=True)]
    found = Ranks.of(tensors.values()).highest(flags)
    return [place for place, flag in zip(tensors, found, strict=True) if flag]
