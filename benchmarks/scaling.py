"""Memory and communication of each rank, on paper: 8B and 70B over 1 to 64 GPUs.

python -m benchmarks.scaling [--models ...] [--gpus 1 2 4 8 16 32 64] [--tokens 4096] [--distillation]

The bytes are those that benchmarks/sharded_memory.py measures and tests/system/test_scale.py counts; docs/scaling.md
has the formulas in words, what they leave out, and what to choose when.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.report import Row, table
from leap_pl.training.memory import (
    CHUNK_VOCABULARY,
    KEPT_HIDDEN,
    KEPT_INTERMEDIATE,
    PREFETCHED,
    TRANSIENT,
    TRANSIENT_SHARDED,
)

# Bytes a gated weight. Weights in bfloat16; AdamW.
WEIGHT, LOGIT, GRADIENT, OPTIMIZER = 2, 4, 4, 8
GATHERED = WEIGHT + LOGIT  # what a rank is sent of a sharded weight before its block runs
CHUNK = 512  # tokens; model.objective.chunk
OUTSIDE = 2 * 2**30  # driver, libraries, communication buffers, fragmentation: an allowance, not measured here


@dataclass(frozen=True)
class Shape:
    """What a Llama's memory depends on.

    Attributes:
        layers: Decoder blocks.
        hidden: Hidden size.
        intermediate: Of the MLP.
        key_value: Key-value heads times their size.
        vocabulary: Tokens.
        tied: Whether the head is the embedding.
        biased: Whether queries, keys and values have a bias.
    """

    layers: int
    hidden: int
    intermediate: int
    key_value: int
    vocabulary: int
    tied: bool = False
    biased: bool = False

    @property
    def block(self) -> int:
        """Gated weights of one block."""
        return self.hidden * (2 * self.hidden + 2 * self.key_value + 3 * self.intermediate)

    @property
    def gated(self) -> int:
        """Gated weights."""
        return self.layers * self.block

    @property
    def others(self) -> int:
        """Other weights: embedding, head, norms, biases."""
        norms = (2 * self.layers + 1) * self.hidden
        biases = self.layers * (self.hidden + 2 * self.key_value) if self.biased else 0
        return self.vocabulary * self.hidden * (1 if self.tied else 2) + norms + biases


SHAPES = {
    "qwen2.5-0.5b": Shape(24, 896, 4864, 128, 151936, tied=True, biased=True),
    "qwen2.5-1.5b": Shape(28, 1536, 8960, 256, 151936, tied=True, biased=True),
    "llama-3.2-1b": Shape(16, 2048, 8192, 512, 128256, tied=True),
    "llama-3.2-3b": Shape(28, 3072, 8192, 1024, 128256, tied=True),
    "llama-3.1-8b": Shape(32, 4096, 14336, 1024, 128256),
    "qwen2.5-32b": Shape(64, 5120, 27648, 1024, 152064, biased=True),
    "llama-3.1-70b": Shape(80, 8192, 28672, 1024, 128256),
}


@dataclass(frozen=True)
class Need:
    """Of one rank.

    Attributes:
        states: Bytes of weights, logits, gradients and optimizer.
        transient: Bytes of one block at work.
        activations: Bytes that are kept for the backward pass, and of the loss.
        sent: Bytes it receives (and as many it sends) in one micro-batch.
        sent_step: Bytes besides, in one optimizer step.
    """

    states: float
    transient: float
    activations: float
    sent: float
    sent_step: float

    @property
    def memory(self) -> float:
        """All of it, with the allowance for what is outside."""
        return self.states + self.transient + self.activations + OUTSIDE


def need(shape: Shape, ranks: int, *, sharded: bool, tokens: int, distillation: bool = False) -> Need:
    """What a rank needs, with activation checkpointing.

    Args:
        shape: Of the model.
        ranks: How many.
        sharded: Decoder blocks over the ranks (FSDP2), or the whole model on each (DDP).
        tokens: Of a micro-batch.
        distillation: A second, dense forward pass.
    """
    persistent = WEIGHT + LOGIT + GRADIENT + OPTIMIZER
    share = (ranks - 1) / ranks  # of a whole tensor, what a rank does not hold
    kept = KEPT_HIDDEN * shape.hidden + KEPT_INTERMEDIATE * shape.intermediate
    inputs = 2 * shape.hidden * shape.layers
    activations = tokens * (inputs + kept) + CHUNK_VOCABULARY * CHUNK * shape.vocabulary
    if sharded and ranks > 1:
        passes = 3 if distillation else 2  # forward, backward; the teacher's forward
        return Need(
            states=persistent * shape.gated / ranks + WEIGHT * shape.others,
            transient=(TRANSIENT_SHARDED + PREFETCHED) * shape.block,
            activations=activations,
            sent=share * shape.gated * (passes * GATHERED + GRADIENT),
            sent_step=0.0,
        )
    return Need(
        states=persistent * shape.gated + WEIGHT * shape.others,
        transient=TRANSIENT * shape.block,
        activations=activations,
        sent=0.0,
        sent_step=2 * share * GRADIENT * shape.gated,  # a ring: reduce and gather
    )


def rows(name: str, ranks: Sequence[int], tokens: int, *, distillation: bool = False) -> list[Row]:
    """A row for each number of ranks, in GiB (memory) and GB (communication)."""
    found: list[Row] = []
    for size in ranks:
        whole, parts = (
            need(SHAPES[name], size, sharded=sharded, tokens=tokens, distillation=distillation)
            for sharded in (False, True)
        )
        row: Row = {"model": name, "GPUs": size, "DDP GiB": round(whole.memory / 2**30, 1)}
        row["DDP GB sent a step"] = round(whole.sent_step / 1e9, 1)
        row["FSDP2 GiB"] = round(parts.memory / 2**30, 1)
        row["states"], row["one block"], row["activations"] = (
            round(part / 2**30, 1) for part in (parts.states, parts.transient, parts.activations)
        )
        row["FSDP2 GB sent a micro-batch"] = round(parts.sent / 1e9, 1)
        found.append(row)
    return found


def tokens_to_hide(bandwidth: float, speed: float, *, distillation: bool = False) -> float:
    """Tokens of a micro-batch on each rank from which FSDP2 computes longer than it communicates.

    A weight costs 8 operations a token (forward 2, again for checkpointing 2, backward 4), 2 more for a teacher, and
    16 bytes a micro-batch, 22 with a teacher: the size of the model cancels.

    Args:
        bandwidth: Bytes a second that a rank receives while it computes.
        speed: Operations a second that it reaches.
        distillation: With a teacher.
    """
    operations, sent = (10, 22) if distillation else (8, 16)
    return sent * speed / (operations * bandwidth)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["llama-3.1-8b", "llama-3.1-70b"], choices=SHAPES)
    parser.add_argument("--gpus", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--tokens", type=int, default=4096, help="of a micro-batch on each rank")
    parser.add_argument("--distillation", action="store_true")
    args = parser.parse_args(arguments)
    for name in args.models:
        print(table(rows(name, args.gpus, args.tokens, distillation=args.distillation)), end="\n\n")
    for link, bandwidth in {"NVLink, 300 GB/s": 300e9, "InfiniBand, 40 GB/s a GPU": 40e9}.items():
        least = tokens_to_hide(bandwidth, 4e14, distillation=args.distillation)
        print(f"{link}, at 400 TFLOP/s: communication hides behind {least:,.0f} tokens a micro-batch")


if __name__ == "__main__":
    main()
