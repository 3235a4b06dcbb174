"""Every config that is shipped parses, and makes the objects it names."""

import re
import subprocess
from pathlib import Path

import pytest
import torch
import torch.distributed.run
import yaml
from jsonargparse import Namespace, strip_meta
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn

from leap_pl.base_model.weights import Weight
from leap_pl.callbacks.validation_times import ValidationTimes
from leap_pl.cli.configs import RECIPES, with_recipes
from leap_pl.cli.fit import LeapCLI, make_cli
from leap_pl.cli.main import main
from leap_pl.data import TextDataModule
from leap_pl.distributed.strategy import saves_shards
from leap_pl.gates import Gate, GateState, NMGate, TileGate
from leap_pl.masks.patterns import NM, Tiled
from leap_pl.training.module import LeapModule
from leap_pl.training.optimizers import PackedAdamW
from leap_pl.training.schedules import Annealing, Schedule

ROOT = Path(__file__).parents[2] / "configs"
EXPERIMENTS = {"headline", "in_full"}  # no configs of fit
CONFIGS = sorted(path for path in ROOT.rglob("*.yaml") if path.parent.name != "shared" and path.stem not in EXPERIMENTS)


def instantiate(path: Path | str, tmp_path: Path, *more: str) -> LeapCLI:
    """The command line up to, and without, the run."""
    flags = [f"--trainer.default_root_dir={tmp_path}", "--trainer.logger=false", "--trainer.accelerator=cpu"]
    return make_cli(["--config", str(path), *flags, *more], run=False)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_makes_its_objects(path: Path, tmp_path: Path) -> None:
    cli = instantiate(path, tmp_path)
    assert isinstance(cli.model, LeapModule)
    assert isinstance(cli.datamodule, TextDataModule)
    assert cli.datamodule.tokenizer_name == cli.model.base_model
    told = yaml.safe_load(path.read_text())
    assert "annealing" in told["model"]
    assert "annealing" not in told


ROWS = [path for path in CONFIGS if path.parent.name == "paper"]


def rows(method: str) -> list[Path]:
    """The rows of one method's table; those of LEAP are named by their models alone."""
    return [path for path in ROWS if {"maskllm", "patch"} & {path.stem.split("-")[0]} == {method} - {"leap"}]


def row(path: Path, tmp_path: Path, sparsity: float) -> tuple[LeapCLI, Annealing]:
    """A row's command line, with what all of them share looked at."""
    told = yaml.safe_load(path.read_text())["model"]["sparsity"]
    cli = instantiate(path, tmp_path, *([] if told == sparsity else [f"--model.sparsity={sparsity}"]))
    model, data, trainer = cli.model, cli.datamodule, cli.trainer
    assert model.sparsity == sparsity
    assert trainer.max_steps * trainer.accumulate_grad_batches * data.batch_size * data.seq_length == 2000 * 256 * 4096
    assert data.text == "allenai/c4"
    assert trainer.gradient_clip_val == 1
    annealing = model.annealing
    assert annealing.tau == Schedule(4, 0.05, "linear")
    return cli, annealing


def a_gate(cli: LeapCLI) -> Gate:
    module = nn.Module()
    module.weight = nn.Parameter(torch.zeros(256, 256))
    return cli.model.make_gate(Weight("w", module, "weight", 0, "w", 1), GateState())


def test_every_row_is_of_one_method() -> None:
    counts = {method: len(rows(method)) for method in ("leap", "maskllm", "patch")}
    assert counts == {"leap": 5, "maskllm": 3, "patch": 3}


@pytest.mark.parametrize("path", rows("maskllm"), ids=lambda path: path.stem)
def test_rows_of_maskllm_have_its_settings(path: Path, tmp_path: Path) -> None:
    cli, annealing = row(path, tmp_path, 0.5)
    assert annealing.alpha == Schedule(100, 500, "linear")
    gate = a_gate(cli)
    assert isinstance(gate, NMGate)
    assert gate.settings() == {"n": 2, "m": 4, "spread": 0.01, "strength": 3.0}
    assert cli.model.run_prior.settings.method == "sparsegpt"
    assert cli.model.objective.budget == 0
    optimizer = cli.model.make_optimizer([gate.logits])
    settings = optimizer.defaults
    assert (settings["lr"], settings["betas"], settings["weight_decay"]) == (5e-4, (0.9, 0.95), 0.1)
    scheduler = cli.model.make_scheduler(optimizer)
    assert (scheduler.T_max, scheduler.eta_min) == (cli.trainer.max_steps, 5e-5)


