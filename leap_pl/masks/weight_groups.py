"""Sums and shares of weights that belong together: of a decoder block, of a projection, of all."""

import re
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import TypeVar

K = TypeVar("K", bound=Hashable)


def split_name(name: str) -> tuple[int | None, str]:
    """Split a weight's name into block and projection: ``model.layers.3.mlp.up_proj.weight`` → 3, ``mlp.up_proj``."""
    match = re.match(r".*?\.(\d{1,9})\.(.+)", name)
    return (int(match[1]), match[2].removesuffix(".weight")) if match else (None, name.removesuffix(".weight"))


def sums(
    pairs: Mapping[str, tuple[float, float]], groups: Callable[[str], Iterable[K]]
) -> dict[K, tuple[float, float]]:
    """Return group → the sums of the pairs of its weights.

    Args:
        pairs: Weight name → two numbers, such as kept and all.
        groups: Function that returns the groups of the weight that it is given the name of.
    """
    found: dict[K, tuple[float, float]] = {}
    for name, (first, second) in pairs.items():
        for group in groups(name):
            before = found.get(group, (0, 0))
            found[group] = before[0] + first, before[1] + second
    return found


def shares(pairs: Mapping[str, tuple[float, float]], groups: Callable[[str], Iterable[K]]) -> dict[K, float]:
    """Return group → the quotient of its :func:`sums`, such as the density of its weights."""
    return {group: first / second for group, (first, second) in sums(pairs, groups).items()}
