"""The commands on the device: fit with resume, validate, prune, evaluate and export, as they are typed."""

from pathlib import Path

import pytest
import sim
from conftest import fit_flags
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.strategies import StrategyRegistry
from tiny import tiny_folder

from leap_pl.cli.main import main
from leap_pl.masks import MaskSet
from leap_pl.oneshot.methods import METHODS

AcceleratorRegistry.register(sim.DEVICE, sim.Sim)
StrategyRegistry.register(sim.OnSim.strategy_name, sim.OnSim)
HERE = [f"--trainer.accelerator={sim.DEVICE}", f"--trainer.strategy={sim.OnSim.strategy_name}", "--trainer.devices=1"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("models") / "llama", num_hidden_layers=1)


@pytest.fixture(scope="module")
def run(model: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the device with every callback of the command line, two data workers and validation."""
    folder = tmp_path_factory.mktemp("run")
    main(fit_flags(model, text_file, folder, *HERE, "--data.num_workers=2", "--trainer.max_steps=2",
                   "--trainer.val_check_interval=2", "--checkpoint.every_n_train_steps=1"))  # fmt: skip
    return folder


def test_fit_leaves_a_mask_and_goes_on_where_it_was(run: Path, model: Path, text_file: Path, tmp_path: Path) -> None:
    learned = MaskSet.load(run / "checkpoints" / "mask.safetensors")
    stopped = next(path for path in sorted((run / "checkpoints").glob("*.ckpt")) if "step=1" in path.name)
    main(fit_flags(model, text_file, tmp_path, *HERE, "--data.num_workers=2", "--trainer.max_steps=2",
                   "--trainer.val_check_interval=2", f"--ckpt_path={stopped}"))  # fmt: skip
    again = MaskSet.load(tmp_path / "checkpoints" / "mask.safetensors")
    assert learned.digest_of_bits() == again.digest_of_bits()


def test_validate(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["validate", *HERE, f"--ckpt_path={run / 'checkpoints' / 'last.ckpt'}", "--trainer.logger=false"])
    assert "perplexity/hard" in capsys.readouterr().out


def test_export_and_evaluate(run: Path, text_file: Path, tmp_path: Path) -> None:
    main(["export", f"--ckpt_path={run / 'checkpoints' / 'last.ckpt'}", f"--output_dir={tmp_path / 'sparse'}"])
    main(["evaluate", f"--model={tmp_path / 'sparse'}", f"--perplexity={text_file}", f"--device={sim.DEVICE}",
          "--max_tokens=256", "--seq_length=32", f"--output={tmp_path / 'result.json'}"])  # fmt: skip
    assert (tmp_path / "result.json").exists()


@pytest.mark.parametrize("pattern", [None, "2:4"])
@pytest.mark.parametrize("method", METHODS)
def test_prune(method: str, pattern: str | None, model: Path, text_file: Path, tmp_path: Path) -> None:
    words = [f"--model={model}", f"--method={method}", f"--text={text_file}", f"--output_dir={tmp_path / 'pruned'}"]
    words += ["--seq_length=32", "--sequences=4", f"--device={sim.DEVICE}"]
    main(["prune", *words, *([] if pattern is None else [f"--pattern={pattern}"])])
    mask = MaskSet.load(tmp_path / "pruned" / "mask.safetensors")
    assert mask.sparsity == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("allocation", [["--owl"], ["--fisher=0.5"]])
def test_prune_with_an_allocation(allocation: list[str], model: Path, text_file: Path, tmp_path: Path) -> None:
    main(["prune", f"--model={model}", f"--text={text_file}", f"--output_dir={tmp_path / 'pruned'}",
          "--seq_length=32", "--sequences=4", f"--device={sim.DEVICE}", *allocation])  # fmt: skip
    assert MaskSet.load(tmp_path / "pruned" / "mask.safetensors").sparsity == pytest.approx(0.5, abs=0.01)
