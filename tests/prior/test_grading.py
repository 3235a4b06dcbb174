"""A prior in grades: how far each logit leans."""

import logging
import math
from pathlib import Path
from typing import Any

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from conftest import fit_flags
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from test_oneshot_prior import Data
from tiny import tiny_model
from torch import Tensor

from leap_pl.base_model.weights import find_weights
from leap_pl.cli.fit import run
from leap_pl.cli.main import main
from leap_pl.distributed.strategy import RankZero
from leap_pl.errors import UserError
from leap_pl.gates import BernoulliGate, GateState
from leap_pl.masks import MaskSet, Provenance
from leap_pl.masks.patterns import Unstructured
from leap_pl.oneshot.wanda import wanda_mask
from leap_pl.prior import cache as prior_module
from leap_pl.prior import grading
from leap_pl.prior.cache import input_squares
from leap_pl.prior.grading import LEAST, graded_lean
from leap_pl.prior.settings import Prior, SharedPrior


def by_hand(mask: list[bool], weight: list[float], squares: list[float]) -> list[float]:
    """One row, in Python's own floats."""
    scores = [abs(w) * math.sqrt(x) for w, x in zip(weight, squares, strict=True)]
    ordered = sorted(scores, reverse=True)
    kept = sum(mask)
    cut = math.sqrt(ordered[max(kept - 1, 0)] * ordered[min(kept, len(mask) - 1)])
    distances = [math.log(score / cut) * (1 if keep else -1) for keep, score in zip(mask, scores, strict=True)]
    sizes = [LEAST + (1 - LEAST) * math.tanh(max(distance, 0)) for distance in distances]
    return [size if keep else -size for keep, size in zip(mask, sizes, strict=True)]


@pytest.mark.parametrize("kept", [0, 1, 4, 8, 9])
def test_the_lean_is_that_of_the_formula(kept: int) -> None:
    g = torch.Generator().manual_seed(kept)
    weight, squares = torch.randn(5, 9, generator=g), torch.rand(9, generator=g) + 0.01
    mask = torch.zeros(5, 9, dtype=torch.bool)
    for row in mask:
        row[torch.randperm(9, generator=g)[:kept]] = True
    lean = graded_lean(mask, weight, squares)
    for row in range(5):
        expected = by_hand(mask[row].tolist(), weight[row].tolist(), squares.tolist())
        torch.testing.assert_close(lean[row], torch.tensor(expected), atol=1e-6, rtol=1e-5)


def test_rows_of_different_densities_have_cuts_of_their_own() -> None:
    weight = torch.tensor([[1.0, 2.0, 4.0, 8.0]] * 2)
    mask = torch.tensor([[False, False, True, True], [False, True, True, True]])
    lean = graded_lean(mask, weight, torch.ones(4))
    near, far = (LEAST + (1 - LEAST) * math.tanh(octaves * math.log(2)) for octaves in (0.5, 1.5))
    assert lean[0].tolist() == pytest.approx([-far, -near, near, far], rel=1e-5)
    assert lean[1, :2].tolist() == pytest.approx([-near, near], rel=1e-5)


numbers = st.floats(-1e4, 1e4, width=32).map(lambda x: x if abs(x) > 1e-4 else 0.0)


@given(
    weight=hnp.arrays("float32", hnp.array_shapes(min_dims=2, max_dims=3, max_side=9), elements=numbers),
    sparsity=st.sampled_from([0.0, 0.3, 0.5, 0.9]),
    scale=st.sampled_from([0.25, 8.0]),
)
def test_what_holds_of_every_lean(weight: Any, sparsity: float, scale: float) -> None:
    """A Wanda mask's own scores agree with it: the farther out, the farther from the cut, whatever the scale."""
    weight_OI = torch.from_numpy(weight)
    squares_I = torch.linspace(0.5, 2, weight_OI.shape[-1])
    flat = weight_OI.reshape(-1, weight_OI.shape[-1])
    mask = wanda_mask(flat, squares_I, Unstructured(sparsity)).view(weight_OI.shape)
    squares = squares_I if weight_OI.ndim == 2 else squares_I.expand(weight_OI.shape[0], -1)
    lean = graded_lean(mask, weight_OI, squares)
    assert lean.shape == weight_OI.shape
    assert bool(((lean >= -1) & (lean <= 1)).all())
    assert bool((lean[mask] >= LEAST).all())
    assert bool((lean[~mask] <= -LEAST).all())
    scores = (weight_OI.abs() * squares_I.sqrt()).reshape(flat.shape)
    order = torch.from_numpy(np.lexsort((mask.reshape(flat.shape).numpy(), scores.numpy())))  # ties: the removed first
    assert bool((lean.reshape(flat.shape).gather(-1, order).diff(dim=-1) >= -1e-5).all())
    if not bool((weight_OI == 0).any()):  # of a score of 0 the logarithm is cut off
        torch.testing.assert_close(graded_lean(mask, weight_OI * scale, squares), lean, atol=1e-5, rtol=0)


