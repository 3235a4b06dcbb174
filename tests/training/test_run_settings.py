"""A resumed run has the settings of its checkpoint: each of them is in the table, taken, and compared."""

import inspect
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from conftest import fit_flags, refused
from older_checkpoints import write_as_older
from stopped_runs import differences

from leap_pl import LeapModule, TextDataModule
from leap_pl.checkpoints.layout import load_checkpoint
from leap_pl.checkpoints.settings import DATA, MODEL, RULES, TRAINER
from leap_pl.cli.main import main
from leap_pl.training.run_settings import CLASSES, TYPES

pytestmark = pytest.mark.usefixtures("eager")

# Away from every default, so that a setting that a resumed run does not take shows.
RECIPE = [
    "--model.sparsity=0.6",
    "--model.gate.strength=2.5",
    "--model.ignore=[re:.*down_proj]",
    "--model.objective.distillation=0.5",
    "--model.objective.chunk=16",
    "--model.optimizer=AdamW",
    "--model.optimizer.lr=2e-3",
    "--model.optimizer.betas=[0.8, 0.9]",
    "--model.optimizer.weight_decay=0.01",
    "--model.lr_scheduler=StepLR",
    "--model.lr_scheduler.step_size=2",
    "--model.lr_scheduler.gamma=0.7",
    "--model.warmup_steps=2",
    "--model.seed=3",
    "--data.seed=5",
    "--trainer.gradient_clip_val=0.02",
    "--trainer.gradient_clip_algorithm=value",
    "--trainer.precision=32-true",
]

# Places and devices: all that a resumed run still has to be told.
PLACES = ("--trainer.accelerator", "--trainer.logger", "--checkpoint.", "--sparsity_log.")


@pytest.fixture(scope="module")
def whole(model_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of six steps, with its checkpoint of step 2."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEAP_PL_COMPILE", "0")
        main(fit_flags(model_folder, text_file, folder, *RECIPE))
    return folder


def places(folder: Path) -> list[str]:
    words = fit_flags("none", "none", folder)
    return [word for word in words[1:] if word.startswith(PLACES)]


def learned(folder: Path) -> dict[str, Any]:
    checkpoint = load_checkpoint(folder / "checkpoints" / "step=6.ckpt")
    return {key: checkpoint[key] for key in ("state_dict", "optimizer_states", "lr_schedulers")}


def same_end(folder: Path, whole: Path) -> None:
    assert list(differences(learned(folder), learned(whole))) == []


def resume(whole: Path, folder: Path, *more: str) -> list[str]:
    return ["fit", *places(folder), f"--ckpt_path={whole / 'checkpoints' / 'step=2.ckpt'}", *more]


# -- the table ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("owner", "table"), [(LeapModule, MODEL), (TextDataModule, DATA), (L.Trainer, TRAINER)])
def test_every_setting_is_in_the_table(owner: type, table: dict[str, str]) -> None:
    settings = set(inspect.signature(owner.__init__).parameters) - {"self"}
    assert settings - table.keys() == set()  # a new setting: say in leap_pl/checkpoints/settings.py what a resume does
    assert table.keys() - settings == set()


def test_what_a_checkpoint_holds_has_a_type() -> None:
    held = {name for name, rule in RULES.items() if rule != "free"}
    assert held == TYPES.keys() | CLASSES.keys()
    assert not TYPES.keys() & CLASSES.keys()


def test_a_checkpoint_holds_every_setting_that_is_not_free(whole: Path) -> None:
    stored = load_checkpoint(whole / "checkpoints" / "step=2.ckpt")
    assert set(stored["leap_pl"]["learned_with"]) == {name for name, rule in RULES.items() if rule != "free"}
    assert "hyper_parameters" not in stored


def test_remote_code_is_never_turned_on_by_a_checkpoint() -> None:
    assert RULES["model.trust_remote_code"] == "free"


# -- dropped ------------------------------------------------------------------------------------------------


def test_a_run_resumes_from_its_checkpoint_alone(whole: Path, tmp_path: Path) -> None:
    """Nothing is typed but places: model, text, gate, losses, optimizer, schedule and clipping are the checkpoint's."""
    main(resume(whole, tmp_path))
    same_end(tmp_path, whole)