@pytest.mark.parametrize("sparsity", [0.25, 0.35, 0.45])
@pytest.mark.parametrize("path", rows("patch"), ids=lambda path: path.stem)
def test_rows_of_patch_have_its_settings(path: Path, sparsity: float, tmp_path: Path) -> None:
    cli, annealing = row(path, tmp_path, sparsity)
    assert annealing.alpha == Schedule(25, 350, "linear")
    assert annealing.pattern_alpha == Schedule(100, 500, "linear")
    gate = a_gate(cli)
    assert isinstance(gate, TileGate)
    assert (gate.mode, gate.tiled, gate.strength) == ("joint", Tiled(NM(2, 4), 128), 3)
    objective = cli.model.objective
    assert (objective.budget, objective.weight) == (7, 10)
    assert cli.config.model.optimizer.init_args.lr == 1e-3


@pytest.mark.parametrize("sparsity", [0.5, 0.6])
@pytest.mark.parametrize("path", rows("leap"), ids=lambda path: path.stem)
def test_rows_of_the_paper_have_its_settings(path: Path, sparsity: float, tmp_path: Path) -> None:
    cli, annealing = row(path, tmp_path, sparsity)
    model = cli.model
    objective = model.objective
    assert (objective.lm, objective.distillation, objective.budget, objective.weight) == (1, 0, 7, 10)
    assert (model.run_prior.settings.method, model.run_prior.settings.sequences, model.warmup_steps) == (
        "wanda",
        128,
        5,
    )
    assert annealing.alpha == Schedule(25, 350, "linear")
    settings = cli.config.model.optimizer.init_args
    assert (settings.lr, tuple(settings.betas), settings.weight_decay) == (1e-3, (0.9, 0.95), 0)


def test_every_config_is_in_the_table() -> None:
    table = (ROOT / "README.md").read_text()
    for path in RECIPES.glob("*.yaml"):
        assert f"`{path.stem}`" in table
    for path in CONFIGS:
        models = "(qwen2.5-0.5b|gemma-3-1b|llama-3.2-1b)"
        name = re.sub(f"^(maskllm|patch)-{models}", r"\1-{qwen2.5-0.5b,gemma-3-1b,llama-3.2-1b}", path.stem)
        assert f"{name}.yaml" in table
        assert yaml.safe_load(path.read_text())["model"]["base_model"].split("/")[-1] in table


def settings(path: Path | str, tmp_path: Path) -> Namespace:
    """What a config comes to, whichever files its parts are in."""
    return strip_meta(instantiate(path, tmp_path, "--model.base_model=Qwen/Qwen2.5-0.5B").config)


def test_the_recipe_of_a_short_run_is_what_was_measured(tmp_path: Path) -> None:
    """As `leap-both` of the headline experiment, whose prior is a row of its own there; the text is the reader's."""
    ours, measured = (settings(name, tmp_path) for name in ("short", ROOT / "results" / "learn.yaml"))
    rows = yaml.safe_load((ROOT / "results" / "headline.yaml").read_text())["rows"]
    assert rows["leap-both"]["prior"] == "wanda-fisher"
    prior, one_shot = ours.model.prior, rows["wanda-fisher"]["prune"]
    assert (prior.method, prior.fisher) == (one_shot["method"], one_shot["fisher"])
    assert (prior.graded, prior.sequences) == (measured.model.prior.graded, measured.model.prior.sequences)
    losses = rows["leap-both"]["fit"]["model"]["objective"]
    assert {name: ours.model.objective[name] for name in losses} == losses
    assert ours.model.objective.weight == measured.model.objective.weight
    for name in ("annealing", "gate", "optimizer", "warmup_steps"):
        assert ours.model[name] == measured.model[name], name
    for name in ("seq_length", "batch_size", "separator"):
        assert ours.data[name] == measured.data[name], name
    assert ours.trainer.max_steps == measured.trainer.max_steps


def test_the_recipe_of_the_paper_is_that_of_its_rows(tmp_path: Path) -> None:
    ours, row = (settings(name, tmp_path) for name in ("paper", ROOT / "paper" / "qwen2.5-0.5b.yaml"))
    for part in ("model", "data", "trainer"):
        assert ours[part] == row[part]