# -- the squares ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_squares_are_those_of_the_dense_model(family: str) -> None:
    """Against hooks on the layers of a plain forward pass; of experts against what the watcher of pruning sees."""
    model = tiny_model(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = find_weights(model)
    squares = input_squares(model, weights, base_model="tiny", data=Data(), sequences=5, cache_dir=None, progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    seen: dict[str, list[Tensor]] = {}
    hooks = []
    for name, weight in weights.items():
        if weight.parameter.ndim == 2:
            keep = seen.setdefault(name, []).append
            hooks.append(weight.module.register_forward_hook(lambda _, args, __, keep=keep: keep(args[0].detach())))
    with torch.no_grad():
        for block, _ in zip(Data().stream.blocks(), range(5), strict=False):
            model(input_ids=torch.tensor([block.tokens]))
    for hook in hooks:
        hook.remove()
    assert list(squares) == list(weights)
    for name, weight in weights.items():
        shape = weight.parameter.shape
        assert squares[name].shape == (*shape[:-2], shape[weight.input_dim])
        if name in seen:
            inputs = torch.cat([part.flatten(0, -2) for part in seen[name]])
            torch.testing.assert_close(squares[name], inputs.square().mean(0), rtol=1e-4, atol=1e-6)
    assert len(seen) > 2


def test_experts_that_no_token_reaches_have_squares_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("mixtral")
    weights = find_weights(model)
    observe = grading.Walk.observe

    def without_the_last(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = observe(self, *args, **kwargs)
        return {name: statistics for name, statistics in found.items() if not name.endswith("[2]")}

    monkeypatch.setattr(grading.Walk, "observe", without_the_last)
    squares = input_squares(model, weights, base_model="tiny", data=Data(), sequences=2, cache_dir=None, progress=False)
    stacked = [name for name, weight in weights.items() if weight.parameter.ndim == 3]
    assert stacked
    for name in stacked:
        assert bool((squares[name][2] == 1).all())
        assert not bool((squares[name][0] == 1).any())


def test_squares_are_kept_and_made_anew_where_they_are_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls = []
    measure = grading.measure_input_squares
    monkeypatch.setattr(prior_module.grading, "measure_input_squares", lambda *a: calls.append(a) or measure(*a))
    model = tiny_model()
    weights = find_weights(model)

    def make(**changes: Any) -> dict[str, Tensor]:
        settings = {"data": Data(), "sequences": 3, "cache_dir": tmp_path, "progress": False, **changes}
        return input_squares(model, weights, base_model="tiny", **settings)

    first = make()
    assert all(torch.equal(tensor, first[name]) for name, tensor in make().items())
    assert len(calls) == 1
    make(sequences=4)
    make(data=Data(seed=1))
    assert len(calls) == 3
    whole = {file: file.read_bytes() for file in tmp_path.iterdir()}
    assert len(whole) == 3
    for count, damage in enumerate((lambda x: x[:-9], lambda x: b"", lambda x: x[:-4] + b"\0\0\xc0\x7f"), start=4):
        for file, content in whole.items():
            file.write_bytes(damage(content))
        with caplog.at_level(logging.WARNING):
            again = make()
        assert len(calls) == count
        assert "recomputed" in caplog.text
        assert all(torch.equal(tensor, first[name]) for name, tensor in again.items())
        caplog.clear()
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        make(cache_dir=tmp_path / "file")
    assert "not cached" in caplog.text


def test_squares_of_another_slot_are_not_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Those of the same model on another text, renamed; those without a key; those with a changed number."""
    model = tiny_model()
    weights = find_weights(model)

    def make(seed: int) -> dict[str, Tensor]:
        settings = {"data": Data(seed=seed), "sequences": 3, "cache_dir": tmp_path, "progress": False}
        return input_squares(model, weights, base_model="tiny", **settings)

    first = make(0)
    (slot,) = tmp_path.iterdir()
    make(1)
    (strange,) = set(tmp_path.iterdir()) - {slot}
    with safe_open(slot, framework="pt") as file:
        told = file.metadata()
    doubled = {name: 2 * tensor for name, tensor in first.items()}
    for bring in (
        lambda: slot.write_bytes(strange.read_bytes()),
        lambda: save_file(doubled, slot),
        lambda: save_file(doubled, slot, told),
    ):
        bring()
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            again = make(0)
        (said,) = caplog.messages
        assert "recomputed" in said
        assert all(torch.equal(tensor, first[name]) for name, tensor in again.items())


# -- from prior to gate -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_a_shared_prior_gives_leans_the_way_the_weight_lies(family: str) -> None:
    model = tiny_model(family)
    weights = find_weights(model)
    squares = input_squares(model, weights, base_model="tiny", data=Data(), sequences=3, cache_dir=None, progress=False)
    masks = {name: torch.rand(weight.parameter.shape) < 0.4 for name, weight in weights.items()}
    shared = SharedPrior({"prior": MaskSet(masks, Provenance("tiny", "f", "m"))}, RankZero(), squares)
    for name, weight in weights.items():
        lean = shared.of(name, weight)["prior"]
        assert torch.equal(lean > 0, masks[name])
        turned = [x.movedim(weight.input_dim, -1) for x in (masks[name], weight.parameter.detach(), lean)]
        for expert in range(turned[0].shape[0] if turned[0].ndim == 3 else 1):
            mask, dense, found = (x[expert] if x.ndim == 3 else x for x in turned)
            square = squares[name][expert] if squares[name].ndim == 2 else squares[name]
            expected = by_hand(mask[0].tolist(), dense[0].tolist(), square.tolist())
            torch.testing.assert_close(found[0], torch.tensor(expected), atol=1e-5, rtol=1e-4)


def test_a_gate_starts_as_far_out_as_the_lean_says() -> None:
    model = tiny_model()
    weight = next(iter(find_weights(model).values()))
    lean = torch.linspace(-1, 1, weight.parameter.numel()).view(weight.parameter.shape)
    gate = BernoulliGate(weight, GateState(), spread=0.003, strength=20)
    gate.start_from(lean, seed=3)
    graded = gate.logits.detach().clone()
    gate.start_from(None, seed=3)
    torch.testing.assert_close(graded - gate.logits.detach(), lean * 0.06, atol=1e-7, rtol=1e-5)


def test_grades_of_nothing_are_refused() -> None:
    told = r"prior\.graded grades a mask, and prior\.method is none\..*config by --model\.prior\.graded false"
    with pytest.raises(ValueError, match=told):
        Prior(method="none", graded=True)
    assert Prior(method="none", mask="file", graded=True).graded


@pytest.mark.usefixtures("eager")
def test_a_run_starts_from_grades(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    graded = ["--model.prior.method=wanda", "--model.prior.sequences=4", "--model.prior.graded=true"]
    strong = ["--model.gate.spread=0.003", "--model.gate.strength=20"]
    still = ["--model.optimizer=SGD", "--model.optimizer.lr=0", "--trainer.max_steps=1"]
    cli = main(fit_flags(model_folder, text_file, tmp_path, *graded, *strong, *still))
    kept = sorted(file.name.partition("-")[0] for file in (tmp_path / "priors").iterdir())
    assert kept == ["squares", "wanda"]
    prior = cli.model.prior
    assert prior is not None
    logits = torch.cat([gate.logits.detach().flatten() for gate in cli.model.gates.values()])
    sides = torch.cat([prior.masks[name].flatten() for name in cli.model.gates])
    assert 0.01 < logits[sides].std() < 0.03  # signs alone would leave the noise's .003
    assert ((logits > 0) == sides).float().mean() > 0.9
    assert cli.model.settings()["prior"]["graded"] is True
    with pytest.raises(
        UserError,
        match=r"prior\.graded is for BernoulliGate, and the gate is NMGate\. Add --model\.prior\.graded false",
    ):
        run(fit_flags(model_folder, text_file, tmp_path / "nm", *graded, "--model.gate=NMGate", *still))
