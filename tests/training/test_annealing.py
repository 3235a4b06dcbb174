"""The schedules of α and τ are the module's: no callback is needed, and a checkpoint has them for a resume."""

import shutil
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from conftest import Run, fit_flags, refused
from older_checkpoints import write_as_older

from leap_pl import LeapModule, TextDataModule, UserError
from leap_pl.cli.fit import make_cli
from leap_pl.cli.main import main
from leap_pl.masks import MaskSet
from leap_pl.prior import Prior
from leap_pl.training.schedules import UNMOVED, Annealing, Schedule

pytestmark = pytest.mark.usefixtures("eager")

OTHER = Annealing(Schedule(100, 500), Schedule(1, 0.05, "cosine"), Schedule(50, 60))  # than the default
# As one group: of gates without patterns, pattern_alpha alone would be refused.
FLAGS = [
    "--model.annealing={alpha: {start: 100, end: 500}, tau: {start: 1, end: 0.05, curve: cosine}, "
    "pattern_alpha: {start: 50, end: 60}}",
]


@pytest.fixture(scope="module")
def whole(model_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run of six steps by other schedules than the default ones."""
    folder = tmp_path_factory.mktemp("annealed")
    flags = fit_flags(model_folder, text_file, folder, *FLAGS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEAP_PL_COMPILE", "0")
        main(flags)
    return Run(folder, flags)


def logits(path: Path) -> dict[str, torch.Tensor]:
    return {name.removeprefix("logits."): value for name, value in load(path)["state_dict"].items()}


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


# -- from Python --------------------------------------------------------------------------------------------


def python_run(model: Path, text: Path, folder: Path, module: LeapModule, **more: Any) -> L.Trainer:
    """The run of ``fit_flags`` by a plain trainer, with none of this package's callbacks."""
    data = TextDataModule(str(model), text=str(text), seq_length=32, batch_size=2, validation_sequences=4)
    trainer = L.Trainer(
        accelerator="cpu", max_steps=6, accumulate_grad_batches=2, gradient_clip_val=1.0, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(module, data, **more)
    return trainer


def python_module(model: Path, folder: Path, **settings: Any) -> LeapModule:
    return LeapModule(
        str(model), dtype="float32", prior=Prior(method="magnitude", cache_dir=str(folder / "priors")), **settings
    )


def learned(module: LeapModule) -> dict[str, torch.Tensor]:
    return {name: gate.logits.detach() for name, gate in module.gates.items()}


def test_a_plain_trainer_learns_what_the_command_line_learns(
    finished: Run, whole: Run, model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    """Every bit of the logits, by the default schedules and by others."""
    for run, settings in ((finished, {}), (whole, {"annealing": OTHER})):
        module = python_module(model_folder, tmp_path, **settings)
        python_run(model_folder, text_file, tmp_path, module)
        assert same(learned(module), logits(run.checkpoint))
    assert not same(logits(finished.checkpoint), logits(whole.checkpoint))


def test_the_mask_of_a_plain_trainer_tells_its_schedules(
    whole: Run, model_folder: Path, text_file: Path, tmp_path: Path
):
    module = python_module(model_folder, tmp_path, annealing=OTHER)
    python_run(model_folder, text_file, tmp_path, module)
    told = module.mask_set().provenance.config["annealing"]
    assert told == MaskSet.load(whole.mask).provenance.config["annealing"]
    assert told["tau"] == {"start": 1.0, "end": 0.05, "curve": "cosine"}


def test_alpha_and_tau_are_those_of_the_step_in_training_and_in_validation(
    whole: Run, model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every micro-batch, in the validations before, between and after the steps, and in a resumed run."""
    seen: list[tuple[str, int]] = []

    def noting(name: str) -> None:
        real = getattr(LeapModule, name)

        def noted(self: LeapModule, *args: Any) -> Any:
            result = real(self, *args)
            x = self.global_step / 6
            assert float(self.state.alpha) == pytest.approx(OTHER.alpha(x))
            assert float(self.state.tau) == pytest.approx(OTHER.tau(x))
            assert float(self.state.scales["pattern_alpha"]) == pytest.approx(OTHER.pattern_alpha(x))
            seen.append((name, self.global_step))
            return result

        monkeypatch.setattr(LeapModule, name, noted)

    noting("training_step")
    noting("validation_step")
    words = [*fit_flags(model_folder, text_file, tmp_path, *FLAGS), "--trainer.val_check_interval=4"]
    main(words)
    expected = [("validation_step", 0)] * 2
    for step in range(6):
        expected += [("training_step", step)] * 2 + [("validation_step", step + 1)] * (2 if step % 2 else 0)
    assert seen == expected
    seen.clear()
    main([*words, "--ckpt_path", str(tmp_path / "checkpoints" / "step=4.ckpt")])
    assert {step for _, step in seen} >= {4, 5, 6}
    assert min(step for _, step in seen) == 4


# -- in checkpoints -----------------------------------------------------------------------------------------


def older(path: Path, folder: Path, *, told: bool = True) -> Path:
    """The checkpoint ``path`` as versions wrote it whose schedules were a callback's; without ``told``, left out."""
    return write_as_older(path, folder / path.name, schedules=told)


def test_they_are_plain_values_among_the_settings(whole: Run) -> None:
    told = load(whole.checkpoint)["leap_pl"]["learned_with"]["model.annealing"]
    assert type(told) is dict
    assert Annealing.of(told) == OTHER


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("way", ["file", "last"])
def test_a_resume_without_the_flags_goes_on_by_the_checkpoints_schedules(
    whole: Run, model_folder: Path, text_file: Path, tmp_path: Path, old: bool, way: str
) -> None:
    stop, folder = whole.folder / "checkpoints" / "step=2.ckpt", tmp_path / "checkpoints"
    if old:
        path = older(stop, folder)
    else:
        folder.mkdir()
        path = Path(shutil.copy(stop, folder))
    main(fit_flags(model_folder, text_file, tmp_path, "--ckpt_path", "last" if way == "last" else str(path)))
    assert same(logits(folder / "last.ckpt"), logits(whole.checkpoint))
    assert MaskSet.load(folder / "mask.safetensors").provenance.config["annealing"]["alpha"]["end"] == 500
    assert Annealing.of(load(folder / "last.ckpt")["leap_pl"]["learned_with"]["model.annealing"]) == OTHER


@pytest.mark.parametrize("flag", ["--model.annealing.alpha.end=600", "--annealing.alpha.end=600"])
def test_other_schedules_than_the_checkpoints_are_refused(
    whole: Run, model_folder: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    stop = str(whole.folder / "checkpoints" / "step=2.ckpt")
    line = refused(fit_flags(model_folder, text_file, tmp_path, "--ckpt_path", stop, flag), capsys)
    assert "model.annealing.alpha.end was 500.0 and is 600.0" in line


def test_what_is_typed_again_and_is_the_same_is_taken(
    whole: Run, model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    stop = str(whole.folder / "checkpoints" / "step=4.ckpt")
    main(fit_flags(model_folder, text_file, tmp_path, *FLAGS, "--ckpt_path", stop))
    assert same(logits(tmp_path / "checkpoints" / "last.ckpt"), logits(whole.checkpoint))


def test_a_resume_from_python_is_held_to_the_checkpoints_schedules(
    whole: Run, model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    for path in (whole.folder / "checkpoints" / "step=2.ckpt", older(whole.checkpoint, tmp_path / "old")):
        with pytest.raises(UserError, match=r"model\.annealing\.alpha\.start was "):
            python_run(model_folder, text_file, tmp_path, python_module(model_folder, tmp_path), ckpt_path=path)
    module = python_module(model_folder, tmp_path, annealing=OTHER)
    python_run(
        model_folder,
        text_file,
        tmp_path,
        module,
        ckpt_path=older(whole.folder / "checkpoints" / "step=2.ckpt", tmp_path),
    )
    assert same(learned(module), logits(whole.checkpoint))


def test_an_older_run_in_which_none_moved_goes_on_so(
    model_folder: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its trainer had no callback to move α and τ: they stayed where gates have them at first."""
    still = ["alpha: {start: 25, end: 25}", "tau: {start: 4, end: 4}", "pattern_alpha: {start: 100, end: 100}"]
    main(fit_flags(model_folder, text_file, tmp_path / "whole", f"--model.annealing={{{', '.join(still)}}}"))
    path = older(tmp_path / "whole" / "checkpoints" / "step=2.ckpt", tmp_path / "old", told=False)
    words = fit_flags(model_folder, text_file, tmp_path / "resumed", "--ckpt_path", str(path))
    assert main(words).model.annealing == UNMOVED
    assert same(*(logits(tmp_path / name / "checkpoints" / "last.ckpt") for name in ("whole", "resumed")))
    assert "model.annealing.tau.end was 4.0 and is 0.05" in refused(
        [*words, "--force", "--model.annealing.tau.end=0.05"], capsys
    )


@pytest.mark.parametrize("old", [False, True])
def test_validate_and_load_from_checkpoint_have_them(whole: Run, text_file: Path, tmp_path: Path, old: bool) -> None:
    """And α and τ are where they were in the run: at step 2 of 6."""
    path = whole.folder / "checkpoints" / "step=2.ckpt"
    if old:
        path = older(path, tmp_path)
    words = ["validate", "--ckpt_path", str(path), f"--data.text={text_file}", "--data.seq_length=32"]
    words += ["--data.validation_sequences=4", "--trainer.accelerator=cpu", "--trainer.logger=false"]
    for module in (main(words).model, LeapModule.load_from_checkpoint(path)):
        assert module.annealing == OTHER
        assert Annealing.of(module.hparams["annealing"]) == OTHER
        assert float(module.state.alpha) == pytest.approx(OTHER.alpha(2 / 6))
        assert float(module.state.tau) == pytest.approx(OTHER.tau(2 / 6))
        assert float(module.state.scales["pattern_alpha"]) == pytest.approx(OTHER.pattern_alpha(2 / 6))


@pytest.mark.parametrize("told", [{"alpha": {"start": "1"}}, {"beta": 1}, [1], {"tau": {"start": 0, "end": 0}}])
def test_damaged_schedules_of_a_checkpoint_end_in_one_line(
    whole: Run, model_folder: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], told: Any
) -> None:
    checkpoint = load(whole.folder / "checkpoints" / "step=2.ckpt")
    checkpoint["leap_pl"]["learned_with"] = {}  # as earlier versions, which told it there alone
    checkpoint["leap_pl"]["settings"]["annealing"] = told
    torch.save(checkpoint, tmp_path / "damaged.ckpt")
    words = fit_flags(model_folder, text_file, tmp_path, "--ckpt_path", str(tmp_path / "damaged.ckpt"))
    assert "model.annealing" in refused(words, capsys)


# -- the callback that there was ----------------------------------------------------------------------------


def test_the_callback_says_what_to_write() -> None:
    from leap_pl.callbacks import Annealing as Callback
    from leap_pl.callbacks.annealing import Annealing as Same

    assert Callback is Same
    with pytest.raises(
        UserError, match=r"LeapModule\(\.\.\., annealing=Annealing\(tau=Schedule\(start=1, end=0.5, "
    ) as told:
        Callback(tau=Schedule(1, 0.5))
    assert "\n" not in str(told.value)


def test_a_config_with_the_callback_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["fit", "--model.base_model=x", f"--trainer.default_root_dir={tmp_path}", "--trainer.logger=false"]
    assert "annealing=Annealing(" in refused([*flags, "--trainer.callbacks=[leap_pl.callbacks.Annealing]"], capsys)


def test_the_command_line_has_no_callback_for_it(model_folder: Path, tmp_path: Path) -> None:
    flags = [f"--model.base_model={model_folder}", f"--trainer.default_root_dir={tmp_path}", "--trainer.logger=false"]
    cli = make_cli([*flags, "--trainer.accelerator=cpu"], run=False)
    assert not [callback for callback in cli.trainer.callbacks if "Annealing" in type(callback).__name__]
    assert cli.model.annealing == Annealing()
