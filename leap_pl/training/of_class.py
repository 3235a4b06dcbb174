"""A class method that an instance refuses, since it would return another instance and change nothing in this one."""

from functools import partial
from typing import TYPE_CHECKING, Any

from leap_pl.errors import UserError

if TYPE_CHECKING:
    of_class = classmethod
else:

    class of_class(classmethod):  # noqa: N801  (a decorator)
        """Class method that returns a new instance, and raises a UserError where it is called on an instance."""

        def __get__(self, instance: Any, owner: type | None = None) -> Any:
            """Return the method of the class, or on an instance a function that says what to call."""
            return super().__get__(instance, owner) if instance is None else partial(_refuse, self.__name__)


def _refuse(name: str, *_: Any, **__: Any) -> None:
    raise UserError(f"{name} returns a new module, and leaves this instance as it is. Call it on the class.")