@pytest.mark.parametrize("spelling", ["one word", "two words", "config", "twice", "config and flag"])
def test_every_spelling_of_the_checkpoint(whole: Path, tmp_path: Path, spelling: str) -> None:
    path, config = whole / "checkpoints" / "step=2.ckpt", tmp_path / "resume.yaml"
    config.write_text(f"ckpt_path: {path}\n")
    other = tmp_path / "other.ckpt"
    words = {
        "one word": [f"--ckpt_path={path}"],
        "two words": ["--ckpt_path", str(path)],
        "config": [f"--config={config}"],
        "twice": [f"--ckpt_path={other}", "--ckpt_path", str(path)],
        "config and flag": [f"--ckpt_path={other}", "--config", str(config)],
    }
    main(["fit", *places(tmp_path / "run"), *words[spelling]])
    same_end(tmp_path / "run", whole)


def test_options_are_not_abbreviated(whole: Path, tmp_path: Path, capsys) -> None:
    path = whole / "checkpoints" / "step=2.ckpt"
    assert "Did you mean --ckpt_path?" in refused(["fit", *places(tmp_path), f"--ckpt={path}"], capsys)


# -- changed ------------------------------------------------------------------------------------------------

# Setting → words that change it, for all that are part of what is learned.
CHANGED: dict[str, list[str]] = {
    "model.sparsity": ["--model.sparsity=0.5"],
    "model.gate": ["--model.gate=NMGate", "--model.gate.n=2", "--model.gate.m=5", "--model.prior.method=magnitude"],
    "model.gate.strength": ["--model.gate.strength=3"],
    "model.targets": ["--model.targets=[Linear]"],
    "model.ignore": ["--model.ignore=[]"],
    "model.objective.lm": ["--model.objective.lm=0.9"],
    "model.objective.chunk": ["--model.objective.chunk=512"],
    "model.annealing.alpha": ["--model.annealing.alpha.start=30"],
    "model.annealing.tau": ["--model.annealing.tau.end=0.1"],
    "model.prior.method": ["--model.prior.method=wanda"],
    "model.prior.graded": ["--model.prior.graded=true"],
    "model.optimizer": ["--model.optimizer=SGD"],
    "model.optimizer.lr": ["--model.optimizer.lr=1e-3"],
    "model.optimizer.betas": ["--model.optimizer.betas=[0.9, 0.95]"],
    "model.optimizer.weight_decay": ["--model.optimizer.weight_decay=0.02"],
    "model.lr_scheduler": ["--model.lr_scheduler=ExponentialLR", "--model.lr_scheduler.gamma=0.7"],
    "model.lr_scheduler.gamma": ["--model.lr_scheduler.gamma=0.9"],
    "model.lr_scheduler, dropped": ["--model.lr_scheduler=null"],
    "model.warmup_steps": ["--model.warmup_steps=5"],
    "model.dtype": ["--model.dtype=bfloat16"],
    "model.logits_dtype": ["--model.logits_dtype=bfloat16"],
    "model.seed": ["--model.seed=0"],
    "model.train_weights": ["--model.train_weights=kept"],
    "model.weight_training.lr": ["--model.weight_training.lr=1e-3"],
    "model.weights": ["--model.weights=pruned/model"],
    "data.config_name": ["--data.config_name=en"],
    "data.split": ["--data.split=test"],
    "data.text_column": ["--data.text_column=content"],
    "data.seq_length": ["--data.seq_length=16"],
    "data.batch_size": ["--data.batch_size=1"],
    "data.separator": ["--data.separator=blank_line"],
    "data.seed": ["--data.seed=0"],
    "trainer.max_steps": ["--trainer.max_steps=8"],
    "trainer.gradient_clip_val": ["--trainer.gradient_clip_val=1.0"],
    "trainer.gradient_clip_val, dropped": ["--trainer.gradient_clip_val=null"],
    "trainer.gradient_clip_algorithm": ["--trainer.gradient_clip_algorithm=norm"],
    "trainer.precision": ["--trainer.precision=bf16-mixed"],
}


def test_every_fixed_setting_is_changed_here() -> None:
    changed = {".".join(name.partition(",")[0].split(".")[:2]) for name in CHANGED}
    fixed = {name for name, rule in RULES.items() if rule == "fixed"}
    assert fixed - changed == {"trainer.accumulate_grad_batches"}  # with the number of ranks: see below


