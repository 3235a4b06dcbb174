"""Arguments of a module that Python code may give as objects, where names are meant."""

from collections.abc import Sequence
from typing import Any, get_args

from leap_pl.base_model.loading import Dtype
from leap_pl.errors import UserError
from leap_pl.inputs.plain_values import shown

LOGITS_DTYPES = ("float32", "bfloat16")


def check_arguments(
    *, base_model: Any, mask: Any, weights: Any, targets: Any, ignore: Any, dtype: Any, logits_dtype: Any
) -> None:
    """Check that models, masks and data types are given by their names, and weights by lists of them.

    Raises:
        UserError: One is an object, or a name where a list is meant; or a data type is none of those that there are.
    """
    for name, value in (("base_model", base_model), ("mask", mask), ("weights", weights)):
        if not isinstance(value, str) and not (value is None and name != "base_model"):
            remedy = "save it first, and give the file" if name == "mask" else "give its hub id or its folder"
            raise UserError(f"{name} is an object, a {type(value).__name__}; {remedy}.")
    for name, value in (("targets", targets), ("ignore", ignore)):
        if isinstance(value, str):
            raise UserError(f"{name} is one name, {shown(repr(value), 200)}; give a list: [{shown(repr(value), 200)}].")
        if value is not None and not isinstance(value, Sequence):
            raise UserError(f"{name} is {shown(repr(value), 200)}; give a list of names.")
    for name, value, known in (("dtype", dtype, get_args(Dtype)), ("logits_dtype", logits_dtype, LOGITS_DTYPES)):
        if not isinstance(value, str) or value not in known:
            raise UserError(f"{name} is {shown(repr(value), 200)}; give one of {', '.join(map(repr, known))}.")
