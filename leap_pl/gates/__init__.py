"""Gates: learnable masks on the weights of a frozen model, as parametrizations."""

from leap_pl.gates.attach import Stored, attach, detach, gate_kind, gate_kinds, restore
from leap_pl.gates.bernoulli import BernoulliGate
from leap_pl.gates.collection import Gates
from leap_pl.gates.gate import Gate, GateFactory, GateState
from leap_pl.gates.nm import NMGate
from leap_pl.gates.tile import TileGate

__all__ = [
    "BernoulliGate",
    "Gate",
    "GateFactory",
    "GateState",
    "Gates",
    "NMGate",
    "Stored",
    "TileGate",
    "attach",
    "detach",
    "gate_kind",
    "gate_kinds",
    "restore",
]
