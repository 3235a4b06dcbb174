"""Norms of weights and gradients against float64, of tensors that are large on a CPU too."""

import pytest
import torch
from torch import Tensor, nn

from leap_pl.kernels import norms
from leap_pl.kernels.norms import norm_of
from leap_pl.training.finite import norm_of_gradients


def exact(*tensors: Tensor) -> float:
    return float(torch.cat([tensor.double().flatten() for tensor in tensors]).norm())


@pytest.mark.parametrize("shape", [(1 << 12, 1 << 13), ((1 << 25) + 5,)])
def test_a_large_tensor(shape: tuple[int, ...]) -> None:
    """Eight running float32 sums of 2²⁵ squares would each have rounded away a part of every further one."""
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert tensor.numel() >= norms.LARGE
    assert float(norm_of(tensor)) == pytest.approx(exact(tensor), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("large", [0, 1 << 24])
def test_norms_are_those_of_float64(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, large: int) -> None:
    monkeypatch.setattr(norms, "LARGE", large)
    learned = {}
    for number, shape in enumerate([(7, 33), (5,), (5000,), (3, 4, 6), (0, 4)]):
        parameter = nn.Parameter(torch.zeros(shape, dtype=dtype))
        parameter.grad = torch.randn(shape).to(dtype)
        learned[str(number), "logits"] = parameter
        assert float(norm_of(parameter.grad)) == pytest.approx(exact(parameter.grad), rel=1e-6)
        assert norm_of(parameter.grad).dtype == torch.float32
    learned["idle", "logits"] = nn.Parameter(torch.zeros(2, 2))
    expected = exact(*(parameter.grad for parameter in learned.values() if parameter.grad is not None))
    assert float(norm_of_gradients(learned)) == pytest.approx(expected, rel=1e-6)
