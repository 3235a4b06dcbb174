"""The published formulation that benchmarks compare with: it is the mask of the paper, and keeps what it is said to."""

from functools import partial
from typing import Any

import pytest
import torch
from tiny import tiny_model
from torch import Tensor, nn

from benchmarks.memory import BYTES
from benchmarks.published import PublishedMasks, gumbel_softmax_mask
from benchmarks.report import ratio
from benchmarks.variants import leap_step
from leap_pl.base_model.weights import Weight
from leap_pl.gates import BernoulliGate, NMGate, TileGate

ALPHA, TAU = 200.0, 0.5


@pytest.mark.parametrize("logit", [-0.01, 0.0, 0.004])
def test_its_mask_is_a_gumbel_sigmoid(logit: float) -> None:
    """E σ((αθ + g)/τ) over the logistic g = log u − log(1 − u), by quadrature over u; and how often g > −αθ."""
    torch.manual_seed(0)
    count = 200_000
    masks = gumbel_softmax_mask(torch.full((count, 1), logit), ALPHA, TAU).double()
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    mean = torch.sigmoid((ALPHA * logit + torch.logit(u)) / TAU).mean()
    assert (masks.mean() - mean).abs() < 4 * 0.5 / count**0.5
    open_ = torch.sigmoid(torch.tensor(ALPHA * logit))
    assert ((masks > 0.5).double().mean() - open_).abs() < 4 * 0.5 / count**0.5


def test_density_and_norms_and_the_bytes_it_keeps() -> None:
    module = nn.Linear(128, 64, bias=False).bfloat16()
    dense = module.weight.detach().clone()
    masks = PublishedMasks({"w": Weight("w", module, "weight", None, "w", 1)})
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        density, size = masks.sample(ALPHA, TAU)
    mask = masks.given["w"].mask
    assert float(density) == pytest.approx(float(mask.double().mean()), rel=0.01)
    ratio = (mask.double() * dense.double()).norm() / dense.double().norm()
    assert float(size) == pytest.approx(float(ratio), rel=0.01)
    assert torch.equal(module.weight, mask * dense)
    kept.pop(masks.dense["w"].untyped_storage().data_ptr(), None)  # the base model's own
    kept[mask.untyped_storage().data_ptr()] = mask.untyped_storage().nbytes()  # held until the next one
    per_weight = sum(size for size in kept.values() if size > 8) / dense.numel()
    assert per_weight == BYTES["published"]["mask and softmax"]


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("kind", [BernoulliGate, NMGate, partial(TileGate, tile=8)])
def test_a_step_of_ours_moves_all_that_is_learned(kind: Any) -> None:
    """A tile gate has logits of the patterns in its tiles, too."""
    model = tiny_model()
    step = leap_step(model, kind)
    learned = {name: (each, each.detach().clone()) for name, each in model.named_parameters() if each.requires_grad}
    assert {name.rpartition(".")[2] for name in learned} >= {"logits"}
    step(torch.randint(0, 200, (2, 16)))
    assert all(each.grad is None for each, _ in learned.values())
    assert not any(torch.equal(each, before) for each, before in learned.values())
    if isinstance(kind, partial):
        assert any(name.endswith("pattern_logits") for name in learned)


def test_a_ratio_is_the_median_over_turns() -> None:
    assert ratio({"slow": [2.0, 9.0, 40.0], "fast": [1.0, 3.0, 8.0]}, "slow", "fast") == 3.0
