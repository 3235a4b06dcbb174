"""Hard masks: mask sets and their file format, sparsity patterns, exact top-k."""

from leap_pl.masks.bits import PackedMasks
from leap_pl.masks.mask_set import MaskSet, Provenance
from leap_pl.masks.weight_groups import split_name

__all__ = ["MaskSet", "PackedMasks", "Provenance", "split_name"]
