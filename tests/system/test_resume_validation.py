"""A run that is stopped in a validation makes up for the whole of it: every figure, every curve, every file."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stopped_runs import Outcome, at_call, flags, kept, outcome, same, send, stopped

from leap_pl.cli.export import export_command
from leap_pl.cli.main import main
from leap_pl.masks import MaskSet
from leap_pl.training.module import LeapModule

pytestmark = pytest.mark.usefixtures("eager", "event_files_in_order")

STEPS = 6
EVERY = 2  # steps, of a micro-batch each
VALIDATIONS = 4  # before the first step, and after steps 2, 4 and 6


def words_of(model: Path, text: Path, folder: Path, batches: int, *more: str) -> list[str]:
    """A run whose validations take ``batches`` batches, and that writes no checkpoint unasked before its end."""
    return flags(
        model,
        text,
        folder,
        f"--data.validation_sequences={2 * batches}",
        f"--trainer.max_steps={STEPS}",
        "--trainer.accumulate_grad_batches=1",
        f"--trainer.val_check_interval={EVERY}",
        "--checkpoint.every_n_train_steps=1000",
        "--ckpt_path=last",
        *more,
    )


@pytest.fixture(scope="session")
def whole_runs(event_files_in_order: None, model_folder, text_file, tmp_path_factory) -> Callable[[int], Outcome]:
    """What a run leaves that nothing stopped, by the number of batches of a validation."""
    left: dict[int, Outcome] = {}

    def whole(batches: int) -> Outcome:
        if batches not in left:
            folder = tmp_path_factory.mktemp("whole")
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("LEAP_PL_COMPILE", "0")
                main(words_of(model_folder, text_file, folder, batches))
            left[batches] = outcome(folder)
        return left[batches]

    return whole


def figures(folder: Path) -> dict[str, Any]:
    """The perplexities that the mask of a finished run tells."""
    config = MaskSet.load(folder / "checkpoints" / "mask.safetensors").provenance.config
    return {key: value for key, value in config.items() if "perplexity" in key}


@pytest.mark.parametrize("batches", [1, 3])
def test_figures_say_of_what_they_are(whole_runs, model_folder, text_file, tmp_path: Path, batches: int) -> None:
    left = whole_runs(batches)
    settings = left.checkpoint["leap_pl"]["settings"]
    assert settings["perplexity_of"]["sequences"] == 2 * batches
    assert settings["perplexity_of"]["seq_length"] == 32
    assert settings["perplexity_of"]["step"] == STEPS
    assert left.checkpoint["leap_pl"]["dense_perplexity_of"]["tokens"] == settings["perplexity_of"]["tokens"]
    assert list(left.curves["perplexity/dense"]) == list(left.curves["perplexity/hard"]) == [0, 2, 4, 6]
    assert len(set(left.curves["perplexity/dense"].values())) == 1


@pytest.mark.parametrize(
    ("batches", "call"),
    [(batches, call) for batches in (1, 3) for call in range(1, VALIDATIONS * batches + 1)],
)
def test_sigterm_in_every_batch_of_every_validation(
    whole_runs, model_folder, text_file, tmp_path: Path, monkeypatch, batches: int, call: int
) -> None:
    words = words_of(model_folder, text_file, tmp_path, batches)
    with monkeypatch.context() as patch:
        at_call(patch, "validation_step", call, send(signal.SIGTERM))
        main(words) if call > (VALIDATIONS - 1) * batches else stopped(words)  # in the last one the run finishes
    step = (call - 1) // batches * EVERY  # that the validation is after
    if step == 0:
        assert kept(tmp_path) == []
    elif step < STEPS:
        assert kept(tmp_path) == ["last.ckpt", f"step={step}.ckpt"]
        stored = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
        progress = stored["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
        assert progress["current"]["ready"] == progress["total"]["ready"] == 0
        # Of the validation before, unless this one was through when the run heard the signal.
        through = call % batches == 0
        assert stored["leap_pl"]["settings"]["perplexity_of"]["step"] == (step if through else step - EVERY)
        assert not any("metric" in key for key in stored["state_dict"])
    main(words)
    same(outcome(tmp_path), whole_runs(batches))


class BrokenError(RuntimeError):
    """What kills a run that was not told to stop."""


@pytest.mark.parametrize("batches", [1, 3])
def test_a_run_killed_in_every_batch_of_every_validation_in_turn(
    whole_runs, model_folder, text_file, tmp_path: Path, monkeypatch, batches: int
) -> None:
    """Each time it is killed one validation step later; checkpoints are written before validations only."""
    words = words_of(model_folder, text_file, tmp_path, batches, f"--checkpoint.every_n_train_steps={EVERY}")
    real = LeapModule.validation_step
    seen: list[tuple[int, bool, int]] = []

    def dying(self: LeapModule, batch: Any, batch_idx: int) -> None:
        place = (self.global_step, bool(self.trainer.sanity_checking), batch_idx)
        if place not in seen:
            seen.append(place)
            raise BrokenError(str(place))
        real(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(LeapModule, "validation_step", dying)
        for _ in range(VALIDATIONS * batches):
            with pytest.raises(BrokenError):
                main(words)
        main(words)
    assert len(seen) == VALIDATIONS * batches
    same(outcome(tmp_path), whole_runs(batches))


def test_a_checkpoint_that_stands_amid_a_validation_is_validated_whole(
    whole_runs, model_folder, text_file, tmp_path: Path, monkeypatch
) -> None:
    """As an older version, or another callback, may have written it."""
    words = words_of(model_folder, text_file, tmp_path, 3)
    with monkeypatch.context() as patch:
        at_call(patch, "validation_step", 8, send(signal.SIGTERM))
        stopped(words)
    path = tmp_path / "checkpoints" / "step=4.ckpt"
    stored = torch.load(path, weights_only=True)
    for count in stored["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"].values():
        if isinstance(count, dict):
            count.update(ready=2, started=2, processed=1, completed=1)
    torch.save(stored, path)
    main(words)
    same(outcome(tmp_path), whole_runs(3))


def test_the_model_card_of_a_stopped_run(model_folder, text_file, tmp_path: Path, monkeypatch) -> None:
    cards = []
    for call in (None, 4):  # the first batch of three, in the last validation: its figures are those of the mask
        folder = tmp_path / str(call)
        words = words_of(model_folder, text_file, folder, 3, "--trainer.val_check_interval=4")
        with monkeypatch.context() as patch:
            if call is not None:
                at_call(patch, "validation_step", call, send(signal.SIGTERM))
                stopped(words)
        main(words)
        export_command(str(folder / "sparse"), mask=str(folder / "checkpoints" / "mask.safetensors"))
        cards.append((folder / "sparse" / "README.md").read_text())
    assert "Perplexity on the run's validation text" in cards[0]
    assert cards[0] == cards[1]


def test_a_module_that_is_fitted_again_after_a_broken_validation(model_folder, text_file, tmp_path: Path) -> None:
    """In the same process: what the broken one had counted is not counted again."""
    import lightning as L

    from leap_pl.data import TextDataModule
    from leap_pl.prior import Prior

    def fit(module: LeapModule) -> dict[str, float]:
        data = TextDataModule(str(model_folder), str(text_file), seq_length=32, batch_size=2, validation_sequences=6)
        trainer = L.Trainer(
            max_steps=1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=-1,
            val_check_interval=1,
            check_val_every_n_epoch=None,
            default_root_dir=tmp_path,
        )
        trainer.fit(module, data)
        return {key: float(value) for key, value in trainer.callback_metrics.items() if "perplexity" in key}

    def module() -> LeapModule:
        return LeapModule(str(model_folder), dtype="float32", prior=Prior("none"))

    expected = fit(module())
    broken = module()
    real, calls = broken.validation_step, []

    def breaking(batch: Any, batch_idx: int) -> None:
        calls.append(batch_idx)
        if len(calls) == 3:
            raise BrokenError
        real(batch, batch_idx)

    broken.validation_step = breaking  # type: ignore[method-assign]
    with pytest.raises(BrokenError):
        fit(broken)
    assert fit(broken) == expected


# -- of what a stored figure is -----------------------------------------------------------------------------


@pytest.fixture
def other_text(tmp_path: Path) -> Path:
    path = tmp_path / "other.jsonl"
    lines = [json.dumps({"text": "%%% " * 60 + str(number)}) for number in range(20)]
    path.write_text("\n".join(lines))
    return path


def measured(words: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, float], int]:
    """What ``leap_pl validate`` measures, and the number of batches that the dense model was measured on."""
    from leap_pl.training.validation import Validation

    dense: list[int] = []
    real = Validation.update

    def counting(self: Validation, mode: str, *rest: Any) -> None:
        if mode == "dense":
            dense.append(1)
        real(self, mode, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Validation, "update", counting)
        cli = main(words)
    return {key: float(value) for key, value in cli.trainer.callback_metrics.items()}, len(dense)


def validate(model: Path, text: Path, *more: str) -> list[str]:
    return [
        "validate",
        f"--model.base_model={model}",
        f"--data.text={text}",
        "--data.seq_length=32",
        "--data.batch_size=2",
        "--data.validation_sequences=4",
        "--trainer.accelerator=cpu",
        "--trainer.logger=false",
        "--model.dtype=float32",
        *more,
    ]


def test_a_dense_perplexity_is_used_only_for_what_it_is_of(
    finished, model_folder, text_file, other_text, tmp_path: Path, monkeypatch
) -> None:
    """Of the same text, windows, dtype and weights; whatever the batches. Else it is measured anew."""
    ckpt = f"--ckpt_path={finished.checkpoint}"
    checkpoint = torch.load(finished.checkpoint, weights_only=True)
    stored = dict(checkpoint["leap_pl"])
    checkpoint["leap_pl"]["dense_perplexity_of"] = None
    torch.save(checkpoint, tmp_path / "without.ckpt")
    without = f"--ckpt_path={tmp_path / 'without.ckpt'}"
    for more, batches in (([], 0), (["--data.batch_size=1"], 0)):
        found, count = measured(validate(model_folder, text_file, ckpt, *more), monkeypatch)
        assert found["perplexity/dense"] == pytest.approx(stored["dense_perplexity"], rel=1e-6)
        assert count == batches
    for more in (
        [f"--data.validation_text={other_text}"],
        ["--data.seq_length=30"],
        ["--data.validation_sequences=3"],
        ["--model.dtype=bfloat16"],
        ["--trainer.precision=bf16-mixed"],
    ):
        fresh, whole = measured(validate(model_folder, text_file, without, *more), monkeypatch)  # nothing is stored
        found, count = measured(validate(model_folder, text_file, ckpt, *more), monkeypatch)
        assert found["perplexity/dense"] == fresh["perplexity/dense"], more
        assert count == whole == 2, more


@pytest.mark.parametrize("damage", ["absent", "none", "nan", "fingerprint"])
def test_a_figure_without_a_whole_key_is_measured_anew(
    finished, model_folder, text_file, tmp_path: Path, monkeypatch, damage: str
) -> None:
    stored = torch.load(finished.checkpoint, weights_only=True)
    identity, right = stored["leap_pl"], stored["leap_pl"]["dense_perplexity"]
    identity["dense_perplexity"] = {"nan": float("nan")}.get(damage, 1.0)
    if damage == "absent":
        del identity["dense_perplexity_of"]
    if damage == "none":
        identity["dense_perplexity_of"] = None
    if damage == "fingerprint":
        identity["dense_perplexity_of"]["fingerprint"] = "0" * 16
    torch.save(stored, tmp_path / "damaged.ckpt")
    found, count = measured(validate(model_folder, text_file, f"--ckpt_path={tmp_path / 'damaged.ckpt'}"), monkeypatch)
    assert found["perplexity/dense"] == right
    assert count == 2


def test_a_sanity_check_of_a_part_does_not_stand_for_the_whole(
    whole_runs, model_folder, text_file, tmp_path: Path
) -> None:
    main(words_of(model_folder, text_file, tmp_path, 3, "--trainer.num_sanity_val_steps=1"))
    found, whole = outcome(tmp_path).curves["perplexity/dense"], whole_runs(3).curves["perplexity/dense"]
    assert 0 not in found
    assert found[2] == found[6] == whole[6]


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 1, 0, 2]])
def test_the_digest_of_tokens_knows_neither_order_nor_batches(order: list[int]) -> None:
    from leap_pl.training.validation import Validation, describe_sequences

    generator = torch.Generator().manual_seed(0)
    sequences = torch.randint(0, 100, (4, 8), generator=generator)

    def digest(*batches: torch.Tensor) -> dict[str, Any]:
        # As two ranks that have every other batch.
        ranks = [Validation(), Validation()]
        for place, batch in enumerate(batches):
            ranks[place % 2].batches.append(batch)
        return describe_sequences(ranks[0].measured_tokens() + ranks[1].measured_tokens())

    whole = digest(sequences)
    assert whole["sequences"] == 4
    assert whole["seq_length"] == 8
    assert digest(*sequences[order].split(1)) == whole
    assert digest(*sequences[order].to(torch.int32).split(3)) == whole
    changed = sequences.clone()
    changed[2, 5] += 1
    assert digest(changed)["tokens"] != whole["tokens"]
    assert digest(sequences[:3])["tokens"] != whole["tokens"]
    assert digest(sequences.view(8, 4))["tokens"] != whole["tokens"]
