"""TextDataModule in a real Trainer: length, resume at the exact next block, validation, mistakes."""

import copy
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from tiny import byte_tokenizer, tiny_folder

from leap_pl.data import TextDataModule, batches, calibration_blocks, held_out_tokens
from leap_pl.errors import UserError

TOKENIZER = byte_tokenizer()


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    names = []
    for shard, kind in enumerate((".jsonl", ".jsonl", ".txt")):
        file = tmp_path / f"{shard}{kind}"
        lines = [f"shard {shard} document {k} " * (1 + k % 3) for k in range(30)]
        file.write_text("\n".join(lines if kind == ".txt" else [json.dumps({"text": line}) for line in lines]))
        names.append(str(file))
    return names


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A hub dataset of two shards for training and one for validation."""
    real, cache = datasets.load_dataset, str(tmp_path / "cache")
    for shard in range(3):
        lines = [json.dumps({"text": f"hub {shard} {k}"}) for k in range(100)]
        (tmp_path / f"hub{shard}.jsonl").write_text("\n".join(lines))
    shards = {"train": [0, 1], "validation": [2]}

    def load(name: str, config: str | None, *, split: str, streaming: bool) -> Any:
        stored = [str(tmp_path / f"hub{shard}.jsonl") for part in split.split("+") for shard in shards[part.strip()]]
        return real("json", data_files=stored, split="train", streaming=streaming, cache_dir=cache)

    monkeypatch.setattr(datasets, "load_dataset", load)
    return "some/text"


class Recorder(LightningModule):
    """Keeps the batches it is trained on; its one weight moves so that Lightning has something to step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[list[list[int]]] = []
        self.fail_at: int | None = None
        self.fails_before = False  # while the batch is copied, before its step

    def on_after_batch_transfer(self, batch: dict[str, torch.Tensor], dataloader_idx: int) -> dict[str, torch.Tensor]:
        if self.fails_before and self.fail_at == len(self.seen):
            raise RuntimeError("out of memory")
        return batch

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        assert set(batch) == {"input_ids"}
        if self.fail_at == batch_idx:
            raise RuntimeError("out of memory")
        self.seen.append(batch["input_ids"].tolist())
        return self.weight.sum() * batch["input_ids"].float().mean()

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        assert set(batch) == {"input_ids"}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-6)


class SaveAt(Callback):
    """Saves a checkpoint after micro-batch ``at``, or when a step fails, and stops there."""

    def __init__(self, at: int, path: Path) -> None:
        self.at, self.path = at, path

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.current.ready == self.at:
            trainer.save_checkpoint(self.path)
            raise KeyboardInterrupt

    def on_exception(self, trainer: Trainer, module: LightningModule, error: BaseException) -> None:
        if not isinstance(error, KeyboardInterrupt):
            trainer.save_checkpoint(self.path)


