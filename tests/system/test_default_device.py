"""Lightning configures a model under ``with torch.device(...)``, and users may do anything under one: nothing moves."""

import ast
from functools import partial
from pathlib import Path

import pytest
import torch
from bare_gates import IDS, state_at
from tiny import tiny_model
from torch import Tensor

from leap_pl.base_model.backbone import split_model
from leap_pl.base_model.weights import find_weights
from leap_pl.gates import BernoulliGate, Gate, NMGate, TileGate, attach
from leap_pl.losses.language import language_losses
from leap_pl.losses.objective import Objective
from leap_pl.training.optimizers import PackedAdamW

PACKAGE = Path(__file__).parents[2] / "leap_pl"
FACTORIES = {
    *("tensor", "zeros", "ones", "full", "empty", "arange", "linspace", "eye", "scalar_tensor", "as_tensor"),
    *("rand", "randn", "randint", "randperm", "normal", "Generator", "empty_strided", "logspace"),
}


def test_every_tensor_is_made_on_a_device_that_is_named() -> None:
    calls = [
        (file, node)
        for file in sorted(PACKAGE.rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {f"torch.{name}" for name in FACTORIES}
    ]
    unnamed = [
        f"{file.relative_to(PACKAGE)}:{node.lineno} {ast.unparse(node)}"
        for file, node in calls
        if not any(word.arg == "device" for word in node.keywords) and ast.unparse(node) != "torch.Generator('cpu')"
    ]
    assert unnamed == []
    assert len(calls) > 30  # the walk sees calls at all


def learned(kind: type[Gate], settings: dict[str, object], default: str) -> dict[str, Tensor]:
    """The masks and the logits after one step of a model of the CPU, where ``default`` is the default device."""
    model = tiny_model().requires_grad_(False)
    with torch.device(default):
        weights, state = find_weights(model), state_at(100.0, 1.0, seed=3)
        gates = attach(weights, partial(kind, **settings), state)
        for name, gate in gates.items():
            gate.start_from(weights[name].parameter > 0, seed=0)
        states, head = split_model(model)
        hidden = states(IDS)[:, :-1].flatten(0, 1)
        language = language_losses(hidden, IDS[:, 1:].reshape(-1), head, Objective())
        (language.weighted + sum(gates.energy.values())).backward()
        PackedAdamW(gates.learned().values(), lr=1e-2).step()
        gates.choose(0.5)
        masks = {f"mask of {name}": gate.hard_mask() for name, gate in gates.items()}
    return masks | {name: gate.logits.detach() for name, gate in gates.items()}


@pytest.mark.parametrize(
    ("kind", "settings"), [(BernoulliGate, {}), (NMGate, {}), (NMGate, {"n": 3, "m": 7}), (TileGate, {"tile": 4})]
)
def test_a_default_device_changes_nothing(kind: type[Gate], settings: dict[str, object], eager: None) -> None:
    plain, elsewhere = learned(kind, settings, "cpu"), learned(kind, settings, "meta")
    for name, tensor in plain.items():
        assert torch.equal(tensor, elsewhere[name]), name
