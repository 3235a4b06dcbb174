"""What the processes of two ranks, and those of four, run, one after the other, and what they found."""

from pathlib import Path
from typing import Any

import pytest
import torch
from scaled_runs import BRIEF, Place, ddp, learn, sharded

from leap_pl import LeapModule
from leap_pl.errors import UserError

# SGD, and a clip that bites: Adam would hide a gradient that is wrong by a factor.
# Not fused: torch has no such SGD for sharded tensors, as it has of AdamW.
SGD = ["--model.optimizer=SGD", "--model.optimizer.fused=false", "--model.optimizer.lr=0.05"]


CLIP = ["--trainer.gradient_clip_val=0.02"]


VIEWS = ["--trainer.strategy=DDPStrategy", "--trainer.strategy.gradient_as_bucket_view=true"]  # as in configs/cluster


ALL_TERMS = [
    "--model.objective.distillation=0.5",
    "--model.objective.budget_scope=layer",
    "--model.activation_checkpointing=true",
    "--model.prior.method=wanda",
    "--model.prior.sequences=4",
    "--model.prior.graded=true",
]


def failure(flags: list[str]) -> str:
    """What a run that is refused says on this rank."""
    from leap_pl.cli.fit import run

    try:
        run(flags)
    except UserError as error:
        return str(error)
    return "it ran"


def gradient_storages(flags: list[str]) -> list[int]:
    """In how many places the gradient of each weight's logits was: DDP makes new buckets after the first step."""
    seen: dict[str, set[int]] = {}

    def note(module: LeapModule) -> None:
        for name, gate in module.gates.items():
            seen.setdefault(name, set()).add(gate.logits.grad.untyped_storage().data_ptr())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LeapModule, "on_after_backward", note)
        learn(flags)
    return [len(places) for places in seen.values()]


def highest(rank: int) -> list[bool]:
    """Of many sharded tensors, whether the mask of the k highest is the one of the whole tensors."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    from leap_pl.distributed.shards import strided_samples
    from leap_pl.masks.top_k import exact_top_k

    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    generator = torch.Generator().manual_seed(0)
    agree = []
    for case in range(12):
        shapes = [(7, 3), (1, 5), (2,), (4, 2, 3), (16,)]
        tensors = [torch.randn(shape, generator=generator) for shape in shapes]
        if case % 2:  # ties, on both sides of every cut between ranks
            tensors = [t.round() for t in tensors]
        parts = [distribute_tensor(t, mesh, [Shard(0)]) for t in tensors]
        for k in {0, 1, 17, 40, sum(t.numel() for t in tensors) - 1, sum(t.numel() for t in tensors)}:
            for t, part, cut, cut_of_parts in zip(
                tensors, parts, exact_top_k(tensors, k), exact_top_k(parts, k), strict=True
            ):
                mask = cut_of_parts.mask(part)
                agree.append(cut_of_parts == cut and torch.equal(mask.full_tensor(), cut.mask(t)))
                agree.append(torch.equal(cut_of_parts.mask(t), cut.mask(t)))  # as a gate does inside a block
        for stride in (1, 2, 3, 7, 100):
            samples = strided_samples(dict(enumerate(parts)), stride)
            agree += [torch.equal(samples[place], t.reshape(-1)[::stride]) for place, t in enumerate(tensors)]
    return agree


def two_ranks(rank: int, place: Place) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def fit(name: str, *more: str, model: Path | None = None) -> None:
        found[name] = learn(place.flags(name, *more, model=model))

    fit("ddp", *ddp(2))
    fit("sharded", *sharded(2))
    fit("folder", *sharded(2, folder=True))
    fit("ddp-sgd", *ddp(2)[:1], *VIEWS, *SGD, *CLIP, *BRIEF, *ALL_TERMS)
    fit("sharded-sgd", *sharded(2), *SGD, *CLIP, *BRIEF, *ALL_TERMS)
    fit("sharded-mixtral", *sharded(2), *SGD, *CLIP, *BRIEF, model=place.mixtral)
    fit("sharded-bf16", *sharded(2), *BRIEF, "--trainer.precision=bf16-true")
    fit("sharded-mixed", *sharded(2), *BRIEF, "--trainer.precision=bf16-mixed")
    fit("of-folder", *sharded(2, folder=True), f"--ckpt_path={place.checkpoint('folder', 'step=2.ckpt')}")
    fit("of-one", *sharded(2), f"--ckpt_path={place.checkpoint('one', 'step=2.ckpt')}")
    fit("ddp-of-sharded", *ddp(2), f"--ckpt_path={place.checkpoint('sharded', 'step=2.ckpt')}")
    found["buckets"] = gradient_storages(place.flags("buckets", *ddp(2)[:1], *VIEWS, *BRIEF))
    found["top-k"] = highest(rank)
    found["refused"] = {
        "tensor-parallel": failure(
            place.flags("x", *sharded(2)[:2], "--trainer.strategy.save_distributed_checkpoint=false")
        ),
        "strategy": failure(place.flags("x", "--trainer.devices=2", "--trainer.strategy=ModelParallelStrategy")),
        "accumulation": failure(
            place.flags(
                "x", *sharded(2), "--trainer.accumulate_grad_batches=1", f"--ckpt_path={place.checkpoint('one')}"
            )
        ),
        "folder": failure(place.flags("x", *ddp(2), f"--ckpt_path={place.checkpoint('folder')}")),
        "model": failure(place.flags("x", *sharded(2), f"--ckpt_path={place.checkpoint('one')}", model=place.mixtral)),
        "prior": failure(place.flags("x", *ddp(2), "--model.prior.mask=nowhere.safetensors")),
        "head": failure(place.flags("x", *sharded(2), "--model.targets=[re:lm_head]")),
    }
    return found


def four_ranks(rank: int, place: Place) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def fit(name: str, *more: str, model: Path | None = None) -> None:
        flags = place.flags(name, *sharded(4), "--trainer.accumulate_grad_batches=1", *more, model=model)
        found[name] = learn(flags)

    fit("four")
    fit("four-mixtral", *SGD, *CLIP, *BRIEF, model=place.mixtral)
    fit("four-of-folder", f"--ckpt_path={place.checkpoint('folder', 'step=2.ckpt')}")
    found["top-k"] = highest(rank)
    return found
