"""Distributed strategies for a model with gates: DDP, FSDP2, and work that rank zero does for all ranks.

Two of Lightning's strategies are supported. Under ``DDPStrategy`` every rank has the whole model and only the logits'
gradients are reduced. Under ``ModelParallelStrategy`` every decoder block is sharded by
``torch.distributed.fsdp.fully_shard`` (FSDP2): a rank has one slice of each weight, its logits, their gradient and the
optimizer state (see :mod:`leap_pl.distributed.shards`). Before a block runs, its weights and logits are gathered, so
that a gate sees the same elements as in one process, with the same noise.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from lightning.pytorch.strategies.xla import XLAStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from leap_pl.base_model.backbone import body_of
from leap_pl.errors import UserError, listing, warn_once

if TYPE_CHECKING:
    import lightning as L

    from leap_pl.base_model.weights import Weight

Made = TypeVar("Made")


def sharding_mesh(trainer: "L.Trainer | None") -> DeviceMesh | None:
    """Return the device mesh that decoder blocks are sharded over, or None if each rank has the whole model.

    Raises:
        UserError: The trainer's strategy is not supported, or uses tensor parallelism.
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
    others = isinstance(strategy, DeepSpeedStrategy | XLAStrategy)  # to Lightning, kinds of DDP
    if isinstance(strategy, SingleDeviceStrategy | DDPStrategy) and not others:
        return None
    raise UserError(
        f"{type(strategy).__name__} does not work with gates. Use --trainer.strategy ddp, or ModelParallelStrategy "
        "(FSDP2) for a model that does not fit one device: --config ddp and --config fsdp2 are recipes for each."
    )


def has_buckets(trainer: "L.Trainer | None") -> bool:
    """Return whether the gradients are views of DDP's buckets, if they are zeroed and not freed between steps.

    Freed, those of micro-batches that are not reduced are tensors of their own, beside the buckets: 4 bytes a weight.
    """
    strategy = trainer.strategy if trainer is not None else None
    # Private, and no public name says it before the model is wrapped; without it gradients are freed, which needs more.
    views = getattr(strategy, "_ddp_kwargs", {}).get("gradient_as_bucket_view", False)
    return isinstance(strategy, DDPStrategy) and bool(views)


def copies_gradients(trainer: "L.Trainer | None") -> bool:
    """Return whether DDP holds the gradients in buckets of its own, beside those of the parameters."""
    return trainer is not None and isinstance(trainer.strategy, DDPStrategy) and not has_buckets(trainer)


def saves_shards(trainer: "L.Trainer | None") -> bool:
    """Return whether checkpoints are folders in which each rank writes its own part."""
    strategy = trainer.strategy if trainer is not None else None
    if not isinstance(strategy, ModelParallelStrategy):
        return False
    setting = getattr(strategy, "_save_distributed_checkpoint", None)
    if setting is None:
        warn_once(
            "this version of Lightning does not expose the save_distributed_checkpoint of ModelParallelStrategy: "
            "checkpoints are written as folders, which is the default."
        )
    return setting is not False


def shard(
    model: nn.Module,
    blocks: Iterable[nn.Module],
    mesh: DeviceMesh,
    prepare: Callable[[int, nn.Module], None],
    others: Collection[nn.Module] = (),
) -> nn.Module:
    """Shard the decoder ``blocks`` of ``model`` over ``mesh``, one after another.

    Modules outside the blocks (embeddings, last norm, head) stay whole on every rank, unless they are trained: frozen,
    they need no gradient and no optimizer state, and the head is called chunk by chunk outside the forward pass.

    Args:
        model: A causal language model, on the CPU.
        blocks: Decoder blocks of the model.
        mesh: One-dimensional device mesh.
        prepare: Function called with the index of each block and the block before it is sharded. It can register
            parameters while only this block is unsharded and in its own memory.
        others: Modules outside the blocks to shard too, since they are trained.

    Raises:
        UserError: A block is stored in a form that cannot be sharded.
    """
    blocks = list(blocks)
    for index, block in enumerate(blocks):
        prepare(index, block)
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    for module in others:
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    inside = {id(parameter) for module in (*blocks, *others) for parameter in module.parameters()}
    outside = {parameter for parameter in model.parameters() if id(parameter) not in inside}
    # Without parameters of its own, the root only orders the blocks: each is prefetched while the previous one runs.
    root = body_of(model)
    fully_shard(root, mesh=mesh, ignored_params=outside)
    # A rank none of whose tokens chose an expert has no gradient of it. Without zeros in its place, which torch puts
    # there from 2.13 on, ranks would add up gradients of different experts.
    with_zeros = getattr(root, "set_reduce_scatter_unused_params", None)
    if with_zeros is not None:
        with_zeros(True)
    else:
        check_no_experts(model, mesh.size())
    return model


