"""What leap_pl wrote when its modules lay in one folder is read as ever: checkpoint, mask and config.

The files are those of six steps of ``leap_pl fit`` on the tiny model, written by the last version of that layout, with
``PackedAdamW`` and bfloat16 logits; ``step=4.ckpt`` is of the fourth step. The model lies beside them: random numbers
need not be the same on every machine, and its fingerprint is compared.
"""

import json
import shutil
from importlib import import_module
from pathlib import Path

import pytest
import torch
import yaml
from conftest import refused

import leap_pl
from leap_pl.cli.main import main
from leap_pl.masks import MaskSet

WRITTEN = Path(__file__).with_name("written_before_rooms")


@pytest.fixture
def before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files as their run left them, in the folder that it was started from."""
    folder = tmp_path / "before"
    shutil.copytree(WRITTEN, folder)
    (folder / "run").mkdir()
    (folder / "checkpoints").rename(folder / "run" / "checkpoints")
    monkeypatch.chdir(folder)
    return folder


def agreement(mask: MaskSet, other: MaskSet) -> float:
    same = total = 0
    for name, kept in mask.masks.items():
        same += int((kept == other.masks[name]).sum())
        total += kept.numel()
    return same / total


def test_the_files_are_of_that_layout_and_small() -> None:
    """Or the tests below would show nothing."""
    told = yaml.safe_load((WRITTEN / "config.yaml").read_text(encoding="utf-8"))
    assert told["model"]["optimizer"]["class_path"] == "leap_pl.optimizer.PackedAdamW"
    assert told["model"]["gate"]["class_path"] == "leap_pl.gates.BernoulliGate"
    assert sum(file.stat().st_size for file in WRITTEN.rglob("*") if file.is_file()) < 200 * 1024


def test_a_mask_is_loaded(before: Path) -> None:
    mask = MaskSet.load("run/checkpoints/mask.safetensors")
    assert mask.sparsity == pytest.approx(0.5, abs=1e-3)
    assert mask.provenance.config["gate"]["class_path"] == "BernoulliGate"


def test_a_checkpoint_is_exported(before: Path) -> None:
    main(["export", "--ckpt_path=run/checkpoints/step=4.ckpt", "--output_dir=sparse"])
    facts = json.loads(Path("sparse", "leap_pl.json").read_text(encoding="utf-8"))
    assert facts["sparsity"] == pytest.approx(0.5, abs=1e-3)


@pytest.mark.usefixtures("eager")
def test_a_run_is_resumed_with_its_saved_config(before: Path) -> None:
    """Its last two steps end with the mask that they ended with then, but for what another processor rounds."""
    then = MaskSet.load("run/checkpoints/mask.safetensors")
    Path("run/checkpoints/mask.safetensors").unlink()
    main(["fit", "--config=config.yaml", "--ckpt_path=run/checkpoints/step=4.ckpt"])
    last = torch.load("run/checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"] == 6
    assert agreement(MaskSet.load("run/checkpoints/mask.safetensors"), then) > 0.98


OLD_NAMES = [
    ("model.optimizer", "leap_pl.optimizer.PackedAdamW", ""),
    ("model.gate", "leap_pl.gates.bernoulli.BernoulliGate", ""),
    ("model.gate", "leap_pl.gates.nm.NMGate", ""),
    ("model.gate", "leap_pl.gates.NMGate", ""),
    ("model.gate", "NMGate", ""),
    ("trainer.callbacks", "leap_pl.callbacks.StepProgress", "list"),
    ("trainer.callbacks", "leap_pl.callbacks.progress.StepProgress", "list"),
    ("model.optimizer", "PackedAdamW", ""),
]


@pytest.mark.parametrize("place", ["config", "word"])
@pytest.mark.parametrize(("key", "name", "form"), OLD_NAMES, ids=[f"{key}-{name}" for key, name, _ in OLD_NAMES])
def test_old_names_of_classes_are_accepted(
    before: Path, key: str, name: str, form: str, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a config and on the command line; and the config that is written anew names the class where it is."""
    words = ["fit", "--config=config.yaml", "--print_config"]
    group, option = key.split(".")
    if place == "word":
        words.insert(2, f"--{key}+={name}" if form else f"--{key}={name}")
    else:
        value = {"class_path": name}
        Path("more.yaml").write_text(yaml.safe_dump({group: {option: [value] if form else value}}), encoding="utf-8")
        words.insert(2, "--config=more.yaml")
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert not caught.value.code
    found = yaml.safe_load(capsys.readouterr().out)[group][option]
    path = (found[-1] if form else found)["class_path"]
    module, made = path.rsplit(".", 1)
    assert made == name.rsplit(".", 1)[-1]
    assert getattr(import_module(module), made).__name__ == made


def test_every_moved_module_is_found_by_its_old_name() -> None:
    for name, module in leap_pl._MOVED.items():
        assert getattr(leap_pl, name) is import_module(module)
    assert leap_pl.module.LeapModule is leap_pl.LeapModule


@pytest.mark.parametrize("name", ["leap_pl.optimizer.Nothing", "leap_pl.nowhere.PackedAdamW"])
def test_names_that_never_were_are_refused(before: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert name in refused(["fit", "--config=config.yaml", f"--model.optimizer={name}"], capsys)
