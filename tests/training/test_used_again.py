"""From Python: objects that are used twice, and trainers, batches and schedules that a run cannot have."""

import copy
import csv
import pickle
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from conftest import Run
from lightning.pytorch.callbacks import GradientAccumulationScheduler, StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from ranks import run_ranks
from tiny import byte_tokenizer, tiny_model
from torch.utils.data import DataLoader

from leap_pl import LeapModule, MaskSet, TextDataModule, UserError
from leap_pl.base_model import weights as weights_room
from leap_pl.base_model.loading import load_model
from leap_pl.base_model.weights import model_fingerprint
from leap_pl.callbacks import Checkpoints, MaskExport, RunReport, SparsityLogger
from leap_pl.checkpoints.identity import KEY, read_identity
from leap_pl.cli.resume import settings_of
from leap_pl.data.source import TextSource
from leap_pl.gates import BernoulliGate, detach
from leap_pl.losses.objective import Objective
from leap_pl.oneshot.prune import prune
from leap_pl.prior import Prior
from leap_pl.training.batch import input_ids_of
from leap_pl.training.run_length import check_run_length
from leap_pl.training.trainer_checks import check_trainer
from leap_pl.training.validation import Validation

pytestmark = pytest.mark.usefixtures("eager")

QUIET = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)


def trainer(*callbacks: L.Callback, **settings: Any) -> L.Trainer:
    given = {**QUIET, **settings}
    if any(isinstance(callback, Checkpoints) for callback in callbacks):
        del given["enable_checkpointing"]
    return L.Trainer(accelerator="cpu", callbacks=list(callbacks), **given)


def data(text: Path | str, **settings: Any) -> TextDataModule:
    return TextDataModule(text=str(text), **{"seq_length": 32, "batch_size": 2, "validation_sequences": 2, **settings})


@pytest.fixture
def module(model_folder: Path, tmp_path: Path) -> LeapModule:
    return LeapModule(
        str(model_folder), dtype="float32", prior=Prior(method="magnitude", cache_dir=str(tmp_path / "p"))
    )


def again(module: LeapModule) -> LeapModule:
    return LeapModule(module.base_model, dtype="float32", prior=module.run_prior.settings)


# -- modules and trainers -----------------------------------------------------------------------------------


def test_a_module_that_was_used_does_not_start_silently_without_its_prior(module: LeapModule, text_file: Path) -> None:
    """A validation loads the model, without a prior, and a fit would go on from there."""
    text = data(text_file)
    trainer().validate(module, text, verbose=False)
    with pytest.raises(UserError, match=r"was validated, fitted or loaded before.*Make a new LeapModule, or resume"):
        trainer(max_steps=1).fit(module, text)
    fresh = again(module)
    trainer(max_steps=1).fit(fresh, text)
    with pytest.raises(UserError, match=r"was validated, fitted or loaded before"):
        trainer(max_steps=1).fit(fresh, text)


def test_a_fit_that_failed_before_its_first_step_may_be_repeated(module: LeapModule, text_file: Path) -> None:
    """Out of memory, for example: the module is at its prior still."""
    expected = again(module)
    trainer(max_steps=1).fit(expected, data(text_file))
    real = module.training_step

    def fail(batch: Any, batch_idx: int) -> Any:
        raise torch.OutOfMemoryError

    module.training_step = fail  # type: ignore[method-assign]
    with pytest.raises(torch.OutOfMemoryError):
        trainer(max_steps=1).fit(module, data(text_file))
    module.training_step = real  # type: ignore[method-assign]
    trainer(max_steps=1).fit(module, data(text_file))
    for name, gate in module.gates.items():
        assert torch.equal(gate.logits, expected.gates[name].logits)


def test_a_trainer_that_was_used_is_refused(module: LeapModule, text_file: Path) -> None:
    """Its step goes on, but text, optimizer and learning rate would begin again, or nothing would be learned."""
    used = trainer(max_steps=2)
    used.fit(module, data(text_file))
    with pytest.raises(UserError, match=r"this trainer is at step 2 of an earlier fit.*Make a new Trainer, or resume"):
        used.fit(again(module), data(text_file))


