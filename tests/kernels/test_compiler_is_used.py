"""With a compiler, kernels are compiled: tests of each skip where the package says that they cannot be."""

import shutil

import pytest
import torch

from leap_pl.kernels.compiled import can_compile
from leap_pl.sparse.building import has_kernels


@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="there is no C++ compiler")
def test_kernels_are_compiled_where_there_is_a_compiler() -> None:
    assert can_compile(torch.device("cpu"))
    assert has_kernels()
