"""The kernels of packed weights: every instruction set against float64, and what is done without a compiler."""

import ctypes
import mmap
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from leap_pl.sparse import building, multiply
from leap_pl.sparse.packed_weight import PackedWeight

PLAIN = "plain torch"
DTYPES = [torch.bfloat16, torch.float16, torch.float32]

# Without it there is nothing to test; the fallback is what remains, and is tested too.
compiled = pytest.mark.skipif(not building.has_kernels(), reason="no C++ compiler")
PATHS = [*torch.ops.leap_pl.packed_paths(), PLAIN] if building.has_kernels() else [PLAIN]


def linear(x: Tensor, packed: PackedWeight, path: str, bias: Tensor | None = None) -> Tensor:
    parts = (packed.bitmap, packed.values, packed.starts, packed.scale, bias, packed.shape[-1])
    return multiply._linear(x, *parts) if path == PLAIN else torch.ops.leap_pl.packed_linear(x, *parts, path)


def unpack(packed: PackedWeight, path: str, dtype: torch.dtype) -> Tensor:
    parts = (packed.bitmap, packed.values, packed.starts, packed.scale, packed.shape[-1], dtype)
    return multiply._unpack(*parts) if path == PLAIN else torch.ops.leap_pl.packed_unpack(*parts, path)


def random_packed(
    rows: int, columns: int, density: float, seed: int = 0, *, dtype: torch.dtype = torch.bfloat16, int8: bool = False
) -> PackedWeight:
    draw = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, columns, generator=draw) < density
    mask[rows // 2] = False  # an empty row
    weight = torch.randn(rows, columns, generator=draw)
    weight[torch.rand(rows, columns, generator=draw) < 0.05] = 0  # kept all the same
    return PackedWeight.pack(weight.to(dtype), mask, int8=int8)


def assert_product(found: Tensor, x: Tensor, packed: PackedWeight, bias: Tensor | None = None) -> None:
    """Within the rounding of the result, and of sums in float32."""
    weight = packed.unpack().double()
    expected = x.double() @ weight.T + (0 if bias is None else bias.double())
    size = x.double().abs() @ weight.abs().T + (0 if bias is None else bias.double().abs())
    allowed = torch.finfo(found.dtype).eps * expected.abs() + 1e-5 * size
    if packed.scale is not None:  # where a dense weight is multiplied, scaled values are rounded to its dtype
        allowed += torch.finfo(found.dtype).eps * size
    assert found.dtype == x.dtype
    assert ((found.double() - expected).abs() <= allowed).all()


SHAPES = {
    "rows": st.integers(1, 40),
    "columns": st.integers(1, 300),
    "density": st.sampled_from([0, 0.03, 0.5, 0.9, 1]),
}


@settings(max_examples=40)
@given(**SHAPES, count=st.integers(1, 20), int8=st.booleans(), biased=st.booleans(), seed=st.integers(0, 99))
@pytest.mark.parametrize("path", PATHS)
def test_products_are_those_in_float64(
    path: str, rows: int, columns: int, density: float, count: int, int8: bool, biased: bool, seed: int
) -> None:
    packed = random_packed(rows, columns, density, seed, int8=int8)
    x = torch.randn(count, columns).bfloat16()
    bias = torch.randn(rows).bfloat16() if biased else None
    assert_product(linear(x, packed, path, bias), x, packed, bias)


@settings(max_examples=25)
@given(**SHAPES, int8=st.booleans(), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99))
@pytest.mark.parametrize("path", PATHS)
def test_unpacking_is_bit_for_bit_that_of_the_definition(
    path: str, rows: int, columns: int, density: float, int8: bool, dtype: torch.dtype, seed: int
) -> None:
    packed = random_packed(rows, columns, density, seed, dtype=dtype, int8=int8)
    assert torch.equal(unpack(packed, path, dtype), packed.unpack(dtype))


@pytest.mark.parametrize("path", PATHS)
def test_inputs_of_any_form(path: str) -> None:
    """Several dimensions, none, no element; not contiguous, at odd addresses; other data types; NaN beside them."""
    packed = random_packed(70, 45, 0.5)
    for x in (
        torch.randn(2, 3, 45),
        torch.randn(45),
        torch.randn(45, 4).T,
        torch.randn(4, 90)[:, ::2],
        torch.randn(181)[1:].view(4, 45),
        torch.full((4, 64), float("nan")).index_fill_(1, torch.arange(45), 0.5)[:, :45],
    ):
        found = linear(x.bfloat16(), packed, path)
        assert found.shape == (*x.shape[:-1], 70)
        assert_product(found, x.bfloat16(), packed)
    assert linear(torch.randn(0, 45).bfloat16(), packed, path).shape == (0, 70)
    for dtype in (torch.float32, torch.float16):
        other, x = random_packed(70, 45, 0.5, dtype=dtype), torch.randn(2, 45).to(dtype)
        assert_product(linear(x, other, path), x, other)


