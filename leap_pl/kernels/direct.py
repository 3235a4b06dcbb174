"""Compiled kernels that are called directly, past what torch.compile does before every call.

A step calls two kernels for each gated weight, between products of matrices that empty the processor's caches. There,
what torch.compile makes of a call (looking up its entry, checking its guards, unpacking and repacking in three layers)
takes about as long as the kernels themselves. So the way through it is taken once for each kind of arguments, and
remembered.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from leap_pl.kernels.inductor import Graph, compile_and_note


class DirectKernel:
    """``kernel``, compiled by torch.compile for every size, and called directly once a call of its kind was made.

    Two calls are of a kind where all that torch.compile checks is equal: of each tensor its class, sizes, strides,
    dtype and device and whether it requires gradients, every other argument, and the modes of torch that compiled
    code depends on. The first call of a kind goes through torch.compile, which compiles where it must; for the next
    ones the compiled graph is called with the arguments that this call was seen to give it.
    """

    def __init__(self, kernel: Callable[..., Any], options: Mapping[str, Any]) -> None:
        """Take the ``kernel``, whose arguments are positional, a tensor first, and inductor's ``options``."""
        self._checked = compile_and_note(kernel, options, lambda *call: self._seen.append(call))
        self._calls: dict[Hashable, _Call] = {}
        self._seen: list[tuple[Graph, Sequence[Any], Sequence[Any]]] = []  # calls of graphs: inputs, outputs

    def __call__(self, *arguments: Any) -> Any:
        """What the kernel returns."""
        kind = _kind(arguments)
        call = self._calls.get(kind)
        if call is not None:
            return call(arguments)
        try:
            result = self._checked(*arguments)
            call = _Call.between(arguments, result, *self._seen[-1]) if self._seen else None
        finally:
            self._seen.clear()  # it holds the arguments
        if call is not None:
            self._calls[kind] = call
        return result


@dataclass(frozen=True)
class _Call:
    """How a compiled graph is called with a kernel's arguments, and its outputs returned.

    Attributes:
        graph: Compiled.
        inputs: Its inputs but for tensors: sizes, the same for all calls of a kind.
        tensors: Places among the inputs, and the number of the argument that comes there.
        single: Whether the kernel returns its one output itself, and no tuple.
    """

    graph: Graph
    inputs: tuple[Any, ...]
    tensors: tuple[tuple[int, int], ...]
    single: bool

    def __call__(self, arguments: Sequence[Any]) -> Any:
        inputs = list(self.inputs)
        for place, number in self.tensors:
            inputs[place] = arguments[number]
        outputs = self.graph(inputs)
        return outputs[0] if self.single else tuple(outputs)

    @classmethod
    def between(
        cls, arguments: Sequence[Any], result: Any, graph: Graph, inputs: Sequence[Any], outputs: Sequence[Any]
    ) -> "_Call | None":
        """The call by which ``graph`` made ``result`` of ``arguments``; None where more was done than to call it."""
        numbers = {id(argument): number for number, argument in enumerate(arguments)}
        single = isinstance(result, Tensor)
        returned = [result] if single else list(result)
        same = len(returned) == len(outputs) and all(a is b for a, b in zip(returned, outputs, strict=True))
        tensors = [(place, numbers.get(id(given))) for place, given in enumerate(inputs) if isinstance(given, Tensor)]
        known = [(place, number) for place, number in tensors if number is not None]
        if not same or len(known) < len(tensors) or len(numbers) < len(arguments):
            return None
        fixed = tuple(None if isinstance(given, Tensor) else given for given in inputs)
        return cls(graph, fixed, tuple(known), single)


def _kind(arguments: Sequence[Any]) -> Hashable:
    """All that decides whether what was compiled for other arguments serves for these."""
    device = arguments[0].device.type
    kind: list[Any] = [
        torch.get_num_threads(),
        torch.is_grad_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
    ]
    for argument in arguments:
        if isinstance(argument, Tensor):
            kind += (
                type(argument),
                argument.shape,
                argument.stride(),
                argument.dtype,
                argument.device,
                argument.requires_grad,
            )
        else:
            kind.append(argument)
    return tuple(kind)
