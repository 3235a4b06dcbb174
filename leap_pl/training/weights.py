"""Training of weights: which of them are trained, as what parameters, and with what rate.

A trained weight is beside the frozen one of the base model, which the teacher reads: a master in float32 (``kept``,
``norms``), or two thin matrices (``lora``).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from leap_pl.base_model.weights import Weight, is_of_text
from leap_pl.errors import UserError, listing
from leap_pl.gates import TrainedWeight
from leap_pl.gates.fixed import mask_of
from leap_pl.inputs.ranges import check_numbers
from leap_pl.kernels.noise import initial_noise
from leap_pl.kernels.precision import full_float32

NONE = "none"  # all weights are frozen
Bits = Callable[[], Tensor]  # packed bits of a fixed mask


@dataclass(frozen=True)
class WeightTraining:
    """Settings of the training of weights, in addition to which are trained (``model.train_weights``).

    The weights are one parameter group of the optimizer, whose other settings they share.

    Attributes:
        lr: Learning rate of the weights; by default 2e-4, and 2e-5 under a fixed mask that was learned, read off the
            zeros of a model or made by a method that leap_pl does not know, and from weights that were trained before:
            few tokens then only disturb what mask and weights were trained for.
        warmup_steps: Number of warmup steps of the weights' rate, in the default schedule.
        weight_decay: Weight decay of the weights. In low-rank training it decays the factors.
        embeddings: Train the token embeddings and the head as well, whole.
        compact: Hold masters, gradients and moments of the kept weights alone: less memory, and a slower step; with
            kept, under a fixed mask.
        r: Rank of the factors, with lora.
        lora_alpha: Scale of the factors' product, which is multiplied by lora_alpha / r, with lora.
        target_modules: Names of the gated layers to train, whole or their ends, such as ``q_proj``, with lora; by
            default all gated layers.
    """

    lr: float | None = None
    warmup_steps: int = 5
    weight_decay: float = 0.0
    embeddings: bool = False
    compact: bool = False
    r: int = 16
    lora_alpha: float = 32.0
    target_modules: list[str] | None = None

    def __post_init__(self) -> None:
        check_numbers(asdict(self), "model.weight_training.", "weight_training.")
        names: Any = self.target_modules
        if isinstance(names, str):
            raise UserError(f"weight_training.target_modules is one name, {names!r}; give a list: [{names!r}].")

    def with_rate(self, *, finished: bool) -> "WeightTraining":
        """Return these settings with the default learning rate, if none is set.

        Args:
            finished: Whether the mask is fixed and was learned, or weights that it keeps were trained before.
        """
        return self if self.lr is not None else replace(self, lr=2e-5 if finished else 2e-4)


class Trainable(TrainedWeight, ABC):
    """Kind of trained weight; a new one is a subclass and a row of :data:`KINDS`.

    Attributes:
        own_settings: Names of the settings of :class:`WeightTraining` that this kind alone reads.
        reads_bits: Whether :meth:`value` needs the packed bits of the weight's fixed mask too, as the part ``bits``.
    """

    own_settings: ClassVar[tuple[str, ...]] = ()
    reads_bits: ClassVar[bool] = False

    @abstractmethod
    def __init__(self, weight: Weight, settings: WeightTraining, seed: int, bits: Bits | None = None) -> None:
        """Create the parameters for the frozen ``weight``; random numbers depend on ``seed`` and its name alone.

        Args:
            weight: Frozen weight.
            settings: Settings of the training.
            seed: Seed of the run.
            bits: Function that returns the packed bits of its mask, if this kind reads them.
        """
        super().__init__()
        self.settings, self.bits = settings, bits

    def forward(self, base: Tensor) -> Tensor:
        """Return :meth:`value` of the parameters; see :meth:`.TrainedWeight.forward`."""
        bits = {} if self.bits is None else {"bits": self.bits()}
        return self.value(base, dict(self.named_parameters()) | bits, self.settings)

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
    def parameters_of(cls, weight: Weight, settings: WeightTraining, density: float) -> int:
        """Return the number of parameters of the trained form of ``weight``, without creating them.

        Args:
            weight: Weight to train.
            settings: Settings of the training.
            density: Share of the gated weights that the mask keeps.
        """

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

    own_settings = ("compact",)

    def __init__(self, weight: Weight, settings: WeightTraining, seed: int, bits: Bits | None = None) -> None:
        """Copy the weight; see :class:`Trainable`."""
        super().__init__(weight, settings, seed, bits)
        self.master = nn.Parameter(weight.parameter.detach().to(torch.float32, copy=True))

    @staticmethod
    def value(base: Tensor, parts: Mapping[str, Tensor], settings: WeightTraining) -> Tensor:
        """Return the rounded master; see :meth:`Trainable.value`."""
        return parts["master"].to(base.dtype)

    @classmethod
    def parameters_of(cls, weight: Weight, settings: WeightTraining, density: float) -> int:
        """Return one for each element; see :meth:`Trainable.parameters_of`."""
        return weight.parameter.numel()

    @torch.no_grad()
    def start_at(self, weight: Tensor) -> None:
        """Start from another ``weight`` than the frozen one."""
        self.master.copy_(weight)


class CompactMaster(Master):
    """Master of the weights alone that a fixed mask keeps, in the order of their positions."""

    reads_bits = True

    def __init__(self, weight: Weight, settings: WeightTraining, seed: int, bits: Bits | None = None) -> None:
        """Copy the kept weights; see :class:`Trainable`."""
        assert bits is not None
        Trainable.__init__(self, weight, settings, seed, bits)
        base = weight.parameter.detach()
        self.master = nn.Parameter(base[mask_of(bits(), base.shape)].to(torch.float32))

    @staticmethod
    def value(base: Tensor, parts: Mapping[str, Tensor], settings: WeightTraining) -> Tensor:
        """Return ``base`` with the rounded master in the kept positions; see :meth:`Trainable.value`."""
        value: Tensor = Placed.apply(parts["master"].to(base.dtype), parts["bits"], base)
        return value

    @classmethod
    def parameters_of(cls, weight: Weight, settings: WeightTraining, density: float) -> int:
        """Return one for each kept element, as of a mask that removes equal shares of all weights."""
        return round(density * weight.parameter.numel())

    @torch.no_grad()
    def start_at(self, weight: Tensor) -> None:
        """Start from another ``weight``; see :meth:`Master.start_at`."""
        assert self.bits is not None
        bits = self.bits()
        self.master.copy_(weight.to(bits.device)[mask_of(bits, weight.shape)])

    def resize(self, count: int) -> None:
        """Make room for ``count`` kept weights, which a checkpoint has."""
        self.master.data = self.master.data.new_zeros(count)
        if self.master.grad is not None:
            self.master.grad = torch.zeros_like(self.master.data)


class Placed(torch.autograd.Function):
    """Autograd function (kept, bits, base) → ``base`` with the kept values where the packed mask is True.

    Neither pass reads a number from the device, as masked_scatter and masked_select do.
    """

    @staticmethod
    def forward(ctx: Any, kept: Tensor, bits: Tensor, base: Tensor) -> Tensor:
        """Return the tensor, of the shape of ``base``.

        Raises:
            UserError: On a CPU: the mask keeps more or fewer weights.
        """
        ctx.save_for_backward(bits)
        ctx.count, ctx.shape = len(kept), base.shape
        mask, place = _places(bits, base.shape)
        if kept.device.type == "cpu" and int(place[-1]) + 1 != len(kept):
            raise UserError(
                f"there are {len(kept):,} trained weights for {int(place[-1]) + 1:,} that the mask keeps of a layer. "
                "Take another checkpoint."
            )
        return torch.where(mask, kept.index_select(0, place.clamp_(0)).view(base.shape), base) if len(kept) else base

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Return the gradient in the kept positions."""
        (bits,) = ctx.saved_tensors
        mask, place = _places(bits, ctx.shape)
        # The gradients of removed weights go to a place behind the others.
        place = torch.where(mask.flatten(), place, ctx.count).long()
        return grad.new_empty(ctx.count + 1).scatter_(0, place, grad.flatten())[:-1], None, None


