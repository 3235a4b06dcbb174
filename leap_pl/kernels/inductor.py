"""Behind torch.compile: the code that it has compiled, and what it makes of equal sizes.

The one place where kernels use what torch keeps to itself. Whether it is there is found out when it is first used:
:mod:`leap_pl.kernels.compiled` falls back on torch.compile alone.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from leap_pl.errors import warn_once

Graph = Callable[[list[Any]], Sequence[Any]]  # empties the list it is given
Note = Callable[[Graph, Sequence[Any], Sequence[Any]], None]  # a compiled graph, its inputs, its outputs


def compile_and_note(kernel: Callable[..., Any], options: Mapping[str, Any], note: Note) -> Callable[..., Any]:
    """Compile ``kernel`` by torch.compile, for every size, with inductor's ``options``.

    Returns:
        What torch.compile makes of it, which tells ``note`` of each call of a compiled graph that a call comes down to.
    """

    def backend(graph: torch.fx.GraphModule, examples: Sequence[Any]) -> Any:
        from torch._functorch import config as tracing
        from torch._inductor.compile_fx import compile_fx  # of use only where there is a compiler, and slow to import

        # A graph from the cache of what is traced would come past finish. The cache of compiled code is the other one.
        with tracing.patch(enable_autograd_cache=False):
            return compile_fx(graph, list(examples), inner_compile=finish, config_patches=dict(options))

    def finish(*arguments: Any, **settings: Any) -> Any:
        from torch._inductor.compile_fx import compile_fx_inner

        code: Any = compile_fx_inner(*arguments, **settings)
        run: Graph | None = getattr(code, "current_callable", None)
        if run is None:
            warn_once(
                f"torch {torch.__version__} does not show the code that it compiles: gates are called by way of "
                "torch.compile each time, which takes longer."
            )
            return code

        def noting(inputs: list[Any]) -> Sequence[Any]:
            given = tuple(inputs)
            outputs = run(inputs)
            note(run, given, outputs)
            return outputs

        code.current_callable = noting
        return code

    return torch.compile(kernel, dynamic=True, fullgraph=True, backend=backend)


def sizes_apart() -> AbstractContextManager[Any]:
    """Let torch.compile take sizes that are equal in a call for different ones, which they may be in the next.

    Where it cannot be told so, it compiles anew when they are.
    """
    try:
        from torch.fx.experimental import _config as symbols

        return symbols.patch(use_duck_shape=False)  # type: ignore[attr-defined]
    except (ImportError, AttributeError):
        return nullcontext()
