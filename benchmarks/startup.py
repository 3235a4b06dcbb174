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
from typing import Any

from benchmarks.report import Row, finish

START = "LEAP_PL_BENCHMARK_START"


def main(arguments: list[str] | None = None) -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cold", action="store_true", help="with an empty cache of compiled kernels")
    parser.add_argument("--output")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.child:
        child(args.model, args.text)
        return
    found: dict[str, list[float]] = {}
    for _ in range(args.repeats):
        with tempfile.TemporaryDirectory() as cache:
            kernels = {"TORCHINDUCTOR_CACHE_DIR": cache} if args.cold else {}
            told = subprocess.run(
                [sys.executable, "-m", "benchmarks.startup", "--child", "--model", args.model, "--text", args.text],
                env={**os.environ, **kernels, START: repr(time.time())},
                check=True,
                capture_output=True,
                text=True,
            ).stdout
        for stage, seconds in json.loads(told.splitlines()[-1]).items():
            found.setdefault(stage, []).append(seconds)
    rows: list[Row] = [{"stage": stage, "seconds_median": statistics.median(all_)} for stage, all_ in found.items()]
    finish(rows, args.output, model=args.model, cold=args.cold)


def child(model: str, text: str) -> None:
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
    from leap_pl.base_model.loading import load_model
    from leap_pl.base_model.weights import find_weights
    from leap_pl.cli.fit import make_cli  # noqa: F401  (so that its imports count here)
    from leap_pl.cli.main import main as leap_pl
    from leap_pl.kernels.compiled import compile_seconds
    from leap_pl.masks.patterns import Unstructured
    from leap_pl.oneshot.prune import prune
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
        made = time.time()
        base = load_model(model, dtype="bfloat16")
        prior = Path(folder, "prior.safetensors")
        masks = prune(base, None, method="magnitude", pattern=Unstructured(0.5), progress=False).masks
        masks.save(prior)
        del base, find_weights
        made = time.time() - made
        words = ["fit", "--model.base_model", model, "--model.prior.mask", str(prior), "--data.text", text]
        words += ["--data.seq_length", "512", "--data.batch_size", "1", "--data.validation_sequences", "0"]
        words += ["--trainer.max_steps", "2", "--trainer.logger", "false", "--trainer.accelerator", "cpu"]
        words += ["--checkpoint.dirpath", folder]
        leap_pl(words)
    seconds["data, trainer and the rest"] = first[0] - begun - made - sum(seconds.values())
    seconds["to the first step"] = first[0] - begun - made
    seconds["compile"] = sum(compile_seconds().values())
    seconds["first step, compilation included"] = ended[0] - first[0]
    print(json.dumps(seconds))


if __name__ == "__main__":
    main()
