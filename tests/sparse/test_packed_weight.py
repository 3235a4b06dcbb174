"""Packed weights: every kept bit comes back, in the layout that is documented, and what does not agree is refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from leap_pl.errors import UserError
from leap_pl.sparse.packed_weight import FLOATS, PackedWeight

BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


@st.composite
def weights(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """A weight of any bits, NaN and -0 included, and a mask of any density; maybe not contiguous, with empty rows."""
    shape = draw(st.sampled_from([(1,), (33,), (1, 1), (7, 31), (5, 32), (4, 65), (2, 3, 40), (3, 96)]))
    dtype = draw(st.sampled_from(FLOATS))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    info = torch.iinfo(BITS[dtype])
    weight = torch.randint(info.min, info.max, shape, generator=generator, dtype=BITS[dtype]).view(dtype)
    mask = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.02, 0.5, 0.9, 1.0]))
    if draw(st.booleans()):
        mask[0] = False
    if len(shape) > 1 and draw(st.booleans()):
        weight, mask = weight.transpose(0, -1), mask.transpose(0, -1)
    return weight, mask


@given(weights())
def test_every_kept_bit_comes_back(drawn: tuple[Tensor, Tensor]) -> None:
    weight, mask = drawn
    packed = PackedWeight.pack(weight, mask)
    again = PackedWeight.of(packed.bitmap, packed.values, packed.scale, tuple(weight.shape))
    unpacked = again.unpack()
    expected = torch.where(mask, weight.view(BITS[weight.dtype]), 0)
    assert unpacked.dtype == weight.dtype
    assert torch.equal(unpacked.view(BITS[weight.dtype]), expected)
    assert torch.equal(again.mask(), mask)
    assert again.starts.tolist() == packed.starts.tolist()
    assert packed.density == pytest.approx(float(mask.float().mean()))


@given(weights())
def test_int8_is_within_half_a_step_of_each_row(drawn: tuple[Tensor, Tensor]) -> None:
    weight, mask = drawn
    weight = torch.nan_to_num(weight.float(), 0.0, 1.0, -1.0).clamp(-1e3, 1e3)
    packed = PackedWeight.pack(weight, mask, int8=True)
    error = (packed.unpack() - weight * mask).abs().reshape(-1, weight.shape[-1])
    assert packed.scale is not None
    assert bool((error <= packed.scale[:, None] * 0.5001 + 1e-30).all())
    largest = (weight * mask).abs().reshape(-1, weight.shape[-1]).amax(1)
    assert torch.equal(packed.scale, largest / 127)  # the finest at which nothing of the row is cut off
    assert not packed.unpack()[~mask].any()


def test_the_layout() -> None:
    """Bit j from the lowest of word k is column 32 k + j; a kept zero is a value."""
    weight, mask = torch.arange(80.0).view(2, 40), torch.zeros(2, 40, dtype=torch.bool)
    mask[0, [0, 5, 31, 33]] = True
    mask[1, 39] = True
    packed = PackedWeight.pack(weight, mask)
    assert packed.bitmap.tolist() == [[(1 | 1 << 5 | 1 << 31) - 2**32, 1 << 1], [0, 1 << 7]]
    assert packed.values.tolist() == [0, 5, 31, 33, 79]
    assert packed.starts.tolist() == [0, 4, 5]
    assert packed.nbytes == 2 * 2 * 4 + 5 * 4


def test_rows_are_unpacked_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leap_pl.sparse.packed_weight._CHUNK", 100)
    weight = torch.randn(13, 50)
    for int8 in (False, True):
        packed = PackedWeight.pack(weight, weight > 0, int8=int8)
        assert len(packed._chunks()) == 13
        assert torch.allclose(packed.unpack(), weight.relu(), atol=0.02)
        assert torch.equal(packed.mask(), weight > 0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda parts: parts | {"values": parts["values"][:-1]}, "keeps 40 elements, and there are 39 values"),
        (lambda parts: parts | {"bitmap": parts["bitmap"] | 1 << 20}, "behind the last of 20 columns"),
        (lambda parts: parts | {"bitmap": parts["bitmap"] | -(2**31)}, "behind the last"),
        (lambda parts: parts | {"bitmap": parts["bitmap"].long()}, "the bitmap is int64"),
        (lambda parts: parts | {"bitmap": parts["bitmap"][:-1]}, "has one of int32"),
        (lambda parts: parts | {"values": parts["values"].double()}, "the values are float64"),
        (lambda parts: parts | {"values": parts["values"].to(torch.int8)}, "int8 values have a scale"),
        (lambda parts: parts | {"scale": torch.ones(4)}, "int8 values have a scale"),
        (lambda parts: parts | {"values": parts["values"].char(), "scale": torch.ones(3)}, "there are 4 rows"),
        (lambda parts: parts | {"values": parts["values"].char(), "scale": torch.full((4,), torch.inf)}, "not finite"),
    ],
)
def test_tensors_that_do_not_agree(change, words: str) -> None:
    weight = torch.randn(4, 20)
    mask = torch.zeros(4, 20, dtype=torch.bool)
    mask[:, ::2] = True
    packed = PackedWeight.pack(weight, mask)
    parts = change({"bitmap": packed.bitmap, "values": packed.values, "scale": None})
    with pytest.raises(UserError, match=words):
        PackedWeight.of(parts["bitmap"], parts["values"], parts["scale"], (4, 20))


def test_what_cannot_be_packed() -> None:
    every = torch.ones(2, 2, dtype=torch.bool)
    with pytest.raises(UserError, match=r"a weight of torch\.int32 cannot be packed"):
        PackedWeight.pack(torch.ones(2, 2, dtype=torch.int32), every)
    with pytest.raises(UserError, match="int8 cannot represent"):
        PackedWeight.pack(torch.tensor([[1.0, torch.inf], [0, 0]]), every, int8=True)
    with pytest.raises(ValueError, match="a mask of"):
        PackedWeight.pack(torch.ones(2, 2), every[:1])
