"""A whole fit of a tiny Llama on the device, with every kind of gate, prior, loss, precision and way to save memory."""

from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import sim
import torch
from lightning.pytorch.plugins import MixedPrecision
from tiny import tiny_folder

from leap_pl import LeapModule, TextDataModule
from leap_pl.callbacks import SparsityLogger
from leap_pl.gates import NMGate, TileGate
from leap_pl.losses.objective import Objective
from leap_pl.oneshot.methods import METHODS
from leap_pl.prior import Prior
from leap_pl.training.optimizers import PackedAdamW


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One decoder block: an operation of the device takes the host many times as long as one of the CPU."""
    return tiny_folder(tmp_path_factory.mktemp("models") / "llama", num_hidden_layers=1)


class Watch(L.Callback):
    """Refuses host syncs in every micro-batch, forward and backward, but the run's first; counts those of steps.

    Attributes:
        micro_batches: Number of micro-batches.
        steps: Number of syncs in each optimizer step, without the log and the validation that may follow it.
        devices: Where the logits were at the end of training.
        log: Number of syncs in the sparsity log's metrics.
    """

    def __init__(self) -> None:
        self.micro_batches, self.steps, self.devices, self.log = 0, [], set(), 0

    def on_train_batch_start(self, *_: Any) -> None:
        torch.ops.rehearsal.refuse(self.micro_batches > 0)  # Lightning makes the metrics that it logs to in the first

    def on_after_backward(self, *_: Any) -> None:
        torch.ops.rehearsal.refuse(False)
        self.micro_batches += 1
        sim.reset()

    def on_before_optimizer_step(self, *_: Any) -> None:
        self.steps.append(None)

    def on_train_batch_end(self, *_: Any) -> None:
        if self.steps and self.steps[-1] is None:
            self.steps[-1] = sum(sim.syncs().values())

    def on_exception(self, *_: Any) -> None:
        torch.ops.rehearsal.refuse(False)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.devices |= {gate.logits.device.type for gate in module.gates.values()}


class Log(SparsityLogger):
    """The sparsity log of every step; counts the host syncs that its metrics take."""

    def measure(self, module: LeapModule) -> dict[str, float]:
        sim.reset()
        metrics = super().measure(module)
        self.syncs = sum(sim.syncs().values())
        return metrics


def fit(module: LeapModule, text: Path, **trainer: Any) -> Watch:
    """Two steps of two micro-batches, logged, and a validation; on the device all the time."""
    watch, quiet = Watch(), ("enable_progress_bar", "enable_model_summary", "enable_checkpointing", "logger")
    given = {
        **{"accelerator": sim.Sim(), "strategy": sim.OnSim(), "devices": 1, **dict.fromkeys(quiet, False)},
        **{"max_steps": 2, "accumulate_grad_batches": 2, "gradient_clip_val": 1.0, "num_sanity_val_steps": 0},
        **{"val_check_interval": 4, "check_val_every_n_epoch": None, **trainer},
    }
    # Syncs are counted before the log is made.
    log = Log(every_n_steps=1)
    trainer_of_run = L.Trainer(**given, callbacks=[watch, log])
    data = TextDataModule(text=str(text), seq_length=32, batch_size=2, validation_sequences=2)
    trainer_of_run.fit(module, data)
    assert watch.devices == {sim.DEVICE}
    watch.log = log.syncs
    assert float(trainer_of_run.callback_metrics["perplexity/hard"]) > 1
    return watch


def tiny(model: Path, method: str = "none", *, prior: dict[str, Any] | None = None, **settings: Any) -> LeapModule:
    made = Prior(method=method, sequences=2, **{"cache_dir": None, **(prior or {})})
    return LeapModule(str(model), prior=made, **{"dtype": "float32", "warmup_steps": 0, **settings})


GATES = {
    "bernoulli": {},
    "nm": {"gate": NMGate, "objective": Objective(budget=0)},
    "many patterns": {"gate": partial(NMGate, n=3, m=7), "sparsity": 4 / 7, "objective": Objective(budget=0)},
    "joint tiles": {"gate": partial(TileGate, tile=8), "sparsity": 0.4},
    "tiles": {"gate": partial(TileGate, tile=8, mode="tile"), "sparsity": 0.4},
}


# Syncs in the sparsity log of a model of seven weights: Bernoulli gates take as many whatever the number of weights.
OF_A_LOG = {"bernoulli": 14, "nm": 19, "many patterns": 19, "joint tiles": 79, "tiles": 64}


@pytest.mark.parametrize("kind", GATES)
def test_every_kind_of_gate_learns_and_the_host_does_not_wait(kind: str, model: Path, text_file: Path) -> None:
    module = tiny(model, "magnitude", **GATES[kind])
    watch = fit(module, text_file)
    assert watch.micro_batches == 4
    assert watch.steps == [0, 0]
    assert watch.log <= OF_A_LOG[kind]
    masks = module.mask_set().masks.values()
    removed = sum(int((~mask).sum()) for mask in masks) / sum(mask.numel() for mask in masks)
    assert removed == pytest.approx(module.sparsity, abs=0.02)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "magnitude"])
def test_every_prior_fresh_and_from_the_cache(method: str, model: Path, text_file: Path, tmp_path: Path) -> None:
    digests = []
    for _ in range(2):
        module = tiny(model, method, prior={"cache_dir": str(tmp_path)})
        fit(module, text_file, max_steps=1, accumulate_grad_batches=1, val_check_interval=1)
        # In the memory of the host, where the sparsity log compares them: no byte a weight of the device's.
        assert {mask.device.type for mask in module.prior.masks.values()} == {"cpu"}
        digests.append(module.prior.digest_of_bits())
    assert digests[0] == digests[1]
    assert len(list(tmp_path.iterdir())) == 1


SETTINGS = {
    "fisher": {"method": "wanda", "prior": {"fisher": 0.5}},
    "graded": {"method": "wanda", "prior": {"graded": True}},
    "distillation": {"objective": Objective(lm=0.5, distillation=0.5, temperature=2.0)},
    "budget by layer": {"objective": Objective(budget_scope="layer")},
    "activation checkpointing": {"activation_checkpointing": True},
    "low memory": {"optimizer": partial(PackedAdamW, lr=1e-2), "logits_dtype": "bfloat16"},
    "stored in bfloat16": {"dtype": "bfloat16"},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_setting(setting: str, model: Path, text_file: Path) -> None:
    watch = fit(tiny(model, **SETTINGS[setting]), text_file, accumulate_grad_batches=1, val_check_interval=2)
    assert watch.steps == [0, 0]


TRAINERS = {
    "bf16-true": lambda: {"precision": "bf16-true"},
    "bf16-mixed": lambda: {"plugins": MixedPrecision("bf16-mixed", device=sim.DEVICE)},
    "deterministic": lambda: {"deterministic": True},
    "without clipping": lambda: {"gradient_clip_val": None},
}


@pytest.mark.parametrize("trainer", TRAINERS)
def test_every_trainer(trainer: str, model: Path, text_file: Path) -> None:
    module = tiny(model, "wanda")
    try:
        watch = fit(module, text_file, accumulate_grad_batches=1, val_check_interval=2, **TRAINERS[trainer]())
    finally:
        torch.use_deterministic_algorithms(False)
    assert watch.steps == [0, 0]
    assert {gate.logits.dtype for gate in module.gates.values()} == {torch.float32}


def test_weights_of_the_losses_are_not_rounded(model: Path, text_file: Path) -> None:
    """Under bf16-true the default dtype is bfloat16, and 1/62 would be none of its numbers."""
    losses = []
    for weight in (1.0, 1.001):
        module = tiny(model, objective=Objective(lm=weight))
        fit(module, text_file, max_steps=1, val_check_interval=2, precision="bf16-true")
        losses.append(float(module.gradient_norm))
    assert losses[0] != losses[1]


def test_the_python_api_with_the_device_as_the_default(model: Path, text_file: Path) -> None:
    with torch.device(sim.DEVICE):
        fit(tiny(model, "wanda"), text_file, accumulate_grad_batches=1, val_check_interval=2)
