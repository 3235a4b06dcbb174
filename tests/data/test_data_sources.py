"""Local files and hub datasets: what is read, what is held out, and one clear line for everything that fails."""

import errno
import gzip
import json
import logging
import os
import pickle
import warnings
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub.errors import HfHubHTTPError
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tiny import byte_tokenizer

from leap_pl.data import BlockStream, TextSource, calibration_blocks, held_out_tokens, local
from leap_pl.data.documents import Reading, Share, in_share, repaired
from leap_pl.data.hub import TRIES, HubDataset
from leap_pl.data.local import LocalFiles
from leap_pl.errors import UserError
from leap_pl.training.datamodule import TextDataModule

DOCUMENTS = [f"document {k}\nof these" + "\n" * (k % 3) for k in range(150)]


def write(folder: Path, kind: str, documents: list[str] = DOCUMENTS) -> Path:
    file = folder / f"text{kind}"
    lines = "".join(json.dumps({"url": "u", "text": text}) + "\n" for text in documents)
    if kind == ".parquet":
        pq.write_table(pa.table({"url": ["u"] * len(documents), "text": documents}), file, row_group_size=40)
    elif kind == ".txt":
        file.write_text("".join(documents))
    else:
        file.write_bytes(gzip.compress(lines.encode()) if kind.endswith(".gz") else lines.encode())
    return file


def texts(*names: str | Path, **choices: Any) -> list[str]:
    source = TextSource.open([str(name) for name in names], **choices)
    return [document.text for _, document in source.documents(repeat=False)]


KINDS = [".jsonl", ".jsonl.gz", ".json.gz", ".parquet"]


@pytest.mark.parametrize("kind", KINDS)
def test_documents_of_every_kind(kind: str, tmp_path: Path) -> None:
    assert texts(write(tmp_path, kind)) == DOCUMENTS


@pytest.mark.parametrize("kind", [*KINDS, ".txt"])
def test_every_kind_goes_on_from_every_state(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "TEXT_PART_BYTES", 50)
    files = LocalFiles([write(tmp_path, kind)])
    documents = list(files.read(0, None))
    for at in range(0, len(documents), 7):
        state = json.loads(json.dumps(documents[at].after))
        assert list(files.read(0, state)) == documents[at + 1 :]


@pytest.mark.parametrize("kind", [*KINDS, ".txt"])
def test_shares_are_a_partition(kind: str, tmp_path: Path) -> None:
    file = write(tmp_path, kind)
    train, held_out, everything = (texts(file, share=share) for share in ("train", "held_out", "all"))
    if kind == ".txt":
        assert train[0] + held_out[0] == everything[0]
        assert 0.03 < len(held_out[0]) / len(everything[0]) < 0.06
        assert held_out[0].startswith("\n")
    else:
        assert sorted(train + held_out) == sorted(everything)
        assert 3 <= len(held_out) <= 15
        assert texts(file, share="held_out", seed=5) == held_out


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200) | st.text("é €\n🙂a", max_size=80).map(str.encode), st.integers(1, 30))
def test_text_files_are_read_byte_for_byte(tmp_path: Path, raw: bytes, part: int) -> None:
    assume(not raw.startswith((BOM_UTF16_LE, BOM_UTF16_BE)))
    file = tmp_path / "a.txt"
    file.write_bytes(raw)
    old, local.TEXT_PART_BYTES = local.TEXT_PART_BYTES, max(part, 5)
    try:
        shares: list[Share] = ["all", "train", "held_out"]
        got = {share: "".join(d.text for d in LocalFiles([file], share=share).read(0, None)) for share in shares}
    finally:
        local.TEXT_PART_BYTES = old
    try:
        expected = raw.decode()
    except UnicodeDecodeError:
        assert set("".join(got.values())) >= {"\ufffd"}
        return
    expected = expected.removeprefix("\ufeff").replace("\0", "\ufffd")
    assert got["all"] == expected
    assert (got["train"] + got["held_out"]).removeprefix("\ufeff") == expected


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.binary(max_size=40) | st.just(b'{"text": "good"}') | st.just(b'{"text": "\xff\x00"}'), max_size=8))
@pytest.mark.filterwarnings("ignore:.*it is|.*like this")
def test_any_bytes_give_texts_or_one_line(tmp_path: Path, lines: list[bytes]) -> None:
    for name in ("a.jsonl", "a.parquet", "a.jsonl.gz", "a.txt"):
        file = tmp_path / name
        file.write_bytes(b"\n".join(lines))
        try:
            for text in texts(file):
                byte_tokenizer()(text)
        except UserError as error:
            assert "\n" not in str(error)