@pytest.mark.parametrize("name", CHANGED)
def test_a_changed_setting_is_refused_with_both_values(whole: Path, tmp_path: Path, capsys, name: str) -> None:
    line = refused(resume(whole, tmp_path, *CHANGED[name]), capsys)
    assert name.partition(",")[0] in line
    assert " was " in line or "bfloat16 logits" in line or name == "model.gate"
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_changed_accumulation_is_refused(whole: Path, tmp_path: Path, capsys) -> None:
    line = refused(resume(whole, tmp_path, "--trainer.accumulate_grad_batches=3"), capsys)
    assert "Set --trainer.accumulate_grad_batches 2" in line


def test_a_setting_changed_in_a_config_is_refused(whole: Path, tmp_path: Path, capsys) -> None:
    """A config of another run: everything in it that differs is said at once."""
    config = tmp_path / "other.yaml"
    told = {"model": {"sparsity": 0.5, "seed": 3}, "trainer": {"gradient_clip_val": 1.0}, "data": {"seq_length": 32}}
    config.write_text(yaml.safe_dump(told))
    line = refused(resume(whole, tmp_path, f"--config={config}"), capsys)
    assert "model.sparsity was 0.6 and is 0.5; trainer.gradient_clip_val was 0.02 and is 1.0." in line


@pytest.mark.parametrize(
    "words",
    [
        [*RECIPE[:-1], "--model.objective.lm=1", "--trainer.max_steps=6"],
        ["--model.activation_checkpointing=true"],
        ["--model.dtype=auto"],
        ["--data.num_workers=2", "--data.bos=none"],  # the tokenizer puts nothing before a text
        ["--data.validation_sequences=2"],
        ["--trainer.val_check_interval=4"],
        ["--trainer.log_every_n_steps=1", "--trainer.num_sanity_val_steps=0"],
    ],
)
def test_what_is_the_same_or_free_ends_bit_identical(whole: Path, tmp_path: Path, words: list[str]) -> None:
    main(resume(whole, tmp_path, *words))
    same_end(tmp_path, whole)


# -- from Python --------------------------------------------------------------------------------------------


def trainer(folder: Path, **more: Any) -> L.Trainer:
    return L.Trainer(
        max_steps=6,
        accumulate_grad_batches=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **more,
    )


def test_python_is_refused_what_the_command_line_is(finished: Any, model_folder, text_file, tmp_path: Path) -> None:
    module = LeapModule(str(model_folder), sparsity=0.6, dtype="float32")
    data = TextDataModule(str(model_folder), str(text_file), seq_length=32, batch_size=2, validation_sequences=4)
    with pytest.raises(ValueError, match=r"model.sparsity was 0.5 and is 0.6; model.prior.method was 'magnitude' and"):
        trainer(tmp_path).fit(module, data, ckpt_path=str(finished.folder / "checkpoints" / "step=4.ckpt"))


def test_a_module_is_loaded_from_its_checkpoint(whole: Path) -> None:
    module = LeapModule.load_from_checkpoint(whole / "checkpoints" / "step=6.ckpt")
    assert (module.sparsity, module.objective.distillation, module.warmup_steps) == (0.6, 0.5, 2)
    stored = load_checkpoint(whole / "checkpoints" / "step=6.ckpt")["state_dict"]
    assert len(module.gates) == len(stored)
    for name, gate in module.gates.items():
        assert torch.equal(gate.logits, stored[f"logits.{name}"])
    optimizer = module.make_optimizer([torch.nn.Parameter(torch.zeros(1))])
    assert (optimizer.defaults["lr"], optimizer.defaults["betas"]) == (2e-3, (0.8, 0.9))
    assert LeapModule.load_from_checkpoint(whole / "checkpoints" / "step=6.ckpt", warmup_steps=3).warmup_steps == 3


# -- an optimizer and a schedule that a checkpoint cannot describe --------------------------------------------


