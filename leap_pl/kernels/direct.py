"""Call compiled kernels directly, without the overhead of torch.compile at every call.

A step calls two kernels for each gated weight, between matrix products that evict the processor's caches. There, the
overhead of torch.compile (looking up the cache entry, checking guards, unpacking and repacking in three layers) takes
about as long as the kernels themselves. So each kind of call goes through torch.compile once, and its compiled graph is
cached.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from leap_pl.kernels.inductor import Graph, compile_and_note, sizes_apart


class DirectKernel:
    """Kernel compiled by torch.compile with dynamic sizes, and called directly from the second call of a kind.

    Two calls are of one kind if everything that torch.compile guards is equal: class, sizes, strides, dtype, device and
    ``requires_grad`` of each tensor, every other argument, and the modes of torch that compiled code depends on. Of the
    arguments of a call only the first ``varying`` are looked at, and those that all calls share. The first call of a
    kind goes through torch.compile, which compiles if necessary. Later calls run the compiled graph with its inputs
    arranged as recorded from the first.
    """

    def __init__(self, kernel: Callable[..., Any], options: Mapping[str, Any], varying: int | None = None) -> None:
        """Wrap ``kernel``; see :func:`leap_pl.kernels.compiled.compiled`."""
        self._varying = slice(varying)
        self._checked = compile_and_note(kernel, options, lambda *call: self._seen.append(call))
        self._calls: dict[Hashable, dict[Hashable, _Call]] = {}  # by the kinds of what calls share, and of the others
        self._seen: list[tuple[Graph, Sequence[Any], Sequence[Any]]] = []  # recorded graph calls: inputs, outputs

    def __call__(self, calls: Sequence[tuple[Any, ...]], shared: tuple[Any, ...] = ()) -> list[Any]:
        """Return the kernel's results for the arguments of each of ``calls`` and then ``shared``, on one device."""
        alike, varying = (_modes(calls[0][0].device.type), *map(_kind, shared)), self._varying
        known = self._calls.setdefault(alike, {})
        results = []
        for arguments in calls:
            kind = tuple(map(_kind, arguments[varying]))
            call = known.get(kind)
            whole = arguments + shared
            results.append(self._first(whole, known, kind) if call is None else call(whole))
        return results

    def _first(self, arguments: tuple[Any, ...], known: "dict[Hashable, _Call]", kind: Hashable) -> Any:
        """Return the result of the first call of a kind, and note how to make the next ones."""
        try:
            with sizes_apart():
                result = self._checked(*arguments)
            call = _Call.between(arguments, result, *self._seen[-1]) if self._seen else None
        finally:
            self._seen.clear()  # it keeps the arguments alive
        if call is not None:
            known[kind] = call
        return result


class _Call:
    """Mapping of a kernel's arguments to the inputs of its compiled graph.

    Attributes:
        graph: The compiled graph.
        fixed: Inputs other than tensors: sizes, the same for all calls of a kind.
        order: Function that takes the inputs from the arguments followed by ``fixed``.
        single: Whether the kernel returns a single tensor instead of a tuple.
    """

    __slots__ = ("fixed", "graph", "order", "single")

    def __init__(self, graph: Graph, places: Sequence[int], fixed: tuple[Any, ...], single: bool) -> None:
        """Map arguments to the inputs of ``graph``: ``places`` are their places among arguments and ``fixed``."""
        self.graph, self.fixed, self.single = graph, fixed, single
        self.order = itemgetter(*places) if len(places) > 1 else lambda given: (given[places[0]],)

    def __call__(self, arguments: tuple[Any, ...]) -> Any:
        outputs = self.graph(list(self.order(arguments + self.fixed)))
        return outputs[0] if self.single else tuple(outputs)

    @classmethod
    def between(
        cls, arguments: tuple[Any, ...], result: Any, graph: Graph, inputs: Sequence[Any], outputs: Sequence[Any]
    ) -> "_Call | None":
        """Return the mapping by which ``graph`` computed ``result``; None if one call of it did not suffice."""
        numbers = {id(argument): number for number, argument in enumerate(arguments)}
        single = isinstance(result, Tensor)
        returned = [result] if single else list(result)
        if len(returned) != len(outputs) or any(a is not b for a, b in zip(returned, outputs, strict=True)):
            return None
        if len(numbers) < len(arguments):
            return None
        places: list[int] = []
        fixed: list[Any] = []
        for given in inputs:
            if not isinstance(given, Tensor):
                places.append(len(arguments) + len(fixed))
                fixed.append(given)
            elif id(given) in numbers:
                places.append(numbers[id(given)])
            else:
                return None
        return cls(graph, places, tuple(fixed), single)


def _modes(device: str) -> Hashable:
    """Return the modes of torch that compiled code depends on."""
    return (
        torch.get_num_threads(),
        torch.is_grad_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
    )


def _kind(argument: Any) -> Hashable:
    """Return the key of an argument; code compiled for one call is valid for all calls with the same keys."""
    # As few values as will do, and no device but whether it is a CPU: their hashes are most of the cost of a call.
    if isinstance(argument, Tensor):
        return (
            type(argument),
            argument.shape,
            argument.stride(),
            argument.dtype,
            argument.requires_grad,
            argument.is_cpu,
        )
    return argument
