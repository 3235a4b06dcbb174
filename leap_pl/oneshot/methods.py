"""The one-shot methods: one table, from which the command line, priors, their cache and the walk derive what they do.

A method is a function of a matrix in a file of its own, and a row here. Nothing heavy is imported before it is used.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pkgutil import resolve_name
from typing import Any, Literal

from leap_pl.errors import UserError, listing
from leap_pl.inputs.ranges import COUNT, NOT_NEGATIVE, Range
from leap_pl.oneshot.options import AdmmOptions, MethodOptions, SparseGPTOptions


@dataclass(frozen=True)
class Option:
    """An option of ``leap_pl prune`` that a method takes.

    Attributes:
        default: Value where it is not given, of the option's type.
        range: Numbers that it takes.
        help: Sentence of ``--help``; the same of all methods that take the option.
    """

    default: float
    range: Range
    help: str


@dataclass(frozen=True)
class Method:
    """A one-shot method.

    Attributes:
        solve: Function, as ``module:name``, of the dense matrix (O, I) in fp32; of what ``needs`` names, if anything;
            of the :class:`leap_pl.masks.patterns.Pattern`; and of the settings, if it has any. It returns the mask,
            bool (O, I), or, if the method updates weights, a :class:`leap_pl.oneshot.damping.Solution`.
        help: Words of ``leap_pl prune --help``.
        needs: Attribute of :class:`leap_pl.oneshot.inputs.InputStatistics`: the mean square of each input (I,), the
            Hessian (I, I), or None for a method that reads no text.
        updates: Whether kept weights change; the command then writes a model beside the mask.
        solve_kept: Function, as ``solve``, with a given mask in the place of the pattern, whose kept weights it solves
            anew; None for a method that cannot.
        settings: Class of the settings; None for a method without.
        options: Options of ``leap_pl prune`` that set them, by name: what ``settings.of`` is called with.
    """

    solve: str
    help: str
    needs: Literal["mean_square", "gram"] | None = None
    updates: bool = False
    solve_kept: str | None = None
    settings: type[MethodOptions] | None = None
    options: Mapping[str, Option] = field(default_factory=dict)

    def function(self, *, kept: bool = False) -> Callable[..., Any]:
        """Import ``solve``, or ``solve_kept``, and return it."""
        path = self.solve_kept if kept else self.solve
        assert path is not None
        found: Callable[..., Any] = resolve_name(path)
        return found


DAMPING = (
    "Added to the Hessian's diagonal, as a part of its mean. Where it does not suffice, ten times as much is tried, "
    "and said."
)

METHODS: dict[str, Method] = {
    "magnitude": Method("leap_pl.oneshot.magnitude:magnitude_mask", "takes seconds"),
    "wanda": Method("leap_pl.oneshot.wanda:wanda_mask", "fast", needs="mean_square"),
    "sparseswaps": Method(
        "leap_pl.oneshot.sparseswaps:sparseswaps_mask", "wanda's mask improved by swaps", needs="gram"
    ),
    "sparsegpt": Method(
        "leap_pl.oneshot.sparsegpt:sparsegpt",
        "low layer errors",
        needs="gram",
        updates=True,
        settings=SparseGPTOptions,
        options={
            "damping": Option(SparseGPTOptions.damping, NOT_NEGATIVE, DAMPING),
            "block_size": Option(SparseGPTOptions.block_size, COUNT, "Columns whose mask is chosen together."),
        },
    ),
    "admm": Method(
        "leap_pl.oneshot.admm:admm_prune",
        "the lowest layer errors",
        needs="gram",
        updates=True,
        solve_kept="leap_pl.oneshot.admm:admm_update",
        settings=AdmmOptions,
        options={
            "damping": Option(AdmmOptions.ridge, NOT_NEGATIVE, DAMPING),
            "iterations": Option(
                AdmmOptions.iterations, COUNT, "Iterations; the first three quarters of them choose the mask."
            ),
        },
    ),
}

DEFAULT = "wanda"
FALLBACK = "magnitude"  # where no token reached a matrix: it needs no inputs


def method_named(name: str, option: str = "--method") -> Method:
    """Return the method of this name.

    Raises:
        UserError: There is none; ``option`` is where it was given.
    """
    if name not in METHODS:
        raise UserError(f"{option} is {name!r}; give one of {', '.join(METHODS)}.")
    return METHODS[name]


def settings_of(name: str, given: Mapping[str, float | None]) -> MethodOptions | None:
    """Return the settings of a method; None for one without.

    Args:
        name: Of the method.
        given: Options of ``leap_pl prune`` by name; None where one is not given.

    Raises:
        UserError: One is not for this method, or not in its range.
    """
    method = method_named(name)
    values: dict[str, float] = {option: taken.default for option, taken in method.options.items()}
    for option, value in given.items():
        if value is None:
            continue
        if option not in method.options:
            takers = listing(takers_of(option))
            raise UserError(f"--{option} is not for {name} but for {takers}. Leave it out, or take another --method.")
        if value not in method.options[option].range:
            raise UserError(f"--{option} is {value:.15g}; give {method.options[option].range}.")
        values[option] = value
    return None if method.settings is None else method.settings.of(**values)


def takers_of(option: str) -> list[str]:
    """Return the names of the methods that take an option."""
    return [name for name, method in METHODS.items() if option in method.options]