def test_a_used_module_and_trainer_resume(module: LeapModule, text_file: Path, tmp_path: Path) -> None:
    saved = Checkpoints(str(tmp_path / "run"), every_n_train_steps=1, save_top_k=-1)
    text = data(text_file)
    trainer(saved, max_steps=2).fit(module, text)
    first = min((tmp_path / "run").glob("*step=1*.ckpt"), default=None) or min((tmp_path / "run").glob("*.ckpt"))
    learned = {name: gate.logits.detach().clone() for name, gate in module.gates.items()}
    trainer(max_steps=2).fit(module, text, ckpt_path=str(first))
    for name, gate in module.gates.items():
        assert torch.equal(gate.logits, learned[name])


def test_a_copy_runs_its_own_model(module: LeapModule, text_file: Path) -> None:
    trainer(max_steps=1).fit(module, data(text_file))
    ids = torch.arange(24).view(1, -1)
    copied = copy.deepcopy(module)
    with torch.no_grad():
        for gate in copied.gates.values():
            gate.logits.neg_()
        for one in (copied, module):
            one.choose_hard_masks()
        with copied.state.passing("hard"), module.state.passing("hard"):
            own = copied.head(copied.states(ids).flatten(0, 1))
            expected = copied.model(input_ids=ids, use_cache=False).logits[0]
            other = module.head(module.states(ids).flatten(0, 1))
    torch.testing.assert_close(own, expected)
    assert not torch.allclose(own, other, atol=1e-2)


def test_a_mask_before_a_fit_is_one_line(module: LeapModule) -> None:
    with pytest.raises(UserError, match="has no mask before a fit"):
        module.mask_set()


def test_what_a_mask_says_of_its_run_outlasts_a_validation(module: LeapModule, text_file: Path, tmp_path: Path) -> None:
    trainer(max_steps=2, accumulate_grad_batches=2, gradient_clip_val=0.7).fit(module, data(text_file))
    before = module.mask_set().provenance
    assert (before.config["steps"], before.config["max_steps"]) == (2, 2)
    other = tmp_path / "other.jsonl"
    other.write_text(text_file.read_text())
    trainer().validate(module, data(other), verbose=False)
    assert module.mask_set().provenance == before


def test_what_a_mask_says_after_other_checkpoints_and_refused_fits(
    module: LeapModule, text_file: Path, tmp_path: Path
) -> None:
    saved = Checkpoints(str(tmp_path / "run"), every_n_train_steps=1, save_top_k=-1)
    text = data(text_file)
    trainer(saved, max_steps=2).fit(module, text)
    before = module.mask_set().provenance
    with pytest.raises(UserError, match="loaded before"):
        trainer(max_steps=7).fit(module, text)
    assert module.mask_set().provenance == before
    first = min((tmp_path / "run").glob("*step=1*.ckpt"))
    trainer().validate(module, text, ckpt_path=str(first), verbose=False)
    assert module.mask_set().provenance.config.get("steps") != 2


def test_an_optimizer_may_look_at_its_parameters(model_folder: Path, text_file: Path) -> None:
    for make in (
        lambda parameters: torch.optim.AdamW([{"params": parameters, "lr": 1e-3}]),
        lambda parameters: torch.optim.AdamW([one for one in parameters if one.requires_grad], lr=1e-3),
    ):
        module = LeapModule(str(model_folder), dtype="float32", prior=Prior(method="none"), optimizer=make)
        trainer(max_steps=1).fit(module, data(text_file))
        assert module.mask_set().total


def test_callbacks_of_two_runs_tell_of_one_each(module: LeapModule, text_file: Path, tmp_path: Path) -> None:
    saved, curves, report = Checkpoints(str(tmp_path / "first")), SparsityLogger(every_n_steps=1), RunReport()
    trainer(saved, curves, report, max_steps=2).fit(module, data(text_file))
    assert curves.last_bits
    newest = (tmp_path / "first" / "last.ckpt").resolve()
    assert newest.exists()
    second = again(module)
    with pytest.raises(UserError, match="holds another run"):
        trainer(saved, curves, report, max_steps=2).fit(second, data(text_file))
    assert (tmp_path / "first" / "last.ckpt").resolve() == newest
    curves.setup(trainer(), second, "fit")
    assert (curves.last_bits, curves.prior_bits, curves.last_step) == ({}, {}, -1)
    report.setup(trainer(), second, "fit")
    assert report.state_dict() == {"start": None}


def test_a_plan_is_told_once_after_a_fit_that_failed(module: LeapModule, tmp_path: Path, capsys: Any) -> None:
    text = tmp_path / "none.jsonl"
    with pytest.raises(UserError):
        trainer(RunReport(), max_steps=1).fit(module, data(text))
    assert len(module.when_loaded) <= 1
    text.write_text('{"text": "one two three four five six seven eight nine ten eleven twelve"}\n' * 20)
    capsys.readouterr()
    trainer(RunReport(), max_steps=1).fit(module, data(text, validation_sequences=0))
    assert module.when_loaded == []


