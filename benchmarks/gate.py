"""Time of one gate: its forward and backward pass over one weight, in nanoseconds a weight.

python -m benchmarks.gate [--shapes 576x576 1536x576] [--gates BernoulliGate] [--together 7] [--output F.json]

compiled    the gate as it runs
eager       the same lines without a compiler
published   the mask as its paper's formulas say it, materialised: for BernoulliGate that of benchmarks/published.py,
            for NMGate that of benchmarks/published_nm.py

``--together 7`` passes the gates of a block of seven such weights, as in a decoder block; times are for one weight.
On small weights, as ``--shapes 8x64``, they are the cost of Python and launches. Times are medians, with the fastest
turn beside them, which other work on the machine disturbs least.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.published import gumbel_softmax_mask
from benchmarks.published_nm import PublishedNM
from benchmarks.report import Row, finish, interleaved
from leap_pl import gates as kinds
from leap_pl.base_model.weights import Weight
from leap_pl.callbacks.allocator import keep_freed_memory
from leap_pl.gates import Gate, GateState, attach
from leap_pl.kernels.compiled import compile_seconds


def main(arguments: list[str] | None = None) -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["192x576", "576x576", "1536x576", "576x1536", "2048x2048"])
    parser.add_argument("--gates", nargs="+", default=["BernoulliGate"])
    parser.add_argument("--together", type=int, default=1, help="weights of a block, whose gates pass together")
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
            calls[f"{gate}, compiled"] = passes(getattr(kinds, gate), weight, upstream, args.together)
            calls[f"{gate}, eager"] = eagerly(calls[f"{gate}, compiled"])
            if gate == "BernoulliGate":
                calls[f"{gate}, published"] = published(weight, upstream)
            if gate == "NMGate":
                calls[f"{gate}, published"] = passes(PublishedNM, weight, upstream)
        clock = time.process_time if args.clock == "cpu" else time.perf_counter
        for name, seconds in interleaved(calls, args.repeats, device, warm_up=2, clock=clock).items():
            count = 1 if "published" in name else args.together
            one, fastest = statistics.median(seconds) / count, min(seconds) / count
            row: Row = {"variant": name, "shape": shape, "ns_a_weight": one / weight.numel() * 1e9}
            rows.append(row | {"ms": one * 1e3, "fastest_ms": fastest * 1e3})
    finish(rows, args.output, dtype=args.dtype, clock=args.clock, compile_seconds=compile_seconds())


class Block(nn.Module):
    """Some weights that are used in one call, as those of a decoder block."""

    def __init__(self, weight: Tensor, count: int) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Module() for _ in range(count))
        for linear in self.linears:
            linear.weight = nn.Parameter(weight.clone(), requires_grad=False)

    def forward(self) -> list[Tensor]:
        return [linear.weight for linear in self.linears]  # type: ignore[misc]


class Upstream(torch.autograd.Function):
    """Function of tensors that gives them the gradients it is told, as the layers and the loss do in a step.

    ``torch.autograd.backward`` with gradients checks each of them in Python, which a step does not.
    """

    @staticmethod
    def forward(ctx: Any, grads: list[Tensor], *tensors: Tensor) -> Tensor:
        ctx.grads = grads
        return tensors[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Any:
        return None, *ctx.grads


def passes(kind: type[Gate], weight: Tensor, upstream: Tensor, count: int = 1) -> Callable[[], None]:
    """Forward and backward of the gates over ``count`` weights like ``weight``."""
    block, state = Block(weight, count), GateState()
    state.anneal(200.0, 0.5)
    weights = {f"w{i}": Weight(f"w{i}", each, "weight", 0, f"w{i}", 1, block) for i, each in enumerate(block.linears)}
    gates = attach(weights, kind, state)
    for gate in gates.values():
        gate.start_from(None, 0)
    logits = list(gates.learned().values())  # a tile gate has further ones, of the patterns in its tiles
    grads = [upstream] * count + [torch.ones((), device=weight.device)] * count

    def call() -> None:
        for each in logits:
            each.grad = None
        masked = block()
        Upstream.apply(grads, *masked, *gates.kept.values()).backward()
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
