"""Magnitude pruning: the smallest weights go. Shapes: O outputs, I inputs."""

from torch import Tensor

from leap_pl.masks.patterns import Pattern, choose


def magnitude_mask(weight_OI: Tensor, pattern: Pattern) -> Tensor:
    """Mask of one matrix by the size of its weights (https://arxiv.org/abs/1506.02626).

    The score is |W|; unstructured weights compete over the whole matrix. No input is needed, and no kept
    weight changes.

    Args:
        weight_OI: The matrix, any floating type.
        pattern: Which shape the mask has.

    Returns:
        Bool (O, I), True where kept.
    """
    return choose(weight_OI.float().abs(), pattern, "matrix")
