"""A mistake of a user, in a value, a file or a setting, is told in one line with a remedy."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import Run, failing, fit_flags
from hostile_files import Trap
from tiny import byte_tokenizer, tiny_folder

from leap_pl.checkpoints.layout import load_checkpoint, masks_from_checkpoint, tensors_of
from leap_pl.cli.configs import with_recipes
from leap_pl.cli.main import main
from leap_pl.errors import UserError
from leap_pl.inputs.yaml_input import check_yaml
from leap_pl.masks import MaskSet
from leap_pl.oneshot.allocation import read_layer_sparsities

pytestmark = pytest.mark.usefixtures("eager")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("evaluate --limit many --tasks piqa", "leap_pl evaluate: limit: expected int. Got value: many"),
        ("evaluate --seq_length long", "leap_pl evaluate: seq_length: expected int. Got value: long"),
        (
            "evaluate --dtype int8",
            "leap_pl evaluate: dtype: expected Literal['auto', 'float32', 'bfloat16', 'float16']. Got value: int8",
        ),
        (
            "prune --method wanda",
            "leap_pl prune: model, output_dir are not given, and have no default. Add --model VALUE "
            "--output_dir VALUE, or name a config with --config.",
        ),
    ],
)
def test_value_of_another_type(capsys, words: str, says: str) -> None:
    assert failing(capsys, words.split()) == says


@pytest.mark.parametrize("value", ["0", "1", "1.5", "-0.2", "half"])
def test_sparsity_outside_its_range(model_folder, text_file, tmp_path: Path, capsys, value: str) -> None:
    message = failing(capsys, fit_flags(model_folder, text_file, tmp_path, f"--model.sparsity={value}"))
    assert "sparsity" in message


def test_unknown_key(model_folder, text_file, tmp_path: Path, capsys) -> None:
    assert "spars" in failing(capsys, fit_flags(model_folder, text_file, tmp_path, "--model.sparsness=0.5"))
    config = tmp_path / "config.yaml"
    config.write_text("model:\n  base_model: x\n  sparsness: 0.5\n")
    assert "sparsness" in failing(capsys, ["fit", "--config", str(config)])


def test_missing_base_model(text_file, tmp_path: Path, capsys) -> None:
    message = failing(capsys, fit_flags("./no-such-model", text_file, tmp_path))
    assert "./no-such-model" in message
    assert "hub id" in message


def test_missing_text(model_folder, tmp_path: Path, capsys) -> None:
    assert "no-such.jsonl" in failing(capsys, fit_flags(model_folder, "./no-such.jsonl", tmp_path))


def test_text_too_short_for_a_block(model_folder, tmp_path: Path, capsys) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    message = failing(capsys, fit_flags(model_folder, short, tmp_path, "--data.validation_sequences=0"))
    assert "32" in message


def test_sequence_longer_than_the_model(model_folder, text_file, tmp_path: Path, capsys) -> None:
    message = failing(capsys, fit_flags(model_folder, text_file, tmp_path, "--data.seq_length=129"))
    assert "129" in message
    assert "--data.seq_length 128" in message


def test_nothing_to_gate(model_folder, text_file, tmp_path: Path, capsys) -> None:
    message = failing(capsys, fit_flags(model_folder, text_file, tmp_path, "--model.targets=[re:.*q_prj]"))
    assert "re:.*q_prj" in message
    assert "q_proj" in message


def test_steps_not_set(model_folder, text_file, tmp_path: Path, capsys) -> None:
    assert "max_steps" in failing(capsys, fit_flags(model_folder, text_file, tmp_path, "--trainer.max_steps=-1"))


def test_resume_with_another_total(finished: Run, capsys) -> None:
    words = [*finished.flags, "--trainer.max_steps=12", f"--ckpt_path={finished.checkpoint}"]
    message = failing(capsys, words)
    assert "trainer.max_steps was 6 and is 12" in message


def test_resume_on_another_model(finished: Run, text_file, tmp_path: Path, capsys) -> None:
    other = tiny_folder(tmp_path / "other", seed=1)
    words = fit_flags(other, text_file, tmp_path, f"--ckpt_path={finished.checkpoint}")
    assert "fingerprint" in failing(capsys, words)


def test_resume_with_other_targets(finished: Run, model_folder, text_file, tmp_path: Path, capsys) -> None:
    more = ["--model.targets=[re:.*mlp]", f"--ckpt_path={finished.checkpoint}"]
    assert "targets" in failing(capsys, fit_flags(model_folder, text_file, tmp_path, *more))


@pytest.mark.parametrize("kept", [0, 100, 5000, 0.5, 0.99])
def test_truncated_checkpoint(finished: Run, tmp_path: Path, capsys, kept: float) -> None:
    whole = finished.checkpoint.read_bytes()
    torn = tmp_path / "torn.ckpt"
    torn.write_bytes(whole[: int(kept if kept > 1 else kept * len(whole))])
    message = failing(capsys, ["export", f"--ckpt_path={torn}", f"--output_dir={tmp_path / 'out'}"])
    assert "torn.ckpt" in message
    assert not (tmp_path / "out").exists()


def test_pickle_is_not_run(finished: Run, tmp_path: Path, capsys) -> None:
    torch.save({"state_dict": Trap(tmp_path / "ran")}, tmp_path / "trap.ckpt")
    message = failing(capsys, ["export", f"--ckpt_path={tmp_path / 'trap.ckpt'}", f"--output_dir={tmp_path / 'o'}"])
    assert "runs no code" in message
    assert not (tmp_path / "ran").exists()


def test_future_checkpoint(finished: Run, tmp_path: Path, capsys) -> None:
    checkpoint = torch.load(finished.checkpoint, weights_only=True)
    checkpoint["leap_pl"]["format_version"] = 99
    torch.save(checkpoint, tmp_path / "future.ckpt")
    message = failing(capsys, ["export", f"--ckpt_path={tmp_path / 'future.ckpt'}", f"--output_dir={tmp_path / 'o'}"])
    assert "99" in message
    assert "pip install --upgrade" in message


def test_not_a_number_stops_the_run(model_folder, text_file, tmp_path: Path, capsys, monkeypatch) -> None:
    """The loss breaks in the third step: the message says so, and the checkpoint before it is whole."""
    import leap_pl.losses.budget

    norms = []

    def breaking(*arguments):
        norms.append(real(*arguments))
        return norms[-1] * (float("nan") if len(norms) > 4 else 1)

    real = leap_pl.losses.budget.kept_norm
    monkeypatch.setattr(leap_pl.losses.budget, "kept_norm", breaking)
    message = failing(capsys, fit_flags(model_folder, text_file, tmp_path))
    assert "step 2:" in message
    assert "kept_norm = nan" in message
    kept = sorted(path.name for path in (tmp_path / "checkpoints").glob("*.ckpt"))
    assert kept == ["last.ckpt", "step=2.ckpt"]
    assert masks_from_checkpoint(tmp_path / "checkpoints" / "last.ckpt").total


def test_broken_logits_are_not_saved(model_folder, text_file, tmp_path: Path, capsys, monkeypatch) -> None:
    from leap_pl.inputs.ranges import FINITE, RANGES

    monkeypatch.setitem(RANGES, "model.optimizer.lr", FINITE)  # a rate that breaks them is refused otherwise
    more = ["--model.optimizer=SGD", "--model.optimizer.lr=1e39", "--trainer.gradient_clip_val=null"]
    message = failing(capsys, fit_flags(model_folder, text_file, tmp_path, *more))
    assert "infinite or NaN" in message
    assert not list((tmp_path / "checkpoints").glob("*.ckpt"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model.annealing.tau.end=0"], "temperature is above 0"),
        (["--annealing.tau.end=-1"], "temperature is above 0"),
        (
            ["--model.annealing.alpha.start=-25"],
            "model.annealing.alpha goes from -25 to 350. Give a number from 0",
        ),
        (["--model.annealing.pattern_alpha.end=-1"], "model.annealing.pattern_alpha goes from 100 to -1"),
        (["--model.annealing.alpha.start=.inf"], "finite"),
        (["--model.objective.lm=0"], "nothing to learn from"),
        (["--model.objective.budget=-1"], "budget"),
        (["--model.annealing.alpha.curve=exponential", "--model.annealing.alpha.start=0"], "above 0"),
        (["--model.prior.method=magic"], "magic"),
        (["--model.prior.fisher=2"], "prior.fisher is 2; give a number above 0 and at most 1"),
        (["--model.prior.fisher=0.5", "--model.prior.method=none"], "prior.method is none. Leave one of them out"),
        (
            ["--model.prior.fisher=0.5", "--model.prior.mask=m.safetensors"],
            "prior.mask is given. Leave one of them out, that of a config by --model.prior.fisher null",
        ),
        (["--model.prior.fisher=0.5", "--model.gate=NMGate"], "a mask of 2:4 is equally sparse everywhere"),
        (["--data.seq_length=0"], "seq_length"),
    ],
)
def test_settings_that_make_no_sense(model_folder, text_file, tmp_path: Path, capsys, flags, words: str) -> None:
    assert words in failing(capsys, fit_flags(model_folder, text_file, tmp_path, *flags))


def test_tokenizer_without_end_token(model_folder, text_file, tmp_path: Path, capsys) -> None:
    folder = tiny_folder(tmp_path / "model")
    byte_tokenizer(end_token=False).save_pretrained(folder)
    assert "end token" in failing(capsys, fit_flags(folder, text_file, tmp_path / "run"))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("export --output-dir x", "there is no option --output-dir. Did you mean --output_dir?"),
        ("export x", "'x' does not belong to an option"),
        ("evaluate --tasks piqa arc_easy", "a list is typed as one: a,b"),
        ("fit --base_model x", "Did you mean --model.base_model?"),
        ("fit", "model.base_model is not given"),
        ("fit --model ./mine", "--model is a group of settings here. For the base model: --model.base_model ./mine"),
        (
            "fit --model.base_model x --model.prior null",
            "model.prior: null is not a file of settings. Give the path of one, or",
        ),
        ("fit --model.base_model x --model.gate NoGate", "model.gate: there is no class NoGate of this kind"),
        (
            "fit --model.base_model x --model.sparsity 50",
            "model.sparsity is 50; give a number above 0 and below 1. For 50%, give 0.5.",
        ),
    ],
)
def test_what_is_mistyped_is_told_with_what_is_meant(capsys, words: str, says: str) -> None:
    assert says in failing(capsys, words.split())


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ("model: {base_model: x, prior: }", "model.prior is null, but it is a group of settings. Leave it out, or set"),
        (
            "model: {base_model: x, annealing: {alpha: }}",
            "model.annealing.alpha.start, model.annealing.alpha.end are not given",
        ),
        (
            "model: {base_model: x}\nannealing: {alpha: }",
            "model.annealing.alpha.start, model.annealing.alpha.end are not given",
        ),
        ("model:", "model.base_model is not given"),
    ],
)
def test_a_key_of_a_config_with_nothing_after_it(config: str, says: str, tmp_path: Path, capsys) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"{config}\ntrainer: {{logger: null}}\n", encoding="utf-8")
    assert says in failing(capsys, ["fit", "--config", str(path)])


@pytest.mark.parametrize("verb", ["export", "fit"])
def test_a_config_that_holds_no_settings(verb: str, tmp_path: Path, capsys) -> None:
    config = tmp_path / "config.yaml"
    for content, says in (
        (b"a: [", "is not valid YAML"),
        (b"\xd0\xff", "is not valid YAML"),
        (b"- a\n- b", "has no settings"),
    ):
        config.write_bytes(content)
        for words in ([f"--config={config}"], ["--config", str(config)]):
            message = failing(capsys, [verb, *words])
            assert says in message
            assert str(config) in message


def test_one_kind_of_file_for_another(finished: Run, tmp_path: Path, capsys) -> None:
    out, checkpoints = f"--output_dir={tmp_path / 'out'}", finished.checkpoint.parent
    elsewhere = MaskSet.load(finished.mask).with_provenance(base_model="./away/model").save(tmp_path / "m.safetensors")
    for words, says in (
        ([f"--mask={tmp_path}"], "is a folder without a mask.safetensors. Name a MaskSet file, or a folder that has"),
        ([f"--mask={finished.checkpoint}"], "Use --ckpt_path"),
        (["--mask=~nobody-of-this-name/mask.safetensors"], "there is no such MaskSet file"),
        (["--ckpt_path=~nobody-of-this-name/last.ckpt"], "there is no such checkpoint"),
        ([f"--ckpt_path={checkpoints}"], "last.ckpt"),
        ([f"--ckpt_path={finished.mask}"], "Give a mask with --mask"),
        ([f"--mask={finished.mask}", f"--model={finished.mask}"], "is a file"),
        (["--mask="], "--mask is empty"),
        (
            [f"--mask={elsewhere}"],
            "the base model is recorded as ./away/model, which is not there from this folder. Give its place with",
        ),
    ):
        assert says in failing(capsys, ["export", out, *words])
    assert not (tmp_path / "out").exists()


def test_a_folder_with_a_mask_or_with_a_model_in_it_for_a_model(
    finished: Run, model_folder, text_file, tmp_path: Path, capsys
) -> None:
    """A folder of prune or of a run: the message ends with what is typed instead, which is taken."""
    words = ["prune", f"--model={model_folder}", f"--text={text_file}", "--seq_length=32", "--sequences=2"]
    for method in ("magnitude", "sparsegpt"):
        main([*words, f"--method={method}", f"--output_dir={tmp_path / method}"])
    measured = ["evaluate", f"--perplexity={text_file}", "--seq_length=32", "--max_tokens=64"]
    given = tmp_path / "sparsegpt"
    assert failing(capsys, [*measured, f"--model={given}/"]).endswith(f"Give {given / 'model'}.")
    main([*measured, f"--model={given / 'model'}"])
    for folder in (tmp_path / "magnitude", finished.folder, finished.folder / "checkpoints"):
        end = (
            f"It has a mask, which evaluate and export take: --mask {folder}. leap_pl export --mask {folder} "
            "--output_dir FOLDER makes a model of it."
        )
        assert failing(capsys, [*measured, f"--model={folder}"]).endswith(end)
        assert failing(capsys, fit_flags(folder, text_file, tmp_path / "run")).endswith(end)
        main([*measured, f"--mask={folder}"])
    (tmp_path / "empty").mkdir()
    message = failing(capsys, [*measured, f"--model={tmp_path / 'empty'}"])
    assert message.endswith("Give a Hugging Face model folder, a .gguf file or a hub id.")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--trainer.accumulate_grad_batches=0", "give 1 or more"),
        ("--trainer.devices=1000", "processes"),  # no process of which is started
        ("--trainer.enable_checkpointing=false", "set --checkpoint.save_top_k 0 --checkpoint.save_last false"),
        ("--data.seq_length=1", "data.seq_length is 1; give 2 or more"),
        (
            "--trainer.check_val_every_n_epoch=1 --trainer.val_check_interval=99999",
            "trainer.val_check_interval is 99,999, and the run has 12 micro-batches. Lower it, or leave it and trainer",
        ),
        ("--model.optimizer.lr=-1", "model.optimizer.lr is -1; give a number from 0 to 10"),
        ("--trainer.max_steps=0", "trainer.max_steps is 0"),
    ],
)
def test_settings_that_would_learn_nothing(
    model_folder, text_file, tmp_path: Path, capsys, monkeypatch, flags: str, says: str
) -> None:
    def popen(*args: object, **options: object) -> None:
        raise AssertionError("a process is started")  # a thousand of them would bring the machine down

    monkeypatch.setattr(subprocess, "Popen", popen)
    monkeypatch.setattr("torch.multiprocessing.start_processes", popen)
    assert says in failing(capsys, fit_flags(model_folder, text_file, tmp_path, *flags.split()))


def test_a_base_model_that_is_recorded_in_the_home_folder(
    finished: Run, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(model_folder.parent))
    masks = MaskSet.load(finished.mask).with_provenance(base_model=f"~/{model_folder.name}")
    file = masks.save(tmp_path / "m.safetensors")
    main(["export", f"--mask={file}", f"--output_dir={tmp_path / 'out'}"])
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_every_option_may_begin_with_the_home_folder(finished: Run, tmp_path: Path, monkeypatch, capsys) -> None:
    """A shell leaves ~ in --option=~/x, and a config has it as it was typed."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "empty").mkdir()
    line = failing(capsys, ["consolidate", "--ckpt_path=~/empty", f"--output={tmp_path / 'one.ckpt'}"])
    assert f"{tmp_path / 'empty'}: there is no such checkpoint" in line  # and not that it is no folder
    (tmp_path / "shares.json").write_text("[0.5]")
    assert read_layer_sparsities("~/shares.json") == [0.5]
    shutil.copy(finished.checkpoint, tmp_path / "a.ckpt")
    assert tensors_of(load_checkpoint("~/a.ckpt"), "~/a.ckpt")[0]


def test_a_key_that_stands_twice(tmp_path: Path, capsys) -> None:
    """YAML takes the last, and the first group would be lost without a word."""
    config = tmp_path / "c.yaml"
    config.write_text("model: {base_model: x}\ntrainer: {max_steps: 5}\ntrainer: {devices: 1}\n")
    assert "has the key trainer twice" in failing(capsys, ["fit", f"--config={config}"])
    config.write_text("a: &a {b: 1, c: [b, b]}\nd:\n  <<: *a\n  b: 2\ne: {b: 1}\n")
    check_yaml(config.read_text())
    check_yaml("[{a: 1}, {a: 2}]")
    with pytest.raises(UserError, match="the key a twice"):
        check_yaml("{a: 1, b: {a: 1}, a: 2}")


def test_a_folder_does_not_hide_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short").mkdir()
    assert with_recipes(["fit", "--config", "short"])[-1].endswith("recipes/short.yaml")


def test_what_a_schedule_lacks(capsys) -> None:
    message = failing(capsys, ["fit", "--model.base_model=x", "--model.lr_scheduler=StepLR"])
    assert "StepLR needs step_size" in message
    assert "--model.lr_scheduler StepLR --model.lr_scheduler.step_size VALUE" in message
    assert "Namespace" not in message
