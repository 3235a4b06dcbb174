"""Runs on many ranks: their flags, a folder for each, and what one of them holds at its end."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import fit_flags
from tiny import tiny_folder
from torch import Tensor

from leap_pl import LeapModule
from leap_pl.cli.main import main
from leap_pl.masks import MaskSet

BRIEF = ["--trainer.max_steps=2", "--data.validation_sequences=0", "--sparsity_log.every_n_steps=100"]


def ddp(ranks: int) -> list[str]:
    return [f"--trainer.devices={ranks}", "--trainer.strategy=ddp"]


def sharded(ranks: int, *, folder: bool = False) -> list[str]:
    return [
        f"--trainer.devices={ranks}",
        "--trainer.strategy=ModelParallelStrategy",
        f"--trainer.strategy.data_parallel_size={ranks}",
        "--trainer.strategy.tensor_parallel_size=1",
        f"--trainer.strategy.save_distributed_checkpoint={str(folder).lower()}",
    ]


@dataclass(frozen=True)
class Place:
    """Models, text, and a folder for each run."""

    root: Path
    llama: Path
    mixtral: Path
    text: Path

    def flags(self, name: str, *more: str, model: Path | None = None) -> list[str]:
        return fit_flags(model or self.llama, self.text, self.root / name, "--trainer.max_steps=4", *more)

    def checkpoint(self, name: str, file: str = "last.ckpt") -> Path:
        return self.root / name / "checkpoints" / file

    def mask(self, name: str, file: str = "mask") -> MaskSet:
        return MaskSet.load(self.root / name / "checkpoints" / f"{file}.safetensors")

    def one(self, name: str, *more: str, model: Path | None = None) -> dict[str, Tensor]:
        """The logits of a run in this process that accumulates four micro-batches."""
        return learn(self.flags(name, "--trainer.accumulate_grad_batches=4", *more, model=model))["logits"]


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, text_file: Path) -> Place:
    root = tmp_path_factory.mktemp("scale")
    mixtral = tiny_folder(
        root / "mixtral", "mixtral"
    )  # of its three experts two ranks hold two and one, and of four one none
    return Place(root, model_folder, mixtral, text_file)


def learn(flags: list[str]) -> dict[str, Any]:
    optimized, after = [0], LeapModule.on_train_batch_end

    def after_batch(self: LeapModule, *args: Any) -> None:
        after(self, *args)
        (optimizer,) = self.trainer.optimizers
        optimized[0] = sum(held(x) for state in optimizer.state.values() for x in state.values() if x.ndim)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LeapModule, "on_train_batch_end", after_batch)
        cli = main(flags)
    logits = {name: whole(gate.logits.detach()).clone() for name, gate in cli.model.gates.items()}
    names = [name for name, _ in cli.model.named_parameters()]
    return {
        "logits": logits,
        "reduced": [name for name in names if name not in cli.model._ddp_params_and_buffers_to_ignore],
        "optimized": optimized[0],  # in the last step: the end of the command frees it
        "metrics": {name: float(value) for name, value in cli.trainer.callback_metrics.items()},
        "held": sum(held(parameter) for parameter in cli.model.parameters()),
        "prior": cli.model.prior is not None,
        "figures": cli.model.validation.figures(),
        "frequencies": cli.model.model.model.rotary_emb.inv_freq.clone(),
    }


def whole(tensor: Tensor) -> Tensor:
    from leap_pl.distributed.shards import gathered

    return gathered(tensor)


def held(tensor: Tensor) -> int:
    from leap_pl.distributed.shards import own_part

    return own_part(tensor).numel()


def logits_of_runs(rank: int, runs: dict[str, list[str]]) -> dict[str, dict[str, Tensor]]:
    """The logits of each run, whole."""
    return {name: learn(words)["logits"] for name, words in runs.items()}