def fit(data: TextDataModule, *callbacks: Callback, module: Recorder | None = None, **settings: Any) -> Recorder:
    module = module or Recorder()
    checkpoint = settings.pop("ckpt_path", None)
    trainer = Trainer(
        **{"max_steps": 6, "accumulate_grad_batches": 3, "limit_val_batches": 0, **settings},
        accelerator="cpu",
        devices=1,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    assert trainer.global_step == trainer.max_steps or callbacks
    return module


def module_for(text: Any, **settings: Any) -> TextDataModule:
    return TextDataModule(TOKENIZER, text, **{"seq_length": 16, "batch_size": 2, "seed": 4, **settings})  # type: ignore[arg-type]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["files", "hub"])
def test_a_resumed_run_sees_the_blocks_of_one_that_never_stopped(
    kind: str, workers: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    text = request.getfixturevalue(kind)
    whole = fit(module_for(text)).seen
    assert len(whole) == 18
    stream = module_for(text).stream
    assert sum(whole, []) == [block.tokens for block in islice(stream.blocks(), 36)]  # noqa: RUF017
    path = tmp_path / "run.ckpt"
    for at in (1, 5, 6, 17) if workers == 0 else (5,):
        with pytest.raises(SystemExit):
            fit(module_for(text, num_workers=workers), SaveAt(at, path))
        stored = torch.load(path, weights_only=True)["TextDataModule"]
        assert stored["consumed"] == at
        assert json.loads(json.dumps(stored)) == stored
        assert fit(module_for(text, num_workers=workers), ckpt_path=path).seen == whole[at:]


@pytest.mark.parametrize(("workers", "before"), [(0, False), (2, False), (0, True)])
def test_a_batch_whose_step_failed_is_trained_on_again(
    workers: int, before: bool, files: list[str], tmp_path: Path
) -> None:
    whole = fit(module_for(files)).seen
    module = Recorder()
    module.fail_at, module.fails_before = 7, before
    with pytest.raises(RuntimeError, match="out of memory"):
        fit(module_for(files, num_workers=workers), SaveAt(-1, tmp_path / "run.ckpt"), module=module)
    assert fit(module_for(files, num_workers=workers), ckpt_path=tmp_path / "run.ckpt").seen == whole[7:]


def test_a_checkpoint_before_the_first_batch(files: list[str], tmp_path: Path) -> None:
    module = Recorder()
    module.fail_at = 0
    with pytest.raises(RuntimeError, match="out of memory"):
        fit(module_for(files), SaveAt(-1, tmp_path / "run.ckpt"), module=module)
    assert fit(module_for(files), ckpt_path=tmp_path / "run.ckpt").seen == fit(module_for(files)).seen


def test_a_run_stopped_twice_and_resumed_after_validation(files: list[str], tmp_path: Path) -> None:
    settings = {"limit_val_batches": 2, "val_check_interval": 3, "num_sanity_val_steps": 1}
    whole = fit(module_for(files), **settings).seen
    for at in (4, 9):
        kept = tmp_path / f"{at}.ckpt"
        before = None if at == 4 else tmp_path / "4.ckpt"
        with pytest.raises(SystemExit):
            fit(module_for(files), SaveAt(at, kept), ckpt_path=before, **settings)
    assert fit(module_for(files), ckpt_path=tmp_path / "9.ckpt", **settings).seen == whole[9:]
    assert whole == fit(module_for(files)).seen


def test_another_run_with_the_same_object_begins_anew(files: list[str]) -> None:
    data = module_for(files)
    assert fit(data).seen == fit(data).seen


def test_a_checkpoint_can_be_validated_on_other_data(files: list[str], tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    with pytest.raises(SystemExit):
        fit(module_for(files), SaveAt(3, path))
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False)
    other = module_for(files[0], seq_length=32, validation_sequences=1)
    assert trainer.validate(Recorder(), other, ckpt_path=path, weights_only=True) == [{}]


def test_what_is_held_out_of_files_that_were_made_again_is_not_validated_on(files: list[str], tmp_path: Path) -> None:
    """They are chosen by their numbers: in another order, most of them were trained on."""
    path, place = tmp_path / "run.ckpt", Path(files[0])
    with pytest.raises(SystemExit):
        fit(module_for(files[0], validation_sequences=1), SaveAt(2, path))
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False)
    held_out = module_for(files[0], validation_sequences=1)
    assert trainer.validate(Recorder(), held_out, ckpt_path=path, weights_only=True) == [{}]
    lines = place.read_text().split("\n")
    place.write_text("\n".join(lines[::-1]))  # of the same name and size
    with pytest.warns(UserWarning, match=r"are not as the run has read them: .* --data\.validation_text"):
        trainer.validate(Recorder(), module_for(files[0], validation_sequences=1), ckpt_path=path, weights_only=True)
    place.write_text("\n".join([*lines, *lines[:3]]))  # grown after what was read
    grown = module_for(files[0], validation_sequences=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*as the run has read them")
        assert trainer.validate(Recorder(), grown, ckpt_path=path, weights_only=True) == [{}]


def test_a_split_of_the_hub_that_was_trained_on_whole_is_not_held_out(hub: str) -> None:
    before = module_for(hub, validation_sequences=2).state_dict()
    validating: Any = SimpleNamespace(state=SimpleNamespace(fn="validate"))
    for settings, refused in (
        ({}, False),
        ({"validation_split": "train"}, True),
        ({"validation_split": "train", "split": "validation"}, False),
    ):
        data = module_for(hub, validation_sequences=2, **settings)
        data.trainer = validating
        if refused:
            with pytest.raises(UserError, match=r"held out no part of data\.text, so all of it was trained on"):
                data.load_state_dict(before)
        else:
            data.load_state_dict(before)


@pytest.mark.parametrize(
    ("split", "validation_split", "refused"),
    [
        ("train+validation", "validation", True),
        ("train", "train+validation", True),
        ("train+validation", "validation+train", True),  # which number the documents to hold out otherwise
        ("train+validation", "train + validation", False),  # one document in twenty is held out
        ("train", "validation", False),
    ],
)
def test_splits_that_have_rows_in_common(hub: str, split: str, validation_split: str, refused: bool) -> None:
    settings = {"split": split, "validation_split": validation_split, "validation_sequences": 2}
    data = module_for(hub, **settings)
    data.trainer = fitting = Trainer(accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False)
    fitting.strategy._lightning_module = Recorder()
    if refused:
        with pytest.raises(UserError, match=r"have rows in common, .* Name splits that have none, or for both"):
            data.setup("fit")
    else:
        data.setup("fit")
    data = module_for(hub, **settings | {"validation_sequences": 0})  # nothing is validated on
    data.trainer = fitting
    data.setup("fit")


def test_a_later_file_that_cannot_be_read_is_told_before_the_run(tmp_path: Path) -> None:
    for name, key in (("a", "text"), ("b", "content")):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({key: f"{name} {k}"}) + "\n" for k in range(40)))
    data = module_for([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")])
    with pytest.raises(UserError, match=r"b\.jsonl"):
        data.setup("fit")


def test_a_loader_that_is_made_before_the_state_is_loaded(files: list[str]) -> None:
    whole = [batch["input_ids"].tolist() for batch in module_for(files).train_loader(6)]
    data = module_for(files)
    for batch in islice(data.train_loader(6), 2):
        data.on_before_batch_transfer(batch, 0)
    again = module_for(files)
    for workers in (0, 2):
        again.num_workers = workers
        early = again.train_loader(6)
        again.load_state_dict(data.state_dict())
        assert [batch["input_ids"].tolist() for batch in early] == whole[2:]


def test_files_that_moved_are_the_same_text(files: list[str], tmp_path: Path) -> None:
    data = module_for(files)
    batch = next(iter(data.train_loader(3)))
    data.on_before_batch_transfer(batch, 0)
    state = data.state_dict()
    (tmp_path / "elsewhere").mkdir()
    moved = [str(Path(name).rename(tmp_path / "elsewhere" / Path(name).name)) for name in files]
    again = module_for(moved)
    again.load_state_dict(state)
    assert len(list(again.train_loader(3))) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_length": 32}, "seq_length was 16 and is 32"),
        ({"batch_size": 3, "seed": 5}, "batch_size was 2 and is 3; seed was 4 and is 5"),
        ({"validation_sequences": 0}, "validation_sequences.* was True and is False"),
        ({"text_column": "body"}, "text_column was 'text' and is 'body'"),
    ],
)
def test_other_data_is_refused_at_resume(changes: dict[str, Any], message: str, files: list[str]) -> None:
    state = module_for(files).state_dict()
    with pytest.raises(UserError, match=message):
        module_for(files, **changes).load_state_dict(state)