CLUSTER = ROOT / "cluster"


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_cluster_config_is_laid_over_another(name: str, tmp_path: Path) -> None:
    path = ROOT / "paper" / "llama-3.1-8b.yaml"
    flags = ["--config", name, "--trainer.accelerator=cpu", "--trainer.logger=false"]
    cli = make_cli(["--config", str(path), *flags, f"--trainer.default_root_dir={tmp_path}"], run=False)
    trainer, strategy = cli.trainer, cli.trainer.strategy
    assert trainer.world_size == trainer.num_devices == 8
    assert trainer.world_size * trainer.accumulate_grad_batches * cli.datamodule.batch_size == 256
    assert any(isinstance(callback, ValidationTimes) and callback.spread for callback in trainer.callbacks)
    assert type(strategy) is {"ddp": DDPStrategy, "fsdp2": ModelParallelStrategy}[name]
    if isinstance(strategy, DDPStrategy):
        assert strategy._ddp_kwargs["gradient_as_bucket_view"] is True
    else:
        assert saves_shards(trainer)
        assert (strategy._data_parallel_size, strategy._tensor_parallel_size) == (8, 1)
    over_recipe = ["--config", "paper", "--model.base_model=x", *flags, f"--trainer.default_root_dir={tmp_path}"]
    cli = make_cli(over_recipe, run=False)
    assert cli.model.activation_checkpointing == (name == "fsdp2")
    (checkpoints,) = cli.trainer.checkpoint_callbacks
    assert checkpoints._every_n_train_steps == 100


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("quickstart", (2e-3, (0.9, 0.95), 0)),
        ("paper/llama-3.1-8b", (1e-3, (0.9, 0.95), 0)),
        ("paper/maskllm-llama-3.2-1b", (5e-4, (0.9, 0.95), 0.1)),
    ],
)
def test_low_memory_is_laid_over_another(name: str, settings: tuple[float, ...], tmp_path: Path) -> None:
    """Storage is another, and learning goes by the config beneath."""
    flags = ["--config", "low_memory", "--trainer.accelerator=cpu", "--trainer.logger=false"]
    words = ["--config", str(ROOT / f"{name}.yaml"), *flags, f"--trainer.default_root_dir={tmp_path}"]
    model = make_cli(words, run=False).model
    assert (model.logits_dtype, model.activation_checkpointing) == (torch.bfloat16, True)
    optimizer = model.make_optimizer([nn.Parameter(torch.zeros(1))])
    assert isinstance(optimizer, PackedAdamW)
    told = optimizer.defaults
    assert (told["lr"], tuple(told["betas"]), told["weight_decay"]) == settings


def test_short_2of4_is_the_measured_row(tmp_path: Path) -> None:
    """Both recipes together are what the row of docs/results.md was learned with, but for its prior's file."""
    model = "assets/SmolLM2-135M-Instruct"
    cli = instantiate("short", tmp_path, "--config=2of4", f"--model.base_model={model}", "--data.text=a.jsonl")
    row = ROOT.parent / "docs" / "results" / "configs" / "maskllm-50.yaml"
    measured = instantiate(row, tmp_path)
    for of in ("objective", "annealing", "sparsity"):
        assert getattr(cli.model, of) == getattr(measured.model, of), of
    assert cli.config["model"]["gate"].as_dict() == measured.config["model"]["gate"].as_dict()
    for of in ("seq_length", "batch_size", "separator"):
        assert getattr(cli.datamodule, of) == getattr(measured.datamodule, of), of
    assert cli.trainer.max_steps == measured.trainer.max_steps == 244
    priors = [each.model.run_prior.settings for each in (cli, measured)]
    assert {(prior.graded, prior.fisher, prior.sequences) for prior in priors} == {(False, None, 128)}
    optimizers = [each.model.make_optimizer([nn.Parameter(torch.zeros(1))]) for each in (cli, measured)]
    assert optimizers[0].defaults == optimizers[1].defaults


