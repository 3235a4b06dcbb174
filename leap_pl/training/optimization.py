"""Optimizer and learning-rate schedule of a run: made from its settings, checked, and described."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from leap_pl.checkpoints.settings import Settings
from leap_pl.errors import UserError
from leap_pl.training.optimizers import check_settings
from leap_pl.training.run_settings import describe_optimizer, describe_scheduler
from leap_pl.training.schedules import warmup_cosine
from leap_pl.training.shared_steps import DIMENSIONS
from leap_pl.training.weights import WeightTraining


def groups(masks: list[nn.Parameter], weights: list[nn.Parameter], training: WeightTraining) -> list[Any]:
    """Return the parameter groups of an optimizer: ``masks`` first, then ``weights``, each unless it is empty.

    Args:
        masks: Learned parameters of masks, which have the optimizer's own settings.
        weights: Learned parameters of weights.
        training: Settings of the weights' group.
    """
    if not weights:
        return masks
    trained = {"params": weights, "lr": training.lr, "weight_decay": training.weight_decay}
    return [{"params": masks}, trained] if masks else [trained]


def step_alone(group: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """Set a parameter group of ``optimizer`` to steps that rows and columns do not take together.

    Rows and columns of logits have a density in common, and those of weights nothing.
    """
    group.update(dict.fromkeys(DIMENSIONS.keys() & optimizer.defaults.keys(), 0.0))


def make_optimizer(make: OptimizerCallable, parameters: list[Any]) -> torch.optim.Optimizer:
    """Return the optimizer of ``parameters``, or of groups of them.

    Raises:
        UserError: It refuses its settings.
    """
    try:
        optimizer = make(parameters)
        check_settings(optimizer)
        return optimizer
    except UserError:
        raise
    except (ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        if "empty parameter list" in reason:
            raise UserError(
                "there is nothing to learn: no gates are attached. A LeapModule must be the module of the trainer, "
                "whose configure_model attaches them: make a subclass of it, and do not put it into another module."
            ) from error
        raise UserError(f"model.optimizer does not take its settings: {reason}.") from error


def make_scheduler(
    make: LRSchedulerCallable | None, optimizer: torch.optim.Optimizer, warmups: Mapping[str, int], total: int
) -> Any:
    """Return the learning-rate schedule of ``optimizer``.

    Args:
        make: Function that makes it; None: a linear warmup and a cosine to 0.
        optimizer: Optimizer whose groups are in the order of ``warmups``.
        warmups: Name of the setting → steps of warmup of the default schedule, of each parameter group.
        total: Steps of the run.

    Raises:
        UserError: The learning rate that the schedule begins with is out of range; or the schedule refuses its
            settings, or needs a metric.
    """
    if make is not None:
        try:
            scheduler = make(optimizer)
        except (ValueError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"model.lr_scheduler does not take its settings: {reason}.") from error
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            raise UserError(
                "model.lr_scheduler: ReduceLROnPlateau needs a metric after every step. Give a schedule by steps."
            )
    else:
        for name, warmup in warmups.items():
            if warmup > total:
                rank_zero_warn(
                    f"{name} is {warmup} and trainer.max_steps {total}: the learning rate never reaches its "
                    f"maximum. Set --{name} to about {max(total // 10, 1)}."
                )
        factors: list[Any] = [partial(warmup_cosine, total=total, warmup=warmup) for warmup in warmups.values()]
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
    check_settings(optimizer)  # a scheduler may have changed the learning rate
    return scheduler


def describe(
    optimizer: OptimizerCallable, scheduler: LRSchedulerCallable | None, dtype: torch.dtype, groups: int = 1
) -> Settings:
    """Return the settings ``model.optimizer`` and ``model.lr_scheduler`` of a run, for its checkpoints.

    Args:
        optimizer: Function that makes the optimizer.
        scheduler: Function that makes the schedule; None: the default one.
        dtype: Data type of what is learned.
        groups: Number of parameter groups of the run's optimizer, for schedules with a function for each.

    Raises:
        UserError: The optimizer or the schedule refuses its settings.
    """
    probes: list[Any] = [nn.Parameter(torch.zeros(1, 1, dtype=dtype, device="cpu")) for _ in range(groups)]
    made = make_optimizer(optimizer, probes if groups == 1 else [{"params": [probe]} for probe in probes])
    found: Settings = {"model.optimizer": describe_optimizer(made, getattr(optimizer, "keywords", {}))}
    found["model.lr_scheduler"] = None
    if scheduler is not None:
        given = getattr(scheduler, "keywords", {})
        found["model.lr_scheduler"] = describe_scheduler(make_scheduler(scheduler, made, {}, 1), given)
    return found
