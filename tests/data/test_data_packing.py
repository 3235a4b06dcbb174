"""Blocks against a packing written out by hand, dealt to ranks and workers, and resumed at every position."""

import json
import pickle
from collections.abc import Iterable, Iterator
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import byte_tokenizer
from tokenizers import normalizers

from leap_pl.data import BlockStream, TextSource, calibration_blocks, held_out_tokens, local, packing
from leap_pl.data.batches import BEGINNING, BlockLoader, RankBatches
from leap_pl.data.documents import Document, State
from leap_pl.errors import UserError

TOKENIZER = byte_tokenizer()
END = TOKENIZER.eos_token_id


@pytest.fixture(scope="module", autouse=True)
def _small_chunks() -> Iterator[None]:
    """A few documents are several chunks, which readers share."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "CHUNK_PIECES", 3)
        yield


def test_a_blank_line_is_that_of_a_text_and_not_a_text_of_its_own() -> None:
    """Tokenizers made of SentencePiece's put a space before every text, and so before a blank line alone."""
    tokenizer = byte_tokenizer()
    plain = tokenizer("\n\n", add_special_tokens=False)["input_ids"]
    made = [BlockStream(TextSource(Listed(["a", "b"])), tokenizer, 8, "blank_line").end]
    spaced = byte_tokenizer()
    spaced.backend_tokenizer.normalizer = normalizers.Prepend(" ")
    assert spaced("\n\n", add_special_tokens=False)["input_ids"] != plain
    made.append(BlockStream(TextSource(Listed(["a", "b"])), spaced, 8, "blank_line").end)
    assert made == [plain, plain]


def test_a_continuous_text_has_one_separator_however_many_parts_are_read(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(local, "TEXT_PART_BYTES", 50)
    text, file = "a line of words\n" * 40, tmp_path / "text.txt"
    file.write_text(text)
    source = TextSource.open(str(file))
    assert len(list(source.documents(repeat=False))) > 5
    got = joined(block.tokens for block in BlockStream(source, TOKENIZER, 5).blocks(repeat=False))
    assert len(got) > 600
    assert got == [*TOKENIZER(text)["input_ids"], END][: len(got)]


class Listed:
    """Documents in memory, in shards."""

    name, share = "a list", "all"

    def __init__(self, *shards: list[str]) -> None:
        self.shards = shards

    def __len__(self) -> int:
        return len(self.shards)

    def read(self, shard: int, state: State | None) -> Iterator[Document]:
        for at in range(state["at"] if state else 0, len(self.shards[shard])):
            yield Document(self.shards[shard][at], {"at": at + 1})

    def identity(self) -> str:
        return self.name


def stream_of(*shards: list[str], seq_length: int = 5, seed: int | None = None) -> BlockStream:
    return BlockStream(TextSource(Listed(*shards), seed), TOKENIZER, seq_length)


def joined(lists: Iterable[list[Any]]) -> list[Any]:
    return list(chain.from_iterable(lists))


def write_lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


texts = st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12), max_size=12)


@settings(max_examples=60, deadline=None)
@given(texts, st.integers(1, 9))
def test_one_pass_is_all_tokens_in_order(documents: list[str], seq_length: int) -> None:
    expected: list[int] = []
    for text in documents:
        if text.strip():
            expected += [TOKENIZER.convert_tokens_to_ids(symbol) for symbol in TOKENIZER.tokenize(text)] + [END]
    if len(expected) < seq_length:
        with pytest.raises(ValueError, match=r"contains no text|makes \d+ tokens, and one block takes"):
            list(stream_of(documents, seq_length=seq_length).blocks(repeat=False))
        return
    blocks = [block.tokens for block in stream_of(documents, seq_length=seq_length).blocks(repeat=False)]
    whole = len(expected) // seq_length * seq_length
    assert all(len(block) == seq_length for block in blocks)
    assert joined(blocks) == expected[:whole]


def test_the_rest_of_a_pass_begins_the_next_one() -> None:
    with pytest.warns(UserWarning, match="the text repeats"):
        blocks = list(islice(stream_of(["abc"], seq_length=3).blocks(), 4))
    assert joined(block.tokens for block in blocks) == (TOKENIZER("abc")["input_ids"] + [END]) * 3


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.text("abc \n", max_size=7), max_size=4), min_size=1, max_size=4).filter(
        lambda shards: sum(len(text) for shard in shards for text in shard if text.strip()) > 4
    ),
    st.integers(0, 5),
)
def test_resume_at_every_position(shards: list[list[str]], seed: int) -> None:
    stream = stream_of(*shards, seed=seed)
    blocks = list(islice(stream.blocks(), 12))
    for at, block in enumerate(blocks):
        again = stream.blocks(json.loads(json.dumps(block.after)))
        assert [b.tokens for b in islice(again, 11 - at)] == [b.tokens for b in blocks[at + 1 :]]


