"""One training step: dense fine-tuning, leap_pl, and the published formulation of the same mask.

python -m benchmarks.step --model M [--tokens 512 2048 8192] [--layers 30] [--output F.json]

The three share model, tokens, dtype, loss function, optimizer and clipping. Each lives in a process of its own, and
they take turns, one working while the others wait, each step over one micro-batch of ``--tokens`` tokens in sequences
of at most ``--seq_length``:

dense            the same weights are trained themselves
leap_pl          they are frozen, and the logits of their gates are trained
published        likewise, the mask made as in benchmarks/published.py, or benchmarks/published_nm.py for NMGate
published_kept   the same, freed memory kept as leap_pl keeps it (leap_pl/callbacks/allocator.py), which dense has too

``--layers`` gates and trains only so many decoder blocks of the model (the others are taken out), which shows
how the cost grows with the number of weights. ``--clock cpu`` counts the seconds that the process computed instead
of those that passed: with ``OMP_NUM_THREADS=1``, for a machine that others use too. Ratios are medians of the
ratios within one turn.
"""

import argparse
import multiprocessing
import signal
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks.report import Row, finish, ratio, sequences, wait_for
from benchmarks.variants import first_blocks, makers
from leap_pl.base_model.fast_dtype import fast_dtype
from leap_pl.base_model.loading import load_model
from leap_pl.base_model.weights import find_weights
from leap_pl.callbacks.allocator import keep_freed_memory
from leap_pl.kernels.compiled import compile_seconds

RATIOS = (
    ("leap_pl", "dense"),
    ("published", "leap_pl"),
    ("published_kept", "leap_pl"),
    ("low_memory", "leap_pl"),
    ("shared", "leap_pl"),
    ("low_memory_shared", "low_memory"),
)


def main(arguments: list[str] | None = None) -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokens", nargs="+", type=int, default=[512, 2048, 8192])
    parser.add_argument("--seq_length", type=int, default=512)
    parser.add_argument("--layers", nargs="+", type=int, default=[0], help="decoder blocks; 0: all of them")
    parser.add_argument("--variants", nargs="+", default=["dense", "leap_pl", "published"])
    parser.add_argument("--gate", default="BernoulliGate", help="kind of gate of leap_pl")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float32"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"])
    parser.add_argument("--output")
    args = parser.parse_args(arguments)

    for tokens in args.tokens:
        sequences(tokens, args.seq_length)
    device = torch.device(args.device)
    if args.dtype == "auto":
        args.dtype = fast_dtype(device)  # measured here, once and before the processes keep the machine busy
    rows: list[Row] = []
    ratios: list[Row] = []
    compile_seconds: dict[str, float] = {}
    for layers in args.layers:
        with ExitStack() as stack:
            workers = {name: stack.enter_context(Worker(name, layers, args)) for name in args.variants}
            gated = {worker.wait() for worker in workers.values()}.pop()
            for tokens in args.tokens:
                seconds = turns(workers, tokens, args.repeats)
                for name, found in seconds.items():
                    rows.append(
                        {
                            "variant": name,
                            "tokens": tokens,
                            "gated_weights": gated,
                            "seconds_median": statistics.median(found),
                            "seconds_min": min(found),
                            "tokens_per_second": tokens / statistics.median(found),
                        }
                    )
                for above, below in RATIOS:
                    if {above, below} <= set(seconds):
                        value, what = ratio(seconds, above, below), f"{above}/{below}"
                        ratios.append({"ratio": what, "tokens": tokens, "gated_weights": gated, "of": value})
                        print(f"{what} at {tokens} tokens, {gated / 1e6:.0f}M weights: {value:.3f}", flush=True)
            for name, worker in workers.items():
                compile_seconds |= {
                    f"{name} {kernel}": value for kernel, value in worker.ask("compile_seconds").items()
                }
    finish(
        rows,
        args.output,
        ratios=ratios,
        model=args.model,
        dtype=args.dtype,
        gate=args.gate,
        clock=args.clock,
        compile_seconds=compile_seconds,
    )


class Worker:
    """One variant in a process of its own, which steps when it is asked to."""

    def __init__(self, variant: str, layers: int, args: argparse.Namespace) -> None:
        context = multiprocessing.get_context("spawn")
        self.variant = variant
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, variant, layers, args), daemon=True)
        self.process.start()
        theirs.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.pipe.close()
        self.process.join()

    def ask(self, what: object) -> Any:
        """Its answer."""
        with self.alive():
            self.pipe.send(what)
        return self.wait()

    def wait(self) -> Any:
        """What it says next."""
        with self.alive():
            return self.pipe.recv()

    @contextmanager
    def alive(self) -> Iterator[None]:
        """Say in one line that the process has ended, where it has."""
        try:
            yield
        except (EOFError, BrokenPipeError):
            self.process.join()
            reason = "its message is above"
            if self.process.exitcode == -signal.SIGKILL:
                reason = "it was killed, as the system does when memory runs out; ask for fewer --tokens or --variants"
            raise SystemExit(f"the process of {self.variant} ended: {reason}.") from None


def turns(workers: Mapping[str, Worker], tokens: int, repeats: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of each step, the variants taking turns, so that a busy spell of the machine meets all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    for turn in range(warm_up + repeats):
        for name, worker in workers.items():
            taken = worker.ask(tokens)
            if turn >= warm_up:
                seconds[name].append(taken)
    return seconds


def work(pipe: Connection, variant: str, layers: int, args: argparse.Namespace) -> None:
    """What a :class:`Worker` does: tells its gated weights, then the seconds of a step of each number it is sent."""
    if variant != "published":
        keep_freed_memory()
    device = torch.device(args.device)
    model = first_blocks(load_model(args.model, dtype=args.dtype, dropout=False), layers).to(device)
    gated = sum(weight.parameter.numel() for weight in find_weights(model).values())
    make = makers(args.gate)
    step = (make | {"published_kept": make["published"]})[variant](model)
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    pipe.send(gated)
    while True:
        try:
            asked = pipe.recv()
        except EOFError:
            return
        if asked == "compile_seconds":
            pipe.send(compile_seconds())
            continue
        same = torch.Generator().manual_seed(0)
        shape = sequences(asked, args.seq_length)
        ids_BL = torch.randint(0, model.config.vocab_size, shape, generator=same).to(device)
        wait_for(device)
        start = clock()
        step(ids_BL)
        wait_for(device)
        pipe.send(clock() - start)


if __name__ == "__main__":
    main()
