"""Safetensors files written one tensor at a time are read by the safetensors library."""

import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from leap_pl.files.tensor_file import DTYPE_NAMES, write_tensors

TENSORS = {f"of {name}": torch.arange(6).reshape(2, 3).to(dtype) for dtype, name in DTYPE_NAMES.items()} | {
    "transposed": torch.randn(4, 3).t(),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 4),
    'Zürich\n"é"': torch.randn(5).bfloat16(),
}
LAYOUT = {name: (tensor.dtype, tensor.shape) for name, tensor in sorted(TENSORS.items())}


def test_the_library_reads_them(tmp_path: Path) -> None:
    """In whatever order they come, with metadata that is known only in the end."""
    state = "unknown"

    def tensors() -> Iterator[tuple[str, Tensor]]:
        nonlocal state
        yield from reversed(TENSORS.items())
        state = "known  "

    write_tensors(tmp_path / "one", LAYOUT, tensors(), lambda: {"state": state, "of": "ü"})
    with safe_open(tmp_path / "one", framework="pt") as file:
        assert file.metadata() == {"state": "known  ", "of": "ü"}
        assert {*file.keys()} == {*TENSORS}
        for name, tensor in TENSORS.items():
            read = file.get_tensor(name)
            assert read.dtype == tensor.dtype
            assert torch.equal(read, tensor)
    write_tensors(tmp_path / "other", LAYOUT, TENSORS.items(), lambda: {"state": state, "of": "ü"})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


def test_one_is_in_memory_at_a_time(tmp_path: Path) -> None:
    last: list[weakref.ref[Tensor]] = []

    def fresh(name: str) -> Tensor:
        assert not last or last.pop()() is None
        tensor = TENSORS[name].clone()
        last.append(weakref.ref(tensor))
        return tensor

    write_tensors(tmp_path / "file", LAYOUT, ((name, fresh(name)) for name in LAYOUT), dict)


@pytest.mark.parametrize("wrong", [torch.zeros(2, 3).half(), torch.zeros(3, 2)], ids=["dtype", "shape"])
def test_a_tensor_that_is_not_as_the_header_says(wrong: Tensor, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a is .*, and its place is for"):
        write_tensors(tmp_path / "file", {"a": (torch.float32, [2, 3])}, [("a", wrong)], dict)


def test_a_file_that_would_be_damaged(tmp_path: Path) -> None:
    layout = {name: (torch.float32, [1]) for name in ("a", "b")}
    with pytest.raises(ValueError, match="no tensor was given for b"):
        write_tensors(tmp_path / "file", layout, [("a", torch.ones(1))], dict)
    longer = iter(("x", "x" * 9))
    with pytest.raises(ValueError, match="length of the header"):
        write_tensors(
            tmp_path / "file", layout, [(name, torch.ones(1)) for name in layout], lambda: {"k": next(longer)}
        )