def test_bad_lines_are_skipped_and_counted(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    rows = [
        b'{"text": "one"}',
        b"{not json",
        b"[1]",
        b'{"text": 3}',
        b"",
        b'{"text": ""}',
        b'{"text": null}',
        b'{"a": 1}',
    ]
    file.write_bytes(b"\n".join([*rows, b"[" * 100_000, b"[2]", b'{"text": "two"}']))
    with pytest.warns(UserWarning, match="line") as caught:
        assert texts(file) == ["one", "two"]
    said = [str(warning.message).removeprefix(f"{file}: ") for warning in caught]
    assert said[0].startswith("line 2 is not JSON (")
    assert "line 3 is not a JSON object; it is skipped." in said
    assert "line 4 has int, not text, under 'text'; it is skipped." in said
    assert "line 8 has no 'text'; it is skipped." in said
    assert "2 lines like this: line is not a JSON object." in said


def test_messages_in_the_place_of_text_are_told_of_chat_templates(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "Hello"}]}] * 3
    lines, table = tmp_path / "a.jsonl", tmp_path / "a.parquet"
    lines.write_text("\n".join(json.dumps(row) for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), table)
    for file in (lines, table):
        with warnings.catch_warnings(), pytest.raises(UserError, match="by the tokenizer's chat template"):
            warnings.simplefilter("ignore")
            list(LocalFiles([file], text_column="messages").read(0, None))


def test_one_bad_line_that_is_alone_in_its_share_is_skipped(tmp_path: Path) -> None:
    """A file is refused if no line of it is good, of whatever share."""
    places = [n for n in range(60) if in_share("held_out", 0, n)]
    for bad in ('{"a": 1}', "{not json"):
        file = tmp_path / "a.jsonl"
        lines = [json.dumps({"text": f"line {n}"}) for n in range(60)]
        lines[places[0]] = bad
        few = lines[: places[1]]  # the bad line is all of their held-out part
        file.write_text("\n".join(few))
        with pytest.warns(UserWarning, match=rf"line {places[0] + 1} .*skipped"):
            assert list(LocalFiles([file], share="held_out").read(0, None)) == []
        file.write_text("\n".join(lines))
        with pytest.warns(UserWarning, match=rf"line {places[0] + 1} .*skipped"):
            assert texts(file, share="held_out") == [f"line {n}" for n in places[1:]]
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # what is outside the share is not told
            assert len(texts(file, share="train")) == 60 - len(places)
        file.write_text("\n".join([bad] * 60))
        for share in ("train", "held_out"):
            with pytest.raises(UserError, match=r"has no column|none of the"):
                texts(file, share=share)


def test_a_file_that_is_named_twice_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path, ".jsonl")
    (tmp_path / "link.jsonl").symlink_to(file)
    for names in ([str(file)] * 2, [str(tmp_path / "*.jsonl")], [str(file), str(file.parent / "." / file.name)]):
        for share in ("train", "held_out"):
            with pytest.raises(UserError, match=r"is named twice in the text: its held-out part would be trained on"):
                TextSource.open(names, share=share)
        assert len(TextSource.open(names).shards) == 2  # where nothing is held out
    text = tmp_path / "a.txt"
    text.write_text("one two three. " * 99)
    assert len(TextSource.open([str(text)] * 2, share="train").shards) == 2  # cut by position


