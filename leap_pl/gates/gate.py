"""Abstract gate: logits, state in the run, and the soft, hard and dense forward passes of a weight."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import signature
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Self
from weakref import ref

import torch
from torch import Tensor, nn

from leap_pl.base_model.weights import Weight
from leap_pl.gates.calls import Call
from leap_pl.gates.collection import Gates
from leap_pl.gates.learned import Learned
from leap_pl.gates.trained import TrainedWeight, softened
from leap_pl.kernels import backward_pass
from leap_pl.kernels.compiled import scalar
from leap_pl.kernels.noise import noise_keys

Mode = Literal["soft", "hard", "dense"]


def _no_call() -> None:
    return None


# Attributes of a GateState that relaxed masks depend on; each is replaced by a change, and none is changed in place.
OF_MASKS = ("alpha", "tau", "scales", "seed", "step", "micro_batch", "fraction", "slope", "slopes", "sharpness")


@dataclass
class GateState:
    """State that all gates of a model read at each forward pass; they share one instance by reference.

    Attributes:
        mode: Mode of the forward pass: ``soft``: the relaxed mask, with noise. ``hard``: the mask last chosen.
            ``dense``: no mask.
        alpha: Logit scale α, a float32 scalar tensor (a Python float would be recompiled for each value).
        tau: Temperature τ, a float32 scalar tensor.
        scales: Further logit scales by the names of their schedules (:attr:`Gate.scales`), float32 scalar tensors.
        seed: Seed of the run's noise.
        step: Optimizer step.
        micro_batch: Index of the micro-batch within the step, counted over all ranks.
        fraction: Fraction of the run's optimizer steps that are done, for kinds of gates with their own schedules.
        slope: α/τ, computed once for all gates.
        slopes: The further scales divided by τ, by their names.
        sharpness: 1/τ.
        recomputed: Function that returns the calls of the decoder block that activation checkpointing recomputed last,
            with its masked weights; it holds them weakly.
    """

    mode: Mode = "soft"
    alpha: Tensor = field(default_factory=lambda: scalar(25.0))
    tau: Tensor = field(default_factory=lambda: scalar(4.0))
    scales: dict[str, Tensor] = field(default_factory=dict)
    seed: int = 0
    step: int = 0
    micro_batch: int = 0
    fraction: float = 0.0
    slope: Tensor = field(init=False)
    slopes: dict[str, Tensor] = field(init=False)
    sharpness: Tensor = field(init=False)
    recomputed: Callable[[], Call | None] = field(
        init=False, default_factory=lambda: _no_call, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        self._divide()

    def anneal(self, alpha: float, tau: float, **scales: float) -> None:
        """Set α, τ and further logit ``scales``, as new tensors: those saved for a backward pass must not change."""
        self.alpha = scalar(alpha)
        self.tau = scalar(tau)
        self._set(scales)

    def set_defaults(self, scales: Mapping[str, float]) -> None:
        """Set the default values of the logit ``scales`` that have no value yet."""
        self._set({name: value for name, value in scales.items() if name not in self.scales})

    def _set(self, scales: Mapping[str, float]) -> None:
        self.scales = self.scales | {name: scalar(value) for name, value in scales.items()}
        self._divide()

    def _divide(self) -> None:
        self.slope, self.sharpness = self.alpha / self.tau, 1 / self.tau
        self.slopes = {name: scale / self.tau for name, scale in self.scales.items()}

    def now(self) -> dict[str, Any]:
        """Return all that relaxed masks depend on, for :meth:`as_of`."""
        return {name: getattr(self, name) for name in OF_MASKS}

    @contextmanager
    def as_of(self, before: Mapping[str, Any]) -> Iterator[None]:
        """Soften as at the time of :meth:`now`, within the context: for a backward pass that recomputes masks."""
        current = self.now()
        vars(self).update(before)
        try:
            yield
        finally:
            vars(self).update(current)

    @contextmanager
    def passing(self, mode: Mode) -> Iterator[None]:
        """Use another ``mode`` within the context, such as ``dense`` for the teacher's forward pass."""
        before, self.mode = self.mode, mode
        try:
            yield
        finally:
            self.mode = before


