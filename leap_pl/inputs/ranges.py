"""The numbers that settings take: one table, which the command line and the constructors look in.

A setting goes by its path on the command line, without ``init_args``: ``model.optimizer.lr``. One that the table does
not know, such as an argument of a logger, takes any number that is finite.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from leap_pl.errors import UserError

SEQUENCES = 2**31 - 1  # a count that no run comes to, and that every integer type holds


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``, these included unless ``above`` and ``below`` say otherwise.

    Attributes:
        low: The least.
        high: The most; infinity is never in a range.
        above: ``low`` itself is not in it.
        below: ``high`` itself is not in it.
        also: Single numbers that are in it too.
    """

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False
    also: tuple[float, ...] = ()

    def __contains__(self, number: float) -> bool:
        """Tell whether ``number`` is finite and in the range."""
        if not -math.inf < number < math.inf:
            return False
        if number in self.also:
            return True
        low = number > self.low if self.above else number >= self.low
        return low and (number < self.high if self.below else number <= self.high)

    def __str__(self) -> str:
        """Return what to give, as in "give 1 or more"."""
        if self.low == -math.inf and self.high == math.inf:
            return "a finite number"
        if self.low == self.high:
            return f"{self.low:g}"
        low = f"above {self.low:g}" if self.above else f"from {self.low:g}"
        high = f"below {self.high:g}" if self.below else f"at most {self.high:g}"
        if self.high in (math.inf, SEQUENCES):
            words = f"a number above {self.low:g}" if self.above else f"{self.low:g} or more"
        elif not self.above:
            words = f"a number {low} to {'below ' if self.below else ''}{self.high:g}"
        else:
            words = f"a number {low} and {high}"
        return words + "".join(f", or {number:g}" for number in self.also)


FINITE = Range()
POSITIVE = Range(0, above=True)
NOT_NEGATIVE = Range(0)
COUNT = Range(1, SEQUENCES)
COUNT_OR_NONE = Range(0, SEQUENCES)
COUNT_OR_ALL = Range(0, SEQUENCES, also=(-1,))
SHARE = Range(0, 1, above=True)
INSIDE = Range(0, 1, above=True, below=True)
AVERAGE = Range(0, 1, below=True)  # the factor of a running average
SEED = Range(-(2**63), 2**63 - 1)  # it is hashed
GENERATOR_SEED = Range(0, 2**32 - 1)  # NumPy's

