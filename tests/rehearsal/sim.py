"""The accelerator of device.cpp as ``torch.device("sim")``: import it before the process takes its first gradient."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType
from typing import Any

import torch
from compiling import library
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.strategies import SingleDeviceStrategy

from leap_pl.kernels import transfers

DEVICE = "sim"


class Device(ModuleType):
    """What torch asks of ``torch.sim``, a module."""

    def is_available(self) -> bool:
        return True

    is_initialized = is_available

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def set_device(self, device: Any) -> None: ...

    def synchronize(self, device: Any = None) -> None: ...

    def Stream(self, device: Any = None, priority: int = 0) -> torch.Stream:  # noqa: N802  (torch's)
        return torch.Stream(DEVICE)

    def Event(self, **_: Any) -> torch.Event:  # noqa: N802  (torch's)
        return torch.Event(DEVICE)

    current_stream = Stream

    def stream(self, stream: torch.Stream) -> Any:
        return nullcontext()  # there is only one

    def manual_seed_all(self, seed: int) -> None: ...

    def _is_in_bad_fork(self) -> bool:
        return False

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


class Sim(Accelerator):
    """The accelerator as a Trainer asks for it."""

    def setup_device(self, device: torch.device) -> None: ...

    def teardown(self) -> None: ...

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {}

    @staticmethod
    def parse_devices(devices: Any) -> Any:
        return devices

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [torch.device(DEVICE, index) for index in range(int(devices))]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return DEVICE


class OnSim(SingleDeviceStrategy):
    """The strategy of one such device."""

    strategy_name = "on_sim"

    def __init__(self, **given: Any) -> None:
        super().__init__(**{"device": torch.device(DEVICE, 0), **given})


def syncs() -> dict[str, int]:
    """How often the host has waited since :func:`reset`, by what for."""
    return dict(torch.ops.rehearsal.syncs())


def reset() -> None:
    torch.ops.rehearsal.reset()


@contextmanager
def no_syncs() -> Iterator[None]:
    """Within, a host sync is an error where it happens."""
    torch.ops.rehearsal.refuse(True)
    try:
        yield
    finally:
        torch.ops.rehearsal.refuse(False)


transfers.ASYNCHRONOUS.add(DEVICE)
torch.ops.load_library(library())
torch.ops.rehearsal.register_hooks()
torch.utils.rename_privateuse1_backend(DEVICE)
torch._register_device_module(DEVICE, Device(DEVICE))
torch.utils.generate_methods_for_privateuse1_backend(for_tensor=True, for_module=True, for_storage=True)
