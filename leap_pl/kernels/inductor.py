"""Private interfaces of torch.compile: its compiled graphs, and its handling of equal sizes.

No other module of the kernels but :mod:`leap_pl.kernels.backward_pass` uses private interfaces of torch. If one is
missing, its first use fails, and :mod:`leap_pl.kernels.compiled` falls back to plain torch.compile.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from leap_pl.errors import warn_once

VARIANTS = 64  # of one kernel in a process

Graph = Callable[[list[Any]], Sequence[Any]]  # clears the list that it receives
Note = Callable[[Graph, Sequence[Any], Sequence[Any]], None]  # called with a compiled graph, its inputs, its outputs


def compile_and_note(kernel: Callable[..., Any], options: Mapping[str, Any], note: Note) -> Callable[..., Any]:
    """Compile ``kernel`` with torch.compile for dynamic sizes, with inductor's ``options``.

    Returns:
        The compiled kernel, which calls ``note`` after each call of a compiled graph.
    """

    def backend(graph: torch.fx.GraphModule, examples: Sequence[Any]) -> Any:
        from torch._functorch import config as tracing
        from torch._inductor.compile_fx import compile_fx  # slow to import, and needed only to compile

        # A graph from the autograd cache would bypass finish. Compiled code has a separate cache, which stays enabled.
        with tracing.patch(enable_autograd_cache=False):
            return compile_fx(graph, list(examples), inner_compile=finish, config_patches=dict(options))

    def finish(*arguments: Any, **settings: Any) -> Any:
        from torch._inductor.compile_fx import compile_fx_inner

        code: Any = compile_fx_inner(*arguments, **settings)
        run: Graph | None = getattr(code, "current_callable", None)
        if run is None:
            warn_once(
                f"torch {torch.__version__} does not expose its compiled code: gates are called through "
                "torch.compile each time, which is slower."
            )
            return code

        def noting(inputs: list[Any]) -> Sequence[Any]:
            given = tuple(inputs)
            outputs = run(inputs)
            note(run, given, outputs)
            return outputs

        code.current_callable = noting
        return code

    compiled = torch.compile(kernel, dynamic=True, fullgraph=True, backend=backend)

    def called(*arguments: Any, **settings: Any) -> Any:
        with many_variants():
            return compiled(*arguments, **settings)

    return called


def many_variants() -> AbstractContextManager[Any]:
    """Return a context in which a kernel may have many variants in a process: data types, widths, precisions.

    At torch's own limit of 8 the next run of a notebook would end in an error.
    """
    try:
        from torch._dynamo import config

        return config.patch(recompile_limit=VARIANTS)  # type: ignore[attr-defined, no-untyped-call, unused-ignore]
    except (ImportError, AttributeError):
        return nullcontext()


def sizes_apart() -> AbstractContextManager[Any]:
    """Return a context in which torch.compile treats equal sizes as independent, since they may differ in another call.

    If torch does not have this setting, it recompiles when they differ.
    """
    try:
        from torch.fx.experimental import _config as symbols

        return symbols.patch(use_duck_shape=False)  # type: ignore[attr-defined]
    except (ImportError, AttributeError):
        return nullcontext()
