"""A plain Trainer with a LeapModule and text is all that Python needs."""

import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from conftest import Run
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.trainer.connectors import data_connector
from tiny import tiny_folder, tiny_model

import leap_pl
from leap_pl import LeapModule, MaskSet, TextDataModule, UserError
from leap_pl.callbacks import Checkpoints, MaskExport, ValidationTimes
from leap_pl.cli.process import MEANT
from leap_pl.masks.bits import PackedMasks
from leap_pl.prior import Prior
from leap_pl.training.finite import NonFiniteError
from leap_pl.training.optimizers import PackedAdamW


def trainer(**settings: Any) -> L.Trainer:
    """Nothing around learning: no callback, no log, no checkpoint."""
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return L.Trainer(accelerator="cpu", **{**quiet, **settings})


def data(text_file: Path, **settings: Any) -> TextDataModule:
    given = {"seq_length": 32, "batch_size": 2, "validation_sequences": 4}
    return TextDataModule(text=str(text_file), **{**given, **settings})


def test_it_learns_what_the_command_line_learns_bit_for_bit(
    finished: Run, model_folder: Path, text_file: Path, tmp_path: Path, eager: None
) -> None:
    module = LeapModule(str(model_folder), prior=Prior(method="magnitude", cache_dir=str(tmp_path)), dtype="float32")
    settings = {"max_steps": 6, "accumulate_grad_batches": 2, "gradient_clip_val": 1.0}
    trainer(**settings).fit(module, data(text_file))
    learned = module.mask_set()
    assert module.prior is not None
    assert isinstance(module.prior.masks, PackedMasks)  # held to the end of the run
    exported = MaskSet.load(finished.mask)
    assert sorted(learned.masks) == sorted(exported.masks)
    for name, mask in exported.masks.items():
        assert torch.equal(learned.masks[name], mask), name
    stored = torch.load(finished.checkpoint, weights_only=True)["state_dict"]
    for name, gate in module.gates.items():
        assert torch.equal(gate.logits, stored[f"logits.{name}"]), name


def test_text_has_the_tokenizer_of_the_module_that_it_is_used_with(
    model_folder: Path, text_file: Path, tmp_path: Path, eager: None
) -> None:
    text = data(text_file, validation_sequences=0)
    with pytest.raises(UserError, match="tokenizer is not set"):
        text.tokenizer  # noqa: B018
    other = tiny_folder(tmp_path / "other", seed=1)
    for folder in (model_folder, other):
        trainer(max_steps=1).fit(LeapModule(str(folder), prior=Prior(method="none")), text)
        assert text.tokenizer_name == str(folder)
        assert text.tokenizer.name_or_path == str(folder)


def test_a_tokenizer_that_is_named_stays(model_folder: Path, text_file: Path, tmp_path: Path, eager: None) -> None:
    other = tiny_folder(tmp_path / "other", seed=1)
    text = data(text_file, tokenizer=str(other), validation_sequences=0)
    trainer(max_steps=1).fit(LeapModule(str(model_folder), prior=Prior(method="none")), text)
    assert text.tokenizer_name == str(other)


@pytest.mark.parametrize("recomputing", [True, False])
def test_a_run_warns_of_nothing_and_learns_in_eval_mode(
    recomputing: bool, model_folder: Path, text_file: Path, eager: None, recwarn: pytest.WarningsRecorder
) -> None:
    """But for what is recomputed: train mode makes some models random."""
    settings = {"activation_checkpointing": recomputing, "warmup_steps": 0}
    module = LeapModule(str(model_folder), prior=Prior(method="none"), **settings)
    training: list[str] = []
    step = module.training_step

    def note(batch: Any, batch_idx: int) -> Any:
        assert module.model is not None
        training.extend(name for name, one in module.model.named_modules() if one.training)
        return step(batch, batch_idx)

    module.training_step = note  # type: ignore[method-assign]
    data_connector.warning_cache.clear()  # Lightning gives each of these once in a process
    trainer(max_steps=1).fit(module, data(text_file))
    blocks = {"model.layers.0", "model.layers.1"}
    assert {name for name in training if "layers" in name} == (blocks if recomputing else set())
    told = [str(warning.message) for warning in recwarn]
    assert not [words for words in told if not any(re.match(pattern, words) for pattern in MEANT)]


def test_a_run_that_is_refused_leaves_the_earlier_ones_files(
    finished: Run, model_folder: Path, text_file: Path, tmp_path: Path, eager: None
) -> None:
    folder = shutil.copytree(finished.checkpoint.parent, tmp_path / "checkpoints", symlinks=True)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    module = LeapModule(str(model_folder), prior=Prior(method="wanda", sequences=2, cache_dir=str(tmp_path)))
    given = trainer(max_steps=2, callbacks=[MaskExport(), Checkpoints(dirpath=str(folder))], enable_checkpointing=True)
    with pytest.raises(UserError, match="holds another run"):
        given.fit(module, data(text_file))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("refused", [True, False])
