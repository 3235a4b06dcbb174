"""Blocks that begin as the tokenizer begins a text: text in order, resumed and shared as without, and compared."""

import json
from itertools import chain, islice
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import byte_tokenizer

from leap_pl.base_model.prefix import Bos
from leap_pl.data import BlockStream, TextDataModule, TextSource, calibration_blocks, held_out_tokens
from leap_pl.data.batches import BlockLoader, RankBatches
from leap_pl.errors import UserError

DOCUMENTS = [f"document {k} " * (1 + k % 3) for k in range(60)]
TOKENIZERS = [byte_tokenizer(prefix=length) for length in range(3)]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    return str(path)


def stream_of(file: str, length: int, seq_length: int, bos: Bos = "every") -> BlockStream:
    return BlockStream(TextSource.open(file, seed=1), TOKENIZERS[length], seq_length, bos=bos)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2), st.integers(3, 40), st.sampled_from(["every", "first", "none"]), st.integers(0, 11))
def test_blocks_are_the_prefix_and_the_next_tokens_of_the_text(
    file: str, length: int, seq_length: int, bos: Bos, at: int
) -> None:
    stream = stream_of(file, length, seq_length, bos)
    prefix = [257, 258][:length] if bos == "every" else []
    text = [*chain.from_iterable([*TOKENIZERS[0](document)["input_ids"], 256] for document in DOCUMENTS)]
    blocks = list(islice(stream.blocks(repeat=False), 12))
    each = seq_length - len(prefix)
    expected = [[*prefix, *text[k * each : (k + 1) * each]] for k in range(12)]
    assert [block.tokens for block in blocks] == expected
    again = stream.blocks(json.loads(json.dumps(blocks[at].after)))
    assert [block.tokens for block in islice(again, 11 - at)] == expected[at + 1 :]


@pytest.mark.parametrize(("ranks", "workers"), [(2, 0), (1, 2)])
def test_ranks_and_workers_share_them(file: str, ranks: int, workers: int) -> None:
    stream = stream_of(file, 1, 9)
    expected = [block.tokens for block in islice(stream.blocks(), 12)]
    loaders = [BlockLoader(RankBatches(stream, 2, 6 // ranks, rank=r, world_size=ranks), workers) for r in range(ranks)]
    batches = [batch["input_ids"] for at_once in zip(*loaders, strict=True) for batch in at_once]
    assert torch.cat(batches).tolist() == expected


def test_a_block_without_room_for_text_is_refused(file: str) -> None:
    with pytest.raises(UserError, match=r"seq_length is 2, and the tokenizer puts 2 tokens before a text"):
        stream_of(file, 2, 2)
    assert stream_of(file, 2, 2, "none").text_length == 2


def test_calibration_and_validation_begin_as_training(file: str) -> None:
    data = TextDataModule(TOKENIZERS[1], file, seq_length=16, validation_sequences=2)  # type: ignore[arg-type]
    (first,) = {int(block) for batch in data.val_dataloader() for block in batch["input_ids"][:, 0]}
    calibrated = calibration_blocks(file, TOKENIZERS[1], seq_length=16, sequences=3)
    assert {first, *calibrated[:, 0].tolist()} == {257}
    assert calibrated.tolist() == [block.tokens for block in islice(data.stream.blocks(), 3)]
    without = calibration_blocks(file, TOKENIZERS[1], seq_length=16, sequences=3, bos="first")
    assert torch.equal(without, calibration_blocks(file, TOKENIZERS[0], seq_length=16, sequences=3))


@pytest.mark.parametrize("most", [None, 30])
def test_a_whole_text_begins_with_it_once_or_is_the_text_alone(file: str, most: int | None) -> None:
    plain = held_out_tokens(file, TOKENIZERS[0]).tolist()
    assert held_out_tokens(file, TOKENIZERS[2], most=most).tolist() == [257, 258, *plain][:most]
    for bos in ("every", "none"):
        assert held_out_tokens(file, TOKENIZERS[2], most=most, bos=bos).tolist() == plain[:most]


# -- the identity of a run ------------------------------------------------------------------------------------


def data_of(file: str, length: int, bos: Bos) -> TextDataModule:
    return TextDataModule(TOKENIZERS[length], file, seq_length=16, bos=bos)  # type: ignore[arg-type]


def state_of_earlier(file: str, length: int) -> dict[str, Any]:
    """The state of a version whose blocks had no prefix, and which did not say so."""
    state = data_of(file, length, "none").state_dict()
    del state["data"]["bos"]
    return state


def test_other_blocks_are_refused_at_resume(file: str) -> None:
    for state in (data_of(file, 1, "none").state_dict(), state_of_earlier(file, 1)):
        data_of(file, 1, "first").load_state_dict(state)  # the same blocks under another name
        with pytest.raises(UserError, match="bos was 'first' and is 'every'"):
            data_of(file, 1, "every").load_state_dict(state)
    with pytest.raises(UserError, match="bos was 'every' and is 'first'"):
        data_of(file, 1, "none").load_state_dict(data_of(file, 1, "every").state_dict())


def test_nothing_is_refused_where_the_tokenizer_puts_nothing_before_a_text(file: str) -> None:
    for state in (data_of(file, 0, "none").state_dict(), state_of_earlier(file, 0)):
        data_of(file, 0, "every").load_state_dict(state)


def test_the_record_says_how_blocks_begin(file: str) -> None:
    assert data_of(file, 1, "every").record()["bos"] == "every"
    assert "bos" not in data_of(file, 0, "every").record()
