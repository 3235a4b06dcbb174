"""``leap_pl fit`` on a tiny model: what it learns, shows, writes, and how it goes on."""

import re
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import Run, fit_flags, refused
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._python_dispatch import TorchDispatchMode

from leap_pl.callbacks import SparsityLogger
from leap_pl.cli.fit import LeapCLI, make_cli
from leap_pl.cli.main import main
from leap_pl.errors import UserError
from leap_pl.masks import MaskSet
from leap_pl.training.module import LeapModule

pytestmark = pytest.mark.usefixtures("eager")


def logits(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]


def test_checkpoint_holds_logits_and_nothing_of_the_model(finished: Run) -> None:
    checkpoint = torch.load(finished.checkpoint, weights_only=True)
    assert len(checkpoint["state_dict"]) == 14
    assert all(re.fullmatch(r"logits\.model\.layers\.\d\..*_proj\.weight", key) for key in checkpoint["state_dict"])
    assert {value.dtype for value in checkpoint["state_dict"].values()} == {torch.float32}
    assert checkpoint["leap_pl"]["max_steps"] == 6


def test_exported_mask_has_exactly_the_target_sparsity(finished: Run) -> None:
    for name in ("mask", "prior"):
        mask = MaskSet.load(finished.mask.with_name(f"{name}.safetensors"))
        assert mask.total - mask.kept == mask.total // 2
    assert mask.provenance.method == "magnitude"


def test_learning_moves_the_mask_away_from_its_prior(finished: Run) -> None:
    learned, prior = MaskSet.load(finished.mask), MaskSet.load(finished.mask.with_name("prior.safetensors"))
    changed = sum(int((learned.masks[name] != prior.masks[name]).sum()) for name in prior.masks) / prior.total
    assert 0 < changed < 0.5


@pytest.fixture(scope="module")
def curves(finished_run: Run) -> EventAccumulator:
    events = EventAccumulator(str(finished_run.folder / "tensorboard"))
    events.Reload()
    return events


def test_tensorboard_has_every_curve(curves: EventAccumulator) -> None:
    tags = set(curves.Tags()["scalars"])
    expected = {f"loss/{term}" for term in ("total", "lm", "distillation", "budget", "kept_norm")}
    expected |= {"density/soft", "density/target", "density/logits_above_0", "perplexity/hard", "perplexity/dense"}
    expected |= {"gradient/norm", "schedule/alpha", "schedule/tau", "schedule/learning_rate"}
    expected |= {"mask/changed_from_prior", "mask/changed_since_last_log"}
    expected |= {f"weights_by_layer/{kind}/00{layer}" for kind in ("soft", "hard") for layer in (0, 1)}
    assert expected <= tags
    assert [event.value > 0 for event in curves.Scalars("gradient/norm")] == [True] * 6
    assert any(tag.startswith("weights_by_projection/hard/mlp.up_proj") for tag in tags)
    assert any(tag.startswith("weights_alpha_theta_over_tau/") for tag in curves.Tags()["histograms"])


def test_perplexity_curve_begins_with_the_prior(curves: EventAccumulator) -> None:
    assert next(event.step for event in curves.Scalars("perplexity/hard")) == 0
    assert next(event.step for event in curves.Scalars("perplexity/dense")) == 0


def test_annealing_follows_the_optimizer_step(curves: EventAccumulator) -> None:
    """Six steps of two micro-batches each: step s was taken at fraction (s − 1)/6."""
    taken = {event.step: event.value for event in curves.Scalars("schedule/alpha")}
    assert taken == pytest.approx({step: 25 + (350 - 25) * (step - 1) / 6 for step in range(1, 7)})
    cold = {event.step: event.value for event in curves.Scalars("schedule/tau")}
    assert cold == pytest.approx({step: 4 + (0.05 - 4) * (step - 1) / 6 for step in range(1, 7)})


def test_logged_densities_are_those_of_the_mask(curves: EventAccumulator, finished: Run) -> None:
    """The model is small enough for every logit to be sampled, and the last log is after the last step."""
    by_layer = MaskSet.load(finished.mask).densities("layer")
    for layer, density in by_layer.items():
        assert curves.Scalars(f"weights_by_layer/hard/00{layer}")[-1].value == pytest.approx(density, abs=1e-6)


@pytest.mark.parametrize("stop", [2, 4])
def test_resumed_run_ends_bit_identical(finished: Run, model_folder, text_file, tmp_path: Path, stop: int) -> None:
    earlier = finished.folder / "checkpoints" / f"step={stop}.ckpt"
    main(fit_flags(model_folder, text_file, tmp_path, "--ckpt_path", str(earlier)))
    assert not (tmp_path / "checkpoints" / f"step={stop}.ckpt").exists()  # not from the start
    one, other = logits(finished.checkpoint), logits(tmp_path / "checkpoints" / "last.ckpt")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(
        *[
            torch.cat([m.flatten() for m in MaskSet.load(p).masks.values()])
            for p in (finished.mask, tmp_path / "checkpoints" / "mask.safetensors")
        ]
    )


