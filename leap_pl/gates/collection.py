"""Collection of all gates of one model: joint choice of hard masks, totals, metrics and stored state."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, overload

from torch import Tensor, nn

from leap_pl.distributed.shards import gathered, strided_samples
from leap_pl.errors import UserError
from leap_pl.masks.patterns import Pattern, Unstructured

if TYPE_CHECKING:
    from leap_pl.gates.gate import Gate

G = TypeVar("G", bound="Gate")
Place = tuple[str, str]  # name of a weight, attribute of its gate


class Gates(Mapping[str, G]):
    """Gates of one model by the names of their weights, all of the same kind and with the same settings.

    Each kind of gate names the subclass for it (:attr:`leap_pl.gates.Gate.collection`). This base class suits kinds
    whose hard masks depend only on each gate's own logits; others override :meth:`choose` and whatever else differs.

    Attributes:
        numel: Number of gated weights, over all tensors.
    """

    def __init__(self, gates: Mapping[str, G]) -> None:
        """Hold ``gates``; use :meth:`of` to get the class for their kind."""
        self._gates = dict(gates)
        self.numel = sum(gate.shape.numel() for gate in self._gates.values())

    @staticmethod
    def of(gates: Mapping[str, Any]) -> "Gates[Any]":
        """Return ``gates`` as the collection that their kind names.

        Raises:
            UserError: The gates are of different kinds, or have different settings.
        """
        if not gates:
            return Gates({})
        found = {name: (type(gate), gate.settings()) for name, gate in gates.items()}
        first, (kind, settings) = next(iter(found.items()))
        for name, (other, others) in found.items():
            if (other, others) != (kind, settings):
                raise UserError(
                    f"the gates of a model must have the same kind and settings: {first} has {kind.__name__} with "
                    f"{settings}, and {name} has {other.__name__} with {others}."
                )
        return kind.collection(gates)

    def __getitem__(self, name: str) -> G:
        """Return the gate of the weight ``name``."""
        return self._gates[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of the weights, in the order in which they were gated."""
        return iter(self._gates)

    def __len__(self) -> int:
        """Return the number of gates."""
        return len(self._gates)

    def __or__(self, more: Mapping[str, Any]) -> "Gates[Any]":
        """Return the union of these gates and ``more``."""
        return Gates.of({**self, **more})

    def __repr__(self) -> str:
        """Return the class name with the numbers of gates and of gated weights."""
        return f"{type(self).__name__}({len(self)} gates of {self.numel:,} weights)"

    @property
    def first(self) -> G:
        """Return one gate, for what is the same in all of them.

        Raises:
            ValueError: The collection is empty.
        """
        if not self._gates:
            raise ValueError("there are no gates")
        return next(iter(self._gates.values()))

    # -- kind of mask -------------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """Return the class name and the settings of the gates as plain values."""
        return {"class_path": type(self.first).__name__, "init_args": self.first.settings()}

    @property
    def form(self) -> str:
        """Return the form of the gates' hard masks, as :mod:`leap_pl.masks.patterns` writes it."""
        return "unstructured"

    def exact_sparsity(self, sparsity: float) -> float:
        """Return the sparsity that the hard masks will have for a requested ``sparsity``.

        Raises:
            UserError: Masks of this kind cannot have this sparsity.
        """
        return sparsity

    def prior_forms(self, sparsity: float) -> dict[str, Pattern]:
        """Return the masks that :meth:`.Gate.start_from` takes: argument name → form of that mask."""
        return {"prior": Unstructured(sparsity)}

    def check_priors(self, priors: Mapping[str, Any]) -> None:
        """Check that learning can start from ``priors``, masks by the names of :meth:`prior_forms`.

        Raises:
            UserError: A mask that this kind of gate requires is missing.
        """

    # -- hard masks ---------------------------------------------------------------------------------------

    def choose(self, sparsity: float) -> None:
        """Choose every gate's hard mask so that together they have the target ``sparsity``, or the closest possible.

        The base class does nothing: the logits of each gate alone determine its mask.
        """

    def sample_hard_masks(self, sparsity: float, stride: int) -> dict[str, Tensor]:
        """Return every ``stride``-th element of each gate's hard mask, flattened, as samples for the curves.

        Kinds of gates that can do so without computing the whole mask override this.
        """
        self.choose(sparsity)
        return {name: gathered(gate.hard_mask()).reshape(-1)[::stride] for name, gate in self.items()}

    def held(self, part: str = "logits") -> "Held":
        """Return the stored tensor ``part`` of each gate, read one at a time."""
        return Held(self.values(), part)

    # -- metrics ------------------------------------------------------------------------------------------

    def samples(self, stride: int) -> dict[str, Tensor]:
        """Return every ``stride``-th logit of each gate, flattened, gathered on every rank."""
        return strided_samples({name: gate.logits.detach() for name, gate in self.items()}, stride)

    def curves(self, stride: int) -> dict[str, float]:
        """Return the metrics of this kind of gate for the logs, computed from every ``stride``-th logit."""
        return {}

    # -- sums for the losses ------------------------------------------------------------------------------

    def clear(self) -> None:
        """Drop the sums of the previous pass, whose graph has been freed."""
        for gate in self.values():
            gate.clear()

    @property
    def unused(self) -> list[str]:
        """Return the names of the weights that were not used since :meth:`clear`."""
        return [name for name, gate in self.items() if gate.kept is None]

    @property
    def kept(self) -> dict[str, Tensor]:
        """Return ΣM of each weight that was used since :meth:`clear`, with its graph."""
        return {name: gate.kept for name, gate in self.items() if gate.kept is not None}

    @property
    def energy(self) -> dict[str, Tensor]:
        """Return Σ(M·W)² of each weight that was used since :meth:`clear`, with its graph."""
        return {name: gate.energy for name, gate in self.items() if gate.kept is not None}

    # -- parameters and stored state ----------------------------------------------------------------------

    def learned(self) -> dict[Place, nn.Parameter]:
        """Return the learnable parameters: (weight name, attribute of its gate) → parameter."""
        return {(name, part): found for name, gate in self.items() for part, found in gate.named_parameters()}

    def stored(self) -> dict[Place, Tensor]:
        """Return the tensors that a checkpoint stores: (weight name, attribute of its gate) → tensor."""
        return {(name, part): found for name, gate in self.items() for part, found in gate.stored().items()}

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Return the shape of each weight."""
        return {name: list(gate.shape) for name, gate in self.items()}

    @property
    def input_dims(self) -> dict[str, int]:
        """Return the input dimension of each weight."""
        return {name: gate.input_dim for name, gate in self.items()}


class Held(Sequence[Tensor]):
    """Lazy sequence of the stored tensor of one name from each of several gates, read one at a time."""

    def __init__(self, gates: "Iterable[Gate]", part: str = "logits") -> None:
        """Hold the ``gates`` and the name of the tensor."""
        self.gates, self.part = list(gates), part

    @overload
    def __getitem__(self, place: int) -> Tensor: ...
    @overload
    def __getitem__(self, place: slice) -> list[Tensor]: ...
    def __getitem__(self, place: int | slice) -> Tensor | list[Tensor]:
        """Return the tensor of one gate, or a list for a slice."""
        if isinstance(place, slice):
            return [gate.held(self.part) for gate in self.gates[place]]
        return self.gates[place].held(self.part)

    def __len__(self) -> int:
        return len(self.gates)