# -- text ---------------------------------------------------------------------------------------------------


def test_settings_of_text_that_change_after_its_use_are_used(
    model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    text = data(text_file, tokenizer=str(model_folder))
    before = next(iter(text.stream.blocks())).tokens
    text.seq_length = 16
    assert next(iter(text.stream.blocks())).tokens == before[:16]
    other = tmp_path / "other.txt"
    other.write_text("something else " * 40)
    text.text = str(other)
    assert next(iter(text.stream.blocks())).tokens == byte_tokenizer()("something else s")["input_ids"]
    text.tokenizer_name = byte_tokenizer(prefix=1)
    assert next(iter(text.stream.blocks())).tokens == [257, *byte_tokenizer()("something else ")["input_ids"]]


def test_a_tokenizer_that_is_named_later_stays(module: LeapModule, model_folder: Path, text_file: Path) -> None:
    text = data(text_file, validation_sequences=0)
    text.trainer = trainer(max_steps=1)
    text.trainer.strategy.connect(module)
    text.setup("validate")
    assert text.tokenizer_name == str(model_folder)
    text.tokenizer_name = own = byte_tokenizer(prefix=1)
    text.setup("validate")
    assert text.tokenizer is own


def test_another_tokenizer_is_not_trusted_with_the_model(
    text_file: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is it asked for the model's revision."""
    asked = []

    def loaded(name: str, revision: str | None, *, trust_remote_code: bool) -> Any:
        asked.append((name, revision, trust_remote_code))
        return byte_tokenizer()

    monkeypatch.setattr("leap_pl.training.datamodule.loaded_tokenizer", loaded)
    module = LeapModule("some/model", trust_remote_code=True, revision="abc", prior=Prior(method="none"))
    text = data(text_file, validation_sequences=0)
    text.trainer = trainer(max_steps=1)
    text.trainer.strategy.connect(module)
    text.setup("validate")
    assert text.tokenizer is not None
    text.tokenizer_name = "some/tokenizer"
    text.setup("validate")
    assert text.tokenizer is not None
    assert asked == [("some/model", "abc", True), ("some/tokenizer", None, False)]
    own = data(text_file, tokenizer_revision="typed")
    own.tokenizer_name = "some/tokenizer"
    assert own.tokenizer_revision == "typed"


def test_a_stored_revision_is_that_of_the_stored_model_alone(finished: Run, model_folder: Path, tmp_path: Path) -> None:
    checkpoint = torch.load(finished.checkpoint, weights_only=True)
    checkpoint[KEY]["learned_with"]["model.revision"] = "abc"
    torch.save(checkpoint, tmp_path / "of-the-hub.ckpt")
    copied = shutil.copytree(model_folder, tmp_path / "copy")
    assert LeapModule.load_from_checkpoint(tmp_path / "of-the-hub.ckpt").revision == "abc"
    module = LeapModule.load_from_checkpoint(tmp_path / "of-the-hub.ckpt", base_model=str(copied))
    assert module.revision is None
    identity = read_identity(checkpoint)
    for name, revision in ((str(model_folder), "abc"), (None, "abc"), (str(copied), None)):
        taken, _ = settings_of(identity, checkpoint, "it", [], name)
        assert taken.get("model.revision") == revision


def test_the_tokenizer_of_a_model_that_is_a_local_copy_now(module: LeapModule, text_file: Path) -> None:
    """A resumed run still has the revision that the model had on the hub."""
    text = data(text_file, tokenizer=module.base_model, tokenizer_revision="main")
    with pytest.raises(UserError, match="of a repository of the hub"):
        _ = text.tokenizer
    text.trainer = trainer(max_steps=1)
    text.trainer.strategy.connect(module)
    assert text.tokenizer.vocab_size == byte_tokenizer().vocab_size


@pytest.mark.parametrize("targets", [None, ["re:.*q_proj", "re:.*c_attn"]])
def test_a_run_of_an_earlier_version_that_gated_other_weights_resumes(
    targets: list[str] | None, model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made() -> LeapModule:
        return LeapModule(str(model_folder), dtype="float32", targets=targets, prior=Prior(method="none"))

    saved = Checkpoints(str(tmp_path / "run"), every_n_train_steps=1, save_top_k=-1)
    with monkeypatch.context() as earlier:  # routers were gated, and targets that match nothing accepted
        earlier.setattr(weights_room, "_check_each_matches", lambda *_: None)
        earlier.setattr(weights_room, "_is_projection", lambda weight, *_: "up_proj" in weight.name)
        trainer(saved, max_steps=2).fit(made(), data(text_file))
    path = tmp_path / "run" / "step=1.ckpt"
    if targets is None:
        with pytest.raises(UserError, match=r"gates other weights .* what LeapModule\.load_from_checkpoint returns"):
            trainer(max_steps=2).fit(made(), data(text_file), ckpt_path=str(path))
    with pytest.raises(UserError, match="gates other weights"):
        LeapModule.load_from_checkpoint(path, targets=["re:.*down_proj"])
    for run in (trainer(max_steps=2).fit, trainer().validate):
        module = LeapModule.load_from_checkpoint(path)
        run(module, data(text_file), ckpt_path=str(path))
        assert {name.split(".")[-2] for name in module.gates} == {"up_proj" if targets is None else "q_proj"}


def test_a_path_is_a_text(text_file: Path) -> None:
    assert TextSource.open(text_file).shards.files == [text_file]  # type: ignore[arg-type]


def test_paths_are_names(module: LeapModule, model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    """Checkpoints hold plain values."""
    prior = Prior(method="magnitude", cache_dir=tmp_path / "priors")  # type: ignore[arg-type]
    learning = LeapModule(model_folder, dtype="float32", prior=prior, seed=np.int64(3))  # type: ignore[arg-type]
    text = TextDataModule(text=[text_file], seq_length=16, validation_text=text_file, seed=np.int64(4))  # type: ignore
    path = tmp_path / "step.ckpt"
    run = trainer(max_steps=1)
    run.fit(learning, text)
    run.save_checkpoint(path)
    loaded = LeapModule.load_from_checkpoint(path)
    assert loaded.state.seed == 3
    assert (loaded.base_model, loaded.run_prior.settings.cache_dir) == (str(model_folder), str(tmp_path / "priors"))
    assert (text.text, text.validation_text) == ([str(text_file)], str(text_file))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            lambda text: TextDataModule(text=text, separator="newline"),
            r"separator is 'newline'; give one of end_token, bl",
        ),
        (lambda text: TextDataModule(text=text, bos="yes"), "bos is 'yes'; give one of every, first, none"),
        (lambda text: setattr(TextDataModule(text=text), "bos", True), "bos is True; give one of every"),
        (lambda text: Objective(budget_scope="layers"), "budget_scope is 'layers'; give global or layer"),
        (lambda text: fitted(text, split=3), r"data.split is 3: .*valid string. A checkpoint could not hold it"),
        (lambda text: fitted(text, tokenizer_revision=object()), "data.tokenizer_revision is not a plain value"),
    ],
)
def test_what_a_checkpoint_could_not_hold_is_refused_before_the_run(make: Any, says: str, text_file: Path) -> None:
    with pytest.raises(UserError, match=says):
        make(str(text_file))


def fitted(text: str, **settings: Any) -> None:
    module = LeapModule(text, prior=Prior(method="none"))  # no model is loaded
    trainer(max_steps=1).fit(module, TextDataModule(byte_tokenizer(), text, seq_length=16, **settings))  # type: ignore[arg-type]


def test_batches_of_other_loaders(module: LeapModule) -> None:
    ids = torch.arange(64).view(4, 16)
    module = LeapModule(module.base_model, dtype="float32", prior=Prior(method="none"))
    trainer(max_steps=2).fit(module, DataLoader(ids, batch_size=2))
    for wrong in ([ids], {"tokens": ids}, 3):
        with pytest.raises(UserError, match=r"a micro-batch is a (list|dict|int); give tokens"):
            input_ids_of(wrong)
    from transformers import BatchEncoding

    ones = torch.ones_like(ids)
    assert input_ids_of(BatchEncoding({"input_ids": ids, "attention_mask": ones, "labels": ids})) is ids
    padded, hidden = ones.clone(), ids.clone()
    padded[0, -1], hidden[0, 0] = 0, -100
    for wrong in ({"attention_mask": padded}, {"labels": hidden}):
        with pytest.raises(UserError, match=r"has padding.*Pack documents"):
            input_ids_of({"input_ids": ids, **wrong})
    input_ids_of({"input_ids": ids, "attention_mask": ones})
    input_ids_of({"input_ids": ids, "attention_mask": torch.zeros(4, 1, 16, 16)})  # an additive one
    rows = [{"input_ids": row, "attention_mask": one} for row, one in zip(ids, padded, strict=True)]
    with pytest.raises(UserError, match="has padding"):
        trainer(max_steps=1).fit(again(module), DataLoader(rows, batch_size=2))


def test_own_data_has_no_text_for_a_prior(module: LeapModule, model_folder: Path) -> None:
    class Own(L.LightningDataModule):
        validation_split, separator, seed = 0.05, "\n\n", None  # of its own, and not those of TextDataModule

        def train_dataloader(self) -> Any:
            return DataLoader(torch.arange(64).view(4, 16), batch_size=2)

    trainer(max_steps=1).fit(LeapModule(str(model_folder), prior=Prior(method="none")), Own())
    module = LeapModule(str(model_folder), dtype="float32", prior=Prior(method="wanda", cache_dir=None))
    with pytest.raises(UserError, match=r"needs calibration text, and Own has no stream of it. Give fit a TextDataM"):
        trainer(max_steps=1).fit(module, Own())


# -- what a run cannot have ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("callback", "remedy"),
    [
        (GradientAccumulationScheduler({0: 2}), "Set --trainer.accumulate_grad_batches"),
        (StochasticWeightAveraging(swa_lrs=1e-3), "Leave it out"),
    ],
)
def test_callbacks_that_change_the_run(callback: L.Callback, remedy: str, module: LeapModule, text_file: Path) -> None:
    with pytest.raises(UserError, match=rf"{type(callback).__name__} does not suit a run of leap_pl. {remedy}"):
        trainer(callback, max_steps=1).fit(module, data(text_file))