def test_activation_checkpointing_changes_no_bit(finished: Run, model_folder, text_file, tmp_path: Path) -> None:
    main(fit_flags(model_folder, text_file, tmp_path, "--model.activation_checkpointing=true"))
    one, other = logits(finished.checkpoint), logits(tmp_path / "checkpoints" / "last.ckpt")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_activation_checkpointing_is_on(model_folder, text_file, tmp_path: Path, monkeypatch) -> None:
    """The blocks run again in the backward pass: each twice for a micro-batch."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    calls = {"n": 0}
    forward = LlamaMLP.forward

    def counted(self, x):
        calls["n"] += 1
        return forward(self, x)

    monkeypatch.setattr(LlamaMLP, "forward", counted)
    counts = []
    for flag in ("false", "true"):
        calls["n"] = 0
        folder = tmp_path / flag
        more = [f"--model.activation_checkpointing={flag}", "--trainer.max_steps=1", "--trainer.limit_val_batches=0"]
        main(fit_flags(model_folder, text_file, folder, *more, "--data.validation_sequences=0"))
        counts.append(calls["n"])
    set_up = counts[1] - 2 * (counts[1] - counts[0])
    assert counts[1] - counts[0] == 2 * 2  # two blocks, two micro-batches
    assert set_up >= 0


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "32-true"])
def test_logits_stay_float32(model_folder, text_file, tmp_path: Path, precision: str) -> None:
    main(fit_flags(model_folder, text_file, tmp_path, f"--trainer.precision={precision}", "--trainer.max_steps=2"))
    stored = logits(tmp_path / "checkpoints" / "last.ckpt")
    assert all(value.dtype == torch.float32 for value in stored.values())
    # Values that bfloat16 cannot hold: float32 all along, not cast back at the end.
    assert any(not torch.equal(value, value.bfloat16().float()) for value in stored.values())


@pytest.mark.parametrize(
    "flags",
    [
        ["--model.objective.distillation=1", "--model.objective.lm=0", "--model.objective.temperature=2"],
        ["--model.objective.distillation=0.5", "--model.objective.budget_scope=layer"],
        ["--model.prior.method=wanda", "--model.prior.sequences=4"],
        ["--model.prior.method=wanda", "--model.prior.sequences=4", "--model.prior.fisher=0.5"],
        ["--model.prior.method=none"],
    ],
)
def test_other_objectives_and_priors(model_folder, text_file, tmp_path: Path, flags: list[str]) -> None:
    cli = main(fit_flags(model_folder, text_file, tmp_path, "--trainer.max_steps=2", *flags))
    mask = MaskSet.load(tmp_path / "checkpoints" / "mask.safetensors")
    assert mask.total - mask.kept == mask.total // 2
    assert (float(cli.model.terms["distillation"]) > 0) == any("distillation" in flag for flag in flags)


def test_other_optimizer_and_scheduler(model_folder, text_file, tmp_path: Path) -> None:
    more = ["--model.optimizer=SGD", "--model.optimizer.lr=0.5", "--model.lr_scheduler=ExponentialLR"]
    cli = main(
        fit_flags(model_folder, text_file, tmp_path, "--trainer.max_steps=2", *more, "--model.lr_scheduler.gamma=0.5")
    )
    (optimizer,) = cli.trainer.optimizers
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * 0.5**2)


def test_mask_file_as_prior(finished: Run, model_folder, text_file, tmp_path: Path) -> None:
    main(fit_flags(model_folder, text_file, tmp_path, "--trainer.max_steps=1", f"--model.prior.mask={finished.mask}"))
    prior, given = MaskSet.load(tmp_path / "checkpoints" / "prior.safetensors"), MaskSet.load(finished.mask)
    assert all(torch.equal(prior.masks[name], given.masks[name]) for name in given.masks)


def test_validation_is_of_the_exported_mask(finished: Run, model_folder, capsys) -> None:
    """The hard mask's perplexity, computed here from the MaskSet on a plain model."""
    from transformers import AutoModelForCausalLM

    cli = main([*_validate(finished), "--ckpt_path", str(finished.checkpoint)])
    metrics = cli.trainer.callback_metrics
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    for name in ("dense", "hard"):
        if name == "hard":
            MaskSet.load(finished.mask).apply_(model)
        losses = []
        with torch.no_grad():
            for batch in cli.datamodule.val_dataloader():
                ids = batch["input_ids"] if isinstance(batch, dict) else batch
                losses.append(model(input_ids=ids, labels=ids).loss)
        assert float(metrics[f"perplexity/{name}"]) == pytest.approx(float(torch.stack(losses).mean().exp()), rel=1e-4)


