"""Effective settings of a run, read from its live objects, for the provenance of its mask.

Effective settings can differ from the given ones: after a resume the optimizer's groups hold the learning rate, betas
and weight decay of the checkpoint, and a scheduler its own step size. So every value here is read from the live
trainer, optimizer, scheduler and data. The values depend only on the run and the step: they are the same for a resumed
run and for one that was never interrupted.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer

from leap_pl.distributed.strategy import data_rank
from leap_pl.inputs.plain_values import plain

if TYPE_CHECKING:
    import lightning as L

# Attributes of a scheduler that are its progress and not settings; and the peak rates, which are in the optimizer's
# groups.
_MOVING = {"base_lrs", "last_epoch", "best", "num_bad_epochs", "cooldown_counter", "T_cur", "lr_lambdas"}


def live_settings(trainer: "L.Trainer") -> dict[str, Any]:
    """Return, as plain values, the effective settings of the run of ``trainer`` that the module does not set.

    ===========================  ==========================================================================
    ``optimizer``                :func:`of_optimizer`
    ``lr_scheduler``             :func:`of_scheduler`
    ``gradient_clip_val``        None where gradients are not clipped; with ``gradient_clip_algorithm``
    ``precision``                precision of the trainer
    ``accumulate_grad_batches``  micro-batches of each rank in an optimizer step
    ``ranks``                    number of processes with different micro-batches
    ``steps``                    completed optimizer steps, of ``max_steps``
    ``data``                     record of the data module (``TextDataModule.record``)
    ===========================  ==========================================================================
    """
    clip = trainer.gradient_clip_val or None
    settings: dict[str, Any] = {
        "precision": str(trainer.precision),
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "gradient_clip_val": clip,
        "gradient_clip_algorithm": None if clip is None else clipping_algorithm(trainer),
    }
    if trainer.state.fn == "fit":
        settings |= {"steps": trainer.global_step, "ranks": data_rank(trainer)[1]}
    data = getattr(trainer, "datamodule", None)
    if data is not None and hasattr(data, "record"):
        settings["data"] = data.record()
    elif data is not None:
        found = {name: plain(getattr(data, name, None)) for name in ("seq_length", "batch_size", "seed")}
        settings["data"] = {name: int(value) for name, value in found.items() if _is_whole(value)}
    for optimizer in trainer.optimizers[:1]:
        settings["optimizer"] = of_optimizer(optimizer)
    for config in trainer.lr_scheduler_configs[:1]:
        settings["lr_scheduler"] = of_scheduler(config.scheduler)
    return settings


def _is_whole(value: Any) -> bool:
    """Return whether ``value`` is a number that a mask's record can have, where a data module is of any class."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0 and value == int(value)


def clipping_algorithm(trainer: "L.Trainer") -> str:
    """Return the algorithm by which ``trainer`` clips gradients; Lightning's default is the norm."""
    algorithm = trainer.gradient_clip_algorithm
    return str(getattr(algorithm, "value", algorithm) or "norm")


def of_optimizer(optimizer: Optimizer) -> dict[str, Any]:
    """Return the class of ``optimizer`` and the settings of its parameter groups, ``lr`` before any schedule.

    The settings of several groups are a list under ``groups``.
    """
    groups = [_plain({**group, "lr": group.get("initial_lr", group["lr"])}) for group in optimizer.param_groups]
    for group in groups:
        group.pop("initial_lr", None)
    settings = groups[0] if len(groups) == 1 else {"groups": groups}
    return {"class": type(optimizer).__name__, **settings}


def of_scheduler(scheduler: Any) -> dict[str, Any]:
    """Return the class of ``scheduler``, its plain settings, and those of the schedulers that it contains.

    For a :class:`~torch.optim.lr_scheduler.LambdaLR`, ``functions`` are the names of its functions, with the arguments
    that :func:`functools.partial` fixes.
    """
    plain = {
        key.removeprefix("_"): value
        for key, value in vars(scheduler).items()
        if key == "_milestones" or not (key.startswith("_") or key in _MOVING)
    }
    settings = {"class": type(scheduler).__name__, **_plain(plain)}
    functions = getattr(scheduler, "lr_lambdas", None)
    if functions:
        settings["functions"] = [_function(function) for function in functions]
    inner = getattr(scheduler, "_schedulers", None)
    if inner:
        settings["schedulers"] = [of_scheduler(each) for each in inner]
    return settings


def _function(function: Any) -> dict[str, Any]:
    if isinstance(function, partial):
        return {"function": getattr(function.func, "__name__", type(function.func).__name__), **function.keywords}
    return {"function": getattr(function, "__name__", type(function).__name__)}


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings among ``values`` that JSON can hold: numbers, strings, and lists of them."""
    plain: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Tensor) and value.numel() == 1:
            value = value.item()
        elif isinstance(value, Mapping):  # a Counter of milestones
            value = sorted(value)
        if isinstance(value, list | tuple) and all(_is_number(item) or isinstance(item, str) for item in value):
            plain[name] = list(value)
        elif isinstance(value, str) or _is_number(value):
            plain[name] = value
    plain.pop("params", None)
    plain.pop("param_names", None)
    return plain


def _is_number(value: Any) -> bool:
    return isinstance(value, bool | int | float) and math.isfinite(value)
