"""Kernels that are called past torch.compile's checks: only where those would have found nothing new."""

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from leap_pl.kernels import compiled as compiling
from leap_pl.kernels.compiled import OPTIONS, can_compile
from leap_pl.kernels.direct import DirectKernel


def scaled(x_RC: Tensor, y_RC: Tensor, by: Tensor, twice: bool = False) -> tuple[Tensor, Tensor]:
    product_RC = x_RC.float() * y_RC.float() * by
    if twice:
        product_RC = product_RC * 2
    return product_RC.to(x_RC.dtype), product_RC.sum()


def shifted(x_RC: Tensor, by: Tensor) -> Tensor:
    return x_RC + by


def given_back(x_RC: Tensor, by: Tensor) -> tuple[Tensor, Tensor]:
    return x_RC, x_RC + by


@pytest.fixture(scope="module")
def make() -> Iterator[Callable[[Any], DirectKernel]]:
    """Makes kernels; nothing where torch.compile does not work."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("LEAP_PL_COMPILE", raising=False)
        if not can_compile(torch.device("cpu")):
            pytest.skip("torch.compile does not work here")
        with torch._dynamo.config.patch(recompile_limit=100):  # these tests have more kinds than a run has
            yield lambda kernel: DirectKernel(kernel, OPTIONS)


@pytest.fixture(scope="module")
def scale(make: Callable[[Any], DirectKernel]) -> DirectKernel:
    return make(scaled)


def checked(kernel: DirectKernel, *arguments: Any) -> bool:
    """Whether a call goes through torch.compile; what it returns is compared with the kernel as it is written."""
    before, calls = kernel._checked, list[Any]()

    def count(*given: Any) -> Any:
        calls.append(given)
        return before(*given)

    kernel._checked = count
    try:
        (found,) = kernel([arguments])
    finally:
        kernel._checked = before
    torch.testing.assert_close(found, scaled(*arguments))
    return bool(calls)


def test_the_second_call_of_a_kind_is_direct_and_reads_its_own_arguments(scale: DirectKernel) -> None:
    kind = (torch.randn(5, 40), torch.randn(5, 40), torch.tensor(2.0))
    assert checked(scale, *kind)
    for _ in range(3):
        assert not checked(scale, torch.randn(5, 40), torch.randn(5, 40), torch.randn(()))


def test_whatever_torch_compile_checks_makes_another_kind(scale: DirectKernel) -> None:
    x, y, by = torch.randn(6, 50), torch.randn(6, 50), torch.tensor(2.0)
    checked(scale, x, y, by)
    assert not checked(scale, x, y, by)
    assert checked(scale, torch.randn(7, 50), torch.randn(7, 50), by)
    assert checked(scale, x, torch.randn(50, 6).T, by)
    assert checked(scale, x.to(torch.bfloat16), y, by)
    assert checked(scale, x, y, by.double())
    assert checked(scale, x, y, by, True)
    with torch.no_grad():
        assert checked(scale, x, y, by)
    with torch.autocast("cpu", torch.bfloat16):
        assert checked(scale, x, y, by)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)  # compiled code has a place for each thread's sum
        assert checked(scale, x, y, by)
    finally:
        torch.set_num_threads(threads)
    assert not checked(scale, x, y, by)


@settings(deadline=None, max_examples=30)
@given(
    calls=st.lists(
        st.tuples(st.integers(2, 4), st.integers(2, 40), st.booleans(), st.booleans(), st.booleans()),
        min_size=1,
        max_size=8,
    )
)
def test_in_any_order_of_kinds_it_is_the_kernel(
    scale: DirectKernel, calls: list[tuple[int, int, bool, bool, bool]]
) -> None:
    for rows, length, low, across, twice in calls:
        x = torch.randn(rows, length, dtype=torch.bfloat16 if low else torch.float32)
        y = torch.randn(length, rows).T if across else torch.randn(rows, length)
        (found,) = scale([(x, y, torch.tensor(3.0), twice)])
        torch.testing.assert_close(found, scaled(x, y, torch.tensor(3.0), twice), atol=1e-3, rtol=0.01)


@settings(deadline=None, max_examples=20)
@given(
    calls=st.lists(st.tuples(st.integers(2, 4), st.integers(2, 9), st.booleans()), min_size=1, max_size=6),
    shared=st.booleans(),
)
def test_several_calls_at_once_are_those_calls(
    scale: DirectKernel, calls: list[tuple[int, int, bool]], shared: bool
) -> None:
    """Arguments that several calls share are looked at once, and calls of several kinds may stand side by side."""
    by = (torch.tensor(3.0),)
    given_calls: list[tuple[Any, ...]] = [
        (torch.randn(r, c, dtype=torch.bfloat16 if low else torch.float32), torch.randn(r, c)) for r, c, low in calls
    ]
    results = scale(given_calls, by) if shared else scale([(*arguments, by[0] * 1) for arguments in given_calls])
    for found, arguments in zip(results, given_calls, strict=True):
        torch.testing.assert_close(found, scaled(*arguments, *by), atol=1e-3, rtol=0.01)


def test_only_the_arguments_that_vary_make_another_kind(make: Callable[[Any], DirectKernel]) -> None:
    kernel = DirectKernel(scaled, OPTIONS, varying=1)
    for rows, length, again in ((3, 20, False), (5, 20, False), (3, 20, True)):
        kind = torch.randn(rows, length), torch.randn(rows, length), torch.randn(())
        assert checked(kernel, *kind) is not again
    by = torch.tensor(2.0)
    double = by.double()
    for shared, again in ((by, False), (by, True), (double, False), (double, True)):  # what calls share is looked at
        before = kernel._checked
        kernel._checked = fail if again else before
        try:
            ((found, _),) = kernel([(torch.ones(3, 20), torch.ones(3, 20))], (shared,))
        finally:
            kernel._checked = before
        assert torch.equal(found, torch.full((3, 20), 2.0))


def fail(*_: Any) -> None:
    raise AssertionError("checked again")


def test_one_output_and_two_come_back_as_the_kernel_gives_them(make: Callable[[Any], DirectKernel]) -> None:
    shift, x = make(shifted), torch.randn(4, 30)
    for by in (torch.tensor(1.0), torch.tensor(2.0)):
        assert torch.equal(*shift([(x, by)]), x + by)


def test_a_kernel_that_is_more_than_its_graph_is_never_called_directly(make: Callable[[Any], DirectKernel]) -> None:
    """An argument that is given back is no output of the graph, and one given twice could be either."""
    back, x = make(given_back), torch.randn(4, 30)
    for by in (torch.tensor(1.0), torch.tensor(2.0)):
        ((first, second),) = back([(x, by)])
        assert first is x
        assert torch.equal(second, x + by)
    assert not any(back._calls.values())
    twice = make(scaled)
    twice([(x, x, torch.tensor(1.0))])
    assert not any(twice._calls.values())
    y = torch.randn(4, 30)
    for _ in range(2):
        torch.testing.assert_close(twice([(x, y, torch.tensor(1.0))])[0], scaled(x, y, torch.tensor(1.0)))


def files_of_python(run: Callable[[], Any]) -> set[Path]:
    """The files of all Python functions that ``run`` calls."""
    files = set[Path]()

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            files.add(Path(frame.f_code.co_filename))

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(before)
    return files - {Path(__file__)}


def test_a_direct_call_is_one_of_the_generated_code(make: Callable[[Any], DirectKernel]) -> None:
    """Between a kind's lookup and the code that inductor wrote for the kernel there is no Python of torch."""
    kernel = make(scaled)
    arguments = torch.randn(4, 30), torch.randn(4, 30), torch.tensor(2.0)
    kernel([arguments])
    ((call,),) = (known.values() for known in kernel._calls.values())
    inputs = list(call.order(arguments + call.fixed))
    (generated,) = files_of_python(lambda: call.graph(inputs))
    assert "cpp_fused" in generated.read_text(encoding="utf-8")


