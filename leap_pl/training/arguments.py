"""Arguments of a module that Python code may give as objects, where names are meant."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, get_args

from leap_pl.base_model.loading import Dtype
from leap_pl.errors import UserError, listing
from leap_pl.inputs.plain_values import shown

LOGITS_DTYPES = ("float32", "bfloat16")


def check_arguments(
    *,
    base_model: Any,
    mask: Any,
    weights: Any,
    targets: Any,
    ignore: Any,
    dtype: Any,
    logits_dtype: Any,
    gate: Any,
    **settings: Any,
) -> None:
    """Check that models, masks and data types are given by their names, weights by lists of them, settings by objects.

    Args:
        base_model: Name of a model, likewise ``mask`` and ``weights``.
        mask: See ``base_model``.
        weights: See ``base_model``.
        targets: List of names, likewise ``ignore``.
        ignore: See ``targets``.
        dtype: Name of a data type, likewise ``logits_dtype``.
        logits_dtype: See ``dtype``.
        gate: Class of a gate, or a partial of one.
        settings: Name → (what was given, the dataclass that it should be).

    Raises:
        UserError: One is an object, or a name where a list is meant; or there is no such data type or setting.
    """
    for name, (value, kind) in settings.items():
        settable = [field.name for field in fields(kind)]
        unknown = sorted(map(str, set(value).difference(settable))) if isinstance(value, dict) else []
        if unknown:
            raise UserError(f"{name} has no setting {listing(unknown)}. It has {listing(settable)}.")
        if not isinstance(value, kind | dict):
            raise UserError(f"{name} is {shown(repr(value), 200)}; give {kind.__name__}(...).")
        if type(value) is not kind and not isinstance(value, dict):
            own = " Terms of your own are Objective(extra=[...])." if kind.__name__ == "Objective" else ""
            raise UserError(
                f"{name} is of a class of your own, {type(value).__name__}, of which a checkpoint would hold the "
                f"settings alone. Give {kind.__name__}(...).{own}"
            )
    if not callable(gate):
        raise UserError(f"gate is {shown(repr(gate), 200)}; give a class of gates, or a partial of one.")
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
