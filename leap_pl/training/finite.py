"""Numbers that go wrong in learning: found before they spoil anything, and told with their place."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from leap_pl.distributed.shards import Ranks, gathered, own_part
from leap_pl.errors import UserError, listing

Place = tuple[str, str]  # a weight's name, and the attribute of its gate


class NonFiniteError(UserError):
    """A term of the loss, or a logit, is infinite or NaN: says at which step, and where."""

    def __init__(self, step: int, where: str, dtype: torch.dtype | None = None) -> None:
        remedy = "Lower the learning rate (model.optimizer.init_args.lr), or set trainer.gradient_clip_val."
        if dtype == torch.float16:
            remedy = "float16 ends at 65504, which activations can pass: set --model.dtype bfloat16 or float32."
        told = f"learning broke at step {step}: {where}. The run stops, and the checkpoints before that step stand."
        super().__init__(f"{told} {remedy}")


def check_terms(terms: Mapping[str, Tensor], step: int, dtype: torch.dtype | None) -> None:
    """Make sure that the terms of a loss are numbers.

    Args:
        terms: Name → scalar.
        step: The optimizer step, for the message.
        dtype: Of the model, for the remedy.

    Raises:
        NonFiniteError: One is infinite or NaN.
    """
    values = read_together(terms)
    broken = [f"{name} = {value:g}" for name, value in values.items() if not math.isfinite(value)]
    if broken:
        raise NonFiniteError(step, ", ".join(broken), dtype)


def check_logits(learned: Mapping[Place, Tensor], step: int) -> None:
    """Make sure that logits are numbers, on all ranks.

    Raises:
        NonFiniteError: One is infinite or NaN.
    """
    for name, _ in _broken({place: logits.detach() for place, logits in learned.items()}):
        raise NonFiniteError(step, f"the logits of {name} are infinite or NaN")


def check_gradients(learned: Mapping[Place, Tensor], step: int, dtype: torch.dtype | None, norm: Tensor) -> None:
    """Make sure that gradients are numbers, by one look at their ``norm``, of :func:`norm_of_gradients`.

    Raises:
        NonFiniteError: A gradient is infinite or NaN, or they overflow together.
    """
    if not bool(torch.isfinite(gathered(norm))):
        broken = [name for name, _ in _broken(_gradients(learned))]
        where = f"the gradients of {listing(broken, 2)} are infinite or NaN" if broken else "the gradients overflow"
        raise NonFiniteError(step, where, dtype)


def check_norms(norms: Sequence[tuple[int, Tensor]], dtype: torch.dtype | None) -> None:
    """Make sure that the gradients of steps gone by were numbers; one look at the device for all of them.

    Args:
        norms: (step, norm of its gradients).
        dtype: Of the model, for the remedy.

    Raises:
        NonFiniteError: Those of a step, of which the first is told, were not.
    """
    if norms:
        fine = torch.isfinite(torch.stack([gathered(norm) for _, norm in norms])).tolist()
        for (step, _), good in zip(norms, fine, strict=True):
            if not good:
                raise NonFiniteError(step, "gradients are infinite or NaN, or overflow together", dtype)


def read_together(scalars: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the values of ``scalars``, for which the host waits once."""
    read = {name: float(value) for name, value in scalars.items() if value.is_cpu}
    there = {name: value.detach().float() for name, value in scalars.items() if name not in read}
    if there:
        read |= dict(zip(there, torch.stack(list(there.values())).tolist(), strict=True))
    return {name: read[name] for name in scalars}


def norm_of_gradients(learned: Mapping[Place, Tensor]) -> Tensor:
    """The norm of all gradients, sharded as they are; the host does not wait for it."""
    return nn.utils.get_total_norm(list(_gradients(learned).values()))


def _gradients(learned: Mapping[Place, Tensor]) -> dict[Place, Tensor]:
    return {place: logits.grad for place, logits in learned.items() if logits.grad is not None}


def _broken(tensors: Mapping[Place, Tensor]) -> list[Place]:
    """The places of those with an element, on whatever rank, that is infinite or NaN."""
    parts = [own_part(tensor) for tensor in tensors.values()]
    # A sum that is finite has no term that is not, and takes one look for all. One that is not may have overflowed.
    sums = torch.stack([part.sum(dtype=torch.float32) for part in parts]).isfinite().tolist() if parts else []
    flags = [int(not (fine or bool(part.isfinite().all()))) for part, fine in zip(parts, sums, strict=True)]
    found = Ranks.of(tensors.values()).highest(flags)
    return [place for place, flag in zip(tensors, found, strict=True) if flag]
