"""Settings of the one-shot methods. Torch is not imported, so that ``--help`` starts fast."""

import math
from dataclasses import dataclass
from typing import Any, Self

from leap_pl.errors import UserError


@dataclass(frozen=True)
class MethodOptions:
    """Base class of a method's settings, which are recorded in a mask's provenance; it has none itself."""

    @classmethod
    def of(cls, **given: Any) -> Self:
        """Return the settings for these options of ``leap_pl prune``; by default the options have the fields' names."""
        return cls(**given)

    @property
    def damping(self) -> float:
        """Return the requested damping, to compare with that of the solution; 0 if the method has none."""
        return 0.0


@dataclass(frozen=True)
class SparseGPTOptions(MethodOptions):
    """Settings of SparseGPT.

    Attributes:
        damping: Value added to the Hessian's diagonal, as a fraction of the diagonal's mean.
        block_size: Number of columns whose mask is chosen together, and after which the columns to the right are
            updated in one product. For N:M it is rounded down to whole groups.

    Raises:
        UserError: ``block_size`` is below 1, or ``damping`` below 0 or infinite.
    """

    damping: float = 0.01
    block_size: int = 128

    def __post_init__(self) -> None:
        _check_shares(self, "damping")
        if self.block_size < 1:
            raise UserError(f"SparseGPTOptions: block_size is {self.block_size}; give 1 or more.")


@dataclass(frozen=True)
class AdmmOptions(MethodOptions):
    """Settings of ADMM.

    Attributes:
        ridge: Ridge towards the dense weights, as a fraction of the (unit) diagonal of the scaled Hessian.
        rho: Penalty of the constraint, ρ.
        iterations: Number of iterations.
        mask_iterations: Number of first iterations, each of which chooses the mask again; the last of them reaches the
            sparsity.

    Raises:
        UserError: ``mask_iterations`` is not from 1 to ``iterations``, or another number is below 0 or infinite.
    """

    ridge: float = 0.1
    rho: float = 1.0
    iterations: int = 20
    mask_iterations: int = 15

    def __post_init__(self) -> None:
        _check_shares(self, "ridge", "rho")
        if not 1 <= self.mask_iterations <= self.iterations:
            raise UserError(
                f"AdmmOptions: mask_iterations is {self.mask_iterations}, and iterations {self.iterations}; give 1 to "
                "that many, of which the last reaches the sparsity."
            )

    @classmethod
    def of(cls, **given: Any) -> Self:
        """Return the settings for ``--damping`` and ``--iterations``; three quarters of these choose the mask."""
        iterations = given["iterations"]
        return cls(ridge=given["damping"], iterations=iterations, mask_iterations=max(3 * iterations // 4, 1))

    @property
    def damping(self) -> float:
        """Return the ridge, under the name that all methods share."""
        return self.ridge


def _check_shares(options: MethodOptions, *names: str) -> None:
    """Check that each of these numbers is 0 or more, and finite.

    Raises:
        UserError: One is not.
    """
    for name in names:
        value = getattr(options, name)
        if not 0 <= value < math.inf:
            raise UserError(f"{type(options).__name__}: {name} is {value}; give 0 or more.")
