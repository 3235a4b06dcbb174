"""Checkpoints as earlier versions wrote them, whose settings stood among hyper-parameters."""

from pathlib import Path

import torch

_SETTINGS = (
    *("base_model", "sparsity", "targets", "ignore", "objective", "prior", "warmup_steps", "dtype", "revision"),
    *("logits_dtype", "activation_checkpointing", "seed"),
)


def write_as_older(path: Path, target: Path, *, schedules: bool = True) -> Path:
    """Write the checkpoint ``path`` to ``target`` in that form.

    Without ``schedules``: as it was where the callback that moved α and τ had been left out.
    """
    checkpoint = torch.load(path, weights_only=True)
    stored = checkpoint["leap_pl"].pop("learned_with")
    plain = {name: stored[f"model.{name}"] for name in _SETTINGS}
    checkpoint["hyper_parameters"] = {**plain, "trust_remote_code": False}
    if not schedules:
        del checkpoint["leap_pl"]["settings"]["annealing"]
    target.parent.mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint, target)
    return target
