"""``python -m experiments.headline``: make, measure and report the headline experiment."""

import argparse
import signal
import sys
from pathlib import Path
from types import FrameType

from leap_pl.errors import UserError
from leap_pl.escape import say

DEFINITION = "configs/results/headline.yaml"
DOCS = Path("docs/results")
ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / DOCS


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.headline",
        description="Make and measure the cells of an experiment, and write its report. What is finished is not done "
        "again; stop it at any moment, and the same command goes on.",
    )
    parser.add_argument("--config", default=DEFINITION, help=f"definition of the experiment (default: {DEFINITION})")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/results"), help="where cells are made (default: runs/results)"
    )
    parser.add_argument(
        "--docs",
        type=Path,
        default=DOCS,
        help="folder of figures; the report lies beside it (default: docs/results, and docs/results.md)",
    )
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="PATTERN",
        help="only these cells, as in 'leap-*-60', and what they need",
    )
    parser.add_argument("--list", action="store_true", help="say what is done and what is left; run nothing")
    parser.add_argument("--report", action="store_true", help="write the report of what is finished; run nothing")
    parser.add_argument(
        "--from", dest="cells", type=Path, metavar="FOLDER", help="(with --report) read the cells' files in this folder"
    )
    options = parser.parse_args(arguments)
    try:
        return _run(options)
    except UserError as error:
        say(f"results: {error}", sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    from experiments.headline.definition import read_experiment
    from experiments.headline.making import DEFINITIONS
    from experiments.headline.runner import Runner

    shipped = options.docs.resolve() == SHIPPED
    if options.cells is not None:
        if shipped and options.cells.resolve() != SHIPPED / "cells":
            raise UserError(
                f"{DOCS} has the figures of {DOCS}/cells, and those of {options.cells} would take their place. Name "
                "another folder with --docs."
            )
        return _report(options.cells, options.docs)
    for name, definition in DEFINITIONS.items():
        config = Path("configs/results") / definition
        if options.docs.resolve() == ROOT / "docs" / name and Path(options.config).resolve() != config.resolve():
            raise UserError(
                f"docs/{name} has the figures of {config}, and those of {options.config} would take their place. Name "
                "another folder with --docs."
            )
    runner = Runner(read_experiment(options.config), options.folder, options.docs / "cells")
    cells = runner.chosen(options.only)
    if options.list:
        print("\n".join(runner.lines(cells)))
        return 0
    left_out = list(runner.left_out(cells))
    for line in left_out:
        say(line, sys.stderr)
    failed = {} if options.report else runner.run(runner.left(cells))
    from experiments.headline.cells import collect

    finished = collect(runner, options.docs / "cells", moves=not options.report)
    print(f"{finished} of {len(runner.experiment.cells)} cells are finished")
    status = _report(options.docs / "cells", options.docs) if finished else 0
    return 1 if failed or (left_out and options.only) else status


def _report(cells: Path, docs: Path) -> int:
    from experiments.headline.report import write_report

    say(f"written: {write_report(cells, docs)}")
    return 0


def _stop(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
