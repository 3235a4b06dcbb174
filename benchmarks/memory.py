"""Peak memory of a training step: dense fine-tuning, leap_pl, its low-memory path, and the published formulation.

python -m benchmarks.memory --model M [--tokens 2048] [--output F.json]

Each variant takes three steps in a process of its own; what is told is the largest resident memory of that
process (on a GPU, the largest allocated), and, beside it, what parameters, gradients and optimizer states
account for by their sizes. ``--paper llama-3.1-8b`` prints the sum for a large model on one GPU instead, with
activation checkpointing, from the bytes that benchmarks/sharded_memory.py measures.
"""

import argparse
import json
import resource
import subprocess
import sys
from typing import Any

import torch

from benchmarks import scaling
from benchmarks.report import Row, finish, sequences
from benchmarks.variants import makers
from leap_pl.base_model.loading import load_model
from leap_pl.base_model.weights import find_weights
from leap_pl.callbacks.allocator import keep_freed_memory
from leap_pl.training import memory

# Bytes that each variant holds of every gated weight of a model in bfloat16: what it trains, its gradient, the two
# moments of AdamW, and the masked weight that the backward pass needs. The two bytes of the base model are counted
# apart. The published formulation keeps the mask, a softmax of two, and the product of mask and weight that the norm
# was taken of.
BYTES = {
    "dense": {"gradient": 2, "optimizer": 4},
    "leap_pl": {"logits": 4, "gradient": 4, "optimizer": 8, "masked weight": 2},
    "low_memory": {"logits": 2, "gradient": 2, "optimizer": 2, "masked weight": 2},
    "published": {"logits": 2, "gradient": 2, "optimizer": 4, "masked weight": 2, "mask and softmax": 2 + 4 + 2},
}


def main(arguments: list[str] | None = None) -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--paper", choices=scaling.SHAPES, help="no measurement: the sum for this model")
    parser.add_argument("--tokens", nargs="+", type=int, default=[2048])
    parser.add_argument("--seq_length", type=int, default=512)
    parser.add_argument("--variants", nargs="+", default=["dense", "leap_pl", "low_memory", "published"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.paper:
        sums: list[Row] = [{"variant": what, **parts} for what, parts in paper(args.paper, args.tokens[0]).items()]
        finish(sums, args.output, model=args.paper, tokens=args.tokens[0])
        return
    if args.model is None:
        parser.error("--model or --paper is needed")
    if args.child:
        print(json.dumps(measure(args.child, args)))
        return
    rows: list[Row] = []
    for tokens in args.tokens:
        for variant in ["load", *args.variants]:
            words = ["--model", args.model, "--tokens", str(tokens), "--seq_length", str(args.seq_length)]
            words += ["--device", args.device, "--child", variant]
            told = subprocess.run(
                [sys.executable, "-m", "benchmarks.memory", *words], check=True, stdout=subprocess.PIPE, text=True
            ).stdout
            rows.append({"variant": variant, "tokens": tokens, **json.loads(told.splitlines()[-1])})
        beyond = {row["variant"]: row["peak_mib"] for row in rows if row["tokens"] == tokens}
        for row in rows:
            if row["tokens"] == tokens and row["variant"] in BYTES and "dense" in beyond:
                row["beyond_dense_mib"] = row["peak_mib"] - beyond["dense"]
                row["accounted_beyond_dense_mib"] = row["accounted_mib"] - accounted("dense", row["gated_weights"])
    finish(rows, args.output, model=args.model, dtype="bfloat16", bytes_a_gated_weight=BYTES)


def paper(name: str, tokens: int) -> dict[str, Row]:
    """GiB that one GPU needs for a step on ``tokens`` tokens, by part and in all: ``leap_pl`` and ``low_memory``."""
    found: dict[str, Row] = {}
    for variant in ("leap_pl", "low_memory"):
        parts = paper_bytes(scaling.SHAPES[name], tokens, variant)
        found[variant] = {what: round(size / 2**30, 1) for what, size in parts.items()}
        found[variant]["GiB"] = round(sum(parts.values()) / 2**30, 1)
    return found


def paper_bytes(shape: scaling.Shape, tokens: int, variant: str) -> dict[str, float]:
    """Bytes of each part of :func:`paper`; ``outside`` is what torch's allocator does not see."""
    transient = {"leap_pl": memory.TRANSIENT, "low_memory": memory.TRANSIENT_LOW_MEMORY}[variant]
    learned = sum(size for what, size in BYTES[variant].items() if what != "masked weight")
    return {
        "base model": scaling.WEIGHT * (shape.gated + shape.others),
        "learning": learned * shape.gated,
        "one block": transient * shape.block,
        "activations and loss": scaling.need(shape, 1, sharded=False, tokens=tokens).activations,
        "outside": scaling.OUTSIDE,
    }


def accounted(variant: str, gated: int) -> float:
    """MiB of what :data:`BYTES` lists."""
    return sum(BYTES[variant].values()) * gated / 2**20


def measure(variant: str, args: argparse.Namespace) -> dict[str, Any]:
    """Peak of three steps, in this process."""
    keep_freed_memory()  # as a run of leap_pl does
    device = torch.device(args.device)
    model = load_model(args.model, dtype="bfloat16", dropout=False).to(device)
    gated = sum(weight.parameter.numel() for weight in find_weights(model).values())
    facts: dict[str, Any] = {"gated_weights": gated}
    if variant in BYTES:
        step = makers()[variant](model)
        ids_BL = torch.randint(0, 1000, sequences(args.tokens[0], args.seq_length), device=device)
        for _ in range(3):
            step(ids_BL)
        facts["accounted_mib"] = accounted(variant, gated)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 2**20
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return {**facts, "peak_mib": round(peak)}


if __name__ == "__main__":
    main()
