"""Wanda: pruning by weights and activations. Shapes: O outputs, I inputs."""

from torch import Tensor

from leap_pl.masks.patterns import Pattern, choose


def wanda_scores(weight_OI: Tensor, mean_square_I: Tensor) -> Tensor:
    """Return the scores ``|W_ij|·sqrt(mean over tokens of x_j²)``, fp32 (O, I)."""
    return weight_OI.float().abs() * mean_square_I.float().sqrt()


def wanda_mask(weight_OI: Tensor, mean_square_I: Tensor, pattern: Pattern) -> Tensor:
    """Return the mask of one matrix by weight magnitude times input norm (https://arxiv.org/abs/2306.11695).

    Unstructured weights compete within an output's row: each row of I weights keeps round((1 − s)·I), so that the
    matrix is within half a weight a row of the target sparsity. The method changes no kept weight.

    Args:
        weight_OI: Weight matrix, any floating dtype.
        mean_square_I: Mean over the calibration tokens of each input's square.
        pattern: Pattern of the mask.

    Returns:
        Bool (O, I), True where kept.
    """
    return choose(wanda_scores(weight_OI, mean_square_I), pattern, "row")
