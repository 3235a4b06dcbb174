"""Checks of the trainer of a run before anything is loaded: what Lightning accepts, and a run cannot have."""

from string import Formatter
from typing import TYPE_CHECKING

from leap_pl.errors import UserError, listing
from leap_pl.inputs.ranges import check_numbers

if TYPE_CHECKING:
    from lightning import Callback, Trainer

# Lightning's callbacks that would change the weights, the length of a run or its settings → what to do instead.
UNSUITABLE = {
    "BatchSizeFinder": "Set --data.batch_size",
    "LearningRateFinder": "Set --model.optimizer.lr",
    "GradientAccumulationScheduler": "Set --trainer.accumulate_grad_batches",
    "ModelPruning": "leap_pl prunes already",
    "StochasticWeightAveraging": "Leave it out",
    "WeightAveraging": "Leave it out",
    "EMAWeightAveraging": "Leave it out",
}

FINDERS = {"BatchSizeFinder", "LearningRateFinder"}

# Lightning's plugins of precision that replace the linear layers, and with them their gates.
REPLACING = {"TransformerEnginePrecision", "BitsandbytesPrecision"}

# Precisions of the trainer for which Lightning converts the whole model → the data type that it then has.
CONVERTING = {"bf16-true": "bfloat16", "16-true": "float16", "64-true": "float64"}

METRICS = ["loss", "perplexity/hard", "perplexity/dense", "step", "epoch"]  # that a callback of Lightning can monitor

NUMBERS = ("gradient_clip_val", "val_check_interval", "accumulate_grad_batches", "log_every_n_steps")


def check_trainer(trainer: "Trainer", module: type | None = None) -> None:
    """Check that ``trainer``, of the command line or made in Python, can run a fit of a module of this class.

    Raises:
        UserError: A number is out of range; or a callback, a plugin or the way in which processes are started does not
            suit a run.
    """
    numbers = {name: getattr(trainer, name, None) for name in NUMBERS}
    if trainer.barebones:  # it never logs
        del numbers["log_every_n_steps"]
    check_numbers(numbers, "trainer.")
    _check_callbacks(trainer.callbacks, module)  # type: ignore[attr-defined]
    plugin = type(trainer.precision_plugin).__name__
    if plugin in REPLACING:
        raise UserError(
            f"trainer.precision: {plugin} replaces the linear layers, which have the gates. Set --trainer.precision "
            "bf16-true or 32-true."
        )
    if type(trainer.strategy.launcher).__name__ == "_MultiProcessingLauncher":
        raise UserError(
            f"trainer.strategy: {type(trainer.strategy).__name__} by fork or spawn learns in copies of this process, "
            "which end with what they have learned. Use one device here, or start a script, or leap_pl fit, with ddp."
        )


def check_float16(trainer: "Trainer", dtype: str) -> None:
    """Check that the gradients of a model of ``dtype`` that is converted as ``trainer`` says are not rounded to 0.

    Raises:
        UserError: They are float16, and the loss is not scaled.
    """
    precision = str(trainer.precision)
    if CONVERTING.get(precision, dtype) == "float16" and precision != "16-mixed":
        where = "trainer.precision is 16-true" if precision == "16-true" else "model.dtype is float16"
        raise UserError(
            f"{where}: the loss is not scaled, and float16 rounds most gradients to 0. Start a new run with "
            "--model.dtype bfloat16 or float32, or on a GPU with --trainer.precision 16-mixed, which scales it."
        )


def check_unused(trainer: "Trainer", *, at_start: bool) -> None:
    """Check that a fit that does not resume begins with a new trainer and a new module.

    Args:
        trainer: Trainer of the fit.
        at_start: Whether the module is where a fit begins: at its prior, which a validation alone does not make.

    Raises:
        UserError: One of them has been used.
    """
    if trainer.global_step > 0:
        raise UserError(
            f"this trainer is at step {trainer.global_step} of an earlier fit, whose text, schedules and optimizer are "
            "not continued. Make a new Trainer, or resume with trainer.fit(..., ckpt_path=CHECKPOINT)."
        )
    if not at_start:
        raise UserError(
            "this module was validated, fitted or loaded before, and a fit begins at the prior. Make a new LeapModule, "
            "or resume with trainer.fit(..., ckpt_path=CHECKPOINT)."
        )


def _check_callbacks(callbacks: list["Callback"], module: type | None) -> None:
    """Refuse callbacks of Lightning that a run cannot have, or that monitor what is not measured.

    Raises:
        UserError: One does.
    """
    kinds = [type(callback) for callback in callbacks] + [module] * (module is not None)
    places = {kind.__module__.partition(".")[0] for kind in kinds if kind is not None}
    for callback in callbacks:
        kind, monitor = type(callback).__name__, getattr(callback, "monitor", None)
        if kind in UNSUITABLE and type(callback).__module__.startswith("lightning."):
            if kind in FINDERS:  # which a Tuner has added, and removes only after a fit that ends well
                callbacks.remove(callback)
            taken = " It was taken out of the trainer's callbacks." * (kind in FINDERS)
            raise UserError(f"trainer.callbacks: {kind} does not suit a run of leap_pl. {UNSUITABLE[kind]}.{taken}")
        # Callbacks and modules from elsewhere may log more.
        if monitor is not None and monitor not in METRICS and places <= {"lightning", "leap_pl"}:
            raise UserError(f"{kind} monitors {monitor}, which is not measured. Give one of {listing(METRICS)}.")
        strange = [name for name in _named_in(callback) if name not in METRICS and places <= {"lightning", "leap_pl"}]
        if strange:
            raise UserError(
                f"the filename of {kind} names {strange[0]}, which is not measured. Give one of {listing(METRICS)}."
            )


def _named_in(callback: "Callback") -> list[str]:
    """Return the metrics in the file names that ``callback`` writes; none if it writes none."""
    filename = getattr(callback, "filename", None)
    try:
        return [name for name, _ in fields_of(filename)] if isinstance(filename, str) else []
    except ValueError:  # of a callback of another kind, which may read it in its own way
        return []


def fields_of(filename: str) -> list[tuple[str, str]]:
    """Return name and format of each field of ``filename``.

    Raises:
        ValueError: It is no format string, or has a field without a name, or with more than a name and a format.
    """
    fields = [(name, form or "", more) for _, name, form, more in Formatter().parse(filename) if name is not None]
    for name, form, more in fields:
        if not name or more or "{" in form:
            raise ValueError(f"the field {{{name}}} is not {{NAME}} or {{NAME:FORMAT}}")
    return [(name, form) for name, form, _ in fields]
