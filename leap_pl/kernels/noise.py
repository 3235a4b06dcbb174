"""Counter-based noise: a pure function of (seed, step, micro-batch, tensor, row, column).

Nothing is stored and there is no generator state, so the noise of a forward pass can be recomputed in its
backward pass, under activation checkpointing, after a resume, and by any rank that holds any rows of the
tensor; see :func:`logistic`.

The bits come from two multiply–xorshift hashes. Three rounds derive a key for each row of a weight; two more rounds
combine the row's key with the column of an element. The tensor's second key enters after the first round of both, so
that no two tensors are permuted copies of each other. Two rows of a tensor are, if their 32-bit keys differ only in
the bits that the index of a column has: about a hundred pairs of 14,336 rows of 4,096 columns, other ones in each pass.

Per element: 2 multiplications, 2 shifts, 4 xors and additions and 2 masks for the bits; then a conversion, 2
multiplications, 2 additions, a division and a logarithm (:mod:`leap_pl.kernels.powers`) for the logistic. The quality
is tested in ``tests/kernels/test_noise.py``: distribution and tails, every bit and pair of bits, and the independence
of elements, rows, tensors, steps and seeds.
"""

import hashlib
import struct
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from leap_pl.kernels.powers import log2


def noise_keys(seed: int, step: int, micro_batch: int, tensor: str) -> tuple[int, int]:
    """Return the two keys, signed 32-bit integers, of one tensor's noise in one forward pass.

    Args:
        seed: Seed of the run.
        step: Optimizer step.
        micro_batch: Index of the micro-batch within the step, counted over all ranks.
        tensor: Name of the weight.
    """
    place = f"{seed} {step} {micro_batch} {tensor}".encode()
    first, second = struct.unpack("<ii", hashlib.blake2b(place, digest_size=8).digest())
    return first, second


def initial_noise(shape: Sequence[int], spread: float, seed: int, tensor: str) -> Tensor:
    """Return N(0, spread²) for the initial logits of one tensor, float32 on the CPU.

    Drawn on the CPU, whatever the default device, from a generator for this tensor alone: the same logits on every
    device and in every order.

    Args:
        shape: Shape of the logits.
        spread: Standard deviation.
        seed: Seed of the run.
        tensor: Name of the weight, or of a part of its gate.
    """
    generator = torch.Generator("cpu").manual_seed(noise_keys(seed, -1, 0, tensor)[0])
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").mul_(spread)


LONGEST_CACHED = 2**20


def columns(length: int, device: torch.device) -> Tensor:
    """Return the int32 tensor 0 … length − 1, which all callers share unless it is long and on a GPU.

    The kernels read it, which is several times cheaper on a CPU than computing such a vector in registers. On a GPU a
    long one is cheaper to make than to hold.
    """
    if device.type != "cpu" and length > LONGEST_CACHED:
        return _columns.__wrapped__(length, device)
    return _columns(length, device)


@lru_cache(maxsize=64)
def _columns(length: int, device: torch.device) -> Tensor:
    return torch.arange(length, dtype=torch.int32, device=device)


def element_bits(rows: int, column_C: Tensor, key_0: Tensor, key_1: Tensor, first_row: Tensor | None = None) -> Tensor:
    """Return 32 well-mixed bits, int32 (R, C), for ``rows`` rows and the columns ``column_C`` of a weight.

    The rows begin with ``first_row``, an int32 scalar; None is 0.
    """
    row_R1 = torch.arange(rows, dtype=torch.int32, device=column_C.device)[:, None]
    row_R1 = row_R1 if first_row is None else row_R1 + first_row
    x = (column_C ^ hash_bits(row_R1, key_0, key_1)) * -1640531535  # 0x9E3779B1, odd, from the golden ratio
    x = x ^ _shift_right(x, 15)
    x = (x + key_1) * -2048144777  # 0x85EBCA77
    return x ^ _shift_right(x, 15)


def hash_bits(index: Tensor, key_0: Tensor, key_1: Tensor) -> Tensor:
    """Return 32 well-mixed bits for each of ``index`` (int32, any shape) as int32; keys are int32 scalars."""
    x = (index ^ key_0) * -1640531535
    x = x ^ _shift_right(x, 15)
    x = (x + key_1) * -2048144777
    x = x ^ _shift_right(x, 13)
    x = x * -1028477379  # 0xC2B2AE3D
    return x ^ _shift_right(x, 16)


def logistic(bits: Tensor) -> Tensor:
    """Return standard logistic noise from 32 uniform bits: g = log((1 + v)/(1 − v)), v uniform on (−1, 1).

    With v = 2u − 1 this is log u − log(1 − u). v is computed directly from the signed bits, so that the two tails are
    mirror images, and differs from ±1 by at least the last place of a float32: both tails end at log 2²⁴ = 16.6,
    beyond which the logistic distribution has a share of 6e-8 on each side.

    Args:
        bits: int32, any shape.

    Returns:
        float32 of the same shape.
    """
    return logistic_in_bits(bits) * 0.6931471805599453  # log 2


def logistic_in_bits(bits: Tensor) -> Tensor:
    """Return the noise of :func:`logistic` to base 2, g/log 2, as used by the kernels, whose powers are of 2."""
    v = _within(bits) * 2.0**-31  # the largest |v| is 1 − 2⁻²³
    return log2((1 + v) / (1 - v))


def _within(bits: Tensor) -> Tensor:
    """Convert to float32, reduced by one part in 2²³.

    The multiplication by a power of 2 that follows is exact, so that a fused multiply-add rounds as two instructions
    do: the tails, where 1 − v is coarse, are the same compiled and not.
    """
    return bits.to(torch.float32) * (1 - 2.0**-23)


def _shift_right(x: Tensor, by: int) -> Tensor:
    """Shift logically to the right: int32 is signed, and uint32 has no kernels on CPU."""
    return (x >> by) & ((1 << (32 - by)) - 1)


def gumbel(bits: Tensor) -> Tensor:
    """Return standard Gumbel noise from 32 uniform bits: g = −log(−log u), u uniform on (0, 1).

    u is computed from the signed bits and differs from 0 and 1 by at least the last place of a float32, so that g is
    always finite: from −log(log 2²⁴) = −2.8 to log 2²⁴ = 16.6, which a Gumbel variable exceeds once in 2²⁴ draws.

    Args:
        bits: int32, any shape.

    Returns:
        float32 of the same shape.
    """
    return gumbel_in_bits(bits) * 0.6931471805599453 + 0.36651292058166435  # log 2 and −log log 2


def gumbel_in_bits(bits: Tensor) -> Tensor:
    """Return the noise of :func:`gumbel` to base 2 without its offset, −log₂(−log₂ u): a softmax is shift-invariant."""
    u = _within(bits) * 2.0**-32 + 0.5
    return -log2(-log2(u))
