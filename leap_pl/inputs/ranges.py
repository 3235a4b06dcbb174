"""Ranges of the numeric settings: one table, used by the command line and the constructors.

The key of a setting is its path on the command line, without ``init_args``: ``model.optimizer.lr``. A setting that is
not in the table, such as an argument of a logger, accepts any finite number.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from leap_pl.errors import UserError

LARGEST_COUNT = 2**31 - 1  # a count that no run reaches, and that fits every integer type


@dataclass(frozen=True)
class Range:
    """Range of numbers from ``low`` to ``high``, both included unless ``above`` or ``below`` excludes them.

    Attributes:
        low: Lower bound.
        high: Upper bound; infinity is never in a range.
        above: Exclude ``low`` itself.
        below: Exclude ``high`` itself.
        also: Single numbers that are accepted in addition.
    """

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False
    also: tuple[float, ...] = ()

    def __contains__(self, number: float) -> bool:
        """Return whether ``number`` is finite and in the range."""
        if not -math.inf < number < math.inf:
            return False
        if number in self.also:
            return True
        low = number > self.low if self.above else number >= self.low
        return low and (number < self.high if self.below else number <= self.high)

    def __str__(self) -> str:
        """Return the range in words, as in "give 1 or more"."""
        if self.low == -math.inf and self.high == math.inf:
            return "a finite number"
        if self.low == self.high:
            return f"{self.low:g}"
        low = f"above {self.low:g}" if self.above else f"from {self.low:g}"
        high = f"below {self.high:g}" if self.below else f"at most {self.high:g}"
        if self.high in (math.inf, LARGEST_COUNT):
            words = f"a number above {self.low:g}" if self.above else f"{self.low:g} or more"
        elif not self.above:
            words = f"a number {low} to {'below ' if self.below else ''}{self.high:g}"
        else:
            words = f"a number {low} and {high}"
        return words + "".join(f", or {number:g}" for number in self.also)


FINITE = Range()
POSITIVE = Range(0, above=True)
NOT_NEGATIVE = Range(0)
COUNT = Range(1, LARGEST_COUNT)
COUNT_OR_ZERO = Range(0, LARGEST_COUNT)
COUNT_OR_ALL = Range(0, LARGEST_COUNT, also=(-1,))
SHARE = Range(0, 1, above=True)
INSIDE = Range(0, 1, above=True, below=True)
BELOW_ONE = Range(0, 1, below=True)
SEED = Range(-(2**63), 2**63 - 1)  # is hashed
GENERATOR_SEED = Range(0, 2**32 - 1)  # NumPy's

RANGES: dict[str, Range] = {
    "seed_everything": GENERATOR_SEED,
    # -- the module
    "model.sparsity": INSIDE,
    "model.warmup_steps": COUNT_OR_ZERO,
    "model.seed": SEED,
    "model.weight_training.lr": Range(0, 10),
    "model.weight_training.warmup_steps": COUNT_OR_ZERO,
    "model.weight_training.weight_decay": Range(0, 100),
    "model.weight_training.r": COUNT,
    "model.weight_training.lora_alpha": Range(0, 1e6, above=True),
    "model.objective.lm": NOT_NEGATIVE,
    "model.objective.distillation": NOT_NEGATIVE,
    "model.objective.temperature": POSITIVE,
    "model.objective.budget": NOT_NEGATIVE,
    "model.objective.weight": NOT_NEGATIVE,
    "model.objective.chunk": COUNT,
    "model.prior.fisher": SHARE,
    "model.prior.sequences": COUNT,
    "model.gate.spread": Range(0, 1e3, above=True),
    "model.gate.pattern_spread": Range(0, 1e3, above=True),
    "model.gate.strength": Range(0, 1e3),
    "model.gate.n": COUNT,
    "model.gate.m": COUNT,
    "model.gate.tile": COUNT,
    # -- optimizers and schedulers, whatever their class
    "model.optimizer.lr": Range(0, 10),
    "model.optimizer.betas": BELOW_ONE,
    "model.optimizer.beta2_decay": FINITE,
    "model.optimizer.alpha": BELOW_ONE,
    "model.optimizer.rho": BELOW_ONE,
    "model.optimizer.momentum": BELOW_ONE,
    "model.optimizer.dampening": BELOW_ONE,
    "model.optimizer.momentum_decay": NOT_NEGATIVE,
    "model.optimizer.lr_decay": NOT_NEGATIVE,
    "model.optimizer.eps": NOT_NEGATIVE,
    "model.optimizer.weight_decay": Range(0, 100),
    "model.optimizer.seed": SEED,
    "model.optimizer.rows": Range(0, 100),
    "model.optimizer.columns": Range(0, 100),
    "model.lr_scheduler.last_epoch": Range(-1, -1),  # a resumed run takes it from the checkpoint
    "model.lr_scheduler.gamma": Range(0, 10),
    "model.lr_scheduler.factor": Range(0, 10),
    "model.lr_scheduler.eta_min": Range(0, 10),
    "model.lr_scheduler.min_lr": Range(0, 10),
    "model.lr_scheduler.max_lr": Range(0, 10),
    "model.lr_scheduler.base_lr": Range(0, 10),
    "model.lr_scheduler.T_max": COUNT,
    "model.lr_scheduler.T_0": COUNT,
    "model.lr_scheduler.step_size": COUNT,
    "model.lr_scheduler.total_iters": COUNT_OR_ZERO,
    "model.lr_scheduler.total_steps": COUNT,
    # -- data
    "data.seq_length": Range(2, LARGEST_COUNT),
    "data.batch_size": COUNT,
    "data.validation_sequences": COUNT_OR_ZERO,
    "data.num_workers": Range(0, 4096),
    "data.seed": SEED,
    # -- callbacks
    "sparsity_log.every_n_steps": COUNT,
    "sparsity_log.histogram_every_n_steps": COUNT,
    "sparsity_log.samples": COUNT,
    "progress.refresh_seconds": NOT_NEGATIVE,
    "checkpoint.every_minutes": NOT_NEGATIVE,
    "checkpoint.save_top_k": COUNT_OR_ALL,
    "checkpoint.every_n_train_steps": COUNT_OR_ZERO,
    "checkpoint.every_n_epochs": COUNT_OR_ZERO,
    # -- the trainer
    "trainer.devices": COUNT_OR_ALL,
    "trainer.num_nodes": COUNT,
    "trainer.fast_dev_run": COUNT_OR_ZERO,
    "trainer.max_epochs": COUNT_OR_ALL,
    "trainer.min_epochs": COUNT_OR_ZERO,
    "trainer.max_steps": COUNT_OR_ALL,
    "trainer.min_steps": COUNT_OR_ZERO,
    "trainer.limit_train_batches": COUNT_OR_ZERO,
    "trainer.limit_val_batches": COUNT_OR_ZERO,
    "trainer.limit_test_batches": COUNT_OR_ZERO,
    "trainer.limit_predict_batches": COUNT_OR_ZERO,
    "trainer.overfit_batches": COUNT_OR_ZERO,
    "trainer.val_check_interval": Range(0, LARGEST_COUNT, above=True),
    "trainer.check_val_every_n_epoch": COUNT,
    "trainer.num_sanity_val_steps": COUNT_OR_ALL,
    "trainer.log_every_n_steps": COUNT,
    "trainer.accumulate_grad_batches": COUNT,
    "trainer.gradient_clip_val": NOT_NEGATIVE,  # a negative factor would ascend the gradient
    "trainer.reload_dataloaders_every_n_epochs": COUNT_OR_ZERO,
    # -- prune
    "prune.seq_length": Range(2, LARGEST_COUNT),
    "prune.sequences": COUNT,
    "prune.seed": SEED,
    "prune.sparsity": INSIDE,
    "prune.layer_sparsity": BELOW_ONE,
    "prune.owl_threshold": POSITIVE,
    "prune.owl_spread": BELOW_ONE,
    "prune.fisher": SHARE,
    "prune.fisher_rows": Range(0, 1),
    "prune.batch_size": COUNT,
    # -- evaluate
    "evaluate.seq_length": Range(2, LARGEST_COUNT),
    "evaluate.stride": COUNT,
    "evaluate.max_tokens": Range(2, 2**63 - 1),
    "evaluate.limit": COUNT,
    "evaluate.num_fewshot": COUNT_OR_ZERO,
    "evaluate.batch_size": COUNT,
    "evaluate.seed": GENERATOR_SEED,
    # -- generate
    "generate.max_new_tokens": COUNT,
    "generate.temperature": Range(1e-6, also=(0,)),
    "generate.seed": GENERATOR_SEED,
}


def check_numbers(settings: Mapping[str, Any], within: str = "", shown: str | None = None) -> None:
    """Check that every number in nested ``settings`` is in the range of its setting.

    Args:
        settings: Name → value, in the form of a config; values that are not numbers are skipped.
        within: Path of the parent of these settings, with a trailing dot, such as ``model.``.
        shown: Path that messages show in place of ``within``; None is ``within`` itself.

    Raises:
        UserError: A number is out of range, infinite or NaN; the message names it and the accepted range.
    """
    for path, name, number in _numbers(settings, within, within if shown is None else shown):
        accepted = RANGES.get(path, FINITE)
        if number not in accepted:
            raise UserError(refusal(name, number, accepted))


def refusal(name: str, number: float, accepted: Range) -> str:
    """Return the message that the setting ``name`` is out of its range, with what may be meant."""
    share = accepted.low == 0 and accepted.high == 1 and 1 < number < 100
    return f"{name} is {number:.15g}; give {accepted}.{f' For {number:g}%, give {number / 100:g}.' if share else ''}"


def _numbers(value: Any, path: str, shown: str) -> Iterator[tuple[str, str, float]]:
    """Yield each number in ``value`` with its path in the table and its path in messages; a group's end in a dot."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if key in ("init_args", "dict_kwargs") and isinstance(inner, Mapping):
                yield from _numbers(inner, path, shown)
            elif isinstance(inner, Mapping):
                yield from _numbers(inner, f"{path}{key}.", f"{shown}{key}.")
            else:
                yield from _numbers(inner, f"{path}{key}", f"{shown}{key}")
    elif isinstance(value, list | tuple):
        for inner in value:
            dot = "." if isinstance(inner, Mapping) else ""
            yield from _numbers(inner, path + dot, shown + dot)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, shown, value


def check_whole(settings: Mapping[str, Any], prefix: str) -> None:
    """Check that each of ``settings`` is a whole number, such as a count: a share of the run is no number of steps.

    Raises:
        UserError: One is not.
    """
    for name, value in settings.items():
        if int(value) != value:
            raise UserError(f"{prefix}{name} is {value}; give a whole number.")
