"""The optimizer's kernel: the same step compiled and not, for some rows and for all, in place."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from leap_pl.kernels.compiled import can_compile
from leap_pl.kernels.packed_adamw import packed_step, packed_words_step
from leap_pl.training import optimizers
from leap_pl.training.optimizers import PackedAdamW

STEPS = 3


def gradient(shape: tuple[int, ...], step: int) -> Tensor:
    """Over ten decades, so that every level of the second moment is met."""
    draw = torch.Generator().manual_seed(step)
    return torch.randn(shape, generator=draw) * 10 ** (torch.rand(shape, generator=draw) * 10 - 9)


def optimized(parameter: Tensor, gradients: list[Tensor]) -> tuple[Tensor, Tensor]:
    learned = nn.Parameter(parameter)
    optimizer = PackedAdamW([learned], weight_decay=0.1)
    for each in gradients:
        learned.grad = each
        optimizer.step()
    return learned.detach(), optimizer.state[learned]["packed_moments"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_compiled_and_not_are_the_same_step(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LEAP_PL_COMPILE", raising=False)
    if not can_compile(torch.device("cpu")):
        pytest.skip("torch.compile does not work here")
    for name in ("CHUNK", "CHUNK_OF_WORDS"):
        monkeypatch.setattr(optimizers, name, 4096)
    for shape in ((160, 71), (160, 72), (5, 48, 64)):
        gradients = [gradient(shape, step).to(dtype) for step in range(STEPS)]
        start = (torch.randn(shape, generator=torch.Generator().manual_seed(9)) * 0.04).to(dtype)
        compiled = optimized(start.clone(), gradients)
        with monkeypatch.context() as patch:
            patch.setenv("LEAP_PL_COMPILE", "0")
            eager = optimized(start.clone(), gradients)
        # The last bit of a float32 may differ, for a vector's root and a number's may be computed by two libraries.
        torch.testing.assert_close(compiled[0], eager[0], rtol=1e-6 if dtype == torch.float32 else 0, atol=1e-8)
        assert float((compiled[1] != eager[1]).float().mean()) < 1e-4


def watched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of all that the kernels take from now on."""
    sizes: list[int] = []

    def watch(kernel: Any) -> Any:
        def call(*arguments: Tensor) -> Any:
            sizes.extend(tensor.numel() for tensor in arguments)
            return kernel(*arguments)

        return call

    for name, kernel in (("packed_step", packed_step), ("packed_words_step", packed_words_step)):
        monkeypatch.setattr(optimizers, name, watch(kernel))
    return sizes


@pytest.mark.parametrize("compile_", ["0", "1"])
def test_words_of_two_elements_take_the_same_step(compile_: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of float32 and odd widths, and that of words: bit for bit, from any moments."""
    monkeypatch.setenv("LEAP_PL_COMPILE", compile_)
    shape = (37, 130)
    drawn = torch.Generator().manual_seed(0)
    found = []
    start = (torch.randn(shape, generator=drawn) * 0.04).bfloat16()
    gradients = [gradient(shape, step).bfloat16() for step in range(STEPS)]
    for words in (True, False):
        with monkeypatch.context() as patch:
            taken = watched(patch)
            if not words:
                patch.setattr(optimizers, "as_words", lambda *_: None)
            found.append(optimized(start.clone(), gradients))
        assert (max(taken) == start.numel() // 2) == words
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    codes = found[0][1].view(torch.int16)
    assert codes.min() < 0 < codes.max()  # both signs of a half, so that a shift of the wrong kind shows


@pytest.mark.parametrize("shape", [(6, 8), (2, 3, 7)])
def test_parameters_of_any_layout_take_the_same_step(shape: tuple[int, ...], eager: None) -> None:
    """Of odd places in memory, in another order of dimensions, and with gradients so."""
    start = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.04).bfloat16()
    gradients = [gradient(shape, step).bfloat16() for step in range(STEPS)]
    expected = optimized(start.clone(), gradients)
    assert not torch.equal(expected[0], start)
    shifted = torch.zeros(start.numel() + 1, dtype=torch.bfloat16)[1:].view(shape).copy_(start)
    turned, turned_gradients = (
        [each.transpose(0, -1).contiguous().transpose(0, -1) for each in some] for some in ([start], gradients)
    )
    for parameter, each in ((shifted, gradients), (*turned, gradients), (start.clone(), turned_gradients)):
        found = optimized(parameter, each)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        assert torch.equal(parameter, expected[0])  # in place


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_call_is_for_some_rows_and_changes_no_bit(
    dtype: torch.dtype, eager: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a kernel keeps beside its arguments is of their size, and so never of that of a large parameter."""
    start, gradients = torch.full((9, 16), 0.04, dtype=dtype), [gradient((9, 16), step).to(dtype) for step in (1, 2)]
    whole = optimized(start.clone(), gradients)
    sizes = watched(monkeypatch)
    for name in ("CHUNK", "CHUNK_OF_WORDS"):
        monkeypatch.setattr(optimizers, name, 40)
    found = optimized(start.clone(), gradients)
    assert all(torch.equal(one, other) for one, other in zip(found, whole, strict=True))
    assert max(sizes) <= 40


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_long_vector_is_updated_as_rows(dtype: torch.dtype, eager: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a matrix of so many columns, whose last row is not full; no tensor of the vector's size is allocated."""
    sizes = watched(monkeypatch)
    monkeypatch.setattr(optimizers, "LINE", 40)
    for name in ("CHUNK", "CHUNK_OF_WORDS"):
        monkeypatch.setattr(optimizers, name, 40)
    matrix, gradients = torch.full((3, 40), 0.04, dtype=dtype), [gradient((3, 40), step).to(dtype) for step in (1, 2)]
    vectors = [each.flatten()[:100].clone() for each in (matrix, *gradients)]
    found, moments = optimized(vectors[0], vectors[1:])
    assert max(sizes) <= 40
    expected, expected_moments = optimized(matrix, gradients)
    assert torch.equal(found, expected.flatten()[:100])
    assert torch.equal(moments.flatten(), expected_moments.flatten()[:200])
