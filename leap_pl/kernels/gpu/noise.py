"""Device functions of the gates' noise, operation by operation as in :mod:`leap_pl.kernels.noise` and its powers.

Every operation rounds as its eager counterpart does: divisions are :func:`triton.language.div_rn`, and kernels are
launched with :data:`EXACT`, which keeps multiplications and additions apart. So the bits of the noise are those of
every other device.
"""

import triton
import triton.language as tl

EXACT = {"enable_fp_fusion": False}  # launch option


@triton.jit
def hash_bits(index, key_0, key_1):
    """Return 32 well-mixed bits for each of ``index``, int32; keys are int32."""
    x = (index ^ key_0) * -1640531535
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = (x + key_1) * -2048144777
    x = x ^ ((x >> 13) & 0x7FFFF)
    x = x * -1028477379
    return x ^ ((x >> 16) & 0xFFFF)


@triton.jit
def element_bits(row_R1, column_1C, key_0, key_1):
    """Return 32 well-mixed bits, int32 (R, C), for rows and columns of a weight."""
    x = (column_1C ^ hash_bits(row_R1, key_0, key_1)) * -1640531535
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = (x + key_1) * -2048144777
    return x ^ ((x >> 15) & 0x1FFFF)


@triton.jit
def logistic_in_bits(bits):
    """Return logistic noise to base 2 from 32 uniform bits."""
    v = bits.to(tl.float32) * 0.99999988079071044921875 * 0.0000000004656612873077392578125  # 1 − 2⁻²³, 2⁻³¹
    return log2(tl.div_rn(1 + v, 1 - v))


@triton.jit
def log2(x):
    """Return log₂ x of a positive, finite number that is not subnormal."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1
    p = 0.12614846606973598 * f - 0.2074210351465376
    p = p * f + 0.21566985907671674
    p = p * f - 0.23892033980807614
    p = p * f + 0.28791832446050525
    p = p * f - 0.3607048280969353
    p = p * f + 0.4809106099456958
    p = p * f - 0.7213473333598936
    p = p * f + 1.4426950037647241
    return exponent.to(tl.float32) + p * f


@triton.jit
def exp2(x):
    """Return 2ˣ: 0 below 2⁻¹²⁶, infinite above 2¹²⁷, NaN for NaN."""
    n = (x + 12582912.0) - 12582912.0
    f = x - n
    p = 0.0013400432165823137 * f + 0.00967603709788144
    p = p * f + 0.055503272142078036
    p = p * f + 0.24022107355830186
    p = p * f + 0.6931472067106205
    p = p * f + 1.0000000754953497
    power = p * ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return tl.where(x > 127, float("inf"), tl.where(x < -126, 0.0, power))