def test_gradients_of_a_fused_optimizer_that_are_scaled_cannot_be_clipped(
    refused: bool, model_folder: Path, text_file: Path, tmp_path: Path, eager: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning refuses it too, at the first step, after the prior was made."""
    module = LeapModule(
        str(model_folder),
        prior=Prior(method="none"),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, fused=refused),
    )
    given = trainer(max_steps=1, gradient_clip_val=1.0)
    monkeypatch.setattr(type(given), "precision", "16-mixed")
    monkeypatch.setattr(module, "_fitting", lambda: True)
    module.trainer = given
    if refused:
        with pytest.raises(UserError, match=r"cannot be clipped.*--model\.optimizer\.fused false"):
            module.configure_model()
    else:
        module.configure_model()
    assert (module.model is None) == refused


@pytest.mark.parametrize("precision", ["bf16-true", "32-true"])
def test_positions_are_those_of_the_base_model_in_every_precision(
    precision: Any, model_folder: Path, text_file: Path, eager: None
) -> None:
    """transformers holds their frequencies in float32; rounded, they are another model's."""
    module = LeapModule(str(model_folder), prior=Prior(method="none"), dtype="float32")
    trainer(max_steps=1, precision=precision).fit(module, data(text_file, validation_sequences=0))
    assert module.model is not None
    found, expected = module.model.model.rotary_emb.inv_freq, tiny_model().model.rotary_emb.inv_freq
    types = {"bf16-true": torch.bfloat16, "32-true": torch.float32}
    assert module.model.model.norm.weight.dtype == types[precision]
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_the_run_is_resumed_without_naming_the_tokenizer(
    model_folder: Path, text_file: Path, tmp_path: Path, eager: None
) -> None:
    def learned(steps: int, **settings: Any) -> LeapModule:
        module = LeapModule(str(model_folder), prior=Prior(method="none"))
        given = L.Trainer(accelerator="cpu", max_steps=3, logger=False, enable_progress_bar=False,
                          enable_model_summary=False, callbacks=[Stop(steps)], default_root_dir=tmp_path)  # fmt: skip
        given.fit(module, data(text_file, validation_sequences=0), **settings)
        if steps < 3:
            given.save_checkpoint(tmp_path / "stopped.ckpt")
        return module

    learned(1)
    resumed, whole = learned(3, ckpt_path=tmp_path / "stopped.ckpt", weights_only=True), learned(3)
    for name, gate in whole.gates.items():
        assert torch.equal(gate.logits, resumed.gates[name].logits), name


class Stop(L.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.step


@pytest.mark.parametrize("name", ["leap_pl.data.TextDataModule", "leap_pl.training.datamodule.TextDataModule"])
def test_configs_name_the_class_where_it_was_and_where_it_is(name: str) -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(L.LightningDataModule, "data")
    given = parser.parse_string(f"data: {{class_path: {name}, init_args: {{text: a.jsonl, seq_length: 8}}}}")
    assert type(parser.instantiate_classes(given).data) is leap_pl.TextDataModule


def test_numbers_that_break_end_the_run_where_no_callback_looks(
    model_folder: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch, eager: None
) -> None:
    """On a device, where each look makes the host wait, they are looked at together."""
    step = LeapModule.training_step
    monkeypatch.setattr(LeapModule, "looks_later", True)
    monkeypatch.setattr(LeapModule, "training_step", lambda self, *given: step(self, *given) * float("nan"))
    module = LeapModule(str(model_folder), prior=Prior(method="none"))
    with pytest.raises(NonFiniteError, match="at step 0"):
        trainer(max_steps=8, log_every_n_steps=2).fit(module, data(text_file, validation_sequences=0))
    assert module.trainer.global_step == 2


def test_losses_that_break_end_a_run_whose_scaler_skips_its_steps(
    model_folder: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch, eager: None
) -> None:
    """With 16-mixed on a GPU infinite gradients are no failure, and a loss that is not finite is one."""
    step = LeapModule.training_step

    def breaks(self: LeapModule, *given: Any) -> Any:
        loss = step(self, *given)
        self.terms["lm"] = self.terms["lm"] * float("nan")
        return loss

    monkeypatch.setattr(LeapModule, "looks_later", True)
    monkeypatch.setattr(L.Trainer, "precision", property(lambda self: "16-mixed"))
    monkeypatch.setattr(LeapModule, "training_step", breaks)
    module = LeapModule(str(model_folder), prior=Prior(method="none"))
    with pytest.raises(NonFiniteError, match="lm = nan"):
        trainer(max_steps=8, log_every_n_steps=2).fit(module, data(text_file, validation_sequences=0))
    assert module.trainer.global_step == 2
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, torch.inf)
    module.on_before_optimizer_step(module.trainer.optimizers[0])
    assert module.gradient_norm is None


def test_one_rank_alone_takes_the_mask_after_a_run_with_a_scaler(
    model_folder: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch, eager: None
) -> None:
    """A collective would wait for the others, which do not call."""
    monkeypatch.setattr(L.Trainer, "precision", property(lambda self: "16-mixed"))
    module = LeapModule(str(model_folder), prior=Prior(method="none"))
    called: list[dict[str, float]] = []
    monkeypatch.setattr(LeapModule, "mean_over_ranks", lambda self, values: called.append(values) or values)
    fitting = trainer(max_steps=2, log_every_n_steps=1)
    fitting.fit(module, data(text_file, validation_sequences=0))
    assert called
    called.clear()
    assert module.mask_set().sparsity == pytest.approx(0.5, abs=0.01)
    assert not called


def test_a_compiled_module_learns_as_the_module_itself(model_folder: Path, text_file: Path, eager: None) -> None:
    masks = []
    for wrap in (False, True):
        module = LeapModule(str(model_folder), dtype="float32", prior=Prior(method="none"))
        given = torch.compile(module, backend="eager") if wrap else module
        with pytest.warns(UserWarning, match=r"torch\.compile of a LeapModule is taken off") if wrap else nullcontext():
            trainer(max_steps=2).fit(given, data(text_file))  # type: ignore[arg-type]
        masks.append(module.mask_set().digest_of_bits())
    assert masks[0] == masks[1]


def test_gradients_that_no_scaler_can_unscale_are_refused(
    model_folder: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch, eager: None
) -> None:
    monkeypatch.setattr(L.Trainer, "precision", property(lambda self: "16-mixed"))
    module = LeapModule(
        str(model_folder),
        prior=Prior(method="none"),
        logits_dtype="bfloat16",
        optimizer=lambda parameters: PackedAdamW(parameters, lr=1e-3),
    )
    with pytest.raises(UserError, match=r"cannot unscale those of bfloat16 logits .*Use --trainer\.precision bf16"):
        trainer(max_steps=1).fit(module, data(text_file, validation_sequences=0))


@pytest.mark.parametrize(("rank", "ranks", "expected"), [(0, 1, [0, 1, 0, 1]), (1, 3, [1, 4, 1, 4])])
def test_every_micro_batch_of_a_step_has_noise_of_its_own(
    rank: int,
    ranks: int,
    expected: list[int],
    model_folder: Path,
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    eager: None,
) -> None:
    """On every rank, numbered over all of them; the step is part of the noise's key too."""
    found: list[int] = []
    step = LeapModule.training_step

    def recording(self: LeapModule, *given: Any) -> Any:
        loss = step(self, *given)
        found.append(self.state.micro_batch)
        return loss

    monkeypatch.setattr(LeapModule, "training_step", recording)
    monkeypatch.setattr("leap_pl.training.module.data_rank", lambda trainer: (rank, ranks))
    module = LeapModule(str(model_folder), prior=Prior(method="none"))
    trainer(max_steps=2, accumulate_grad_batches=2).fit(module, data(text_file, validation_sequences=0))
    assert found == expected


@pytest.mark.parametrize(("given", "spread"), [(ValidationTimes(), False), (ValidationTimes(spread=True), True)])
def test_validations_are_when_the_trainer_says(
    given: ValidationTimes, spread: bool, model_folder: Path, text_file: Path, eager: None
) -> None:
    """Unless the callback is asked to spread them."""

    class Steps(L.Callback):
        def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            found.append(trainer.global_step)

    found: list[int] = []
    module, own = LeapModule(str(model_folder), prior=Prior(method="none")), {"check_val_every_n_epoch": None}
    run = trainer(max_steps=10, callbacks=[given, Steps()], val_check_interval=4, num_sanity_val_steps=0, **own)
    run.fit(module, data(text_file))
    assert found[:2] != [4, 8] if spread else found == [4, 8, 10]


def test_other_callbacks_act_at_validations_that_are_spread(
    model_folder: Path, text_file: Path, tmp_path: Path, eager: None
) -> None:
    module = LeapModule(str(model_folder), prior=Prior(method="none"))
    best = ModelCheckpoint(tmp_path, monitor="perplexity/hard", save_top_k=-1, filename="{step}")
    given = trainer(max_steps=10, callbacks=[ValidationTimes(), best], enable_checkpointing=True)
    given.fit(module, data(text_file))
    assert len(list(tmp_path.glob("*.ckpt"))) > 1
    early = trainer(max_steps=10, callbacks=[EarlyStopping("perplexity/hard"), ValidationTimes()])
    with pytest.raises(UserError, match="List it after ValidationTimes"):
        early.fit(LeapModule(str(model_folder), prior=Prior(method="none")), data(text_file))
    decided = EarlyStopping("perplexity/hard", check_on_train_epoch_end=False)
    module = LeapModule(str(model_folder), prior=Prior(method="none"))
    trainer(max_steps=2, callbacks=[decided, ValidationTimes()]).fit(module, data(text_file))
