"""Bytes that the ranks of a sharded run hold, measured: processes on this machine, gloo between them.

python -m benchmarks.sharded_memory [--ranks 1 2 4] [--train mask] [--whole] [--output F.json]

Models of random weights in bfloat16 take two steps, as leap_pl takes them, and what a process has in memory of its own
is read from the kernel: after the first step, and at the peak of the second. Two widths tell what grows with the
weights from what does not. What one block keeps for its backward pass is counted tensor by tensor.
"""

import argparse
import ctypes
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.report import Row, finish
from leap_pl.base_model.backbone import checkpoint_activations, split_model
from leap_pl.base_model.weights import decoder_blocks, find_weights
from leap_pl.distributed.strategy import shard
from leap_pl.gates import BernoulliGate, FixedGate, Gates, GateState, attach
from leap_pl.losses.budget import kept_norm, sparsity_budget
from leap_pl.losses.language import language_losses
from leap_pl.losses.objective import Objective
from leap_pl.training.optimizers import PackedAdamW
from leap_pl.training.weights import CompactMaster, Master, WeightTraining

TRAIN = ("mask", "weights", "compact", "both")
LAYERS = 8
TOKENS = 16
M_MMAP_THRESHOLD = -3


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--output")
    parser.add_argument("--low_memory", action="store_true", help="bfloat16 logits and PackedAdamW; one rank")
    parser.add_argument(
        "--train",
        choices=TRAIN,
        default="mask",
        help="the mask, the weights of a fixed one of half the weights (compact: those alone), or both",
    )
    parser.add_argument("--whole", action="store_true", help="without activation checkpointing")
    parser.add_argument("--child", nargs=2, type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.child:
        print(json.dumps(child(*args.child, low_memory=args.low_memory, train=args.train, whole=args.whole)))
        return
    rows: list[Row] = []
    for ranks in args.ranks:
        flags = ["--train", args.train, *(f"--{name}" for name in ("low_memory", "whole") if getattr(args, name))]
        narrow, wide = (_launch(ranks, LAYERS, width, flags) for width in (512, 1024))
        weights = wide["gated"] - narrow["gated"]
        held, peak = ((wide[moment] - narrow[moment]) / weights for moment in ("held", "peak"))
        row: Row = {"ranks": ranks, "held, bytes a weight": held}
        row["at the peak besides, bytes a weight of a block"] = (peak - held) * LAYERS
        rows.append(row)
        print(rows[-1], flush=True)
    finish(rows, args.output, bytes_kept_a_token=kept_bytes())


def _launch(ranks: int, layers: int, width: int, flags: Sequence[str]) -> dict[str, float]:
    """The largest of each figure over ``ranks`` processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "benchmarks.sharded_memory", "--child", str(layers), str(width), *flags]
    base = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    processes = [
        subprocess.Popen(command, env={**base, "RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in range(ranks)
    ]
    told = [json.loads(process.communicate()[0].splitlines()[-1]) for process in processes]
    return {key: max(rank[key] for rank in told) for key in told[0]}


def model_of(layers: int, width: int) -> Any:
    """Random weights in bfloat16; a block has 16·width² gated ones."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(torch.bfloat16)


def child(
    layers: int, width: int, *, low_memory: bool = False, train: str = "mask", whole: bool = False
) -> dict[str, float]:
    """Two steps of one rank, in bytes."""
    torch.set_num_threads(1)
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)  # what is freed goes back to the system at once
    dist.init_process_group("gloo")
    before = _own_bytes("RssAnon")
    options: dict[str, Any] = {"low_memory": low_memory, "train": train, "whole": whole}
    step, gated = make_step(model_of(layers, width), sharded=dist.get_world_size() > 1, **options)
    ids_BL = torch.randint(0, 64, (1, TOKENS))
    step(ids_BL)
    held = _own_bytes("RssAnon")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    step(ids_BL)
    peak = _own_bytes("VmHWM") - _own_bytes("RssFile") - _own_bytes("RssShmem")
    return {"gated": gated, "held": held - before, "peak": peak - before}


def _own_bytes(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def make_step(
    model: Any, *, sharded: bool, low_memory: bool = False, train: str = "mask", whole: bool = False
) -> tuple[Any, int]:
    """A step as a run of leap_pl takes it, and the number of gated weights; ``whole``: no block is recomputed."""
    weights = find_weights(model)
    sizes = {name: weight.parameter.numel() for name, weight in weights.items()}
    norm = sum(float(weight.parameter.detach().float().norm()) for weight in weights.values())
    state, objective, gates, fixed = GateState(), Objective(), Gates[Any]({}), train in ("weights", "compact")
    model.requires_grad_(False)

    def prepare(index: int, _: nn.Module) -> None:
        nonlocal gates
        inside = {name: weight for name, weight in weights.items() if weight.layer == index}
        dtype = torch.bfloat16 if low_memory else torch.float32
        attached = attach(inside, FixedGate if fixed else BernoulliGate, state, dtype)
        for name, gate in attached.items():
            weight = inside[name]
            gate.start_from(weight.parameter > 0 if fixed else None, 0)
            if train != "mask":
                kind = CompactMaster if train == "compact" else Master
                gate.trained = kind(weight, WeightTraining(), 0, partial(gate.held, "bits") if fixed else None)
                gate.trained.store_as(dtype)
        gates |= attached

    blocks = decoder_blocks(model)[1]
    if sharded:
        shard(model, blocks, dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),)), prepare)
    else:
        for index, block in enumerate(blocks):
            prepare(index, block)
    with state.passing("dense"):
        states, head = split_model(model)
    if not whole:
        checkpoint_activations(model)
    model.train()
    learned = list(gates.learned().values())
    optimizer = PackedAdamW(learned) if low_memory else torch.optim.AdamW(learned, fused=True)

    def step(ids_BL: Tensor) -> None:
        hidden = states(ids_BL)[:, :-1].flatten(0, 1)
        loss = language_losses(hidden, ids_BL[:, 1:].reshape(-1), head, objective)[0]
        loss = loss + sparsity_budget(gates.kept, sizes, 0.5, [list(gates)])
        loss = loss - kept_norm(gates.energy.values(), norm)
        loss.backward()
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        # The gradients stay, as when micro-batches are accumulated.

    return step, sum(sizes.values())


def kept_bytes() -> dict[str, float]:
    """Bytes a token that one block keeps for its backward pass, for each of its hidden and intermediate features."""
    widths = [(256, 512), (256, 1024), (512, 1024)]
    (a, b, c) = (_kept(hidden, intermediate) for hidden, intermediate in widths)
    intermediate = (b - a) / 512
    return {"hidden": (c - b) / 256, "intermediate": intermediate}


def _kept(hidden: int, intermediate: int) -> float:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=2,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
    )
    found = {}
    for layers in (1, 2):
        config.num_hidden_layers = layers
        model = LlamaForCausalLM(config).to(torch.bfloat16).requires_grad_(False)
        for weight in find_weights(model).values():  # a masked weight has a gradient: its layer keeps its input
            weight.parameter.requires_grad_(True)
        parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        seen: dict[int, int] = {}

        def pack(tensor: Tensor, seen: dict[int, int], parameters: set[int]) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        keep = partial(pack, seen=seen, parameters=parameters)
        ids_BL = torch.zeros(1, 64, dtype=torch.int64)
        states = model.get_input_embeddings()(ids_BL).detach().requires_grad_(True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = model(inputs_embeds=states, use_cache=False).logits
        found[layers] = sum(seen.values()) / ids_BL.numel()
        del out
    return found[2] - found[1]


if __name__ == "__main__":
    main()
