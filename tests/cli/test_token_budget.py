"""``--tokens``: the length of a run in tokens."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import fit_flags, refused

from leap_pl.cli.fit import make_cli
from leap_pl.cli.main import main
from leap_pl.cli.token_budget import number_of, ranks_of, steps_of
from leap_pl.errors import UserError


@pytest.mark.parametrize(
    ("typed", "number"), [("10M", 1e7), ("1.5b", 1.5e9), ("500 K", 5e5), ("2_000", 2000), ("1e6", 1e6), ("2T", 2e12)]
)
def test_numbers_of_tokens(typed: str, number: float) -> None:
    assert number_of(typed) == number


@pytest.mark.parametrize("typed", ["", "ten", "-5M", "0", "10MM", "inf", "1e999"])
def test_what_is_no_number_of_tokens(typed: str) -> None:
    with pytest.raises(UserError, match="give a number of tokens such as 500K, 10M"):
        number_of(typed)


@pytest.mark.parametrize(
    ("devices", "accelerator", "ranks"),
    [
        ("auto", "cpu", 2),
        ("auto", "gpu", 16),
        (-1, "auto", 16),
        (3, "cpu", 6),
        ("0,3", "gpu", 4),
        ([1, 2, 3], "gpu", 6),
    ],
)
def test_ranks(devices: object, accelerator: str, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert ranks_of(SimpleNamespace(devices=devices, accelerator=accelerator, num_nodes=2)) == ranks
    monkeypatch.setenv("WORLD_SIZE", "24")
    assert ranks_of(SimpleNamespace(devices=devices, accelerator=accelerator, num_nodes=2)) == 24


def test_tokens_are_those_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    trainer = SimpleNamespace(devices=2, accelerator="cpu", num_nodes=1, accumulate_grad_batches=2)
    settings = SimpleNamespace(data=SimpleNamespace(batch_size=2, seq_length=32), trainer=trainer)
    assert steps_of("1024", settings) == 4


def test_a_run_of_so_many_tokens(model_folder, text_file, tmp_path: Path, capsys, eager: None) -> None:
    """128 tokens a step; typed beside a config with a number of steps, and beside the number itself."""
    words = [word for word in fit_flags(model_folder, text_file, tmp_path) if "max_steps" not in word]
    config = tmp_path / "steps.yaml"
    config.write_text("trainer: {max_steps: 50}\n")
    cli = main([*words, f"--config={config}", "--tokens=0.26K"])
    assert cli.trainer.global_step == cli.config.fit.trainer.max_steps == 2
    assert cli.config.fit.tokens is None  # a saved config has the steps
    config.write_text("tokens: 256\n")
    assert main([*words, f"--config={config}", "--force"]).trainer.max_steps == 2
    assert "Leave one of them out" in refused([*words, "--tokens=1K", "--trainer.max_steps=2"], capsys)
    with pytest.raises(SystemExit):  # finished with another length
        main([*words, "--tokens=1K", "--ckpt_path=last"])
    assert "trainer.max_steps was 2 and is 8" in capsys.readouterr().err
    one = [word for word in words if "accumulate" not in word]  # as on half as many ranks
    last = f"--ckpt_path={tmp_path / 'checkpoints' / 'last.ckpt'}"
    line = refused([*one, "--tokens=256", "--trainer.accumulate_grad_batches=1", last], capsys)
    assert "Set --trainer.accumulate_grad_batches 2." in line


def test_a_later_config_decides_the_length(model_folder, text_file, tmp_path: Path, capsys, eager: None) -> None:
    words = [word for word in fit_flags(model_folder, text_file, tmp_path) if "max_steps" not in word]
    tokens, steps = tmp_path / "tokens.yaml", tmp_path / "steps.yaml"
    tokens.write_text("tokens: 256\ntrainer: {max_steps: 9}\n")
    steps.write_text("trainer: {max_steps: 1}\n")
    assert main([*words, f"--config={tokens}", f"--config={steps}"]).trainer.max_steps == 1
    assert main([*words, f"--config={steps}", f"--config={tokens}", "--force"]).trainer.max_steps == 2
    steps.write_text("trainer.max_steps: 1\n")  # the same, as the parser takes it
    assert main([*words, f"--config={tokens}", f"--config={steps}", "--force"]).trainer.max_steps == 1
    assert main([*words, f"--config={tokens}", "--trainer.max_steps=3", "--force"]).trainer.max_steps == 3
    (tmp_path / "trainer.yaml").write_text("max_steps: 1\n")  # of the group alone
    steps.write_text("trainer: trainer.yaml\n")
    assert main([*words, f"--config={tokens}", f"--config={steps}", "--force"]).trainer.max_steps == 1
    group = f"--trainer={tmp_path / 'trainer.yaml'}"
    assert main([*words, f"--config={tokens}", group, "--force"]).trainer.max_steps == 1
    assert main([*words, group, f"--config={tokens}", "--force"]).trainer.max_steps == 2
    assert "Leave one of them out" in refused([*words, f"--config={tokens}", "--trainer.max_steps=3", group], capsys)
    with pytest.raises(UserError, match="both set the length of the run"):
        make_cli(["fit", "--trainer.max_steps=3", f"--config={tokens}", *words[1:]])