def test_a_schedule_that_has_to_be_typed_again(model_folder, text_file, tmp_path: Path, capsys) -> None:
    typed = ["--model.lr_scheduler=CyclicLR", "--model.lr_scheduler.base_lr=1e-4", "--model.lr_scheduler.max_lr=1e-3"]
    typed += ["--model.lr_scheduler.mode=triangular2", "--model.lr_scheduler.cycle_momentum=false"]
    main(fit_flags(model_folder, text_file, tmp_path / "whole", *typed))
    main(resume(tmp_path / "whole", tmp_path / "again", *typed))
    same_end(tmp_path / "again", tmp_path / "whole")
    checkpoint = torch.load(tmp_path / "whole" / "checkpoints" / "step=2.ckpt", weights_only=True)
    checkpoint["leap_pl"]["learned_with"]["model.lr_scheduler"]["class_path"] = "mine.Schedule"
    (tmp_path / "mine" / "checkpoints").mkdir(parents=True)
    torch.save(checkpoint, tmp_path / "mine" / "checkpoints" / "step=2.ckpt")
    line = refused(resume(tmp_path / "mine", tmp_path / "third"), capsys)
    assert "'mine.Schedule'" in line
    assert "type --model.lr_scheduler with its settings" in line


# -- checkpoints of versions that stored fewer settings -------------------------------------------------------


def test_an_older_checkpoint_resumes_and_is_compared(whole: Path, tmp_path: Path, capsys) -> None:
    write_as_older(whole / "checkpoints" / "step=2.ckpt", tmp_path / "older" / "checkpoints" / "step=2.ckpt")
    recipe = [word for word in RECIPE if word.startswith(("--model.lr_sch", "--trainer.grad", "--trainer.prec"))]
    main(resume(tmp_path / "older", tmp_path / "again", *recipe))
    same_end(tmp_path / "again", whole)
    resumed = load_checkpoint(tmp_path / "again" / "checkpoints" / "step=6.ckpt")["leap_pl"]["learned_with"]
    assert resumed["data.bos"] == "first"  # of a version whose blocks had no prefix
    for words, says in {
        "--model.optimizer.lr=1e-3": "model.optimizer.lr was 0.002 and is 0.001",
        "--model.objective.lm=0.5": "model.objective.lm was 1.0 and is 0.5",
        "--model.lr_scheduler.gamma=0.9": "model.lr_scheduler.gamma was 0.7 and is 0.9",
        "--trainer.max_steps=7": "trainer.max_steps was 6 and is 7",
    }.items():
        assert says in refused(resume(tmp_path / "older", tmp_path / "no", *recipe, words), capsys)
    line = refused(resume(tmp_path / "older", tmp_path / "no", *recipe[-3:]), capsys)
    assert "did not store its class" in line


def test_a_newer_checkpoint_with_a_setting_that_is_not_known(whole: Path, tmp_path: Path, capsys) -> None:
    checkpoint = torch.load(whole / "checkpoints" / "step=2.ckpt", weights_only=True)
    checkpoint["leap_pl"]["learned_with"]["model.flavour"] = "sweet"
    (tmp_path / "newer" / "checkpoints").mkdir(parents=True)
    torch.save(checkpoint, tmp_path / "newer" / "checkpoints" / "step=2.ckpt")
    assert "model.flavour" in refused(resume(tmp_path / "newer", tmp_path / "run"), capsys)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.sparsity", "0.5"),
        ("model.sparsity", [0.5]),
        ("model.targets", [1]),
        ("model.objective", {"lm": 1.0, "unknown": 2}),
        ("model.objective", {"lm": {"class_path": "os.system"}}),
        ("model.prior", "wanda"),
        ("model.dtype", "float64"),
        ("model.optimizer", "AdamW"),
        ("model.optimizer", {"class_path": "AdamW", "init_args": {"lr": "1e-3"}}),
        ("model.optimizer", {"class_path": "AdamW", "init_args": {"closure": 1}}),
        ("data.text", {"path": "x"}),
        ("trainer.max_steps", 6.5),
        ("trainer.precision", 32),
    ],
)
def test_a_setting_of_another_type_is_told(whole: Path, tmp_path: Path, capsys, name: str, value: Any) -> None:
    checkpoint = torch.load(whole / "checkpoints" / "step=2.ckpt", weights_only=True)
    checkpoint["leap_pl"]["learned_with"][name] = value
    (tmp_path / "odd" / "checkpoints").mkdir(parents=True)
    torch.save(checkpoint, tmp_path / "odd" / "checkpoints" / "step=2.ckpt")
    line = refused(resume(tmp_path / "odd", tmp_path / "run"), capsys)
    assert "step=2.ckpt: " in line
    assert name in line
