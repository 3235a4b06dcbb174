"""All gates of one model as one object: what is chosen, counted, logged and stored over all of them together."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, overload

from torch import Tensor, nn

from leap_pl.distributed.shards import gathered, strided_samples
from leap_pl.errors import UserError
from leap_pl.masks.patterns import Pattern, Unstructured

if TYPE_CHECKING:
    from leap_pl.gates.gate import Gate

G = TypeVar("G", bound="Gate")
Place = tuple[str, str]  # a weight's name, and the attribute of its gate


class Gates(Mapping[str, G]):
    """The gates of one model by the names of their weights: all of one kind, with the same settings.

    A kind of gate names its class of these (:attr:`leap_pl.gates.Gate.collection`). This one is for kinds whose hard
    masks depend on nothing but each gate's own logits; others override :meth:`choose`, and what else differs.

    Attributes:
        numel: Number of gated weights, in all tensors together.
    """

    def __init__(self, gates: Mapping[str, G]) -> None:
        """Take the ``gates``; :meth:`of` finds the class for their kind."""
        self._gates = dict(gates)
        self.numel = sum(gate.shape.numel() for gate in self._gates.values())

    @staticmethod
    def of(gates: Mapping[str, Any]) -> "Gates[Any]":
        """Return ``gates`` as the collection that their kind names.

        Raises:
            UserError: They are not of one kind, or have different settings.
        """
        if not gates:
            return Gates({})
        found = {name: (type(gate), gate.settings()) for name, gate in gates.items()}
        first, (kind, settings) = next(iter(found.items()))
        for name, (other, others) in found.items():
            if (other, others) != (kind, settings):
                raise UserError(
                    f"gates of one model are of one kind and have the same settings: {first} has {kind.__name__} with "
                    f"{settings}, and {name} {other.__name__} with {others}."
                )
        return kind.collection(gates)

    def __getitem__(self, name: str) -> G:
        """Return the gate of the weight ``name``."""
        return self._gates[name]

    def __iter__(self) -> Iterator[str]:
        """Go through the names of the weights, in the order in which they were gated."""
        return iter(self._gates)

    def __len__(self) -> int:
        """Return the number of gates."""
        return len(self._gates)

    def __or__(self, more: Mapping[str, Any]) -> "Gates[Any]":
        """Return these gates and ``more`` of them."""
        return Gates.of({**self, **more})

    def __repr__(self) -> str:
        """Return the kind of gates and their number."""
        return f"{type(self).__name__}({len(self)} gates of {self.numel:,} weights)"

    @property
    def first(self) -> G:
        """One of them, where all would say the same.

        Raises:
            ValueError: There is none.
        """
        if not self._gates:
            raise ValueError("there are no gates")
        return next(iter(self._gates.values()))

    # -- the kind of mask ---------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """Return the class of the gates and the settings that they were made with: plain values."""
        return {"class_path": type(self.first).__name__, "init_args": self.first.settings()}

    @property
    def form(self) -> str:
        """The form of the masks that they make, as :mod:`leap_pl.masks.patterns` writes it."""
        return "unstructured"

    def exact_sparsity(self, sparsity: float) -> float:
        """Return the sparsity that the hard masks will have where ``sparsity`` is asked for.

        Raises:
            UserError: This kind of mask cannot have it.
        """
        return sparsity

    def prior_forms(self, sparsity: float) -> dict[str, Pattern]:
        """Return the masks that :meth:`.Gate.start_from` takes: its argument → the form of that mask."""
        return {"prior": Unstructured(sparsity)}

    def check_priors(self, priors: Mapping[str, Any]) -> None:
        """Make sure that learning can start from the masks there are, by the names of :meth:`prior_forms`.

        Raises:
            UserError: One is missing that this kind of gate cannot do without.
        """

    # -- hard masks ---------------------------------------------------------------------------------------

    def choose(self, sparsity: float) -> None:
        """Choose every gate's hard mask so that together they have the asked ``sparsity``, or the closest there is.

        Here there is nothing to choose: each gate's own logits decide.
        """

    def sample_hard_masks(self, sparsity: float, stride: int) -> dict[str, Tensor]:
        """Return every ``stride``-th element of each gate's hard mask, flattened: enough for curves.

        A kind of gate that can do so without choosing the whole mask overrides this.
        """
        self.choose(sparsity)
        return {name: gathered(gate.hard_mask()).reshape(-1)[::stride] for name, gate in self.items()}

    def held(self, part: str = "logits") -> "Held":
        """Return what each gate holds under the name ``part``, read one after another."""
        return Held(self.values(), part)

    # -- what is logged -----------------------------------------------------------------------------------

    def samples(self, stride: int) -> dict[str, Tensor]:
        """Return every ``stride``-th logit of each gate, flattened: whole on every rank."""
        return strided_samples({name: gate.logits.detach() for name, gate in self.items()}, stride)

    def curves(self, stride: int) -> dict[str, float]:
        """Return what this kind of gate shows of itself in the logs, from every ``stride``-th of its logits."""
        return {}

    # -- what losses need ---------------------------------------------------------------------------------

    def clear(self) -> None:
        """Forget the sums of the pass before, whose graph is gone."""
        for gate in self.values():
            gate.clear()

    @property
    def unused(self) -> list[str]:
        """Names of the weights that have not passed since :meth:`clear`."""
        return [name for name, gate in self.items() if gate.kept is None]

    @property
    def kept(self) -> dict[str, Tensor]:
        """ΣM of each weight that has passed since :meth:`clear`, with its gradient."""
        return {name: gate.kept for name, gate in self.items() if gate.kept is not None}

    @property
    def energy(self) -> dict[str, Tensor]:
        """Σ(M·W)² of each weight that has passed since :meth:`clear`, with its gradient."""
        return {name: gate.energy for name, gate in self.items() if gate.kept is not None}

    # -- what is learned and stored -----------------------------------------------------------------------

    def learned(self) -> dict[Place, nn.Parameter]:
        """Return what is learned: (weight name, attribute of its gate) → parameter."""
        return {(name, part): found for name, gate in self.items() for part, found in gate.named_parameters()}

    def stored(self) -> dict[Place, Tensor]:
        """Return what a checkpoint holds: (weight name, attribute of its gate) → tensor."""
        return {(name, part): found for name, gate in self.items() for part, found in gate.stored().items()}

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Shape of each weight."""
        return {name: list(gate.shape) for name, gate in self.items()}

    @property
    def input_dims(self) -> dict[str, int]:
        """Dimension along which each weight's inputs lie."""
        return {name: gate.input_dim for name, gate in self.items()}


class Held(Sequence[Tensor]):
    """What each of some gates holds under one name, looked at, or read, one after another."""

    def __init__(self, gates: "Iterable[Gate]", part: str = "logits") -> None:
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