SOFTENING = ("soften", "soften_all")  # of one gate, and of several at once


class Gate(Learned, ABC):
    """Learnable mask of one weight, registered as a parametrization of it.

    A kind of gate is a subclass, in one file. It sets ``logits`` (float32) in its constructor, names its
    :attr:`collection` and defines :meth:`settings`, :meth:`soften`, :meth:`start_from` and :meth:`hard_mask`; the
    definition of a subclass that lacks one of them raises TypeError. The parameters of a gate are learned; a checkpoint
    stores its parameters and buffers. The collection chooses the hard masks of a model jointly.

    Attributes:
        collection: Class of the collection of all gates of this kind in a model.
        method: Name of the method in the provenance of the learned masks.
        takes_grades: Whether :meth:`start_from` accepts a graded prior: floats of −1 to 1 instead of a bool mask.
        scales: Logit scales that the gate reads in addition to α, by the names of their schedules in
            ``model.annealing``, with the values to use without a schedule.
        logits: Learnable parameter θ; float32 unless :meth:`store_as` changes it, whatever precision the rest of the
            model is cast to.
        kept: ΣM over the weight after a soft pass, with its graph; None before one.
        energy: Σ(M·W)² over the weight after a soft pass, with its graph.
        read: Function that reads a stored tensor by its name, in a gate restored from a checkpoint without reading its
            tensors: those of the gate are then on the meta device. None otherwise.
        trained: Parameters of the weight that is masked in place of the frozen one; None: the weight is frozen.
    """

    collection: ClassVar[type[Gates[Any]]]
    method: ClassVar[str] = "leap"
    takes_grades: ClassVar[bool] = False
    scales: ClassVar[Mapping[str, float]] = MappingProxyType({})

    logits: nn.Parameter
    kept: Tensor | None
    energy: Tensor
    read: Callable[[str], Tensor] | None
    trained: TrainedWeight | None

    def __init_subclass__(cls, *, abstract: bool = False, **kwargs: Any) -> None:
        """Check that a kind of gate defines everything it must define.

        Args:
            abstract: Whether the class is a base of kinds, ``class Base(Gate, abstract=True)``, and exempt.
            kwargs: Arguments of other base classes.

        Raises:
            TypeError: Something is not defined.
        """
        super().__init_subclass__(**kwargs)
        of_one, of_all = (next(n for n, base in enumerate(cls.__mro__) if name in vars(base)) for name in SOFTENING)
        if of_one < of_all:  # the inherited soften_all would skip this class's soften
            cls.soften_all = classmethod(Gate.soften_all.__func__)  # type: ignore[assignment, attr-defined]
        lacking = [name for name in dir(cls) if getattr(getattr(cls, name, None), "__isabstractmethod__", False)]
        collection = getattr(cls, "collection", None)
        if not (isinstance(collection, type) and issubclass(collection, Gates)):
            lacking.append("collection (a class of Gates)")
        if lacking and not abstract:
            raise TypeError(
                f"{cls.__name__} is a kind of gate and does not define {', '.join(lacking)}. Define what is missing, "
                f"or write class {cls.__name__}({cls.__bases__[0].__name__}, abstract=True) for a base of kinds."
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
        self.trained = None
        self._call: Callable[[], Call | None] = _no_call

    def __getstate__(self) -> dict[str, Any]:
        """Return what a deep copy of the gate has: all but the sums, whose graph is that of the original's pass."""
        return {name: value for name, value in vars(self).items() if name != "energy"} | {"kept": None}

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight that the layer uses, of the same shape and dtype."""
        call = self._call()
        return self.masked(weight) if call is None else call.masked(self, weight)

    def masked(self, weight: Tensor) -> Tensor:
        """Compute the weight that the layer uses, whatever a call has cached."""
        if self.state.mode == "dense":
            return weight
        if self.state.mode == "hard":
            return self.current(weight).masked_fill(~self.hard_mask(), 0)
        ((masked, kept, energy),) = softened([self], [weight])
        self.note(kept, energy)
        return masked

    def current(self, weight: Tensor) -> Tensor:
        """Return the weight to mask: the trained one, or else the frozen ``weight`` itself."""
        return weight if self.trained is None else self.trained(weight)

    def note(self, kept: Tensor, energy: Tensor) -> None:
        """Set the sums of a soft pass; those that activation checkpointing recomputes are not taken.

        No backward pass goes through the graph of these, which would keep the recomputed tensors in memory.
        """
        if backward_pass.running() == backward_pass.NONE:
            self.__dict__.update(kept=kept, energy=energy)  # bypasses the cost of nn.Module.__setattr__

    def share(self, call: Call) -> None:
        """Take the masked weight from ``call`` while it runs; the reference is weak."""
        self._call = ref(call)

    @property
    def call(self) -> Call | None:
        """Return the calls in which the masked weight is cached."""
        return self._call()

    def clear(self) -> None:
        """Drop the sums of the previous pass, whose graph has been freed."""
        self.kept = None

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Return the keyword arguments that the gate was created with, as plain values."""

    def stored(self) -> dict[str, Tensor]:
        """Return the tensors that a checkpoint stores for this gate, ``logits`` first: attribute → tensor."""
        return {name: tensor.detach() for name, tensor in (*self.named_parameters(), *self.named_buffers())}

    def held(self, part: str = "logits") -> Tensor:
        """Return one of the tensors of :meth:`stored`; one that is not in memory is read again at each call."""
        return getattr(self, part).detach() if self.read is None else self.read(part)

    def keys(self, part: str = "") -> tuple[Tensor, Tensor]:
        """Return the noise keys of :meth:`key_numbers` as int32 scalar tensors."""
        first, second = self.key_numbers(part)
        return scalar(first, torch.int32), scalar(second, torch.int32)

    def key_numbers(self, part: str = "") -> tuple[int, int]:
        """Return the noise keys of this weight, or a ``part`` of its gate, for this micro-batch."""
        return noise_keys(self.state.seed, self.state.step, self.state.micro_batch, self.name + part)

    @abstractmethod
    def soften(self, weight: Tensor, key_0: Tensor, key_1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the relaxed masked weight (shape and dtype of ``weight``), ΣM and Σ(M·W)² (float32 scalars).

        M depends on the logits, the state and the keys alone, and not on ``weight``: a weight that is trained gets the
        gradient M·dW̃, which the backward pass computes by softening dW̃ with the same keys.
        """

    @classmethod
    def soften_all(cls, gates: "Sequence[Self]", weights: Sequence[Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return :meth:`soften` of each gate of a decoder block; kinds that compute them together override this."""
        return [gate.soften(weight, *gate.keys()) for gate, weight in zip(gates, weights, strict=True)]

    @abstractmethod
    def start_from(self, prior: Tensor | None, seed: int) -> None:
        """Initialise the logits, shifted towards the bool mask ``prior`` if there is one.

        Kinds of gates that start from several masks (:meth:`.Gates.prior_forms`) have further arguments.
        """

    @classmethod
    def starts_from(cls) -> list[str]:
        """Return the names of the masks that :meth:`start_from` takes: ``prior``, and further ones of this kind."""
        return [name for name in signature(cls.start_from).parameters if name not in ("self", "seed")]

    @abstractmethod
    def hard_mask(self) -> Tensor:
        """Return the bool mask last chosen by :meth:`.Gates.choose`, of the weight's shape."""

    def extra_repr(self) -> str:
        """Return the summary that is shown when the model is printed."""
        return f"{tuple(self.shape)}"


GateFactory = Callable[[Weight, GateState], Gate]
