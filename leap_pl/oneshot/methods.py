"""Table of the one-shot methods, from which the command line, priors, their cache and the walk derive their behaviour.

A method is a function of a matrix in a file of its own, and a row here. Heavy modules are imported only on use.
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
        default: Default value, of the option's type.
        range: Range of accepted numbers.
        help: Sentence for ``--help``, the same for all methods that take the option.
    """

    default: float
    range: Range
    help: str


@dataclass(frozen=True)
class Method:
    """A one-shot method.

    Attributes:
        solve: Function, as ``module:name``. Its arguments are the dense matrix (O, I) in fp32; the statistic that
            ``needs`` names, if any; the :class:`leap_pl.masks.patterns.Pattern`; and the settings, if the method has
            any. It returns the mask, bool (O, I), or a :class:`leap_pl.oneshot.damping.Solution` if it updates weights.
        help: Description for ``leap_pl prune --help``.
        needs: Attribute of :class:`leap_pl.oneshot.inputs.InputStatistics`: the mean square of each input (I,), or the
            Hessian (I, I); None for a method that reads no text.
        updates: Whether kept weights change; the command then also writes a model.
        solve_kept: Function like ``solve`` that takes a mask in place of the pattern and updates its kept weights; None
            for a method that cannot.
        settings: Class of the settings; None for a method without settings.
        options: Options of ``leap_pl prune`` by name, which are the arguments of ``settings.of``.
        by_row: Whether unstructured weights compete within a row, so that the sparsity can be allocated over rows.
    """

    solve: str
    help: str
    needs: Literal["mean_square", "gram"] | None = None
    updates: bool = False
    solve_kept: str | None = None
    settings: type[MethodOptions] | None = None
    options: Mapping[str, Option] = field(default_factory=dict)
    by_row: bool = False

    def function(self, *, kept: bool = False) -> Callable[..., Any]:
        """Import ``solve``, or ``solve_kept``, and return it."""
        path = self.solve_kept if kept else self.solve
        assert path is not None
        found: Callable[..., Any] = resolve_name(path)
        return found


DAMPING = (
    "Value added to the Hessian's diagonal, as a fraction of its mean. If it is too small, ten times as much is tried, "
    "with a warning."
)

MASK_ALONE = " (mask alone)"
METHODS: dict[str, Method] = {
    "magnitude": Method("leap_pl.oneshot.magnitude:magnitude_mask", "takes seconds"),
    "wanda": Method("leap_pl.oneshot.wanda:wanda_mask", "fast", needs="mean_square", by_row=True),
    "sparseswaps": Method(
        "leap_pl.oneshot.sparseswaps:sparseswaps_mask", "wanda's mask improved by swaps", needs="gram", by_row=True
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
                AdmmOptions.iterations, COUNT, "Number of iterations; the first three quarters of them choose the mask."
            ),
        },
    ),
}

DEFAULT = "wanda"
FALLBACK = "magnitude"  # for matrices that no token reached: it needs no inputs
INSTEAD = f"Give --method {FALLBACK}"  # what to type where a model cannot be walked for its inputs


def method_named(name: str) -> Method:
    """Return the method called ``name``.

    Raises:
        UserError: No method has this name.
    """
    if name not in METHODS:
        raise UserError(f"--method is {name!r}; give one of {', '.join(METHODS)}.")
    return METHODS[name]


def changes_weights(name: str) -> bool:
    """Return whether the method ``name`` changes the weights that it keeps: its mask alone is not its result."""
    return name in METHODS and METHODS[name].updates


def of_mask_alone(name: str) -> str:
    """Return what the mask of the method ``name`` is called on weights that it has not changed."""
    return f"{name}{MASK_ALONE}" if changes_weights(name) else name


def rounded_method(name: str, dtype: str | None) -> str:
    """Return what the method ``name`` is called on weights that are rounded to ``dtype``, such as int8; None: exact."""
    return name if dtype is None else f"{name} ({dtype})"


def settings_of(name: str, given: Mapping[str, float | None]) -> MethodOptions | None:
    """Return the settings of a method; None for a method without settings.

    Args:
        name: Name of the method.
        given: Options of ``leap_pl prune`` by name; None: not given.

    Raises:
        UserError: The method does not take an option, or an option is out of its range.
    """
    method = method_named(name)
    values: dict[str, float] = {option: taken.default for option, taken in method.options.items()}
    for option, value in given.items():
        if value is None:
            continue
        if option not in method.options:
            takers = takers_of(option)
            if not takers:
                raise UserError(f"there is no option --{option}. Leave it out.")
            raise UserError(
                f"--{option} is not for {name} but for {listing(takers)}. Leave it out, or choose another --method."
            )
        if value not in method.options[option].range:
            raise UserError(f"--{option} is {value:.15g}; give {method.options[option].range}.")
        values[option] = value
    return None if method.settings is None else method.settings.of(**values)


def takers_of(option: str) -> list[str]:
    """Return the names of the methods that take an option."""
    return [name for name, method in METHODS.items() if option in method.options]
