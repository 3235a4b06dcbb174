"""Text to validate on: looked at before a run, divided evenly, and not trained on."""

import json
import pickle
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
from lightning import LightningModule, Trainer
from tiny import byte_tokenizer

from leap_pl.data import TextDataModule, TextSource
from leap_pl.data.documents import Share
from leap_pl.data.held_out import warn_of_overlap
from leap_pl.data.hub import HubDataset
from leap_pl.errors import UserError

TOKENIZER = byte_tokenizer()


def lines(file: Path, count: int = 40) -> str:
    file.write_text("".join(json.dumps({"text": f"{file.stem} document {k}"}) + "\n" for k in range(count)))
    return str(file)


def on_ranks(ranks: int, text: Any, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> TextDataModule:
    """A data module that is attached to a trainer with so many ranks."""
    data = TextDataModule(TOKENIZER, text, seq_length=16, **settings)
    data.trainer = Trainer(max_steps=2, logger=False, enable_checkpointing=False, accelerator="cpu")
    data.trainer.strategy.connect(LightningModule())
    monkeypatch.setattr(data, "_rank", lambda: (0, ranks))
    return data


def test_too_few_blocks_for_the_ranks_are_told_before_the_model_is_loaded(tmp_path: Path, monkeypatch) -> None:
    data = on_ranks(8, lines(tmp_path / "a.jsonl", 400), monkeypatch, validation_sequences=3)
    with pytest.raises(UserError, match="makes 3 blocks, fewer than the 8 ranks"):
        data.setup("fit")


def test_a_remainder_that_no_rank_validates_on_is_told(tmp_path: Path, monkeypatch) -> None:
    text = lines(tmp_path / "a.jsonl", 400)
    with pytest.warns(UserWarning, match="uses 6 of 7 blocks, as many on each of 3 ranks"):
        on_ranks(3, text, monkeypatch, validation_sequences=7).setup("fit")


@pytest.mark.filterwarnings("error:validation uses")
def test_no_remainder_no_word(tmp_path: Path, monkeypatch) -> None:
    on_ranks(3, lines(tmp_path / "a.jsonl", 400), monkeypatch, validation_sequences=6).setup("fit")


def test_text_that_is_trained_and_validated_on_is_told(tmp_path: Path, monkeypatch) -> None:
    one, other = lines(tmp_path / "a.jsonl"), lines(tmp_path / "b.jsonl")
    (tmp_path / "link.jsonl").symlink_to(other)
    link, few = str(tmp_path / "link.jsonl"), {"validation_sequences": 2}
    with pytest.warns(UserWarning, match=r"b\.jsonl is both trained and validated on"):
        on_ranks(1, [one, other], monkeypatch, validation_text=link, **few).setup("fit")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*is both trained and validated on")
        on_ranks(1, one, monkeypatch, validation_text=other, **few).setup("fit")


def test_a_split_of_the_hub_that_is_trained_and_validated_on_is_told() -> None:
    def source(split: str, share: Share = "all") -> TextSource:
        return TextSource(HubDataset("some/text", split=split, share=share))

    with pytest.warns(UserWarning, match=r"some/text \(train\) is both trained and validated on"):
        warn_of_overlap(source("train"), source("train"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_overlap(source("train"), source("validation"))
        warn_of_overlap(source("train", "train"), source("train", "held_out"))


@pytest.mark.parametrize(
    ("trained", "validated", "overlap"),
    [
        ({"split": "train+validation"}, {"split": "validation"}, True),
        ({"split": "train"}, {"split": "train", "config_name": "only"}, True),
        ({"split": "train", "config_name": "only"}, {"split": "train"}, True),
        ({"split": "train", "share": "train"}, {"split": "train"}, True),
        ({"split": "all"}, {"split": "validation"}, True),
        ({"split": "train"}, {"split": "train", "config_name": "other"}, False),
        ({"split": "train", "config_name": "only"}, {"split": "validation"}, False),
    ],
)
def test_a_dataset_is_the_same_however_it_is_named(
    trained: dict[str, Any], validated: dict[str, Any], overlap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its configuration is the only one, which need not be named, and a split may be one of several."""
    opened = SimpleNamespace(info=SimpleNamespace(config_name="only"))
    monkeypatch.setattr(HubDataset, "_open", lambda _: opened)
    sources = [TextSource(HubDataset("some/text", **settings)) for settings in (trained, validated)]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        warn_of_overlap(*sources)
    assert [str(one.message)[:9] for one in told] == ["some/text"] * overlap


def test_validation_alone_needs_no_training_text(tmp_path: Path) -> None:
    data = TextDataModule(
        byte_tokenizer(prefix=2),
        str(tmp_path / "gone.jsonl"),
        validation_text=lines(tmp_path / "v.jsonl"),
        seq_length=16,
    )
    assert data.first_target == 2
    assert len(data.val_dataloader()) > 0
    data.bos = "none"
    assert data.first_target == 1


@pytest.mark.parametrize(
    "text",
    ["word " * 20_000 + "\n", "a line\n" * 10_000 + "word " * 20_000 + "\n", "é" * 40_000, "é" * 40_000 + " é\n"],
)
def test_a_line_end_at_the_end_leaves_a_twentieth(text: str, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(text)
    parts = [TextSource.open(str(file), share=share).documents(repeat=False) for share in ("train", "held_out")]  # type: ignore[arg-type]
    train, held_out = ("".join(document.text for _, document in part) for part in parts)
    assert train + held_out == text
    assert 0.03 < len(held_out.encode()) / len(text.encode()) < 0.06


# -- the hub -------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Exception]:
    """A hub dataset with one split; the errors that the next attempts to open it meet."""
    real, errors, file = datasets.load_dataset, list[Exception](), lines(tmp_path / "hub.jsonl", 100)

    def load(name: str, config: str | None, *, split: str, streaming: bool) -> Any:
        if errors:
            raise errors.pop()
        if split != "train":
            raise ValueError(f"Bad split: {split}")
        return real("json", data_files=[file], split="train", streaming=True, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", load)
    return errors


@pytest.mark.usefixtures("hub")
def test_a_dataset_without_a_split_for_validation(monkeypatch) -> None:
    message = (
        r"^No validation text: .*Bad split: validation\)\. Choose with --data\.validation_config_name and "
        r"--data\.validation_split\. .*--data\.validation_text FILE\.jsonl\. --data\.validation_split train holds out"
    )
    with pytest.raises(UserError, match=message):
        on_ranks(1, "some/text", monkeypatch, validation_sequences=2).setup("fit")
    on_ranks(1, "some/text", monkeypatch, validation_sequences=2, validation_split="train").setup("fit")


def test_another_process_opens_a_dataset_again_until_it_can(hub: list[Exception]) -> None:
    pauses: list[float] = []
    dataset = HubDataset("some/text", sleep=pauses.append)
    expected = [document.text for _, document in TextSource(dataset).documents(repeat=False)]
    worker = pickle.loads(pickle.dumps(dataset))  # as a data worker gets it
    worker.sleep = pauses.append
    hub += [ConnectionError("429"), TimeoutError("slow")]
    with pytest.warns(UserWarning, match="next try in"):
        assert [document.text for _, document in TextSource(worker).documents(repeat=False)] == expected
    assert len(pauses) == 2
    hub += [ConnectionError("429")]
    with pytest.raises(UserError, match="could not be reached"):  # a text that was never there
        len(HubDataset("some/text"))


@pytest.mark.usefixtures("hub")
def test_a_list_of_one_dataset_is_that_dataset() -> None:
    data = TextDataModule(
        TOKENIZER, ["allenai/c4"], seq_length=16, validation_split="train", validation_config_name="en"
    )
    trained = [document.text for _, document in data.stream.source.documents(repeat=False)]
    assert 80 <= len(trained) < 100


# -- what is recorded ----------------------------------------------------------------------------------------------


def test_the_record_of_a_text_has_what_it_is_of(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"separator": "blank_line", "config_name": "en", "split": "some", "text_column": "body"}
    data = TextDataModule(TOKENIZER, lines(tmp_path / "a.jsonl"), seq_length=16, **settings)
    assert settings.items() <= data.record().items()
    plain = TextDataModule(TOKENIZER, lines(tmp_path / "a.jsonl"), seq_length=16).record()
    assert plain["separator"] == "end_token"
    assert {"config_name", "split", "text_column"}.isdisjoint(plain)


def test_a_file_that_is_gone_when_a_checkpoint_names_it(tmp_path: Path) -> None:
    data = TextDataModule(TOKENIZER, lines(tmp_path / "a.jsonl"), seq_length=16)
    assert data.stream is not None
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(UserError, match=r"a\.jsonl cannot be read \(No such file"):
        data.state_dict()


@pytest.mark.parametrize("text", ["", ["a.jsonl", ""]])
def test_a_text_without_a_name(text: Any) -> None:
    with pytest.raises(UserError, match=r"The name of a text is empty\. Name a file"):
        TextSource.open(text)
