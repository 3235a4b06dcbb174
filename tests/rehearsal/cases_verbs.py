"""The commands on the device: fit with resume, validate, prune, evaluate and export, as they are typed."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import sim
import torch
from conftest import fit_flags
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.strategies import StrategyRegistry
from tiny import tiny_folder

from leap_pl.base_model.loading import load_model
from leap_pl.cli.main import main
from leap_pl.evaluation.answers import SharedPrefixes
from leap_pl.evaluation.perplexity import perplexity
from leap_pl.evaluation.prefix_rows import Answer
from leap_pl.masks import MaskSet
from leap_pl.oneshot.methods import METHODS
from leap_pl.oneshot.prune import prune
from leap_pl.oneshot.walk import WalkOptions

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


def test_export_evaluate_and_compare(run: Path, model: Path, text_file: Path, tmp_path: Path) -> None:
    main(["export", f"--ckpt_path={run / 'checkpoints' / 'last.ckpt'}", f"--output_dir={tmp_path / 'sparse'}"])
    question = {"question": "Which is hot?", "choices": {"text": ["ice", "fire"], "label": ["A", "B"]}}
    (tmp_path / "tasks" / "arc_easy").mkdir(parents=True)
    questions = (json.dumps({**question, "answerKey": key}) + "\n" for key in "ABB")
    (tmp_path / "tasks" / "arc_easy" / "validation.jsonl").write_text("".join(questions))
    results = {}
    for name, device in (("result", sim.DEVICE), ("host", "cpu")):
        results[name] = tmp_path / f"{name}.json"
        main(["evaluate", f"--model={tmp_path / 'sparse'}", f"--perplexity={text_file}", "--max_tokens=256",
              "--seq_length=32", "--tasks=arc_easy", f"--tasks_folder={tmp_path / 'tasks'}", f"--device={device}",
              f"--output={results[name]}"])  # fmt: skip
    here, host = (json.loads(path.read_text()) for path in results.values())
    assert here["tasks"]["arc_easy"]["correct"] == host["tasks"]["arc_easy"]["correct"]
    (measured,), (expected,) = here["perplexity"].values(), host["perplexity"].values()
    assert measured["value"] == pytest.approx(expected["value"], rel=1e-5)
    main(["compare", str(results["result"]), str(run / "checkpoints" / "mask.safetensors"),
          f"--output_dir={tmp_path / 'comparison'}"])  # fmt: skip
    assert "arc_easy" in (tmp_path / "comparison" / "table.md").read_text()


def test_mixed_precision_as_it_is_typed(model: Path, text_file: Path, tmp_path: Path) -> None:
    """Lightning's --trainer.precision=bf16-mixed means CUDA on every device but the CPU: here its plugin is typed."""
    main(fit_flags(model, text_file, tmp_path, *HERE, "--trainer.max_steps=1", "--data.validation_sequences=0",
                   "--trainer.plugins=MixedPrecision", "--trainer.plugins.precision=bf16-mixed",
                   f"--trainer.plugins.device={sim.DEVICE}"))  # fmt: skip
    settings = MaskSet.load(tmp_path / "checkpoints" / "mask.safetensors").provenance.config
    assert settings["precision"] == "bf16-mixed"


def test_a_model_whose_head_is_on_another_device(tmp_path: Path, text_file: Path) -> None:
    """As device_map places it, whose hooks move what a module is given, and not what it returns."""
    folder = tiny_folder(tmp_path / "untied", num_hidden_layers=1, tie_word_embeddings=False)
    tokens = torch.arange(128, device="cpu")
    whole = load_model(str(folder), dtype="float32")
    expected = perplexity(whole, tokens, seq_length=32)
    spread = load_model(str(folder), dtype="float32").to(sim.DEVICE)
    spread.lm_head.to("cpu").register_forward_pre_hook(lambda module, given: given[0].to("cpu"))
    spread.register_forward_hook(
        lambda module, given, result: result.__setitem__("logits", result.logits.to(sim.DEVICE))
    )
    found = perplexity(spread, tokens, seq_length=32)
    assert found.value == pytest.approx(expected.value, rel=1e-5)
    answers = [Answer(number, (5, 6, 7, number, 9), 2) for number in range(3)]
    scores = []
    for model in (whole, spread):
        shared = SharedPrefixes.of(model)
        assert shared is not None
        scores.append({answer.index: (likely, first) for answer, likely, first in shared.score(answers, 1)})
    for index, (likely, first) in scores[0].items():
        assert scores[1][index] == (pytest.approx(likely, rel=1e-5), first)


@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
@pytest.mark.parametrize("method", METHODS)
def test_the_python_api_whatever_the_default_device(method: str, inside: bool, model: Path) -> None:
    """Prune a model that is on the device, and one on the host of which one block at a time is; then measure it."""
    tokens = torch.arange(128, device="cpu").view(4, 32)
    masks = []
    with torch.device(sim.DEVICE) if inside else nullcontext():
        for home in (sim.DEVICE, "cpu"):
            loaded = load_model(str(model), dtype="float32").to(home)
            walk = WalkOptions(device=sim.DEVICE)
            masks.append(prune(loaded, tokens, method=method, walk=walk, progress=False).masks)
            found = perplexity(loaded.to(sim.DEVICE), tokens.flatten(), seq_length=32)
            assert found.value > 1
            assert masks[-1].is_applied_to(loaded)  # the blocks' copies on the device are not the model
        assert masks[0].digest_of_bits() == masks[1].digest_of_bits()
        on_host = load_model(str(model), dtype="float32").to("cpu")
        expected = prune(on_host, tokens, method=method, progress=False).masks
    differ = sum(int((expected.masks[name] != mask).sum()) for name, mask in masks[0].masks.items())
    assert differ <= 1e-3 * sum(mask.numel() for mask in expected.masks.values())  # attention is written out there


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