def test_of_a_torch_that_makes_other_code_every_call_goes_through_it(
    make: Callable[[Any], DirectKernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What inductor makes has no ``current_callable`` there to be called, or to be told of calls by."""
    from torch._inductor import compile_fx

    before = compile_fx.compile_fx_inner

    class Other:
        _boxed_call = True

        def __init__(self, *arguments: Any, **settings: Any) -> None:
            self.code = before(*arguments, **settings)

        def __call__(self, inputs: Sequence[Any]) -> Any:
            return self.code(inputs)

    monkeypatch.setattr(compile_fx, "compile_fx_inner", Other)
    kernel = make(scaled)
    for _ in range(3):
        assert checked(kernel, torch.randn(4, 30), torch.randn(4, 30), torch.randn(()))
    assert not any(kernel._calls.values())


def test_only_code_for_a_cpu_is_called_directly(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    monkeypatch.setattr(compiling, "_try", lambda backend, device: tried.append((backend.__name__, device.type)))
    assert compiling._find_backend(torch.device("cpu")) is DirectKernel
    assert compiling._find_backend(torch.device("cuda")) is compiling._torch_compile
    assert tried == [("DirectKernel", "cpu"), ("_torch_compile", "cuda")]


def test_a_kernel_has_more_variants_than_torch_allows_by_default() -> None:
    """A notebook that runs several modules has them: data types of weights and logits, widths, precisions."""
    from leap_pl.kernels.inductor import compile_and_note

    def doubled(x: torch.Tensor, times: int) -> torch.Tensor:
        return x * (2 + times)

    kernel = compile_and_note(doubled, {}, lambda *_: None)
    dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.int32)
    for dtype in dtypes:
        for dimensions in (1, 2):
            found = kernel(torch.ones((3,) * dimensions, dtype=dtype), 0)
            assert torch.equal(found, torch.full((3,) * dimensions, 2, dtype=dtype))
