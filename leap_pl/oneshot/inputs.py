"""Input statistics of a block's matrices, collected from matrix products while the block runs.

A matrix is the unit of pruning: the weight of an ``nn.Linear``, the transposed weight of a ``Conv1D``, or one expert of
a stacked tensor. Its inputs are found by intercepting matrix products of which an operand is the weight tensor or a
view into it. That works for all three kinds, and finds the tokens routed to each expert.

Shapes: N tokens, O outputs, I inputs.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from leap_pl.base_model.weights import Weight
from leap_pl.kernels.precision import full_float32

ERROR_TOKENS = 2048  # tokens on which a layer's error is measured without a Hessian
WHOLE = 1 << 40  # a probability of 1, as a whole number
GOLDEN = 0.6180339887498949  # whose multiples, modulo 1, fill the unit interval evenly


@dataclass(frozen=True)
class Matrix:
    """One (outputs, inputs) matrix of a weight tensor.

    Attributes:
        weight: Weight tensor.
        expert: Index in a stacked tensor; None if the tensor itself is a matrix.
    """

    weight: Weight
    expert: int | None = None

    @classmethod
    def of(cls, weight: Weight) -> "list[Matrix]":
        """Return all matrices of one weight tensor."""
        parameter = weight.parameter
        if parameter.ndim == 2:
            return [cls(weight)]
        return [cls(weight, expert) for expert in range(parameter.shape[0])]

    @property
    def name(self) -> str:
        """Return the weight's name, followed by the expert's index in brackets."""
        return self.weight.name if self.expert is None else f"{self.weight.name}[{self.expert}]"

    @property
    def size(self) -> int:
        """Return the number of inputs."""
        return self.weight.parameter.shape[self.weight.input_dim]

    def view(self, tensor: Tensor) -> Tensor:
        """Return the view (O, I) of this matrix into ``tensor``, which has the weight's shape."""
        if self.expert is not None:
            tensor = tensor[self.expert]
        inputs_last = self.weight.input_dim == self.weight.parameter.ndim - 1
        return tensor if inputs_last else tensor.mT

    def dense(self) -> Tensor:
        """Return a copy of the matrix in fp32, (O, I)."""
        return self.view(self.weight.parameter.detach()).to(torch.float32, copy=True).contiguous()


@dataclass
class InputStatistics:
    """Sums over the calibration tokens of one input.

    Attributes:
        wants_gram: Whether to compute the Hessian.
        count: Number of tokens so far.
        square: Σ x_j², fp32 (I,).
        gram: Σ x xᵀ, fp32 (I, I), or None.
        sample: Some tokens (N, I) of each batch, scaled so that sums of squares over them estimate those over all
            tokens; the layer's error is measured on them without a Hessian.
    """

    wants_gram: bool
    count: int = 0
    square: Tensor | None = None
    gram: Tensor | None = None
    sample: list[Tensor] = field(default_factory=list)

    @full_float32()
    def add(self, inputs_NI: Tensor, *, sample: int) -> None:
        """Add tokens; without a Hessian, keep about ``sample`` of them (:func:`sampled`)."""
        inputs_NI = inputs_NI.float()
        squares_NI = inputs_NI.square()
        square_I = squares_NI.sum(0)
        self.count += inputs_NI.shape[0]
        self.square = square_I if self.square is None else self.square + square_I
        if not self.wants_gram:
            # Starts that fill an interval evenly, so that no place of a sequence is met in every batch.
            start = ((len(self.sample) + 0.5) * GOLDEN) % 1
            self.sample.append(sampled(inputs_NI, squares_NI.sum(1), sample, start))
            return
        if self.gram is None:
            self.gram = inputs_NI.T @ inputs_NI
        else:
            self.gram.addmm_(inputs_NI.T, inputs_NI)

    @property
    def mean_square(self) -> Tensor:
        """Return the mean over tokens of x_j²."""
        assert self.square is not None, "no token was added"
        return self.square / self.count

    def reached(self) -> bool:
        """Return whether any input was not 0: of others nothing can be learned about the weights."""
        return self.square is not None and bool((self.square > 0).any())

    def finite(self) -> bool:
        """Return whether nothing overflowed: the squares are the Hessian's diagonal, which bounds its other entries."""
        return self.square is None or bool(torch.isfinite(self.square).all())

    def error(self, dense_OI: Tensor, pruned_OI: Tensor) -> float:
        """Return ``‖XW'ᵀ − XWᵀ‖² / ‖XWᵀ‖²``: exact with a Hessian, else over the sampled tokens."""
        lost, whole = self._energy(pruned_OI - dense_OI), self._energy(dense_OI)
        return lost / whole if whole > 0 else 0.0

    def _energy(self, matrix_OI: Tensor) -> float:
        if self.gram is not None:
            return max(float(((matrix_OI @ self.gram) * matrix_OI).sum()), 0.0)
        return sum(float((part_NI @ matrix_OI.T).square().sum()) for part_NI in self.sample)