def _validate(finished: Run) -> list[str]:
    kept = [flag for flag in finished.flags[1:] if flag.startswith(("--data", "--trainer.accelerator"))]
    return ["validate", *kept, "--trainer.logger=false", f"--trainer.default_root_dir={finished.folder}"]


def test_validate_takes_the_model_from_the_checkpoint(finished: Run) -> None:
    """No --model flag is given above: base model, dtype and sparsity come from the checkpoint."""
    cli = main([*_validate(finished), "--ckpt_path", str(finished.checkpoint)])
    assert cli.model.base_model == finished.flags[1].partition("=")[2]
    assert cli.model.dtype_name == "float32"


def test_other_loggers_get_every_scalar(model_folder, text_file, tmp_path: Path) -> None:
    flags = [flag for flag in fit_flags(model_folder, text_file, tmp_path) if not flag.startswith("--trainer.logger")]
    main([*flags, "--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={tmp_path}", "--trainer.max_steps=2"])
    (table,) = tmp_path.rglob("metrics.csv")
    header = table.read_text().splitlines()[0].split(",")
    assert {"loss/lm", "density/soft", "perplexity/hard", "mask/changed_from_prior", "weights_by_layer/hard/001"} <= {
        *header
    }
    (hparams,) = tmp_path.rglob("hparams.yaml")
    settings = yaml.safe_load(hparams.read_text())
    assert (settings["sparsity"], settings["max_steps"], settings["objective/lm"]) == (0.5, 2, 1.0)


def test_trainer_without_progress_bar_shows_none_for_the_prior(model_folder, text_file, tmp_path: Path, capsys) -> None:
    import lightning as L

    from leap_pl import LeapModule, TextDataModule
    from leap_pl.prior import Prior

    data = TextDataModule(str(model_folder), text=str(text_file), seq_length=32, validation_sequences=0)
    for shown in (True, False):
        prior = Prior(method="wanda", sequences=2, cache_dir=str(tmp_path / str(shown)))
        trainer = L.Trainer(accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False,
                            enable_model_summary=False, enable_progress_bar=shown)  # fmt: skip
        trainer.fit(LeapModule(str(model_folder), prior=prior), datamodule=data)
        captured = capsys.readouterr()
        assert ("pruning" in captured.err) == shown