def test_another_text_or_format_is_refused_at_resume(files: list[str], hub: str) -> None:
    state = module_for(files).state_dict()
    with pytest.raises(UserError, match=r"text was '0.jsonl \(\d+ bytes\), .* and is 'some/text \(train\)'"):
        module_for(hub).load_state_dict(state)
    with pytest.raises(UserError, match="has format 3; this version of leap_pl reads formats 1 and 2"):
        module_for(files).load_state_dict({**state, "format": 3})


POSITION = "the checkpoint's position in the text"


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda state: state.pop("format"), f"{POSITION} lacks format"),
        (lambda state: state.pop("consumed"), f"{POSITION} lacks consumed"),
        (lambda state: state.pop("rereadable"), f"{POSITION} lacks rereadable"),
        (lambda state: state.update(consumed=-2), rf"{POSITION}\.consumed is -2: .*greater than or equal to 0"),
        (lambda state: state.update(micro_batch="3"), rf"{POSITION}\.micro_batch is '3': .*integer"),
        (lambda state: state.update(data=["x"]), rf"{POSITION}\.data is "),
        (lambda state: state.update(position=3), rf"{POSITION}\.position is 3: "),
        (lambda state: state["position"].pop("turn"), rf"{POSITION} lacks position\.turn"),
        (lambda state: state["position"].pop("document"), f"{POSITION} lacks document"),
        (lambda state: state["position"].update(number=1.5), rf"{POSITION}\.position\.number is 1\.5: "),
        (lambda state: state["position"].update(digests=[None]), f"{POSITION} has digests of 1 of 2 shards"),
        (lambda state: state["position"].update(digests=[1, 2]), rf"{POSITION}\.position\.digests\.0 is 1: "),
        (lambda state: state["position"]["state"].update(byte=-1), f"{POSITION} has a damaged byte"),
        (lambda state: state["position"]["state"].update(line="x"), f"{POSITION} has a damaged line"),
        (lambda state: state["position"]["state"].update(digest=3), f"{POSITION} has a damaged digest"),
        (lambda state: state["position"].update(turn=10**6), "has changed since the run was stopped"),
    ],
)
def test_a_damaged_position_is_one_line(damage: Any, says: str, files: list[str]) -> None:
    first = module_for(files[:2])
    *_, batch = (batch for batch, _ in zip(first.train_loader(9), range(2), strict=False))
    first.on_before_batch_transfer(batch, 0)
    state = first.state_dict()
    module_for(files[:2]).load_state_dict(copy.deepcopy(state))
    damage(state)
    with pytest.raises(UserError, match=says) as caught:
        module_for(files[:2]).load_state_dict(state)
    assert "\n" not in str(caught.value)


