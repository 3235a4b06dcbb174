"""Check and measure leap_pl on one GPU, in ten minutes and without a network.

python -m benchmarks.gpu [--minutes 10] [--check_only] [--tiny] [--output F.json]

First the checks, each of which says PASS or FAIL with its figure: noise with the same bits as on the CPU; every kind of
gate, and the losses, against float64; fits of a tiny Llama with every kind of gate, against those on the CPU; a run
that is stopped and resumed, bit for bit; DDP and FSDP2 of one device; products with packed weights; no host sync in a
micro-batch. Then what there is time for, the most important first: steps of dense fine-tuning, leap_pl, its low-memory
path and the published formulation (benchmarks/variants.py), on random weights of the shapes of Qwen2.5-0.5B,
Llama-3.2-1B and, in low memory, Llama-3.1-8B; evaluation, one-shot pruning, and decoding with packed weights.

The variants take turns; medians of CUDA's events are shown. Evaluation and one-shot pruning are measured once, with
what a first call prepares. ``peak GiB`` is what torch allocates for a variant in a step; ``on paper GiB`` is what
``benchmarks.memory --paper`` says of a step with activation checkpointing, without what torch's allocator does not see.
``launches`` are the kernels that a step starts.

It needs torch, lightning, transformers, jsonargparse and this repository. The exit status is 1 if a check or a
measurement failed; a variant that does not fit into the memory is a row that says so. Without a GPU, or with
``--tiny``, the shapes are tiny: that tests this command.
"""

import argparse
import json
import logging
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import cells, checks
from benchmarks.gpu.runs import Place
from benchmarks.gpu.shapes import MODELS, TINY
from benchmarks.report import Row, machine, table, write
from leap_pl.kernels.compiled import compile_seconds


def main(arguments: list[str] | None = None) -> int:
    """Do what the command line asks for; return the exit status."""
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="cells that would take longer are skipped")
    parser.add_argument("--check_only", "--check-only", action="store_true", help="no measurements")
    parser.add_argument("--tiny", action="store_true", default=not torch.cuda.is_available())
    parser.add_argument("--seq_length", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=7, help="turns of the variants")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output")
    args = parser.parse_args(arguments)

    device, say = torch.device(args.device), partial(print, flush=True)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # whose stream events are recorded on
    about: dict[str, Any] = {"machine": machine(), "device": args.device, "tiny": args.tiny}
    say(json.dumps(about["machine"], indent=2))
    with tempfile.TemporaryDirectory() as folder:
        place = Place.make(device, Path(folder))
        checked = checks.run(checks.checks_of(place, large=not args.tiny), say)
    about["checks"] = checked
    rows: list[Row] = []
    about |= {"skipped": [], "failed": []}
    if not args.check_only:
        bench = cells.Bench(
            device=device,
            models=TINY if args.tiny else MODELS,
            seq_length=args.seq_length,
            repeats=args.repeats,
            until=started + 60 * args.minutes,
            report=say,
        )
        rows, about["skipped"], about["failed"] = cells.measure(cells.cells(tiny=args.tiny), bench)
    about |= {"minutes": (time.monotonic() - started) / 60, "compile_seconds": compile_seconds()}
    write(rows, args.output, about)
    say("\n" + table(checked))
    for what in ("skipped", "failed"):
        if about[what]:
            say(f"\n{what}: {'; '.join(about[what])}")
    if rows:
        say("\n" + table(rows))
    return 1 if about["failed"] or any(row["result"] == "FAIL" for row in checked) else 0


def quiet() -> None:
    """Hide what libraries say, so that the lines of the checks stand alone."""
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


if __name__ == "__main__":
    quiet()
    sys.exit(main())