@compiled
@pytest.mark.parametrize("path", PATHS[:-1])
def test_a_result_does_not_depend_on_the_threads_nor_on_the_other_rows(path: str) -> None:
    packed, x = random_packed(900, 160, 0.5), torch.randn(7, 160).bfloat16()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = linear(x, packed, path)
        torch.set_num_threads(3)
        assert torch.equal(linear(x, packed, path), one)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(linear(x[:6], packed, path), one[:6])  # both are multiplied four at a time, and two


@compiled
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("path", PATHS[:-1])
def test_weights_of_several_panels_by_several_threads(path: str, int8: bool) -> None:
    """A panel has two million weights, and a thread takes 32,768 of them at a time."""
    packed, bias = random_packed(5000, 450, 0.5, int8=int8), torch.randn(5000).bfloat16()
    x = torch.randn(17, 450).bfloat16()  # more rows than are multiplied from the packed form
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        found, dense = linear(x, packed, path, bias), unpack(packed, path, torch.bfloat16)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(dense, packed.unpack(torch.bfloat16))
    assert_product(found, x, packed, bias)


@compiled
@pytest.mark.skipif(sys.platform != "linux", reason="pages are protected by Linux's call")
@pytest.mark.parametrize("path", PATHS[:-1])
def test_nothing_is_read_beyond_the_values_and_the_bitmap(path: str) -> None:
    """The page behind each of them cannot be read: a kernel that does ends the process."""
    held: list[Any] = []

    def guarded(tensor: Tensor) -> Tensor:
        pages = -(-tensor.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        area = mmap.mmap(-1, pages + mmap.PAGESIZE)
        held.append(area)
        address = ctypes.addressof(ctypes.c_char.from_buffer(area))
        moved = torch.frombuffer(area, dtype=tensor.dtype, count=tensor.numel(), offset=pages - tensor.nbytes)
        moved = moved.view(tensor.shape).copy_(tensor)
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + pages), mmap.PAGESIZE, 0) == 0
        return moved

    for columns, density, int8 in ((64, 1.0, False), (64, 0.5, False), (50, 0.02, False), (64, 0.5, True)):
        packed = random_packed(9, columns, density, int8=int8)
        packed = PackedWeight(guarded(packed.bitmap), guarded(packed.values), packed.scale, packed.shape, packed.starts)
        for count in (1, 3, 16):
            x = guarded(torch.randn(count, columns).bfloat16())
            assert_product(linear(x, packed, path), x, packed)
        assert torch.equal(unpack(packed, path, torch.float32), packed.unpack(torch.float32))


@compiled
def test_tensors_that_do_not_fit_together_are_refused() -> None:
    packed, x = random_packed(6, 40, 0.5), torch.randn(2, 40).bfloat16()
    parts = {"bitmap": packed.bitmap, "values": packed.values, "starts": packed.starts, "scale": None, "bias": None}
    wrong: dict[str, Any] = {
        "values": packed.values[:-1],
        "starts": packed.starts[:-1],
        "bitmap": packed.bitmap[:, :1].contiguous(),
        "scale": torch.ones(5),
    }
    for name, tensor in wrong.items():
        with pytest.raises(RuntimeError, match=name if name != "values" else "starts"):
            torch.ops.leap_pl.packed_linear(x, *(parts | {name: tensor}).values(), 40)
    with pytest.raises(RuntimeError, match="input"):
        torch.ops.leap_pl.packed_linear(x[:, :39], *parts.values(), 40)
    with pytest.raises(RuntimeError, match="no instruction set 'neon'"):
        torch.ops.leap_pl.packed_linear(x, *parts.values(), 40, "neon")


@pytest.mark.parametrize("name", ["packed_linear", "packed_unpack"])
def test_operators_are_what_torch_compile_needs(name: str) -> None:
    packed = random_packed(6, 40, 0.5, int8=True)
    parts: tuple[Any, ...] = (packed.bitmap, packed.values, packed.starts, packed.scale)
    if name == "packed_linear":
        parts = (torch.randn(2, 3, 40).bfloat16(), *parts, torch.randn(6).bfloat16(), 40)
    else:
        parts = (*parts, 40, torch.bfloat16)
    operator = getattr(torch.ops.leap_pl, name).default
    torch.library.opcheck(operator, parts, test_utils=("test_schema", "test_faketensor"))


# -- without a compiler ------------------------------------------------------------------------------------

WITHOUT = """
import warnings, torch
from leap_pl.sparse import multiply
from leap_pl.sparse.packed_linear import PackedLinear, worth_packing
from leap_pl.sparse.packed_weight import PackedWeight
weight = torch.randn(8, 64).bfloat16()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    layers = [PackedLinear(PackedWeight.pack(weight, weight > 0)) for _ in range(2)]
    x = torch.randn(1, 64).bfloat16()
    assert all(torch.equal(layer(x), torch.nn.functional.linear(x, weight.relu())) for layer in layers)
    assert not worth_packing(8192, 8192, 0.3, torch.bfloat16, torch.device("cpu"))
print([str(warning.message) for warning in caught])
"""


