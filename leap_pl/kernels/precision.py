"""Precision of float32 matrix products, whose factors a GPU may round to the 10 bits of TF32."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_float32() -> Iterator[None]:
    """Compute float32 matrix products in full float32 within the context, whatever the process has set.

    Hessians are inverted, which multiplies TF32's relative error of 2⁻¹¹ by their condition number.
    """
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    if before in ("none", "ieee"):
        yield
        return
    # Set by the function that set it: torch refuses to say what holds where its two interfaces disagree.
    try:
        of_process = torch.get_float32_matmul_precision()
    except RuntimeError:
        products.fp32_precision = "ieee"
        try:
            yield
        finally:
            products.fp32_precision = before
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(of_process)
