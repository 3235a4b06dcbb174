"""What a run of ``leap_pl fit`` spends beside its steps: on each callback, and waiting for data.

python -m benchmarks.loop --model M --text FILE [--steps 101] [--tokens 512] [--workers 0] [--output F.json]

One run with Lightning's profiler; callbacks and their intervals are the defaults. The first steps, in which kernels are
compiled, do not count.
"""

import argparse
import tempfile
from collections.abc import Mapping, Sequence

from benchmarks.report import Row, finish

STEP = "run_training_batch"
WAIT = "[_TrainingEpochLoop].train_dataloader_next"
CALLBACK = "[Callback]"
WARM_UP = 3


def main(arguments: list[str] | None = None) -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument(
        "--steps", type=int, default=101, help="by default enough for the logger's histograms, one each 100 steps"
    )
    parser.add_argument("--tokens", type=int, default=512, help="of a step")
    parser.add_argument("--workers", type=int, default=0, help="processes that tokenize and pack")
    parser.add_argument("--output")
    args = parser.parse_args(arguments)
    from leap_pl.cli.main import main as leap_pl

    with tempfile.TemporaryDirectory() as folder:
        words = ["fit", "--model.base_model", args.model, "--model.prior.method", "magnitude", "--data.text", args.text]
        words += ["--data.seq_length", str(args.tokens), "--data.batch_size", "1", "--data.validation_sequences", "0"]
        words += ["--data.num_workers", str(args.workers), "--trainer.max_steps", str(args.steps)]
        words += ["--trainer.profiler", "SimpleProfiler", "--trainer.logger", "TensorBoardLogger"]
        words += ["--trainer.logger.save_dir", folder, "--checkpoint.dirpath", f"{folder}/checkpoints"]
        durations = leap_pl(words).trainer.profiler.recorded_durations
    rows = shares(durations, WARM_UP)
    finish(rows, args.output, model=args.model, tokens=args.tokens, steps=args.steps, workers=args.workers)


def shares(durations: Mapping[str, Sequence[float]], warm_up: int) -> list[Row]:
    """A row for the steps, one for the wait for data, and one for each callback, the dearest first.

    Args:
        durations: Action, as Lightning's profiler calls it → seconds of each time it was done.
        warm_up: How many of the first steps do not count, and of what is done once a step.
    """
    steps = len(durations[STEP])
    seconds = {"step": sum(durations[STEP][warm_up:]), "waiting for data": 0.0}
    for action, each in durations.items():
        if action == WAIT:
            seconds["waiting for data"] = sum(each[:steps][warm_up:])
        elif action.startswith(CALLBACK) and ".on_train_batch" in action and len(each) >= steps:
            name = action.removeprefix(CALLBACK).partition("{")[0].partition(".")[0]
            seconds[name] = seconds.get(name, 0.0) + sum(each[len(each) - steps :][warm_up:])
    counted = steps - warm_up
    first, others = list(seconds.items())[:2], sorted(list(seconds.items())[2:], key=lambda item: -item[1])
    return [
        {"part": part, "ms_a_step": 1000 * spent / counted, "percent_of_steps": 100 * spent / seconds["step"]}
        for part, spent in (*first, *others)
    ]


if __name__ == "__main__":
    main()
