"""Calls of a module, such as a decoder block, during which the masked weights of its gates are computed once."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import ref

from torch import Tensor, nn

from leap_pl.base_model.weights import Weight
from leap_pl.gates.trained import softened
from leap_pl.kernels import backward_pass

if TYPE_CHECKING:
    from leap_pl.gates.gate import Gate

Place = tuple[int, str]  # identity of a module, name of its tensor


class Call:
    """Cache of the masked weights of some gates, from the start to the end of each call of one module.

    Softened weights are computed all together when the first is used (:meth:`.Gate.soften_all`), others one by one. So
    a module of stacked experts, which reads its weights once for each expert, costs one computation, and the gates of a
    decoder block cost one autograd node.

    Activation checkpointing runs the forward of a decoder block again within the backward pass, and some versions of
    transformers without the module's hooks. There the cache is kept until the backward pass of the gates begins.

    Attributes:
        running: Whether the module is being called.
    """

    def __init__(self, module: nn.Module, weights: Mapping[str, Weight], gates: "Mapping[str, Gate]") -> None:
        """Watch the calls of ``module``; its hooks keep this object alive, and the gates refer to it weakly."""
        self.running = False
        self._chains = [weights[name].chain for name in gates]
        self._gates = dict(gates)
        self._places = [(id(weights[name].module), weights[name].tensor) for name in gates]
        self._state = next(iter(gates.values())).state
        self._masked: dict[str, Tensor] = {}
        self._ready: dict[Place, Tensor] = {}
        for name in gates:
            _serve(weights[name], self._ready)
        self._task = backward_pass.NONE
        self._hooks = [
            module.register_forward_pre_hook(lambda *_: self._begin()),
            # Also after an exception: recomputation under activation checkpointing ends with one.
            module.register_forward_hook(lambda *_: self._end(), always_call=True),
        ]

    def serves(self, gate: "Gate") -> bool:
        """Return whether ``gate`` is one of these, and not of a deep copy of the model, which refers to them too."""
        return self._gates.get(gate.name) is gate

    def masked(self, gate: "Gate", weight: Tensor) -> Tensor:
        """Return the masked weight of one of the gates, whose frozen weight is ``weight``."""
        if not self.serves(gate) or not (self.running or self._recomputing()):
            return gate.masked(weight)
        found = self._masked.get(gate.name)
        if found is None:
            if gate.state.mode == "soft":
                self._soften()
            else:
                self._masked[gate.name] = gate.masked(weight)
            found = self._masked[gate.name]
        return found

    def _soften(self) -> None:
        gates = [*self._gates.values()]
        # Frozen weights are looked up in each call: a sharded run replaces its parameters.
        frozen = [chain.original for chain in self._chains]
        nodes: dict[Any, list[str]] = {}
        places = zip(self._places, self._chains, strict=True)
        for gate, (masked, kept, energy), (place, chain) in zip(gates, softened(gates, frozen), places, strict=True):
            gate.note(kept, energy)
            self._masked[gate.name] = masked
            if self.running and len(chain) == 1:
                self._ready[place] = masked
            if masked.grad_fn is not None:
                nodes.setdefault(masked.grad_fn, []).append(gate.name)
        # When the turn of the gates comes in the backward pass, nothing needs recomputed masked weights any more. The
        # nodes of the backward pass are those of the forward, not those of a recomputation.
        for node, names in nodes.items() if self.running else ():
            node.register_prehook(partial(_drop, ref(self), names))

    def _recomputing(self) -> bool:
        """Return whether this is a backward pass; the first use in it drops what is cached, here and of the last."""
        task = backward_pass.running()
        if task == backward_pass.NONE:
            return False
        if self._state.recomputed() is not self or task != self._task:
            self._forget_recomputed()
            self._masked, self._task, self._state.recomputed = {}, task, ref(self)
        return True

    def _forget_recomputed(self) -> None:
        last = self._state.recomputed()
        if last is not None:
            last.clear()

    def _begin(self) -> None:
        self._forget_recomputed()
        self.running, self._masked = True, {}
        self._ready.clear()

    def _end(self) -> None:
        self.running, self._masked = False, {}
        self._ready.clear()

    def clear(self) -> None:
        """Drop the masked weights."""
        self._masked = {}

    def drop(self, names: Sequence[str]) -> None:
        """Drop the masked weights of some gates."""
        for name in names:
            self._masked.pop(name, None)

    def remove(self) -> None:
        """Stop watching the module."""
        for hook in self._hooks:
            hook.remove()


def _drop(reference: "ref[Call]", names: Sequence[str], *_: Any) -> None:
    call = reference()
    if call is not None:
        call.drop(names)


def _serve(weight: Weight, ready: Mapping[Place, Tensor]) -> None:
    """Take ``weight`` from ``ready`` while it is there, and else from its parametrization.

    The property of torch passes through a dozen functions for each weight, whatever the parametrization does.
    """
    kind, tensor = type(weight.module), weight.tensor  # a class for this module, made by torch
    known = vars(kind)[tensor]

    def get(module: nn.Module) -> Any:
        found = ready.get((id(module), tensor))  # a deep copy has the same class
        return known.fget(module) if found is None else found

    setattr(kind, tensor, property(get, known.fset))
