"""What every gate shares: its logits, its place in the run, and the three ways a weight passes through it."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, overload

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from leap_pl.base_model.weights import Weight
from leap_pl.kernels.noise import noise_keys
from leap_pl.masks.patterns import Pattern, Unstructured

Mode = Literal["soft", "hard", "dense"]


@dataclass
class GateState:
    """What all gates of one model read at each forward pass. There is one, shared by reference.

    Attributes:
        mode: ``soft``: the relaxed mask, with noise. ``hard``: the mask last chosen. ``dense``: no mask.
        alpha: Logit scale α, a float32 scalar tensor (a Python float would compile anew for each value).
        tau: Temperature τ, likewise.
        pattern_alpha: Logit scale of the patterns, where a gate has them beside other logits.
        seed: Of the run's noise.
        step: Optimizer step.
        micro_batch: Index of the micro-batch within the step, counted over all ranks.
        slope: α/τ, which every gate would divide anew.
        pattern_slope: That of the patterns.
        sharpness: 1/τ.
    """

    mode: Mode = "soft"
    alpha: Tensor = field(default_factory=lambda: torch.tensor(25.0))
    tau: Tensor = field(default_factory=lambda: torch.tensor(4.0))
    pattern_alpha: Tensor = field(default_factory=lambda: torch.tensor(100.0))
    seed: int = 0
    step: int = 0
    micro_batch: int = 0
    slope: Tensor = field(init=False)
    pattern_slope: Tensor = field(init=False)
    sharpness: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self._divide()

    def anneal(self, alpha: float, tau: float, pattern_alpha: float | None = None) -> None:
        """Set α and τ. New tensors: what a pending backward pass saved must not change."""
        self.alpha = torch.tensor(alpha, dtype=torch.float32)
        self.tau = torch.tensor(tau, dtype=torch.float32)
        if pattern_alpha is not None:
            self.pattern_alpha = torch.tensor(pattern_alpha, dtype=torch.float32)
        self._divide()

    def _divide(self) -> None:
        self.slope, self.pattern_slope = self.alpha / self.tau, self.pattern_alpha / self.tau
        self.sharpness = 1 / self.tau

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

    A subclass sets ``logits`` (float32) in its constructor and defines :meth:`settings`, :meth:`soften`,
    :meth:`start_from`, :meth:`hard_mask` and the class method :meth:`choose`. Its parameters are what is
    learned; they and its buffers are what a checkpoint holds of it.

    Attributes:
        method: What the provenance of a mask learned with it says.
        takes_grades: Whether :meth:`start_from` takes a float lean of −1 to 1 in the place of a bool ``prior``.
        logits: The learnable parameter θ; float32 unless :meth:`store_as` said otherwise, whatever precision the
            rest of the model is cast to.
        kept: After a soft pass, ΣM over the weight, with its gradient; None before one.
        energy: After a soft pass, Σ(M·W)² over the weight, with its gradient.
        read: Of a gate that was restored from a checkpoint without reading it, reads what is stored under a name;
            the gate's own tensors are then on the meta device.
    """

    method: ClassVar[str] = "leap"
    takes_grades: ClassVar[bool] = False

    logits: nn.Parameter
    kept: Tensor | None
    energy: Tensor
    read: Callable[[str], Tensor] | None

    def __init__(self, weight: Weight, state: GateState) -> None:
        super().__init__()
        self.name = weight.name
        self.shape = weight.parameter.shape
        self.input_dim = weight.input_dim
        self.state = state
        self.kept = None
        self.read = None
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
        masked, kept, energy = self.soften(weight, *self.keys())
        self.__dict__.update(kept=kept, energy=energy)  # as attributes, past what a module does to set one
        return masked

    def clear(self) -> None:
        """Forget the sums of the pass before, whose graph is gone."""
        self.kept = None

    def settings(self) -> dict[str, Any]:
        """The keyword arguments the gate was made with, plain values."""
        raise NotImplementedError

    def exact_sparsity(self, sparsity: float) -> float:
        """The sparsity that the hard masks will have where ``sparsity`` is asked for.

        Raises:
            UserError: This kind of mask cannot have it.
        """
        return sparsity

    def prior_forms(self, sparsity: float) -> dict[str, Pattern]:
        """The masks that :meth:`start_from` takes: its argument → the form of that mask."""
        return {"prior": Unstructured(sparsity)}

    def check_priors(self, priors: Mapping[str, Any]) -> None:
        """Make sure that learning can start from the masks there are, by the names of :meth:`prior_forms`.

        Raises:
            UserError: One is missing that this kind of gate cannot do without.
        """

    @classmethod
    def form(cls, settings: Mapping[str, Any]) -> str:
        """The form of the masks that gates with these :meth:`settings` make.

        It is written as :mod:`leap_pl.masks.patterns` does.
        """
        return "unstructured"

    def stored(self) -> dict[str, Tensor]:
        """What a checkpoint holds of this gate, ``logits`` first: attribute → tensor."""
        return {name: tensor.detach() for name, tensor in (*self.named_parameters(), *self.named_buffers())}

    def held(self, part: str = "logits") -> Tensor:
        """One of :meth:`stored`: what hard masks are chosen by. Read anew at each call where it is not in memory."""
        return getattr(self, part).detach() if self.read is None else self.read(part)

    def begin_call(self) -> None:
        """From here to :meth:`end_call` the masked weight is made once and read many times."""
        self._in_call, self._made = True, []

    def end_call(self) -> None:
        """Let go of the masked weight."""
        self._in_call, self._made = False, []

    def keys(self, part: str = "") -> tuple[Tensor, Tensor]:
        """The noise keys of this weight, or a ``part`` of its gate, at this step and micro-batch: int32 scalars."""
        keys = noise_keys(self.state.seed, self.state.step, self.state.micro_batch, self.name + part)
        return torch.tensor(keys[0], dtype=torch.int32), torch.tensor(keys[1], dtype=torch.int32)

    def soften(self, weight: Tensor, key_0: Tensor, key_1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The relaxed masked weight (shape and dtype of ``weight``), ΣM and Σ(M·W)² (float32 scalars)."""
        raise NotImplementedError

    def start_from(self, prior: Tensor | None, seed: int) -> None:
        """Set the logits to their start, leaning towards the bool mask ``prior`` if there is one.

        A kind of gate that takes more masks than one (:meth:`prior_forms`) has more arguments.
        """
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

    @classmethod
    def curves(cls, gates: Mapping[str, Any], stride: int) -> dict[str, float]:
        """What this kind of gate shows of itself in the logs, from every ``stride``-th of its logits."""
        return {}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Gate":
        """Follow the model to another device, but never to another dtype.

        At |θ| = 0.04 a bfloat16 step is 2.4e-4: updates below half of it vanish unless they are rounded at random
        (:mod:`leap_pl.training.optimizers`), and learning ends unnoticed.
        """
        if isinstance(self.logits, DTensor):
            # A shard is on its device already, and FSDP2 holds on to this very parameter.
            shards = dict(self._parameters)
            self._parameters.clear()
            try:
                super()._apply(fn, recurse)
            finally:
                self._parameters |= shards
            return self
        before = {name: (parameter.data, parameter.grad) for name, parameter in self.named_parameters()}
        for parameter in self.parameters():
            parameter.grad = None  # it would be cast in place, and with it what is to be put back
        super()._apply(fn, recurse)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                data, grad = before[name]
                if parameter.dtype != data.dtype:
                    parameter.data = data.to(parameter.device)
                parameter.grad = None if grad is None else grad.to(parameter.device)
        return self

    def store_as(self, dtype: torch.dtype) -> None:
        """Hold what is learned in ``dtype``, and so its gradients. The mask is computed in float32 from either."""
        for parameter in self.parameters():
            parameter.data = parameter.data.to(dtype)

    def extra_repr(self) -> str:
        """Shown when the model is printed."""
        return f"{tuple(self.shape)}"


class Held(Sequence[Tensor]):
    """What each of some gates holds under one name, looked at, or read, one after another."""

    def __init__(self, gates: Iterable[Gate], part: str = "logits") -> None:
        """Take the ``gates`` and the name."""
        self.gates, self.part = list(gates), part

    @overload
    def __getitem__(self, place: int) -> Tensor: ...
    @overload
    def __getitem__(self, place: slice) -> list[Tensor]: ...
    def __getitem__(self, place: int | slice) -> Tensor | list[Tensor]:
        """That of one gate, or of some."""
        if isinstance(place, slice):
            return [gate.held(self.part) for gate in self.gates[place]]
        return self.gates[place].held(self.part)

    def __len__(self) -> int:
        return len(self.gates)


GateFactory = Callable[[Weight, GateState], Gate]
