"""Callbacks of the trainer: metrics, progress bar, checkpoints, and the learned mask."""

from leap_pl.callbacks.annealing import Annealing
from leap_pl.callbacks.checkpoints import Checkpoints
from leap_pl.callbacks.mask_export import MaskExport
from leap_pl.callbacks.process import ProcessSettings
from leap_pl.callbacks.progress import StepProgress
from leap_pl.callbacks.sparsity import SparsityLogger

__all__ = ["Annealing", "Checkpoints", "MaskExport", "ProcessSettings", "SparsityLogger", "StepProgress"]
