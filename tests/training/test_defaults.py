"""Defaults as the documents give them (recipes, gates, oneshot): a changed one is a decision."""

import inspect
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from leap_pl import LeapModule
from leap_pl.gates import BernoulliGate, NMGate, TileGate
from leap_pl.oneshot.allocation import OwlOptions
from leap_pl.oneshot.fisher import FisherOptions
from leap_pl.oneshot.options import AdmmOptions, SparseGPTOptions
from leap_pl.prior import Prior, grading
from leap_pl.training.schedules import Annealing
from leap_pl.training.weights import WeightTraining


def defaults(kind: type) -> dict[str, object]:
    parameters = inspect.signature(kind).parameters
    return {name: found.default for name, found in parameters.items() if found.default is not inspect.Parameter.empty}


def test_gates() -> None:
    assert defaults(BernoulliGate) == {"spread": 0.014, "strength": 3.0}
    assert defaults(NMGate) == {"n": 2, "m": 4, "spread": 0.01, "strength": 3.0}
    tile = {"n": 2, "m": 4, "tile": 128, "mode": "joint", "spread": 0.014, "strength": 3.0, "pattern_spread": 0.01}
    assert defaults(TileGate) == tile


def test_one_shot_methods() -> None:
    assert asdict(SparseGPTOptions()) == {"damping": 0.01, "block_size": 128}
    assert asdict(AdmmOptions()) == {"ridge": 0.1, "rho": 1.0, "iterations": 20, "mask_iterations": 15}
    assert asdict(FisherOptions()) == {"strength": 0.5, "row_strength": 0.25, "sequences": 32}
    assert asdict(OwlOptions()) == {"threshold": 5.0, "spread": 0.08}


def test_the_run(model_folder: Path) -> None:
    module = LeapModule(str(model_folder))
    annealing = asdict(Annealing())
    assert (annealing["alpha"]["start"], annealing["alpha"]["end"]) == (25, 350)
    assert (annealing["tau"]["start"], annealing["tau"]["end"]) == (4, 0.05)
    assert (module.sparsity, module.warmup_steps, module.state.seed) == (0.5, 5, 0)
    optimizer = module.optimizer_of([torch.nn.Parameter(torch.zeros(2, 2))])
    assert type(optimizer) is torch.optim.AdamW
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (1e-3, (0.9, 0.95), 0.0)
    prior = Prior()
    assert (prior.method, prior.sequences, prior.graded, prior.fisher) == ("wanda", 128, False, None)
    assert grading.LEAST == 0.08
    assert WeightTraining().lora_alpha == 32


def test_the_seed_changes_where_logits_start(model_folder: Path) -> None:
    """And not the noise alone, which a run draws anew in every step."""
    starts = []
    for seed in (0, 0, 1):
        module = LeapModule(str(model_folder), prior=Prior(method="none"), dtype="float32", seed=seed)
        module.configure_model()
        starts.append(torch.cat([gate.logits.detach().flatten() for gate in module.gates.values()]))
    assert torch.equal(starts[0], starts[1])
    assert float((starts[0] - starts[2]).std()) == pytest.approx(0.014 * 2**0.5, rel=0.05)
