"""TrainedWeights: all weights that a run trains, those of gates and those without one."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize

from leap_pl.base_model.weights import Weight
from leap_pl.checkpoints.layout import key_of
from leap_pl.distributed.shards import gathered, part_like, sharded_like
from leap_pl.errors import UserError, listing
from leap_pl.gates import PART, Gate, GateState, TrainedTensor, TrainedWeight, attach_trained, check_linear
from leap_pl.inputs.hub import is_hub_id
from leap_pl.masks.exported import texts_of_weights
from leap_pl.masks.kept_weights import write_weights
from leap_pl.masks.mask_set import BEFORE
from leap_pl.training.start_weights import StartWeights, check_start
from leap_pl.training.weights import (
    KINDS,
    NONE,
    CompactMaster,
    Master,
    WeightTraining,
    embeddings_of,
    kind_of,
    norms_of,
)


class TrainedWeights(Mapping[str, TrainedWeight]):
    """Trained weights of a run by name, those of gates first. Each is beside the frozen weight that it started from.

    Attributes:
        kind: Name of what is trained, a row of :data:`leap_pl.training.weights.KINDS`.
        settings: Settings of the training.
        start: Folder of a model whose weights training starts from; None: it starts from the base model's.
    """

    def __init__(
        self, kind: str, settings: WeightTraining, start: str | None, state: GateState, dtype: torch.dtype
    ) -> None:
        """Store the settings; :meth:`train`, :meth:`train_norms` and :meth:`train_embeddings` add weights.

        Args:
            kind: Name of what is trained.
            settings: Settings of the training.
            start: Folder of a model to start from.
            state: State of the run's gates, whose mode ``dense`` reads the frozen weights.
            dtype: Data type of the trained parameters.

        Raises:
            UserError: There is no such kind, or ``start`` is a folder without a model.
        """
        if kind not in KINDS:
            raise UserError(f"model.train_weights is {kind!r}; give one of {', '.join(KINDS)}.")
        if start is not None:
            check_start(start)
        self.kind, self.settings, self.start = kind, settings, start
        self.texts_before: list[dict[str, Any]] = []  # that the weights at the start were trained on
        self._state, self._dtype = state, dtype
        self._gated: dict[str, tuple[Weight, Gate, TrainedWeight]] = {}
        self._ungated: dict[str, TrainedTensor] = {}
        self._start = StartWeights({}, "")

    def __getitem__(self, name: str) -> TrainedWeight:
        """Return the trained weight ``name``."""
        return self._gated[name][2] if name in self._gated else self._ungated[name].trained

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of the trained weights."""
        return iter((*self._gated, *self._ungated))

    def __len__(self) -> int:
        """Return the number of trained weights."""
        return len(self._gated) + len(self._ungated)

    @property
    def has_gated(self) -> bool:
        """Return whether weights of gates are trained."""
        return bool(self._gated)

    def check(self, weights: Mapping[str, Weight], *, fixed: bool, sharded: bool) -> None:
        """Check that the settings suit the run.

        Args:
            weights: Gated weights.
            fixed: Whether the mask is fixed.
            sharded: Whether the strategy shards the model.

        Raises:
            UserError: They do not.
        """
        if self.start is not None and (self.kind != "kept" or not fixed):
            raise UserError(
                f"model.weights is {self.start}, and only kept weights under a fixed mask start from others than the "
                "base model's. Use leap_pl recover with --model.mask MASK and --model.train_weights kept, or leave it "
                "out."
            )
        if self.settings.embeddings and self.kind == NONE:
            raise UserError(
                "model.weight_training.embeddings is set, and model.train_weights is none. Add --model.train_weights "
                "kept, or leave it out."
            )
        if self.settings.embeddings and sharded:
            raise UserError(
                "a sharded run keeps embeddings and head whole on every rank, and trains neither. Leave "
                "--model.weight_training.embeddings out, or use --trainer.strategy ddp."
            )
        if self.settings.compact and (sharded or not (fixed and self.kind == "kept")):
            raise UserError(
                "model.weight_training.compact holds the weights alone that a fixed mask keeps: it needs "
                "--model.train_weights kept, --model.mask MASK, and a strategy that does not shard. Leave it out."
            )
        kind = kind_of(self.kind, self.settings)
        if kind is not None:
            kind.check(weights, self.settings)

    def check_trains(self, model: nn.Module, *, fixed: bool) -> None:
        """Check that a fit of ``model`` with a mask that is ``fixed``, or not, has something to train.

        Settings that this kind of training does not use are named in a warning.

        Raises:
            UserError: It has nothing.
        """
        defaults = [WeightTraining().with_rate(finished=finished) for finished in (False, True)]
        idle = [
            f"model.weight_training.{name}"
            for name in self._foreign()
            if getattr(self.settings, name) not in [getattr(default, name) for default in defaults]
        ]
        if idle:
            rank_zero_warn(
                f"not used, since model.train_weights is {self.kind}: {listing(idle)}. Set --model.train_weights, or "
                "leave them out."
            )
        kind = KINDS[self.kind]
        alone = kind.norms and kind.gated is None and not self.settings.embeddings
        if alone and not any(True for _ in norms_of(model)):
            raise UserError(
                f"model.train_weights is {self.kind}, and the norms of {type(model).__name__} have no weights. Train "
                "those that the mask keeps: --model.train_weights kept."
            )
        if fixed and self.kind == NONE:
            raise UserError(
                "nothing to train: the mask is fixed, and model.train_weights is none. Set --model.train_weights kept, "
                "or learn a mask: leap_pl fit without --model.mask."
            )

    def read_start(self, model: nn.Module, *, trust_remote_code: bool) -> None:
        """Read the weights that training starts from, if they are not the base model's.

        Args:
            model: Base model, as it was loaded.
            trust_remote_code: Whether to run code that comes with their model.

        Raises:
            UserError: They cannot be read.
        """
        if self.start is None:
            return
        self._start = StartWeights.read(self.start, model, trust_remote_code=trust_remote_code)

    def train(self, weight: Weight, gate: Gate) -> None:
        """Train the ``weight`` of a ``gate`` that has its mask, if the run trains it.

        Raises:
            UserError: The soft mask of the gate depends on the weight; or training cannot start from the weights that
                were read.
        """
        kind = kind_of(self.kind, self.settings)
        if kind is None or not kind.takes(weight.name, self.settings):
            return
        if not self._gated:  # one answers for its kind
            check_linear(gate, weight.parameter)
        bits = partial(gate.held, "bits") if kind.reads_bits else None
        gate.trained = kind(weight, self.settings, self._state.seed, bits)
        self._start.set_(gate.trained, weight, gate.hard_mask)
        gate.trained.store_as(self._dtype)
        self._gated[weight.name] = weight, gate, gate.trained

    def train_norms(self, norms: Iterable[Weight]) -> list[nn.Module]:
        """Train the weights of ``norms``, if the run trains norms, and return their modules."""
        if not KINDS[self.kind].norms:
            return []
        places: dict[int, list[Weight]] = {}  # of each norm, which several blocks may share
        for weight in norms:
            places.setdefault(id(weight.parameter), []).append(weight)
        for shared in places.values():
            self._train_whole(shared)
        return list(dict.fromkeys(weight.module for shared in places.values() for weight in shared))

    def train_embeddings(self, model: nn.Module) -> None:
        """Train the token embeddings and the head of ``model``, if the run trains them; tied ones stay tied.

        Raises:
            UserError: One has a gate, and the run does not train whole weights of gates.
        """
        for places in embeddings_of(model) if self.settings.embeddings else ():
            if not parametrize.is_parametrized(places[0].module):
                self._train_whole(places)
            elif self.kind != "kept":
                raise UserError(
                    f"model.weight_training.embeddings trains {places[0].name} whole, which has a gate, and "
                    f"model.train_weights is {self.kind}. Set --model.train_weights kept, or leave embeddings out."
                )

    def _train_whole(self, places: Sequence[Weight]) -> None:
        """Train a weight that has no gate, in all its ``places``; its name is that of the first."""
        first = places[0]
        trained = Master(first, self.settings, self._state.seed)
        self._start.set_(trained, first)
        trained.store_as(self._dtype)
        self._ungated[first.name], *_ = [attach_trained(weight, trained, self._state) for weight in places]

    def make_room(self, stored: Mapping[str, Tensor]) -> None:
        """Give parameters whose size depends on the mask that of a checkpoint's ``stored`` tensors."""
        for name, (*_, trained) in self._gated.items():
            if isinstance(trained, CompactMaster):
                trained.resize(stored[key_of(name, f"{PART}master")].numel())

    def find_texts_before(self, base_model: str, revision: str | None, *, sparse: bool) -> None:
        """Find which texts the weights that training starts from were trained on, as the record of their folder has it.

        Args:
            base_model: Name of the base model.
            revision: Its revision on the hub.
            sparse: Whether it is sparse: for the record of another one the hub is not asked.
        """
        if self.start is not None:
            self.texts_before = texts_of_weights(self.start)
        elif sparse or not is_hub_id(base_model):
            self.texts_before = texts_of_weights(base_model, revision=revision)

    def release_start(self) -> None:
        """Release the memory of the weights that training has started from.

        Raises:
            UserError: They were made with another mask, or have values that the run would drop.
        """
        self._start.check(set(self))
        self._start = StartWeights({}, "")

    def frozen(self, name: str) -> Tensor:
        """Return the frozen weight of the trained weight ``name``."""
        weight = self._gated[name][0] if name in self._gated else self._ungated[name].weight
        return weight.parameter

    def without_gate(self) -> dict[tuple[str, str], nn.Parameter]:
        """Return the parameters of the trained weights that have no gate: (weight name, parameter name) → parameter."""
        return {
            (name, part): parameter
            for name, tensor in self._ungated.items()
            for part, parameter in tensor.named_parameters()
        }

    @torch.no_grad()
    def save(self, path: str | Path, mask: str | Path, hard_mask: Callable[[str], Tensor], *, writes: bool) -> None:
        """Write the trained weights, with exact zeros where the mask removes them; all ranks must call this.

        Args:
            path: File to write.
            mask: MaskSet file beside it.
            hard_mask: Function from the name of a gated weight to its whole hard mask, on the CPU.
            writes: Whether this rank writes the file.
        """

        def weight(name: str) -> Tensor:
            value = gathered(self[name](self.frozen(name))).cpu()
            return value.masked_fill(~hard_mask(name), 0) if name in self._gated else value

        if writes:
            headers = {name: (self.frozen(name).dtype, self.frozen(name).shape) for name in self}
            write_weights(path, headers, weight, mask)
        else:
            for name in sorted(self):
                weight(name)

    @torch.no_grad()
    def movements(self) -> dict[str, tuple[float, float]]:
        """Return Σ(M⊙(W − W₀))² and ΣW₀² of each trained weight, W₀ being the frozen one; all ranks must call this.

        M is the hard mask last chosen: what it removes moves too, as a low-rank product is of all of a weight.
        """
        sums = []
        for name, trained in self.items():
            base = self.frozen(name)
            moved = (trained(base) - base).float()
            if name in self._gated:
                moved *= self._hard_mask(name)
            sums += [moved.square().sum(), base.float().square().sum()]
        numbers = gathered(torch.stack(sums)).tolist() if sums else []
        return dict(zip(self, zip(numbers[::2], numbers[1::2], strict=True), strict=True))

    def _hard_mask(self, name: str) -> Tensor:
        """Return the hard mask of a gated weight, sharded as the weight is."""
        mask, base = self._gated[name][1].hard_mask(), self.frozen(name)
        return mask if isinstance(mask, DTensor) else sharded_like(part_like(mask, base), base)

    def describe(self) -> dict[str, Any]:
        """Describe the training for the provenance of a mask, as plain values; empty if no weights are trained."""
        if self.kind == NONE:
            return {}
        foreign = self._foreign()
        given = {name: value for name, value in asdict(self.settings).items() if name not in foreign}
        start = {} if self.start is None else {"start": self.start}
        return {"kind": self.kind, **given, **start, **({BEFORE: self.texts_before} if self.texts_before else {})}

    def _foreign(self) -> list[str]:
        """Return the names of the settings that this kind of training does not use."""
        if self.kind == NONE:
            return [field.name for field in fields(self.settings)]
        kind = KINDS[self.kind].gated
        of_kinds = {name for row in KINDS.values() if row.gated is not None for name in row.gated.own_settings}
        return sorted(of_kinds - (set() if kind is None else {*kind.own_settings}))
