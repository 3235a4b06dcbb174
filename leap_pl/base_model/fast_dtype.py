"""Data type that a device multiplies faster."""

import math
import time
from functools import cache
from typing import Literal

import torch

ROUNDS = 24  # multiplications of each data type that are timed


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

    Other work on the machine must not decide it either: what is learned depends on the data type. So both are measured
    in turns, and the shortest time of many counts.
    """
    if not torch.cpu.get_capabilities().get("avx512_bf16", False):
        return False  # emulated
    took: dict[torch.dtype, float] = {}
    with torch.inference_mode():
        matrices = [torch.ones(256, 256, dtype=dtype, device="cpu") for dtype in (torch.bfloat16, torch.float32)]
        for matrix in ROUNDS * matrices:
            began = time.perf_counter()
            torch.mm(matrix, matrix)
            took[matrix.dtype] = min(time.perf_counter() - began, took.get(matrix.dtype, math.inf))
    return took[torch.bfloat16] < took[torch.float32]
