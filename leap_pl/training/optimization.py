"""Optimizer and learning-rate schedule of a run: made from its settings, checked, and described."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from leap_pl.checkpoints.settings import Settings
from leap_pl.errors import UserError, listing, one_line
from leap_pl.inputs.register import current, is_typed
from leap_pl.training.optimizers import PackedAdamW, check_settings
from leap_pl.training.run_settings import describe_optimizer, describe_scheduler
from leap_pl.training.schedules import warmup_cosine
from leap_pl.training.shared_steps import DIMENSIONS
from leap_pl.training.weights import WeightTraining

RATE = 1e-3  # of logits, which a module that is made of a checkpoint names


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


def warn_of_unused_rate(make: OptimizerCallable, optimizer: torch.optim.Optimizer, training: WeightTraining) -> None:
    """Warn if an optimizer of weights alone, made without a command line, was given a rate, which is that of logits."""
    own = optimizer.defaults.get("lr")
    if current() is None and make is not usual_optimizer and own not in (None, training.lr, RATE):
        rank_zero_warn(
            f"not used: the optimizer's lr {own}, which is the rate of a mask, and this one stays as it is. Weights "
            f"are trained at {training.lr:g}: for another rate give weight_training=WeightTraining(lr=...)."
        )


def step_alone(group: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """Set a parameter group of ``optimizer`` to steps that rows and columns do not take together.

    Rows and columns of logits have a density in common, and those of weights nothing.
    """
    group.update(dict.fromkeys(DIMENSIONS.keys() & optimizer.defaults.keys(), 0.0))


def usual_optimizer(parameters: Any) -> torch.optim.Optimizer:
    """Return the optimizer of a module whose settings name none."""
    return torch.optim.AdamW(parameters, lr=RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


def make_optimizer(make: OptimizerCallable, parameters: list[Any]) -> torch.optim.Optimizer:
    """Return the optimizer of ``parameters``, or of groups of them.

    Raises:
        UserError: It refuses its settings.
    """
    try:
        optimizer = make(parameters)
        check_settings(optimizer)
        return optimizer
    except (UserError, torch.OutOfMemoryError):
        raise
    except (ValueError, TypeError, RuntimeError) as error:  # the last for settings that exclude each other
        reason = one_line(error)
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
        rates = [group["lr"] for group in optimizer.param_groups]
        try:
            scheduler = make(optimizer)
        except (ValueError, TypeError, RuntimeError) as error:
            reason = one_line(error)
            raise UserError(f"model.lr_scheduler does not take its settings: {reason}.") from error
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            raise UserError(
                "model.lr_scheduler: ReduceLROnPlateau needs a metric after every step. Give a schedule by steps."
            )
        if warmups:  # else it is made to be described, of groups that have other rates
            _warn_of_own_rate(scheduler, rates)
        _check_length(scheduler, total)
        _warn_of_length(scheduler, warmups, total)
        first = {group.get("initial_lr") for group in optimizer.param_groups}
        if len({*rates}) > 1 and len(first) == 1:
            raise UserError(
                f"model.lr_scheduler: {type(scheduler).__name__} would give weights the learning rate of the mask, and "
                "they have one of their own. Give it a rate for each, as a list of two, or a schedule of factors."
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


def check_moments(make: LRSchedulerCallable | None, optimizer: torch.optim.Optimizer) -> None:
    """Check that the schedule of a fit leaves the decay rates of ``optimizer`` as they are, if its states need that.

    Raises:
        UserError: It does not.
    """
    if make is None or not isinstance(optimizer, PackedAdamW):
        return
    try:
        scheduler = make(optimizer)
    except (ValueError, TypeError):  # make_scheduler says what is wrong
        return
    if getattr(scheduler, "cycle_momentum", False):
        raise UserError(
            f"model.lr_scheduler: {type(scheduler).__name__} changes β₁ with the learning rate, and PackedAdamW "
            "stores moments that are of one β₁. Set --model.lr_scheduler.cycle_momentum false; a run that began "
            "without it cannot be resumed."
        )


def check_steps(optimizer: torch.optim.Optimizer) -> None:
    """Check that ``optimizer``, of probes, can take a step with dense gradients, before a model is loaded for it.

    Raises:
        UserError: It cannot, as one for sparse gradients.
    """
    for group in optimizer.param_groups:
        for probe in group["params"]:
            probe.grad = torch.zeros_like(probe)
    try:
        optimizer.step(lambda: torch.zeros((), device="cpu"))  # type: ignore[arg-type, return-value]
    except RuntimeError as error:
        raise UserError(
            f"model.optimizer: {type(optimizer).__name__} cannot learn masks or weights: "
            f"{one_line(error, 200).rstrip('.')}. Give another, such as AdamW."
        ) from error


def _warn_of_own_rate(scheduler: Any, rates: list[float]) -> None:
    """Warn of a schedule, such as OneCycleLR, whose highest rate is its own and not that of the optimizer."""
    groups = scheduler.optimizer.param_groups
    peaks = getattr(scheduler, "max_lrs", None) or [
        group.get("max_lr", rate) for group, rate in zip(groups, rates, strict=True)
    ]
    for peak, rate in zip(peaks, rates, strict=True):
        if not math.isclose(peak, rate):
            rank_zero_warn(
                f"model.lr_scheduler: {type(scheduler).__name__} sets its own learning rates, up to {peak:g}, and the "
                f"given {rate:g} is not used. Set its max_lr to what is meant."
            )


def _check_length(scheduler: Any, total: int) -> None:
    """Check that ``scheduler`` can take the ``total`` steps of the run.

    Raises:
        UserError: It cannot.
    """
    if isinstance(scheduler, torch.optim.lr_scheduler.OneCycleLR) and scheduler.total_steps < total:
        raise UserError(
            f"model.lr_scheduler: OneCycleLR takes {scheduler.total_steps} steps, and trainer.max_steps is {total}. "
            f"Set --model.lr_scheduler.total_steps {total}."
        )


def _warn_of_length(scheduler: Any, warmups: Mapping[str, int], total: int) -> None:
    """Warn if ``scheduler`` is made for another number of steps than the run's, or a warmup is typed for nothing."""
    steps = getattr(scheduler, "T_max", total)
    if warmups and steps != total:
        name = type(scheduler).__name__
        rank_zero_warn(
            f"model.lr_scheduler: {name} is made for T_max {steps} steps, and trainer.max_steps is {total}. For a "
            f"curve of the whole run, set --model.lr_scheduler.T_max {total}."
        )
    idle = [name for name in warmups if is_typed(name)]
    if idle:
        rank_zero_warn(f"not used, since model.lr_scheduler has its own curve: {listing(idle)}.")


def describe(
    optimizer: OptimizerCallable,
    scheduler: LRSchedulerCallable | None,
    dtype: torch.dtype,
    groups: int = 1,
    total: int = 1,
) -> Settings:
    """Return the settings ``model.optimizer`` and ``model.lr_scheduler`` of a run, for its checkpoints.

    Args:
        optimizer: Function that makes the optimizer.
        scheduler: Function that makes the schedule; None: the default one.
        dtype: Data type of what is learned.
        groups: Number of parameter groups of the run's optimizer, for schedules with a function for each.
        total: Steps of the run.

    Raises:
        UserError: The optimizer or the schedule refuses its settings.
    """
    probes: list[Any] = [nn.Parameter(torch.zeros(1, 1, dtype=dtype, device="cpu")) for _ in range(groups)]
    made = make_optimizer(optimizer, probes if groups == 1 else [{"params": [probe]} for probe in probes])
    found: Settings = {"model.optimizer": describe_optimizer(made, getattr(optimizer, "keywords", {}))}
    found["model.lr_scheduler"] = None
    if scheduler is not None:
        given = getattr(scheduler, "keywords", {})
        found["model.lr_scheduler"] = describe_scheduler(make_scheduler(scheduler, made, {}, total), given)
    return found