def test_precisions_that_replace_layers_and_copies_of_the_process() -> None:
    fitting = trainer(max_steps=1)
    check_trainer(fitting)
    plugin = type("TransformerEnginePrecision", (MixedPrecision,), {"__init__": lambda self: None})()
    fitting.strategy._precision_plugin = plugin
    with pytest.raises(UserError, match="TransformerEnginePrecision replaces the linear layers, which have the gates"):
        check_trainer(fitting)
    with pytest.raises(UserError, match=r"DDPStrategy by fork or spawn learns in copies of this process"):
        check_trainer(trainer(max_steps=1, strategy="ddp_fork", devices=2))
    check_trainer(L.Trainer(accelerator="cpu", barebones=True, max_steps=1))


def test_schedules_of_each_group_and_by_a_metric(model_folder: Path, text_file: Path) -> None:
    def one(step: int) -> float:
        return 1.0

    given: dict[str, Any] = {"dtype": "float32", "prior": Prior(method="none"), "train_weights": "kept"}
    pair = partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=[one, one])
    module = LeapModule(str(model_folder), lr_scheduler=pair, **given)
    trainer(max_steps=1).fit(module, data(text_file))
    assert module.mask_set().sparsity == pytest.approx(0.5, abs=1e-3)
    single = partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=[one])
    with pytest.raises(UserError, match=r"model.lr_scheduler does not take its settings: Expected 2 lr_lambdas"):
        trainer(max_steps=1).fit(LeapModule(str(model_folder), lr_scheduler=single, **given), data(text_file))
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau
    with pytest.raises(UserError, match="ReduceLROnPlateau needs a metric after every step"):
        trainer(max_steps=1).fit(LeapModule(str(model_folder), lr_scheduler=plateau, **given), data(text_file))


