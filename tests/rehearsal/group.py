"""A process group whose backend is the device's: it refuses tensors that are anywhere else, as NCCL does.

Gloo moves the bytes, for the memory is the host's.
"""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, ClassVar

import sim
import torch
import torch.distributed as dist
from torch.utils._pytree import tree_leaves, tree_map

BACKEND = "strict"

# Collective of a ProcessGroup → the name by which gloo has it.
COLLECTIVES = {
    "allreduce": "allreduce",
    "broadcast": "broadcast",
    "reduce": "reduce",
    "allgather": "allgather",
    "gather": "gather",
    "scatter": "scatter",
    "all_gather_single": "_allgather_base",
    "_allgather_base": "_allgather_base",
    "reduce_scatter": "reduce_scatter",
    "reduce_scatter_single": "_reduce_scatter_base",
    "_reduce_scatter_base": "_reduce_scatter_base",
}


class Strict(dist.ProcessGroup):
    """The group.

    Attributes:
        done: Number of collectives of each name in this process, over all groups.
    """

    done: ClassVar[dict[str, int]] = {}

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)
        self.gloo = dist.ProcessGroupGloo(store, rank, size, timeout)

    def getBackendName(self) -> str:  # noqa: N802  (torch's)
        return BACKEND

    @property
    def _device_types(self) -> list[torch.device]:
        return [torch.device(sim.DEVICE)]

    def _get_backend(self, device: torch.device) -> Any:
        return self.gloo

    @property
    def group_name(self) -> str:
        return dist.distributed_c10d._world.pg_names[self]

    def all_gather_single_coalesced(self, into: list[torch.Tensor], tensors: list[torch.Tensor], opts: Any) -> Any:
        return [self._allgather_base(out, own, opts) for out, own in zip(into, tensors, strict=True)][-1]

    def barrier(self, opts: Any = None) -> Any:  # with a device, which gloo does not know
        return self.gloo.barrier()


def collective(name: str, of_gloo: str) -> Callable[..., Any]:
    def run(group: Strict, *arguments: Any) -> Any:
        tensors = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, torch.Tensor)]
        elsewhere = {str(tensor.device) for tensor in tensors if tensor.device.type != sim.DEVICE}
        if elsewhere or not tensors:
            raise RuntimeError(f"No backend type associated with device type {elsewhere} ({name} of {BACKEND})")
        Strict.done[name] = Strict.done.get(name, 0) + 1
        of_host = tree_map(as_host, arguments)
        options = next((leaf for leaf in arguments if hasattr(leaf, "reduceOp")), None)
        mean = options is not None and options.reduceOp == dist.ReduceOp.AVG
        if mean:  # gloo has none of integers
            options.reduceOp = dist.ReduceOp.SUM
        getattr(group.gloo, of_gloo)(*of_host).wait()
        for out in tree_leaves(of_host[0]) if mean else ():
            out.div_(group.size(), rounding_mode=None if out.is_floating_point() else "floor")
        # What comes out is where the device's tensors are: gloo's own work would hand on those of the host.
        future: torch.futures.Future[Any] = torch.futures.Future(devices=[torch.device(sim.DEVICE, 0)])
        future.set_result(arguments[0])
        return torch._C._distributed_c10d._create_work_from_future(future)

    return run


def as_host(value: Any) -> Any:
    return torch.ops.rehearsal.as_host(value) if isinstance(value, torch.Tensor) else value


for name, of_gloo in COLLECTIVES.items():
    setattr(Strict, name, collective(name, of_gloo))
dist.Backend.register_backend(BACKEND, Strict, devices=[sim.DEVICE])
