"""Private interface of torch: the number of the backward pass that is running.

No other module of the kernels and gates asks for it. Without it, the gates of a decoder block are computed one by one.
"""

from torch import _C

NONE = -1  # no backward pass is running

_number = getattr(_C, "_current_graph_task_id", None)  # torch.utils.checkpoint uses it


def known() -> bool:
    """Return whether this version of torch numbers its backward passes."""
    return _number is not None


def running() -> int:
    """Return the number of the backward pass that runs in this thread, or NONE."""
    return NONE if _number is None else int(_number())
