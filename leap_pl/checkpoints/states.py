"""Validate the parts of a checkpoint that Lightning and torch restore themselves, before they do."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from leap_pl.errors import UserError
from leap_pl.inputs.plain_values import display, read

_Number = bool | int | float | None
_Setting = _Number | str | list[_Number]


@dataclass
class _Group:
    params: list[str | int]
    settings: dict[str, _Setting]


def check_states(checkpoint: Mapping[str, Any], where: str) -> None:
    """Check that the states of optimizer, schedule, loops and callbacks have the types that are saved.

    Args:
        checkpoint: The whole checkpoint.
        where: Path of the checkpoint, for error messages.

    Raises:
        UserError: If a state has another type.
    """
    from packaging.version import InvalidVersion, Version

    version = checkpoint.get("pytorch-lightning_version", "2")
    try:
        Version(version)
    except (InvalidVersion, TypeError):
        raise UserError(
            f"{where}: {display(version)} is not a version of Lightning. Take the checkpoint before it."
        ) from None
    for name, kind in _KINDS.items():
        if name in checkpoint:
            read(_without_tensors(checkpoint[name]), kind, f"{where}: {name}")
    for optimizer in checkpoint.get("optimizer_states", []):
        groups = optimizer.get("param_groups", [])
        read(_without_tensors(groups), list[dict[str, Any]], f"{where}: optimizer_states")
        for group in groups:
            settings = {key: value for key, value in group.items() if key != "params"}
            fields = {"params": group.get("params", []), "settings": settings}
            read(_without_tensors(fields), _Group, f"{where}: optimizer_states")


# Counters and flags, in dictionaries of any depth.
_Counts = dict[str, bool | int | float | dict[str, Any] | None]

_KINDS: dict[str, Any] = {
    "epoch": int,
    "global_step": int,
    "loops": dict[str, _Counts],
    "callbacks": dict[str, dict[str, Any]],
    "optimizer_states": list[dict[str, Any]],
    "lr_schedulers": list[dict[str, _Setting | dict[str, Any] | str | list[Any]]],
}


def _without_tensors(tree: Any) -> Any:
    """Return ``tree`` with each tensor replaced by a number, and keys as strings."""
    if isinstance(tree, Tensor):
        return 0.0
    if isinstance(tree, Mapping):
        return {str(key): _without_tensors(value) for key, value in tree.items()}
    return [_without_tensors(item) for item in tree] if isinstance(tree, list | tuple) else tree
