"""Float64 references of gates, noise and losses by their formulas, independent of the kernels compared with them.

On the CPU, element by element or group by group, for small sizes, and differentiable in the logits. The random bits are
computed in 64-bit integers. A gate's noise comes from the package's eager code, which is checked on its own.
"""

import math
from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

from leap_pl.gates import BernoulliGate, Gate, NMGate, TileGate
from leap_pl.gates.tile import PATTERN_ALPHA, PATTERNS
from leap_pl.kernels.noise import columns, element_bits, gumbel, logistic

CPU = torch.device("cpu")


def soft_mask(gate: Gate, learned: dict[str, Tensor]) -> Tensor:
    """Return the soft mask of a gate, of the weight's shape, from its ``learned`` parameters in float64."""
    if isinstance(gate, BernoulliGate):
        return logistic_mask(gate, learned["logits"])
    if isinstance(gate, NMGate):
        return pattern_mask(gate, learned["logits"])
    assert isinstance(gate, TileGate)
    tiles = logistic_mask(gate, learned["logits"])
    if gate.mode == "joint":
        scale = float(gate.state.scales[PATTERN_ALPHA])
        inner = pattern_mask(gate, learned["pattern_logits"], PATTERNS, scale)
    else:
        inner = gate.inner.cpu().double()
    over = spread_tiles(tiles, tuple(gate.shape), gate.input_dim, gate.tiled.size)
    return over + (1 - over) * inner


def logistic_mask(gate: Gate, theta: Tensor) -> Tensor:
    """Return σ((αθ + g)/τ), g ~ Logistic(0, 1), for logits in rows of the last dimension."""
    bits = element_bits(math.prod(theta.shape[:-1]), columns(theta.shape[-1], CPU), *gate.keys())
    noise = logistic(bits).double().view(theta.shape)
    return torch.sigmoid((gate.state.alpha.double() * theta + noise) / gate.state.tau.double())


def pattern_mask(gate: NMGate | TileGate, theta: Tensor, part: str = "", alpha: float | None = None) -> Tensor:
    """Return Σ_p softmax_p((αθ + g)/τ)·pattern_p, g ~ Gumbel, group by group.

    Args:
        gate: Gate with the patterns.
        theta: Logits, (P, …, groups of a row).
        part: Name of the logits in the noise keys of the gate.
        alpha: Logit scale; None: α.
    """
    patterns = list(combinations(range(gate.m), gate.n))
    flat = theta.reshape(len(patterns), -1)
    noise = gumbel(element_bits(len(patterns), columns(flat.shape[1], CPU), *gate.keys(part))).double()
    scale, tau = float(gate.state.alpha) if alpha is None else alpha, gate.state.tau.double()
    rows, q = [], 0
    inputs = gate.shape[gate.input_dim]
    for _ in range(theta[0].numel() // theta.shape[-1]):
        row: list[Tensor] = []
        for start in range(0, inputs, gate.m):
            r = min(gate.m, inputs - start)
            keep = int(gate.n * r / gate.m + 0.5)
            # A short group chooses among the patterns of its own inputs; each stands where the first of the whole
            # group's patterns that begins with it stands.
            own = list(combinations(range(r), keep))
            whole = {p[:keep]: i for i, p in reversed(list(enumerate(patterns))) if all(x >= r for x in p[keep:])}
            place = [whole[positions] for positions in own]
            p = torch.softmax((scale * flat[place, q] + noise[place, q]) / tau, 0)
            table = torch.tensor([[float(j in o) for j in range(r)] for o in own], dtype=torch.float64)
            row.append(p @ table)
            q += 1
        rows.append(torch.cat(row))
    moved = [size for dim, size in enumerate(gate.shape) if dim != gate.input_dim % len(gate.shape)]
    return torch.stack(rows).view(*moved, inputs).movedim(-1, gate.input_dim)


def spread_tiles(values: Tensor, shape: Sequence[int], dim: int, size: int) -> Tensor:
    """Return the value of each element's tile, of a weight whose inputs run along ``dim``."""
    index = torch.empty(tuple(shape)).movedim(dim, -1)
    *stacked, outputs, inputs = index.shape
    row, column = torch.arange(outputs) // size, torch.arange(inputs) // size
    assert list(values.shape[:-2]) == stacked
    return values[..., row[:, None], column[None, :]].movedim(-1, dim)


def language_losses(z: Tensor, targets: Tensor, z_teacher: Tensor | None, t: float) -> tuple[Tensor, Tensor]:
    """Return CE and t²·KL(teacher ‖ student) of the logits ``z``, means over tokens."""
    log_p = z - torch.logsumexp(z, -1, keepdim=True)
    ce = -log_p[torch.arange(len(targets)), targets].mean()
    if z_teacher is None:
        return ce, torch.zeros_like(ce)
    q = (z_teacher / t).exp() / (z_teacher / t).exp().sum(-1, keepdim=True)
    p = (z / t).exp() / (z / t).exp().sum(-1, keepdim=True)
    return ce, t**2 * (q * (q / p).log()).sum(-1).mean()


def random_bits(rows: int, length: int, key_0: int, key_1: int) -> Tensor:
    """Return the random bits (R, C) by their definition, two multiply–xorshift hashes, in 64-bit integers, as int32."""
    row = _round(torch.arange(rows)[:, None] ^ _unsigned(key_0), 0x9E3779B1, 15)
    row = _round(row + _unsigned(key_1), 0x85EBCA77, 13)
    row = _round(row, 0xC2B2AE3D, 16)
    x = _round(torch.arange(length) ^ row, 0x9E3779B1, 15)
    return _round(x + _unsigned(key_1), 0x85EBCA77, 15).to(torch.int32)


def _unsigned(key: int) -> int:
    return key & 0xFFFFFFFF


def _round(x: Tensor, factor: int, shift: int) -> Tensor:
    x = (x & 0xFFFFFFFF) * factor & 0xFFFFFFFF  # int64 wraps at 2⁶⁴, which leaves the lower 32 bits right
    return x ^ (x >> shift)


def logistic_noise(bits: Tensor) -> Tensor:
    """Return log((1 + v)/(1 − v)) in float64, of the bits as float32 numbers v of (−1, 1)."""
    v = (bits.to(torch.float32) * (1 - 2.0**-23)).double() * 2.0**-31
    return torch.log1p(v) - torch.log1p(-v)
