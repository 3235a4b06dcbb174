"""Gates: learnable masks on the weights of a frozen model, as parametrizations."""

from leap_pl.gates.attach import Stored, attach, attach_trained, detach, gate_kinds, guard_saving, restore
from leap_pl.gates.bernoulli import BernoulliGate
from leap_pl.gates.collection import Gates
from leap_pl.gates.fixed import FixedGate
from leap_pl.gates.gate import Gate, GateFactory, GateState
from leap_pl.gates.nm import NMGate
from leap_pl.gates.tile import TileGate
from leap_pl.gates.trained import PART, TrainedTensor, TrainedWeight, check_linear

__all__ = [
    "PART",
    "BernoulliGate",
    "FixedGate",
    "Gate",
    "GateFactory",
    "GateState",
    "Gates",
    "NMGate",
    "Stored",
    "TileGate",
    "TrainedTensor",
    "TrainedWeight",
    "attach",
    "attach_trained",
    "check_linear",
    "detach",
    "gate_kinds",
    "guard_saving",
    "restore",
]
