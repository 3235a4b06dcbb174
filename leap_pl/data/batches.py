"""Distribute the blocks of a run over ranks and data workers without overlap, starting at any position."""

import math
import os
import pickle
import signal
from collections.abc import Callable, Generator, Iterable, Iterator
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from traceback import clear_frames
from typing import Any, TypedDict

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from leap_pl.data.exchange import Exchange
from leap_pl.data.packing import CHUNK_CHARACTERS, BlockStream, Chunk, Position, stacked
from leap_pl.errors import UserError

Batch = dict[str, Any]

CHARACTERS_A_TOKEN = 4  # about, of English; of other texts it is less
MOST_AHEAD = 32  # chunks of up to about 128 KiB, in shared memory, of which containers often have 64 MiB
# Signals that a scheduler or a terminal sends to all processes.
OF_JOB = (signal.SIGUSR1, signal.SIGINT, signal.SIGTERM)
PARALLEL = "TOKENIZERS_PARALLELISM"  # whether the tokenizer starts threads of its own


class Progress(TypedDict):
    """Progress of a run through its data, in plain Python, as stored in a checkpoint."""

    consumed: int  # micro-batches of all ranks together that have been used
    micro_batch: int  # index, among those of all ranks, of the micro-batch that begins at `position`
    position: Position | None  # None: the beginning of the stream


BEGINNING = Progress(consumed=0, micro_batch=0, position=None)