@pytest.mark.parametrize("script", ["torchrun.sh", "slurm.sbatch"])
def test_cluster_script_types_what_exists(script: str, tmp_path: Path) -> None:
    """The script runs with launchers that write down what they are told, and the command line takes it."""
    for launcher in ("torchrun", "srun"):
        (tmp_path / launcher).write_text('#!/bin/sh\nenv > environment\nprintf "%s\\n" "$@"\n')
        (tmp_path / launcher).chmod(0o755)
    variables = {
        "SLURM_NNODES": "2",
        "SLURM_NTASKS_PER_NODE": "8",
        "SLURM_NTASKS": "16",
        "SLURM_CPUS_PER_TASK": "8",
        "NODES": "2",
        "HEAD": "node-0:29400",
    }
    overlay = ["--config", "configs/paper/llama-3.1-8b.yaml", "--config", "fsdp2"]
    overlay += ["--trainer.strategy.data_parallel_size", "16"]
    ran = subprocess.run(
        ["bash", str(CLUSTER / script), *(overlay if script == "torchrun.sh" else [])],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", **variables},
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    )
    words = ran.stdout.split()
    if script == "torchrun.sh":
        assert {"PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600"} < {
            *(tmp_path / "environment").read_text().splitlines()
        }
        assert words[words.index("--rdzv-endpoint") + 1] == "node-0:29400"
    words = words[words.index("fit") + 1 :]
    if script == "slurm.sbatch":  # an option of the verb, which a command line that runs none has not
        assert words[-2:] == ["--ckpt_path", "last"]
        words = words[:-2]
    paths = [str(ROOT.parent / word) if word.startswith("configs/") else word for word in words]
    flags = ["--trainer.accelerator=cpu", "--trainer.logger=false", f"--trainer.default_root_dir={tmp_path}"]
    cli = make_cli([*paths, *flags], run=False)
    assert (cli.trainer.num_nodes, cli.trainer.num_devices, cli.trainer.world_size) == (2, 8, 16)
    assert cli.trainer.strategy._data_parallel_size == 16


@pytest.mark.parametrize(
    ("nodes", "given", "says"),
    [("1", {}, "localhost:0"), ("2", {}, "HEAD: has no value, and NODES is 2. Give the first machine")],
)
def test_runs_of_one_machine_do_not_meet(nodes: str, given: dict[str, str], says: str, tmp_path: Path) -> None:
    """Two of them with one port would take each other for machines of one run."""
    (tmp_path / "torchrun").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "torchrun").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "NODES": nodes, **given}
    ran = subprocess.run(["bash", str(CLUSTER / "torchrun.sh")], env=environment, capture_output=True, text=True)
    assert says in ran.stdout + ran.stderr
    assert (ran.returncode == 0) == (nodes == "1")


def test_torchrun_knows_the_variables_of_its_script(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are of torch, which may name them otherwise in another version."""
    monkeypatch.setenv("PET_SIGNALS_TO_HANDLE", "SIGTERM,SIGUSR1")
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    config, *_ = torch.distributed.run.config_from_args(torch.distributed.run.parse_args(["script.py"]))
    assert config.signals_to_handle == "SIGTERM,SIGUSR1"
    assert getattr(config, "shutdown_timeout", 600) == 600  # not in torch 2.11


def test_every_srun_has_the_cores_of_its_job() -> None:
    """It does not take them from sbatch since Slurm 22.05."""
    pages = [*(ROOT.parent / "docs").glob("*.md"), *CLUSTER.iterdir()]
    lines = [line for page in pages for line in page.read_text().splitlines() if line.startswith("srun ")]
    assert len(lines) >= 3
    assert all('--cpus-per-task="$SLURM_CPUS_PER_TASK"' in line for line in lines)


def test_a_config_is_named_in_every_spelling(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text("seed_everything: 1\n")
    for spelled in (["--config=~/mine.yaml"], ["--config", "~/mine.yaml"], ["-c=~/mine.yaml"], ["-c", "~/mine.yaml"]):
        assert "".join(with_recipes(["fit", *spelled])).endswith(str(tmp_path / "mine.yaml"))
    for spelled in (["--config=short"], ["--config", "short"], ["-c=short"], ["-c", "short"]):
        assert "".join(with_recipes(["fit", *spelled])).endswith("short.yaml")


def test_a_file_has_precedence_over_a_recipe_of_its_name(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short").write_text("model: {sparsity: 0.25, base_model: m}\n")
    assert instantiate("short", tmp_path).model.sparsity == 0.25
    assert make_cli(["--config=short", "--trainer.logger=false"], run=False).model.sparsity == 0.25


@pytest.mark.parametrize("form", [["--config", "shrot"], ["--config=shrot"], ["-c", "shrot"]])
def test_neither_file_nor_recipe(form: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", *form])
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        "leap_pl fit: --config shrot: there is no such file, and no recipe of this name. Did you mean short? The "
        "recipes are 2of4, ddp, fsdp2, low_memory, paper, short.\n"
    )
