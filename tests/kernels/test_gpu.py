"""The Triton kernels without a GPU: their cases in the interpreter, and their code for GPUs of several generations."""

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import leap_pl.kernels.gpu as gpu
from leap_pl.errors import warn_once

HERE = Path(__file__).parent


def test_in_the_interpreter(tmp_path: Path) -> None:
    """In a process of its own: a kernel is interpreted or compiled from the moment of its definition on."""
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--rootdir", str(HERE)]
    words += [
        str(HERE / "cases_interpreter.py"),
        "--basetemp",
        str(tmp_path / "cases"),
        "-c",
        str(HERE.parents[1] / "pyproject.toml"),
    ]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    kept["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), *filter(None, [kept.get("PYTHONPATH")])])
    done = subprocess.run(words, env=kept | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-12000:] + done.stderr[-2000:]


GENERATIONS = [80, 90]  # A100, H100


SHARED = 99 * 1024  # bytes of shared memory that a program may have on the GPUs with least: RTX 4090, L4, A10


def code(kernel: Any, signature: dict[str, Any], generation: int, *, even: tuple[str, ...] = (), **options: Any) -> str:
    """The PTX of a kernel; assembled to machine code too, which fails for registers that a GPU lacks.

    Of ``even`` arguments Triton is told that 16 divides them, as it finds where a kernel is launched: wide loads are
    then buffered in shared memory, which must be there.
    """
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kinds = {name: kind if isinstance(kind, (str, tuple)) else "constexpr" for name, kind in signature.items()}
    fixed = {name: kind for name, kind in signature.items() if not isinstance(kind, (str, tuple))}
    attributes = {(list(signature).index(name),): [["tt.divisibility", 16]] for name in even}
    source = ASTSource(fn=kernel, signature=kinds, constexprs=fixed, attrs=attributes)
    made = compile_kernel(source, target=GPUTarget("cuda", generation, 32), options=options)
    assert made.asm["cubin"]
    assert made.metadata.shared <= SHARED
    return made.asm["ptx"]


def of_a_block(count: int, *, backward: bool, aligned: bool) -> dict[str, Any]:
    from leap_pl.kernels.gpu import masks

    pointers: dict[str, Any] = {"logits": ("*fp32",) * count, "weights": ("*bf16",) * count}
    if backward:
        pointers |= {"grads_masked": ("*bf16",) * count, "grad_sums": "*fp32", "grads": ("*fp32",) * count}
    else:
        pointers |= {"masked": ("*bf16",) * count, "partials": "*fp32"}
    numbers = dict.fromkeys(("heights", "widths", "keys_0", "keys_1"), ("i64",) * count)
    sizes = {"COUNT": count, "ROWS": masks.ROWS, "COLUMNS": masks.COLUMNS, "ALIGNED": aligned}
    starts = {"starts": ("i64",) * (count + 1)}
    return pointers | starts | numbers | {"slope": "fp32", "sharpness": "fp32"} | sizes


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("backward", [False, True])
def test_masks_compile_to_exact_arithmetic_and_wide_loads(backward: bool, generation: int) -> None:
    from leap_pl.kernels.gpu import masks, noise

    kernel = masks._backward if backward else masks._forward
    ptx = code(kernel, of_a_block(7, backward=backward, aligned=True), generation, **noise.EXACT)
    assert "fma." not in ptx  # else the noise would differ from that of other devices in its last bits
    assert "div.full" not in ptx
    assert "div.rn" in ptx
    loads, stores = (re.findall(rf"{kind}\.global\S*", ptx) for kind in ("ld", "st"))
    # One weight's addresses, selected before the loads: not the loads of each of seven weights.
    wide = [load for load in loads if "v4" in load]
    assert 4 <= len(wide) <= 10
    assert len(loads) - len(wide) <= 2  # the gradients of the two sums
    assert [store for store in stores if "v4" in store]


@pytest.mark.parametrize("generation", GENERATIONS)
def test_the_other_kernels_compile(generation: int) -> None:
    from leap_pl.kernels.gpu import losses, masks

    code(masks._forward, of_a_block(2, backward=False, aligned=False), generation, enable_fp_fusion=False)
    sums = {"partials": "*fp32", "sums": "*fp32", "starts": ("i64",) * 8, "programs": "i64", "COUNT": 7, "CHUNK": 256}
    code(masks._add, sums, generation)
    lm = {"logits": "*bf16", "targets": "*i32", "losses": "*fp32", "grads": "*bf16", "lm": "fp32", "vocabulary": "i32"}
    code(losses._lm, lm | {"BLOCK": losses.BLOCK}, generation, num_warps=8)
    names = dict.fromkeys(("logits", "teachers"), "*bf16") | {"targets": "*i32"}
    names |= dict.fromkeys(("losses", "divergences"), "*fp32") | {"grads": "*bf16"}
    names |= dict.fromkeys(("lm", "distillation", "temperature"), "fp32") | {"vocabulary": "i32"}
    code(losses._distillation, names | {"BLOCK": losses.BLOCK}, generation, num_warps=8)


@pytest.mark.parametrize(("one", "generation"), zip((True, False), GENERATIONS, strict=True))
def test_packed_products_compile(one: bool, generation: int) -> None:
    from leap_pl.kernels.gpu import packed

    weight = {"bitmap": "*i32", "values": "*bf16", "starts": "*i64"}
    numbers = dict.fromkeys(("rows", "columns", "words"), "i32")
    sizes = {"ROWS": 4 if one else packed.TILE, "COLUMNS": packed.COLUMNS, "WORDS": packed.WORDS}
    more = dict.fromkeys(("part_words", "count"), "i32") | {"ONE": one, "TILE": packed.TILE}
    ptx = code(packed._multiply, {"x": "*bf16"} | weight | {"partials": "*fp32"} | numbers | more | sizes, generation)
    if not one:
        assert "mma" in ptx
        return
    code(packed._unpack, weight | {"out": "*bf16"} | numbers | sizes, generation)


@pytest.mark.parametrize("generation", [80, 89, 90, 120])
@pytest.mark.parametrize("values", ["*bf16", "*fp32", "*i8"])
def test_packed_products_fit_into_shared_memory_as_they_are_launched(values: str, generation: int) -> None:
    from leap_pl.kernels.gpu import packed

    inputs = "*fp32" if values == "*fp32" else "*bf16"
    given = {"x": inputs, "bitmap": "*i32", "values": values, "starts": "*i64", "partials": "*fp32"}
    given |= dict.fromkeys(("rows", "columns", "words", "part_words", "count"), "i32")
    sizes = {"ONE": False, "TILE": packed.TILE, "ROWS": packed.TILE, "COLUMNS": packed.COLUMNS, "WORDS": packed.WORDS}
    order = [name for name in packed._multiply.arg_names if name in given or name in sizes]
    code(
        packed._multiply,
        {name: (given | sizes)[name] for name in order},
        generation,
        even=("x", "bitmap", "values", "starts", "partials", "columns", "words"),
    )


def test_new_keys_are_no_new_kernel() -> None:
    """Triton compiles again for an integer of 1, and for one that 16 divides, unless it is told not to."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime.jit import create_function_from_signature

    from leap_pl.kernels.gpu import masks

    backend = CUDABackend(GPUTarget("cuda", 90, 32))
    for kernel in (masks._forward, masks._backward):
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        tensor = SimpleNamespace(dtype=torch.float32, data_ptr=lambda: 1024)

        def kind(keys: tuple[int, ...], bind: Any = bind, kernel: Any = kernel, tensor: Any = tensor) -> Any:
            given: dict[str, Any] = dict.fromkeys(
                ("logits", "weights", "masked", "grads_masked", "grads"), (tensor, tensor)
            )
            given |= {
                "partials": tensor,
                "grad_sums": tensor,
                "starts": (masks.unspecialized(0),) * 3,
                "slope": 1.0,
                "sharpness": 2.0,
            }
            given |= dict.fromkeys(("heights", "widths", "keys_0", "keys_1"), tuple(map(masks.unspecialized, keys)))
            given |= {"COUNT": 2, "ROWS": 8, "COLUMNS": 256, "ALIGNED": True}
            return bind(*(given[name] for name in kernel.signature.parameters))[1]

        assert kind((5, 7)) == kind((1, 16)) == kind((-(2**31), 2**31 - 1)) == kind((0, -16))


def test_a_gpu_without_bfloat16_leaves_the_eager_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """A T4, for which Triton would build the kernel that is tried, in float32, and fail at those of a step."""
    monkeypatch.delenv("LEAP_PL_COMPILE", raising=False)
    monkeypatch.setattr(gpu, "_works", lambda device: True)
    warn_once.cache_clear()
    device = torch.device("cuda", 0)
    for version, capability, expected in ((None, (7, 5), False), (None, (8, 0), True), ("6.4", (7, 5), True)):
        gpu._is_new_enough.cache_clear()
        monkeypatch.setattr(torch.version, "hip", version)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert gpu.has_kernels(device) == expected
        assert [str(one.message) for one in caught if "and cuda:0 has 7.5" in str(one.message)] == [
            str(one.message) for one in caught
        ]
        assert bool(caught) != expected
    gpu._is_new_enough.cache_clear()
    warn_once.cache_clear()


def test_a_full_gpu_says_nothing_of_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(gpu, "DEVICES", {"cpu"})
    monkeypatch.delenv("LEAP_PL_COMPILE", raising=False)
    gpu._works.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "zeros", full)
        with pytest.raises(torch.OutOfMemoryError):
            gpu.has_kernels(torch.device("cpu"))
    assert gpu._works.cache_info().currsize == 0


def test_a_triton_that_cannot_build_leaves_the_eager_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a C compiler, for example: here, without a GPU, there is no kernel for the device."""
    monkeypatch.setattr(gpu, "DEVICES", {"cpu"})
    monkeypatch.delenv("LEAP_PL_COMPILE", raising=False)
    gpu._works.cache_clear()
    warn_once.cache_clear()
    with pytest.warns(UserWarning, match=r"Triton builds no kernels that work here .*apt-get install gcc python3-dev"):
        assert not gpu.has_kernels(torch.device("cpu"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not gpu.has_kernels(torch.device("cpu"))  # once
    gpu._works.cache_clear()
    warn_once.cache_clear()


def test_a_triton_that_cannot_be_imported_leaves_the_eager_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise OSError("libtriton.so: version `GLIBC_2.38' not found")

    monkeypatch.setattr(gpu, "importlib", SimpleNamespace(import_module=broken))
    gpu._found.cache_clear()
    warn_once.cache_clear()
    with pytest.warns(UserWarning, match=r"Triton cannot be imported \(libtriton\.so: .* not found\), so gates and"):
        assert not gpu._found()
    gpu._found.cache_clear()
    warn_once.cache_clear()
