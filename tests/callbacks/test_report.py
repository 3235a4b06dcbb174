"""What a run says: its plan, its progress in a file and in a terminal, its verdict, and TensorBoard's first group."""

import io
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Run, fit_flags
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.axes import Axes
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import tiny_model

from leap_pl import LeapModule
from leap_pl.callbacks import StepProgress, progress, report, sparsity
from leap_pl.callbacks.density_picture import draw_densities
from leap_pl.cli.main import main
from leap_pl.masks import MaskSet

pytestmark = pytest.mark.usefixtures("eager")


@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("there", [None, 2**31, 2**32])
def test_plan_says_where_a_run_will_not_fit(
    there: int | None, copies: bool, model_folder, text_file, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr(report, "device_bytes", lambda device: there)
    monkeypatch.setattr(report, "copies_gradients", lambda trainer: copies)
    main(fit_flags(model_folder, text_file, tmp_path, "--trainer.max_steps=1"))
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("memory "))
    ways = "add "
    ways += "--trainer.strategy DDPStrategy --trainer.strategy.gradient_as_bucket_view true, then " * copies
    ways += "--model.activation_checkpointing true, then --data.batch_size 1 --trainer.accumulate_grad_batches 4, then "
    ways += "--config low_memory, then --config fsdp2 on several"
    assert (f"with 2 GiB for those more than its 2.0 GiB; {ways}" in line) == (there == 2**31)


def test_plan_lines_and_verdict(finished: Run, model_folder, text_file, tmp_path: Path, capsys, monkeypatch) -> None:
    """Of a run that is resumed at its fourth step: the prior's perplexity is that of the run's beginning."""
    monkeypatch.setattr(progress, "SECONDS_A_LINE", 0.0)
    earlier = finished.folder / "checkpoints" / "step=2.ckpt"
    cli = main(fit_flags(model_folder, text_file, tmp_path, "--ckpt_path", str(earlier)))
    out, err = capsys.readouterr()
    plan = {line.split("  ")[0]: line for line in err.splitlines() if "  " in line}
    sizes = sum(cli.model.sizes.values())
    assert f"{sizes:,} of " in plan["model"]
    assert "14 tensors, and 50.0% of them will be removed (BernoulliGate)" in plan["model"]
    assert "768 tokens, 128 a step (2 × 32 tokens × 2 micro-batches)" in plan["text"]
    assert (
        "6, AdamW with learning rate 0.001 (5 warm-up steps and a cosine to 0); α 25 → 350, τ 4 → 0.05" in plan["steps"]
    )
    assert plan["losses"].endswith("lm 1, budget 7, kept_norm -10 → 0")
    assert "which this run resumes" in plan["prior"]
    assert re.fullmatch(r"memory\s+about \d+ MiB on each device, without libraries and fragmentation", plan["memory"])
    assert f"{tmp_path / 'checkpoints'}; curves to {tmp_path / 'tensorboard'}" in plan["writes"]
    assert "first step" not in plan  # nothing is compiled
    assert "schedule" not in plan  # which a resumed run keeps

    measured = cli.model.validation
    assert measured.hard_step == 6  # the last validation is after the last step
    figures = (
        f"perplexity {measured.hard.value:.2f} (dense {measured.dense.value:.2f}, prior {measured.start.value:.2f})"
    )
    mask = tmp_path / "checkpoints" / "mask.safetensors"
    line = f"leap_pl fit: {figures}, sparsity 0.500000, mask {mask}; next: leap_pl export --mask {mask} "
    assert out.splitlines()[-1] == f"{line}--output_dir sparse-model"

    steps = re.findall(r"^step (\d+) of 6(, [\d:]+ left)?: loss/lm [\d.]+, density [\d.]+", err, re.MULTILINE)
    assert {int(step) for step, _ in steps} == {3, 4, 5, 6}  # a line after each validation
    assert [bool(left) for step, left in steps if step in ("3", "6")] == [False] * sum(
        s in ("3", "6") for s, _ in steps
    )
    assert any(left for _, left in steps)
    assert err.rstrip().count(figures) >= 1