def test_bytes_that_no_tokenizer_takes_are_mended(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"text": "a\x00b"}\n{"text": "\xff"}\n{"text": "\\ud800 \\u0000"}\n')
    with pytest.warns(UserWarning, match="replaced by U\\+FFFD"):
        assert texts(file) == ["a\ufffdb", "\ufffd", "\ufffd \ufffd"]
    column = pa.array([b"\xffz"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    with pytest.warns(UserWarning, match="row 1 has NUL, invalid UTF-8"):
        assert texts(tmp_path / "a.parquet") == ["\ufffdz"]
    assert repaired("a\U0001f642") == ("a\U0001f642", False)


def _truncated_gzip(folder: Path) -> str:
    raw = gzip.compress(json.dumps({"text": "words " * 1000}).encode())
    (folder / "cut.jsonl.gz").write_bytes(raw[: len(raw) // 2])
    return str(folder / "cut.jsonl.gz")


def _written(name: str, content: bytes) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        (folder / name).write_bytes(content)
        return str(folder / name)

    return make


def _damaged_parquet(folder: Path) -> str:
    raw = bytearray(write(folder, ".parquet").read_bytes())
    footer = int.from_bytes(raw[-8:-4], "little")
    raw[4 : -8 - footer] = b"\xff" * (len(raw) - 12 - footer)
    return _written("broken.parquet", bytes(raw))(folder)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: f"{folder}/none.jsonl", "There is no file .*none.jsonl. Name one that exists, or a hub"),
        (lambda folder: "none.jsonl", "There is no file none.jsonl"),
        # A builder of datasets, which would read all files under the working directory.
        *((lambda folder, name=name: name, f"There is no file {name}. Name one") for name in ("text", "json", "csv")),
        (lambda folder: f"{folder}/*.jsonl", r"No file matches .*\*.jsonl"),
        (lambda folder: str(folder), r"is a folder. Name the files in it, such as .*/\*.jsonl"),
        (_written("a.csv", b"x"), r"a.csv: files of this type .* Give .jsonl, .jsonl.gz"),
        (_written("a.jsonl", b'{"url": 1, "body": "b"}\n'), "has no column 'text'; it has: url, body. .*text_column"),
        (_written("a.jsonl", b"{\n[]\n"), "none of the 2 lines read is a JSON object with a text; line 1 is not JSON"),
        (_written("a.jsonl", b"\n\n"), "a.jsonl contains no text"),
        (
            _written("a.json", b'[\n{"text": "a"},\n{"text": "b"}\n]'),
            "a.json is one JSON list. Write an object on",
        ),
        (_written("a.txt", "some text ".encode("utf-16")), "a.txt is UTF-16, not UTF-8. Convert it: iconv"),
        (_written("a.txt", b""), "a.txt contains no text"),
        (_written("a.jsonl.gz", b'{"text": "not compressed"}'), "a.jsonl.gz is not a valid gzip file"),
        (_truncated_gzip, "cut.jsonl.gz is not a valid gzip file .*Fetch it again"),
        (_written("a.parquet", b"nothing"), "a.parquet is not a valid Parquet file"),
        (_damaged_parquet, "broken.parquet is not a valid Parquet file"),
        (lambda folder: _written("a.jsonl", b'{"text": "short"}\n')(folder), "makes 6 tokens, and one block takes 512"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*it is skipped")
def test_one_clear_line(make: Callable[[Path], str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as caught:
        next(BlockStream(TextSource.open(make(tmp_path)), byte_tokenizer(), 512).blocks())
    assert "\n" not in str(caught.value)


def test_lists_are_files_or_one_hub_id(tmp_path: Path) -> None:
    file = str(write(tmp_path, ".jsonl"))
    with pytest.raises(UserError, match="There is no file 'allenai/c4', and hub ids cannot be listed"):
        TextSource.open([file, "allenai/c4"])
    with pytest.raises(UserError, match="No file of this list exists"):
        TextSource.open(["a/b", "allenai/c4"])
    with pytest.raises(UserError, match="is empty"):
        TextSource.open([])
    shards = TextSource.open("allenai/c4").shards
    assert isinstance(shards, HubDataset)
    assert (shards.config_name, shards.name) == ("en", "allenai/c4 (en, train)")


def test_parquet_column_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no column 'body'; it has: url, text"):
        texts(write(tmp_path, ".parquet"), text_column="body")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A hub with one dataset of three shards; the texts in it."""
    real = datasets.load_dataset
    files = []
    for shard in range(3):
        file = tmp_path / f"{shard}.jsonl"
        file.write_text("".join(json.dumps({"text": f"{shard}.{k}" * (k != 5)}) + "\n" for k in range(100)))
        files.append(str(file))

    def load(name: str, config: str | None, *, split: str, streaming: bool) -> Any:
        assert streaming
        if name == "no/where":
            raise ConnectionError("Couldn't reach the Hub\nat all")
        if split not in ("train", "validation"):
            raise ValueError(f'Bad split: {split}. Available splits: ["train", "validation"]')
        data_files = files if split == "train" else files[:1]
        return real("json", data_files=data_files, split="train", streaming=True, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", load)
    return [f"{shard}.{k}" for shard in range(3) for k in range(100) if k != 5]


def test_a_builder_of_datasets_is_no_dataset_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "private.txt").write_text("mine")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"text is no dataset of the hub\. Name one as USER/NAME"):
        len(HubDataset("text"))


def test_what_datasets_logs_controls_no_terminal(hub: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    len(HubDataset("some/text"))
    logger = logging.getLogger("datasets")
    handler = next(iter(logger.handlers))
    record = logging.LogRecord("datasets", logging.ERROR, "", 0, "column %s", ("\x1b[31m",), None)
    assert handler.filter(record)
    assert record.getMessage() == r"column \x1b[31m"


def test_hub_dataset_is_streamed_and_goes_on_from_every_state(hub: list[str]) -> None:
    dataset = HubDataset("some/text")
    assert len(dataset) == 3
    documents = [list(dataset.read(shard, None)) for shard in range(3)]
    assert [d.text for shard in documents for d in shard if d.text] == hub
    again = pickle.loads(pickle.dumps(dataset))  # as a data worker gets it
    for at in (0, 10, 63, 64, 65, 98, 99):
        state = json.loads(json.dumps(documents[1][at].after))
        assert [d.text for d in again.read(1, state)] == [d.text for d in documents[1][at + 1 :]]


def test_one_split_of_a_hub_dataset_can_be_divided(hub: list[str]) -> None:
    assert texts("some/text", share="train") == hub
    train, held_out = (texts("some/text", share=share, divide_split=True) for share in ("train", "held_out"))
    assert sorted(train + held_out) == sorted(hub)
    assert 5 <= len(held_out) <= 30


def test_a_run_validates_on_no_document_that_it_trains_on(hub: list[str]) -> None:
    """Also if both come from one split of a hub dataset."""
    data = TextDataModule(text="some/text", tokenizer=byte_tokenizer(), seq_length=8, validation_split="train")
    trained = {document.text for _, document in data.stream.source.documents(repeat=False)}
    held_out = {*hub} - trained
    assert 5 <= len(held_out) <= 30
    first = byte_tokenizer().decode(next(iter(data.val_dataloader()))["input_ids"].flatten()[:3].tolist())
    assert any(text.startswith(first) for text in held_out)


def test_a_validation_configuration_of_a_hub_dataset(hub: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also without another validation text; the training split is then read whole."""
    opened, real = [], TextSource.open

    def noted(*args: Any, **settings: Any) -> TextSource:
        opened.append((settings["config_name"], settings.get("divide_split")))
        return real(*args, **settings)

    monkeypatch.setattr(TextSource, "open", noted)
    text: dict[str, Any] = {"text": "some/text", "tokenizer": byte_tokenizer(), "seq_length": 8, "config_name": "a"}
    data = TextDataModule(validation_split="train", validation_config_name="b", **text)
    next(iter(data.val_dataloader()))
    next(data.stream.source.documents(repeat=False))
    assert sorted(opened) == [("a", False), ("b", False)]
    opened.clear()
    text |= {"text": "allenai/c4", "config_name": None}  # of which None is en
    data = TextDataModule(validation_split="train", validation_config_name="en", **text)
    next(iter(data.val_dataloader()))
    assert opened == [("en", True)]


def test_the_only_configuration_may_be_named_for_validation_alone(hub: list[str]) -> None:
    """Then too no document is trained and validated on."""
    data = TextDataModule(
        text="some/text",
        tokenizer=byte_tokenizer(),
        seq_length=8,
        validation_split="train",
        validation_config_name="default",  # as datasets calls it
    )
    trained = {document.text for _, document in data.stream.source.documents(repeat=False)}
    assert 5 <= len({*hub} - trained) <= 30


def test_the_configuration_of_a_hub_dataset_is_the_one_that_is_named(
    hub: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, load = [], datasets.load_dataset

    def noted(name: str, config: str | None, **options: Any) -> Any:
        asked.append((name, config))
        return load(name, config, **options)

    monkeypatch.setattr(datasets, "load_dataset", noted)
    tokenizer = byte_tokenizer()
    next(TextSource.open("some/text", config_name="b").documents())
    calibration_blocks("some/text", tokenizer, config_name="b", seq_length=8, sequences=1)
    held_out_tokens("some/text", tokenizer, config_name="b", split="train", most=8)
    assert set(asked) == {("some/text", "b")}
    assert len(asked) == 3
    for config_name in ("realnewslike", None):
        next(TextSource.open("allenai/c4", config_name=config_name).documents())
    assert asked[3:] == [("allenai/c4", "realnewslike"), ("allenai/c4", "en")]


def test_an_empty_shard_of_a_hub_dataset_leaves_the_digest_known(hub: list[str], tmp_path: Path) -> None:
    (tmp_path / "1.jsonl").write_text("")
    reading = Reading(HubDataset("some/text").read(1, None))
    assert list(reading) == []
    assert len(reading.digest or "") == 64


@pytest.mark.parametrize("known", [False, True])
def test_a_dataset_that_the_hub_refuses_is_not_asked_for_again(known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gated, private or missing: datasets says so by an error that is one of files."""

    def load(*given: Any, **options: Any) -> Any:
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'some/gated' is a gated dataset on the Hub.")

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr("leap_pl.data.hub.check_reachable", lambda *_: None)
    dataset = HubDataset("some/gated", sleep=lambda _: pytest.fail("it waits"))
    dataset._count = 1 if known else None
    with pytest.raises(UserError, match=r"no dataset 'some/gated', or it is gated or private .* `hf auth login`"):
        next(dataset.read(0, None)) if known else len(dataset)


def test_every_reader_says_that_it_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection fails alone, and all ranks wait for its reader."""
    monkeypatch.setattr("leap_pl.data.documents.get_worker_info", lambda: SimpleNamespace(id=1))
    dataset = HubDataset("some/text", sleep=lambda _: None)
    dataset._count = 1

    def load() -> Any:
        raise ConnectionError("no route")

    monkeypatch.setattr(dataset, "_load", load)
    with pytest.warns(UserWarning, match="no route; next try in"), pytest.raises(UserError, match="12 times in a row"):
        next(dataset.read(0, None))


@pytest.mark.parametrize(
    ("error", "answers", "pauses"),
    [
        (OSError("Corrupt snappy compressed data."), True, 2),
        (FileNotFoundError("data/0.jsonl"), True, 2),
        (EOFError("Compressed file ended before the end-of-stream marker was reached"), True, 11),
        (OSError("Corrupt snappy compressed data."), False, 11),
        (ConnectionError("no route"), True, 11),
        (TimeoutError("timed out"), True, 11),
        (OSError(5, "Input/output error"), True, 11),
    ],
)
def test_damaged_data_is_no_outage(
    error: Exception, answers: bool, pauses: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which a hub that answers tells apart, after the same failure of the same row three times."""
    waited: list[float] = []
    dataset = HubDataset("some/text", sleep=waited.append)
    dataset._count = 1

    def load() -> Any:
        raise error

    def reach(*_: object) -> None:
        if not answers:
            raise ConnectionError("no route")

    monkeypatch.setattr(dataset, "_load", load)
    monkeypatch.setattr("leap_pl.data.hub.check_reachable", reach)
    message = "12 times in a row" if pauses == 11 else "the data cannot be read .*Give another dataset, or a local file"
    with pytest.warns(UserWarning, match="next try in"), pytest.raises(UserError, match=message):
        next(dataset.read(0, None))
    assert len(waited) == pauses


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (
            HubDataset("no/where"),
            r"'no/where' could not be reached \(Couldn't reach the Hub at all\).*--data.text FILE",
        ),
        (HubDataset("some/text", split="dev"), r"cannot be opened \(Bad split: dev. Available splits: .*--data.split"),
        (HubDataset("some/text", text_column="body"), "has no column 'body'; it has: text."),
    ],
)
def test_hub_dataset_that_cannot_be_opened(dataset: HubDataset, message: str, hub: list[str]) -> None:
    with pytest.raises(UserError, match=message):
        len(dataset)


class Flaky:
    """A hub dataset whose connection breaks after every ``every`` batches of rows, ``times`` times."""

    def __init__(self, real: Any, every: int, times: int) -> None:
        self.real, self.every, self.times = real, every, times
        self.num_shards, self.column_names = real.num_shards, real.column_names

    def select_columns(self, columns: list[str]) -> "Flaky":
        return self

    def shard(self, **which: int) -> Any:
        outer, part = self, self.real.shard(**which)

        class Part:
            state_dict, load_state_dict = part.state_dict, part.load_state_dict

            def iter(self, batch_size: int) -> Any:
                for at, rows in enumerate(part.iter(batch_size)):
                    if at == outer.every and outer.times:
                        outer.times -= 1
                        raise ConnectionError("Server Disconnected")
                    yield rows

        return Part()


def test_network_faults_are_retried_from_where_they_struck(hub: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    load, pauses = datasets.load_dataset, []
    flaky = Flaky(load("some/text", None, split="train", streaming=True), every=1, times=2)
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: flaky)
    dataset = HubDataset("some/text", sleep=pauses.append)
    with pytest.warns(UserWarning, match="shard 0, row 64: Server Disconnected; next try in 2 s"):
        got = [d.text for shard in range(3) for d in dataset.read(shard, None) if d.text]
    assert got == hub
    assert pauses == [2.0, 2.0]  # in shards 0 and 1, each mended by the first new try


def test_faults_are_counted_from_the_last_row_that_came(hub: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leap_pl.data.hub._ROWS", 8)
    load, pauses = datasets.load_dataset, []
    flaky = Flaky(load("some/text", None, split="train", streaming=True), every=1, times=5)
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: flaky)
    dataset = HubDataset("some/text", sleep=pauses.append)
    with pytest.warns(UserWarning, match="next try in 2 s"):
        got = [d.text for d in dataset.read(0, None) if d.text]
    assert got == hub[: len(got)]
    assert len(got) > 40
    assert pauses == [2.0] * 5


def test_a_network_that_stays_away_is_reported_with_the_position(
    hub: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    load, pauses = datasets.load_dataset, []
    flaky = Flaky(load("some/text", None, split="train", streaming=True), every=0, times=99)
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: flaky)
    dataset = HubDataset("some/text", sleep=pauses.append)
    message = rf"some/text \(train\), shard 2, row 0: the network failed {TRIES} times in a row .*--ckpt_path"
    with pytest.warns(UserWarning, match="next try"), pytest.raises(UserError, match=message):
        list(dataset.read(2, None))
    assert pauses == [2.0, 4.0, 8.0, 16.0, 32.0, *[60.0] * (TRIES - 6)]


def test_rows_are_read_without_the_retries_of_datasets(hub: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Which would go on in the middle of a row: what an unpacked file had read when it failed is lost to them."""
    before, found = datasets.config.STREAMING_READ_MAX_RETRIES, []

    class Watched(Flaky):
        def shard(self, **which: int) -> Any:
            part = super().shard(**which)
            batches = part.iter

            def watched(batch_size: int) -> Any:
                for rows in batches(batch_size):
                    found.append(datasets.config.STREAMING_READ_MAX_RETRIES)
                    yield rows

            part.iter = watched
            return part

    watched = Watched(datasets.load_dataset("some/text", None, split="train", streaming=True), 0, 0)
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: watched)
    between = [datasets.config.STREAMING_READ_MAX_RETRIES for _ in HubDataset("some/text").read(0, None)]
    assert {*found} == {1}
    assert {*between} == {before}
    assert before > 1


def test_data_that_cannot_be_read_is_no_network_fault(hub: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(Flaky):
        def shard(self, **which: int) -> Any:
            raise ValueError("bad magic")

    broken = Broken(datasets.load_dataset("some/text", None, split="train", streaming=True), 0, 0)
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: broken)
    with pytest.raises(UserError, match=r"shard 0, row 0: the data cannot be read \(bad magic\)"):
        next(HubDataset("some/text").read(0, None))


def of_status(status: int) -> Exception:
    return HfHubHTTPError("an answer", response=SimpleNamespace(status_code=status, headers={}, request=None))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("error", "final"),
    [
        (gzip.BadGzipFile("Not a gzipped file"), True),
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (of_status(403), True),
        (of_status(404), True),
        (of_status(503), False),
        (of_status(429), False),
        (TimeoutError("no answer"), False),
        (EOFError("cut off"), False),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_waiting_does_not_mend_is_not_waited_for(
    hub: list[str], monkeypatch: pytest.MonkeyPatch, error: Exception, final: bool
) -> None:
    class Broken(Flaky):
        def shard(self, **which: int) -> Any:
            raise error

    broken, pauses = Broken(datasets.load_dataset("some/text", None, split="train", streaming=True), 0, 0), []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: broken)
    said = "the data cannot be read" if final else "the network failed"
    with warnings.catch_warnings(), pytest.raises(UserError, match=f"shard 0, row 0: {said}"):
        warnings.simplefilter("ignore")
        next(HubDataset("some/text", sleep=pauses.append).read(0, None))
    assert bool(pauses) != final


def test_many_files_of_any_names_have_an_identity(tmp_path: Path) -> None:
    """Names of an old archive are no UTF-8."""
    files = [tmp_path / os.fsdecode(b"\xe9 %d.txt" % number) for number in range(9)]
    for file in files:
        file.write_text("text")
    assert "(digest " in LocalFiles(files).identity()
