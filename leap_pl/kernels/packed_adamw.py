"""Arithmetic of AdamW with both moments in 16 bits and stochastic rounding, in place.

What is stored, and why, is said in :mod:`leap_pl.training.optimizers`. The kernel is compiled without fused
multiply-adds, so that it rounds as in eager execution; the last bit of a float32 may differ, which rounding to 16 bits
hides.

The kernel is called for some rows of a parameter at a time, since what torch.compile keeps between its loops, and eager
execution between its operations, is of the size of what it is called for.

Legend of suffixes: R, C = rows and columns.
"""

import math
import sys
from functools import partial

import torch
from torch import Tensor

from leap_pl.kernels.compiled import APART, compiled
from leap_pl.kernels.noise import element_bits

RATIO_BITS = 7
RATIO_STEPS = 63  # steps of u's grid on each side of 0
LOWEST_OCTAVE = -54  # log2 of the smallest v
HIGHEST_CODE = 511
LOWEST = (LOWEST_OCTAVE + 127) << 23  # bits of the smallest v as a float32
_LITTLE = sys.byteorder == "little"  # the first of two neighbours is the lower half of their word
CUT = 20  # bits of a float32's fraction that v is stored without


def ratio_bound(beta_1: float, beta_2: float) -> float:
    """Return b, the largest |m|/√v that any sequence of gradients can lead to."""
    return (1 - beta_1) / math.sqrt((1 - beta_2) * (1 - beta_1**2 / beta_2))


def step_numbers(
    step: int, rate: float, beta_1: float, beta_2: float, eps: float, weight_decay: float
) -> tuple[float, ...]:
    """Return the numbers of a kernel for optimizer step ``step`` ≥ 1, in the order of :func:`adamw`'s arguments."""
    return (
        rate / (1 - beta_1**step),
        1 / math.sqrt(1 - beta_2**step),
        1 - rate * weight_decay,
        beta_1,
        beta_2,
        eps,
        ratio_bound(beta_1, beta_2) / RATIO_STEPS,
    )


def unpack(moments: Tensor, ratio_step: Tensor) -> tuple[Tensor, Tensor]:
    """Return m and v, float32, from the lower 16 bits of ``moments``; ``ratio_step`` is the step of u's grid, b/63."""
    code = moments.to(torch.int32)
    v = _level(code >> RATIO_BITS)
    u = ((code & (2**RATIO_BITS - 1)) ^ 64) - 64  # seven bits with a sign
    return u.to(torch.float32) * ratio_step * torch.sqrt(v), v


def pack(m: Tensor, v: Tensor, bits: Tensor, ratio_step: Tensor) -> Tensor:
    """Return the float32 moments as int32 below 2¹⁶, rounded by the upper two bytes of the int32 ``bits``."""
    # Within an octave a float32 is uniform in its bits: a random number is added to those that are cut off.
    between = ((bits >> (24 - CUT)) & (255 << (CUT - 8))) | (1 << (CUT - 9))  # byte 2, and half of one more
    code = ((v.view(torch.int32) - LOWEST + between) >> CUT).clamp(0, HIGHEST_CODE)
    # Divide by the root of the stored v, not of the exact one, since unpacking multiplies by it: so m is preserved.
    u = m / (ratio_step * torch.sqrt(_level(code)))
    u = torch.floor(u + _uniform(bits >> 24)).clamp(-RATIO_STEPS, RATIO_STEPS)
    return (code << RATIO_BITS) | (u.to(torch.int32) & (2**RATIO_BITS - 1))


def _level(code: Tensor) -> Tensor:
    """Return v from its nine bits, the lowest of ``code``: the exponent and three bits of a float32's fraction."""
    return (((code & HIGHEST_CODE) << CUT) + LOWEST).view(torch.float32)


def _uniform(bits: Tensor) -> Tensor:
    """Return the lowest byte as a number from 1/512 to 511/512."""
    return ((bits & 255).to(torch.float32) + 0.5) * (1 / 256)


def round_to_bfloat16(x: Tensor, bits: Tensor) -> Tensor:
    """Round float32 ``x`` stochastically to one of the two bfloat16 numbers around it, with ``x`` as the mean.

    A bfloat16 is the upper half of a float32: a random number is added to the lower half, which is then cut off.
    Numbers that bfloat16 can represent do not change.

    Args:
        x: Finite numbers.
        bits: int32 random bits of the same shape, of which the lower two bytes are used.

    Returns:
        The bfloat16 numbers as float32.
    """
    return ((x.view(torch.int32) + (bits & 0xFFFF)) & -0x10000).view(torch.float32)