def check_no_experts(model: nn.Module, ranks: int) -> None:
    """Check that torch before 2.13 does not shard ``model`` over several ``ranks``, if its experts are modules each.

    Args:
        model: Causal language model.
        ranks: Number of ranks that the model is sharded over.

    Raises:
        UserError: It would.
    """
    apart = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and "experts" in name]
    if apart and ranks > 1:
        raise UserError(
            f"{apart[0]}: a sharded run on {ranks} ranks of a model whose experts are modules each needs torch 2.13 or "
            f"newer, and this is {torch.__version__}. Update torch, or use --trainer.strategy ddp."
        )


def check_inside_blocks(weights: "Mapping[str, Weight]") -> None:
    """Check that all ``weights`` are inside decoder blocks, as a sharded run requires.

    Raises:
        UserError: Some are outside.
    """
    outside = [name for name, weight in weights.items() if weight.layer is None]
    if outside:
        raise UserError(
            f"{listing(outside, 3)} is outside the decoder blocks, and a sharded run gates only weights inside them. "
            "Exclude it with --model.ignore, or use --trainer.strategy ddp."
        )


def validate_without_inference_mode(trainer: "L.Trainer") -> None:
    """Let ``trainer`` validate under ``no_grad``: shards (DTensors) cannot be detached in inference mode.

    Lightning does so itself where the process group is gloo's, and under FSDPStrategy.
    """
    for loop in (trainer.validate_loop, trainer.fit_loop.epoch_loop.val_loop):
        loop.inference_mode = False


def data_rank(trainer: "L.Trainer") -> tuple[int, int]:
    """Return this rank and the number of ranks for data: each rank has its own micro-batches."""
    return trainer.global_rank, trainer.world_size


def mean_over_ranks(values: dict[str, float], trainer: "L.Trainer") -> dict[str, float]:
    """Return the mean of each value over all ranks; a collective that all ranks must call with the same names."""
    if trainer.world_size == 1:
        return values
    own = torch.tensor(list(values.values()), dtype=torch.float32, device=trainer.strategy.root_device)
    mean = trainer.strategy.reduce(own, reduce_op="mean")
    return dict(zip(values, mean.tolist(), strict=True))


def lost_a_rank(error: RuntimeError) -> bool:
    """Return whether ``error`` means that a collective failed because another process has ended."""
    if isinstance(error, dist.DistNetworkError | dist.DistBackendError):
        return True
    # Gloo raises plain RuntimeErrors.
    return dist.is_initialized() and "gloo" in str(error) and "peer" in str(error)


