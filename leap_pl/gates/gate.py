"""What every gate shares: its logits, its place in the run, and the three ways a weight passes through it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import signature
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from leap_pl.base_model.weights import Weight
from leap_pl.gates.collection import Gates
from leap_pl.kernels.noise import noise_keys

Mode = Literal["soft", "hard", "dense"]


@dataclass
class GateState:
    """What all gates of one model read at each forward pass. There is one, shared by reference.

    Attributes:
        mode: ``soft``: the relaxed mask, with noise. ``hard``: the mask last chosen. ``dense``: no mask.
        alpha: Logit scale α, a float32 scalar tensor (a Python float would compile anew for each value).
        tau: Temperature τ, likewise.
        scales: Further logit scales, by the names of their schedules (:attr:`Gate.scales`), likewise.
        seed: Of the run's noise.
        step: Optimizer step.
        micro_batch: Index of the micro-batch within the step, counted over all ranks.
        fraction: Share of the run's optimizer steps that are done, for kinds of gates with schedules of their own.
        slope: α/τ, which every gate would divide anew.
        slopes: Those of the further scales, by their names.
        sharpness: 1/τ.
    """

    mode: Mode = "soft"
    alpha: Tensor = field(default_factory=lambda: torch.tensor(25.0))
    tau: Tensor = field(default_factory=lambda: torch.tensor(4.0))
    scales: dict[str, Tensor] = field(default_factory=dict)
    seed: int = 0
    step: int = 0
    micro_batch: int = 0
    fraction: float = 0.0
    slope: Tensor = field(init=False)
    slopes: dict[str, Tensor] = field(init=False)
    sharpness: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self._divide()

    def anneal(self, alpha: float, tau: float, **scales: float) -> None:
        """Set α, τ and further logit ``scales``. New tensors: what a pending backward pass saved must not change."""
        self.alpha = torch.tensor(alpha, dtype=torch.float32)
        self.tau = torch.tensor(tau, dtype=torch.float32)
        self._set(scales)

    def set_defaults(self, scales: Mapping[str, float]) -> None:
        """Set those of the logit ``scales`` that have no value yet."""
        self._set({name: value for name, value in scales.items() if name not in self.scales})

    def _set(self, scales: Mapping[str, float]) -> None:
        self.scales |= {name: torch.tensor(value, dtype=torch.float32) for name, value in scales.items()}
        self._divide()

    def _divide(self) -> None:
        self.slope, self.sharpness = self.alpha / self.tau, 1 / self.tau
        self.slopes = {name: scale / self.tau for name, scale in self.scales.items()}

    @contextmanager
    def passing(self, mode: Mode) -> Iterator[None]:
        """Let weights pass in another ``mode`` for a while: the teacher's forward is ``dense``."""
        before, self.mode = self.mode, mode
        try:
            yield
        finally:
            self.mode = before


class Gate(nn.Module, ABC):
    """A learnable mask of one weight, to be registered as its parametrization.

    A kind of gate is a subclass, in one file. It sets ``logits`` (float32) in its constructor, names its
    :attr:`collection` and defines :meth:`settings`, :meth:`soften`, :meth:`start_from` and :meth:`hard_mask`; one that
    lacks some of it is refused when it is defined. Its parameters are what is learned; they and its buffers are what a
    checkpoint holds of it. How the hard masks of a model are chosen together is its collection's.

    Attributes:
        collection: Class of all gates of a model of this kind together.
        method: What the provenance of a mask learned with it says.
        takes_grades: Whether :meth:`start_from` takes a float lean of −1 to 1 in the place of a bool ``prior``.
        scales: Logit scales that it reads beside α, by the names of their schedules in ``model.annealing``, each with
            its value where there is no schedule.
        logits: The learnable parameter θ; float32 unless :meth:`store_as` said otherwise, whatever precision the
            rest of the model is cast to.
        kept: After a soft pass, ΣM over the weight, with its gradient; None before one.
        energy: After a soft pass, Σ(M·W)² over the weight, with its gradient.
        read: Of a gate that was restored from a checkpoint without reading it, reads what is stored under a name;
            the gate's own tensors are then on the meta device.
    """

    collection: ClassVar[type[Gates[Any]]]
    method: ClassVar[str] = "leap"
    takes_grades: ClassVar[bool] = False
    scales: ClassVar[Mapping[str, float]] = MappingProxyType({})

    logits: nn.Parameter
    kept: Tensor | None
    energy: Tensor
    read: Callable[[str], Tensor] | None

    def __init_subclass__(cls, *, abstract: bool = False, **kwargs: Any) -> None:
        """Make sure that a kind of gate defines all that it must.

        Args:
            abstract: The class is a base of kinds, ``class Base(Gate, abstract=True)``, and need not define all.
            kwargs: Arguments of other base classes.

        Raises:
            TypeError: It lacks something.
        """
        super().__init_subclass__(**kwargs)
        lacking = [name for name in dir(cls) if getattr(getattr(cls, name, None), "__isabstractmethod__", False)]
        collection = getattr(cls, "collection", None)
        if not (isinstance(collection, type) and issubclass(collection, Gates)):
            lacking.append("collection (a class of Gates)")
        if lacking and not abstract:
            raise TypeError(
                f"{cls.__name__} is a kind of gate and does not define {', '.join(lacking)}. Define what is missing; a "
                f"base of kinds is written class {cls.__name__}({cls.__bases__[0].__name__}, abstract=True)."
            )

    def __init__(self, weight: Weight, state: GateState) -> None:
        super().__init__()
        self.name = weight.name
        self.shape = weight.parameter.shape
        self.input_dim = weight.input_dim
        self.state = state
        state.set_defaults(self.scales)
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

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The keyword arguments the gate was made with, plain values."""

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

    @abstractmethod
    def soften(self, weight: Tensor, key_0: Tensor, key_1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The relaxed masked weight (shape and dtype of ``weight``), ΣM and Σ(M·W)² (float32 scalars)."""

    @abstractmethod
    def start_from(self, prior: Tensor | None, seed: int) -> None:
        """Set the logits to their start, leaning towards the bool mask ``prior`` if there is one.

        A kind of gate that takes more masks than one (:meth:`.Gates.prior_forms`) has more arguments.
        """

    @classmethod
    def starts_from(cls) -> list[str]:
        """Return the names of the masks that :meth:`start_from` takes: ``prior``, and those of this kind."""
        return [name for name in signature(cls.start_from).parameters if name not in ("self", "seed")]

    @abstractmethod
    def hard_mask(self) -> Tensor:
        """The bool mask last chosen by :meth:`.Gates.choose`, of the weight's shape."""

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


GateFactory = Callable[[Weight, GateState], Gate]