class RankBatches:
    """Micro-batches of one rank.

    Micro-batch j of the run consists of the blocks j·B to (j+1)·B−1 of the stream; rank r of W takes those with
    j ≡ r (mod W). So W ranks that accumulate A micro-batches see, in every optimizer step, the same blocks as one
    process that accumulates A·W. The state after a batch is the same on every rank: it is the position after the
    micro-batches of all ranks, so that its digests cover everything that was read.

    Yields ``{"input_ids": LongTensor[B, seq_length], "position": Progress}``, the state after the batch.

    Args:
        stream: Stream of blocks.
        batch_size: B, blocks in a micro-batch.
        batches: Micro-batches of this rank in the whole run, including those before ``start``.
        rank: r.
        world_size: W.
        start: State to start from, or a function that returns it when the first one is requested.

    Raises:
        UserError: ``start`` comes from a different number of ranks, and does not divide evenly over these.
    """

    def __init__(
        self,
        stream: BlockStream,
        batch_size: int,
        batches: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        start: Progress | Callable[[], Progress] = BEGINNING,
    ) -> None:
        self.stream = stream
        self.batch_size = batch_size
        self.batches = batches
        self.rank = rank
        self.world_size = world_size
        self._start = start
        self.start  # noqa: B018  # raises

    @property
    def start(self) -> Progress:
        """Return the state to start from.

        Raises:
            UserError: It comes from a different number of ranks, and does not divide evenly over these.
        """
        start = self._start() if callable(self._start) else self._start
        if start["consumed"] % self.world_size:
            raise UserError(
                f"The run has used {start['consumed']} micro-batches, which {self.world_size} ranks cannot have shared "
                "evenly. Resume on a number of ranks that divides it."
            )
        return start

    def __len__(self) -> int:
        """Return the number of micro-batches of this rank in the whole run, as Lightning expects after a resume."""
        return self.batches

    def packed(self, chunks: Iterable[Chunk]) -> Iterator[Batch]:
        """Yield the micro-batches of this rank, made of all ``chunks`` of the stream from ``start`` on, in order."""
        start = self.start
        blocks, at = self.stream.packed(chunks, start["position"]), start["micro_batch"]
        for mine in range(start["consumed"] // self.world_size, self.batches):
            micro_batch = mine * self.world_size + self.rank
            for _ in range((micro_batch - at) * self.batch_size):
                next(blocks)
            taken = [next(blocks) for _ in range(self.batch_size)]
            at, last = (mine + 1) * self.world_size, taken[-1]
            for _ in range((at - micro_batch - 1) * self.batch_size):
                last = next(blocks)
            yield {
                "input_ids": stacked(taken, self.stream.seq_length),
                "position": Progress(consumed=at, micro_batch=at, position=last.after),
            }


class _Chunks(IterableDataset[Any]):
    """Chunks of a stream, tokenized by the workers of a data loader in turn, whose round robin restores their order."""

    def __init__(self, stream: BlockStream, start: Position | None, exchange: Exchange | None) -> None:
        self.stream = stream
        self.start = start
        self.exchange = exchange

    def __iter__(self) -> Iterator[Any]:
        """Yield chunks: as they are in the training process, and as messages from a worker."""
        worker = get_worker_info()
        turn, turns = (0, 1) if worker is None else (worker.id, worker.num_workers)
        chunks = self.stream.tokenized(self.start, turn=turn, turns=turns, exchange=self.exchange)
        if worker is None:
            yield from chunks
            return
        try:
            for chunk in chunks:
                # One tensor, which travels in shared memory. Of a longer message a killed worker could leave a half in
                # the pipe, for the rest of which the training process would wait forever.
                yield torch.frombuffer(bytearray(pickle.dumps(chunk)), dtype=torch.uint8)
        except UserError as error:
            # An error raised in a worker would reach the user wrapped in the worker's traceback.
            yield str(error)


class BlockLoader(DataLoader[Any]):
    """Data loader of the micro-batches of a rank.

    Its workers tokenize a share of the text each, ahead of the training process, which packs what they made: so the
    blocks, and the state after each, do not depend on the number of workers. Every rank needs the whole text tokenized;
    with an exchange the ranks share that, too.

    Args:
        batches: The micro-batches.
        num_workers: Number of workers; 0 tokenizes in the training process, when a batch is requested.
        exchange: Exchange with the loaders of other ranks, which have as many workers.
    """

    def __init__(self, batches: RankBatches, num_workers: int = 0, exchange: Exchange | None = None) -> None:
        self.batches = batches
        self._of_text = _Chunks(batches.stream, batches.start["position"], exchange)
        super().__init__(
            self._of_text,
            batch_size=None,
            num_workers=num_workers,
            collate_fn=_identity,
            worker_init_fn=_start_worker,
            prefetch_factor=_ahead(batches, num_workers) if num_workers else None,
        )

    def __len__(self) -> int:
        """Return the number of micro-batches of this rank in the whole run, as Lightning expects after a resume."""
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        """Yield the micro-batches.

        Raises:
            UserError: The text cannot be read any further, or a worker was killed. The error is raised when the next
                batch is requested, and never in the middle of a step.
        """
        # A trainer may make its loader before it loads the checkpoint that sets where it starts.
        self._of_text.start = self.batches.start["position"]
        items, workers = _start_workers(super().__iter__)
        chunks = self._chunks(items)
        del items  # of which the last reference ends the workers
        try:
            for batch in self.batches.packed(chunks):
                # torch looks only where it waits for a worker, long after if much has been read ahead.
                for worker in workers:
                    if worker.exitcode:
                        raise self._lost(_how_it_ended(worker))
                yield batch
        finally:
            chunks.close()  # ends its workers, even if the error is kept

    def _chunks(self, items: Iterator[Any]) -> Generator[Chunk, None, None]:
        try:
            while True:
                try:
                    item = next(items)
                except StopIteration:
                    return
                except (RuntimeError, OSError, EOFError) as error:
                    # Either torch has checked its workers, or an item in a dead worker's queue could not be fetched.
                    if not (self.num_workers and _is_of_dead_worker(error)):
                        raise
                    # The frames keep the loader's iterator alive, and with it the remaining workers.
                    clear_frames(error.__traceback__)
                    raise self._lost(str(error).partition("\n")[0] or type(error).__name__) from error
                if isinstance(item, str):
                    raise UserError(item)
                yield pickle.loads(item.numpy().data) if isinstance(item, Tensor) else item
        finally:
            del items

    def _lost(self, reason: str) -> UserError:
        return UserError(
            f"a data worker has ended ({reason}): usually killed because memory ran out. Resume with "
            f"--ckpt_path last, with fewer --data.num_workers than {self.num_workers}, or 0."
        )


def _ahead(batches: RankBatches, num_workers: int) -> int:
    """Return how many chunks each worker makes ahead: together about two micro-batches of every rank."""
    tokens = 2 * batches.batch_size * batches.stream.seq_length * batches.world_size
    chunks = min(tokens / (CHUNK_CHARACTERS / CHARACTERS_A_TOKEN), MOST_AHEAD)
    return max(2, math.ceil(chunks / num_workers))


def _how_it_ended(worker: BaseProcess) -> str:
    code = worker.exitcode or 0
    return f"worker {worker.pid}: {signal.strsignal(-code) if code < 0 else f'exit status {code}'}"


def _is_of_dead_worker(error: Exception) -> bool:
    message = str(error)
    if isinstance(error, RuntimeError):
        return "exited unexpectedly" in message or "killed by signal" in message
    return not message.startswith("Caught ")  # raised in a running worker, and raised again by torch as the same type


def _start_workers(start: Callable[[], Iterator[Any]]) -> tuple[Iterator[Any], list[BaseProcess]]:
    """Start a loader's workers, and leave this process's signal handlers and environment unchanged.

    torch's SIGCHLD handler raises at any point when a worker dies; torch checks its workers whenever a chunk is late
    as well.
    """
    before, parallel = signal.getsignal(signal.SIGCHLD), os.environ.get(PARALLEL)
    others = {*active_children()}
    # The tokenizer's own threads do not survive a fork, about which it would warn in every worker.
    os.environ.setdefault(PARALLEL, "false")
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, OF_JOB)  # which a worker inherits, until it handles them
    try:
        items = start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if parallel is None:
            del os.environ[PARALLEL]
        if signal.getsignal(signal.SIGCHLD) != before:  # torch sets it in the main thread only, once in a process
            signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)
    return items, [child for child in active_children() if child not in others]


def _start_worker(_: int) -> None:
    # A forked worker inherits the tokenizer's thread pool without its threads: using it would deadlock.
    os.environ[PARALLEL] = "false"
    # A scheduler's signals, and Ctrl-C, reach every process of a job. The training process handles them, and needs its
    # workers until then; the second SIGTERM is its own, sent to a worker that does not end by itself.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, _: signal.signal(number, signal.SIG_DFL))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, OF_JOB)


def _identity(item: Any) -> Any:
    return item
