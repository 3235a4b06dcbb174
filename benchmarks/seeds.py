"""Perplexity after the quickstart's run: over seeds, and with each optimisation of speed or memory undone or made.

python -m benchmarks.seeds [--seeds 0 1 2] [--variants "no compiler" …] [--folder runs/seeds] [--output F.json]

An optimisation must not cost accuracy: none may move the perplexity farther than another seed does. Each run is
`leap_pl fit --config configs/quickstart.yaml` and an evaluation of its mask, in processes of their own; the variants
have the first seed. What is finished in ``--folder`` with the same settings is not run again.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.report import Row, finish
from experiments.quickstart import BASE_MODEL, CONFIG, TEXT, TOKENS, WINDOW, is_stamped, write_stamp
from leap_pl.evaluation.record import commit
from leap_pl.masks.mask_set import installed_versions

# What differs from the config: options of `leap_pl fit`, and variables of its environment.
VARIANTS: dict[str, tuple[list[str], dict[str, str]]] = {
    "no compiler": ([], {"LEAP_PL_COMPILE": "0"}),
    "AdamW not fused, clipped apart": (["--model.optimizer.fused", "false"], {}),
    "loss of all tokens at once": (["--model.objective.chunk", "1000000"], {}),
    "activation checkpointing": (["--model.activation_checkpointing", "true"], {}),
    "low memory": (["--config", "low_memory"], {}),
}


def main(arguments: list[str] | None = None) -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--model", type=Path, default=BASE_MODEL)
    parser.add_argument("--text", type=Path, default=TEXT, help="held-out text that the masks are evaluated on")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of that text")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--folder", type=Path, default=Path("runs/seeds"))
    parser.add_argument("--output")
    args = parser.parse_args(arguments)

    runs: dict[str, tuple[int, list[str], dict[str, str]]] = {}
    for seed in args.seeds:
        runs[f"seed {seed}"] = (seed, [], {})
    for name in args.variants:
        runs[name] = (args.seeds[0], *VARIANTS[name])
    rows: list[Row] = []
    for name, (seed, options, environment) in runs.items():
        folder = args.folder / name.replace(",", "").replace(" ", "-")
        options = ["--model.seed", str(seed), "--data.seed", str(seed), *options]
        protocol = [args.model, args.text, args.tokens]
        code = commit()
        stamp = json.dumps(
            [
                *(options, environment, list(map(str, protocol)), args.config.read_text(encoding="utf-8")),
                *(code, installed_versions()),
            ]
        )
        # What is changed has no name of its own: it is run again.
        finished = (folder / "result.json").is_file() and is_stamped(folder / "stamp.json", stamp.encode())
        finished = finished and code is not None and "+changes" not in code
        if not finished:
            _run(args, folder, options, environment)
            write_stamp(folder / "stamp.json", stamp.encode())
        (figure,) = json.loads((folder / "result.json").read_text(encoding="utf-8"))["perplexity"].values()
        rows.append({"run": name, "seed": seed, "perplexity": figure["value"]})
        print(f"{name}: {figure['value']:.3f}", flush=True)
    of_seeds = [float(row["perplexity"]) for row in rows[: len(args.seeds)]]
    for row in rows:
        row["against_first"] = float(row["perplexity"]) / of_seeds[0] - 1
    spread = (max(of_seeds) - min(of_seeds)) / of_seeds[0]
    print(f"the seeds lie within {spread:.2%} of one another")
    finish(rows, args.output, config=str(args.config), spread_of_seeds=spread)


def _run(args: argparse.Namespace, folder: Path, options: list[str], environment: dict[str, str]) -> None:
    """Fit and evaluate; what they print goes into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    mask = folder / "checkpoints" / "mask.safetensors"
    fit = ["fit", "--config", str(args.config), *options, "--checkpoint.dirpath", str(mask.parent)]
    fit += ["--trainer.logger", "false", "--model.base_model", str(args.model), "--force"]
    protocol = ["--perplexity", str(args.text), "--seq_length", str(WINDOW), "--max_tokens", str(args.tokens)]
    evaluate = ["evaluate", "--mask", str(mask), *protocol, "--output", str(folder / "result.json")]
    with (folder / "log").open("w", encoding="utf-8") as log:
        for words in (fit, evaluate):
            command = [sys.executable, "-m", "leap_pl", *words]
            subprocess.run(command, check=True, env={**os.environ, **environment}, stdout=log, stderr=log)


if __name__ == "__main__":
    main()
