"""Float32 products in full float32, whatever the process has set and by which of torch's two interfaces."""

import pytest
import torch

from leap_pl.kernels.precision import full_float32

PRODUCTS = torch.backends.cuda.matmul


@pytest.mark.parametrize("precision", ["medium", "high", "highest"])
def test_within_it_is_the_highest_and_then_what_it_was(precision: str) -> None:
    torch.set_float32_matmul_precision(precision)
    with full_float32(), full_float32():
        assert (torch.get_float32_matmul_precision(), PRODUCTS.fp32_precision) == ("highest", "ieee")
    assert torch.get_float32_matmul_precision() == precision
    with pytest.raises(ValueError, match="from within"), full_float32():
        raise ValueError("from within")
    assert torch.get_float32_matmul_precision() == precision


def test_where_a_backend_was_set_alone() -> None:
    PRODUCTS.fp32_precision = "tf32"
    try:
        with full_float32():
            assert PRODUCTS.fp32_precision == "ieee"
        assert PRODUCTS.fp32_precision == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")  # both of torch's interfaces
