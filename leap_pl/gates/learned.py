"""Module whose parameters are learned: they keep their data type, whatever the rest of the model is cast to."""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class Learned(nn.Module):
    """Base class of gates and of trained weights."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move to another device with the model, but keep the dtype.

        At |θ| = 0.04 a bfloat16 step is 2.4e-4: updates below half of it are lost unless they are rounded
        stochastically (:mod:`leap_pl.training.optimizers`), and learning would stop silently.
        """
        own = dict(self._parameters)
        if any(isinstance(parameter, DTensor) for parameter in own.values()):
            # A shard is on its device already, and FSDP2 refers to this parameter object.
            self._parameters.clear()
            try:
                super()._apply(fn, recurse)
            finally:
                self._parameters |= own
            return self
        before = {name: (parameter.data, parameter.grad) for name, parameter in own.items() if parameter is not None}
        for name in before:
            own[name].grad = None  # type: ignore[union-attr]  # it would be cast in place, and the one to restore too
        super()._apply(fn, recurse)
        with torch.no_grad():
            for name, (data, grad) in before.items():
                parameter = self._parameters[name]
                assert parameter is not None
                if parameter.dtype != data.dtype:
                    parameter.data = data.to(parameter.device)
                parameter.grad = None if grad is None else grad.to(parameter.device)
        return self

    def store_as(self, dtype: torch.dtype) -> None:
        """Store the parameters, and so their gradients, in ``dtype``; what they determine is computed in float32."""
        for parameter in self.parameters():
            parameter.data = parameter.data.to(dtype)
