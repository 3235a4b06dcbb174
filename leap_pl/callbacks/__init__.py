"""Callbacks of the trainer: metrics, plan, progress and verdict, checkpoints, and the learned mask."""

from leap_pl.callbacks.annealing import Annealing
from leap_pl.callbacks.checkpoints import Checkpoints
from leap_pl.callbacks.mask_export import MaskExport
from leap_pl.callbacks.process import ProcessSettings
from leap_pl.callbacks.progress import StepProgress
from leap_pl.callbacks.report import RunReport
from leap_pl.callbacks.sparsity import SparsityLogger
from leap_pl.callbacks.validation_times import ValidationTimes

__all__ = [
    "Annealing",
    "Checkpoints",
    "MaskExport",
    "ProcessSettings",
    "RunReport",
    "SparsityLogger",
    "StepProgress",
    "ValidationTimes",
]