def test_a_run_without_end_is_refused(files: list[str]) -> None:
    with pytest.raises(UserError, match=r"Give the number of optimizer steps with --trainer\.max_steps"):
        fit(module_for(files), max_steps=-1, max_epochs=1)
    with pytest.raises(UserError, match="No trainer is attached"):
        module_for(files).train_dataloader()


def test_validation_blocks_are_held_out(files: list[str]) -> None:
    data = module_for(files, validation_sequences=4, batch_size=3)
    batches = [batch["input_ids"] for batch in data.val_dataloader()]
    assert [tuple(batch.shape) for batch in batches] == [(3, 16), (1, 16)]
    assert torch.equal(
        torch.cat(batches),
        torch.cat([b["input_ids"] for b in module_for(files, validation_sequences=4, seed=9).val_dataloader()]),
    )
    held_out = TOKENIZER.decode(torch.cat(batches).flatten())
    trained = [document.text for _, document in data.stream.source.documents(repeat=False)]
    for document in held_out.split("<|end|>")[:-1]:
        assert document not in trained


def test_validation_on_another_text_leaves_training_all(files: list[str], hub: str) -> None:
    data = module_for(files[:1], validation_text=files[1], validation_sequences=2)
    assert "shard 1" in TOKENIZER.decode(next(iter(data.val_dataloader()))["input_ids"].flatten())
    assert len(list(data.stream.source.documents(repeat=False))) == 30
    for own in (
        module_for(hub, validation_sequences=2),
        module_for(files, validation_text=hub, validation_sequences=2),
    ):
        blocks = next(iter(own.val_dataloader()))["input_ids"]
        assert TOKENIZER.decode(blocks.flatten()).startswith("hub 2 0<|end|>hub 2 1<|end|>")


def test_a_text_of_the_hub_is_of_the_split_that_is_named(hub: str) -> None:
    found = held_out_tokens(hub, TOKENIZER, split="validation", most=40)
    assert TOKENIZER.decode(found).startswith("hub 2 0")
    blocks = calibration_blocks(hub, TOKENIZER, seq_length=16, sequences=2, split="validation")
    assert TOKENIZER.decode(blocks.flatten()).startswith("hub 2 0")


