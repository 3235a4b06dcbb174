"""Bernoulli gates of one decoder block on a GPU: one launch masks all its weights, and one computes all gradients.

Legend of suffixes: R, C = rows and columns of a tile; N = weights. A weight is cut into tiles of a static size, and a
launch has one program for each tile of each weight, in the order of the weights.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from leap_pl.kernels.gpu.noise import EXACT, element_bits, exp2, logistic_in_bits

ROWS, COLUMNS = 8, 256  # of a tile: a warp reads 256 consecutive columns, 16 bytes a thread of bfloat16


def unspecialized(number: int) -> int:
    """Return the 32-bit ``number`` as an odd 64-bit one, for which Triton compiles no variant.

    Triton compiles a kernel again for an argument that is 1 or divisible by 16, as some keys are.
    """
    return ((number & 0xFFFFFFFF) << 1 | 1) + (1 << 40)


@triton.jit
def _number(argument):
    """Return the number that :func:`unspecialized` encoded."""
    return (argument >> 1).to(tl.int32)


@triton.jit
def _mask(logit_RC, bits_RC, slope, sharpness):
    down = slope * -1.4426950408889634  # −log₂ e
    return tl.div_rn(1.0, 1 + exp2(down * logit_RC - sharpness * logistic_in_bits(bits_RC)))


@triton.jit
def _offsets(row_R1, column_1C, width):
    """Return the distance of each element from the first: in 64 bits, for a weight may have more than 2³¹ elements."""
    return row_R1.to(tl.int64) * width + column_1C


@triton.jit
def _tile(tile, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the rows (R, 1) and columns (1, C) of one tile of a weight."""
    across = tl.cdiv(width, COLUMNS)
    row_R1 = (tile // across) * ROWS + tl.arange(0, ROWS)[:, None]
    return row_R1, (tile % across) * COLUMNS + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def _own(values, starts, COUNT: tl.constexpr):
    """Return that of ``values``, one for each weight, which belongs to the weight of this program."""
    value = values[0]
    for i in tl.static_range(1, COUNT):
        value = tl.where(tl.program_id(0) >= _number(starts[i]), values[i], value)
    return value


@triton.jit
def _elements(
    starts, heights, widths, keys_0, keys_1,
    COUNT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Return this program's elements, (R, C): distance from the weight's first, whether there is one, random bits."""
    start, height = _number(_own(starts, starts, COUNT)), _number(_own(heights, starts, COUNT))
    width = _number(_own(widths, starts, COUNT))
    if ALIGNED:
        width = tl.multiple_of(width, 16)
    row_R1, column_1C = _tile(tl.program_id(0) - start, width, ROWS, COLUMNS)
    key_0, key_1 = _number(_own(keys_0, starts, COUNT)), _number(_own(keys_1, starts, COUNT))
    inside_RC = (row_R1 < height) & (column_1C < width)
    return _offsets(row_R1, column_1C, width), inside_RC, element_bits(row_R1, column_1C, key_0, key_1)


@triton.jit
def _address(tensors, starts, COUNT: tl.constexpr, ALIGNED: tl.constexpr):
    """Return the address of the one of ``tensors`` that belongs to the weight of this program."""
    address = _own(tensors, starts, COUNT)
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    return address


@triton.jit
def _forward(
    logits, weights, masked, partials, starts, heights, widths, keys_0, keys_1, slope, sharpness,
    COUNT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    logit, weight = _address(logits, starts, COUNT, ALIGNED), _address(weights, starts, COUNT, ALIGNED)
    out = _address(masked, starts, COUNT, ALIGNED)
    offset_RC, inside_RC, bits_RC = _elements(
        starts, heights, widths, keys_0, keys_1, COUNT, ROWS, COLUMNS, ALIGNED
    )  # fmt: skip
    logit_RC = tl.load(logit + offset_RC, inside_RC, 0).to(tl.float32)
    weight_RC = tl.load(weight + offset_RC, inside_RC, 0).to(tl.float32)
    mask_RC = _mask(logit_RC, bits_RC, slope, sharpness)
    masked_RC = mask_RC * weight_RC
    tl.store(out + offset_RC, masked_RC.to(out.dtype.element_ty), inside_RC)
    tl.store(partials + program, tl.sum(tl.where(inside_RC, mask_RC, 0)))
    tl.store(partials + tl.num_programs(0) + program, tl.sum(masked_RC * masked_RC))


@triton.jit
def _add(partials, sums, starts, programs, COUNT: tl.constexpr, CHUNK: tl.constexpr):
    """Add the programs' partial sums of one weight, in an order that never changes."""
    weight, which = tl.program_id(0), tl.program_id(1)
    start, end = starts[0], starts[1]
    for i in tl.static_range(1, COUNT):
        start, end = tl.where(weight == i, starts[i], start), tl.where(weight == i, starts[i + 1], end)
    start, end, programs = _number(start), _number(end), _number(programs)
    total_C = tl.zeros([CHUNK], tl.float32)
    for first in range(start, end, CHUNK):
        place_C = first + tl.arange(0, CHUNK)
        total_C += tl.load(partials + which * programs + place_C, place_C < end, 0)
    tl.store(sums + which * COUNT + weight, tl.sum(total_C))


@triton.jit
def _backward(
    logits, weights, grads_masked, grad_sums, grads, starts, heights, widths, keys_0, keys_1, slope, sharpness,
    COUNT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    logit, weight = _address(logits, starts, COUNT, ALIGNED), _address(weights, starts, COUNT, ALIGNED)
    grad_masked, out = _address(grads_masked, starts, COUNT, ALIGNED), _address(grads, starts, COUNT, ALIGNED)
    which = 0
    for i in tl.static_range(1, COUNT):
        which += (tl.program_id(0) >= _number(starts[i])).to(tl.int32)
    offset_RC, inside_RC, bits_RC = _elements(
        starts, heights, widths, keys_0, keys_1, COUNT, ROWS, COLUMNS, ALIGNED
    )  # fmt: skip
    logit_RC = tl.load(logit + offset_RC, inside_RC, 0).to(tl.float32)
    weight_RC = tl.load(weight + offset_RC, inside_RC, 0).to(tl.float32)
    grad_RC = tl.load(grad_masked + offset_RC, inside_RC, 0).to(tl.float32)
    grad_kept, grad_energy = tl.load(grad_sums + which), tl.load(grad_sums + COUNT + which)
    mask_RC = _mask(logit_RC, bits_RC, slope, sharpness)
    grad_RC = grad_RC + 2 * grad_energy * mask_RC * weight_RC
    grad_RC = (grad_RC * weight_RC + grad_kept) * (mask_RC - mask_RC * mask_RC) * slope
    tl.store(out + offset_RC, grad_RC.to(out.dtype.element_ty), inside_RC)


class Plan(NamedTuple):
    """Division of the weights of one launch into tiles; the tuples hold a number for each, from :func:`unspecialized`.

    Attributes:
        programs: Number of programs.
        starts: First program of each weight, and the number of programs.
        heights: Rows.
        widths: Columns.
        aligned: Whether every row of every weight starts at a multiple of 16 elements.
    """

    programs: int
    starts: tuple[int, ...]
    heights: tuple[int, ...]
    widths: tuple[int, ...]
    aligned: bool


@lru_cache(maxsize=256)
def plan_of(shapes: tuple[torch.Size, ...]) -> Plan:
    """Return the plan for weights of these shapes, whose last dimension is the columns.

    Raises:
        ValueError: They have too many elements for one launch.
    """
    widths = tuple(shape[-1] for shape in shapes)
    heights = tuple(shape.numel() // max(shape[-1], 1) for shape in shapes)
    starts = [0]
    for height, width in zip(heights, widths, strict=True):
        starts.append(starts[-1] + -(-height // ROWS) * -(-width // COLUMNS))
    if starts[-1] >= 2**31:
        raise ValueError(f"weights of {sum(map(torch.Size.numel, shapes)):,} elements are too many for one launch")
    firsts, tall, wide = (tuple(map(unspecialized, some)) for some in (starts, heights, widths))
    return Plan(starts[-1], firsts, tall, wide, all(width % 16 == 0 for width in widths))


def mask_forward(
    logits: Sequence[Tensor], weights: Sequence[Tensor], keys: Sequence[int], slope: float, sharpness: float
) -> tuple[list[Tensor], Tensor]:
    """Return each W̃, in its weight's shape and dtype, and ΣM of all weights and then Σ(M·W)², float32 (2N).

    Args:
        logits: Logits of each weight, all of one dtype.
        weights: The weights, all of one dtype.
        keys: Two noise keys for each weight.
        slope: α/τ.
        sharpness: 1/τ.
    """
    logits, weights = _contiguous(logits), _contiguous(weights)
    plan, masked = plan_of(tuple(weight.shape for weight in weights)), [torch.empty_like(each) for each in weights]
    count, programs = len(weights), plan.programs
    partials = torch.empty(2 * programs, dtype=torch.float32, device=weights[0].device)
    sums = torch.empty(2 * count, dtype=torch.float32, device=weights[0].device)
    aligned = plan.aligned and _aligned(logits, weights, masked)
    with torch.cuda.device_of(weights[0]):  # where kernels are launched
        _forward[(programs,)](
            tuple(logits), tuple(weights), tuple(masked), partials, plan.starts, plan.heights, plan.widths,
            *_split(keys), slope, sharpness, count, ROWS, COLUMNS, aligned, **EXACT,
        )  # fmt: skip
        _add[(count, 2)](partials, sums, plan.starts, unspecialized(programs), count, 256)
    return masked, sums


def mask_backward(
    logits: Sequence[Tensor],
    weights: Sequence[Tensor],
    grads_masked: Sequence[Tensor],
    grad_sums: Tensor,
    keys: Sequence[int],
    slope: float,
    sharpness: float,
) -> list[Tensor]:
    """Return dθ of each weight in its logits' dtype; noise and masks are recomputed.

    Args:
        logits: As in :func:`mask_forward`, like the other arguments of the same names.
        weights: See ``logits``.
        grads_masked: Gradient of each W̃.
        grad_sums: Gradients of the sums, float32 (2N).
        keys: See ``logits``.
        slope: See ``logits``.
        sharpness: See ``logits``.
    """
    logits, weights, grads_masked = _contiguous(logits), _contiguous(weights), _contiguous(grads_masked)
    plan, grads = plan_of(tuple(weight.shape for weight in weights)), [torch.empty_like(each) for each in logits]
    aligned = plan.aligned and _aligned(logits, weights, grads_masked, grads)
    with torch.cuda.device_of(weights[0]):
        _backward[(plan.programs,)](
            tuple(logits), tuple(weights), tuple(grads_masked), grad_sums, tuple(grads), plan.starts, plan.heights,
            plan.widths, *_split(keys), slope, sharpness, len(weights), ROWS, COLUMNS, aligned, **EXACT,
        )  # fmt: skip
    return grads


def _split(keys: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(map(unspecialized, keys[::2])), tuple(map(unspecialized, keys[1::2]))


def _contiguous(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.contiguous() for tensor in tensors]


def _aligned(*groups: Sequence[Tensor]) -> bool:
    return all(tensor.data_ptr() % 16 == 0 for group in groups for tensor in group)


torch.library.define(
    "leap_pl::mask_forward",
    "(Tensor[] logits, Tensor[] weights, int[] keys, float slope, float sharpness) -> (Tensor[], Tensor)",
)
torch.library.define(
    "leap_pl::mask_backward",
    "(Tensor[] logits, Tensor[] weights, Tensor[] grads_masked, Tensor grad_sums, int[] keys, float slope, "
    "float sharpness) -> Tensor[]",
)
torch.library.impl("leap_pl::mask_forward", "cuda", mask_forward)
torch.library.impl("leap_pl::mask_backward", "cuda", mask_backward)


@torch.library.register_fake("leap_pl::mask_forward")
def _shapes_forward(
    logits: list[Tensor], weights: list[Tensor], keys: list[int], slope: float, sharpness: float
) -> tuple[list[Tensor], Tensor]:
    sums = weights[0].new_empty(2 * len(weights), dtype=torch.float32)
    return [torch.empty_like(weight) for weight in weights], sums


@torch.library.register_fake("leap_pl::mask_backward")
def _shapes_backward(
    logits: list[Tensor], weights: list[Tensor], grads_masked: list[Tensor], grad_sums: Tensor, keys: list[int],
    slope: float, sharpness: float,
) -> list[Tensor]:  # fmt: skip
    return [torch.empty_like(each) for each in logits]
