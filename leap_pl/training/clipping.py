"""Gradients clipped by a norm that is known already, where possible in the optimizer's own pass over them."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def clip_by_norm(
    optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], limit: float, norm: Tensor
) -> None:
    """Let the next step of ``optimizer`` see gradients whose norm is at most ``limit``.

    To scale them is a pass over all of them, some hundredths of a step's time on a CPU. A fused Adam divides what it
    reads by a number, meant for the scale of float16, and is given one to clip by; the gradients themselves stay as
    they are. For others they are scaled by :func:`torch.nn.utils.clip_grads_with_norm_`.

    Args:
        optimizer: Whose step comes next, before any other change of the gradients.
        parameters: All that it has.
        limit: The norm's.
        norm: Of all gradients together, as they are.
    """
    if _divides(optimizer) and type(norm) is Tensor:  # and not sharded
        optimizer.grad_scale = ((norm.float() + 1e-6) / limit).clamp(min=1)  # type: ignore[attr-defined]
    else:
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)


def _divides(optimizer: torch.optim.Optimizer) -> bool:
    fused = isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)) and optimizer.defaults.get("fused")
    return bool(fused) and all(group.get("fused") for group in optimizer.param_groups)
