"""A whole fit of a tiny Llama on the device, with every kind of gate, prior, loss, precision and way to save memory."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import sim
import torch
from lightning.pytorch.plugins import MixedPrecision
from safetensors.torch import load_file
from tiny import tiny_folder

from leap_pl import LeapModule, TextDataModule
from leap_pl.callbacks import SparsityLogger
from leap_pl.cli.prune import prune_command
from leap_pl.gates import FixedGate, NMGate, TileGate
from leap_pl.losses.objective import Objective
from leap_pl.oneshot.methods import METHODS
from leap_pl.prior import Prior
from leap_pl.training.optimizers import PackedAdamW, SharedAdamW


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One decoder block: an operation of the device takes the host many times as long as one of the CPU."""
    return tiny_folder(tmp_path_factory.mktemp("models") / "llama", num_hidden_layers=1)


class Watch(L.Callback):
    """Refuses host syncs in every micro-batch, its copy included, but the run's first; counts those of steps.

    Attributes:
        micro_batches: Number of micro-batches.
        steps: Number of syncs in each optimizer step, without the log and the validation that may follow it.
        devices: Where what was learned was at the end of training.
        log: Number of syncs of a step's log.
    """

    def __init__(self) -> None:
        self.micro_batches, self.steps, self.devices, self.log = 0, [], set(), 0

    def begin(self) -> None:
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
        self.devices |= {tensor.device.type for tensor in module.stored().values()}


class Log(SparsityLogger):
    """The sparsity log of every step; counts the host syncs that it takes."""

    def on_train_batch_end(self, trainer: L.Trainer, *rest: Any) -> None:
        sim.reset()
        before = self.last_step
        super().on_train_batch_end(trainer, *rest)
        if self.last_step != before:
            self.syncs = sum(sim.syncs().values())


class Data(TextDataModule):
    """The text of a run; from a batch's copy to the device on, ``watch`` looks."""

    def __init__(self, watch: Watch, **settings: Any) -> None:
        super().__init__(**settings)
        self.watch = watch

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        ready = super().on_before_batch_transfer(batch, dataloader_idx)
        if self.trainer.training:
            self.watch.begin()
        return ready


def on_device() -> dict[str, Any]:
    return {"accelerator": sim.Sim(), "strategy": sim.OnSim(), "devices": 1}


def on_host() -> dict[str, Any]:
    return {"accelerator": "cpu", "devices": 1}


Place = Callable[[], dict[str, Any]]


def fit(module: LeapModule, text: Path, workers: int = 0, place: Place = on_device, **trainer: Any) -> Watch:
    """Two steps of two micro-batches, logged, and a validation; on the device all the time."""
    watch, quiet = Watch(), ("enable_progress_bar", "enable_model_summary", "enable_checkpointing", "logger")
    given = {
        **place(),
        **dict.fromkeys(quiet, False),
        **{"max_steps": 2, "accumulate_grad_batches": 2, "gradient_clip_val": 1.0, "num_sanity_val_steps": 0},
        **{"val_check_interval": 4, "check_val_every_n_epoch": None, **trainer},
    }
    # Syncs are counted before the log is made.
    log = Log(every_n_steps=1)
    trainer_of_run = L.Trainer(**given, callbacks=[watch, log])
    data = Data(watch, text=str(text), seq_length=32, batch_size=2, validation_sequences=2, num_workers=workers)
    trainer_of_run.fit(module, data)
    assert watch.devices == {trainer_of_run.strategy.root_device.type}
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
    "fixed": {"gate": FixedGate, "train_weights": "kept"},
}


# Host syncs of a step's log, on a model of any number of weights.
OF_A_LOG = {"bernoulli": 17, "nm": 8, "many patterns": 8, "joint tiles": 11, "tiles": 10, "fixed": 8}


@pytest.mark.parametrize("kind", GATES)
def test_every_kind_of_gate_learns_and_the_host_does_not_wait(kind: str, model: Path, text_file: Path) -> None:
    module = tiny(model, "magnitude", **GATES[kind])
    watch = fit(module, text_file)
    assert watch.micro_batches == 4
    assert watch.steps == [0, 0]
    assert watch.log == OF_A_LOG[kind]
    masks = module.mask_set().masks.values()
    removed = sum(int((~mask).sum()) for mask in masks) / sum(mask.numel() for mask in masks)
    assert removed == pytest.approx(module.sparsity, abs=0.02)


@pytest.mark.parametrize("kind", GATES)
def test_a_log_waits_no_longer_for_a_model_of_more_blocks(kind: str, text_file: Path, tmp_path: Path) -> None:
    module = tiny(tiny_folder(tmp_path / "llama", num_hidden_layers=2), "magnitude", **GATES[kind])
    assert fit(module, text_file, accumulate_grad_batches=1, val_check_interval=2).log == OF_A_LOG[kind]


