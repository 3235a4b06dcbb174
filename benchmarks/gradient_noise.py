"""How much of a gradient of the logits is signal: two halves of a text, correlated.

python -m benchmarks.gradient_noise --model M --mask PRIOR --text F.jsonl [--schedule 100:1 1000:10] [--output F.json]

At the start of a run from the prior mask PRIOR, the gradient of all logits is summed over ``--micro_batches``
micro-batches of ``--batch_size`` sequences, once over one part of the text and once over the next, each with its own
noise. The correlation of the two sums (cosine, over all logits; and the median over the weights) is 1 where a sum is
all signal and 0 where it is all noise. ``--schedule`` names logit scales α and temperatures τ.
"""

import argparse
import math
import statistics
from itertools import islice

import torch
from torch import Tensor

from benchmarks.report import Row, finish
from leap_pl.base_model.backbone import split_model
from leap_pl.base_model.fast_dtype import fast_dtype
from leap_pl.base_model.loading import load_model
from leap_pl.base_model.tokenizer import load_tokenizer
from leap_pl.base_model.weights import find_weights
from leap_pl.data import calibration_blocks
from leap_pl.gates import BernoulliGate, Gate, GateState, attach
from leap_pl.losses.language import language_losses
from leap_pl.losses.objective import Objective
from leap_pl.masks import MaskSet


def main(arguments: list[str] | None = None) -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--mask", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--schedule", nargs="+", default=["100:1", "1000:10"], help="ALPHA:TAU")
    parser.add_argument("--losses", nargs="+", default=["lm", "distillation"], choices=["lm", "distillation"])
    parser.add_argument("--seq_length", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--micro_batches", type=int, default=8)
    parser.add_argument("--output")
    args = parser.parse_args(arguments)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(args.model, dtype=fast_dtype(device), dropout=False).to(device).requires_grad_(False)
    sequences = 2 * args.micro_batches * args.batch_size
    blocks_NT = calibration_blocks(
        args.text,
        load_tokenizer(args.model),
        seq_length=args.seq_length,
        sequences=sequences,
        separator="blank_line",
    )
    state = GateState(seed=0)
    gates = attach(find_weights(model), BernoulliGate, state)
    prior = MaskSet.load(args.mask)
    for name, gate in gates.items():
        gate.start_from(prior.masks[name], 0)
    with state.passing("dense"):
        states, head = split_model(model)

    def half(batches: list[Tensor], first: int, objective: Objective) -> tuple[dict[str, Tensor], float]:
        """The summed gradient of each weight's logits, and the mean LM loss in nats a token."""
        lms = []
        for gate in gates.values():
            gate.zero_grad()
        for number, ids_BL in enumerate(batches, first):
            state.step = number
            gates.clear()
            teacher = None
            if objective.distillation:
                with torch.no_grad(), state.passing("dense"):
                    teacher = states(ids_BL)[:, :-1].flatten(0, 1)
            hidden = states(ids_BL)[:, :-1].flatten(0, 1)
            loss, lm, _ = language_losses(hidden, ids_BL[:, 1:].flatten(), head, objective, teacher)
            loss.backward()
            lms.append(float(lm))
        return {name: _gradient(gate) for name, gate in gates.items()}, statistics.mean(lms)

    rows: list[Row] = []
    for pair in args.schedule:
        alpha, tau = map(float, pair.split(":"))
        state.anneal(alpha, tau)
        for loss in args.losses:
            batches = list(blocks_NT.to(device).split(args.batch_size))
            objective = Objective(lm=float(loss == "lm"), distillation=float(loss == "distillation"))
            first, lm = half(list(islice(batches, args.micro_batches)), 0, objective)
            second, _ = half(batches[args.micro_batches :], args.micro_batches, objective)
            products = {name: _products(first[name], second[name]) for name in gates}
            each = [xy / math.sqrt(xx * yy) for xy, xx, yy in products.values()]
            xy, xx, yy = (sum(part) for part in zip(*products.values(), strict=True))
            rows.append(
                {
                    "alpha": alpha,
                    "tau": tau,
                    "loss": loss,
                    "correlation": xy / math.sqrt(xx * yy),
                    "median_of_weights": statistics.median(each),
                    "lm_loss": lm,
                }
            )
    finish(rows, args.output, model=args.model, tokens_of_a_half=sequences * args.seq_length // 2)


def _gradient(gate: Gate) -> Tensor:
    (logits,) = gate.parameters()
    assert logits.grad is not None
    return logits.grad.clone()


def _products(x: Tensor, y: Tensor) -> tuple[float, float, float]:
    x, y = x.double(), y.double()
    return float((x * y).sum()), float((x * x).sum()), float((y * y).sum())


if __name__ == "__main__":
    main()
