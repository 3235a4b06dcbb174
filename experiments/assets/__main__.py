"""``python -m experiments.assets``: fetch assets and lay them out."""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import experiments.assets
from experiments.assets.mixture import make_mixture, make_mixture_with_questions
from experiments.assets.models import GEMMA, QWEN, SMOLLM2, make_model
from experiments.assets.packages import report
from experiments.assets.texts import make_howto, make_science, make_tasks, make_text
from leap_pl.errors import UserError

ASSETS: dict[str, tuple[Callable[[Path], Path], ...]] = {
    "quickstart": (partial(make_model, SMOLLM2), make_text),
    "eval": (make_tasks, make_howto, make_science),
    "mixture": (make_mixture, make_mixture_with_questions),
    "gemma": (partial(make_model, GEMMA),),
    "qwen": (partial(make_model, QWEN),),
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    summary = str(experiments.assets.__doc__).split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m experiments.assets", description=summary)
    parser.add_argument(
        "which",
        choices=sorted(ASSETS),
        help="quickstart: model and text; eval: zero-shot tasks and two more held-out texts; mixture: "
        "texts of several kinds; gemma, qwen: other models",
    )
    parser.add_argument("--folder", type=Path, default=Path("assets"), help="where they go (default: assets)")
    options = parser.parse_args(arguments)
    try:
        for make in ASSETS[options.which]:
            report(f"ready: {make(options.folder)}")
    except UserError as error:
        report(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        report("stopped.")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
