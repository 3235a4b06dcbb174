"""What every gate shares: its logits, its place in the run, and the three ways a weight passes through it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from leap_pl.gates.noise import noise_keys
from leap_pl.models import Weight

Mode = Literal["soft", "hard", "dense"]


@dataclass
class GateState:
    """What all gates of one model read at each forward pass. There is one, shared by reference.

    Attributes:
        mode: ``soft``: the relaxed mask, with noise. ``hard``: the mask last chosen. ``dense``: no mask.
        alpha: Logit scale α, a float32 scalar tensor (a Python float would compile anew for each value).
        tau: Temperature τ, likewise.
        seed: Of the run's noise.
        step: Optimizer step.
        micro_batch: Index of the micro-batch within the step, counted over all ranks.
    """

    mode: Mode = "soft"
    alpha: Tensor = field(default_factory=lambda: torch.tensor(25.0))
    tau: Tensor = field(default_factory=lambda: torch.tensor(4.0))
    seed: int = 0
    step: int = 0
    micro_batch: int = 0

    def anneal(self, alpha: float, tau: float) -> None:
        """Set α and τ. New tensors: what a pending backward pass saved must not change."""
        self.alpha = torch.tensor(alpha, dtype=torch.float32)
        self.tau = torch.tensor(tau, dtype=torch.float32)

    @contextmanager
    def passing(self, mode: Mode) -> Iterator[None]:
        """Let weights pass in another ``mode`` for a while: the teacher's forward is ``dense``."""
        before, self.mode = self.mode, mode
        try:
            yield
        finally:
            self.mode = before


class Gate(nn.Module):
    """A learnable mask of one weight, to be registered as its parametrization.

    A subclass sets ``logits`` (float32) in its constructor and defines :meth:`soften`,
    :meth:`start_from`, :meth:`hard_mask` and the class method :meth:`choose`.

    Attributes:
        logits: The learnable parameter θ; float32 whatever precision the rest of the model is cast to.
        kept: After a soft pass, ΣM over the weight, with its gradient; None before one.
        energy: After a soft pass, Σ(M·W)² over the weight, with its gradient.
    """

    logits: nn.Parameter
    kept: Tensor | None
    energy: Tensor

    def __init__(self, weight: Weight, state: GateState) -> None:
        super().__init__()
        self.name = weight.name
        self.shape = weight.parameter.shape
        self.input_dim = weight.input_dim
        self.state = state
        self.kept = None
        self.hooks: list[RemovableHandle] = []  # on the module of the weight; they go with the gate
        self._in_call = False
        self._made: list[Tensor] = []  # a list: as an attribute, the dense weight would register as a parameter

    def forward(self, weight: Tensor) -> Tensor:
        """The weight as the layer sees it, of the same shape and dtype."""
        if self._made:
            return self._made[0]
        masked = self._pass(weight)
        if self._in_call:
            self._made.append(masked)
        return masked

    def _pass(self, weight: Tensor) -> Tensor:
        if self.state.mode == "dense":
            return weight
        if self.state.mode == "hard":
            return weight.masked_fill(~self.hard_mask(), 0)
        masked, self.kept, self.energy = self.soften(weight, *self.keys())
        return masked

    def clear(self) -> None:
        """Forget the sums of the pass before, whose graph is gone."""
        self.kept = None

    def settings(self) -> dict[str, Any]:
        """The keyword arguments the gate was made with, plain values."""
        raise NotImplementedError

    def begin_call(self) -> None:
        """From here to :meth:`end_call` the masked weight is made once and read many times."""
        self._in_call, self._made = True, []

    def end_call(self) -> None:
        """Let go of the masked weight."""
        self._in_call, self._made = False, []

    def keys(self) -> tuple[Tensor, Tensor]:
        """The noise keys of this weight at this step and micro-batch, int32 scalars."""
        keys = noise_keys(self.state.seed, self.state.step, self.state.micro_batch, self.name)
        return torch.tensor(keys[0], dtype=torch.int32), torch.tensor(keys[1], dtype=torch.int32)

    def soften(self, weight: Tensor, key_0: Tensor, key_1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The relaxed masked weight (shape and dtype of ``weight``), ΣM and Σ(M·W)² (float32 scalars)."""
        raise NotImplementedError

    def start_from(self, prior: Tensor | None, seed: int) -> None:
        """Set the logits to their start, leaning towards the bool mask ``prior`` if there is one."""
        raise NotImplementedError

    def hard_mask(self) -> Tensor:
        """The bool mask last chosen by :meth:`choose`, of the weight's shape."""
        raise NotImplementedError

    @classmethod
    def choose(cls, gates: Mapping[str, Any], sparsity: float) -> None:
        """Choose every gate's hard mask so that together they have exactly the asked ``sparsity``."""
        raise NotImplementedError

    @classmethod
    def sample_hard_masks(cls, gates: Mapping[str, Any], sparsity: float, stride: int) -> dict[str, Tensor]:
        """Every ``stride``-th element of each gate's hard mask, flattened: enough for curves.

        A kind of gate that can do so without choosing the whole mask overrides this.
        """
        cls.choose(gates, sparsity)
        return {name: gate.hard_mask().reshape(-1)[::stride] for name, gate in gates.items()}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Gate":
        """Follow the model to another device, but never to another dtype.

        At |θ| = 0.04 a bfloat16 step is 1.2e-4: smaller updates vanish, and learning ends unnoticed.
        """
        if isinstance(self.logits, DTensor):
            # A shard is on its device already, and FSDP2 holds on to this very parameter.
            logits = self._parameters.pop("logits")
            try:
                super()._apply(fn, recurse)
            finally:
                self._parameters["logits"] = logits
            return self
        before, grad = self.logits.data, self.logits.grad
        self.logits.grad = None  # it would be cast in place, and with it what is to be put back
        super()._apply(fn, recurse)
        device = self.logits.device
        with torch.no_grad():
            if self.logits.dtype != torch.float32:
                self.logits.data = before.to(device)
            self.logits.grad = None if grad is None else grad.to(device)
        return self

    def extra_repr(self) -> str:
        """Shown when the model is printed."""
        return f"{tuple(self.shape)}"


GateFactory = Callable[[Weight, GateState], Gate]
