"""Data type that a device multiplies faster."""

import time
from functools import cache
from typing import Literal

import torch


def fast_dtype(device: torch.device) -> Literal["float32", "bfloat16"]:
    """Return bfloat16 if ``device`` multiplies it fast (on a CPU: measurably faster than float32), else float32."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    if device.type == "cpu":
        amx = torch.cpu.get_capabilities().get("amx_tile", False)
        return "bfloat16" if amx or _cpu_gains_by_bfloat16() else "float32"
    return "float32"


@cache
def _cpu_gains_by_bfloat16() -> bool:
    """Measure whether bfloat16 matrices are multiplied faster than float32 ones; takes some hundredths of a second.

    The instruction set does not decide it: with AVX512_BF16, a Zen 4 is twice as fast in bfloat16, and an Intel server
    whose AMX a hypervisor hides is twice as slow.
    """
    if not torch.cpu.get_capabilities().get("avx512_bf16", False):
        return False  # emulated

    def seconds(dtype: torch.dtype) -> float:
        matrix = torch.ones(512, 512, dtype=dtype, device="cpu")
        took = []
        for _ in range(8):
            began = time.perf_counter()
            torch.mm(matrix, matrix)
            took.append(time.perf_counter() - began)
        return min(took)

    with torch.inference_mode():
        return seconds(torch.bfloat16) < seconds(torch.float32)