def _places(bits: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Return the mask, and for each of its elements, flat, the number of kept ones up to it, less one."""
    mask = mask_of(bits, shape)
    whole = torch.int32 if mask.numel() < 2**31 else torch.int64  # stacked experts may have more
    return mask, mask.flatten().cumsum(0, dtype=whole).sub_(1)


class LowRank(Trainable):
    """Weight W + s·(B·A) with factors of rank r, s = lora_alpha / r: LoRA (https://arxiv.org/abs/2106.09685).

    Under a gate it is M ⊙ (W + s·B·A): the product keeps every zero of the mask, and the exported weight is this very
    expression. The factor of the outputs starts at 0, that of the inputs at random: B and A, or A and B where a weight
    is stored (in, out). Each weight of stacked experts has its own factors.
    """

    own_settings = ("r", "lora_alpha", "target_modules")

    def __init__(self, weight: Weight, settings: WeightTraining, seed: int, bits: Bits | None = None) -> None:
        """Create the factors; see :class:`Trainable`."""
        super().__init__(weight, settings, seed, bits)
        base = weight.parameter
        *stacked, rows, columns = base.shape
        inputs = base.shape[weight.input_dim]
        of_rows = weight.input_dim % base.dim() != base.dim() - 1  # the inputs: stored (in, out)
        shapes = {"lora_A": (*stacked, settings.r, columns), "lora_B": (*stacked, rows, settings.r)}
        random, zero = reversed(shapes) if of_rows else shapes
        noise = initial_noise(shapes[random], 1 / math.sqrt(3 * inputs), seed, f"{weight.name} {random}")
        zeros = torch.zeros(shapes[zero], dtype=torch.float32, device=base.device)
        starts = {random: noise.to(base.device), zero: zeros}
        self.lora_A, self.lora_B = (nn.Parameter(starts[part]) for part in shapes)

    @staticmethod
    def value(base: Tensor, parts: Mapping[str, Tensor], settings: WeightTraining) -> Tensor:
        """Return the weight with the product added in float32; see :meth:`Trainable.value`."""
        with torch.autocast(base.device.type, enabled=False), full_float32():  # as the export computes it
            product = parts["lora_B"].to(torch.float32) @ parts["lora_A"].to(torch.float32)
            return (base.to(torch.float32) + settings.lora_alpha / settings.r * product).to(base.dtype)

    @classmethod
    def parameters_of(cls, weight: Weight, settings: WeightTraining, density: float) -> int:
        """Return the elements of both factors; see :meth:`Trainable.parameters_of`."""
        *stacked, rows, columns = weight.parameter.shape
        return math.prod(stacked) * settings.r * (rows + columns)

    @classmethod
    def takes(cls, name: str, settings: WeightTraining) -> bool:
        """Return whether ``target_modules`` names the layer; see :meth:`Trainable.takes`."""
        return settings.target_modules is None or any(_is_named(name, target) for target in settings.target_modules)

    @classmethod
    def check(cls, names: Collection[str], settings: WeightTraining) -> None:
        """Check that every entry of ``target_modules`` names a gated layer; see :meth:`Trainable.check`."""
        if settings.target_modules == []:
            raise UserError("weight_training.target_modules is empty. Name layers, or leave it out for all gated ones.")
        for target in settings.target_modules or ():
            if not any(_is_named(name, target) for name in names):
                ends = sorted({_layer(name).rpartition(".")[2] for name in names})
                raise UserError(
                    f"weight_training.target_modules: no gated layer is named {target}. There are {listing(ends, 12)}."
                )


def _layer(name: str) -> str:
    return name.removesuffix(".weight")


def _is_named(name: str, target: str) -> bool:
    """Return whether ``target`` is the layer of a weight or the end of its name."""
    return f".{_layer(name)}".endswith(f".{target}")


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


def kind_of(train_weights: str, settings: WeightTraining) -> type[Trainable] | None:
    """Return the class of the trained weights of gates, or None: they are frozen."""
    kind = KINDS[train_weights].gated
    return CompactMaster if kind is Master and settings.compact else kind


def parameters_of(
    train_weights: str, settings: WeightTraining, weights: Mapping[str, Weight], model: nn.Module, density: float = 1.0
) -> int:
    """Return the number of parameters that a run trains of weights, without those of masks.

    Args:
        train_weights: Name of what is trained.
        settings: Settings of the training.
        weights: Gated weights.
        model: Model, still without gates.
        density: Share of the gated weights that the mask keeps.
    """
    kind, gated = KINDS[train_weights], kind_of(train_weights, settings)
    whole = [*(norms_of(model) if kind.norms else ())]
    whole += [places[0] for places in embeddings_of(model)] if settings.embeddings else []
    taken = [weight for name, weight in weights.items() if gated is not None and gated.takes(name, settings)]
    of_gates = {id(weight.parameter) for weight in taken}  # as a head may be
    sizes = {id(weight.parameter): weight.parameter.numel() for weight in whole}
    found = sum(size for parameter, size in sizes.items() if parameter not in of_gates)
    return found + sum(gated.parameters_of(weight, settings, density) for weight in taken if gated is not None)


def norms_of(model: nn.Module) -> Iterator[Weight]:
    """Yield the weights of the norms that text passes: of a model that also sees or hears, the decoder's."""
    of_text = is_of_text(model)
    for weight in norms_in(model):
        if of_text(weight.name):
            yield weight


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
