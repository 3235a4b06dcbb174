"""Data type that a device multiplies faster."""

import math
import time
from functools import cache
from typing import Literal

import torch

ROUNDS = 24  # multiplications of each data type that are timed
# Instructions of a CPU that multiply a data type, which is emulated without any of them.
INSTRUCTIONS = {
    torch.bfloat16: ("avx512_bf16", "bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16", "fp16_arith"),
}


def fast_dtype(device: torch.device) -> Literal["float32", "bfloat16"]:
    """Return bfloat16 if ``device`` multiplies it fast (on a CPU: measurably faster than float32), else float32."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    if device.type == "cpu":
        amx = torch.cpu.get_capabilities().get("amx_tile", False)
        return "bfloat16" if amx or _cpu_gains_by(torch.bfloat16) else "float32"
    return "float32"


def is_slow(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether ``device`` multiplies ``dtype``, in which a model is stored, slower than float32."""
    if dtype == torch.float16:
        return device.type == "cpu" and not _cpu_gains_by(dtype)
    return dtype == torch.bfloat16 and fast_dtype(device) == "float32"


@cache
def _cpu_gains_by(dtype: torch.dtype) -> bool:
    """Measure whether matrices of ``dtype`` are multiplied faster than float32 ones; takes hundredths of a second.

    The instruction set does not decide it: with AVX512_BF16, a Zen 4 is twice as fast in bfloat16, and an Intel server
    whose AMX a hypervisor hides is twice as slow.

    Other work on the machine must not decide it either: what is learned depends on the data type. So both are measured
    in turns, and the shortest time of many counts.
    """
    capabilities = torch.cpu.get_capabilities()
    if not any(capabilities.get(name, False) for name in INSTRUCTIONS[dtype]):
        return False  # emulated
    took: dict[torch.dtype, float] = {}
    with torch.inference_mode():
        matrices = [torch.ones(256, 256, dtype=kind, device="cpu") for kind in (dtype, torch.float32)]
        for matrix in ROUNDS * matrices:
            began = time.perf_counter()
            torch.mm(matrix, matrix)
            took[matrix.dtype] = min(time.perf_counter() - began, took.get(matrix.dtype, math.inf))
    return took[dtype] < took[torch.float32]
