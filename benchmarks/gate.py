"""Time of one gate: its forward and backward pass over one weight, in nanoseconds a weight.

python -m benchmarks.gate [--shapes 576x576 1536x576] [--gates BernoulliGate] [--output F.json]

compiled    the gate as it runs
eager       the same lines without a compiler
published   the mask as its paper's formulas say it, materialised: for BernoulliGate that of benchmarks/published.py,
            for NMGate that of benchmarks/published_nm.py
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.published import gumbel_softmax_mask
from benchmarks.published_nm import PublishedNM
from benchmarks.report import Row, finish, interleaved
from leap_pl import gates as kinds
from leap_pl.base_model.weights import Weight
from leap_pl.callbacks.allocator import keep_freed_memory
from leap_pl.gates import Gate, GateState
from leap_pl.kernels.compiled import compile_seconds


def main(arguments: list[str] | None = None) -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["192x576", "576x576", "1536x576", "576x1536", "2048x2048"])
    parser.add_argument("--gates", nargs="+", default=["BernoulliGate"])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"], help="as in benchmarks.step")
    parser.add_argument("--output")
    args = parser.parse_args(arguments)

    keep_freed_memory()  # as a run of leap_pl does
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    rows: list[Row] = []
    for shape in args.shapes:
        height, width = map(int, shape.split("x"))
        weight = (torch.randn(height, width) / width**0.5).to(device, dtype)
        upstream = torch.randn_like(weight)
        calls: dict[str, Callable[[], object]] = {}
        for gate in args.gates:
            calls[f"{gate}, compiled"] = passes(getattr(kinds, gate), weight, upstream)
            calls[f"{gate}, eager"] = eagerly(calls[f"{gate}, compiled"])
            if gate == "BernoulliGate":
                calls[f"{gate}, published"] = published(weight, upstream)
            if gate == "NMGate":
                calls[f"{gate}, published"] = passes(PublishedNM, weight, upstream)
        clock = time.process_time if args.clock == "cpu" else time.perf_counter
        for name, seconds in interleaved(calls, args.repeats, device, warm_up=2, clock=clock).items():
            nanoseconds = statistics.median(seconds) / weight.numel() * 1e9
            rows.append(
                {"variant": name, "shape": shape, "ns_a_weight": nanoseconds, "ms": statistics.median(seconds) * 1e3}
            )
    finish(rows, args.output, dtype=args.dtype, clock=args.clock, compile_seconds=compile_seconds())


def passes(kind: type[Gate], weight: Tensor, upstream: Tensor) -> Callable[[], None]:
    """Forward and backward of one gate over ``weight``."""
    module = nn.Module()
    module.weight = nn.Parameter(weight, requires_grad=False)
    state = GateState()
    state.anneal(200.0, 0.5)
    gate = kind(Weight("w", module, "weight", None, "w", 1), state).to(weight.device)
    gate.start_from(None, 0)

    def call() -> None:
        gate.logits.grad = None
        masked = gate(weight)
        assert gate.kept is not None
        torch.autograd.backward([masked, gate.kept], [upstream, torch.ones_like(gate.kept)])
        state.step += 1

    return call


def eagerly(call: Callable[[], object]) -> Callable[[], None]:
    """The same without a compiler."""

    def run() -> None:
        before = os.environ.get("LEAP_PL_COMPILE")
        os.environ["LEAP_PL_COMPILE"] = "0"
        try:
            call()
        finally:
            os.environ.pop("LEAP_PL_COMPILE")
            if before is not None:
                os.environ["LEAP_PL_COMPILE"] = before

    return run


def published(weight: Tensor, upstream: Tensor) -> Callable[[], None]:
    """The published formulation over the same weight."""
    logits = nn.Parameter(torch.randn_like(weight, dtype=torch.bfloat16) * 0.014)

    def call() -> None:
        logits.grad = None
        mask = gumbel_softmax_mask(logits, 200.0, 0.5)
        masked, kept = mask * weight, mask.sum(dtype=torch.float32)
        torch.autograd.backward([masked, kept], [upstream, torch.ones_like(kept)])

    return call


if __name__ == "__main__":
    main()
