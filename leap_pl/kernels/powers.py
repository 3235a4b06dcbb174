"""Base-2 logarithm and power for the gates' kernels, from additions, multiplications and the bits of a float32.

On a CPU the gates spend most of their time on a logarithm and an exponential for each weight, for which compiled code
calls a library. These functions are written in elementary operations instead, so that they fuse with the surrounding
ones: the exponent is read from, or added to, the bits of the number, and a polynomial gives the rest. They are as exact
as a float32 allows for one operation and a few roundings, which is tested against float64.

The coefficients interpolate log₂(1 + f)/f and 2ᶠ at the Chebyshev nodes of the named interval, in float64; their
relative errors there are 2.7e-8 and 1.0e-7. They are literals because a constant defined elsewhere would reach the
compiled loop as a tensor, and be loaded for every vector.
"""

import torch
from torch import Tensor


def log2(x: Tensor) -> Tensor:
    """Return log₂ x of float32 ``x``, positive, finite and not subnormal; the relative error is small around 1 too."""
    bits = x.view(torch.int32)
    exponent = (bits - 0x3F3504F3) >> 23  # of x/√½, so that the mantissa is in [√½, √2)
    f = (bits - (exponent << 23)).view(torch.float32) - 1
    p = 0.12614846606973598 * f - 0.2074210351465376
    p = p * f + 0.21566985907671674
    p = p * f - 0.23892033980807614
    p = p * f + 0.28791832446050525
    p = p * f - 0.3607048280969353
    p = p * f + 0.4809106099456958
    p = p * f - 0.7213473333598936
    p = p * f + 1.4426950037647241
    return exponent.to(torch.float32) + p * f


def exp2(x: Tensor) -> Tensor:
    """Return 2ˣ of any float32 ``x``: 0 below 2⁻¹²⁶, infinite above 2¹²⁷, NaN for NaN."""
    n = (x + 12582912.0) - 12582912.0  # rounded: 1.5·2²³ leaves no bits below 1
    f = x - n  # in [−½, ½]
    p = 0.0013400432165823137 * f + 0.00967603709788144
    p = p * f + 0.055503272142078036
    p = p * f + 0.24022107355830186
    p = p * f + 0.6931472067106205
    p = p * f + 1.0000000754953497
    power = p * ((n.to(torch.int32) + 127) << 23).view(torch.float32)  # adding to p's bits would copy two more vectors
    return torch.where(x > 127, float("inf"), torch.where(x < -126, 0.0, power))