class Looks(TorchDispatchMode):
    """Notes where a tensor's value is asked for, which on a GPU makes the host wait."""

    def __init__(self) -> None:
        super().__init__()
        self.step: int | None = None
        self.found: list[tuple[int, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.step is not None and func is torch.ops.aten._local_scalar_dense.default:
            self.found.append((self.step, "".join(traceback.format_stack(limit=8))))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("later", [True, False])
def test_a_step_looks_at_no_number_on_a_device(model_folder, text_file, tmp_path: Path, monkeypatch, later) -> None:
    """From the forward pass to the optimizer's step, but once at the first tokens, whatever loader they are from.

    On a CPU, where it costs nothing, losses and norm are checked.
    """
    monkeypatch.setattr(LeapModule, "looks_later", property(lambda self: later))
    step, log = LeapModule.training_step, SparsityLogger.on_train_batch_end

    def starts(self: LeapModule, *args: Any) -> Any:
        looks.step = self.global_step
        return step(self, *args)

    def ends(self: SparsityLogger, *args: Any) -> None:
        looks.step = None
        log(self, *args)

    monkeypatch.setattr(LeapModule, "training_step", starts)
    monkeypatch.setattr(SparsityLogger, "on_train_batch_end", ends)
    optimizer = ["--model.optimizer=torch.optim.AdamW", "--model.optimizer.fused=true"]
    more = ["--trainer.gradient_clip_val=1", "--model.objective.distillation=0.5", *optimizer]
    with Looks() as looks:
        main(fit_flags(model_folder, text_file, tmp_path, *more))
    if later:
        tokens = [at for at, where in looks.found if "in check_token_ids" in where]
        assert tokens == [0, 0]  # the least and the greatest
        assert len(looks.found) == len(tokens), [where for _, where in looks.found if "in check_token_ids" not in where]
    else:
        assert {at for at, _ in looks.found} == set(range(6))


def test_a_seed_that_changes_nothing_is_told(model_folder, text_file, tmp_path: Path) -> None:
    words = fit_flags(model_folder, text_file, tmp_path, "--trainer.max_steps=1", "--seed_everything=1")
    with pytest.warns(UserWarning, match="--seed_everything does not change what is learned"):
        main(words)


def test_validate_takes_the_config_that_fit_has_saved(finished: Run) -> None:
    (config,) = (finished.folder / "tensorboard").rglob("config.yaml")
    main(["validate", f"--config={config}", f"--ckpt_path={finished.checkpoint}", "--trainer.logger=false"])


class Remote(Logger):
    """A logger without a folder, as MLflow's of a server is."""

    name, version = "remote", "0"

    def log_metrics(self, metrics: object, step: object = None) -> None:
        """Log nothing."""

    def log_hyperparams(self, params: object, *args: object, **kwargs: object) -> None:
        """Log nothing."""


def test_a_logger_without_a_folder(model_folder, text_file, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text("mine: 1\n")
    words = fit_flags(model_folder, text_file, tmp_path / "run")
    words = [word for word in words if not word.startswith("--trainer.logger")]
    main([*words, "--trainer.max_steps=1", f"--trainer.logger={__name__}.Remote"])
    assert (tmp_path / "config.yaml").read_text() == "mine: 1\n"
    assert "base_model" in (tmp_path / "run" / "checkpoints" / "config-of-run.yaml").read_text()


def test_early_stopping_is_taken(model_folder, text_file, tmp_path: Path) -> None:
    """It acts at validations, which are some before the end."""
    callback = ["--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitor=perplexity/hard"]
    callback += ["--trainer.callbacks.patience=1", "--trainer.callbacks.min_delta=1000"]
    cli = main(fit_flags(model_folder, text_file, tmp_path, *callback))
    assert 0 < cli.trainer.global_step < 6


def test_a_config_of_the_users_own_beside_the_curves_stays(model_folder, text_file, tmp_path: Path) -> None:
    """Lightning saves the whole config under the name that one's own may have."""
    folder = tmp_path / "exp"
    words = [
        w for w in fit_flags(model_folder, text_file, folder) if "logger.version" not in w and "max_steps" not in w
    ]
    own = folder / "config.yaml"
    folder.mkdir()
    own.write_text("# mine\ntrainer: {max_steps: 1}\n")
    main([*words, "--trainer.logger.version=", f"--config={own}"])
    assert own.read_text() == "# mine\ntrainer: {max_steps: 1}\n"
    saved = yaml.safe_load((folder / "config-of-run.yaml").read_text())
    assert saved["trainer"]["max_steps"] == 1
    main([*words, "--trainer.logger.version=", "--trainer.max_steps=1", "--force"])  # which reads none
    assert yaml.safe_load(own.read_text())["trainer"]["max_steps"] == 1


@pytest.mark.parametrize("logger", ["TensorBoardLogger", "CSVLogger"])
def test_a_folder_of_curves_in_the_home_folder_has_the_checkpoints_too(
    logger: str, model_folder, text_file, tmp_path: Path, monkeypatch
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("RUNS", "there")
    monkeypatch.chdir(tmp_path)
    unwanted = ("--checkpoint.dirpath", "--trainer.logger", "--trainer.max_steps")
    words = [word for word in fit_flags(model_folder, text_file, tmp_path) if not word.startswith(unwanted)]
    place = "~/runs/$RUNS" if logger == "TensorBoardLogger" else "~/runs/there"  # which alone reads variables
    words += ["--trainer.max_steps=1", f"--trainer.logger={logger}", f"--trainer.logger.save_dir={place}"]
    main([*words, "--trainer.logger.name=one", "--trainer.logger.version=v"])
    found = {path.name for path in (home / "runs" / "there" / "one" / "v").iterdir()}
    assert {"checkpoints", "config.yaml"} <= found
    assert (home / "runs" / "there" / "one" / "v" / "checkpoints" / "mask.safetensors").is_file()
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize("option", ["--checkpoint.dirpath", "--ckpt_path", "--mask_export.folder", "--model.mask"])
def test_a_path_of_a_variable_that_is_not_set(option: str, model_folder, text_file, tmp_path: Path, capsys) -> None:
    """In a script, as in --checkpoint.dirpath "$RUN": the working directory is not what it names."""
    words = [*fit_flags(model_folder, text_file, tmp_path), f"{option}="]
    assert refused(words, capsys) == f"leap_pl fit: {option} is empty. Give it a value, or leave it out."


def test_every_rank_refuses_the_folder_of_another_run(
    finished: Run, model_folder, text_file, capsys, monkeypatch
) -> None:
    """The others would wait for the first, which has ended."""
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    monkeypatch.setattr(LeapCLI, "instantiate_classes", lambda self: pytest.fail("it would load the model"))
    words = [word for word in finished.flags if word != "--force"]
    with pytest.raises(UserError, match="holds another run"):
        make_cli(words)
