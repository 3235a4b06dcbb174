"""The gates of groups and tiles on two real ranks: what they learn, hold and write is what one process does."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fit_flags
from ranks import run_ranks
from scaled_runs import ddp, sharded
from torch import Tensor

from leap_pl.checkpoints.layout import masks_from_checkpoint
from leap_pl.cli.main import main
from leap_pl.masks import MaskSet

pytestmark = pytest.mark.usefixtures("eager")

KINDS = {
    "nm": ["--model.gate=NMGate"],
    "joint": ["--model.gate=TileGate", "--model.gate.tile=8", "--model.sparsity=0.3"],
    "tile": ["--model.gate=TileGate", "--model.gate.tile=8", "--model.gate.mode=tile", "--model.sparsity=0.3"],
}
STRATEGIES = {"sharded": sharded(2), "folder": sharded(2, folder=True), "ddp": ddp(2)}
RUNS = [("nm", "sharded"), ("nm", "ddp"), ("joint", "folder"), ("tile", "sharded"), ("tile", "ddp")]


def learn(flags: list[str]) -> dict[str, Tensor]:
    from leap_pl.distributed.shards import gathered

    gates = main([*flags, "--trainer.max_steps=3"]).model.gates
    return {
        f"{part}.{name}": gathered(tensor).clone()
        for name, gate in gates.items()
        for part, tensor in gate.stored().items()
    }


def two_ranks(rank: int, model: Path, text: Path, root: Path) -> dict[str, Any]:
    found = {}
    for kind, strategy in RUNS:
        name = f"{kind}-{strategy}"
        found[name] = learn(fit_flags(model, text, root / name, *KINDS[kind], *STRATEGIES[strategy]))
    return found


@pytest.fixture(scope="module")
def ranks(model_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    root = tmp_path_factory.mktemp("gates")
    return root, run_ranks(2, two_ranks, model_folder, text_file, root, folder=root / "ranks")


@pytest.mark.parametrize(("kind", "strategy"), RUNS)
def test_two_ranks_learn_what_one_learns(ranks, model_folder, text_file, tmp_path: Path, kind: str, strategy) -> None:
    root, found = ranks
    flags = fit_flags(model_folder, text_file, tmp_path, *KINDS[kind], "--trainer.accumulate_grad_batches=4")
    expected = learn(flags)
    folder = root / f"{kind}-{strategy}" / "checkpoints"
    for rank in found:
        assert rank[folder.parent.name].keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(rank[folder.parent.name][name], tensor, rtol=0, atol=1e-6, msg=name)
    masks = [MaskSet.load(path / "mask.safetensors").masks for path in (folder, tmp_path / "checkpoints")]
    masks.append(masks_from_checkpoint(folder / "last.ckpt").masks)
    for name, mask in masks[0].items():
        assert all(torch.equal(mask, other[name]) for other in masks[1:])
