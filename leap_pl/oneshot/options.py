"""Settings of the one-shot methods that have some; no torch is imported, so that ``--help`` answers at once."""

from dataclasses import dataclass
from typing import Any, Self


@dataclass(frozen=True)
class MethodOptions:
    """Settings of a method, whose values the provenance of a mask holds; none here."""

    @classmethod
    def of(cls, **given: Any) -> Self:
        """Return the settings that options of ``leap_pl prune`` stand for; here they have the fields' names."""
        return cls(**given)

    @property
    def damping(self) -> float:
        """Damping that is asked for, to be compared with that of the solution; 0 where the method has none."""
        return 0.0


@dataclass(frozen=True)
class SparseGPTOptions(MethodOptions):
    """Settings of SparseGPT.

    Attributes:
        damping: Added to the Hessian's diagonal, as a part of the diagonal's mean.
        block_size: Columns whose mask is chosen together, and after which the update of the columns to
            the right is done in one product. For N:M it is rounded down to whole groups.
    """

    damping: float = 0.01
    block_size: int = 128


@dataclass(frozen=True)
class AdmmOptions(MethodOptions):
    """Settings of ADMM.

    Attributes:
        ridge: Pull towards the dense weights, as a part of the (unit) diagonal of the scaled Hessian.
        rho: Weight of the constraint.
        iterations: Iterations in all.
        mask_iterations: The first so many choose the mask anew.
    """

    ridge: float = 0.1
    rho: float = 1.0
    iterations: int = 20
    mask_iterations: int = 15

    @classmethod
    def of(cls, **given: Any) -> Self:
        """Return the settings of ``--damping`` and ``--iterations``, three quarters of which choose the mask."""
        iterations = given["iterations"]
        return cls(ridge=given["damping"], iterations=iterations, mask_iterations=max(3 * iterations // 4, 1))

    @property
    def damping(self) -> float:
        """The ridge, by the name that all methods share."""
        return self.ridge
