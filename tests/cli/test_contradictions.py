"""Options that contradict each other, name nothing, or would leave a run that cannot be gone on with."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Run, fit_flags, refused
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import tiny_model

from leap_pl.base_model.weights import find_weights
from leap_pl.callbacks import Checkpoints, MaskExport
from leap_pl.checkpoints.layout import load_checkpoint
from leap_pl.cli.compare import compare_command
from leap_pl.cli.main import main
from leap_pl.cli.prune import prune_command
from leap_pl.errors import UserError
from leap_pl.masks import MaskSet

pytestmark = pytest.mark.usefixtures("eager")


# -- prune ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"mask": "MASK", "sparsity": 0.9, "method": "admm"}, "--sparsity would not be used: --mask sets which"),
        ({"mask": "MASK", "pattern": "2:4", "method": "admm"}, "--pattern would not be used: --mask sets which"),
        ({"layer_sparsity": [0.2, 0.9], "sparsity": 0.7}, "--sparsity would not be used: --layer_sparsity sets"),
        ({"fisher_rows": 0.9}, "--fisher_rows would not be used: only --fisher allocates"),
        (
            {"fisher": 0.5, "fisher_rows": 0.9, "method": "admm"},
            "--fisher_rows would not be used: of admm no weights compete within a row, as of wanda, sparseswaps",
        ),
        ({"owl_spread": 0.2, "owl_threshold": 4.0}, "--owl_threshold, --owl_spread would not be used: only --owl true"),
    ],
)
def test_what_would_be_overruled_is_refused(
    options: dict[str, Any], says: str, finished: Run, model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    given = {name: str(finished.mask) if value == "MASK" else value for name, value in options.items()}
    with pytest.raises(UserError, match=says):
        prune_command(str(model_folder), str(tmp_path / "out"), str(text_file), seq_length=32, sequences=2, **given)
    assert not (tmp_path / "out").exists()


def test_what_fitted_the_weights_is_not_said_of_the_mask(
    finished: Run, model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    learned = MaskSet.load(finished.mask).provenance.config
    options: dict[str, Any] = {"mask": str(finished.mask), "seq_length": 32, "sequences": 2, "seed": 5, "device": "cpu"}
    made = prune_command(str(model_folder), str(tmp_path / "out"), str(text_file), method="admm", **options)
    told = dict(made.masks.provenance.config)
    update = told.pop("weight_update")
    assert (update["seed"], update["text"], update["method"]) == (5, str(text_file), "admm")
    assert told == {name: value for name, value in learned.items() if not name.startswith("perplexity")}


def test_names_of_weights_that_match_nothing() -> None:
    model = tiny_model("llama")
    with pytest.raises(UserError, match=r"^targets: k_proj matches no weight of LlamaForCausalLM"):
        find_weights(model, ["re:.*q_proj", "k_proj"])
    with pytest.warns(UserWarning, match=r"^ignore: lm_hed matches no weight"):
        assert len(find_weights(model, None, ["lm_hed", "lm_head"])) == 14


def test_a_module_is_all_that_is_in_it() -> None:
    """But not what has a longer name."""
    model = tiny_model("llama", num_hidden_layers=11)
    found = find_weights(model, None, ["model.layers.1", "model.layers.2.mlp"])
    assert len(found) == 7 * 11 - 7 - 3
    assert "model.layers.10.mlp.up_proj.weight" in found
    assert {weight.layer for weight in find_weights(model, ["model.layers.1"]).values()} == {1}


# -- validate, and resuming ---------------------------------------------------------------------------------------


def test_validate_needs_a_checkpoint_and_something_to_measure(
    finished: Run, model_folder: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["validate", *fit_flags(model_folder, text_file, tmp_path)[1:]]
    kept = [word for word in words if "checkpoint." not in word and "mask_export" not in word]
    assert "Name it with --ckpt_path FILE" in refused(kept, capsys)
    words = ["validate", f"--ckpt_path={finished.checkpoint}", "--trainer.logger=false"]
    assert "data.validation_sequences is 0" in refused([*words, "--data.validation_sequences=0"], capsys)
    assert "trainer.limit_val_batches is 0" in refused([*words, "--trainer.limit_val_batches=0"], capsys)
    assert "--force: leap_pl validate learns nothing" in refused([*words, "--force"], capsys)
    assert "--tokens: leap_pl validate learns nothing" in refused([*words, "--tokens=1M"], capsys)


def test_the_last_checkpoint_has_the_settings_that_are_not_typed(finished: Run, tmp_path: Path, capsys) -> None:
    words = ["validate", "--ckpt_path=last", "--trainer.logger=false", f"--trainer.default_root_dir={tmp_path}"]
    main([*words, f"--checkpoint.dirpath={finished.checkpoint.parent}"])
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"checkpoint": {"dirpath": str(finished.checkpoint.parent)}}))
    main([*words, f"--config={tmp_path / 'c.yaml'}"])
    capsys.readouterr()
    assert "Set it with --checkpoint.dirpath" in refused([*words, "--model.base_model=x"], capsys)


def test_a_saved_config_starts_a_run_of_its_own(finished: Run, model_folder: Path, text_file: Path, tmp_path: Path):
    step = finished.checkpoint.parent / "step=4.ckpt"
    main(fit_flags(model_folder, text_file, tmp_path, f"--ckpt_path={step}"))
    (config,) = tmp_path.rglob("config.yaml")
    assert yaml.safe_load(config.read_text())["ckpt_path"] is None
    assert load_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 6


# -- files and folders ----------------------------------------------------------------------------------------------


def test_the_home_folder_is_written_as_it_is_read(
    finished: Run, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    prune_command(str(model_folder), "~/pruned", method="magnitude")
    assert MaskSet.load("~/pruned/mask.safetensors").sparsity == 0.5
    compare_command(["~/pruned/mask.safetensors"], output_dir="~/compared")
    assert {path.name for path in tmp_path.iterdir()} == {"pruned", "compared"}
    (tmp_path / "last.ckpt").symlink_to(finished.checkpoint)
    assert load_checkpoint("~/last.ckpt")["global_step"] == 6
    assert MaskExport("~/masks").place(Trainer(logger=False)) == tmp_path / "masks"


def test_the_mask_lies_beside_the_checkpoints_of_the_run(tmp_path: Path) -> None:
    best = ModelCheckpoint(dirpath=tmp_path / "best", monitor="perplexity/hard")
    trainer = Trainer(callbacks=[best, Checkpoints(dirpath=str(tmp_path / "run"))], logger=False)
    assert MaskExport().place(trainer) == tmp_path / "run"


def test_names_of_checkpoints_make_no_folders() -> None:
    with pytest.raises(UserError, match=r"makes folders in checkpoint\.dirpath"):
        Checkpoints(filename="{step}-{perplexity/hard:.2f}")
    with pytest.raises(UserError, match="makes folders"):
        Checkpoints(filename="run/{step}", auto_insert_metric_name=False)
    Checkpoints(filename="step={step}-{perplexity/hard:.2f}", auto_insert_metric_name=False)


@pytest.mark.parametrize(
    ("callback", "says"),
    [
        (["GradientAccumulationScheduler", "--trainer.callbacks.scheduling={0: 2}"], "accumulate_grad_batches"),
        (["BatchSizeFinder"], "Set --data.batch_size"),
        (["LearningRateFinder"], "Set --model.optimizer.lr"),
        (["EarlyStopping", "--trainer.callbacks.monitor=perplexity"], "perplexity, which is not measured. Give one of"),
    ],
)
def test_callbacks_that_a_run_cannot_have(
    callback: list[str], says: str, model_folder: Path, text_file: Path, tmp_path: Path, capsys
) -> None:
    words = fit_flags(model_folder, text_file, tmp_path, f"--trainer.callbacks={callback[0]}", *callback[1:])
    assert says in refused(words, capsys)
    message = refused([*words[: -len(callback)], "--checkpoint.monitor=perplexty"], capsys)
    assert "perplexty, which is not measured. Give one of" in message


def test_a_method_that_is_none_is_no_baseline(finished: Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no method wnda"):
        compare_command([str(finished.mask)], baselines="wnda,wanda", output_dir=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    facts = compare_command([str(finished.mask)], baselines="wanda", output_dir=str(tmp_path / "out"))
    assert json.dumps(facts)


@pytest.mark.parametrize(
    ("filename", "says"),
    [
        (
            "{step}-{loss:03d}",
            "checkpoint.filename {step}-{loss:03d} is no format of names and numbers (Unknown format",
        ),
        ("{step:bad}", "is no format of names and numbers (Invalid format specifier"),
        ("{step", "is no format of names and numbers (expected '}'"),
        ("{}", "the field {} is not {NAME} or {NAME:FORMAT}"),
        ("{step!r}", "the field {step} is not {NAME} or {NAME:FORMAT}"),
        ("{step:{loss}}", "the field {step} is not {NAME} or {NAME:FORMAT}"),
        ("{step}-{lossy:.2f}", "names lossy, which is not measured. Give one of loss, perplexity/hard"),
    ],
)
def test_names_of_checkpoints_are_tried_before_a_run(
    filename: str, says: str, model_folder: Path, text_file: Path, tmp_path: Path, capsys
) -> None:
    message = refused(fit_flags(model_folder, text_file, tmp_path, f"--checkpoint.filename={filename}"), capsys)
    assert says in message
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["--model.prior.mask={}", "--model.prior.method=sparsegpt"],
            "prior.method would not be used: model.prior.mask",
        ),
        (
            ["--model.prior.sequences=9"],
            "--model.prior.sequences would not be used: model.prior.method magnitude reads",
        ),
        (["--model.objective.temperature=3"], "temperature would not be used: model.objective.distillation is 0"),
        (
            ["--model.objective.budget=0", "--model.objective.budget_scope=layer"],
            "--model.objective.budget_scope would not be used: model.objective.budget is 0",
        ),
        (
            ["--model.annealing.pattern_alpha.start=7"],
            "--model.annealing.pattern_alpha.start would not be used: the gates have no patterns",
        ),
    ],
)
def test_settings_that_do_not_act(
    words: list[str], says: str, finished: Run, model_folder: Path, text_file: Path, tmp_path: Path, capsys
) -> None:
    """Typed they are refused; a config may give them, and is warned of."""
    words = [word.replace("{}", str(finished.mask)) for word in words]
    flags = fit_flags(model_folder, text_file, tmp_path, *words)[: -len(words)]
    assert says in refused([*flags, *words], capsys)
    *others, last = words
    name, _, value = last.removeprefix("--").partition("=")
    settings: object = yaml.safe_load(value)
    for key in reversed(name.split(".")):
        settings = {key: settings}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings))
    with pytest.warns(UserWarning, match=f"^{'.'.join(name.split('.')[:3])} is not used: "):
        main([flags[0], f"--config={tmp_path / 'c.yaml'}", *flags[1:], *others])


def test_what_a_config_gives_can_be_taken_back(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("model: {objective: {temperature: 3.0}}")
    flags = fit_flags(model_folder, text_file, tmp_path, "--model.objective.temperature=1.0")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*is not used")
        main([flags[0], f"--config={tmp_path / 'c.yaml'}", *flags[1:]])
