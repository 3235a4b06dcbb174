"""Distribute the blocks of a run over ranks and data workers without overlap, starting at any position."""

import os
import signal
from collections.abc import Callable, Iterator
from traceback import clear_frames
from typing import Any, TypedDict

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from leap_pl.data.packing import BlockStream, Position
from leap_pl.errors import UserError

Batch = dict[str, Any]

PARALLEL = "TOKENIZERS_PARALLELISM"  # whether the tokenizer starts threads of its own


class Progress(TypedDict):
    """Progress of a run through its data, in plain Python, as stored in a checkpoint."""

    consumed: int  # micro-batches of all ranks together that have been used
    micro_batch: int  # index, among those of all ranks, of the micro-batch that begins at `position`
    position: Position | None  # None: the beginning of the stream


BEGINNING = Progress(consumed=0, micro_batch=0, position=None)


class RankBatches(IterableDataset[Batch]):
    """Micro-batches of one rank.

    Micro-batch j of the run consists of the blocks j·B to (j+1)·B−1 of the stream; rank r of W takes those with
    j ≡ r (mod W). So W ranks that accumulate A micro-batches see, in every optimizer step, the same blocks as one
    process that accumulates A·W. Data workers divide the micro-batches of a rank in the same way, and the round robin
    of the data loader restores their order. Every reader walks the whole stream and keeps its own share: each tokenizes
    all of it, which costs little compared to training, and no reader waits for another. The state after a batch is the
    same on every rank: it is the position after the micro-batches of all ranks, so that its digests cover everything
    that was read.

    Yields ``{"input_ids": LongTensor[B, seq_length], "position": Progress}``, the state after the batch.

    Args:
        stream: Stream of blocks.
        batch_size: B, blocks in a micro-batch.
        batches: Micro-batches of this rank in the whole run, including those before ``start``.
        rank: r.
        world_size: W.
        start: State to start from.

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
        start: Progress = BEGINNING,
    ) -> None:
        if start["consumed"] % world_size:
            raise UserError(
                f"The run has used {start['consumed']} micro-batches, which {world_size} ranks cannot have shared "
                "evenly. Resume on a number of ranks that divides it."
            )
        self.stream = stream
        self.batch_size = batch_size
        self.batches = batches
        self.rank = rank
        self.world_size = world_size
        self.start = start

    def __len__(self) -> int:
        """Return the number of micro-batches of this rank in the whole run, as Lightning expects after a resume."""
        return self.batches

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        turn, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        try:
            yield from self._own(turn, workers)
        except UserError as error:
            if worker is None:
                raise
            # An error raised in a worker would reach the user wrapped in the worker's traceback.
            yield {"error": str(error)}

    def _own(self, turn: int, workers: int) -> Iterator[Batch]:
        blocks = self.stream.blocks(self.start["position"])
        at = self.start["micro_batch"]
        for mine in range(self.start["consumed"] // self.world_size + turn, self.batches, workers):
            micro_batch = mine * self.world_size + self.rank
            for _ in range((micro_batch - at) * self.batch_size):
                next(blocks)
            taken = [next(blocks) for _ in range(self.batch_size)]
            at, last = (mine + 1) * self.world_size, taken[-1]
            for _ in range((at - micro_batch - 1) * self.batch_size):
                last = next(blocks)
            yield {
                "input_ids": torch.tensor([block.tokens for block in taken], device="cpu"),
                "position": Progress(consumed=at, micro_batch=at, position=last.after),
            }


class BlockLoader(DataLoader[Batch]):
    """Data loader over :class:`RankBatches` that raises the errors of its workers as one line."""

    def __init__(self, dataset: RankBatches, num_workers: int = 0) -> None:
        super().__init__(
            dataset,
            batch_size=None,
            num_workers=num_workers,
            collate_fn=_identity,  # type: ignore[arg-type]
            worker_init_fn=_start_worker,
        )

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        """Yield the batches.

        Raises:
            UserError: The text cannot be read any further, or a worker was killed. The error is raised when the next
                batch is requested, and never in the middle of a step.
        """
        batches = _start_workers(super().__iter__)
        try:
            while True:
                try:
                    batch = next(batches)
                except StopIteration:
                    return
                except (RuntimeError, OSError, EOFError) as error:
                    # Either torch has checked its workers, or a batch in a dead worker's queue could not be fetched.
                    if not (self.num_workers and _is_of_dead_worker(error)):
                        raise
                    # The frames keep the loader's iterator alive, and with it the remaining workers.
                    clear_frames(error.__traceback__)
                    reason = str(error).partition("\n")[0] or type(error).__name__
                    raise UserError(
                        f"a data worker has ended ({reason}): usually killed because memory ran out. Resume with "
                        f"--ckpt_path last, with fewer --data.num_workers than {self.num_workers}, or 0."
                    ) from error
                if "error" in batch:
                    raise UserError(batch["error"])
                yield batch
        finally:
            del batches  # ends its workers, even if the error is kept


def _is_of_dead_worker(error: Exception) -> bool:
    message = str(error)
    if isinstance(error, RuntimeError):
        return "exited unexpectedly" in message or "killed by signal" in message
    return not message.startswith("Caught ")  # raised in a running worker, and raised again by torch as the same type


def _start_workers(start: Callable[[], Iterator[Batch]]) -> Iterator[Batch]:
    """Start a loader's workers, and leave this process's signal handlers and environment unchanged.

    torch's SIGCHLD handler raises at any point when a worker dies; torch checks its workers whenever a batch is late
    as well.
    """
    before, parallel = signal.getsignal(signal.SIGCHLD), os.environ.get(PARALLEL)
    # The tokenizer's own threads do not survive a fork, about which it would warn in every worker.
    os.environ.setdefault(PARALLEL, "false")
    try:
        batches = start()
    finally:
        if parallel is None:
            del os.environ[PARALLEL]
        if signal.getsignal(signal.SIGCHLD) != before:  # torch sets it in the main thread only, once in a process
            signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)
    return batches


def _start_worker(_: int) -> None:
    # A forked worker inherits the tokenizer's thread pool without its threads: using it would deadlock.
    os.environ[PARALLEL] = "false"
    # A scheduler's signals, and Ctrl-C, reach every process of a job. The training process handles them, and needs its
    # workers until then; the second SIGTERM is its own, sent to a worker that does not end by itself.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, _: signal.signal(number, signal.SIG_DFL))


def _identity(batch: Batch) -> Batch:
    return batch
