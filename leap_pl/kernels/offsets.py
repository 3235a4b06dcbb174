"""Addition of one number for each row and one for each column to a bfloat16 matrix, rounded stochastically, in place.

Legend of suffixes: R, C = rows and columns.
"""

from functools import partial

import torch
from torch import Tensor

from leap_pl.kernels.compiled import APART, compiled
from leap_pl.kernels.noise import element_bits
from leap_pl.kernels.packed_adamw import round_to_bfloat16


@partial(compiled, options=APART)
def add_rounded(
    parameter_RC: Tensor,
    row_R1: Tensor,
    offset_1C: Tensor,
    column_C: Tensor,
    key_0: Tensor,
    key_1: Tensor,
    first_row: Tensor,
) -> tuple[()]:
    """Add ``row_R1`` and ``offset_1C``, float32, to some rows of a bfloat16 parameter.

    Args:
        parameter_RC: Rows of the parameter.
        row_R1: What is added to each row.
        offset_1C: What is added to each column.
        column_C: Numbers of the columns.
        key_0: First key of the rounding.
        key_1: Second key of the rounding.
        first_row: Number of the first row, int32.
    """
    bits_RC = element_bits(parameter_RC.shape[0], column_C, key_0, key_1, first_row)
    moved_RC = parameter_RC.to(torch.float32) + row_R1 + offset_1C
    parameter_RC.copy_(round_to_bfloat16(moved_RC, bits_RC))
    return ()
