"""Two ranks with a device each, whose process group refuses tensors of the host: fit and resume under DDP and FSDP2."""

import os
from pathlib import Path
from typing import Any

import group
import pytest
import sim
import torch
import torch.distributed as dist
from conftest import fit_flags
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from ranks import run_ranks
from tiny import tiny_folder
from torch.utils._pytree import tree_leaves

from leap_pl.cli.main import main
from leap_pl.distributed.shards import Ranks
from leap_pl.masks import MaskSet


def strategies(ranks: int) -> dict[str, list[str]]:
    sharded = [
        "--trainer.strategy=ModelParallelStrategy",
        f"--trainer.strategy.process_group_backend={group.BACKEND}",
        f"--trainer.strategy.data_parallel_size={ranks}",
        "--trainer.strategy.tensor_parallel_size=1",
    ]
    return {
        "ddp": ["--trainer.strategy=ddp_on_sim"],
        "folder": [*sharded, "--trainer.strategy.save_distributed_checkpoint=true"],
        "file": [*sharded, "--trainer.strategy.save_distributed_checkpoint=false"],
    }


STRATEGIES = strategies(2)
FIT = [
    *(f"--trainer.accelerator={sim.DEVICE}", "--trainer.devices=1"),
    *("--model.prior.method=wanda", "--model.prior.graded=true", "--model.prior.sequences=2"),
    *("--trainer.max_steps=2", "--trainer.val_check_interval=2", "--checkpoint.every_n_train_steps=1"),
    "--trainer.num_sanity_val_steps=0",
]


class DDPOnSim(DDPStrategy):
    """DDP without the stream of CUDA that Lightning takes for every device but the CPU."""

    def determine_ddp_device_ids(self) -> None:
        return None


def put_on_a_machine_of_its_own(rank: int) -> None:
    AcceleratorRegistry.register(sim.DEVICE, sim.Sim)
    StrategyRegistry.register("ddp_on_sim", DDPOnSim, process_group_backend=group.BACKEND)
    os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": str(rank)}


def two_ranks(rank: int, model: Path, text: Path, root: Path) -> dict[str, Any]:
    """Learn two steps under each strategy, and the second again; return the collectives that each took."""
    put_on_a_machine_of_its_own(rank)
    done: dict[str, Any] = {}
    asked: list[Any] = []
    places: list[str] = []
    for name, strategy in STRATEGIES.items():
        group.Strict.done.clear()
        more = ["--checkpoint.monitor=perplexity/hard"] if name == "file" else []
        with pytest.MonkeyPatch.context() as patch:  # Lightning's own exchange before each micro-batch, on the device
            patch.setattr(_TrainingEpochLoop, "_broadcast_sigterm_tensor", asked.append)
            main(fit_flags(model, text, root / name, *FIT, "--trainer.num_nodes=2", *strategy, *more))
        if name == "folder":  # the others are read without a collective
            first = next(path for path in sorted((root / name / "checkpoints").glob("*.ckpt")) if "step=1" in path.name)
            again = [*FIT, "--trainer.num_nodes=2", *strategy, f"--ckpt_path={first}"]
            main(fit_flags(model, text, root / "resumed", *again))
            # Where the backend is not gloo, as here and on GPUs, Lightning validates in inference mode.
            words = [*FIT[:2], "--trainer.num_nodes=2", *strategy, "--trainer.logger=false"]
            assert main(["validate", f"--ckpt_path={first}", *words]) is not None
        if more:
            last = torch.load(root / name / "checkpoints" / "last.ckpt", weights_only=True)
            places = [part.device.type for part in tree_leaves(last["callbacks"]) if isinstance(part, torch.Tensor)]
        done[name] = dict(group.Strict.done)
    sim.reset()
    assert Ranks(rank, 2, dist.group.WORLD, sim.DEVICE).gather(range(9)) == [*range(9), *range(9)]
    return {**done, "syncs": sim.syncs(), "asked": len(asked), "places": places}


@pytest.fixture(scope="module")
def ranks(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    root = tmp_path_factory.mktemp("ranks")
    model = tiny_folder(root / "llama", num_hidden_layers=1)
    return root, run_ranks(2, two_ranks, model, text_file, root, folder=root / "words")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_all_that_ranks_exchange_is_on_their_devices(ranks: tuple[Path, list[Any]], strategy: str) -> None:
    """The group has refused nothing."""
    root, found = ranks
    expected = {
        "broadcast",
        "allreduce",
        *(() if strategy == "ddp" else ("all_gather_single", "reduce_scatter_single")),
    }
    assert all(expected <= rank[strategy].keys() for rank in found)
    assert mask(root, strategy).sparsity == pytest.approx(0.5, abs=1e-3)


def test_ranks_resume_from_parts_on_their_devices(ranks: tuple[Path, list[Any]]) -> None:
    assert mask(ranks[0], "resumed").digest_of_bits() == mask(ranks[0], "folder").digest_of_bits()


def test_no_rank_is_asked_for_signals_on_its_device(ranks: tuple[Path, list[Any]]) -> None:
    """It would wait for all that is queued there, in each micro-batch; signals are exchanged on the host."""
    assert hasattr(_TrainingEpochLoop, "_broadcast_sigterm_tensor")
    assert [rank["asked"] for rank in ranks[1]] == [0, 0]


def test_what_callbacks_store_is_on_the_host(ranks: tuple[Path, list[Any]]) -> None:
    """Every rank of a machine would restore the best perplexity on the device of rank zero."""
    assert len(ranks[1][0]["places"]) > 1
    assert set(ranks[1][0]["places"]) == {"cpu"}


def mask(root: Path, name: str) -> MaskSet:
    return MaskSet.load(root / name / "checkpoints" / "mask.safetensors")


def one_rank(rank: int, model: Path, text: Path, root: Path) -> dict[str, int]:
    """Learn two steps on one rank, without a strategy and under each; return how many collectives each took."""
    put_on_a_machine_of_its_own(rank)
    done = {}
    sharded = strategies(1)
    del sharded["file"]  # which two ranks try: a run of seconds
    for name, strategy in {"none": [], **sharded}.items():
        group.Strict.done.clear()
        main(fit_flags(model, text, root / name, *FIT, *strategy))
        done[name] = sum(group.Strict.done.values())
    return done


def test_one_rank_learns_what_none_does(text_file: Path, tmp_path: Path) -> None:
    """As a job of one GPU under torchrun: what is exchanged is the rank's own, and changes nothing."""
    model = tiny_folder(tmp_path / "llama", num_hidden_layers=1)
    (done,) = run_ranks(1, one_rank, model, text_file, tmp_path, folder=tmp_path / "words")
    assert done.pop("none") == 0
    assert all(done.values())
    digests = {mask(tmp_path, name).digest_of_bits() for name in ("none", *done)}
    assert len(digests) == 1


def test_numbers_of_all_ranks_are_read_together(ranks: tuple[Path, list[Any]]) -> None:
    assert all(rank["syncs"] == {"to the device": 1, "to the host": 1} for rank in ranks[1])


def test_a_tensor_of_the_host_is_refused() -> None:
    dist.init_process_group(group.BACKEND, store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(RuntimeError, match="No backend type associated with device type"):
            dist.all_reduce(torch.ones(2))
        dist.all_reduce(here := torch.ones(2, device=sim.DEVICE))
        assert here.tolist() == [1, 1]
    finally:
        dist.destroy_process_group()
