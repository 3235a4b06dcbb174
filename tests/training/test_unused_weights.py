"""Gated weights that a micro-batch does not use, as those of a decoder block that is skipped."""

from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import pytest
import torch
from python_runs import data, trainer
from torch import Tensor

from leap_pl import LeapModule, UserError
from leap_pl.gates import TileGate
from leap_pl.losses.objective import Objective
from leap_pl.prior import Prior

pytestmark = pytest.mark.usefixtures("eager")


class Skip(L.Callback):
    """Skip the second decoder block, and keep the gradients of the first step."""

    def __init__(self, mesh: Any = None) -> None:
        self.mesh = mesh
        self.gradients: dict[str, Tensor | None] = {}

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        module.mesh = self.mesh
        module.model.model.layers[1].forward = lambda hidden, *_, **__: hidden

    def on_before_optimizer_step(self, trainer: L.Trainer, module: Any, optimizer: Any) -> None:
        self.gradients = {
            name: None if gate.logits.grad is None else gate.logits.grad.clone() for name, gate in module.gates.items()
        }


def of_language_alone(model_folder: Path, tmp_path: Path) -> LeapModule:
    return LeapModule(
        str(model_folder),
        dtype="float32",
        prior=Prior(method="magnitude", cache_dir=str(tmp_path / "p")),
        objective=Objective(budget=0, weight=0),
    )


def test_their_logits_have_gradients_of_zero(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    """Which DDP waits for; no term of the mask gives them any. Nothing is left of an earlier micro-batch."""
    skip, module = Skip(), of_language_alone(model_folder, tmp_path)
    trainer(skip, max_steps=2, accumulate_grad_batches=2, limit_val_batches=0).fit(module, data(text_file))
    assert len(skip.gradients) == 14
    for name, grad in skip.gradients.items():
        assert grad is not None
        assert torch.isfinite(grad).all()
        assert bool(grad.any()) == (".layers.0." in name)


def test_a_sharded_run_names_them(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    skip, module = Skip(mesh=object()), of_language_alone(model_folder, tmp_path)
    says = r"model\.layers\.1\.\S+ was not used by a micro-batch, but in a sharded run every one must use all weights\."
    with pytest.raises(UserError, match=says):
        trainer(skip, max_steps=1, limit_val_batches=0).fit(module, data(text_file))


@pytest.mark.parametrize("mode", ["joint", "tile"])
def test_every_tensor_of_a_gate_whose_module_is_not_used_has_a_gradient(
    mode: Any, model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    """The gates of a block are computed together, used or not: here without the term that reaches all their tensors."""

    class SkipMlp(L.Callback):
        found: ClassVar[dict[str, bool]] = {}

        def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
            module.model.model.layers[1].mlp.forward = lambda hidden: hidden

        def on_before_optimizer_step(self, trainer: L.Trainer, module: Any, optimizer: Any) -> None:
            for name, gate in module.gates.items():
                for part, parameter in gate.named_parameters():
                    self.found[f"{name} {part}"] = parameter.grad is not None

    module = LeapModule(
        str(model_folder),
        gate=partial(TileGate, n=2, m=4, tile=8, mode=mode),
        dtype="float32",
        prior=Prior(method="magnitude", cache_dir=str(tmp_path / "p")),
        objective=Objective(weight=0),
    )
    trainer(SkipMlp(), max_steps=1, limit_val_batches=0).fit(module, data(text_file))
    assert len(SkipMlp.found) == 14 * (2 if mode == "joint" else 1)
    assert all(SkipMlp.found.values())
