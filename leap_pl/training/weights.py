"""Training of weights: which of them are trained, as what parameters, and with what rate.

A trained weight is beside the frozen one of the base model, which the teacher reads: a master in float32 (``kept``,
``norms``), or two thin matrices (``lora``).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from leap_pl.base_model.weights import Weight
from leap_pl.errors import UserError, listing
from leap_pl.gates import TrainedWeight
from leap_pl.inputs.ranges import check_numbers
from leap_pl.kernels.noise import initial_noise

NONE = "none"  # all weights are frozen


@dataclass(frozen=True)
class WeightTraining:
    """Settings of the training of weights, in addition to which are trained (``model.train_weights``).

    The weights are one parameter group of the optimizer, whose other settings they share.

    Attributes:
        lr: Learning rate of the weights; by default 2e-4, and 2e-5 under a fixed mask that was learned, as few tokens
            then only disturb what the mask was learned for.
        warmup_steps: Number of warmup steps of the weights' rate, in the default schedule.
        weight_decay: Weight decay of the weights. In low-rank training it decays the factors.
        embeddings: Train the token embeddings and the head as well, whole.
        r: Rank of the factors, with lora.
        lora_alpha: Scale of the factors' product, which is multiplied by lora_alpha / r, with lora.
        target_modules: Names of the gated layers to train, whole or their ends, such as ``q_proj``, with lora; by
            default all gated layers.
    """

    lr: float | None = None
    warmup_steps: int = 5
    weight_decay: float = 0.0
    embeddings: bool = False
    r: int = 16
    lora_alpha: float = 32.0
    target_modules: list[str] | None = None

    def __post_init__(self) -> None:
        check_numbers(asdict(self), "model.weight_training.", "weight_training.")

    def with_rate(self, *, learned: bool) -> "WeightTraining":
        """Return these settings with the default learning rate, if none is set.

        Args:
            learned: Whether the mask is fixed and was learned.
        """
        return self if self.lr is not None else replace(self, lr=2e-5 if learned else 2e-4)


class Trainable(TrainedWeight, ABC):
    """Kind of trained weight; a new one is a subclass and a row of :data:`KINDS`.

    Attributes:
        own_settings: Names of the settings of :class:`WeightTraining` that this kind alone reads.
    """

    own_settings: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def __init__(self, weight: Weight, settings: WeightTraining, seed: int) -> None:
        """Create the parameters for the frozen ``weight``; random numbers depend on ``seed`` and its name alone."""
        super().__init__()
        self.settings = settings

    def forward(self, base: Tensor) -> Tensor:
        """Return :meth:`value` of the parameters; see :meth:`.TrainedWeight.forward`."""
        return self.value(base, dict(self.named_parameters()), self.settings)

    @staticmethod
    @abstractmethod
    def value(base: Tensor, parts: Mapping[str, Tensor], settings: WeightTraining) -> Tensor:
        """Return the trained weight, in the shape and dtype of the frozen weight ``base``, from its parameters.

        The forward pass and the export compute it by this expression.
        """

    @classmethod
    def takes(cls, name: str, settings: WeightTraining) -> bool:
        """Return whether the gated weight ``name`` is to be trained."""
        return True

    @classmethod
    @abstractmethod
    def parameters_of(cls, weight: Weight, settings: WeightTraining) -> int:
        """Return the number of parameters of the trained form of ``weight``, without creating them."""

    @classmethod
    def check(cls, names: Collection[str], settings: WeightTraining) -> None:
        """Check that the settings suit the gated weights ``names``.

        Raises:
            UserError: They do not.
        """


class Master(Trainable):
    """Weight that is trained itself: a float32 copy, rounded to the base model's dtype in every forward pass.

    At a rate of 1e-4 most updates of a bfloat16 weight would be lost by rounding.
    """

    def __init__(self, weight: Weight, settings: WeightTraining, seed: int) -> None:
        """Copy the weight; see :class:`Trainable`."""
        super().__init__(weight, settings, seed)
        self.master = nn.Parameter(weight.parameter.detach().to(torch.float32, copy=True))

    @staticmethod
    def value(base: Tensor, parts: Mapping[str, Tensor], settings: WeightTraining) -> Tensor:
        """Return the rounded master; see :meth:`Trainable.value`."""
        return parts["master"].to(base.dtype)

    @classmethod
    def parameters_of(cls, weight: Weight, settings: WeightTraining) -> int:
        """Return one for each element; see :meth:`Trainable.parameters_of`."""
        return weight.parameter.numel()

    @torch.no_grad()
    def start_at(self, weight: Tensor) -> None:
        """Start from another ``weight`` than the frozen one."""
        self.master.copy_(weight)


class LowRank(Trainable):
    """Weight W + s·(B·A) with factors of rank r, s = lora_alpha / r: LoRA (https://arxiv.org/abs/2106.09685).

    Under a gate it is M ⊙ (W + s·B·A): the product keeps every zero of the mask, and the exported weight is this very
    expression. B starts at 0. Each weight of stacked experts has its own factors.
    """

    own_settings = ("r", "lora_alpha", "target_modules")

    def __init__(self, weight: Weight, settings: WeightTraining, seed: int) -> None:
        """Create the factors; see :class:`Trainable`."""
        super().__init__(weight, settings, seed)
        base = weight.parameter
        *stacked, rows, columns = base.shape
        spread = 1 / math.sqrt(3 * base.shape[weight.input_dim])
        start = initial_noise((*stacked, settings.r, columns), spread, seed, f"{weight.name} lora_A")
        zeros = torch.zeros((*stacked, rows, settings.r), dtype=torch.float32, device=base.device)
        self.lora_A, self.lora_B = nn.Parameter(start.to(base.device)), nn.Parameter(zeros)

    @staticmethod
    def value(base: Tensor, parts: Mapping[str, Tensor], settings: WeightTraining) -> Tensor:
        """Return the weight with the product added in float32; see :meth:`Trainable.value`."""
        with torch.autocast(base.device.type, enabled=False):
            product = parts["lora_B"].to(torch.float32) @ parts["lora_A"].to(torch.float32)
            return (base.to(torch.float32) + settings.lora_alpha / settings.r * product).to(base.dtype)

    @classmethod
    def parameters_of(cls, weight: Weight, settings: WeightTraining) -> int:
        """Return the elements of both factors; see :meth:`Trainable.parameters_of`."""
        *stacked, rows, columns = weight.parameter.shape
        return math.prod(stacked) * settings.r * (rows + columns)

    @classmethod
    def takes(cls, name: str, settings: WeightTraining) -> bool:
        """Return whether ``target_modules`` names the layer; see :meth:`Trainable.takes`."""
        return any(_is_named(name, target) for target in settings.target_modules or [""])

    @classmethod
    def check(cls, names: Collection[str], settings: WeightTraining) -> None:
        """Check that every entry of ``target_modules`` names a gated layer; see :meth:`Trainable.check`."""
        for target in settings.target_modules or ():
            if not any(_is_named(name, target) for name in names):
                ends = sorted({_layer(name).rpartition(".")[2] for name in names})
                raise UserError(
                    f"weight_training.target_modules: no gated layer is named {target}. There are {listing(ends, 12)}."
                )


def _layer(name: str) -> str:
    return name.removesuffix(".weight")


def _is_named(name: str, target: str) -> bool:
    """Return whether ``target`` is the layer of a weight or the end of its name; an empty target is every layer."""
    return not target or f".{_layer(name)}".endswith(f".{target}")


@dataclass(frozen=True)
class Kind:
    """Row of the table of what may be trained.

    Attributes:
        gated: Class of the trained weights of gates; None: they are frozen.
        norms: Whether the norms' weights, which have no gates, are trained.
    """

    gated: type[Trainable] | None
    norms: bool


KINDS: dict[str, Kind] = {
    NONE: Kind(None, norms=False),
    "kept": Kind(Master, norms=True),
    "lora": Kind(LowRank, norms=False),
    "norms": Kind(None, norms=True),
}


def check_kind(name: str) -> None:
    """Check that :data:`KINDS` has a row ``name``.

    Raises:
        UserError: It has none.
    """
    if name not in KINDS:
        raise UserError(f"model.train_weights is {name!r}; give one of {', '.join(KINDS)}.")


def parameters_of(train_weights: str, settings: WeightTraining, weights: Mapping[str, Weight], model: nn.Module) -> int:
    """Return the number of parameters that a run trains of weights, without those of masks.

    Args:
        train_weights: Name of what is trained.
        settings: Settings of the training.
        weights: Gated weights.
        model: Model, still without gates.
    """
    kind = KINDS[train_weights]
    whole = [*(norms_in(model) if kind.norms else ())]
    whole += [places[0] for places in embeddings_of(model)] if settings.embeddings else []
    found = sum(weight.parameter.numel() for weight in whole)
    if kind.gated is not None:
        taken = [weight for name, weight in weights.items() if kind.gated.takes(name, settings)]
        found += sum(kind.gated.parameters_of(weight, settings) for weight in taken)
    return found


def norms_in(module: nn.Module, within: str = "") -> Iterator[Weight]:
    """Yield the weights of the norms in ``module`` that are not trained yet.

    A norm is a module of a class whose name says so, as in ``LayerNorm`` and ``LlamaRMSNorm``.

    Args:
        module: Model or part of one.
        within: Name of ``module`` in the model, for the names of the weights.
    """
    for name, inner in module.named_modules(prefix=within):
        if "norm" in type(inner).__name__.lower():
            for tensor, parameter in inner.named_parameters(recurse=False):
                if parameter.is_floating_point():
                    yield Weight(f"{name}.{tensor}", inner, tensor, None, name, 0)


def embeddings_of(model: nn.Module) -> list[list[Weight]]:
    """Return the places of the token embeddings and of the head in ``model``: of both together where they are tied."""
    causal: Any = model
    names = {id(module): name for name, module in model.named_modules()}
    places: dict[int, list[Weight]] = {}
    for module in (causal.get_input_embeddings(), causal.get_output_embeddings()):
        if module is not None:
            name = names[id(module)]
            weight = Weight(f"{name}.weight", module, "weight", None, name, 0)
            places.setdefault(id(weight.parameter), []).append(weight)
    return list(places.values())


def describe(train_weights: str, settings: WeightTraining, start: str | None) -> dict[str, Any]:
    """Describe the training of weights for the provenance of a mask, as plain values; empty if none are trained."""
    if train_weights == NONE:
        return {}
    kind = KINDS[train_weights].gated
    foreign = {name for row in KINDS.values() if row.gated is not None for name in row.gated.own_settings}
    foreign -= set() if kind is None else {*kind.own_settings}
    given = {name: value for name, value in asdict(settings).items() if name not in foreign}
    return {"kind": train_weights, **given, **({} if start is None else {"start": start})}
