"""Texts that never end, unpack to gigabytes or are no files: one line, in bounded time and memory."""

import gzip
import json
import os
import re
import socket
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bounded import measured
from hypothesis import given, settings
from hypothesis import strategies as st

from leap_pl.data import textless
from leap_pl.data.calibration import held_out_tokens
from leap_pl.data.local import LocalFiles
from leap_pl.data.parquet import column_values
from leap_pl.data.parquet_pages import Chunk, chunks, largest_page
from leap_pl.data.source import TextSource
from leap_pl.errors import UserError
from leap_pl.inputs.reading import check_regular, open_regular, read_json, read_regular

READ = """
from leap_pl.data.source import TextSource
def read(name):
    return sum(1 for _ in TextSource.open(name).documents(repeat=False))
for name in sys.argv[1:]:
    told(lambda: read(name))
"""
MIB = 1 << 20


def many_times(part: bytes, times: int) -> bytes:
    """A gzip file of ``part`` over and over: members stand one behind the other."""
    return gzip.compress(part, mtime=0) * times


# -- no regular files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["text.jsonl", "text.jsonl.gz", "text.txt", "text.parquet"])
@pytest.mark.parametrize("kind", ["pipe", "device", "endless device", "socket", "kernel's"])
def test_what_is_no_regular_file(tmp_path: Path, name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / name
    monkeypatch.chdir(tmp_path)  # the path of a socket has a length limit
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as opened:
            opened.bind(name)
    else:
        file.symlink_to({"device": "/dev/null", "endless device": "/dev/zero", "kernel's": "/proc/kmsg"}[kind])
    with pytest.raises(UserError) as caught:
        list(TextSource.open(str(file)).documents(repeat=False))
    assert "\n" not in str(caught.value)
    assert str(file) in str(caught.value)
    if kind != "kernel's":
        assert "Save its content in a regular file" in str(caught.value)
    try:  # what stood there before may have become one, as in a resumed run
        documents = list(LocalFiles([file]).read(0, None))
    except UserError as error:
        assert str(file) in str(error)
    else:  # of size 0, as an empty file, and without a document
        assert (kind, documents) == ("kernel's", [])


def test_a_pipe_that_takes_the_place_of_a_file_between_two_looks(tmp_path: Path, monkeypatch) -> None:
    """Opened without waiting for a writer, and looked at again."""
    os.mkfifo(tmp_path / "pipe")
    real, looks = Path.stat, []

    def stat_once(self: Path, **choices: bool) -> os.stat_result:
        looks.append(self)
        return real(Path(__file__)) if len(looks) == 1 else real(self, **choices)

    monkeypatch.setattr(Path, "stat", stat_once)
    with pytest.raises(UserError, match="is a pipe"):
        open_regular(tmp_path / "pipe")


def test_names_that_no_file_can_have() -> None:
    for name in ("a" * 5000 + ".jsonl", "a\0b.jsonl"):
        with pytest.raises(UserError) as caught:
            TextSource.open(name)
        assert "\n" not in str(caught.value)
        with pytest.raises(UserError):
            check_regular(name)


def test_a_file_is_read_up_to_its_limit(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(b"[" + b"1," * 10 + b"1]")
    size = file.stat().st_size
    assert check_regular(file) == size
    assert read_regular(file, most=size) == file.read_bytes()
    assert read_json(file, most=size) == [1] * 11
    with pytest.raises(UserError, match=f"more than {size - 1} bytes"):
        read_regular(file, most=size - 1)
    for content in (b"[" * 100_000, b"{", b"\xff", b"1" * 5000, b""):
        file.write_bytes(content)
        with pytest.raises(UserError, match="does not contain valid JSON") as caught:
            read_json(file, most=MIB, what="results")
        assert str(caught.value).startswith(f"results {file}")
        assert len(str(caught.value)) < 500


# -- nothing, for gigabytes -----------------------------------------------------------------------------------


def test_gigabytes_of_nothing_in_small_files(tmp_path: Path) -> None:
    """Each of some MB at most: lines without text, lines without end, and rows without text."""
    contents = {
        "newlines.jsonl.gz": many_times(b"\n" * (64 * MIB), 32),
    }
    fewer = {  # the same limits, lower, for these take longer
        "spaces.jsonl.gz": many_times(b" " * (64 * MIB), 8),
        "empty.jsonl.gz": many_times(b'{"text": ""}\n' * MIB, 8),
        "blank.json.gz": many_times(b'{"text": " \\n "}\n' * MIB, 8),
        "junk.jsonl.gz": many_times(b'{"text": "a"}\n', 1) + many_times(b"[1]\n" * MIB, 8),
    }
    for name, content in (contents | fewer).items():
        (tmp_path / name).write_bytes(content)
    rows = pa.table({"text": pa.DictionaryArray.from_arrays(pa.array([0] * 2_000_000, pa.int32()), pa.array([""]))})
    pq.write_table(rows, tmp_path / "empty.parquet")
    assert max(file.stat().st_size for file in tmp_path.iterdir()) < 4 * MIB
    low = "from leap_pl.data import textless\ntextless.MOST_RECORDS, textless.MOST_BYTES = 50_000, 1 << 28\n"
    for names in ([*contents], [*fewer, "empty.parquet"]):
        found = measured(READ if "newlines.jsonl.gz" in names else low + READ, *(tmp_path / name for name in names))
        for name, (message, grown) in zip(names, found, strict=True):
            assert message.startswith(str(tmp_path / name)), message
            assert re.search(r" consecutive (lines|rows|bytes) contain no text", message)
            assert "\n" not in message
            assert grown < 400, name


@pytest.mark.parametrize("share", ["all", "train", "held_out"])
@pytest.mark.parametrize("kind", [".jsonl", ".parquet"])
def test_a_stretch_without_text_may_be_so_long_and_no_longer(tmp_path: Path, monkeypatch, share, kind: str) -> None:
    """Counted anew behind each text, in the held-out share as in the others."""
    monkeypatch.setattr(textless, "MOST_RECORDS", 200)
    for empty, refused in ((190, False), (450, True)):
        texts = ([f"text {k}" for k in range(60)] + [""] * empty) * 3 + ["end"]
        file = tmp_path / f"{empty}{kind}"
        if kind == ".parquet":
            pq.write_table(pa.table({"text": texts}), file)
        else:
            file.write_text("".join(json.dumps({"text": text}) + "\n" if text else "\n" for text in texts))
        source = TextSource.open(str(file), share=share)
        if refused:
            with pytest.raises(UserError, match=r"200 consecutive (lines|rows) contain no text"):
                list(source.documents(repeat=False))
        elif share != "held_out":
            assert len(list(source.documents(repeat=False))) > 100
    # Few lines, of which each is long.
    monkeypatch.setattr(textless, "MOST_BYTES", 1000)
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": "a"}) + "\n" + ("[" + "1," * 400 + "1]\n") * 3)
    with pytest.warns(UserWarning, match="skipped"), pytest.raises(UserError, match="1,000 consecutive bytes"):
        list(TextSource.open(str(tmp_path / "long.jsonl")).documents(repeat=False))


def test_an_empty_hub_dataset_ends(monkeypatch) -> None:
    from leap_pl.data.hub import HubDataset

    monkeypatch.setattr(textless, "MOST_RECORDS", 50)
    dataset = HubDataset("some/text")
    monkeypatch.setattr(dataset, "_open", lambda: Rows())
    with pytest.raises(UserError, match=r"some/text \(train\), shard 0: 50 consecutive rows contain no text"):
        list(dataset.read(0, None))


class Rows:
    """A streamed dataset of empty rows, without end."""

    num_shards = 1

    def shard(self, **which: int) -> "Rows":
        return self

    def state_dict(self) -> dict[str, int]:
        return {}

    def iter(self, batch_size: int):
        while True:
            yield {"text": [""] * batch_size}


def test_a_text_to_evaluate_on_is_held_whole_and_has_a_limit(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("leap_pl.data.calibration.MOST_CHARACTERS", 1000)
    from tiny import byte_tokenizer

    (tmp_path / "a.txt").write_text("word " * 400)
    with pytest.raises(UserError, match=r"more than 1,000 characters.*--max_tokens"):
        held_out_tokens(str(tmp_path / "a.txt"), byte_tokenizer())
    for most in (20, 150, 900):  # eight characters a token are more than the limit
        assert len(held_out_tokens(str(tmp_path / "a.txt"), byte_tokenizer(), most=most)) == most
    (tmp_path / "a.jsonl").write_text('{"text": "12345678"}\n' * 150)  # ten with the blank line
    with pytest.raises(UserError, match=r"more than 1,000 characters.* Lower --max_tokens below 936, or give a shor"):
        held_out_tokens(str(tmp_path / "a.jsonl"), byte_tokenizer(), most=1200)
    assert len(held_out_tokens(str(tmp_path / "a.jsonl"), byte_tokenizer(), most=900)) == 900
    (tmp_path / "b.jsonl").write_text('{"text": "12345678"}\n' * 99 + '{"text": "1234567890"}\n')  # as many as may be
    assert len(held_out_tokens(str(tmp_path / "b.jsonl"), byte_tokenizer(), most=1200)) == 1000
    (tmp_path / "b.txt").write_text("word " * 190)
    assert len(held_out_tokens(str(tmp_path / "b.txt"), byte_tokenizer())) == 950


# -- Parquet --------------------------------------------------------------------------------------------------


def test_long_values_that_a_dictionary_repeats(tmp_path: Path) -> None:
    """Of a few kilobytes: 200 rows of 40 MiB, which are handed on a few at a time."""
    rows = pa.DictionaryArray.from_arrays(pa.array([0] * 200, pa.int32()), pa.array(["x" * (40 * MIB)]))
    file = tmp_path / "repeated.parquet"
    pq.write_table(pa.table({"text": rows}), file, compression="zstd", dictionary_pagesize_limit=1 << 30)
    assert file.stat().st_size < MIB
    code = READ.replace("sum(1 for _ in", "next(").replace("documents(repeat=False))", "documents())[1].text[:3]")
    [(read, grown)] = measured(code, file)
    assert read == "no error: 'xxx'"
    assert grown < 1200  # 64 rows at once took 5,000


def varint(value: int) -> bytes:
    value <<= 1  # zigzag of a positive one
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def test_a_dictionary_that_asks_for_gigabytes(tmp_path: Path) -> None:
    """Its header counts 450 million values, for which 7 GB are allocated before the first is looked at."""
    whole = tmp_path / "whole.parquet"
    texts = [f"document {k % 100}" for k in range(300)]
    pq.write_table(pa.table({"text": texts}), whole, compression="none", write_statistics=False)
    with whole.open("rb") as file:
        [chunk] = chunks(file, "text", "a")
        assert largest_page(file, chunk, "a") > 1000
    data, start = whole.read_bytes(), chunk.start
    assert start == pq.ParquetFile(whole).metadata.row_group(0).column(0).dictionary_page_offset
    # The dictionary page's own header: field 7, in which field 1 is the number of values.
    at = data.index(b"\x4c\x15" + varint(100), start, start + 64) + 2
    (tmp_path / "many.parquet").write_bytes(data[:at] + varint(450_000_000) + data[at + len(varint(100)) :])
    # Fields 2 and 3: its sizes.
    at = start + data[start:].index(b"\x15") + 3
    for name, size in (("large", 2_000_000_000), ("huge", 7_000_000_000)):
        length = next(n for n in range(1, 6) if data[at + n - 1] < 128)
        (tmp_path / f"{name}.parquet").write_bytes(data[:at] + varint(size) + data[at + length :])
    found = measured(READ, *(tmp_path / f"{name}.parquet" for name in ("many", "large", "huge")))
    for (message, grown), words in zip(
        found,
        ("cannot hold 450,000,000 values", "a dictionary of 2,000,000,000 bytes", "7,000,000,000 bytes"),
        strict=True,
    ):
        assert words in message
        assert str(tmp_path) in message
        assert grown < 400


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd", "gzip"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_the_pages_of_intact_files_are_understood(tmp_path: Path, compression: str, version: str) -> None:
    """Of every writer's setting; the sizes add up to what the file says of the column."""
    texts = [f"document {k} " * (k % 50) for k in range(3000)]
    for choices in ({"use_dictionary": False}, {"use_dictionary": True}, {"row_group_size": 700}):
        file = tmp_path / "a.parquet"
        pq.write_table(
            pa.table({"id": list(range(3000)), "text": texts}),
            file,
            compression=compression,
            data_page_version=version,
            data_page_size=20_000,
            **choices,
        )
        told = pq.ParquetFile(file).metadata
        with file.open("rb") as opened:
            found = chunks(opened, "text", "a")
            assert len(found) == told.num_row_groups
            for group, chunk in enumerate(found):
                column = told.row_group(group).column(1)
                assert chunk.rows == told.row_group(group).num_rows
                assert chunk.length == column.total_compressed_size
                assert chunk.start == (column.dictionary_page_offset or column.data_page_offset)
                assert 1000 < largest_page(opened, chunk, "a") <= column.total_uncompressed_size
        assert [d.text for d in LocalFiles([file]).read(0, None)] == texts
        middle = list(LocalFiles([file]).read(0, None))[1499]
        assert [d.text for d in LocalFiles([file]).read(0, middle.after)] == texts[1500:]


def test_kinds_of_columns(tmp_path: Path) -> None:
    texts = ["one", "two", "one"]
    for kind in (pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string()), pa.string_view()):
        pq.write_table(pa.table({"text": pa.array(texts).cast(kind)}), tmp_path / "a.parquet")
        assert [d.text for d in LocalFiles([tmp_path / "a.parquet"]).read(0, None)] == texts, kind
    for column in ([["a"], ["b"]], [{"a": "b"}], [1, 2], [1.5]):
        pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
        with pytest.raises(UserError, match=r"has the column 'text' with .*, not text"):
            list(LocalFiles([tmp_path / "a.parquet"]).read(0, None))


@settings(max_examples=150, deadline=None)
@given(raw=st.binary(max_size=200), start=st.integers(0, 250), length=st.integers(0, 300))
def test_any_bytes_for_a_page_header(
    tmp_path_factory: pytest.TempPathFactory, raw: bytes, start: int, length: int
) -> None:
    """Sizes, or one line."""
    file = tmp_path_factory.getbasetemp() / "pages.bin"
    file.write_bytes(raw)
    with file.open("rb") as opened:
        try:
            assert largest_page(opened, Chunk(1, start, length), file.name) >= 0
        except UserError as error:
            assert "\n" not in str(error)
            assert file.name in str(error)


@settings(max_examples=150, deadline=None)
@given(footer=st.binary(max_size=200), length=st.none() | st.integers(0, (1 << 32) - 1))
def test_any_bytes_for_a_footer(tmp_path_factory: pytest.TempPathFactory, footer: bytes, length: int | None) -> None:
    """One line, for no bytes so short say of a column what is needed."""
    file = tmp_path_factory.getbasetemp() / "footer.bin"
    told = len(footer) if length is None else length
    file.write_bytes(footer + told.to_bytes(4, "little") + b"PAR1")
    with file.open("rb") as opened:
        try:
            assert chunks(opened, "text", file.name) == []
        except UserError as error:
            assert "\n" not in str(error)
            assert file.name in str(error)


def test_a_long_footer_is_refused_before_arrow_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pq, "ParquetFile", lambda *_: pytest.fail("Arrow reads it"))
    path, length = tmp_path / "long.parquet", (16 << 20) + 1
    with path.open("wb") as file:
        file.write(b"PAR1")
        file.truncate(4 + length)
        file.seek(0, 2)
        file.write(length.to_bytes(4, "little") + b"PAR1")
    with pytest.raises(UserError, match=r"has a footer of 16,777,217 bytes; at most 16,777,216 are read"):
        next(column_values(path, "text", 0))


def test_a_footer_that_ends_the_process_in_arrow(tmp_path: Path) -> None:
    """A histogram of the wrong length in what is said of a column: an exception that nothing above Arrow catches."""
    texts = [f"document {k} of these " * (k % 7) for k in range(60)]
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"id": list(range(60)), "text": texts}), file, row_group_size=25)
    data = file.read_bytes()
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    names = [tmp_path / f"{place}.parquet" for place in range(footer, len(data) - 8)]
    for place, name in zip(range(footer, len(data) - 8), names, strict=True):
        name.write_bytes(data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :])
    ends = [message for message, _ in measured(READ, *names)]
    assert len(ends) == len(names)  # the process has lived
    assert not [message for message in ends if message.startswith("TRACEBACK")]
    assert len([message for message in ends if message.startswith(str(tmp_path))]) > 50