@pytest.mark.parametrize(("variable", "value"), [("CXX", "false"), ("LEAP_PL_COMPILE", "0")])
def test_without_a_compiler_plain_torch_and_one_warning(variable: str, value: str, tmp_path: Path) -> None:
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), variable: value}
    done = subprocess.run([sys.executable, "-c", WITHOUT], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    messages = eval(done.stdout)
    assert len(messages) == (variable == "CXX")
    assert all("Install a C++ compiler" in message for message in messages)


def test_one_process_compiles_and_the_others_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And one that fails leaves nothing that the next one would load."""
    calls, compiler = tmp_path / "calls", tmp_path / "c++"
    compiler.write_text(
        f"#!/bin/sh\n[ $1 = --version ] && exit\necho >> {calls}\nsleep 0.2\n"
        f'[ -e {tmp_path}/broken ] && {{ echo "error: broken" >&2; exit 1; }}\n'
        'while [ "$1" != -o ]; do shift; done\necho made > "$2"\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", f"/usr/bin/env {compiler}")  # several words, as with ccache
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "broken").touch()
    with pytest.raises(RuntimeError, match="error: broken"):
        building.library()
    (tmp_path / "broken").unlink()
    with ThreadPoolExecutor(3) as pool:
        made = {future.result() for future in [pool.submit(building.library) for _ in range(3)]}
    assert [path.read_text() for path in made] == ["made\n"]
    assert len(calls.read_text()) == 2
    assert {path.name for path in made.pop().parent.iterdir()} == {"decode.so", "lock"}


def test_a_damaged_library_is_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tmp_path / "decode.so"
    loaded: list[str] = []

    def compiled() -> Path:
        if not made.exists():
            made.write_text("whole")
        return made

    def load(path: Path) -> None:
        loaded.append(path.read_text())
        if loaded[-1] != "whole":
            raise OSError("file too short")

    monkeypatch.delenv("LEAP_PL_COMPILE", raising=False)
    monkeypatch.setattr(building, "library", compiled)
    monkeypatch.setattr(torch.ops, "load_library", load)
    made.write_text("dam")
    assert building.has_kernels.__wrapped__()
    assert loaded == ["dam", "whole"]


@compiled
def test_kernels_are_compiled_where_no_cache_can_be_written(tmp_path: Path) -> None:
    """As in a container whose home may only be read."""
    script = "from leap_pl.sparse.building import has_kernels; raise SystemExit(not has_kernels())"
    environment = os.environ | {"XDG_CACHE_HOME": "/dev/null/x", "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.glob("leap_pl-kernels-*"))  # of the process alone


@pytest.mark.parametrize("home", ["", "relative"])
def test_a_cache_is_not_looked_for_in_the_working_directory(
    home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", home)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(building, "_compile", lambda _, made: made.write_text("own"))
    assert building.library().is_relative_to(tmp_path / "home" / ".cache")
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


@pytest.mark.parametrize("home", [".", "relative"])
def test_a_home_in_the_working_directory_is_none(home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies there, as in a clone, is this user's file, and anyone may have written it."""
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", home)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(building, "_compile", lambda _, made: made.write_text("own"))
    place = building.library()
    assert place.is_absolute()
    assert not place.is_relative_to(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_library_that_others_could_have_written_is_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a cache that users of a machine share."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls = []

    def compiled(command: list[str], **_: Any) -> SimpleNamespace:
        """Stand for a linker, whose file goes by the umask."""
        if "-o" in command:
            calls.append(command[-1])
            Path(command[-1]).write_text("own")
            Path(command[-1]).chmod(0o775)
        return SimpleNamespace(stdout="", stderr="", returncode=0)

    monkeypatch.setattr(building.subprocess, "run", compiled)
    made = building.library()
    assert building.library() == made
    assert len(calls) == 1
    made.write_text("another's")
    assert building.library().read_text() == "another's"  # by all signs it is this user's
    made.chmod(0o666)
    assert building.library().read_text() == "own"
    made.parent.chmod(0o777)
    assert building.library() == made
    assert made.parent.stat().st_mode & 0o777 == 0o700  # as earlier versions made it, under another umask
    made.unlink()
    made.symlink_to("/etc/hostname")
    assert building.library().read_text() == "own"
    monkeypatch.setattr(building.os, "getuid", lambda: 12345)
    found = os.lstat(made)
    monkeypatch.setattr(Path, "lstat", lambda _: SimpleNamespace(st_uid=54321, st_mode=found.st_mode))
    assert not building.library().is_relative_to(tmp_path)
