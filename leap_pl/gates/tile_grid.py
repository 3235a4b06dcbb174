"""The tiles of a weight, and its masks by tiles: with a fixed n:m mask in those that are not dense, or a learned one.

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
    """How a weight falls into square tiles of outputs and inputs; those at its edges may be smaller.

    Attributes:
        groups: The weight's n:m groups, which know its shape.
        size: Rows and columns of a tile.
        shape: (A, B), with the dimensions before the outputs, of stacked experts, first.
    """

    def __init__(self, groups: Groups, size: int) -> None:
        self.groups, self.size = groups, size
        *stacked, outputs = groups.others
        self.shape = (*stacked, -(-outputs // size), -(-groups.inputs // size))

    def over_elements(self, tile_AB: Tensor) -> Tensor:
        """A value a tile as a value an element, (O, I)."""
        return self._spread(tile_AB, self.size, self.groups.inputs)

    def over_groups(self, tile_AB: Tensor) -> Tensor:
        """A value a tile as a value a group, (O, G), where no group lies in two tiles."""
        return self._spread(tile_AB, self.size // self.groups.pattern.m, self.groups.logits_shape[-1])

    def _spread(self, tile_AB: Tensor, width: int, length: int) -> Tensor:
        tile_AI = tile_AB.repeat_interleave(width, -1)[..., :length]
        return tile_AI.repeat_interleave(self.size, -2)[..., : self.groups.others[-1], :]

    def count(self, mask: Tensor) -> Tensor:
        """How many elements of each tile a bool mask of the weight's shape has, int32."""
        return self.sums(mask.movedim(self.groups.input_dim, -1).to(torch.int32))

    def sums(self, value_OI: Tensor) -> Tensor:
        """The sum over each tile of a value an element."""
        return self._sums(value_OI, self.size)

    def group_sums(self, value_OG: Tensor) -> Tensor:
        """The sum over each tile of a value a group."""
        return self._sums(value_OG, self.size // self.groups.pattern.m)

    def _sums(self, value_OI: Tensor, width: int) -> Tensor:
        if self.size == width == 1:
            return value_OI
        kind = value_OI.dtype
        sums_AI = torch.stack([rows.sum(-2, dtype=kind) for rows in value_OI.split(self.size, -2)], -2)
        return torch.stack([part.sum(-1, dtype=kind) for part in sums_AI.split(width, -1)], -1)


class SoftTiles(torch.autograd.Function):
    """θ → T = σ((αθ + g)/τ), drawn as BernoulliGate draws a weight's mask; dθ = dT·T(1 − T)·α/τ.

    T is of the tiles' size, so it is kept for the backward pass. (Through the kernel's own lines autograd would
    make NaN where the exponential overflows.)
    """

    @staticmethod
    def forward(ctx: Any, logits_AB: Tensor, key_0: Tensor, key_1: Tensor, slope: Tensor, sharpness: Tensor) -> Tensor:
        """T, float32, (A, B)."""
        column_B = columns(logits_AB.shape[-1], logits_AB.device)
        soft = soft_mask(rows(logits_AB), column_B, key_0, key_1, slope, sharpness).view(logits_AB.shape)
        ctx.save_for_backward(soft, slope)
        return soft

    @staticmethod
    def backward(ctx: Any, grad_AB: Tensor) -> Any:
        """The gradient of the tiles' logits."""
        soft_AB, slope = ctx.saved_tensors
        return grad_AB * (soft_AB - soft_AB * soft_AB) * slope, None, None, None, None


class FixedTiles(torch.autograd.Function):
    """(T, W, m) → (W̃, Σ(M·W)²), M = T + (1 − T)·m made again for the backward pass.

    With gradients G of W̃ and b of Σ(M·W)²: dT = Σ over the tile of (G·W + 2b·M·W²)·(1 − m).
    """

    @staticmethod
    def forward(ctx: Any, soft_AB: Tensor, weight: Tensor, inner: Tensor, grid: TileGrid) -> tuple[Tensor, Tensor]:
        """Masked weight of the weight's shape and dtype, and the float32 sum."""
        ctx.save_for_backward(soft_AB, weight, inner)
        ctx.grid = grid
        masked_OI, energy = fixed_forward(*_elements(grid, soft_AB, weight, inner))
        masked_OI = masked_OI.view(*grid.groups.others, -1)
        return masked_OI.movedim(-1, grid.groups.input_dim).contiguous(), energy

    @staticmethod
    def backward(ctx: Any, grad_masked: Tensor, grad_energy: Tensor) -> Any:
        """The gradient of the tiles' chances; the weight is frozen."""
        grid: TileGrid = ctx.grid
        grad_masked_OI = rows(grad_masked.movedim(grid.groups.input_dim, -1))
        grad_OI = fixed_backward(*_elements(grid, *ctx.saved_tensors), grad_masked_OI, grad_energy)
        return grid.sums(grad_OI.view(*grid.groups.others, -1)), None, None, None


class JointTiles(torch.autograd.Function):
    """(T, θ, W) → (W̃, Σ(M·W)²) with θ of the patterns; nothing of the weight's size is kept."""

    @staticmethod
    def forward(
        ctx: Any, soft_AB: Tensor, logits: Tensor, weight: Tensor, grid: TileGrid, *noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Masked weight of the weight's shape and dtype, and the float32 sum.

        ``noise``: the two keys, the patterns' slope α/τ and the sharpness 1/τ.
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
        """The gradients of the tiles' chances and of the patterns' logits; the weight is frozen."""
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
    """What both kernels take, all (O, I): T, W, and m as bytes; bools would be read one by one."""
    dim = grid.groups.input_dim
    inner_OI = inner.view(torch.uint8).movedim(dim, -1)
    return rows(grid.over_elements(soft_AB)), rows(weight.movedim(dim, -1)), rows(inner_OI)


def _flat(tensor: Tensor) -> Tensor:
    """In one dimension, and no view."""
    return tensor.reshape(-1).data


@compiled
def fixed_forward(soft_OI: Tensor, weight_OI: Tensor, inner_OI: Tensor) -> tuple[Tensor, Tensor]:
    """W̃ in the weight's dtype, Σ(M·W)² in float32."""
    mask_OI = soft_OI + (1 - soft_OI) * inner_OI.to(torch.float32)
    masked_OI = mask_OI * weight_OI.to(torch.float32)
    return masked_OI.to(weight_OI.dtype), (masked_OI * masked_OI).sum(-1).sum()


@compiled
def fixed_backward(
    soft_OI: Tensor, weight_OI: Tensor, inner_OI: Tensor, grad_masked_OI: Tensor, grad_energy: Tensor
) -> Tensor:
    """The gradient of T by element, float32."""
    removed_OI = 1 - inner_OI.to(torch.float32)
    mask_OI = 1 - (1 - soft_OI) * removed_OI
    weight_OI = weight_OI.to(torch.float32)
    return (grad_masked_OI.to(torch.float32) + 2 * grad_energy * mask_OI * weight_OI) * weight_OI * removed_OI
