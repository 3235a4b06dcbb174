"""Call compiled kernels directly, without the overhead of torch.compile at every call.

A step calls two kernels for each gated weight, between matrix products that evict the processor's caches. There, the
overhead of torch.compile (looking up the cache entry, checking guards, unpacking and repacking in three layers) takes
about as long as the kernels themselves. So each kind of call goes through torch.compile once, and its compiled graph is
cached.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from leap_pl.kernels.inductor import Graph, compile_and_note


class DirectKernel:
    """Kernel compiled by torch.compile with dynamic sizes, and called directly from the second call of a kind.

    Two calls are of one kind if everything that torch.compile guards is equal: class, sizes, strides, dtype, device and
    ``requires_grad`` of each tensor, every other argument, and the modes of torch that compiled code depends on. The
    first call of a kind goes through torch.compile, which compiles if necessary. Later calls run the compiled graph
    with its inputs arranged as recorded from the first.
    """

    def __init__(self, kernel: Callable[..., Any], options: Mapping[str, Any]) -> None:
        """Wrap ``kernel``, which takes positional arguments, a tensor first; ``options`` are those of inductor."""
        self._checked = compile_and_note(kernel, options, lambda *call: self._seen.append(call))
        self._calls: dict[Hashable, _Call] = {}
        self._seen: list[tuple[Graph, Sequence[Any], Sequence[Any]]] = []  # recorded graph calls: inputs, outputs

    def __call__(self, calls: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Return the results of the kernel for the arguments of each of ``calls``, on one device."""
        modes = _modes(calls[0][0].device.type)
        known: dict[int, Hashable] = {}  # by the identity of a tensor, which several calls may share
        return [self._result(arguments, modes, known) for arguments in calls]

    def _result(self, arguments: tuple[Any, ...], modes: Hashable, known: dict[int, Hashable]) -> Any:
        kind = (modes, *[_kind(argument, known) for argument in arguments])
        call = self._calls.get(kind)
        if call is not None:
            return call(arguments)
        try:
            result = self._checked(*arguments)
            call = _Call.between(arguments, result, *self._seen[-1]) if self._seen else None
        finally:
            self._seen.clear()  # it keeps the arguments alive
        if call is not None:
            self._calls[kind] = call
        return result


@dataclass(frozen=True)
class _Call:
    """Mapping of a kernel's arguments to the inputs of its compiled graph.

    Attributes:
        graph: The compiled graph.
        inputs: Inputs other than tensors: sizes, the same for all calls of a kind.
        tensors: Pairs of an input's index and the index of its argument, for each tensor.
        single: Whether the kernel returns a single tensor instead of a tuple.
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
        """Return the mapping by which ``graph`` computed ``result``; None if one call of it did not suffice."""
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


def _modes(device: str) -> Hashable:
    """Return the modes of torch that compiled code depends on."""
    return (
        torch.get_num_threads(),
        torch.is_grad_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
    )


def _kind(argument: Any, known: dict[int, Hashable]) -> Hashable:
    """Return the key of an argument; code compiled for one call is valid for all calls with the same keys."""
    if not isinstance(argument, Tensor):
        return argument
    kind = known.get(id(argument))
    if kind is None:
        kind = known[id(argument)] = (
            type(argument),
            argument.shape,
            argument.stride(),
            argument.dtype,
            argument.device,
            argument.requires_grad,
        )
    return kind
