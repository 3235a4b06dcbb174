"""One training step: dense fine-tuning, leap_pl, and the published formulation of the same mask.

python -m benchmarks.step --model M [--tokens 512 2048 8192] [--layers 30] [--output F.json]

The three share model, tokens, dtype, loss function, optimizer and clipping, and take turns in one process, each
step over one micro-batch of ``--tokens`` tokens in sequences of at most ``--seq_length``:

dense       the same weights are trained themselves
leap_pl     they are frozen, and the logits of their gates are trained
published   likewise, the mask made as in benchmarks/published.py, or benchmarks/published_nm.py for NMGate

``--layers`` gates and trains only so many decoder blocks of the model (the others are taken out), which shows
how the cost grows with the number of weights. ``--clock cpu`` counts the seconds that the process computed instead
of those that passed: with ``OMP_NUM_THREADS=1``, for a machine that others use too. Ratios are medians of the
ratios within one turn.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.published import PublishedMasks
from benchmarks.published_nm import PublishedNM
from benchmarks.report import Row, finish, interleaved, ratio
from leap_pl import gates as kinds
from leap_pl.allocator import keep_freed_memory
from leap_pl.gates import Gate, GateState, attach
from leap_pl.gates.compiled import compile_seconds
from leap_pl.models import decoder_blocks, fast_dtype, find_weights, load_model
from leap_pl.objective import Objective, kept_norm, language_losses, sparsity_budget, split_model
from leap_pl.optimizer import PackedAdamW

OBJECTIVE = Objective()
ALPHA, TAU = 200.0, 0.5


def main(arguments: list[str] | None = None) -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokens", nargs="+", type=int, default=[512, 2048, 8192])
    parser.add_argument("--seq_length", type=int, default=512)
    parser.add_argument("--layers", nargs="+", type=int, default=[0], help="decoder blocks; 0: all of them")
    parser.add_argument("--variants", nargs="+", default=["dense", "leap_pl", "published"])
    parser.add_argument("--gate", default="BernoulliGate", help="kind of gate of leap_pl")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float32"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"])
    parser.add_argument("--output")
    args = parser.parse_args(arguments)

    keep_freed_memory()  # as a run of leap_pl does; all variants gain by it
    device = torch.device(args.device)
    dtype = fast_dtype(device) if args.dtype == "auto" else args.dtype
    whole, kind = load_model(args.model, dtype=dtype, dropout=False), getattr(kinds, args.gate)
    rows: list[Row] = []
    ratios: list[Row] = []
    for layers in args.layers:
        model = first_blocks(whole, layers).to(device)
        makers = {"dense": dense_step, "leap_pl": lambda m: leap_step(m, kind), "published": published_step}
        makers["low_memory"] = lambda m: leap_step(m, kind, low_memory=True)
        if args.gate == "NMGate":
            makers["published"] = lambda m: leap_step(m, PublishedNM)
        steps = {name: makers[name](copy.deepcopy(model)) for name in args.variants}
        gated = sum(weight.parameter.numel() for weight in find_weights(model).values())
        for tokens in args.tokens:
            length = min(tokens, args.seq_length)
            ids_BL = torch.randint(0, model.config.vocab_size, (tokens // length, length), device=device)
            calls = {name: lambda step=step, ids=ids_BL: step(ids) for name, step in steps.items()}
            clock = time.process_time if args.clock == "cpu" else time.perf_counter
            seconds = interleaved(calls, args.repeats, device, clock=clock)
            for name, found in seconds.items():
                rows.append(
                    {
                        "variant": name,
                        "tokens": tokens,
                        "gated_weights": gated,
                        "seconds_median": statistics.median(found),
                        "seconds_min": min(found),
                        "tokens_per_second": tokens / statistics.median(found),
                    }
                )
            for above, below in (("leap_pl", "dense"), ("published", "leap_pl"), ("low_memory", "leap_pl")):
                if {above, below} <= set(seconds):
                    value = ratio(seconds, above, below)
                    ratios.append({"ratio": f"{above}/{below}", "tokens": tokens, "gated_weights": gated, "of": value})
                    print(f"{above}/{below} at {tokens} tokens, {gated / 1e6:.0f}M weights: {value:.3f}", flush=True)
    finish(
        rows,
        args.output,
        ratios=ratios,
        model=args.model,
        dtype=dtype,
        gate=args.gate,
        clock=args.clock,
        compile_seconds=compile_seconds(),
    )


def first_blocks(whole: Any, layers: int) -> Any:
    """A copy of the model with only its first decoder blocks; all of them for 0."""
    model = copy.deepcopy(whole)
    _, blocks = decoder_blocks(model)
    assert isinstance(blocks, nn.ModuleList)
    if layers:
        del blocks[layers:]
        model.config.num_hidden_layers = len(blocks)
    return model


def _optimizer(parameters: list[Any], *, packed: bool = False) -> Callable[[], None]:
    """Clip, step and drop the gradients, as a run of leap_pl does."""
    optimizer: torch.optim.Optimizer
    if packed:
        optimizer = PackedAdamW(parameters, lr=1e-5)
    else:
        optimizer = torch.optim.AdamW(parameters, lr=1e-5, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _language_loss(model: Any) -> Callable[[Tensor], Tensor]:
    states, head = split_model(model)

    def loss(ids_BL: Tensor) -> Tensor:
        hidden = states(ids_BL)[:, :-1].flatten(0, 1)
        return language_losses(hidden, ids_BL[:, 1:].reshape(-1), head, OBJECTIVE)[0]

    return loss


def dense_step(model: Any) -> Callable[[Tensor], None]:
    """Fine-tuning of the weights that the others gate."""
    weights = find_weights(model)
    loss = _language_loss(model.train())
    model.requires_grad_(False)
    parameters = [weight.parameter.requires_grad_(True) for weight in weights.values()]
    update = _optimizer(parameters)

    def step(ids_BL: Tensor) -> None:
        loss(ids_BL).backward()
        update()

    return step


def leap_step(
    model: Any, kind: type[Gate] = kinds.BernoulliGate, *, low_memory: bool = False
) -> Callable[[Tensor], None]:
    """A step of leap_pl, its objective whole, without Lightning; ``low_memory`` as configs/low_memory.yaml has it."""
    weights = find_weights(model)
    sizes = {name: weight.parameter.numel() for name, weight in weights.items()}
    norm = sum(float(weight.parameter.float().norm()) for weight in weights.values())
    loss = _language_loss(model.train())
    model.requires_grad_(False)
    state = GateState()
    state.anneal(ALPHA, TAU)
    gates = attach(weights, kind, state, torch.bfloat16 if low_memory else torch.float32)
    for each in gates.values():
        each.start_from(None, 0)
    update = _optimizer([each.logits for each in gates.values()], packed=low_memory)

    def step(ids_BL: Tensor) -> None:
        language = loss(ids_BL)
        kept = {name: each.kept for name, each in gates.items() if each.kept is not None}
        budget = sparsity_budget(kept, sizes, 0.5, [list(sizes)])
        size = kept_norm((each.energy for each in gates.values()), norm)
        (language + OBJECTIVE.budget * budget - OBJECTIVE.weight * size).backward()
        update()
        state.step += 1

    return step


def published_step(model: Any) -> Callable[[Tensor], None]:
    """The same with the mask as published."""
    weights = find_weights(model)
    norm = sum(float(weight.parameter.float().norm()) for weight in weights.values())
    loss = _language_loss(model.train())
    model.requires_grad_(False)
    masks = PublishedMasks(weights)
    update = _optimizer(list(masks.logits.values()))

    def step(ids_BL: Tensor) -> None:
        density, size = masks.sample(ALPHA, TAU)
        budget = (density - 0.5).abs()
        (loss(ids_BL) + OBJECTIVE.budget * budget - OBJECTIVE.weight * size / norm).backward()
        update()

    return step


if __name__ == "__main__":
    main()