def test_a_long_document_is_tokenized_in_pieces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = "".join(f"word{k} " + "\n" * (k % 7 == 0) for k in range(400)) + "x" * 300
    whole = [block.tokens for block in stream_of([text, "y" * 20]).blocks(repeat=False)]
    monkeypatch.setattr(packing, "PIECE_CHARACTERS", 64)
    seen: list[int] = []

    class Watched:
        eos_token_id, name_or_path = END, "watched"

        def __call__(self, batch: list[str], **settings: Any) -> Any:
            seen.extend(len(piece) for piece in batch)
            return TOKENIZER(batch, **settings)

    stream = BlockStream(TextSource(Listed([text, "y" * 20])), Watched(), 5)
    blocks = list(stream.blocks(repeat=False))
    assert [block.tokens for block in blocks] == whole
    assert max(seen) <= 64
    seen.clear()
    later = blocks[500]
    assert next(stream.blocks(later.after)).tokens == whole[501]
    assert sum(seen) < 3 * 64  # what comes before is not tokenized again
    assert len(pickle.dumps(later.after)) < 300


def test_a_line_of_several_megabytes(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "long.jsonl", ["word " * 600_000, "short"])
    stream = BlockStream(TextSource.open(str(file)), TOKENIZER, 100_000)
    assert sum(1 for _ in stream.blocks(repeat=False)) == (3_000_000 + 7) // 100_000


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(0, 12), st.integers(0, 3))
def test_ranks_and_workers_share_the_stream(
    ranks: int, workers: int, batch_size: int, rounds: int, stopped: int
) -> None:
    stream = stream_of(["abcdefg", "hi", "jklmnopqrstuv" * 3], ["wxyz"], seed=1)
    total = ranks * rounds * batch_size
    expected = [block.tokens for block in islice(stream.blocks(), total)]

    def dealt(start: Any, world: int, each: int) -> dict[int, list[list[int]]]:
        got: dict[int, list[list[int]]] = {}
        for rank in range(world):
            batches = RankBatches(stream, batch_size, each, rank=rank, world_size=world, start=start)
            readers = [stream.tokenized(start["position"], turn=turn, turns=workers) for turn in range(workers)]
            chunks = (next(readers[index % workers]) for index in count())  # the round robin of the data loader
            for index, batch in enumerate(batches.packed(chunks), start["consumed"] // world):
                got[index * world + rank] = batch["input_ids"].tolist()
                states[rank, index] = batch["position"]
        return got

    states: dict[tuple[int, int], Any] = {}
    got = dealt(BEGINNING, ranks, rounds)
    assert joined(got[j] for j in sorted(got)) == expected
    if stopped < rounds:
        # Lightning stores the state of rank zero; it must do for all, and on any number of ranks.
        for state in (states[0, stopped], states[ranks - 1, stopped]):
            later = dealt(state, ranks, rounds)
            assert later == {j: batch for j, batch in got.items() if j >= (stopped + 1) * ranks}
            alone = dealt(state, 1, ranks * rounds)
            assert alone == later


def test_an_uneven_number_of_ranks_is_refused() -> None:
    with pytest.raises(ValueError, match="8 micro-batches, which 3 ranks cannot have shared"):
        RankBatches(stream_of(["abc"]), 1, 9, world_size=3, start={**BEGINNING, "consumed": 8})


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_resumes_tensor_by_tensor(workers: int, tmp_path: Path) -> None:
    files = [write_lines(tmp_path / f"{k}.jsonl", [f"{k} {j} text" * (j + 1) for j in range(4)]) for k in range(3)]
    stream = BlockStream(TextSource.open([str(file) for file in files], seed=3), TOKENIZER, 16)
    batches = list(BlockLoader(RankBatches(stream, 2, 9), workers))
    assert len(batches) == 9
    for stopped in (0, 4, 8):
        loader = BlockLoader(RankBatches(stream, 2, 9, start=batches[stopped]["position"]), workers)
        assert len(loader) == 9
        rest = list(loader)
        assert len(rest) == 8 - stopped
        for batch, expected in zip(rest, batches[stopped + 1 :], strict=True):
            assert torch.equal(batch["input_ids"], expected["input_ids"])
            assert batch["position"] == expected["position"]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_fault_comes_after_what_was_read_before_it_and_in_one_line(workers: int, tmp_path: Path) -> None:
    good = write_lines(tmp_path / "a.jsonl", ["a" * 40])
    (tmp_path / "b.parquet").write_bytes(b"PAR1 but no more")
    stream = BlockStream(TextSource.open([str(good), str(tmp_path / "b.parquet")]), TOKENIZER, 10)
    with pytest.raises(ValueError, match=r"^\S*b\.parquet is not a valid Parquet file[^\n]*$"):
        list(BlockLoader(RankBatches(stream, 1, 9), workers))
    loaded = iter(BlockLoader(RankBatches(stream, 1, 9), workers))
    assert [next(loaded)["input_ids"].shape for _ in range(4)] == [(1, 10)] * 4


def test_messages_of_workers_do_not_grow_with_the_number_of_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One document in each file, as texts are collected; the digests of all are in the position all the same."""
    monkeypatch.setattr(packing, "CHUNK_PIECES", 256)
    files = [write_lines(tmp_path / f"{k:04}.jsonl", [f"document {k}"]) for k in range(1200)]
    stream = BlockStream(TextSource.open([str(file) for file in files], seed=3), TOKENIZER, 64)
    chunks = list(stream.tokenized(repeat=False))
    assert len(chunks) > 4
    sizes = [len(pickle.dumps(chunk)) for chunk in chunks[:-1]]
    assert max(sizes) < 1.2 * min(sizes)
    assert max(sizes) < 1 << 17
    *_, last = stream.packed(chunks)
    order, read = TextSource.open([str(file) for file in files], seed=3)._order(0), last.after["turn"]
    digests = last.after["digests"]
    assert read > 1190
    assert {shard for shard, digest in enumerate(digests) if digest} == {*order[:read]}
    for shard in order[:read]:
        assert digests[shard] == stream.source.shards.digest(shard, None)
    stream.check_unchanged(last.after)
    files[order[5]].write_text('{"text": "another"}\n')
    with pytest.raises(UserError, match="all of which was read"):
        stream.check_unchanged(last.after)


def test_files_take_another_order_in_every_pass_and_for_every_seed(tmp_path: Path) -> None:
    files = [str(write_lines(tmp_path / f"{k}.jsonl", [str(k)])) for k in range(6)]

    def read(seed: int | None) -> list[str]:
        return [document.text for _, document in islice(TextSource.open(files, seed=seed).documents(), 18)]

    assert read(None) == list("012345" * 3)
    assert read(1) == read(1) != read(2)
    passes = [read(1)[at : at + 6] for at in (0, 6, 12)]
    assert all(sorted(one) == list("012345") for one in passes)
    assert passes[0] != passes[1]


def test_a_tokenizer_without_end_token() -> None:
    with pytest.raises(ValueError, match=r"no end token.*tokenizer_config\.json"):
        BlockStream(TextSource(Listed(["a"])), byte_tokenizer(end_token=False), 4)


def test_calibration_blocks_are_the_first_of_the_stream(tmp_path: Path) -> None:
    file = str(write_lines(tmp_path / "a.jsonl", [f"document {k}" for k in range(60)]))
    blocks = calibration_blocks(file, TOKENIZER, seq_length=8, sequences=5)
    source = TextSource.open(file, share="train", seed=0)
    stream = BlockStream(source, TOKENIZER, 8)
    assert blocks.tolist() == [block.tokens for block in islice(stream.blocks(), 5)]
    assert blocks.dtype == torch.int64


@pytest.mark.parametrize("most", [None, 1, 30, 150, 100_000])
def test_held_out_tokens_are_the_joined_text(most: int | None, tmp_path: Path) -> None:
    documents = ["first", "", "second " * 30, "Grüße"]
    file = str(write_lines(tmp_path / "a.jsonl", documents))
    tokens = held_out_tokens(file, TOKENIZER, most=most)
    assert tokens.tolist() == TOKENIZER("\n\n".join(documents))["input_ids"][:most]


def test_held_out_tokens_of_a_text_file_are_its_bytes(tmp_path: Path) -> None:
    text = " = Title = \n\nA line.\n" * 30_000  # several parts
    (tmp_path / "a.txt").write_text(text)
    assert held_out_tokens(str(tmp_path / "a.txt"), TOKENIZER).tolist() == TOKENIZER(text)["input_ids"]
    (tmp_path / "b.txt").write_text("\n")
    with pytest.raises(ValueError, match="contains no text"):
        held_out_tokens(str(tmp_path / "b.txt"), TOKENIZER)


@pytest.mark.parametrize(
    ("steps", "reads"),
    [
        ([normalizers.Replace("\n", " "), normalizers.Strip(left=False, right=True)], "nothing"),
        ([normalizers.Replace("\n", " ")], r"\[220, 220\]"),
    ],
)
def test_a_tokenizer_without_line_ends_separates_nothing_by_a_blank_line(
    steps: list[Any], reads: str, text_file: Path
) -> None:
    """Such as those of T5: documents would run together."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(steps)
    source = TextSource.open(str(text_file))
    with pytest.raises(UserError, match=rf"has no blank line: it reads {reads} for one.*--data.separator end_token"):
        BlockStream(source, tokenizer, 16, "blank_line")
    BlockStream(source, tokenizer, 16, "end_token")