def test_too_little_to_validate_on(files: list[str], tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"makes \d+ blocks of 16 tokens, fewer than the 500"):
        assert len(module_for(files, validation_sequences=500).val_dataloader()) > 1
    (tmp_path / "short.txt").write_text("short")
    short = module_for(files, validation_text=str(tmp_path / "short.txt"))
    with pytest.raises(UserError, match=r"makes 6 tokens, and one block takes 16.*--data\.validation_text"):
        short.val_dataloader()
    for text, said in (([], "--data.validation_text FILE"), ("gone.jsonl", "There is no file gone.jsonl")):
        with pytest.raises(UserError, match=said):
            module_for(files, validation_text=text).val_dataloader()
    none = module_for(files, validation_sequences=0)
    assert none.val_dataloader() == []
    fit(none, limit_val_batches=1.0, max_steps=1)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_validate_on_equally_many_blocks_without_doubles(
    ranks: int, files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = torch.cat([b["input_ids"] for b in module_for(files, validation_sequences=7).val_dataloader()]).tolist()
    got = []
    for rank in range(ranks):
        data = module_for(files, validation_sequences=7)
        monkeypatch.setattr(data, "_rank", lambda rank=rank: (rank, ranks))
        got.append(torch.cat([b["input_ids"] for b in data.val_dataloader()]).tolist())
    assert all(len(blocks) == 7 // ranks for blocks in got)
    assert [block for round_ in zip(*got, strict=True) for block in round_] == whole[: 7 // ranks * ranks]
    data = module_for(files, validation_sequences=1)
    monkeypatch.setattr(data, "_rank", lambda: (0, ranks))
    with pytest.raises(UserError, match=f"makes 1 blocks, fewer than the {ranks} ranks"):
        data.val_dataloader()


def test_mistakes_are_told_before_the_run(files: list[str]) -> None:
    with pytest.raises(UserError, match=r"There is no file missing\.jsonl"):
        module_for("missing.jsonl").setup("fit")
    for text in (None, [None], [*files, None]):
        with pytest.raises(UserError, match=r"data\.text is a NoneType; give the names of files"):
            module_for(text)
    with pytest.raises(UserError, match="has no column 'body'; it has: text"):
        module_for(files[:1], text_column="body").setup("fit")


def test_a_part_of_a_hub_dataset_is_not_one_of_local_text(
    files: list[str], hub: str, recwarn: pytest.WarningsRecorder
) -> None:
    for part, named in (
        ({"split": "test"}, "data.split"),
        ({"config_name": "en", "split": "test"}, "data.config_name and data.split"),
    ):
        data = module_for(files, **part)
        with pytest.warns(
            UserWarning, match=f"not used: {named} choose a part of a hub dataset, and data.text is local"
        ):
            data.setup("fit")
        assert not {"split", "config_name"} & data.record().keys()
    # Where nothing is learned, the text that was learned from need not be there.
    assert module_for("gone.jsonl", validation_text=files[0]).record()["text"] == "gone.jsonl"
    recwarn.clear()
    data = module_for(hub, config_name="en", split="validation")
    data.setup("fit")
    assert (data.record()["config_name"], data.record()["split"]) == ("en", "validation")
    module_for(files).setup("fit")
    assert not [warning for warning in recwarn if "not used" in str(warning.message)]


def test_a_part_of_a_hub_dataset_is_not_validated_on_where_the_text_is_local(
    files: list[str], hub: str, recwarn: pytest.WarningsRecorder
) -> None:
    """By the source that is validated on: that of validation_text or, without one, of text."""
    part: dict[str, Any] = {"validation_config_name": "en", "validation_split": "test"}
    both = "data.validation_config_name and data.validation_split"
    for text, given, told in (
        (files, part, f"not used: {both} choose a part of a hub dataset, and data.text is local. To validate on other"),
        (files, {"validation_split": "test"}, "not used: data.validation_split choose"),
        (hub, {**part, "validation_text": files[2]}, f"not used: {both} choose .*, and data.validation_text is local"),
        (files[:2], {"validation_config_name": "en", "validation_text": hub}, None),
        (hub, {"validation_split": "train"}, None),
        (files, {}, None),
    ):
        recwarn.clear()
        data = module_for(text, validation_sequences=1, **given)
        fit(data, max_steps=1, accumulate_grad_batches=1, limit_val_batches=1, num_sanity_val_steps=0)
        found = [str(one.message) for one in recwarn if "not used" in str(one.message)]
        assert len(found) == (told is not None)
        assert told is None or re.search(f"^{told}", found[0])


def test_two_processes_see_the_blocks_of_one_with_twice_the_accumulation(files: list[str], tmp_path: Path) -> None:
    whole = fit(module_for(files, batch_size=1), max_steps=3, accumulate_grad_batches=4).seen
    script = tmp_path / "two.py"
    script.write_text(
        f"""
import json
import sys
import torch
torch.set_num_threads(1)
sys.path[:0] = {[str(folder) for folder in Path(__file__).parents[:3]]!r}
from test_data_module import Recorder, Trainer, module_for
module = Recorder()
Trainer(accelerator="cpu", devices=2, strategy="ddp", max_steps=3, accumulate_grad_batches=2, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
).fit(module, module_for({files!r}, batch_size=1, num_workers=1))
open({str(tmp_path)!r} + f"/rank{{module.global_rank}}.json", "w").write(json.dumps(module.seen))
"""
    )
    ran = subprocess.run(
        [sys.executable, str(script)], check=False, timeout=300, capture_output=True, cwd=Path(__file__).parents[2]
    )
    assert ran.returncode == 0, ran.stderr.decode()[-3000:]
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert [batch for pair in zip(*ranks, strict=True) for batch in pair] == whole


def test_workers_do_not_wait_for_the_tokenizers_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads forced on, and used before the fork, leave the workers a pool without threads."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    path = tmp_path / "text.txt"
    path.write_text("some words to cut in blocks " * 200)
    data = TextDataModule(
        tokenizer=byte_tokenizer(), text=str(path), seq_length=16, validation_sequences=0, num_workers=2
    )  # type: ignore[arg-type]
    data.tokenizer(["used once"] * 64)
    loader = data.train_loader(4)
    loader.timeout = 60
    assert len(list(loader)) == 4


def test_a_signal_to_all_processes_spares_workers_that_have_just_started(
    files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They inherit no handler that spares them, and set their own only once they run."""
    others, ready = {*multiprocessing.active_children()}, batches._start_worker

    def slowly(worker: int) -> None:
        time.sleep(2)
        ready(worker)

    def to_workers() -> None:
        end = time.monotonic() + 60
        while len(started := {*multiprocessing.active_children()} - others) < 2 and time.monotonic() < end:
            time.sleep(0.01)
        for child in started:
            os.kill(child.pid or 0, signal.SIGTERM)
            signalled.append(child.pid)

    signalled: list[int | None] = []
    monkeypatch.setattr(batches, "_start_worker", slowly)
    sender = threading.Thread(target=to_workers)
    sender.start()
    assert len(list(module_for(files, num_workers=2).train_loader(9))) == 9
    sender.join()
    assert len(signalled) == 2


@pytest.mark.parametrize("named", [None, "user/model", "user/other"])
@pytest.mark.parametrize("pinned", [None, "abc", "def"])
def test_the_tokenizer_of_the_model_has_its_revision_and_other_code_is_not_trusted(
    named: str | None, pinned: str | None, files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(name: str, revision: str | None, *, trust_remote_code: bool) -> Any:
        asked.append((name, revision, trust_remote_code))
        return TOKENIZER

    asked: list[Any] = []
    monkeypatch.setattr("leap_pl.training.datamodule.loaded_tokenizer", loaded)
    data = TextDataModule(named, files, seq_length=16, tokenizer_revision=None if named is None else pinned)
    for revision in ("abc", "ghi"):  # the same data module, used with another revision of the model
        module = SimpleNamespace(base_model="user/model", revision=revision, trust_remote_code=True)
        data.trainer = SimpleNamespace(lightning_module=module)  # type: ignore[assignment]
        data.setup("validate")
        assert data.tokenizer is TOKENIZER
        follows = named is None or (named, pinned) == ("user/model", None)
        own = revision if follows else pinned
        trusted = named != "user/other" and own == revision
        again = not follows and revision == "ghi"  # the one that there is
        assert asked == ([] if again else [(named or "user/model", own, trusted)])
        asked.clear()


@pytest.mark.parametrize("named", [True, False])  # as the command line names it
@pytest.mark.parametrize("trusted", [True, False])
def test_code_of_the_models_tokenizer_runs_if_that_of_the_model_may(tmp_path: Path, trusted: bool, named: bool) -> None:
    folder = tiny_folder(tmp_path / "model")
    (folder / "mine.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
        "from transformers import PreTrainedTokenizerFast\n\n\nclass Mine(PreTrainedTokenizerFast):\n    pass\n"
    )
    path = folder / "tokenizer_config.json"
    told = json.loads(path.read_text()) | {
        "tokenizer_class": "Mine",
        "auto_map": {"AutoTokenizer": [None, "mine.Mine"]},
    }
    path.write_text(json.dumps(told))
    (tmp_path / "a.txt").write_text("text of a file")
    data = TextDataModule(str(folder) if named else None, text=str(tmp_path / "a.txt"), seq_length=4)
    module = SimpleNamespace(base_model=str(folder), revision=None, trust_remote_code=trusted)
    data.trainer = SimpleNamespace(lightning_module=module)  # type: ignore[assignment]
    if trusted:
        data.setup("validate")
        assert type(data.tokenizer).__name__ == "Mine"
    else:
        with pytest.raises(UserError, match=r"tokenizer.*trust_remote_code"):
            data.setup("validate")
            assert data.tokenizer
    assert (tmp_path / "ran").exists() == trusted
