"""Many ranks: what a trainer's strategy means for a model with gates, and what rank zero does for all.

Two of Lightning's strategies are used as they are. Under ``DDPStrategy`` every rank holds the whole model and
only logits are reduced. Under ``ModelParallelStrategy`` every decoder block is sharded by
``torch.distributed.fsdp.fully_shard`` (FSDP2): of each weight, its logit, the logit's gradient and the optimizer's
state a rank holds one slice (see :mod:`leap_pl.distributed.shards`). Before a block runs, its weights and logits are
gathered whole, so that a gate sees the elements it would see in one process, with the same noise.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from leap_pl.errors import UserError, listing, warn_once

if TYPE_CHECKING:
    import lightning as L

    from leap_pl.base_model.weights import Weight

Made = TypeVar("Made")


def sharding_mesh(trainer: "L.Trainer | None") -> DeviceMesh | None:
    """The ranks that decoder blocks are sharded over, or None where each holds the whole model.

    Raises:
        UserError: The trainer's strategy is one that gates do not work under, or splits single products of
            matrices over ranks.
    """
    if trainer is None:
        return None
    strategy = trainer.strategy
    if isinstance(strategy, ModelParallelStrategy):
        mesh = strategy.device_mesh
        if mesh["tensor_parallel"].size() > 1:
            raise UserError(
                f"ModelParallelStrategy has tensor_parallel_size {mesh['tensor_parallel'].size()}, and leap_pl shards "
                f"by decoder block only. Set trainer.strategy.init_args: data_parallel_size: {mesh.size()}, "
                "tensor_parallel_size: 1."
            )
        return mesh["data_parallel"]
    if isinstance(strategy, SingleDeviceStrategy | DDPStrategy):
        return None
    raise UserError(
        f"{type(strategy).__name__} does not work with gates. Use --trainer.strategy ddp, or ModelParallelStrategy "
        "(FSDP2) for a model that does not fit one device: configs/cluster has an example of each."
    )


def saves_shards(trainer: "L.Trainer | None") -> bool:
    """Whether checkpoints are folders in which each rank writes its own part."""
    strategy = trainer.strategy if trainer is not None else None
    if not isinstance(strategy, ModelParallelStrategy):
        return False
    told = getattr(strategy, "_save_distributed_checkpoint", None)  # what it was made with
    if told is None:
        warn_once(
            "this version of Lightning does not tell the save_distributed_checkpoint of its ModelParallelStrategy: "
            "checkpoints are written as folders, which is its default."
        )
    return told is not False


def shard(
    model: nn.Module, blocks: Iterable[nn.Module], mesh: DeviceMesh, prepare: Callable[[int, nn.Module], None]
) -> nn.Module:
    """Shard the decoder ``blocks`` of ``model`` over ``mesh``, one after another.

    What lies outside the blocks (embeddings, last norm, head) stays whole on every rank: it is frozen, needs no
    gradient and no optimizer, and the head is called chunk by chunk outside the forward pass.

    Args:
        model: A causal language model, on the CPU.
        blocks: Its decoder blocks.
        mesh: One-dimensional.
        prepare: Called with the index of each block and the block before it is sharded: its chance to register
            parameters while the block, and no other one, is whole in memory of its own.

    Raises:
        UserError: A block is stored in a form that cannot be sharded.
    """
    blocks = list(blocks)
    for index, block in enumerate(blocks):
        prepare(index, block)
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    outside = {parameter for parameter in model.parameters() if id(parameter) not in inside}
    # Without parameters of its own, the root only orders the blocks: each is gathered while the one before it runs.
    root = getattr(model, "base_model", model)
    fully_shard(root, mesh=mesh, ignored_params=outside)
    return model


def check_inside_blocks(weights: "Mapping[str, Weight]") -> None:
    """Make sure that all ``weights`` are inside decoder blocks, as those of a sharded run are.

    Raises:
        UserError: Some are not.
    """
    outside = [name for name, weight in weights.items() if weight.layer is None]
    if outside:
        raise UserError(
            f"{listing(outside, 3)} is outside the decoder blocks, and a sharded run gates weights within them. "
            "Leave it out with --model.ignore, or use --trainer.strategy ddp."
        )


def data_rank(trainer: "L.Trainer") -> tuple[int, int]:
    """This rank and the number of ranks, each of which has micro-batches of its own."""
    return trainer.global_rank, trainer.world_size


def mean_over_ranks(values: dict[str, float], trainer: "L.Trainer") -> dict[str, float]:
    """The mean of each value over all ranks, every one of which makes this call with the same names."""
    if trainer.world_size == 1:
        return values
    own = torch.tensor(list(values.values()), dtype=torch.float32, device=trainer.strategy.root_device)
    mean = trainer.strategy.reduce(own, reduce_op="mean")
    return dict(zip(values, mean.tolist(), strict=True))


def lost_a_rank(error: RuntimeError) -> bool:
    """Whether ``error`` says that a collective failed because another process is gone."""
    if isinstance(error, dist.DistNetworkError | dist.DistBackendError):
        return True
    # Gloo's own errors are plain.
    return dist.is_initialized() and "gloo" in str(error) and "peer" in str(error)


class RankZero:
    """What rank zero alone makes, and the others wait for as long as it takes.

    A prior can take longer than the time after which a collective of the run's own process group is given up, so
    this is a group with a patience of its own, between CPUs. In a run on one rank nothing waits.
    """

    PATIENCE = timedelta(days=2)

    def __init__(self) -> None:
        self.group = None
        if dist.is_initialized() and dist.get_world_size() > 1:
            self.group = dist.new_group(backend="gloo", timeout=self.PATIENCE)
        self.alone = self.group is None
        self.here = self.alone or dist.get_rank() == 0

    def make(self, function: Callable[[], Made]) -> Made | None:
        """What ``function`` returns, on rank zero; None on the others, where it is not called.

        Raises:
            UserError: It raised one on rank zero: every rank then ends with the same line.
        """
        made, failure = None, None
        if self.here:
            try:
                made = function()
            except UserError as error:
                failure = str(error)
            except BaseException:
                self.tell("rank 0 failed; its message is above")
                raise
        failure = self.tell(failure)
        if failure is not None:
            raise UserError(failure)
        return made

    def tell(self, value: Any) -> Any:
        """Rank zero's plain ``value``, on every rank."""
        if self.group is None:
            return value
        told = [value]
        dist.broadcast_object_list(told, 0, group=self.group)
        return told[0]

    def share(self, bits: Tensor | None, count: int) -> Tensor:
        """Rank zero's uint8 tensor of ``count`` elements, on every rank."""
        shared = torch.empty(count, dtype=torch.uint8) if bits is None else bits
        dist.broadcast(shared, 0, group=self.group)
        return shared

    def close(self) -> None:
        """Let the group go."""
        if self.group is not None:
            dist.destroy_process_group(self.group)
            self.group = None


def as_rank_zero_has(value: Made) -> Made:
    """Rank zero's plain ``value``, on every rank, each of which makes this call."""
    rank_zero = RankZero()
    told: Made = rank_zero.tell(value)
    rank_zero.close()
    return told


def reduce_only(module: nn.Module, names: Collection[str]) -> None:
    """Keep ``DistributedDataParallel`` to these parameters of ``module``.

    Without this it sends rank zero's frozen weights to all others at the start, which have read the same ones
    from the base model's files, and its buffers before each forward pass.
    """
    others = [name for name, _ in (*module.named_parameters(), *module.named_buffers()) if name not in names]
    ignore = getattr(nn.parallel.DistributedDataParallel, "_set_params_and_buffers_to_ignore_for_model", None)
    if ignore is not None:
        ignore(module, others)
    elif dist.is_initialized():
        warn_once(
            "this version of torch sends the frozen weights from rank zero to all others when a run begins, and the "
            "buffers in each forward pass: both take time, and change nothing."
        )
