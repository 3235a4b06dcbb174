"""The exact k highest, against a stable sort."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from leap_pl.masks import top_k as topk
from leap_pl.masks.top_k import Cut, closest_top_k, exact_top_k

TIED = [-math.inf, -3.4028235e38, -1.0, -1e-45, -0.0, 0.0, 1e-45, 1.1754942e-38, 1.0, 1.0000001, 3.4028235e38, math.inf]
values = st.one_of(st.sampled_from(TIED), st.floats(width=32, allow_nan=False))
lists = st.lists(st.lists(values, max_size=30), max_size=5)


def by_sorting(tensors: list[Tensor], k: int) -> list[Tensor]:
    """The k highest by a stable sort of all elements in a row."""
    flat = np.concatenate([t.reshape(-1).numpy() for t in tensors] or [np.zeros(0, np.float32)])
    kept = np.zeros(flat.size, bool)
    kept[np.argsort(-flat, kind="stable")[:k]] = True
    parts = np.split(kept, np.cumsum([t.numel() for t in tensors])[:-1]) if tensors else []
    return [torch.from_numpy(part).view(t.shape) for part, t in zip(parts, tensors, strict=True)]


def check(tensors: list[Tensor], k: int) -> None:
    cuts = exact_top_k(tensors, k)
    masks = [cut.mask(t) for cut, t in zip(cuts, tensors, strict=True)]
    assert sum(int(mask.sum()) for mask in masks) == k
    for mask, expected in zip(masks, by_sorting(tensors, k), strict=True):
        assert mask.dtype == torch.bool
        assert torch.equal(mask, expected)


@settings(max_examples=100, deadline=None)
@given(lists, st.data())
def test_it_is_a_stable_sort(numbers: list[list[float]], data: st.DataObject) -> None:
    tensors = [torch.tensor(n, dtype=torch.float32) for n in numbers]
    check(tensors, data.draw(st.integers(0, sum(map(len, numbers)))))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(TIED), min_size=1, max_size=40), st.data())
def test_ties_are_kept_by_tensor_and_index(numbers: list[float], data: st.DataObject) -> None:
    split = data.draw(st.integers(0, len(numbers)))
    tensors = [torch.tensor(part, dtype=torch.float32) for part in (numbers[:split], numbers[split:])]
    for k in range(len(numbers) + 1):
        check(tensors, k)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.sampled_from(TIED), max_size=9), min_size=1, max_size=5), st.data())
def test_the_closest_to_what_is_to_be_removed_is_kept(numbers: list[list[float]], data: st.DataObject) -> None:
    tensors = [torch.tensor(n, dtype=torch.float32) for n in numbers]
    total = sum(map(len, numbers))
    sizes = [torch.tensor(data.draw(st.lists(st.integers(1, 5), min_size=len(n), max_size=len(n)))) for n in numbers]
    removed = data.draw(st.integers(0, 5 * total))

    def left(masks: list[Tensor]) -> int:
        return sum(int(size[~mask].sum()) for size, mask in zip(sizes, masks, strict=True))

    possible = [by_sorting(tensors, k) for k in range(total + 1)]
    # Of two as close, more are removed: min takes the first.
    closest = min(possible, key=lambda masks: abs(left(masks) - removed))
    for cut, tensor, mask in zip(closest_top_k(tensors, sizes, removed), tensors, closest, strict=True):
        assert torch.equal(cut.mask(tensor), mask)


@pytest.mark.parametrize("scale", [1e-42, 0.014, 1.0, 1e30])
def test_random_tensors_of_several_shapes(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(shape, generator=generator) * scale for shape in [(37, 53), (1,), (0, 4), (3, 16, 20), (900,)]
    ]
    total = sum(t.numel() for t in tensors)
    for k in (0, 1, 2, total // 3, total // 2, total - 1, total):
        check(tensors, k)


def test_neighbouring_floats_are_told_apart() -> None:
    """All share their upper 16 bits, and cross into the next ones."""
    start = torch.tensor([1.0]).view(torch.int32) + 65_500
    tensor = (start + torch.randperm(80, generator=torch.Generator().manual_seed(0)).int()).view(torch.float32)
    for k in range(81):
        check([tensor], k)
        check([-tensor], k)


def test_a_tensor_of_one_value() -> None:
    tensors = [torch.full((7, 3), 0.25), torch.full((5,), 0.25)]
    for k in range(27):
        check(tensors, k)


def test_none_and_all() -> None:
    tensors = [torch.tensor([math.inf, -math.inf, 0.0]), torch.tensor([math.inf])]
    assert not any(bool(c.mask(t).any()) for c, t in zip(exact_top_k(tensors, 0), tensors, strict=True))
    assert all(bool(c.mask(t).all()) for c, t in zip(exact_top_k(tensors, 4), tensors, strict=True))
    assert exact_top_k([], 0) == []


def test_minus_zero_is_zero() -> None:
    cuts = exact_top_k([torch.tensor([-0.0, 0.0, -0.0, 0.0])], 3)
    assert cuts[0].mask(torch.tensor([-0.0, 0.0, -0.0, 0.0])).tolist() == [True, True, True, False]


def test_tensors_that_are_not_contiguous_rank_by_their_own_order() -> None:
    tensor = torch.tensor([[1.0, 1.0, 0.0], [1.0, 2.0, 1.0]]).T
    for k in range(7):
        check([tensor], k)


def test_pieces_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors longer than a piece."""
    monkeypatch.setattr(topk, "_CHUNK", 8)
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randint(-4, 4, (n,), generator=generator).float() for n in (37, 8, 16, 1)]
    for k in range(63):
        check(tensors, k)


@pytest.mark.parametrize("k", [0, 1, 3])
def test_nan_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match="NaN"):
        exact_top_k([torch.ones(2), torch.tensor([math.nan])], k)


@pytest.mark.parametrize("k", [-1, 4])
def test_an_impossible_k_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match="of 3 elements"):
        exact_top_k([torch.ones(3)], k)


def test_its_arguments_stay_as_they_are() -> None:
    tensor = torch.tensor([-0.0, 1.0], requires_grad=True)
    exact_top_k([tensor], 1)
    assert math.copysign(1, tensor[0].item()) == -1
    assert tensor.requires_grad


def test_a_cut_speaks_for_a_tensor_by_value_and_index() -> None:
    assert Cut(1.0, 2).mask(torch.tensor([[1.0, 0.5], [1.0, 2.0]])).tolist() == [[True, False], [False, True]]


def test_a_mask_of_ties_makes_no_index_of_every_element() -> None:
    """It would take eight bytes a weight; bfloat16 logits tie in bulk."""

    class Small(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = function(*args, **(kwargs or {}))
            assert not (isinstance(found, Tensor) and found.dtype == torch.int64 and found.numel() >= 600)
            return found

    tensor = torch.tensor([0.0, 1.0, 2.0]).repeat(200).view(20, 30)
    for mask_of in (tensor, tensor.T):
        cut = Cut(1.0, 301)
        with Small():
            mask = cut.mask(mask_of)
        flat, kept = mask_of.reshape(-1), mask.reshape(-1)
        expected = (flat > 1) | ((flat == 1) & (torch.arange(600) < 301))
        assert mask.shape == mask_of.shape
        assert torch.equal(kept, expected)
