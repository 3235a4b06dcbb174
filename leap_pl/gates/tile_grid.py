"""Tile grid of a weight, and autograd functions for tiled masks with a fixed or a learned n:m mask.

Legend of suffixes: O, I = outputs (all dimensions but the inputs') and inputs of one weight, inputs last; A, B = rows
and columns of its tiles; G = groups along the inputs; P, Q, M as in :mod:`leap_pl.gates.pattern_kernels`.
"""

from typing import Any

import torch
from torch import Tensor

from leap_pl.gates.bernoulli import soft_mask
from leap_pl.gates.groups import Groups
from leap_pl.gates.nm import flat_patterns
from leap_pl.gates.pattern_kernels import pattern_kernels
from leap_pl.kernels.compiled import compiled, rows
from leap_pl.kernels.noise import columns


class TileGrid:
    """Partition of a weight into square tiles of outputs and inputs; tiles at the edges may be smaller.

    Attributes:
        groups: n:m groups of the weight, with its shape.
        size: Rows and columns of a tile.
        shape: (A, B), after the leading dimensions of stacked experts.
    """

    def __init__(self, groups: Groups, size: int) -> None:
        self.groups, self.size = groups, size
        *stacked, outputs = groups.others
        self.shape = (*stacked, -(-outputs // size), -(-groups.inputs // size))

    def over_elements(self, tile_AB: Tensor) -> Tensor:
        """Expand values of tiles to values of elements, (O, I)."""
        return self._spread(tile_AB, self.size, self.groups.inputs)

    def over_groups(self, tile_AB: Tensor) -> Tensor:
        """Expand values of tiles to values of groups, (O, G); no group may span two tiles."""
        return self._spread(tile_AB, self.size // self.groups.pattern.m, self.groups.logits_shape[-1])

    def _spread(self, tile_AB: Tensor, width: int, length: int) -> Tensor:
        tile_AI = tile_AB.repeat_interleave(width, -1)[..., :length]
        return tile_AI.repeat_interleave(self.size, -2)[..., : self.groups.others[-1], :]

    def count(self, mask: Tensor) -> Tensor:
        """Count the True elements in each tile of a bool mask of the weight's shape, as int32."""
        return self.sums(mask.movedim(self.groups.input_dim, -1).to(torch.int32))

    def sums(self, value_OI: Tensor) -> Tensor:
        """Sum values of elements over each tile."""
        return self._sums(value_OI, self.size)

    def group_sums(self, value_OG: Tensor) -> Tensor:
        """Sum values of groups over each tile."""
        return self._sums(value_OG, self.size // self.groups.pattern.m)

    def _sums(self, value_OI: Tensor, width: int) -> Tensor:
        if self.size == width == 1:
            return value_OI
        return sums_of_parts(sums_of_parts(value_OI, self.size, -2), width, -1)


def sums_of_parts(value: Tensor, size: int, dim: int) -> Tensor:
    """Sum each ``size`` consecutive elements along ``dim`` (−1 or −2); the last sum may be of fewer.

    All whole parts are summed by one operation: one for each part would be as many launches on a GPU.
    """
    parts, rest = divmod(value.shape[dim], size)
    sums = value.narrow(dim, 0, parts * size).unflatten(dim, (parts, size)).sum(dim, dtype=value.dtype)
    if not rest:
        return sums
    last = value.narrow(dim, parts * size, rest).sum(dim, keepdim=True, dtype=value.dtype)
    return torch.cat([sums, last], dim)


class SoftTiles(torch.autograd.Function):
    """Autograd function θ → T = σ((αθ + g)/τ), sampled as in BernoulliGate; dθ = dT·T(1 − T)·α/τ.

    T has one value for each tile, so it is saved for the backward pass. (Autograd through the operations of the
    kernel would give NaN where the exponential overflows.)
    """

    @staticmethod
    def forward(ctx: Any, logits_AB: Tensor, key_0: Tensor, key_1: Tensor, slope: Tensor, sharpness: Tensor) -> Tensor:
        """Return T, (A, B) in float32."""
        column_B = columns(logits_AB.shape[-1], logits_AB.device)
        soft = soft_mask(rows(logits_AB), column_B, key_0, key_1, slope, sharpness).view(logits_AB.shape)
        ctx.save_for_backward(soft, slope)
        return soft

    @staticmethod
    def backward(ctx: Any, grad_AB: Tensor) -> Any:
        """Return the gradient of the tiles' logits."""
        soft_AB, slope = ctx.saved_tensors
        return grad_AB * (soft_AB - soft_AB * soft_AB) * slope, None, None, None, None


class FixedTiles(torch.autograd.Function):
    """Autograd function (T, W, m) → (W̃, Σ(M·W)²) whose backward pass recomputes M = T + (1 − T)·m.

    With the gradients G of W̃ and b of Σ(M·W)²: dT = Σ over the tile of (G·W + 2b·M·W²)·(1 − m).
    """

    @staticmethod
    def forward(ctx: Any, soft_AB: Tensor, weight: Tensor, inner: Tensor, grid: TileGrid) -> tuple[Tensor, Tensor]:
        """Return the masked weight, in the weight's shape and dtype, and the sum in float32."""
        ctx.save_for_backward(soft_AB, weight, inner)
        ctx.grid = grid
        masked_OI, energy = fixed_forward(*_elements(grid, soft_AB, weight, inner))
        masked_OI = masked_OI.view(*grid.groups.others, -1)
        return masked_OI.movedim(-1, grid.groups.input_dim).contiguous(), energy

    @staticmethod
    def backward(ctx: Any, grad_masked: Tensor, grad_energy: Tensor) -> Any:
        """Return the gradient of T; the weight is frozen."""
        grid: TileGrid = ctx.grid
        grad_masked_OI = rows(grad_masked.movedim(grid.groups.input_dim, -1))
        grad_OI = fixed_backward(*_elements(grid, *ctx.saved_tensors), grad_masked_OI, grad_energy)
        return grid.sums(grad_OI.view(*grid.groups.others, -1)), None, None, None


class JointTiles(torch.autograd.Function):
    """Autograd function (T, θ, W) → (W̃, Σ(M·W)²), θ of the patterns; the backward pass recomputes noise and masks."""

    @staticmethod
    def forward(
        ctx: Any, soft_AB: Tensor, logits: Tensor, weight: Tensor, grid: TileGrid, *noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the masked weight, in the weight's shape and dtype, and the sum in float32.

        ``noise`` is the two keys, the patterns' slope α/τ and the sharpness 1/τ.
        """
        ctx.save_for_backward(soft_AB, logits, weight, *noise)
        ctx.grid, groups = grid, grid.groups
        weight_QM, tile_Q = groups.split(weight), _flat(grid.over_groups(soft_AB))
        masked_QM, energy = pattern_kernels(groups.patterns, tiled=True).forward(
            flat_patterns(logits), weight_QM, tile_Q, columns(len(weight_QM), weight.device), *noise
        )
        return groups.join(masked_QM), energy

    @staticmethod
    def backward(ctx: Any, grad_masked: Tensor, grad_energy: Tensor) -> Any:
        """Return the gradients of T and of the patterns' logits; the weight is frozen."""
        soft_AB, logits, weight, *noise = ctx.saved_tensors
        grid: TileGrid = ctx.grid
        groups = grid.groups
        weight_QM, tile_Q = groups.split(weight), _flat(grid.over_groups(soft_AB))
        grad_PQ, grad_Q = pattern_kernels(groups.patterns, tiled=True).backward(
            flat_patterns(logits),
            weight_QM,
            tile_Q,
            groups.split(grad_masked),
            grad_energy,
            columns(len(weight_QM), weight.device),
            *noise,
        )
        assert grad_Q is not None
        grad_AB = grid.group_sums(grad_Q.view(*groups.others, -1))
        return grad_AB, grad_PQ.view(logits.shape), None, None, None, None, None, None


def _elements(grid: TileGrid, soft_AB: Tensor, weight: Tensor, inner: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the arguments of both kernels, all (O, I): T, W, and m as bytes (bools would be loaded one by one)."""
    dim = grid.groups.input_dim
    inner_OI = inner.view(torch.uint8).movedim(dim, -1)
    return rows(grid.over_elements(soft_AB)), rows(weight.movedim(dim, -1)), rows(inner_OI)


def _flat(tensor: Tensor) -> Tensor:
    """Return the tensor as a vector that is no view."""
    return tensor.reshape(-1).data


@compiled
def fixed_forward(soft_OI: Tensor, weight_OI: Tensor, inner_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Compute W̃ in the weight's dtype and Σ(M·W)² in float32."""
    mask_OI = soft_OI + (1 - soft_OI) * inner_OI.to(torch.float32)
    masked_OI = mask_OI * weight_OI.to(torch.float32)
    return masked_OI.to(weight_OI.dtype), (masked_OI * masked_OI).sum(-1).sum()


@compiled
def fixed_backward(
    soft_OI: Tensor, weight_OI: Tensor, inner_OI: Tensor, grad_masked_OI: Tensor, grad_energy: Tensor
) -> Tensor:
    """Compute the gradient of T for each element, in float32."""
    removed_OI = 1 - inner_OI.to(torch.float32)
    mask_OI = 1 - (1 - soft_OI) * removed_OI
    weight_OI = weight_OI.to(torch.float32)
    return (grad_masked_OI.to(torch.float32) + 2 * grad_energy * mask_OI * weight_OI) * weight_OI * removed_OI