@pytest.mark.parametrize("kind", GATES)
def test_what_is_learned_is_what_the_cpu_learns(kind: str, model: Path, text_file: Path) -> None:
    """Within a hundredth of the learning rate: attention is written out on the device, which rounds otherwise, and Adam
    divides a gradient by its size, so that where it is almost 0 rounding is all that is left of it."""
    found = []
    for place in (on_device, on_host):
        module = tiny(model, "magnitude", **GATES[kind])
        fit(module, text_file, place=place, max_steps=4)
        found.append({name: logits.detach().cpu() for name, logits in module.gates.learned().items()})
    for name, logits in found[0].items():
        torch.testing.assert_close(logits, found[1][name], rtol=0, atol=1e-5)
        assert float((logits - found[1][name]).abs().mean()) < 1e-8


def test_training_starts_from_weights_in_a_folder(model: Path, text_file: Path, tmp_path: Path) -> None:
    """They are read on the host, where the base model is on the device."""
    options = {"sequences": 2, "seq_length": 32, "text": str(text_file), "device": "cpu"}
    prune_command(str(model), str(tmp_path / "out"), method="admm", **options)  # type: ignore[arg-type]
    start = {"mask": str(tmp_path / "out"), "weights": str(tmp_path / "out" / "model"), "train_weights": "kept"}
    module = LeapModule(str(model), dtype="float32", warmup_steps=0, **start)  # type: ignore[arg-type]
    fit(module, text_file, max_steps=1, accumulate_grad_batches=1, val_check_interval=1)
    tensors = load_file(tmp_path / "out" / "model" / "model.safetensors")
    for name, mask in module.mask_set().masks.items():
        moved = (module.trained[name].master.detach().cpu() - tensors[name])[mask]
        assert 0 < float(moved.abs().max()) < 1e-3


@pytest.mark.parametrize("method", [name for name in METHODS if name != "magnitude"])
def test_every_prior_fresh_and_from_the_cache(method: str, model: Path, text_file: Path, tmp_path: Path) -> None:
    check_cache(model, text_file, tmp_path, method, files=1)


@pytest.mark.parametrize(("setting", "files"), [({"fisher": 0.5}, 1), ({"graded": True}, 2)], ids=["fisher", "graded"])
def test_allocated_and_graded_priors_from_the_cache(
    setting: dict[str, Any], files: int, model: Path, text_file: Path, tmp_path: Path
) -> None:
    check_cache(model, text_file, tmp_path, "wanda", files=files, **setting)


def check_cache(model: Path, text_file: Path, cache: Path, method: str, *, files: int, **setting: Any) -> None:
    """Learn twice, from a fresh prior and from the cached one."""
    digests = []
    for _ in range(2):
        module = tiny(model, method, prior={"cache_dir": str(cache), **setting})
        fit(module, text_file, max_steps=1, accumulate_grad_batches=1, val_check_interval=1)
        # In the memory of the host, where the sparsity log compares them: no byte a weight of the device's.
        assert {mask.device.type for mask in module.prior.masks.values()} == {"cpu"}
        digests.append(module.prior.digest_of_bits())
    assert digests[0] == digests[1]
    assert len(list(cache.iterdir())) == files


SETTINGS = {
    "distillation": {"objective": Objective(lm=0.5, distillation=0.5, temperature=2.0)},
    "budget by layer": {"objective": Objective(budget_scope="layer")},
    "activation checkpointing": {"activation_checkpointing": True},
    "low memory": {"optimizer": partial(PackedAdamW, lr=1e-2), "logits_dtype": "bfloat16"},
    "shared steps": {"optimizer": partial(SharedAdamW, lr=1e-2)},
    "shared steps in low memory": {
        "optimizer": partial(PackedAdamW, lr=1e-2, rows=0.5, columns=0.5),
        "logits_dtype": "bfloat16",
    },
    "stored in bfloat16": {"dtype": "bfloat16"},
    "low-rank updates too": {"train_weights": "lora", "activation_checkpointing": True},
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


def test_two_data_workers(model: Path, text_file: Path) -> None:
    watch = fit(tiny(model), text_file, workers=2, accumulate_grad_batches=1, val_check_interval=2)
    assert watch.steps == [0, 0]


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


def test_the_base_model_is_loaded_on_the_host(
    model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning names the run's device to what is made; transformers takes that for a device map of accelerate's."""
    monkeypatch.setattr("transformers.integrations.accelerate.is_accelerate_available", lambda *_: False)
    module, seen = tiny(model, "wanda"), []
    module.when_loaded.append(lambda loaded: seen.extend({parameter.device.type for parameter in loaded.parameters()}))
    fit(module, text_file)
    assert seen == ["cpu"]
