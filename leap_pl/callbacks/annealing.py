"""Former callback for the schedules of α and τ, which are settings of the module now."""

from typing import Any

import lightning as L

from leap_pl.errors import UserError


class Annealing(L.Callback):
    """Former callback that says what to write instead: the schedules are a setting of :class:`leap_pl.LeapModule`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Raise an error that says what to write instead.

        Raises:
            UserError: Always.
        """
        given = ", ".join([*map(repr, args), *(f"{name}={value!r}" for name, value in kwargs.items())])
        raise UserError(
            "the callback Annealing was removed: its schedules are a setting of the module. Leave it out of the "
            f"callbacks, and write LeapModule(..., annealing=Annealing({given})), with Annealing from "
            "leap_pl.training.schedules."
        )
