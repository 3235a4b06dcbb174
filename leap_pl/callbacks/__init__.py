"""What happens around learning: annealing, logs, progress, and the mask at the end."""

from leap_pl.callbacks.annealing import Annealing
from leap_pl.callbacks.mask_export import MaskExport
from leap_pl.callbacks.progress import StepProgress
from leap_pl.callbacks.sparsity import SparsityLogger

__all__ = ["Annealing", "MaskExport", "SparsityLogger", "StepProgress"]
