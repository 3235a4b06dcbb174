"""Checks of what one-shot pruning is given, before anything is computed."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from leap_pl.base_model.weights import MANY_ZEROS, Weight, share_of_zeros
from leap_pl.errors import UserError, listing
from leap_pl.masks.patterns import NM, Pattern, Unstructured
from leap_pl.oneshot.allocation import OwlOptions
from leap_pl.oneshot.fisher import FisherOptions
from leap_pl.oneshot.methods import METHODS
from leap_pl.oneshot.options import MethodOptions


def check_kinds(owl: Any, fisher: Any) -> None:
    """Check that the options of an allocation are of the classes that they have.

    Raises:
        UserError: One is not.
    """
    given = (("owl", owl, OwlOptions), ("fisher", fisher, FisherOptions | int | float))
    for name, value, kinds in given:
        if isinstance(value, bool) or not isinstance(value, kinds | None):
            raise UserError(f"{name} is {value!r}: give {name.capitalize()}Options(), or leave it out.")


def check_blocks(name: str, blocks_NT: Tensor | None, allocation: Sequence[str]) -> None:
    """Check that there are calibration tokens, LongTensor[sequences, seq_length], if anything reads some.

    Args:
        name: Name of the method.
        blocks_NT: The tokens; None: there are none.
        allocation: The flags of what allocates the sparsity, of those that are given.

    Raises:
        UserError: They are missing, or have another shape.
    """
    reading = [what for flag, what in (("--owl", "OWL"), ("--fisher", "Fisher allocation")) if flag in allocation]
    if blocks_NT is None and (METHODS[name].needs is not None or reading):
        raise UserError(f"{reading[0] if reading else name} needs calibration text. Give --text.")
    if blocks_NT is not None and (blocks_NT.ndim != 2 or not blocks_NT.numel()):
        raise UserError(f"calibration tokens are {list(blocks_NT.shape)}, not [sequences, seq_length].")


def check_settings(
    name: str, pattern: Pattern, allocation: Sequence[str], options: MethodOptions | None, *, masked: bool
) -> None:
    """Check settings of :func:`leap_pl.oneshot.prune.prune` that need neither the model nor the text.

    Args:
        name: Name of the method.
        pattern: What is to be pruned.
        allocation: The flags of what allocates the sparsity, of those that are given.
        options: Settings of the method.
        masked: Whether a mask is given, whose kept weights are updated.

    Raises:
        UserError: One contradicts another.
    """
    method = METHODS[name]
    if "--fisher" in allocation and isinstance(pattern, Unstructured) and not 0 < pattern.sparsity < 1:
        raise UserError(f"Fisher allocation needs a sparsity above 0 and below 1, not {pattern.sparsity:g}.")
    if len(allocation) > 1:
        raise UserError(f"Can't provide both {allocation[0]} and {allocation[1]}. Choose one.")
    if isinstance(pattern, NM) and allocation:
        raise UserError(f"pattern {pattern} has the same sparsity everywhere: leave out --pattern, or {allocation[0]}.")
    if masked and method.solve_kept is None:
        able = listing([other for other, row in METHODS.items() if row.solve_kept is not None])
        raise UserError(
            f"--mask updates the kept weights of a given mask, which --method {name} cannot do. Use --method {able}."
        )
    if masked and allocation:
        raise UserError(f"Can't provide both --mask and {allocation[0]}. Choose one.")
    if options is not None and (method.settings is None or not isinstance(options, method.settings)):
        takes = "no options" if method.settings is None else method.settings.__name__
        raise UserError(f"method {name} takes {takes}, and not {type(options).__name__}.")


def warn_of_zeros(weights: Mapping[str, Weight]) -> None:
    """Warn if many of ``weights``, which are to be pruned, are 0 already."""
    share = share_of_zeros(weights)
    if share > MANY_ZEROS:
        warnings.warn(
            f"this model is sparse already: {share:.1%} of the weights to prune are 0. To prune the dense model, load "
            "that again.",
            stacklevel=3,
        )