def sampled(inputs_NI: Tensor, energies_N: Tensor, sample: int, start: float = 0.5) -> Tensor:
    """Return ``sample`` rows of ``inputs_NI``, scaled so that sums of squares over them estimate those over all rows.

    A row is drawn with a probability q, half of it in proportion to its energy and half alike for all, and scaled by
    1/√(sample·q). The first token of a sequence often has most of the energy of all: drawn as any other it would nearly
    always be missed, and a sample that met it in every sequence would be of little else.

    Args:
        inputs_NI: Tokens.
        energies_N: ‖x‖² of each.
        sample: Number of rows; they are all returned as they are where there are no more.
        start: Place in [0, 1) of the first draw in its interval; the draws are evenly spaced in Σq.
    """
    count = inputs_NI.shape[0]
    if count <= sample:
        return inputs_NI.clone()
    whole = energies_N.sum()
    shares_N = torch.where(whole > 0, energies_N / whole, 1 / count)
    q_N = 0.5 * shares_N.nan_to_num() + 0.5 / count
    # In whole numbers: a GPU adds others in no fixed order.
    sums_N = (q_N * WHOLE).long().cumsum(0)
    # In float32 whatever the default is: half precision would round different places to one.
    places = torch.arange(sample, dtype=torch.float32, device=q_N.device)
    draws = ((places + start) / sample * WHOLE).long()
    rows = torch.searchsorted(sums_N, draws).clamp_(max=count - 1)
    return inputs_NI[rows] * (sample * q_N[rows]).rsqrt()[:, None]


Part = tuple[int, Tensor] | Literal["transposed"] | None
Sink = Callable[[Matrix, Tensor, Tensor, Part], None]


class ProductWatch(TorchFunctionMode):
    """Mode that calls ``sink(matrix, inputs, output, part)`` after every product of inputs with a watched matrix.

    ``output`` is that of the whole product. If that is a batched product of several experts, ``part`` is the index of
    the matrix's output in it; if the weight stands on the left, with its inputs and outputs in columns, as in Mamba's
    mixer, it is ``transposed``; else None. Such a product has a row of zeros for every token that another expert gets
    (Llama 4): these are not among the inputs.
    """

    def __init__(self, matrices: Iterable[Matrix], sink: Sink) -> None:
        """Watch ``matrices``, whose parameters must keep their addresses in memory."""
        super().__init__()
        self.sink = sink
        self.stacks: dict[str, list[Matrix]] = {}
        for matrix in matrices:
            self.stacks.setdefault(matrix.weight.name, []).append(matrix)
        self.ranges = []
        for stack in self.stacks.values():
            parameter = stack[0].weight.parameter
            first = parameter.data_ptr()
            self.ranges.append((first, first + parameter.numel() * parameter.element_size(), parameter, stack))

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call ``func``, and match the operands if it is a product."""
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        operands = _operands(func, args, kwargs)
        if operands is not None:
            self._match(*operands, output)
        return output

    def _match(self, inputs: Any, weight: Any, output: Tensor) -> None:
        if isinstance(inputs, Tensor) and isinstance(weight, Tensor) and self._stands_left(inputs, weight):
            stack = next(stack for *_, parameter, stack in self.ranges if parameter.data_ptr() == inputs.data_ptr())
            self.sink(stack[0], weight.mT, output, "transposed")
            return
        if not isinstance(weight, Tensor) or weight.ndim < 2 or not isinstance(inputs, Tensor):
            return
        address = weight.data_ptr()
        for first, end, parameter, stack in self.ranges:
            if not first <= address < end or weight.dtype != parameter.dtype:
                continue
            if inputs.shape[-1] != stack[0].size:
                return
            if weight.ndim == 3 and weight.shape[0] == len(stack) == inputs.shape[0]:
                for expert, matrix in enumerate(stack):
                    used = inputs[expert].detach().any(-1)
                    self.sink(matrix, inputs[expert][used], output, (expert, used))
            elif weight.ndim == 2:
                bytes_each = parameter.numel() * parameter.element_size() // len(stack)
                self.sink(stack[(address - first) // bytes_each], inputs, output, None)
            return

    def _stands_left(self, left: Tensor, right: Tensor) -> bool:
        """Return whether a product is of a whole weight with inputs behind it, as in Mamba's mixer."""
        if left.ndim != 2 or right.ndim < 2:
            return False
        place, shape = left.data_ptr(), left.shape
        return any(
            first == place and len(stack) == 1 and parameter.shape == shape and right.shape[-2] == stack[0].size
            for first, _, parameter, stack in self.ranges
        )


def _operands(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Any] | None:
    """Return the inputs and the weight of a product, or None for any other function."""
    if func is F.linear:
        names, skip = ("input", "weight"), 0
    elif func in (torch.addmm, Tensor.addmm, torch.baddbmm, Tensor.baddbmm):
        names, skip = ("mat1", "mat2"), 1
    elif func in _PRODUCTS:
        names, skip = ("input", "other"), 0
    else:
        return None
    both = args[skip : skip + 2]
    inputs, weight = (both[i] if i < len(both) else kwargs.get(names[i]) for i in range(2))
    return inputs, weight


_PRODUCTS = (
    torch.matmul,
    Tensor.matmul,
    Tensor.__matmul__,
    torch.mm,
    Tensor.mm,
    torch.bmm,
    Tensor.bmm,
)