RANGES: dict[str, Range] = {
    "seed_everything": GENERATOR_SEED,
    # -- the module
    "model.sparsity": INSIDE,
    "model.warmup_steps": COUNT_OR_NONE,
    "model.seed": SEED,
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
    "model.optimizer.betas": AVERAGE,
    "model.optimizer.beta2_decay": FINITE,
    "model.optimizer.alpha": AVERAGE,
    "model.optimizer.rho": AVERAGE,
    "model.optimizer.momentum": AVERAGE,
    "model.optimizer.dampening": AVERAGE,
    "model.optimizer.momentum_decay": NOT_NEGATIVE,
    "model.optimizer.lr_decay": NOT_NEGATIVE,
    "model.optimizer.eps": NOT_NEGATIVE,
    "model.optimizer.weight_decay": Range(0, 100),
    "model.optimizer.seed": SEED,
    "model.lr_scheduler.last_epoch": Range(-1, -1),  # what a resume goes on from is in the checkpoint
    "model.lr_scheduler.gamma": Range(0, 10),
    "model.lr_scheduler.factor": Range(0, 10),
    "model.lr_scheduler.eta_min": Range(0, 10),
    "model.lr_scheduler.min_lr": Range(0, 10),
    "model.lr_scheduler.max_lr": Range(0, 10),
    "model.lr_scheduler.base_lr": Range(0, 10),
    "model.lr_scheduler.T_max": COUNT,
    "model.lr_scheduler.T_0": COUNT,
    "model.lr_scheduler.step_size": COUNT,
    "model.lr_scheduler.total_iters": COUNT_OR_NONE,
    "model.lr_scheduler.total_steps": COUNT,
    # -- data
    "data.seq_length": Range(2, SEQUENCES),
    "data.batch_size": COUNT,
    "data.validation_sequences": COUNT_OR_NONE,
    "data.num_workers": Range(0, 4096),
    "data.seed": SEED,
    # -- callbacks
    "sparsity_log.every_n_steps": COUNT,
    "sparsity_log.histogram_every_n_steps": COUNT,
    "sparsity_log.samples": COUNT,
    "progress.refresh_seconds": NOT_NEGATIVE,
    "checkpoint.every_minutes": NOT_NEGATIVE,
    "checkpoint.save_top_k": COUNT_OR_ALL,
    "checkpoint.every_n_train_steps": COUNT_OR_NONE,
    "checkpoint.every_n_epochs": COUNT_OR_NONE,
    # -- the trainer
    "trainer.devices": COUNT_OR_ALL,
    "trainer.num_nodes": COUNT,
    "trainer.fast_dev_run": COUNT_OR_NONE,
    "trainer.max_epochs": COUNT_OR_ALL,
    "trainer.min_epochs": COUNT_OR_NONE,
    "trainer.max_steps": COUNT_OR_ALL,
    "trainer.min_steps": COUNT_OR_NONE,
    "trainer.limit_train_batches": COUNT_OR_NONE,
    "trainer.limit_val_batches": COUNT_OR_NONE,
    "trainer.limit_test_batches": COUNT_OR_NONE,
    "trainer.limit_predict_batches": COUNT_OR_NONE,
    "trainer.overfit_batches": COUNT_OR_NONE,
    "trainer.val_check_interval": Range(0, SEQUENCES, above=True),
    "trainer.check_val_every_n_epoch": COUNT,
    "trainer.num_sanity_val_steps": COUNT_OR_ALL,
    "trainer.log_every_n_steps": COUNT,
    "trainer.accumulate_grad_batches": COUNT,
    "trainer.gradient_clip_val": NOT_NEGATIVE,  # a gradient times a negative number climbs
    "trainer.reload_dataloaders_every_n_epochs": COUNT_OR_NONE,
    # -- prune
    "prune.seq_length": Range(2, SEQUENCES),
    "prune.sequences": COUNT,
    "prune.seed": SEED,
    "prune.sparsity": INSIDE,
    "prune.layer_sparsity": AVERAGE,
    "prune.owl_threshold": POSITIVE,
    "prune.owl_spread": Range(0, 1, below=True),
    "prune.fisher": SHARE,
    "prune.fisher_rows": Range(0, 1),
    "prune.batch_size": COUNT,
    # -- evaluate
    "evaluate.seq_length": Range(2, SEQUENCES),
    "evaluate.stride": COUNT,
    "evaluate.max_tokens": Range(2, 2**63 - 1),
    "evaluate.limit": COUNT,
    "evaluate.num_fewshot": COUNT_OR_NONE,
    "evaluate.batch_size": COUNT,
    "evaluate.seed": GENERATOR_SEED,
}


def check_numbers(settings: Mapping[str, Any], within: str = "", shown: str | None = None) -> None:
    """Make sure that every number in nested ``settings`` is one that its setting takes.

    Args:
        settings: Name → value, in the form that a config has; what is no number is passed over.
        within: The path of what they are the settings of, and a dot, as ``model.``.
        shown: What a message has in place of ``within``; None: the same.

    Raises:
        UserError: One is not, or is infinite or NaN; it says which, what was found and what to give.
    """
    for path, name, number in _numbers(settings, within, within if shown is None else shown):
        taken = RANGES.get(path, FINITE)
        if number not in taken:
            raise UserError(f"{name} is {number:.15g}; give {taken}.")


def _numbers(value: Any, path: str, shown: str) -> Iterator[tuple[str, str, float]]:
    """Yield every number in ``value`` with its path in the table and as it is shown; of a group both end in a dot."""
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
            yield from _numbers(inner, path, shown)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, shown, value
