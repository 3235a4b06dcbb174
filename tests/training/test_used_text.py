"""From Python: text, tokenizers and base models that change, and batches of other loaders."""

import re
import shutil
import signal
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from conftest import Run
from lightning.pytorch.callbacks import EarlyStopping, OnExceptionCheckpoint
from python_runs import again, data, trainer
from tiny import byte_tokenizer
from torch.utils.data import DataLoader

from leap_pl import LeapModule, TextDataModule, UserError
from leap_pl.base_model import weights as weights_room
from leap_pl.callbacks import Checkpoints
from leap_pl.checkpoints.identity import KEY, read_identity
from leap_pl.cli.resume import settings_of
from leap_pl.data.source import TextSource
from leap_pl.gates import FixedGate
from leap_pl.losses.objective import Objective
from leap_pl.prior import Prior
from leap_pl.training import validated_module
from leap_pl.training.batch import input_ids_of
from leap_pl.training.schedules import Annealing, Schedule

pytestmark = pytest.mark.usefixtures("eager")


def test_settings_of_text_that_change_after_its_use_are_used(
    model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    text = data(text_file, tokenizer=str(model_folder))
    before = next(iter(text.stream.blocks())).tokens
    held_out, was = next(iter(text.val_dataloader()))["input_ids"], text.identity()
    text.seq_length = 16
    assert next(iter(text.stream.blocks())).tokens == before[:16]
    assert torch.equal(next(iter(text.val_dataloader()))["input_ids"][0], held_out[0, :16])
    assert text.identity() == {**was, "seq_length": 16}
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
    assert loaded.base_model == str(model_folder)
    assert loaded.run_prior.settings.cache_dir == Prior().cache_dir  # nothing is written where a checkpoint says
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


@pytest.mark.parametrize("validates", [False, True])
def test_tokens_of_other_loaders_are_those_of_the_model(module: LeapModule, validates: bool) -> None:
    """On a GPU the embedding would end the process, and names no token."""
    ids = torch.arange(64).view(4, 16)
    strange, long = ids.clone(), torch.zeros(4, 200, dtype=torch.long)
    strange[1, 2] = 100_000
    for wrong, says in (
        (strange, r"a micro-batch has token 100000, and .* has embeddings for 0 to \d+\. Use the tokenizer of"),
        (strange.sub(100_001), "a micro-batch has token -100001, and"),
        (long, "a micro-batch has sequences of 200 tokens, and .* supports at most 128. Cut the text"),
    ):
        made = LeapModule(module.base_model, dtype="float32", prior=Prior(method="none"))
        loaders = (ids, wrong) if validates else (wrong, ids)
        with pytest.raises(UserError, match=says):
            trainer(max_steps=2, num_sanity_val_steps=1).fit(made, *(DataLoader(one, batch_size=2) for one in loaders))


def test_first_tokens_of_each_stage_are_checked_on_a_gpu(module: LeapModule, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of validation say nothing of those of training, nor those of one validation of another's loader."""
    monkeypatch.setattr(LeapModule, "looks_later", True)
    counted = CountingTokens(monkeypatch)
    good = torch.arange(64).view(4, 16)
    made = LeapModule(module.base_model, dtype="float32", prior=Prior(method="none"))
    loader, wrong = DataLoader(good, batch_size=2), DataLoader(good + 100_000, batch_size=2)
    with pytest.raises(UserError, match=r"a micro-batch has token 1000\d\d, and"):
        trainer(max_steps=2, num_sanity_val_steps=1).fit(again(made), wrong, loader)
    counted.times = 0
    trainer(max_steps=2, num_sanity_val_steps=1).fit(made, loader, loader)
    assert counted.times == 3  # the sanity check, training, the validation after it
    with pytest.raises(UserError, match=r"a micro-batch has token 1000\d\d, and"):
        trainer().validate(made, wrong, verbose=False)


class CountingTokens:
    """How often the numbers of tokens were looked at."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.times, check = 0, validated_module.check_token_ids

        def counting(*args: Any) -> None:
            self.times += 1
            check(*args)

        monkeypatch.setattr(validated_module, "check_token_ids", counting)


def test_a_run_that_ends_before_its_schedules_says_so(
    module: LeapModule, finished_run: Run, recwarn: pytest.WarningsRecorder
) -> None:
    ids, said = torch.arange(64).view(4, 16), "the run ended at step 2 of 9, before its schedules did"
    for steps, epochs in ((9, 1), (2, 1)):
        made = LeapModule(module.base_model, dtype="float32", prior=Prior(method="none"))
        recwarn.clear()
        trainer(max_steps=steps, max_epochs=epochs).fit(made, DataLoader(ids, batch_size=2))
        assert any(said in str(warning.message) for warning in recwarn) == (steps == 9)
    fixed = {"mask": str(finished_run.mask)}, {"gate": FixedGate, "prior": Prior(method="magnitude")}
    for settings in fixed:
        made = LeapModule(module.base_model, dtype="float32", train_weights="kept", **settings)  # type: ignore[arg-type]
        with pytest.warns(UserWarning, match=said + ": the weights are of that step"):
            trainer(max_steps=9, max_epochs=1).fit(made, DataLoader(ids, batch_size=2))


def test_a_program_is_told_which_checkpoint_resumes_its_run(
    module: LeapModule, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, steps = DataLoader(torch.arange(64).view(4, 16), batch_size=2), {"max_steps": 9, "max_epochs": 1}
    for saving in ({}, {"save_last": False}):
        callback = Checkpoints(str(tmp_path / f"{len(saving)}"), every_n_train_steps=1, **saving)
        trainer(callback, **steps).fit(again(module), text)
        said = capsys.readouterr().err
        assert "ended at step 2 of 9; learning is not finished" in said
        (found,) = re.findall(r"Resume with trainer\.fit\(\.\.\., ckpt_path='(.*)'\) and a new trainer", said)
        assert read_identity(torch.load(found, weights_only=True), found).max_steps == 9
    trainer(Checkpoints(str(Path(found).parent)), **steps).fit(again(module), text, ckpt_path=found)
    assert f"Resume with trainer.fit(..., ckpt_path='{found}')" in capsys.readouterr().err
    trainer(Checkpoints(str(tmp_path / "third")), **steps).fit(again(module), text, ckpt_path=found)
    assert f"Resume with trainer.fit(..., ckpt_path='{tmp_path / 'third'}/" in capsys.readouterr().err
    callback = Checkpoints(str(tmp_path / "2"), save_top_k=0, save_last=False)
    trainer(callback, **steps).fit(again(module), text, ckpt_path=found)
    assert f"Resume with trainer.fit(..., ckpt_path='{found}')" in capsys.readouterr().err


def test_text_in_memory_is_refused() -> None:
    import datasets

    held = datasets.Dataset.from_dict({"text": ["some words"]})
    for setting, value in (("text", held), ("validation_text", [held]), ("text", {"train": "a.jsonl"})):
        with pytest.raises(UserError, match=rf"data.{setting} is a (Dataset|dict); give the names of files"):
            TextDataModule(**{"text": "a.jsonl", setting: value})


def test_schedules_of_other_classes_are_refused() -> None:
    class Steps(Schedule):
        pass

    for wrong in ((1000, 3500), 350, Steps(25.0, 350.0), {"start": 25, "end": 350}):
        with pytest.raises(UserError, match=r"model.annealing.alpha is .*; give Schedule\(START, END\)"):
            Annealing(alpha=wrong)  # type: ignore[arg-type]


def test_a_refused_run_hides_no_reason_and_leaves_the_checkpoint_before_it(
    module: LeapModule, text_file: Path, tmp_path: Path
) -> None:
    """OnExceptionCheckpoint writes at any exception, and Lightning resumes from what it finds there."""

    class Breaks(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise RuntimeError("amid the run")

    class BreaksLater(L.Callback):
        def teardown(self, *_: Any, **__: Any) -> None:
            raise RuntimeError("amid the run, or after it")

    class BreaksEarly(L.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            raise RuntimeError("before a step")

    def refused(made: LeapModule, reason: str, *callbacks: L.Callback) -> None:
        before = earlier.read_bytes() if earlier.exists() else None
        with pytest.raises((RuntimeError, UserError), match=reason):
            trainer(saving, *callbacks, max_steps=2, enable_checkpointing=True).fit(made, data(text_file))
        assert (before == earlier.read_bytes()) == (reason != "amid the run")
        assert "on_exception" not in vars(saving)  # it saves again, in whatever trainer

    saving, earlier, handler = OnExceptionCheckpoint(str(tmp_path)), tmp_path / "on_exception.ckpt", signal.SIGTERM
    refused(again(module), "amid the run", Breaks())
    other, was = LeapModule(module.base_model, dtype="float32", sparsity=0.7), signal.getsignal(handler)
    refused(other, "monitors nothing", EarlyStopping("nothing"), Checkpoints(str(tmp_path / "run")))
    assert signal.getsignal(handler) == was  # the callbacks after it have ended too
    refused(other, "sparsity")  # once the model is loaded
    refused(again(module), "before a step", BreaksEarly())
    refused(again(module), "amid the run", Breaks())
    assert read_identity(torch.load(earlier, weights_only=True)).max_steps == 2
    earlier.unlink()
    refused(again(module), "amid the run", BreaksLater())
    assert torch.load(earlier, weights_only=True)["global_step"] == 2
    with pytest.raises(UserError, match="nothing to save: the base model is not loaded"):
        again(module).on_save_checkpoint({})


def test_batches_of_other_loaders(module: LeapModule) -> None:
    ids = torch.arange(64).view(4, 16)
    module = LeapModule(module.base_model, dtype="float32", prior=Prior(method="none"))
    trainer(max_steps=2).fit(module, DataLoader(ids, batch_size=2))
    for wrong in (ids[0], ids[:, :1], ids.float(), {"input_ids": ids.bool()}):
        with pytest.raises(UserError, match=r"a micro-batch is (int64|float32|bool) of shape .*; give token ids"):
            input_ids_of(wrong)
    with pytest.raises(UserError, match=r"input_ids of a micro-batch are a list; .*with_format"):
        input_ids_of({"input_ids": ids.tolist()})
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
