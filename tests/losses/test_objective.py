"""The objective: its settings, and the terms that it lists and adds."""

import re

import pytest
import torch
from torch import Tensor

from leap_pl.losses.language import LanguageLosses
from leap_pl.losses.objective import Objective
from leap_pl.losses.term import MicroBatch


def test_defaults_are_the_papers() -> None:
    o = Objective()
    assert (o.lm, o.distillation, o.budget, o.budget_scope, o.weight) == (1.0, 0.0, 7.0, "global", 10.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lm": -1.0}, "objective.lm is -1; give 0 or more"),
        ({"distillation": -0.1}, "objective.distillation is -0.1; give 0 or more"),
        ({"budget": -7.0}, "objective.budget is -7; give 0 or more"),
        ({"weight": -1.0}, "objective.weight is -1; give 0 or more"),
        ({"lm": 0.0}, "both 0"),
        ({"temperature": 0.0}, "objective.temperature is 0; give a number above 0"),
        ({"temperature": -1.0}, "objective.temperature is -1; give a number above 0"),
        ({"chunk": 0}, "objective.chunk is 0; give 1 or more"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Objective(**settings)  # type: ignore[arg-type]


def test_terms_are_listed_in_the_order_in_which_they_are_added() -> None:
    assert [term.name for term in Objective().terms()] == ["lm", "distillation", "budget", "kept_norm"]
    weights = [[term.weight_at(fraction) for term in Objective().terms()] for fraction in (0.0, 0.75)]
    assert weights == [[1.0, 0.0, 7.0, -10.0], [1.0, 0.0, 7.0, -2.5]]
    assert Objective(distillation=0.1).needs_teacher(0.5)
    assert not Objective().needs_teacher(0.5)


def micro_batch(kept: Tensor, energy: Tensor, language: LanguageLosses | None) -> MicroBatch:
    """Of one weight of 10 elements and norm 4, at a quarter of the run, with the target density 0.5."""
    hidden = torch.zeros(3, 2)
    return MicroBatch(
        input_ids=torch.zeros(1, 4, dtype=torch.long),
        hidden=hidden,
        targets=torch.zeros(3, dtype=torch.long),
        teacher=None,
        head=lambda x: x,
        language=language,
        gates={},
        kept={"a": kept},
        energy={"a": energy},
        sizes={"a": 10},
        layers={"a": 0},
        density=0.5,
        dense_norm=4.0,
        fraction=0.25,
    )


@pytest.mark.parametrize(("budget", "weight"), [(7.0, 10.0), (0.0, 10.0), (7.0, 0.0), (0.0, 0.0)])
def test_the_loss_is_the_weighted_sum(budget: float, weight: float) -> None:
    """loss = language + budget·|3/10 − 1/2| − weight·(3/4)·(√9 / 4); where a weight is 0 the value is only shown."""
    kept, energy = torch.tensor(3.0, requires_grad=True), torch.tensor(9.0, requires_grad=True)
    weighted = torch.tensor(2.0, requires_grad=True)
    language = LanguageLosses(weighted, torch.tensor(1.5), torch.tensor(0.25))
    loss, values = Objective(budget=budget, weight=weight).loss(micro_batch(kept, energy, language))
    loss.backward()
    assert loss.item() == pytest.approx(2.0 + budget * 0.2 - weight * 0.75 * 0.75)
    shown = {"loss": loss.item(), "lm": 1.5, "distillation": 0.25, "budget": 0.2, "kept_norm": 0.75}
    assert {name: value.item() for name, value in values.items()} == pytest.approx(shown)
    assert not any(value.requires_grad for value in values.values())
    grads = [None if x.grad is None else x.grad.item() for x in (weighted, kept, energy)]
    assert grads == [
        1.0,
        pytest.approx(-budget / 10) if budget else None,
        pytest.approx(-weight * 0.75 / (2 * 3 * 4)) if weight else None,
    ]
