"""Hold, choose and cut hard masks: mask sets and their file, sparsity patterns, exact top-k."""

from leap_pl.masks.mask_set import MaskSet, PackedMasks, Provenance, split_name

__all__ = ["MaskSet", "PackedMasks", "Provenance", "split_name"]