def test_the_figures_of_a_line_of_progress(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Density is kept weights over all; time left is that of the steps that are left, at the pace so far."""
    module: Any = SimpleNamespace(
        terms={"lm": torch.tensor(2.0), "total": torch.tensor(9.0)},
        gates=SimpleNamespace(kept={"a": torch.tensor(3.0), "b": torch.tensor(1.0)}),
        sizes={"a": 4, "b": 4},
        global_step=3,
        validation=SimpleNamespace(summary=lambda step: f"at {step}"),
    )
    line = StepProgress()
    line._measured = (1, 0.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: 10.0)
    line._print(SimpleNamespace(global_step=3, max_steps=6), module)  # type: ignore[arg-type]
    assert capsys.readouterr().err == "step 3 of 6, 00:15 left: loss/lm 2.000, density 0.500, at 3\n"


def test_progress_is_of_every_step(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Also of one that the end of an epoch ends, amid its micro-batches; and of none twice."""
    monkeypatch.setattr(progress, "SECONDS_A_LINE", 0.0)
    monkeypatch.setattr(progress, "_values", lambda module: "values")
    line, run = StepProgress(), SimpleNamespace(global_step=0, max_steps=3, accumulate_grad_batches=8)
    module = object.__new__(LeapModule)
    line.on_train_start(run, module)  # type: ignore[arg-type]
    for step, micro_batch in ((0, 0), (1, 1), (1, 0), (2, 1), (2, 0), (3, 1)):  # an epoch is two micro-batches
        run.global_step = step
        line.on_train_batch_end(run, module, None, None, micro_batch)  # type: ignore[arg-type]
    said = capsys.readouterr().err
    assert [text.split(",")[0].split(":")[0] for text in said.splitlines()] == [f"step {n} of 3" for n in (1, 2, 3)]


def test_tensorboard_opens_on_what_decides(finished: Run) -> None:
    events = EventAccumulator(str(finished.folder / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    first = sorted(tags["scalars"])[:4]
    assert first == [
        "at_a_glance/density_minus_target",
        "at_a_glance/perplexity_dense",
        "at_a_glance/perplexity_hard",
        "at_a_glance/perplexity_prior",
    ]
    assert "epoch" not in tags["scalars"]
    assert [event.step for event in events.Scalars("perplexity/hard")] == [*range(7)]
    assert {e.value for e in events.Scalars(first[3])} == {events.Scalars("perplexity/hard")[0].value}
    assert tags["images"] == ["at_a_glance/density"]
    assert {"at_a_glance/plan/text_summary", "at_a_glance/verdict/text_summary"} <= {*tags["tensors"]}
    (plan,) = events.Tensors("at_a_glance/plan/text_summary")
    assert b"the paper's, for 2.1 billion tokens; for few, --config short" in plan.tensor_proto.string_val[0]


def test_the_plan_names_the_recipes_of_its_gate(model_folder, text_file, tmp_path: Path, capsys) -> None:
    flags = ("--trainer.max_steps=1", "--model.gate=NMGate", "--model.sparsity=0.5", "--model.objective.budget=0")
    main(fit_flags(model_folder, text_file, tmp_path, *flags))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("schedule  ")]
    assert line.endswith("for few, --config short --config 2of4 before all other options")


def test_the_plan_says_another_pattern_and_its_advice_keeps_it(model_folder, text_file, tmp_path, capsys) -> None:
    """The recipe is of 2:4, which what is typed after it changes."""
    flags = ("--trainer.max_steps=1", "--model.gate=NMGate", "--model.gate.n=1", "--model.gate.m=4")
    flags += ("--model.sparsity=0.75", "--model.objective.budget=0")
    main(fit_flags(model_folder, text_file, tmp_path, *flags))
    plan = dict(
        line.split(None, 1) for line in capsys.readouterr().err.splitlines() if line.startswith(("model ", "schedule "))
    )
    assert plan["model"].endswith("(NMGate, 1:4)")
    assert plan["schedule"].endswith("for few, --config short --config 2of4 before all other options")
    verb, *words = fit_flags(model_folder, text_file, tmp_path / "again", *flags)
    main([verb, *plan["schedule"].partition("for few, ")[2].split(" before ")[0].split(), *words])
    learned = MaskSet.load(tmp_path / "again" / "checkpoints" / "mask.safetensors")
    assert (learned.sparsity, str(learned.form())) == (0.75, "1:4")


def test_the_plan_counts_the_fixed_mask_within_tiles(model_folder, text_file, tmp_path: Path, monkeypatch) -> None:
    counted = []

    def counting(*arguments: Any) -> int:
        counted.append(arguments[-1])
        return 1

    monkeypatch.setattr("leap_pl.callbacks.report.expected_bytes", counting)
    flags = ["--trainer.max_steps=1", "--model.gate=TileGate", "--model.gate.tile=8", "--model.sparsity=0.4"]
    sizes = []
    for mode in ("tile", "joint"):
        main(fit_flags(model_folder, text_file, tmp_path / mode, *flags, f"--model.gate.mode={mode}"))
        masks = MaskSet.load(tmp_path / mode / "checkpoints" / "mask.safetensors")
        sizes.append(masks.total)
    assert counted[0] - counted[1] == pytest.approx(sizes[0], rel=0.01)  # a byte a weight


def test_a_picture_of_densities() -> None:
    names = [f"model.layers.{layer}.mlp.{part}_proj.weight" for layer in range(3) for part in ("up", "down")]
    drawn, imshow = [], Axes.imshow

    def noted(axes: Axes, grid: object, **options: object) -> object:
        drawn.append((axes, grid))
        return imshow(axes, grid, **options)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Axes, "imshow", noted)
        densities = {name: index / 10 for index, name in enumerate(names)}
        picture = draw_densities({**densities, "lm_head.weight": 1.0})
    ((axes, grid),) = drawn
    assert grid == [[0.0, 0.2, 0.4], [0.1, 0.3, 0.5]]  # a row for each projection, a column for each layer
    assert [label.get_text() for label in axes.get_yticklabels()] == ["mlp.up_proj", "mlp.down_proj"]
    assert picture.dtype == np.uint8
    assert picture.shape[2] == 3
    deep = draw_densities({f"model.layers.{layer}.mlp.up_proj.weight": layer / 30 for layer in range(30)})
    assert deep.shape[1] < 800  # a card is 340 wide, and its labels are to be readable


def test_the_picture_is_of_all_weights(model_folder, text_file, tmp_path: Path, monkeypatch) -> None:
    """Of the relaxed mask, whose densities are known exactly, and not of the sampled bits of the hard one."""
    drawn = []
    monkeypatch.setattr(sparsity, "draw_densities", lambda densities: drawn.append(densities) or np.zeros((1, 1, 3)))
    few = ("--trainer.max_steps=1", "--trainer.enable_progress_bar=false", "--sparsity_log.samples=1")
    module = main(fit_flags(model_folder, text_file, tmp_path, *few)).model
    (densities,) = drawn
    assert densities == {name: float(kept) / module.sizes[name] for name, kept in module.gates.kept.items()}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_in_a_terminal_the_bar_ends_with_the_last_validation(
    model_folder, text_file, tmp_path: Path, monkeypatch
) -> None:
    terminal = Terminal()
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr(sys, "stderr", terminal)
    cli = main(fit_flags(model_folder, text_file, tmp_path, "--trainer.max_steps=2", "--progress.refresh_seconds=0"))
    last = [line for line in terminal.getvalue().split("\r") if "learning the mask" in line][-1]
    assert cli.model.validation.summary(cli.model.global_step) in last
    assert " 2/2 " in last
    assert "first step" in terminal.getvalue()


def test_the_progress_can_be_turned_off(model_folder, text_file, tmp_path: Path, capsys) -> None:
    cli = main(
        fit_flags(model_folder, text_file, tmp_path, "--trainer.max_steps=1", "--trainer.enable_progress_bar=false")
    )
    assert not any(isinstance(callback, StepProgress) for callback in cli.trainer.callbacks)
    out, err = capsys.readouterr()
    assert "step 1 of 1" not in err
    assert "next: leap_pl export" in out


def test_learning_on_a_sparse_model_says_so_and_goes_on(text_file, tmp_path: Path, finished: Run) -> None:
    from tiny import byte_tokenizer

    model = tiny_model()
    MaskSet.load(finished.mask).apply_(model)
    model.save_pretrained(tmp_path / "sparse")
    byte_tokenizer().save_pretrained(tmp_path / "sparse")
    words = fit_flags(tmp_path / "sparse", text_file, tmp_path, "--trainer.max_steps=1", "--model.sparsity=0.6")
    with pytest.warns(UserWarning, match=r"is sparse already: 50.0% of the gated weights are 0. Learning goes on"):
        main(words)
    assert MaskSet.load(tmp_path / "checkpoints" / "mask.safetensors").sparsity == pytest.approx(0.6, abs=1e-4)


@pytest.mark.parametrize(
    ("words", "steps"),
    [
        (["--trainer.max_steps=25", "--trainer.accumulate_grad_batches=1"], [*range(0, 25, 3), 25]),
        (["--trainer.max_steps=3", "--data.validation_sequences=8"], [0, 3]),  # 6 micro-batches, 4 of validation
        (["--trainer.max_steps=3", "--trainer.val_check_interval=4"], [0, 2, 3]),
        (["--trainer.max_steps=3", "--trainer.val_check_interval=4000"], [0, 3]),
        (["--trainer.max_steps=3", "--trainer.val_check_interval=00:05:00:00"], [0, 3]),
    ],
)
def test_validations_are_about_ten(words, steps, model_folder, text_file, tmp_path: Path, monkeypatch) -> None:
    from leap_pl.training.module import LeapModule

    seen = []
    end = LeapModule.on_validation_epoch_end
    monkeypatch.setattr(
        LeapModule, "on_validation_epoch_end", lambda self: (seen.append(self.global_step), end(self))[1]
    )
    main(fit_flags(model_folder, text_file, tmp_path, *words))
    assert seen == steps


def test_a_run_validated_another_number_of_times_learns_the_same(
    finished: Run, model_folder, text_file, tmp_path: Path
) -> None:
    main(fit_flags(model_folder, text_file, tmp_path, "--trainer.val_check_interval=100"))
    one, other = (
        torch.load(path, weights_only=True)["state_dict"]
        for path in (finished.checkpoint, tmp_path / "checkpoints" / "last.ckpt")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_histograms_have_an_interval_of_their_own(model_folder, text_file, tmp_path: Path) -> None:
    intervals = ("--sparsity_log.every_n_steps=3", "--sparsity_log.histogram_every_n_steps=2")
    main(fit_flags(model_folder, text_file, tmp_path, *intervals))
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"histograms": 0})
    events.Reload()
    tag = events.Tags()["histograms"][0]
    assert [event.step for event in events.Histograms(tag)] == [1, 2, 4, 6]


