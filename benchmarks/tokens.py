"""Tokens a second of text that the data loaders of a run give, by ranks and workers.

python -m benchmarks.tokens --model M --text FILE... [--ranks 1 2] [--workers 0 1 2] [--tokens N] [--output F.json]

Nothing is computed with the tokens, so a row is the fastest that a run can be fed. ``shared`` is what leap_pl does: all
workers of all ranks tokenize a share each. In ``everything``, as in earlier versions, each of them tokenizes all of the
text and keeps its own blocks. ``threads`` is ``shared`` with the threads of the tokenizer itself, which are at hand in
the training process alone, so without workers. Variants take turns; medians, and the median of the ratios within a
turn. Processor seconds are those of all processes together.
"""

import argparse
import os
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from resource import RUSAGE_CHILDREN, RUSAGE_SELF, getrusage
from typing import Any

import numpy as np
import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from benchmarks.report import Row, finish
from leap_pl.data import BlockStream, TextSource
from leap_pl.data.batches import PARALLEL, BlockLoader, RankBatches
from leap_pl.data.calibration import loaded_tokenizer
from leap_pl.data.exchange import Exchange


@dataclass(frozen=True)
class Case:
    """One way to read a text."""

    how: str  # shared, everything or threads
    ranks: int
    workers: int


class Everything(IterableDataset[Any]):
    """Micro-batches of a rank, of which each worker tokenizes all of the text and keeps its own."""

    def __init__(self, batches: RankBatches) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        """Yield those of this worker."""
        worker, of_rank = get_worker_info(), self.batches
        turn, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        blocks = of_rank.stream.blocks()
        for micro_batch in range(of_rank.batches * of_rank.world_size):
            taken = [block.ids for block in islice(blocks, of_rank.batch_size)]
            mine, rank = divmod(micro_batch, of_rank.world_size)
            if rank == of_rank.rank and mine % workers == turn:
                yield {"input_ids": torch.from_numpy(np.stack(taken).astype(np.int64))}


def read(case: Case, rank: int, run: str, args: argparse.Namespace) -> tuple[float, float]:
    """Read the micro-batches of one rank; return the seconds it took, and the processor seconds."""
    os.environ[PARALLEL] = "true" if case.how == "threads" else "false"
    tokenizer = loaded_tokenizer(args.model)
    stream = BlockStream(TextSource.open(args.text, seed=0), tokenizer, args.seq_length)
    each = args.tokens // (case.ranks * args.batch_size * args.seq_length)
    batches = RankBatches(stream, args.batch_size, each, rank=rank, world_size=case.ranks)
    exchange = Exchange(run, rank, case.ranks) if case.ranks > 1 else None
    loader: DataLoader[Any] = (
        DataLoader(Everything(batches), batch_size=None, num_workers=case.workers)
        if case.how == "everything"
        else BlockLoader(batches, case.workers, exchange)
    )
    before, start = _processor(), time.perf_counter()
    count = sum(1 for _ in loader)
    seconds = time.perf_counter() - start
    if count != each:
        raise RuntimeError(f"{count} micro-batches instead of {each}")
    return seconds, _processor() - before


def _processor() -> float:
    return sum(sum(getrusage(who)[:2]) for who in (RUSAGE_SELF, RUSAGE_CHILDREN))


def measured(cases: list[Case], args: argparse.Namespace) -> dict[Case, list[tuple[float, float]]]:
    """Return seconds and processor seconds of each case in each turn, those of all ranks together."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    found: dict[Case, list[tuple[float, float]]] = {case: [] for case in cases}
    with ProcessPoolExecutor(max(args.ranks), initializer=os.environ.update, initargs=(address,)) as pool:
        for turn in range(args.repeats):
            for case in cases:
                reading = [pool.submit(read, case, rank, f"{turn} {case}", args) for rank in range(case.ranks)]
                seconds, processor = zip(*(rank.result() for rank in reading), strict=True)
                found[case].append((max(seconds), sum(processor)))
    return found


def rows(found: dict[Case, list[tuple[float, float]]], tokens: int) -> list[Row]:
    """Return a row for each case, with its speed in relation to one rank without workers or threads."""
    first = found[Case("shared", 1, 0)]
    return [
        {
            "ranks": case.ranks,
            "workers": case.workers,
            "how": case.how,
            "tokens_a_second": tokens / statistics.median(seconds for seconds, _ in turns),
            "faster": statistics.median(a[0] / b[0] for a, b in zip(first, turns, strict=True)),
            "processor_seconds": statistics.median(processor for _, processor in turns),
        }
        for case, turns in found.items()
    ]


def main(arguments: list[str] | None = None) -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="whose tokenizer is used")
    parser.add_argument("--text", required=True, nargs="+")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="of each rank")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="of all ranks together")
    parser.add_argument("--seq_length", type=int, default=2048)
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output")
    args = parser.parse_args(arguments)
    cases = [Case("shared", 1, 0), Case("threads", 1, 0)]
    for ranks in args.ranks:
        for workers in args.workers:
            several = ranks > 1 or workers > 1  # readers, without which the two are the same
            cases += [Case(how, ranks, workers) for how in ("shared", "everything")[: 1 + several]]
    found = measured(list(dict.fromkeys(cases)), args)
    finish(rows(found, args.tokens), args.output, model=args.model, tokens=args.tokens, repeats=args.repeats)


if __name__ == "__main__":
    main()
