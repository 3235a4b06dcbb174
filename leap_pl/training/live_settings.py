"""What acts in a run, read from the objects that act, for the provenance of its mask.

What was typed is not what acts: after a resume the optimizer's groups hold the learning rate, betas and weight decay
of the checkpoint, and a scheduler its own step size. So every value here is read from the live trainer, optimizer,
scheduler and data. It is a function of the run and the step alone: a run that was stopped and resumed tells the same
as one that was not.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer

from leap_pl.distributed.strategy import data_rank

if TYPE_CHECKING:
    import lightning as L

# Of a scheduler: where it stands, not what it is; and the peak rates, which the optimizer's groups tell.
_MOVING = {"base_lrs", "last_epoch", "best", "num_bad_epochs", "cooldown_counter", "T_cur", "lr_lambdas"}


def live_settings(trainer: "L.Trainer") -> dict[str, Any]:
    """Return what acts in the run of ``trainer`` and was not set by the module: plain values.

    ===========================  ==========================================================================
    ``optimizer``                :func:`of_optimizer`
    ``lr_scheduler``             :func:`of_scheduler`
    ``gradient_clip_val``        None where gradients are not clipped; with ``gradient_clip_algorithm``
    ``precision``                of the trainer
    ``accumulate_grad_batches``  micro-batches of one rank in an optimizer step
    ``ranks``                    processes, each with micro-batches of its own
    ``steps``                    optimizer steps that are done, of ``max_steps``
    ``data``                     what the data module records of itself (``TextDataModule.record``)
    ===========================  ==========================================================================
    """
    clip = trainer.gradient_clip_val or None
    told: dict[str, Any] = {
        "precision": str(trainer.precision),
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "gradient_clip_val": clip,
        "gradient_clip_algorithm": None if clip is None else clipping_algorithm(trainer),
    }
    if trainer.state.fn == "fit":
        told |= {"steps": trainer.global_step, "ranks": data_rank(trainer)[1]}
    data = getattr(trainer, "datamodule", None)
    if data is not None and hasattr(data, "record"):
        told["data"] = data.record()
    elif data is not None:
        told["data"] = {key: getattr(data, key) for key in ("seq_length", "batch_size", "seed") if hasattr(data, key)}
    for optimizer in trainer.optimizers[:1]:
        told["optimizer"] = of_optimizer(optimizer)
    for config in trainer.lr_scheduler_configs[:1]:
        told["lr_scheduler"] = of_scheduler(config.scheduler)
    return told


def clipping_algorithm(trainer: "L.Trainer") -> str:
    """Return how ``trainer`` clips gradients: without a word Lightning clips by the norm."""
    algorithm = trainer.gradient_clip_algorithm
    return str(getattr(algorithm, "value", algorithm) or "norm")


def of_optimizer(optimizer: Optimizer) -> dict[str, Any]:
    """Return the class of ``optimizer`` and the settings of its parameter groups, ``lr`` before any schedule.

    The settings of several groups stand in a list, ``groups``.
    """
    groups = [_plain({**group, "lr": group.get("initial_lr", group["lr"])}) for group in optimizer.param_groups]
    for group in groups:
        group.pop("initial_lr", None)
    told: dict[str, Any] = {"class": type(optimizer).__name__}
    return told | (groups[0] if len(groups) == 1 else {"groups": groups})


def of_scheduler(scheduler: Any) -> dict[str, Any]:
    """Return the class of ``scheduler`` and what it goes by: its plain settings, and those of schedulers within it.

    Of a :class:`~torch.optim.lr_scheduler.LambdaLR` the functions' names, with what :func:`functools.partial` fixes.
    """
    told: dict[str, Any] = {"class": type(scheduler).__name__}
    settings = {
        key.removeprefix("_"): value
        for key, value in vars(scheduler).items()
        if key == "_milestones" or not (key.startswith("_") or key in _MOVING)
    }
    told |= _plain(settings)
    functions = getattr(scheduler, "lr_lambdas", None)
    if functions:
        told["functions"] = [_function(function) for function in functions]
    inner = getattr(scheduler, "_schedulers", None)
    if inner:
        told["schedulers"] = [of_scheduler(each) for each in inner]
    return told


def _function(function: Any) -> dict[str, Any]:
    if isinstance(function, partial):
        return {"function": getattr(function.func, "__name__", type(function.func).__name__), **function.keywords}
    return {"function": getattr(function, "__name__", type(function).__name__)}


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings among ``values`` that JSON can hold: numbers, words, and lists of them."""
    told: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Tensor) and value.numel() == 1:
            value = value.item()
        elif isinstance(value, Mapping):  # milestones, each with how often it is there
            value = sorted(value)
        if isinstance(value, list | tuple) and all(_number(item) or isinstance(item, str) for item in value):
            told[name] = list(value)
        elif isinstance(value, str) or _number(value):
            told[name] = value
    told.pop("params", None)
    told.pop("param_names", None)
    return told


def _number(value: Any) -> bool:
    return isinstance(value, bool | int | float) and math.isfinite(value)