class RankZero:
    """Process group for results that rank zero computes for all ranks, with a long timeout.

    A prior can take longer than the timeout of the run's own process group, so this is a separate CPU group. In a run
    on one rank there is no group and nothing waits.
    """

    TIMEOUT = timedelta(days=2)
    ARRIVAL = timedelta(hours=1)

    def __init__(self) -> None:
        self.group = None
        if dist.is_initialized() and dist.get_world_size() > 1:
            met = self._meet()
            self.group = dist.new_group(backend="gloo", timeout=self.TIMEOUT)
            dist.destroy_process_group(met)  # not before: another rank could still be connecting to this one
        self.alone = self.group is None
        self.here = self.alone or dist.get_rank() == 0

    def _meet(self) -> Any:
        """Wait until all ranks are here: one that failed before never comes, however long the others wait for a prior.

        Returns:
            The process group of all ranks that this made.

        Raises:
            UserError: One did not come.
        """
        try:
            return dist.new_group(backend="gloo", timeout=self.ARRIVAL)
        except RuntimeError as error:
            if not isinstance(error, dist.DistStoreError) and "time" not in str(error).lower():
                raise
            raise UserError(
                f"not all ranks came within {self.ARRIVAL}: one has failed, and its own message says why, or still "
                "loads the base model or text. Where those are fetched from the hub, fetch them before."
            ) from error

    def make(self, function: Callable[[], Made]) -> Made | None:
        """Call ``function`` on rank zero and return its result there; return None on the other ranks.

        Raises:
            UserError: ``function`` raised one on rank zero; every rank then raises the same message.
        """
        made, failure = None, None
        if self.here:
            try:
                made = function()
            except UserError as error:
                failure = str(error)
            except BaseException:
                self.broadcast("rank 0 failed; its message is above")
                raise
        failure = self.broadcast(failure)
        if failure is not None:
            raise UserError(failure)
        return made

    def broadcast(self, value: Any) -> Any:
        """Broadcast rank zero's plain ``value`` to every rank, and return it."""
        if self.group is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, 0, group=self.group)
        return values[0]

    def share(self, bits: Tensor | None, count: int) -> Tensor:
        """Broadcast rank zero's uint8 tensor of ``count`` elements to every rank, and return it."""
        shared = torch.empty(count, dtype=torch.uint8, device="cpu") if bits is None else bits
        dist.broadcast(shared, 0, group=self.group)
        return shared

    def close(self) -> None:
        """Destroy the process group."""
        if self.group is not None:
            dist.destroy_process_group(self.group)
            self.group = None


def broadcast_from_rank_zero(value: Made) -> Made:
    """Return rank zero's plain ``value`` on every rank; a collective that all ranks must call."""
    rank_zero = RankZero()
    shared: Made = rank_zero.broadcast(value)
    rank_zero.close()
    return shared


def check_as_rank_zero(found: Mapping[str, Any]) -> None:
    """Check that every rank has found what rank zero has; a collective that all ranks must call.

    Args:
        found: What it is, in words → plain value.

    Raises:
        UserError: A rank has found something else; every rank raises one.
    """
    rank_zero = RankZero()
    if rank_zero.group is None:
        return
    of_zero = rank_zero.broadcast(dict(found))
    differing = [what for what in {**found, **of_zero} if of_zero.get(what) != found.get(what)]
    counts = torch.tensor([len(differing)], device="cpu")
    dist.all_reduce(counts, dist.ReduceOp.MAX, group=rank_zero.group)
    rank_zero.close()
    if differing:
        raise UserError(
            f"rank {dist.get_rank()} has another {listing(differing)} than rank 0. Give every machine the same "
            "settings and files, or a folder that all of them see."
        )
    if int(counts):
        raise UserError("another rank has other settings or files than rank 0; its own message says which.")


def reduce_only(module: nn.Module, names: Collection[str]) -> None:
    """Make ``DistributedDataParallel`` ignore all but the named parameters of ``module``.

    Otherwise it would broadcast rank zero's frozen weights at the start, although all ranks have read the same base
    model, and its buffers before each forward pass.
    """
    others = [name for name, _ in (*module.named_parameters(), *module.named_buffers()) if name not in names]
    ignore = getattr(nn.parallel.DistributedDataParallel, "_set_params_and_buffers_to_ignore_for_model", None)
    if ignore is not None:
        ignore(module, others)
    elif dist.is_initialized():
        warn_once(
            "this version of torch broadcasts the frozen weights when a run starts, and the buffers before each "
            "forward pass, which takes time but does not change results."
        )
