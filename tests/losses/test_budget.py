"""The terms of the gates' sums against their formulas."""

from typing import Literal

import pytest
import torch
from torch import Tensor

from leap_pl.losses.budget import budget_groups, kept_norm, sparsity_budget


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_sparsity_budget(scope: Literal["global", "layer"]) -> None:
    """Means are over elements, not over weights; each layer's distance by itself, then the sum."""
    masks = {name: torch.rand(shape, dtype=torch.float64) ** power for name, shape, power in [
        ("0.a", (8, 8), 1.0), ("0.b", (2, 3), 0.2), ("1.a", (8, 8), 3.0), ("1.b", (2, 3), 1.0),
    ]}  # fmt: skip
    for mask in masks.values():
        mask.requires_grad_()
    groups = [list(masks)] if scope == "global" else [["0.a", "0.b"], ["1.a", "1.b"]]
    assert budget_groups({name: int(name[0]) for name in masks}, scope) == groups
    assert budget_groups({"a": None, "0.a": 0, "b": None}, "layer") == [["a", "b"], ["0.a"]]
    found = sparsity_budget(
        {n: m.sum() for n, m in masks.items()}, {n: m.numel() for n, m in masks.items()}, 0.4, groups
    )
    expected = sum((torch.cat([masks[n].flatten() for n in group]).mean() - 0.4).abs() for group in groups)
    assert isinstance(expected, Tensor)
    torch.testing.assert_close(found, expected)
    a, b = (torch.autograd.grad(x, list(masks.values()), retain_graph=True) for x in (found, expected))
    torch.testing.assert_close(a, b)
    if scope == "layer":  # one layer above and one below must not cancel
        assert found > 0.1 > abs(torch.cat([m.flatten() for m in masks.values()]).mean() - 0.4)


def test_sparsity_budget_on_both_sides_of_the_target() -> None:
    for kept, sign in ((3.0, -1), (9.0, 1)):
        x = torch.tensor(kept, requires_grad=True)
        budget = sparsity_budget({"a": x}, {"a": 10}, 0.5, iter([iter(["a"])]))
        budget.backward()
        assert budget.item() == pytest.approx(abs(kept / 10 - 0.5))
        assert x.grad is not None
        assert x.grad.item() == pytest.approx(sign / 10)


def test_kept_norm() -> None:
    weights = [torch.randn(4, 5, dtype=torch.float64), torch.randn(7, 2, dtype=torch.float64)]
    masks = [torch.rand_like(w).requires_grad_() for w in weights]
    dense = sum(w.norm() for w in weights)
    expected = sum((m * w).norm() for m, w in zip(masks, weights, strict=True)) / dense
    assert isinstance(expected, Tensor)
    found = kept_norm(((m * w).square().sum() for m, w in zip(masks, weights, strict=True)), float(dense))
    torch.testing.assert_close(found, expected)
    a, b = (torch.autograd.grad(x, masks, retain_graph=True) for x in (found, expected))
    torch.testing.assert_close(a, b)
    ones = kept_norm([w.square().sum() for w in weights], float(dense))
    assert ones.item() == pytest.approx(1)


@pytest.mark.parametrize("size", [0.0, 1e-20, 1e-12])
def test_a_mask_of_zeros_has_a_finite_gradient(size: float) -> None:
    w = torch.randn(3, 4)
    mask = torch.full((3, 4), size, requires_grad=True)
    norm = kept_norm([(mask * w).square().sum(), torch.ones(())], 2.0)
    norm.backward()
    assert norm.item() == pytest.approx(0.5)
    assert mask.grad is not None
    assert mask.grad.isfinite().all()
