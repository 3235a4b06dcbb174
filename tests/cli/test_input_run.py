"""What a run meets beside its text and model: hostile configs, killed workers, a folder that is gone, odd settings."""

import multiprocessing
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from conftest import Run, fit_flags, refused
from hypothesis import given, settings
from hypothesis import strategies as st
from stopped_runs import STEPS, Outcome, at_call, flags, kept, outcome, same, stopped

from leap_pl.cli.configs import check_configs
from leap_pl.cli.main import main
from leap_pl.errors import UserError
from leap_pl.inputs import yaml_input
from leap_pl.inputs.yaml_input import DEEPEST, MOST_VALUES, check_yaml

pytestmark = pytest.mark.usefixtures("eager", "event_files_in_order")

# -- configs ----------------------------------------------------------------------------------------------------


def bomb(levels: int, each: int = 9) -> str:
    """A billion laughs: some hundred bytes that stand for ``each ** levels`` values."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    for level in range(1, levels):
        lines.append(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * each)}]")
    return "\n".join(lines) + "\n"


HOSTILE = {
    "aliases": (bomb(30), f"more than {MOST_VALUES:,} values when its aliases"),
    "aliases in a value": (f"{bomb(7)}output_dir: *a6\n", f"more than {MOST_VALUES:,} values when its aliases"),
    "merged": ("a: &a {k: v}\n" * 1 + "".join(f"m{k}: &m{k} {{<<: *a}}\n" for k in range(20)), ""),
    "within itself": ("results: &a [one, *a]\n" + "# so long that it is looked at\n" * 9, "inside its own anchor"),
    "deep": ("results: " + "[" * 200 + "]" * 200, "nested more than 50 deep"),
    "deeper": ("results: " + "[" * 100_000, "is not valid YAML"),
    "indented": ("".join(" " * k + "a:\n" for k in range(300)), "nested more than 50 deep"),
    "long": ("# nothing\n" * 200_000, "more than 1,048,576 bytes"),
    "many": ("results: [" + "a, " * (MOST_VALUES + 1) + "]", f"more than {MOST_VALUES:,} values"),
    "no UTF-8": ("\udcff: 1" + " " * 300, "is not valid YAML"),
    "tag": ("!!python/object/apply:os.system ['touch ran']\n", "is not valid YAML"),
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("verb", ["fit", "compare"])
@pytest.mark.parametrize("spelling", ["--config={}", "--config {}", "-c {}"])
def test_hostile_configs(tmp_path: Path, monkeypatch, capsys, kind: str, verb: str, spelling: str) -> None:
    content, words = HOSTILE[kind]
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "config.yaml"
    config.write_bytes(content.encode(errors="surrogateescape"))
    line = refused([verb, *spelling.format(config).split()], capsys)
    assert words in line
    assert words == "" or str(config) in line
    assert len(line) < 1000
    assert not (tmp_path / "ran").exists()


def test_what_a_setting_names_is_looked_at_too(tmp_path: Path, capsys) -> None:
    """A group of settings in a file of its own, named by a flag or by a config."""
    (tmp_path / "model.yaml").write_text(f"{bomb(9)}base_model: *a8\n")
    (tmp_path / "config.yaml").write_text(f"model: {tmp_path / 'model.yaml'}\n")
    for words in (f"--model={tmp_path / 'model.yaml'}", f"--config={tmp_path / 'config.yaml'}"):
        assert "values when its aliases" in refused(["fit", words], capsys)


@pytest.mark.parametrize("kind", ["pipe", "/dev/zero", "folder"])
def test_a_config_that_is_no_file(tmp_path: Path, capsys, kind: str) -> None:
    config = Path(kind)
    if kind != "/dev/zero":
        config = tmp_path / "c.yaml"
        config.mkdir() if kind == "folder" else os.mkfifo(config)
    line = refused(["compare", f"--config={config}"], capsys)
    assert f"--config {config} is a " in line
    assert "Save its content in a regular file" in line
    if kind == "pipe":
        assert f"--model {config} is a pipe" in refused(["fit", f"--model={config}"], capsys)


@settings(max_examples=200, deadline=None)
@given(st.recursive(st.integers(0, 9) | st.text("ab", max_size=3), lambda t: st.lists(t, max_size=4), max_leaves=40))
def test_values_are_counted_as_they_are_built(value: object) -> None:
    """With aliases written out: what counts as so many is built as so many."""

    def count(part: object) -> int:
        return 1 + sum(map(count, part)) if isinstance(part, list) else 1

    text = (
        f"a: &a {yaml.safe_dump(value, default_flow_style=True).removesuffix('...' + chr(10)).strip()}\nb: [*a, *a]\n"
    )
    text += "#" * 2 * DEEPEST
    values = 4 + 3 * count(yaml.safe_load(text)["a"])  # the whole, its two keys, the list, and a three times
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(yaml_input, "MOST_VALUES", values)
        check_yaml(text)
        patch.setattr(yaml_input, "MOST_VALUES", values - 1)
        with pytest.raises(UserError, match="values when its aliases"):
            check_yaml(text)


def test_aliases_that_a_person_writes(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("a: &a {lr: 0.1, betas: [0.9, 0.95]}\nb: {<<: *a, lr: 0.2}\nc: [*a, *a]\n" + "# why\n" * 50)
    check_configs([f"--config={config}"])
    shipped = [*(Path(__file__).parents[2] / "configs").rglob("*.yaml")]
    assert len(shipped) > 5
    for one in shipped:
        check_configs(["--config", str(one)])


# -- settings that do not go with one epoch ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        (
            "trainer.overfit_batches=2",
            "trainer.overfit_batches is 2, and would validate on the training text",
        ),
        ("trainer.overfit_batches=0.5", "trainer.overfit_batches is 0.5"),
        ("trainer.limit_train_batches=4", "trainer.limit_train_batches is 4, and would read the same blocks again"),
        ("trainer.min_steps=2", "trainer.min_steps is 2, and a run is one epoch: neither trainer.max_time nor early"),
        ("trainer.min_epochs=1", "trainer.min_epochs is 1, and a run is one epoch: neither trainer.max_time nor early"),
        ("trainer.limit_train_batches=1", "trainer.limit_train_batches is 1,"),
        ("trainer.limit_train_batches=0.5", "trainer.limit_train_batches is 0.5"),
        ("trainer.limit_train_batches=0", "trainer.limit_train_batches is 0"),
        ("trainer.limit_train_batches=-3", "limit_train_batches"),
        ("trainer.check_val_every_n_epoch=2", "a run is one epoch: nothing would be validated"),
        ("trainer.fast_dev_run=true", "would write the mask of its few steps"),
        ("trainer.fast_dev_run=2", "would write the mask of its few steps"),
        ("trainer.max_epochs=0", "trainer.max_epochs is 0, and nothing would be learned"),
        ("trainer.max_epochs=-5", "max_epochs"),
        ("trainer.max_steps=-5", "max_steps"),
        ("trainer.max_steps=-1", "Give the number of optimizer steps with --trainer.max_steps"),
        ("trainer.limit_val_batches=-1", "limit_val_batches"),
        ("trainer.limit_val_batches=1.5", "limit_val_batches"),
        ("trainer.barebones=true", "barebones"),
        ("ckpt_path=best", "--ckpt_path best is no checkpoint. Give a .ckpt from a run's checkpoints folder, or last"),
        ("ckpt_path=hpc", "--ckpt_path hpc is no checkpoint"),
        ("ckpt_path=registry", "--ckpt_path registry is no checkpoint"),
        ("ckpt_path=registry:name:version:3", "is no checkpoint"),
        ("ckpt_path=none.ckpt", "none.ckpt: there is no such checkpoint"),
    ],
)
def test_settings_that_do_not_go_with_a_run(model_folder, text_file, tmp_path: Path, capsys, flag, words) -> None:
    """Before anything is computed, and nothing is written."""
    assert words in refused(fit_flags(model_folder, text_file, tmp_path, f"--{flag}"), capsys)
    assert not list(tmp_path.rglob("*.safetensors")) + list(tmp_path.rglob("*.ckpt"))


def test_settings_that_do_not_go_with_a_run_from_python(model_folder, text_file) -> None:
    from lightning import Trainer

    from leap_pl.data import TextDataModule
    from leap_pl.training.module import LeapModule

    data = TextDataModule(str(model_folder), str(text_file), seq_length=32)
    trainer = Trainer(max_steps=2, limit_train_batches=1, logger=False, enable_checkpointing=False, accelerator="cpu")
    with pytest.raises(UserError, match=r"trainer\.limit_train_batches is 1"):
        trainer.fit(LeapModule(str(model_folder)), data)


@pytest.mark.parametrize(
    "flag",
    [
        "max_epochs=1",
        "max_epochs=3",
        "limit_train_batches=1.0",
        "limit_val_batches=0",
        "limit_val_batches=1",
        "limit_val_batches=0.5",
    ],
)
def test_settings_that_change_nothing_of_what_is_learned(
    never_stopped: Outcome, model_folder, text_file, tmp_path: Path, flag: str
) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        main(flags(model_folder, text_file, tmp_path, f"--trainer.{flag}"))
    idle = [str(one.message) for one in told if "not used: trainer.max_epochs" in str(one.message)]
    assert len(idle) == flag.startswith("max_epochs")
    assert all(f"which is {flag[-1]}. A run is one epoch of trainer.max_steps, {STEPS} here" in one for one in idle)
    found = outcome(tmp_path)
    for name, tensor in never_stopped.checkpoint["state_dict"].items():
        assert torch.equal(found.checkpoint["state_dict"][name], tensor)
    assert found.checkpoint["global_step"] == never_stopped.checkpoint["global_step"]
    if "val" not in flag:
        same(found, never_stopped)
    else:  # the first so many batches of two
        assert ("perplexity/hard" in found.curves) == (flag != "limit_val_batches=0")


def test_a_checkpoint_of_such_a_name(finished: Run, tmp_path: Path, monkeypatch, capsys) -> None:
    """Is a file like any other."""
    monkeypatch.chdir(tmp_path)
    for name in ("best", "hpc", "registry"):
        (tmp_path / name).write_bytes(finished.checkpoint.read_bytes())
        main(["validate", *finished.flags[1:], f"--trainer.logger.save_dir={tmp_path}", f"--ckpt_path={name}"])
    assert "perplexity" in capsys.readouterr().out


# -- workers, folders -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [2, 5, 11])  # of 12; all the text that is left may have been read ahead
def test_a_killed_data_worker_loses_nothing(
    never_stopped: Outcome, model_folder, text_file, tmp_path: Path, monkeypatch, capsys, step: int
) -> None:
    """Killed amid a step, by what has no handler: the step is finished, a checkpoint written, and one line said."""
    words = flags(model_folder, text_file, tmp_path, "--data.num_workers=2", "--ckpt_path=last")

    others = {child.pid for child in multiprocessing.active_children()}

    def workers() -> list[int]:
        return [child.pid for child in multiprocessing.active_children() if child.pid and child.pid not in others]

    def kill() -> None:
        killed, _ = workers()
        os.kill(killed, signal.SIGKILL)
        os.waitid(os.P_PID, killed, os.WEXITED | os.WNOWAIT)  # or a run this near its end is over before its worker is

    with monkeypatch.context() as patch:
        at_call(patch, "training_step", step, kill)
        stopped(words, 2)
    assert workers() == []  # the other one is ended, too
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("leap_pl fit: a data worker")]
    assert len(said) == 1
    assert "--ckpt_path last, with fewer --data.num_workers than 2" in said[0]
    assert "last.ckpt" in kept(tmp_path) or step < 3
    assert not (tmp_path / "checkpoints" / "mask.safetensors").exists()
    main(words)
    same(outcome(tmp_path), never_stopped)


@pytest.mark.parametrize("verb", [["fit"], ["prune", "--model=m"], ["compare", "a.json"], ["evaluate", "--model=m"]])
def test_a_working_directory_that_is_gone(tmp_path: Path, verb: list[str]) -> None:
    """One line; help is shown from anywhere."""
    gone = tmp_path / "gone"
    code = "import os, sys; os.chdir(sys.argv[1]); os.rmdir(sys.argv[1]); "
    code += "from leap_pl.cli.main import main; main(sys.argv[2:])"
    gone.mkdir()
    root = str(Path(__file__).parent.parent)
    found = subprocess.run(
        [sys.executable, "-c", code, str(gone), *verb],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": root},
    )
    assert found.returncode == 2, found.stderr
    assert found.stderr == f"leap_pl {verb[0]}: the working directory no longer exists. Change to another: cd ~\n"
