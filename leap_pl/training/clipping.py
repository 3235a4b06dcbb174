"""Clipping of gradients by a norm that is already known, in the optimizer's own pass over them if possible."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from leap_pl.errors import UserError
from leap_pl.training.optimizers import PackedAdamW

if TYPE_CHECKING:
    import lightning as L


def clip_by_norm(
    optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], limit: float, norm: Tensor
) -> None:
    """Clip the gradients for the next step of ``optimizer`` to a norm of at most ``limit``.

    Scaling the gradients takes a pass over all of them, some hundredths of a step's time on a CPU. A fused Adam divides
    the gradients that it reads by ``grad_scale``, which is meant for the loss scale of float16; here it is set to the
    divisor that clips them, and the gradients themselves do not change. So does PackedAdamW. For other optimizers
    :func:`torch.nn.utils.clip_grads_with_norm_` scales the gradients.

    Args:
        optimizer: Optimizer, whose step follows before the gradients change again.
        parameters: All parameters of the optimizer.
        limit: Largest norm.
        norm: Norm of all gradients together before clipping.
    """
    if _divides(optimizer) and type(norm) is Tensor:  # not a DTensor: the norm is not sharded
        optimizer.grad_scale = ((norm.float() + 1e-6) / limit).clamp(min=1)  # type: ignore[attr-defined]
    else:
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)


def _divides(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether ``optimizer`` divides gradients by its ``grad_scale``."""
    if isinstance(optimizer, PackedAdamW):
        return True
    if not isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)) or not optimizer.defaults.get("fused"):
        return False
    # Elsewhere, as on Apple's GPUs before torch 2.13, a fused step may not read it.
    return all(
        group.get("fused") and all(parameter.device.type in ("cpu", "cuda") for parameter in group["params"])
        for group in optimizer.param_groups
    )


def check_clipping(trainer: "L.Trainer", optimizer: torch.optim.Optimizer, logits_dtype: torch.dtype) -> None:
    """Check that gradients that a scaler multiplies can be unscaled, and clipped.

    A fused optimizer unscales them too late to clip them before.

    Args:
        trainer: Trainer of the run.
        optimizer: Optimizer of the logits.
        logits_dtype: Data type of their gradients.

    Raises:
        UserError: They cannot.
    """
    if trainer.precision == "16-mixed" and logits_dtype == torch.bfloat16:
        raise UserError(
            "trainer.precision 16-mixed scales the gradients, and torch cannot unscale those of bfloat16 logits "
            "(model.logits_dtype). Use --trainer.precision bf16-mixed, or leave it out."
        )
    if trainer.precision == "16-mixed" and trainer.gradient_clip_val and optimizer.defaults.get("fused"):
        raise UserError(
            "trainer.precision 16-mixed scales the gradients, and a fused optimizer unscales them within its step, so "
            "that they cannot be clipped before. Add --model.optimizer.fused false, or use --trainer.precision "
            "bf16-mixed."
        )