def adamw(
    x: Tensor,
    grad: Tensor,
    moments: Tensor,
    bits: Tensor,
    rate: Tensor,
    unbias: Tensor,
    keep: Tensor,
    beta_1: Tensor,
    beta_2: Tensor,
    eps: Tensor,
    ratio_step: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return parameters after one step of AdamW, float32 and not rounded, and their moments as :func:`pack` does.

    Args:
        x: Parameters, float32.
        grad: Gradients, float32.
        moments: Packed moments, the lower 16 bits of integers.
        bits: Random bits of the rounding, int32.
        rate: Learning rate over 1 − β₁ᵗ.
        unbias: Bias correction of √v, 1/√(1 − β₂ᵗ).
        keep: Factor of weight decay.
        beta_1: Decay rate of m.
        beta_2: Decay rate of v.
        eps: Term ε added to √v.
        ratio_step: Step of u's grid.
    """
    m, v = unpack(moments, ratio_step)
    m = beta_1 * m + (1 - beta_1) * grad
    v = beta_2 * v + (1 - beta_2) * grad * grad
    return keep * x - rate * m / (torch.sqrt(v) * unbias + eps), pack(m, v, bits, ratio_step)


@partial(compiled, options=APART)
def packed_step(
    parameter_RC: Tensor,
    grad_RC: Tensor,
    code_RC: Tensor,
    column_C: Tensor,
    key_0: Tensor,
    key_1: Tensor,
    first_row: Tensor,
    share: Tensor,
    *numbers: Tensor,
) -> tuple[()]:
    """Update some rows of a parameter and their packed moments in place.

    The moments are int32 here, in which the code of 16 bits is stored: torch.compile has no vectors of int16 on a CPU,
    and would compute one element at a time, which takes eight times as long.

    Args:
        parameter_RC: Parameter, float32 or bfloat16.
        grad_RC: Gradient of the parameter.
        code_RC: Packed moments, the lower 16 bits of int32.
        column_C: Numbers of the columns.
        key_0: First key of the rounding.
        key_1: Second key of the rounding.
        first_row: Number of the first row, int32.
        share: Factor of the gradient, float32, by which it is clipped.
        numbers: Scalars of :func:`adamw`.
    """
    bits_RC = element_bits(parameter_RC.shape[0], column_C, key_0, key_1, first_row)
    x_RC, grad_RC = parameter_RC.to(torch.float32), grad_RC.to(torch.float32) * share
    moved_RC, packed_RC = adamw(x_RC, grad_RC, code_RC, bits_RC, *numbers)
    if parameter_RC.dtype == torch.bfloat16:
        moved_RC = round_to_bfloat16(moved_RC, bits_RC)
    parameter_RC.copy_(moved_RC)
    code_RC.copy_(packed_RC)
    return ()


@partial(compiled, options=APART)
def packed_words_step(
    parameter_RW: Tensor,
    grad_RW: Tensor,
    moments_RW: Tensor,
    column_W: Tensor,
    key_0: Tensor,
    key_1: Tensor,
    first_row: Tensor,
    share: Tensor,
    *numbers: Tensor,
) -> tuple[()]:
    """Update some rows of a bfloat16 parameter and their packed moments in place, two elements at a time.

    An int32 word holds two neighbours, the first in its lower half, as :func:`as_words` takes them. So no tensor of 16
    bits is read or written, and nothing is converted. Rounding is that of :func:`packed_step`, bit for bit.

    Args:
        parameter_RW: Words of the parameter.
        grad_RW: Words of its gradient, bfloat16.
        moments_RW: Words of the packed moments.
        column_W: Numbers from 0 on, of the words of a row.
        key_0: First key of the rounding.
        key_1: Second key of the rounding.
        first_row: Number of the first row, int32.
        share: Factor of the gradient, float32, by which it is clipped.
        numbers: Scalars of :func:`adamw`.
    """
    halves = []
    for half in (0, 1):
        bits_RW = element_bits(parameter_RW.shape[0], 2 * column_W + half, key_0, key_1, first_row)
        x_RW, grad_half_RW = (_half(words_RW, half).view(torch.float32) for words_RW in (parameter_RW, grad_RW))
        code_RW = moments_RW >> 16 if half else moments_RW
        moved_RW, packed_RW = adamw(x_RW, grad_half_RW * share, code_RW, bits_RW, *numbers)
        halves.append((round_to_bfloat16(moved_RW, bits_RW).view(torch.int32), packed_RW))
    (lower_RW, lower_code_RW), (upper_RW, upper_code_RW) = halves
    parameter_RW.copy_(upper_RW | ((lower_RW >> 16) & 0xFFFF))
    moments_RW.copy_(lower_code_RW | (upper_code_RW << 16))
    return ()


def as_words(*tensors: Tensor) -> tuple[Tensor, ...] | None:
    """Return contiguous tensors of 16 bits as int32 words, each of two neighbours in a row; None if they are not."""
    if not _LITTLE or any(
        tensor.element_size() != 2 or tensor.shape[-1] % 2 or tensor.storage_offset() % 2 for tensor in tensors
    ):
        return None
    return tuple(tensor.view(torch.int32) for tensor in tensors)


def _half(words: Tensor, half: int) -> Tensor:
    """Return the lower (0) or upper (1) half of words as the upper half of others: bfloat16 as the bits of float32."""
    return words & -0x10000 if half else words << 16
