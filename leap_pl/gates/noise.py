"""Counter-based noise: a pure function of (seed, step, micro-batch, tensor, index).

Nothing is stored and no generator has a state, so the noise of a forward pass can be made again in its
backward pass, under activation checkpointing, after a resume, and by any rank that holds any part of the
tensor; see :func:`logistic`.

Element ``i`` of a tensor is drawn from a 32-bit integer hash of ``i`` and two 32-bit keys. The hash is a
multiply–xorshift mixer of three rounds; the first key enters before the first round and the second after
it, so that the streams of two tensors are not shifted copies of each other. Per element: 3 multiplications,
3 shifts, 5 xors and additions for the bits, then one division and one logarithm for the logistic.
"""

import hashlib
import struct

import torch
from torch import Tensor


def noise_keys(seed: int, step: int, micro_batch: int, tensor: str) -> tuple[int, int]:
    """The two keys, signed 32-bit integers, of one tensor's noise in one forward pass.

    Args:
        seed: Of the run.
        step: The optimizer step.
        micro_batch: Its index within the step, counted over all ranks.
        tensor: The name of the weight.
    """
    place = f"{seed} {step} {micro_batch} {tensor}".encode()
    first, second = struct.unpack("<ii", hashlib.blake2b(place, digest_size=8).digest())
    return first, second


def hash_bits(index: Tensor, key_0: Tensor, key_1: Tensor) -> Tensor:
    """32 well-mixed bits for each of ``index`` (int32, any shape) as int32; keys are int32 scalars."""
    x = (index ^ key_0) * -1640531535  # 0x9E3779B1, odd, from the golden ratio
    x = x ^ _shift_right(x, 15)
    x = (x + key_1) * -2048144777  # 0x85EBCA77
    x = x ^ _shift_right(x, 13)
    x = x * -1028477379  # 0xC2B2AE3D
    return x ^ _shift_right(x, 16)


def logistic(bits: Tensor) -> Tensor:
    """Standard logistic noise from 32 uniform bits.

    The sign is one bit; the other 31 are the tail probability p in (0, 1/2), and the magnitude is
    log((1 − p)/p). So both tails reach log(2³²) = 22.2, where float32 uniforms in (0, 1) would cut the upper
    one off at log(2²⁴) = 16.6 and make the two unequal.

    Args:
        bits: int32, any shape.

    Returns:
        float32 of the same shape: g = log u − log(1 − u), u uniform on (0, 1).
    """
    p = ((bits & 0x7FFFFFFF).to(torch.float32) + 0.5) * 2.0**-32
    magnitude = torch.log((1 - p) / p)
    return torch.where(bits < 0, -magnitude, magnitude)


def _shift_right(x: Tensor, by: int) -> Tensor:
    """Logical shift: int32 is signed, and uint32 has no kernels on CPU."""
    return (x >> by) & ((1 << (32 - by)) - 1)


def gumbel(bits: Tensor) -> Tensor:
    """Standard Gumbel noise from 23 of 32 uniform bits.

    u = (k + ½)·2⁻²³ is exact in float32 for every 23-bit k, so u is never 0 or 1 and the noise always finite:
    from −log(log 2²⁴) = −2.8 to log 2²⁴ = 16.6, beyond which a Gumbel variable falls once in 2²⁴ draws.

    Args:
        bits: int32, any shape.

    Returns:
        float32 of the same shape: −log(−log u), u uniform on (0, 1).
    """
    u = ((bits & 0x7FFFFF).to(torch.float32) + 0.5) * 2.0**-23
    return -torch.log(-torch.log(u))
