"""From the command to the first step of ``leap_pl fit``, and what takes the time.

python -m benchmarks.startup --model M --text FILE [--repeats 3] [--output F.json]

Each run is a process of its own, with a prior mask that is already made (its making is calibration, not start-up).
The process tells the clock at each stage; the first step is told apart from the compilation of its kernels.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.report import Row

START = "LEAP_PL_BENCHMARK_START"


def main(arguments: list[str] | None = None) -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cold", action="store_true", help="with an empty cache of compiled kernels")
    parser.add_argument("--output")
    parser.add_argument("--prior", help=argparse.SUPPRESS)  # given to the processes that are measured
    args = parser.parse_args(arguments)
    if args.prior is not None:
        child(args.model, args.text, args.prior)
        return
    from benchmarks.report import finish  # imports torch, which a measured process does by itself

    with tempfile.TemporaryDirectory() as folder:
        words = ["prune", "--model", args.model, "--method", "magnitude", "--sparsity", "0.5", "--output_dir", folder]
        subprocess.run([sys.executable, "-m", "leap_pl", *words], check=True, stdout=subprocess.DEVNULL)
        rows = measured(args.model, args.text, str(Path(folder, "mask.safetensors")), args.repeats, cold=args.cold)
    finish(rows, args.output, model=args.model, cold=args.cold)


def measured(model: str, text: str, prior: str, repeats: int, *, cold: bool) -> "list[Row]":
    """Median seconds of each stage, over ``repeats`` processes."""
    found: dict[str, list[float]] = {}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as cache:
            kernels = {"TORCHINDUCTOR_CACHE_DIR": cache} if cold else {}
            words = ["--model", model, "--text", text, "--prior", prior]
            told = subprocess.run(
                [sys.executable, "-m", "benchmarks.startup", *words],
                env={**os.environ, **kernels, START: repr(time.time())},
                check=True,
                stdout=subprocess.PIPE,
                text=True,
            ).stdout
        for stage, seconds in json.loads(told.splitlines()[-1]).items():
            found.setdefault(stage, []).append(seconds)
    return [{"stage": stage, "seconds_median": statistics.median(all_)} for stage, all_ in found.items()]


def child(model: str, text: str, prior: str) -> None:
    """One run of ``leap_pl fit`` of two steps, with a clock between its stages."""
    begun = float(os.environ[START])
    seconds: dict[str, float] = {"Python and this script": time.time() - begun}

    def timed(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.time()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[stage] = seconds.get(stage, 0.0) + time.time() - start

        return call

    start = time.time()
    from leap_pl.cli.fit import make_cli  # noqa: F401  (so that its imports count here)
    from leap_pl.cli.main import main as leap_pl
    from leap_pl.kernels.compiled import compile_seconds
    from leap_pl.training import gated_module, module

    seconds["imports"] = time.time() - start
    for name, stage in (
        ("load_model", "load the model"),
        ("model_fingerprint", "fingerprint of its weights"),
        ("split_model", "check of the head"),
        ("attach", "gates"),
    ):
        setattr(gated_module, name, timed(stage, getattr(gated_module, name)))
    first: list[float] = []
    learn = module.LeapModule.training_step

    def training_step(self: Any, *args: Any) -> Any:
        if not first:
            first.append(time.time())
        return learn(self, *args)

    module.LeapModule.training_step = training_step  # type: ignore[method-assign, assignment]
    ended: list[float] = []
    clear = module.LeapModule.on_train_batch_end

    def on_train_batch_end(self: Any, *args: Any) -> None:
        if not ended:
            ended.append(time.time())
        clear(self, *args)

    module.LeapModule.on_train_batch_end = on_train_batch_end  # type: ignore[method-assign, assignment]
    with tempfile.TemporaryDirectory() as folder:
        words = ["fit", "--model.base_model", model, "--model.prior.mask", prior, "--data.text", text]
        words += ["--data.seq_length", "512", "--data.batch_size", "1", "--data.validation_sequences", "0"]
        words += ["--trainer.max_steps", "2", "--trainer.logger", "false", "--trainer.accelerator", "cpu"]
        words += ["--checkpoint.dirpath", folder]
        leap_pl(words)
    seconds["data, trainer and the rest"] = first[0] - begun - sum(seconds.values())
    seconds["to the first step"] = first[0] - begun
    seconds["compile"] = sum(compile_seconds().values())
    seconds["first step, compilation included"] = ended[0] - first[0]
    print(json.dumps(seconds))


if __name__ == "__main__":
    main()