class Power(BernoulliGate):
    """A gate with an argument that its settings do not have."""

    def __init__(self, weight: Any, state: Any, power: float = 1.0) -> None:
        super().__init__(weight, state)
        self.power = power


def test_a_gate_whose_settings_lack_an_argument(model_folder: Path, text_file: Path) -> None:
    module = LeapModule(str(model_folder), gate=partial(Power, power=3.0), dtype="float32", prior=Prior(method="none"))
    with pytest.raises(TypeError, match=r"Power.settings\(\) lacks power"):
        trainer(max_steps=1).fit(module, data(text_file))


def test_pruning_a_pruned_model_says_so() -> None:
    model = tiny_model()
    blocks = torch.randint(0, 256, (3, 24), generator=torch.Generator().manual_seed(0))
    masks: MaskSet = prune(model, blocks, method="wanda", pattern="2:4", progress=False).masks
    assert masks.sparsity == 0.5
    with pytest.warns(UserWarning, match=r"is sparse already: 50.0% of the weights to prune are 0.*load that again"):
        prune(model, blocks, method="wanda", pattern=0.7, progress=False)
    with pytest.raises(UserError, match="is not n:m"):
        prune(tiny_model(), blocks, pattern="half", progress=False)


def test_pickles_have_no_closures(module: LeapModule, text_file: Path) -> None:
    module.make_optimizer = partial(torch.optim.AdamW, lr=1e-3)
    assert pickle.loads(pickle.dumps(module)).base_model == module.base_model


