"""Readers that tokenize a share of the text each make what one reader makes alone, bit for bit."""

import hashlib
import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
from tiny import byte_tokenizer

from leap_pl.data import BlockStream, TextSource, packing
from leap_pl.data.batches import BEGINNING, BlockLoader, Progress, RankBatches
from leap_pl.data.documents import Share
from leap_pl.data.packing import Separator

TOKENIZER = byte_tokenizer()
BATCH_SIZE, SEQ_LENGTH, ROUNDS = 2, 48, 24

# Digests of the batches and states of one rank without workers, by separator, seed of the order of files, and share,
# from the version in which every reader tokenized all of the text.
EARLIER: dict[tuple[Separator, int | None, Share], str] = {
    ("end_token", None, "all"): "b8f2ff5652a92f75",
    ("end_token", 1, "train"): "06a238bcff867b39",
    ("end_token", 2, "all"): "a7637d96e8c9d0be",
    ("blank_line", 3, "all"): "03cb7be5f4d5229a",
    ("blank_line", None, "train"): "cc952ed06ced253b",
}


@pytest.fixture(scope="module", autouse=True)
def _small() -> Iterator[None]:
    """A few documents are several chunks, and a long one several pieces."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "CHUNK_PIECES", 5)
        patch.setattr(packing, "PIECE_CHARACTERS", 100)
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three files, of which a run reads the first pass in full and begins the second."""
    folder, draw = tmp_path_factory.mktemp("text"), random.Random(0)
    words = ["alpha", "Grüße", "東京", "", "\n", "naïve", "a" * 30]
    names = []
    for shard in range(3):
        lines = [" ".join(draw.choices(words, k=draw.choice([0, 1, 3, 8, 50]))) for _ in range(4)]
        kind = "txt" if shard == 1 else "jsonl"
        file = folder / f"{shard}.{kind}"
        file.write_text("\n".join(lines if kind == "txt" else [json.dumps({"text": line}) for line in lines]))
        names.append(str(file))
    return names


def given(stream: BlockStream, ranks: int, workers: int, start: Progress = BEGINNING) -> list[tuple[Any, Any]]:
    """Every micro-batch of the run from ``start`` on, of all ranks in their order, with the state after it."""
    each = ROUNDS // ranks
    loaders = [
        BlockLoader(RankBatches(stream, BATCH_SIZE, each, rank=rank, world_size=ranks, start=start), workers)
        for rank in range(ranks)
    ]
    return [
        (batch["input_ids"].tolist(), batch["position"]) for at_once in zip(*loaders, strict=True) for batch in at_once
    ]


@pytest.fixture(scope="module", params=EARLIER, ids=str)
def alone(request: pytest.FixtureRequest, files: list[str]) -> tuple[BlockStream, list[tuple[Any, Any]]]:
    """A stream, and what one reader makes of it."""
    separator, seed, share = request.param
    stream = BlockStream(TextSource.open(files, seed=seed, share=share), TOKENIZER, SEQ_LENGTH, separator)
    whole = given(stream, 1, 0)
    assert whole[-1][1]["position"]["number"] == 1  # a second pass over the text has begun
    assert hashlib.sha256(json.dumps(whole).encode()).hexdigest()[:16] == EARLIER[request.param]
    return stream, whole


@pytest.mark.filterwarnings("ignore:.*the text repeats")
@pytest.mark.parametrize(("ranks", "workers"), [(1, 1), (1, 2), (1, 3), (2, 0), (3, 0), (2, 2)])
def test_ranks_and_workers_are_given_what_one_reader_makes(
    alone: tuple[BlockStream, list[tuple[Any, Any]]], ranks: int, workers: int
) -> None:
    stream, whole = alone
    after = [whole[k - k % ranks + ranks - 1][1] for k in range(ROUNDS)]  # of a round of all ranks
    expected = [(ids, state) for (ids, _), state in zip(whole, after, strict=True)]
    assert given(stream, ranks, workers) == expected
    for stopped in (1, 7, 22):  # by one rank without workers
        start = stopped // ranks * ranks
        if start:
            assert given(stream, ranks, workers, whole[start - 1][1]) == expected[start:]
