"""Time, layer error and perplexity of the one-shot methods on one model and one text.

python -m benchmarks.oneshot --model M --text FILE [--sparsities 0.5 0.6] [--methods wanda admm] [--output F.json]

Calibrates on the first blocks of the text, and takes the perplexity on its last windows, which are none of
the calibration's. There is one row for each method and sparsity. Besides the methods of ``leap_pl prune`` there is
``update``: Wanda's mask with its weights solved anew.
"""

import argparse
import time

from benchmarks.report import Row, finish, table
from leap_pl.base_model.loading import load_model
from leap_pl.base_model.tokenizer import load_tokenizer
from leap_pl.data import calibration_blocks
from leap_pl.data.calibration import held_out_tokens
from leap_pl.evaluation.perplexity import perplexity
from leap_pl.masks.patterns import parse_pattern
from leap_pl.oneshot.methods import METHODS
from leap_pl.oneshot.prune import prune


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--seq_length", type=int, default=512)
    parser.add_argument("--sequences", type=int, default=24)
    parser.add_argument("--windows", type=int, default=32, help="windows of seq_length for the perplexity")
    parser.add_argument("--methods", nargs="+", default=["magnitude", "wanda", "sparsegpt", "admm"])
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.5, 0.6])
    parser.add_argument("--patterns", nargs="*", default=[], help="n:m patterns besides")
    parser.add_argument("--output")
    args = parser.parse_args()

    tokenizer = load_tokenizer(args.model)
    blocks_NT = calibration_blocks(args.text, tokenizer, seq_length=args.seq_length, sequences=args.sequences)
    tokens, wanted = held_out_tokens(args.text, tokenizer), args.windows * args.seq_length
    if len(tokens) < blocks_NT.numel() + wanted:
        raise SystemExit(f"{args.text} has {len(tokens):,} tokens, fewer than calibration and windows take. Give more.")
    held_out = tokens[-wanted:]

    model = load_model(args.model)

    def measured() -> float:
        return perplexity(model, held_out, seq_length=args.seq_length, batch_size=4).value

    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rows: list[Row] = [{"method": "dense", "sparsity": 0.0, "perplexity": measured()}]
    asked = [(None, sparsity) for sparsity in args.sparsities] + [(pattern, 0.5) for pattern in args.patterns]
    for pattern, sparsity in asked:
        for method in args.methods:
            model.load_state_dict(dense)
            shape = parse_pattern(pattern, sparsity)
            mask = None
            if method == "update":
                mask = prune(model, blocks_NT, method="wanda", pattern=shape, update=False, progress=False).masks
            wall, cpu = time.monotonic(), time.process_time()
            pruned = prune(
                model,
                None if method in METHODS and METHODS[method].needs is None else blocks_NT,
                method="admm" if mask else method,
                pattern=shape,
                mask=mask,
                progress=False,
            )
            wall, cpu = time.monotonic() - wall, time.process_time() - cpu
            error = sum(pruned.errors.values()) / max(len(pruned.errors), 1)
            rows.append(
                {
                    "method": method,
                    "pattern": pattern or "unstructured",
                    "sparsity": pruned.masks.sparsity,
                    "seconds": wall,
                    "cpu_seconds": cpu,
                    "mean_layer_error": error if pruned.errors else None,
                    "perplexity": measured(),
                }
            )
            print(table(rows[-1:]), flush=True)
    finish(rows, args.output, model=args.model, text=args.text, sequences=args.sequences, seq_length=args.seq_length)


if __name__ == "__main__":
    main()
