"""``python -m leap_pl.results``: make, measure and report the headline experiment."""

import argparse
import signal
import sys
from pathlib import Path

from leap_pl.errors import UserError
from leap_pl.results.experiment import read_experiment

DEFINITION = "configs/results/headline.yaml"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m leap_pl.results", description=__doc__)
    parser.add_argument("--config", default=DEFINITION, help=f"definition of the experiment (default: {DEFINITION})")
    parser.add_argument("--folder", type=Path, default=Path("runs/results"), help="where cells are made")
    parser.add_argument("--docs", type=Path, default=Path("docs/results"), help="figures; the report is DOCS.md")
    parser.add_argument("--only", action="append", default=[], metavar="PATTERN", help="cells, as in leap-*-60")
    parser.add_argument("--list", action="store_true", help="say what is done and what is left")
    parser.add_argument("--report", action="store_true", help="write the report of what is finished, run nothing")
    parser.add_argument("--from", dest="cells", type=Path, help="(with --report) a folder of cells' JSON files")
    options = parser.parse_args(arguments)
    try:
        return _run(options)
    except UserError as error:
        print(f"results: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    from leap_pl.results.report import write_report
    from leap_pl.results.runner import Runner, collect

    if options.cells is not None:
        print(f"written: {write_report(options.cells, options.docs)}")
        return 0
    runner = Runner(read_experiment(options.config), options.folder)
    cells = runner.chosen(options.only)
    if options.list:
        print("\n".join(runner.lines(cells)))
        return 0
    failed = {} if options.report else runner.run(cells)
    finished = collect(runner, options.docs / "cells")
    print(f"written: {write_report(options.docs / 'cells', options.docs)}")
    print(f"{finished} of {len(runner.experiment.cells)} cells are finished")
    return 1 if failed else 0


def _stop(signal_number: int, frame: object) -> None:
    raise SystemExit(128 + signal_number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
