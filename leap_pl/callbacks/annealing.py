"""What used to set α and τ: the module does so itself now."""

from typing import Any

import lightning as L

from leap_pl.errors import UserError


class Annealing(L.Callback):
    """Says what to write instead: the schedules of α and τ are a setting of :class:`leap_pl.LeapModule`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Refuse to be made.

        Raises:
            UserError: Always.
        """
        told = ", ".join([*map(repr, args), *(f"{name}={value!r}" for name, value in kwargs.items())])
        raise UserError(
            "the callback Annealing is no more: its schedules are the module's. Leave it out of the callbacks, and "
            f"write LeapModule(..., annealing=Annealing({told})), with Annealing of leap_pl.training.schedules."
        )
