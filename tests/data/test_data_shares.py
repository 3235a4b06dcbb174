"""Readers that tokenize a share of the text each make what one reader makes alone, bit for bit."""

import hashlib
import json
import math
import multiprocessing
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from ranks import run_ranks
from tiny import byte_tokenizer
from torch.distributed import TCPStore

from leap_pl.data import BlockStream, TextSource, exchange, packing
from leap_pl.data.batches import BEGINNING, BlockLoader, Progress, RankBatches
from leap_pl.data.documents import Share
from leap_pl.data.exchange import Exchange
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


@contextmanager
def _few_documents() -> Iterator[None]:
    """A few documents are several chunks, and a long one several pieces."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "CHUNK_PIECES", 2)
        patch.setattr(packing, "PIECE_CHARACTERS", 100)
        yield


@pytest.fixture(scope="module", autouse=True)
def _small() -> Iterator[None]:
    with _few_documents():
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


class Watched:
    """The tokenizer, which notes in a file what it tokenizes, a line for several texts: in workers too."""

    eos_token_id, name_or_path = TOKENIZER.eos_token_id, "watched"

    def __init__(self, notes: Path) -> None:
        self.notes = notes
        notes.touch()

    def __call__(self, texts: Any, **settings: Any) -> Any:
        if isinstance(texts, list):
            with self.notes.open("a") as file:
                file.write(f"{len(''.join(texts))}\n")
        return TOKENIZER(texts, **settings)

    @property
    def calls(self) -> int:
        return len(self.notes.read_text().splitlines())


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


# -- ranks ------------------------------------------------------------------------------------------------------


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> list[TCPStore]:
    """The store of a process group, which ends when the list is emptied."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    return [server]


def of_rank(
    files: list[str], notes: Path, rank: int, ranks: int, workers: int = 0, act: Callable[[], Any] = lambda: None
) -> list[tuple[Any, Any]]:
    """The micro-batches of a rank that shares with the others; ``act`` is called after the first."""
    stream = BlockStream(TextSource.open(files, seed=1), Watched(notes), SEQ_LENGTH)
    batches = RankBatches(stream, BATCH_SIZE, ROUNDS // ranks, rank=rank, world_size=ranks)
    got = []
    for batch in BlockLoader(batches, workers, Exchange("run", rank, ranks)):
        got.append((batch["input_ids"].tolist(), batch["position"]))
        if len(got) == 1:
            act()
    return got


def expected_of_rank(files: list[str], rank: int, ranks: int) -> list[tuple[Any, Any]]:
    whole = given(BlockStream(TextSource.open(files, seed=1), TOKENIZER, SEQ_LENGTH), 1, 0)
    ids, states = zip(*whole, strict=True)
    return list(zip(ids[rank::ranks], states[ranks - 1 :: ranks], strict=True))


@pytest.mark.filterwarnings("ignore:.*the text repeats")
def test_ranks_tokenize_a_share_each(
    files: list[str], tmp_path: Path, store: list[TCPStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "TIMEOUT", 30)  # a busy machine is no failure
    ranks, notes = 3, [tmp_path / f"notes-{rank}" for rank in range(3)]
    with ThreadPoolExecutor(ranks) as pool:
        got = list(pool.map(lambda rank: of_rank(files, notes[rank], rank, ranks), range(ranks)))
    assert got == [expected_of_rank(files, rank, ranks) for rank in range(ranks)]
    whole = tmp_path / "whole"
    given(BlockStream(TextSource.open(files, seed=1), Watched(whole), SEQ_LENGTH), 1, 0)
    calls = [Watched(path).calls for path in notes]
    assert max(calls) <= math.ceil(Watched(whole).calls / ranks) > 2
    # What all have read is deleted; a group of chunks that a rank has not read to its end is left.
    assert store[0].num_keys() <= 2 * ranks + 1


@pytest.mark.filterwarnings("ignore:.*the text repeats")
@pytest.mark.parametrize("fault", ["nobody shares", "no store", "no address", "the store ends"])
def test_a_rank_that_is_left_alone_makes_the_same(
    files: list[str], tmp_path: Path, store: list[TCPStore], monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr(exchange, "TIMEOUT", 0.05)
    if fault == "no address":
        monkeypatch.delenv("MASTER_PORT")
    if fault == "no store":
        store.clear()
    act = store.clear if fault == "the store ends" else lambda: None
    assert of_rank(files, tmp_path / "notes", 1, 2, act=act) == expected_of_rank(files, 1, 2)


def of_process(rank: int, files: list[str], notes: list[str], workers: int) -> str:
    multiprocessing.set_start_method("fork", force=True)  # of workers, as in a run; a rank's own is another here
    with _few_documents():
        dist.init_process_group("gloo", rank=rank, world_size=2)
        got = of_rank(files, Path(notes[rank]), rank, 2, workers)
        dist.barrier()
        return json.dumps(got)


@pytest.mark.filterwarnings("ignore:.*the text repeats")
def test_workers_of_two_processes_share(files: list[str], tmp_path: Path) -> None:
    notes = [str(tmp_path / f"notes-{rank}") for rank in range(2)]
    got = run_ranks(2, of_process, files, notes, 2, folder=tmp_path / "said")
    assert [json.loads(said) for said in got] == json.loads(json.dumps([expected_of_rank(files, r, 2) for r in (0, 1)]))
    whole = Watched(tmp_path / "whole")
    given(BlockStream(TextSource.open(files, seed=1), whole, SEQ_LENGTH), 1, 0)
    calls = sum(Watched(Path(path)).calls for path in notes)
    # Some are made ahead at the end, and on a busy machine some twice, after 2 s; without sharing, all would be.
    assert whole.calls <= calls < 1.75 * whole.calls
    assert not any("Store" in (tmp_path / "said" / f"rank-{rank}.txt").read_text() for rank in range(2))
