"""The command line: help, verbs, and one clear line for every mistake."""

import json
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from conftest import Run, failing, fit_flags
from tiny import tiny_folder

from leap_pl.cli.main import VERBS, main
from leap_pl.training.datamodule import TextDataModule
from leap_pl.training.module import LeapModule

pytestmark = pytest.mark.usefixtures("eager")


def test_help_names_every_verb() -> None:
    done = subprocess.run([sys.executable, "-m", "leap_pl", "--help"], capture_output=True, text=True, check=True)
    assert all(f"\n  {verb} " in done.stdout for verb in VERBS)


def test_help_imports_nothing_heavy() -> None:
    code = "import sys; from leap_pl.cli.main import main; main(['--help']); "
    code += "print({'torch', 'lightning'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("set()\n")


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb(verb: str, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert f"leap_pl {verb}" in text.replace("\n", " ") or f"leap_pl [options] {verb}" in text.replace("\n", " ")
    assert len(text.splitlines()) > 15


def test_unknown_verb(capsys) -> None:
    assert "there is no verb 'prun'" in failing(capsys, ["prun"])


@pytest.mark.parametrize("command", [["leap_pl"], [sys.executable, "-m", "leap_pl"]], ids=["installed", "module"])
def test_a_command_that_went_well_says_so_to_the_shell(command: list[str], finished: Run, tmp_path: Path) -> None:
    scripts = Path(sysconfig.get_path("scripts"))
    words = ["export", "--mask", str(finished.mask), "--output_dir", str(tmp_path / "out")]
    done = subprocess.run([scripts / command[0], *command[1:], *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "{" not in done.stderr  # what the verb returns
    assert (tmp_path / "out" / "config.json").is_file()


def test_ctrl_c_is_one_line(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    """Where it comes amid a forward pass, in which Python cannot say where the command was."""
    code = """
import os, signal, time
import torch
from leap_pl.cli.main import console

def pressed(*arguments, **more):
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(1000):  # a thread of torch may be the one that is told, and Python hears of it a little later
        time.sleep(0.01)

torch.nn.Module.__call__ = pressed
console()
"""
    words = ["evaluate", "--model", str(model_folder), "--perplexity", str(text_file), "--seq_length", "16"]
    done = subprocess.run(
        [sys.executable, "-c", code, *words, "--output", str(tmp_path / "result.json")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 130
    assert "Traceback" not in done.stderr
    assert done.stderr.endswith("\nleap_pl evaluate: stopped.\n")
    assert list(tmp_path.iterdir()) == []


def test_verbs_read_a_config(finished: Run, tmp_path: Path) -> None:
    config = tmp_path / "export.yaml"
    config.write_text(f"mask: {finished.mask}\noutput_dir: {tmp_path / 'out'}\n")
    main(["export", "--config", str(config)])
    assert (tmp_path / "out" / "config.json").is_file()


WARNED = """
import warnings
from leap_pl.cli import main as cli, compare

def compare_command() -> None:
    warnings.formatwarning = lambda message, *told: f"as ever: {message}\\n"  # Lightning does so when it is imported
    exec(compile("warnings.warn('a weight\\\\n is gone')", compare.__file__, "exec"))
    warnings.warn("beside", stacklevel=1)

compare.compare_command = compare_command
cli.VERBS["compare"] = cli.VERBS["compare"]._replace(several=None)
cli.main(["compare"])
exec(compile("warnings.warn('later')", compare.__file__, "exec"))
"""


def test_a_warning_is_one_plain_line() -> None:
    """This package's without a path, as long as the command lasts; others as Python, or Lightning, shows them."""
    done = subprocess.run([sys.executable, "-c", WARNED], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines() == ["warning: a weight is gone", "as ever: beside", "as ever: later"]


def test_a_warning_that_is_recorded_is_recorded(monkeypatch) -> None:
    import leap_pl.cli.compare

    monkeypatch.setitem(VERBS, "compare", VERBS["compare"]._replace(several=None))
    warn = compile("import warnings; warnings.warn('a weight is gone')", leap_pl.cli.compare.__file__, "exec")
    monkeypatch.setattr(leap_pl.cli.compare, "compare_command", lambda: exec(warn, {}))
    with pytest.warns(UserWarning, match="a weight is gone"):
        main(["compare"])


def test_force_spares_what_is_read(finished: Run, tmp_path: Path, capsys, monkeypatch) -> None:
    """A slip in --output_dir does not cost the run, the base model or the results."""
    import shutil

    run, model = tmp_path / "run", tmp_path / "model"
    shutil.copytree(finished.checkpoint.parent, run / "checkpoints", symlinks=True)
    tiny_folder(model)
    (run / "text.jsonl").write_text('{"text": "a"}')
    (run / "r.json").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    mask, checkpoint = run / "checkpoints" / "mask.safetensors", run / "checkpoints" / "last.ckpt"
    monkeypatch.chdir(run)
    for words, folder in (
        (["export", f"--mask={mask}"], run),
        (["export", f"--mask={mask}"], run / "checkpoints"),
        (["export", f"--ckpt_path={checkpoint}"], run / "checkpoints"),
        (["export", f"--mask={finished.mask}", f"--model={model}"], model),
        (["export", f"--mask={finished.mask}", f"--model={model}"], "."),
        (["prune", f"--model={model}", "--method=magnitude"], model),
        (["prune", f"--model={model}", "--method=magnitude"], tmp_path),
    ):
        assert "would be replaced" in failing(capsys, [*words, f"--output_dir={folder}", "--force"])
    assert sorted(tmp_path.rglob("*")) == before


def test_a_result_replaces_results_alone(model_folder, text_file, tmp_path: Path, capsys) -> None:
    copy = tmp_path / "text.jsonl"
    copy.write_bytes(text_file.read_bytes())
    words = ["evaluate", f"--model={model_folder}", f"--perplexity={copy}", "--seq_length=32"]
    assert f"{copy} would be replaced, and this command reads" in failing(capsys, [*words, f"--output={copy}"])
    assert copy.read_bytes() == text_file.read_bytes()
    script = "from leap_pl.evaluation.record import read_result\n"
    for mine in ("mine", script, json.dumps({"title": "notes on leap_pl.evaluation"})):
        (tmp_path / "notes.json").write_text(mine)
        message = failing(capsys, [*words, f"--output={tmp_path / 'notes.json'}"])
        assert "no result of leap_pl evaluate" in message
        assert (tmp_path / "notes.json").read_text() == mine
    assert "--stride is 0; give 1 or more" in failing(capsys, [*words, "--stride=0"])
    for _ in range(2):
        main([*words, "--max_tokens=64", f"--output={tmp_path / 'r.json'}"])


def test_figures_that_are_none_are_not_put_into_a_card(finished: Run, tmp_path: Path, capsys) -> None:
    result = tmp_path / "r.json"
    for content in ('{"perplexity": {"a": 3}}', '{"perplexity": {"a": {"value": "x"}}}', "[1]", "not json"):
        result.write_text(content)
        words = ["export", f"--mask={finished.mask}", f"--output_dir={tmp_path / 'out'}", f"--perplexity={result}"]
        message = failing(capsys, words)
        assert "no result of leap_pl evaluate" in message or "cannot be read as a result file" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("fit configs/debug.yaml", "To read settings from a file, type --config configs/debug.yaml."),
        ("fit --model.base_model x --model.lr 1", "Did you mean --model.optimizer.lr?"),
        ("fit --model.base_model x --model.learning_rate 1", "Did you mean --model.optimizer.lr?"),
        ("evaluate --model x --text t.txt", "Did you mean --perplexity?"),
        ("fit --model.base_model x --text t.txt", "Did you mean --data.text?"),
        (
            "fit --model.base_model x --trainer.callbacks EarlyStop",
            "no class EarlyStop of this kind. Did you mean Early",
        ),
        (
            "fit --model.base_model x --trainer.logger Curves",
            "no class Curves of this kind. There are CSVLogger, CometLogger, LitLogger, MLFlowLogger, ",
        ),
        (
            "fit --model.base_model x --trainer.logger Tensorbord",
            "no class Tensorbord of this kind. Did you mean Tensor",
        ),
        (
            "fit --model.base_model x --trainer.logger+=TensorBoardLogger --trainer.logger+=CSVLogger",
            "trainer.logger: TensorBoardLogger needs save_dir. Type --trainer.logger+=TensorBoardLogger "
            "--trainer.logger.save_dir=VALUE, or give both in a config.",
        ),
        ("fit --model.base_model x --trainer.accelerator gpu", "a device that this machine does not have"),
        ("prune --model x --output_dir y --sparsity 50", "sparsity is 50; give a number above 0 and below 1. For 50%,"),
    ],
)
def test_a_first_mistake_is_one_line_with_a_remedy(words: str, says: str, capsys) -> None:
    message = failing(capsys, words.split())
    assert says in message
    assert len(message) < 250


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ("model: {sparsness: 0.5}", "there is no setting model.sparsness. Did you mean model.sparsity?"),
        (
            "model: {prior: {sequence: 5}}",
            "there is no setting model.prior.sequence. Did you mean model.prior.sequences?",
        ),
        ("trainer: {max_step: 5}", "there is no setting trainer.max_step. Did you mean trainer.max_steps?"),
        (
            "model: {optimizer: {class_path: torch.optim.AdamW, init_args: {learning_rate: 1}}}",
            "there is no setting model.optimizer.learning_rate. Did you mean model.optimizer.lr?",
        ),
        ("modle: {sparsity: 0.5}", "c.yaml: there is no setting modle. Did you mean model?"),
    ],
)
def test_a_mistyped_key_of_a_config_is_told_with_what_is_meant(config: str, says: str, tmp_path: Path, capsys) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(config)
    assert says in failing(capsys, ["fit", "--model.base_model=x", f"--config={path}"])


def test_a_logger_whose_package_is_missing(model_folder, text_file, tmp_path: Path, capsys, monkeypatch) -> None:
    from lightning.pytorch.loggers import wandb

    monkeypatch.setattr(wandb, "_WANDB_AVAILABLE", Missing())
    words = [word for word in fit_flags(model_folder, text_file, tmp_path) if not word.startswith("--trainer.logger")]
    message = failing(capsys, [*words, "--trainer.logger=WandbLogger"])
    assert "needs the package wandb, which is not installed. Install it (pip install wandb)" in message


class Missing:
    def __bool__(self) -> bool:
        return False

    def __str__(self) -> str:
        return "Requirement 'wandb>=0.12.10' not met. HINT: Try running `pip install -U 'wandb>=0.12.10'`"


def test_a_second_logger_is_added(model_folder, text_file, tmp_path: Path) -> None:
    more = ["--trainer.logger+=CSVLogger", f"--trainer.logger.save_dir={tmp_path}", "--trainer.max_steps=1"]
    main(fit_flags(model_folder, text_file, tmp_path, *more))
    assert list((tmp_path / "tensorboard").glob("events.*"))
    assert list(tmp_path.rglob("metrics.csv"))


@pytest.mark.parametrize("verb", ["fit", "validate"])
def test_ctrl_c_of_what_lightning_runs_is_that_of_the_process(
    verb: str, finished: Run, model_folder, text_file, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no checkpoint answers it, Lightning would end the process with status 1."""

    def pressed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    place = "on_validation_start" if verb == "validate" else "setup"
    monkeypatch.setattr(TextDataModule if verb == "fit" else LeapModule, place, pressed)
    words = fit_flags(model_folder, text_file, tmp_path)
    if verb == "validate":
        words = ["validate", f"--ckpt_path={finished.checkpoint}", f"--data.text={text_file}"]
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(KeyboardInterrupt):
            main(words)
    finally:
        signal.signal(signal.SIGINT, before)  # Lightning ignores it from then on