def test_points_after_the_checkpoint_that_a_run_goes_on_from_are_dropped(
    finished: Run, model_folder, text_file, tmp_path: Path
) -> None:
    """They are drawn again, and on other hardware elsewhere: TensorBoard shows each step once."""
    run = tmp_path / "run"
    shutil.copytree(finished.folder, run)
    for file in (run / "checkpoints").glob("*.safetensors"):
        file.unlink()
    main(fit_flags(model_folder, text_file, run, f"--ckpt_path={run / 'checkpoints' / 'step=2.ckpt'}"))
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    steps = [event.step for event in events.Scalars("loss/lm")]
    assert len(steps) == len({*steps})
    assert steps[-1] == 6


@pytest.mark.parametrize("ends_early", [False, True])
def test_hyperparameters_stand_beside_the_last_perplexities(
    ends_early: bool, model_folder, text_file, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a finished run: those of one that its time ended would be taken for its result."""
    logged: list[dict[str, Any]] = []
    real = TensorBoardLogger.log_hyperparams

    def log(self: TensorBoardLogger, params: Any, metrics: Any = None, **more: Any) -> None:
        logged.extend([metrics] if isinstance(metrics, dict) else [])
        real(self, params, metrics, **more)

    monkeypatch.setattr(TensorBoardLogger, "log_hyperparams", log)
    time = ["--trainer.max_time=00:00:00:00"] if ends_early else []
    cli = main(fit_flags(model_folder, text_file, tmp_path, *time))
    figures = cli.model.validation.figures()
    expected = {f"final_perplexity/{name}": figures[name] for name in ("hard", "dense")}
    assert logged == ([] if ends_early else [pytest.approx(expected)])
