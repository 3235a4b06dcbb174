"""The blocks of a run, dealt to ranks and data workers without overlap, from any point on."""

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
    """How far a run has come, in plain Python, as it is stored in a checkpoint."""

    consumed: int  # micro-batches of all ranks together that have been used
    micro_batch: int  # number, among those of all ranks, of the one that begins at `position`
    position: Position | None  # None: the beginning of the stream


BEGINNING = Progress(consumed=0, micro_batch=0, position=None)


class RankBatches(IterableDataset[Batch]):
    """The micro-batches of one rank.

    Micro-batch j of the run is made of the blocks j·B to (j+1)·B−1 of the stream; rank r of W takes those
    with j ≡ r (mod W). So W ranks that accumulate A micro-batches see, in every optimizer step, the blocks
    that one process sees that accumulates A·W. Data workers take turns in the same way, which the
    round robin of the data loader undoes. Every reader walks the whole stream and keeps what is its own:
    each pays for tokenizing all of it, which is little beside training, and no reader waits for another. The state
    after a batch is the same on every rank: it lies behind the micro-batches of all of them, so that its digests
    are of all that was read.

    Yields ``{"input_ids": LongTensor[B, seq_length], "position": Progress}``, the state after the batch.

    Args:
        stream: The blocks.
        batch_size: B, blocks in a micro-batch.
        batches: Micro-batches of this rank in the whole run, those before ``start`` included.
        rank: r.
        world_size: W.
        start: Where to begin.

    Raises:
        UserError: ``start`` comes from another number of ranks that leaves some of them a batch ahead.
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
        """Micro-batches of this rank in the whole run: Lightning counts those before a resume as well."""
        return self.batches

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        turn, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        try:
            yield from self._own(turn, workers)
        except UserError as error:
            if worker is None:
                raise
            # Raised in a worker, it would reach the user wrapped in the worker's traceback.
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
                "input_ids": torch.tensor([block.tokens for block in taken]),
                "position": Progress(consumed=at, micro_batch=at, position=last.after),
            }


class BlockLoader(DataLoader[Batch]):
    """A data loader over :class:`RankBatches`; what fails in a worker is raised here as one line."""

    def __init__(self, dataset: RankBatches, num_workers: int = 0) -> None:
        super().__init__(
            dataset,
            batch_size=None,
            num_workers=num_workers,
            collate_fn=_as_it_is,  # type: ignore[arg-type]
            worker_init_fn=_start_worker,
        )

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        """The batches.

        Raises:
            UserError: The text cannot be read on, or a worker was killed. This is said here, when the next batch is
                asked for, and never amid a step that would be half done.
        """
        batches = _started(super().__iter__)
        try:
            while True:
                try:
                    batch = next(batches)
                except StopIteration:
                    return
                except (RuntimeError, OSError, EOFError) as error:
                    # Either torch has looked after its workers, or what a dead one had put aside could not be fetched.
                    if not (self.num_workers and _of_a_dead_worker(error)):
                        raise
                    # The frames hold the loader's iterator, and with it the workers that are left.
                    clear_frames(error.__traceback__)
                    told = str(error).partition("\n")[0] or type(error).__name__
                    raise UserError(
                        f"a data worker has ended ({told}): killed, as a rule, because memory ran out. Resume with "
                        f"--ckpt_path last, with fewer --data.num_workers than {self.num_workers}, or 0."
                    ) from error
                if "error" in batch:
                    raise UserError(batch["error"])
                yield batch
        finally:
            del batches  # ends its workers, however long the error is kept


def _of_a_dead_worker(error: Exception) -> bool:
    told = str(error)
    if isinstance(error, RuntimeError):
        return "exited unexpectedly" in told or "killed by signal" in told
    return not told.startswith("Caught ")  # what a living one raised, which torch passes on in its own kind


def _started(start: Callable[[], Iterator[Batch]]) -> Iterator[Batch]:
    """Start a loader's workers, and leave this process's signals and environment as they were.

    Without the handler by which torch raises, wherever the process stands, when one dies: it looks after them as well
    whenever a batch is late.
    """
    before, parallel = signal.getsignal(signal.SIGCHLD), os.environ.get(PARALLEL)
    # The tokenizer's own threads do not survive a fork, of which it would warn in every worker.
    os.environ.setdefault(PARALLEL, "false")
    try:
        batches = start()
    finally:
        if parallel is None:
            del os.environ[PARALLEL]
        if signal.getsignal(signal.SIGCHLD) != before:  # it is set in the main thread alone, once in a process
            signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)
    return batches


def _start_worker(_: int) -> None:
    # A forked worker has the tokenizer's thread pool but not its threads: to use it is to wait for ever.
    os.environ[PARALLEL] = "false"
    # A scheduler's signals, and Ctrl-C, reach every process of a job. The training process answers them, and still
    # needs its workers until then; a second SIGTERM is its own, to a worker that does not end by itself.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, _: signal.signal(number, signal.SIG_DFL))


def _as_it_is(batch: Batch) -> Batch:
    return batch
