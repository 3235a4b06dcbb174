"""Values that a checkpoint may hold: those that are read again without running code."""

from collections import Counter, OrderedDict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from leap_pl.errors import UserError

MAPPINGS, COLLECTIONS = (dict, OrderedDict, Counter), (list, tuple, set)
VALUES = (str, bytes, bytearray, bool, int, float, complex, type(None), torch.Size, torch.dtype, torch.device)


def made_plain(value: Any, where: str, *, on_host: bool = False) -> Any:
    """Return ``value`` with NumPy's numbers as plain ones, as :func:`.load_checkpoint` reads them again.

    Args:
        value: Part of a checkpoint, which is not changed.
        where: Its name in the checkpoint, for the message.
        on_host: Whether to copy tensors to host memory: who reads a folder puts them where they were, on one device.

    Raises:
        UserError: It holds what no checkpoint can hold, such as an array or an object.
    """
    if isinstance(value, np.generic) and not isinstance(value.item(), np.generic):
        return made_plain(value.item(), where, on_host=on_host)  # of a date an object, which is refused
    kind = type(value)
    if kind in MAPPINGS:
        return kind(
            {
                made_plain(key, where): made_plain(item, f"{where} > {key}", on_host=on_host)
                for key, item in value.items()
            }
        )
    if kind in COLLECTIONS:
        return kind(made_plain(item, where, on_host=on_host) for item in value)
    if on_host and isinstance(value, Tensor):
        return value.cpu()
    if kind in VALUES or isinstance(value, Tensor) or kind in torch.serialization.get_safe_globals():
        return value
    raise UserError(
        f"a checkpoint cannot hold {where}, which is of class {kind.__name__}: it is read without running code, and no "
        "run could resume from it. Return numbers, strings, lists, dictionaries or tensors from state_dict."
    )
