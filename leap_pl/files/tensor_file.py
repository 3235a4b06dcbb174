"""Safetensors files written one tensor at a time, where the safetensors library needs all of them in memory."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from leap_pl.errors import UserError, one_line
from leap_pl.inputs.plain_values import shown

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_tensors(
    path: Path,
    layout: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Callable[[], Mapping[str, str]],
) -> None:
    """Write the safetensors file ``path``, in place; the same arguments give the same bytes.

    Args:
        path: File to write, as a rule the temporary path of :func:`leap_pl.files.atomic_file`.
        layout: Name → dtype and shape, in the order that the tensors have in the file.
        tensors: Each name of ``layout`` with its tensor, in any order, on the CPU.
        metadata: Function that returns the header's metadata. Values may depend on the tensors, as a digest does: it is
            called before the first tensor and again after the last, and must return as many bytes.

    Raises:
        ValueError: A tensor is missing, or has another dtype or shape than in ``layout``; or the length of the header
            has changed.
        OSError: The file cannot be written.
    """
    header, places = _header(layout, metadata())
    with path.open("wb") as file:
        file.write(header)
        for name, tensor in tensors:
            if (tensor.dtype, tuple(tensor.shape)) != (layout[name][0], tuple(layout[name][1])):
                raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, and its place is for {layout[name]}")
            file.seek(places.pop(name))
            file.write(tensor_bytes(tensor))
            del tensor  # before the next one is computed
        if places:
            raise ValueError(f"no tensor was given for {', '.join(places)}")
        complete, _ = _header(layout, metadata())
        if len(complete) != len(header):
            raise ValueError("the length of the header has changed")
        file.seek(0)
        file.write(complete)


def tensor_bytes(tensor: Tensor) -> Any:
    """Return the bytes of a tensor on the CPU as an object that can be written and hashed, without a copy."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy() if tensor.numel() else b""


def _header(
    layout: Mapping[str, tuple[torch.dtype, Sequence[int]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """Return the header, and the place of each tensor in the file."""
    header: dict[str, Any] = {"__metadata__": metadata}
    places, end = {}, 0
    for name, (dtype, shape) in layout.items():
        places[name], end = end, end + prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [places[name], end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: start + place for name, place in places.items()}


@contextmanager
def damage_in_one_line(file: Path, remedy: str) -> Iterator[None]:
    """Convert what reading a damaged safetensors file raises into one line that ends with ``remedy``.

    Raises:
        UserError: The file is truncated or damaged.
    """
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = shown(one_line(error), 300)
        raise UserError(f"{file} is truncated or damaged ({reason}). {remedy}") from error
