"""Magnitude pruning: the smallest weights are removed. Shapes: O outputs, I inputs."""

from torch import Tensor

from leap_pl.masks.patterns import Pattern, choose


def magnitude_mask(weight_OI: Tensor, pattern: Pattern) -> Tensor:
    """Return the mask of one matrix by the magnitude of its weights (https://arxiv.org/abs/1506.02626).

    The score is |W|; unstructured weights compete over the whole matrix. The method needs no inputs and changes no
    kept weight.

    Args:
        weight_OI: Weight matrix, any floating dtype.
        pattern: Pattern of the mask.

    Returns:
        Bool (O, I), True where kept.
    """
    return choose(weight_OI.float().abs(), pattern, "matrix")