def test_a_gated_model_is_not_saved_as_a_model(module: LeapModule, text_file: Path, tmp_path: Path) -> None:
    trainer(max_steps=1).fit(module, data(text_file))
    assert module.model is not None
    with pytest.raises(UserError, match=r"this model has gates, .* leap_pl export --mask FILE"):
        module.model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    copied = copy.deepcopy(module)
    detach(copied.weights)
    copied.model.save_pretrained(tmp_path / "out")
    assert model_fingerprint(load_model(str(tmp_path / "out"))) == module.fingerprint


def test_a_module_inside_another(module: LeapModule, text_file: Path) -> None:
    class Around(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def configure_optimizers(self) -> Any:
            return self.inner.configure_optimizers()

        def training_step(self, batch: Any, index: int) -> Any:
            return self.inner.training_step(batch, index)

    with pytest.raises(UserError, match=r"there is nothing to learn: no gates are attached\. A LeapModule must be"):
        trainer(max_steps=1).fit(Around(), data(text_file, tokenizer=module.base_model))


def test_curves_have_no_point_of_a_part_of_the_text(module: LeapModule, text_file: Path, tmp_path: Path) -> None:
    """A sanity check reads two batches, unless it is told to read all."""
    for steps, first in ((2, 1), (-1, 0)):
        logger = CSVLogger(tmp_path, name=str(steps))
        often = {"val_check_interval": 1, "check_val_every_n_epoch": None}
        run = trainer(logger=logger, max_steps=1, num_sanity_val_steps=steps, **often)
        learning = again(module)
        run.fit(learning, data(text_file, validation_sequences=8))
        with (Path(logger.log_dir) / "metrics.csv").open(encoding="utf-8") as file:
            points = [row for row in csv.DictReader(file) if row["perplexity/hard"]]
        assert [int(row["step"]) for row in points] == [*range(first, 2)]
        assert len({row["perplexity/dense"] for row in points}) == 1


def test_a_validation_sums_in_full_precision_whatever_the_trainers_is() -> None:
    """Lightning converts a whole module to the data type of a *-true precision."""
    torch.manual_seed(0)
    head, whole = torch.nn.Linear(8, 50), Validation()
    half = Validation().to(torch.bfloat16).bfloat16().half()
    for validation in (whole, half):
        validation.begin()
    for _ in range(300):
        hidden, targets = torch.randn(4, 32, 8), torch.randint(0, 50, (4, 32))
        for validation in (whole, half):
            validation.update("hard", hidden, targets, head, 64)
    assert half.hard_metric.compute() == whole.hard_metric.compute()
    assert half.hard_metric.compute().dtype == torch.float32


def test_a_mask_export_without_checkpoints_on_two_ranks(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    run_ranks(
        2, exported_by_two, str(model_folder), str(text_file), str(tmp_path), folder=tmp_path / "said", seconds=90
    )
    assert [path.name for path in tmp_path.rglob("mask.safetensors")] == ["mask.safetensors"]


def exported_by_two(rank: int, model: str, text: str, folder: str) -> None:
    module = LeapModule(model, dtype="float32", prior=Prior(method="magnitude", cache_dir=f"{folder}/p"))
    made = trainer(MaskExport(), max_steps=1, devices=2, strategy="ddp", default_root_dir=folder)
    made.fit(module, data(text, validation_sequences=0))


def test_validation_by_the_clock_is_of_one_rank(text_file: Path) -> None:
    """Each rank looks at its own."""
    one, two = (
        trainer(
            max_steps=2, devices=devices, strategy="ddp" if devices > 1 else "auto", val_check_interval="00:00:30:00"
        )
        for devices in (1, 2)
    )
    check_run_length(one)
    with pytest.raises(UserError, match="is a time, and each of the 2 ranks would look at its own clock"):
        check_run_length(two)
