"""What a learnable mask is: gates on the weights of a frozen model."""

from leap_pl.gates.attach import Stored, attach, detach, restore
from leap_pl.gates.bernoulli import BernoulliGate
from leap_pl.gates.gate import Gate, GateFactory, GateState

__all__ = ["BernoulliGate", "Gate", "GateFactory", "GateState", "Stored", "attach", "detach", "restore"]
