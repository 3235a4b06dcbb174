"""Products of a packed weight with a few rows of input on a GPU, and its unpacking.

One program takes a strip of rows and a part of their columns (split-K), block by block. The place of an element among
the values is the start of its row, plus the popcounts of the words before the block, plus a prefix sum of the block's
bits; only kept values are loaded. See :mod:`leap_pl.sparse.packed_weight` for the format.
Legend of suffixes: R = rows of a strip, C = columns of a block, M = rows of input, padded to what a matrix unit takes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 512  # of a block
PROGRAMS = 1024  # that keep a large GPU busy
TILE = 16  # least size of a factor in tl.dot
WORDS = 64  # of the bitmap that are counted at once, before a part


@triton.jit
def popcount(word):
    """Return the number of bits set in each of ``word``, int32."""
    x = word - ((word >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return (x * 0x01010101) >> 24


@triton.jit
def _strip(bitmap, starts, rows, words, first_word, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """Return a strip's rows, the places of their words, and that of their first value from ``first_word`` on."""
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    word_R = bitmap + row_R.to(tl.int64) * words
    place_R = tl.load(starts + row_R, row_R < rows, 0)
    for first in range(0, first_word, WORDS):
        index_W = first + tl.arange(0, WORDS)
        inside_RW = (row_R[:, None] < rows) & (index_W[None, :] < first_word)
        place_R += tl.sum(popcount(tl.load(word_R[:, None] + index_W[None, :], inside_RW, 0)), 1)
    return row_R, word_R, place_R


@triton.jit
def _block(values, word_R, place_R, inside_R1, column_C, columns):
    """Return a block of the weight, (R, C), and the place of each row's first value behind it."""
    column_1C = column_C[None, :]
    inside_RC = inside_R1 & (column_1C < columns)
    word_RC = tl.load(word_R[:, None] + column_1C // 32, inside_RC, 0)
    kept_RC = (word_RC >> (column_1C % 32)) & 1
    before_RC = tl.cumsum(kept_RC, 1) - kept_RC
    value_RC = tl.load(values + place_R[:, None] + before_RC, kept_RC == 1, 0)
    return value_RC, place_R + tl.sum(kept_RC, 1)


@triton.jit
def _multiply(
    x, bitmap, values, starts, partials, rows, columns, words, part_words, count,
    ONE: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    first_word = tl.program_id(1) * part_words
    row_R, word_R, place_R = _strip(bitmap, starts, rows, words, first_word, ROWS, WORDS)
    end = min(columns, (first_word + part_words) * 32)
    inside_R1 = row_R[:, None] < rows
    out = partials + tl.program_id(1).to(tl.int64) * count * rows
    if ONE:
        sum_RC = tl.zeros([ROWS, COLUMNS], tl.float32)
        for first in range(first_word * 32, end, COLUMNS):
            column_C = first + tl.arange(0, COLUMNS)
            value_RC, place_R = _block(values, word_R, place_R, inside_R1, column_C, end)
            x_C = tl.load(x + column_C, column_C < end, 0)
            sum_RC += value_RC.to(tl.float32) * x_C.to(tl.float32)[None, :]
        tl.store(out + row_R, tl.sum(sum_RC, 1), row_R < rows)
    else:
        sum_RM = tl.zeros([ROWS, TILE], tl.float32)
        input_M = tl.arange(0, TILE)
        for first in range(first_word * 32, end, COLUMNS):
            column_C = first + tl.arange(0, COLUMNS)
            value_RC, place_R = _block(values, word_R, place_R, inside_R1, column_C, end)
            inside_CM = (column_C[:, None] < end) & (input_M[None, :] < count)
            x_CM = tl.load(x + column_C[:, None] + input_M[None, :] * columns, inside_CM, 0)
            sum_RM = tl.dot(value_RC.to(x_CM.dtype), x_CM, sum_RM, input_precision="ieee")
        place_RM = out + input_M[None, :] * rows + row_R[:, None]
        tl.store(place_RM, sum_RM, inside_R1 & (input_M[None, :] < count))


@triton.jit
def _unpack(
    bitmap, values, starts, out, rows, columns, words,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    row_R, word_R, place_R = _strip(bitmap, starts, rows, words, 0, ROWS, WORDS)
    inside_R1 = row_R[:, None] < rows
    row_R1 = row_R[:, None].to(tl.int64) * columns
    for first in range(0, columns, COLUMNS):
        column_C = first + tl.arange(0, COLUMNS)
        value_RC, place_R = _block(values, word_R, place_R, inside_R1, column_C, columns)
        tl.store(out + row_R1 + column_C[None, :], value_RC, inside_R1 & (column_C[None, :] < columns))


def linear(
    input: Tensor, bitmap: Tensor, values: Tensor, starts: Tensor, scale: Tensor | None, bias: Tensor | None,
    columns: int,
) -> Tensor:  # fmt: skip
    """Return the product of ``input`` with a packed weight; see :func:`leap_pl.sparse.multiply.linear`."""
    x = input.reshape(-1, columns).contiguous()
    count, (rows, words) = len(x), bitmap.shape
    height = 4 if count == 1 else TILE
    strips = triton.cdiv(rows, height)
    parts = min(triton.cdiv(PROGRAMS, strips), triton.cdiv(columns, COLUMNS))
    part_words = triton.cdiv(triton.cdiv(words, parts), COLUMNS // 32) * (COLUMNS // 32)
    parts = triton.cdiv(words, part_words)
    partials = torch.empty(parts, count, rows, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _multiply[(strips, parts)](
            x, bitmap, values, starts, partials, rows, columns, words, part_words, count,
            count == 1, TILE, height, COLUMNS, WORDS,
        )  # fmt: skip
    product = partials.sum(0)
    product = product if scale is None else product * scale
    product = product if bias is None else product + bias
    return product.to(input.dtype).view(*input.shape[:-1], rows)


def unpack(
    bitmap: Tensor, values: Tensor, starts: Tensor, scale: Tensor | None, columns: int, dtype: torch.dtype
) -> Tensor:
    """Return the dense weight; see :func:`leap_pl.sparse.multiply.unpack`."""
    rows, words = bitmap.shape
    out = torch.empty(rows, columns, dtype=values.dtype, device=values.device)
    with torch.cuda.device_of(out):
        _unpack[(triton.cdiv(rows, 4),)](bitmap, values, starts, out, rows, columns, words, 4, COLUMNS, WORDS)
    return (out if scale is None else out.float() * scale.unsqueeze(1)).to(dtype)
