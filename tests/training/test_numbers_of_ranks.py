"""What ranks find out together: norms of shards, numbers that break on one of them, and what rank zero could not do."""

import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from tiny import tiny_model
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from leap_pl.base_model.weights import Weight
from leap_pl.distributed.shards import gathered, own_part
from leap_pl.distributed.strategy import RankZero, check_no_experts, shard
from leap_pl.errors import UserError
from leap_pl.gates import FixedGate, GateState, attach
from leap_pl.training.finite import NonFiniteError, check_gradients, check_logits, check_norms, norm_of_gradients
from leap_pl.training.weights import Master, WeightTraining


class Experts(nn.Module):
    """A block of which each call uses one of two weights of one shape."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(6, 5, bias=False).requires_grad_(False) for _ in range(2))

    def forward(self, x: Tensor, chosen: int) -> Tensor:
        found: Tensor = self.experts[chosen](x)
        return found


class Body(nn.Module):
    """A model without its head."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Experts()

    def forward(self, x: Tensor, chosen: int) -> Tensor:
        found: Tensor = self.block(x, chosen)
        return found


class Causal(nn.Module):
    """A model."""

    def __init__(self) -> None:
        super().__init__()
        self.base_model = Body()


def gradients() -> Tensor:
    return torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).bfloat16()


def message(check: Any, *given: Any) -> str:
    try:
        check(*given)
    except (NonFiniteError, UserError, ZeroDivisionError) as error:
        return f"{type(error).__name__}: {error}"
    return "fine"


def broken(mesh: DeviceMesh, rank: int) -> dict[str, str | float]:
    """A parameter of which rank 1 has a part that breaks, after it was whole."""
    parameter = nn.Parameter(distribute_tensor(torch.zeros(7, 5, dtype=torch.bfloat16), mesh, [Shard(0)]))
    parameter.grad = distribute_tensor(gradients(), mesh, [Shard(0)])  # type: ignore[assignment]
    learned, found = {("w", "logits"): parameter}, {}
    norm = norm_of_gradients(learned)
    found["norm"] = float(gathered(norm))
    found["whole"] = message(check_gradients, learned, 3, None, norm)
    if rank == 1:
        own_part(parameter.grad).fill_(torch.nan)
    norm = norm_of_gradients(learned)
    found["gradients"] = message(check_gradients, learned, 3, None, norm)
    found["norms"] = message(check_norms, [(3, norm)], None)
    found["fine"] = message(check_logits, learned, 3)
    if rank == 1:
        own_part(parameter.detach()).fill_(torch.nan)
    found["logits"] = message(check_logits, learned, 3)
    return found


def experts(mesh: DeviceMesh, rank: int) -> tuple[list[Tensor], Tensor]:
    """The gradients of both experts' masters, and what this rank adds to that of its own."""
    torch.manual_seed(0)
    model: Any = Causal()
    block = model.base_model.block
    weights = {f"{n}": Weight(f"{n}", linear, "weight", 0, f"{n}", 1, block) for n, linear in enumerate(block.experts)}
    gates = attach(weights, FixedGate, GateState())
    for name, gate in gates.items():
        gate.start_from(torch.ones(5, 6, dtype=torch.bool), 0)
        gate.trained = Master(weights[name], WeightTraining(), 0)
    shard(model, [block], mesh, lambda index, block: None)
    torch.manual_seed(rank)
    x, upstream = torch.randn(3, 6), torch.randn(3, 5)
    (model.base_model(x, rank) * upstream).sum().backward()
    return [gate.trained.master.grad.full_tensor() for gate in gates.values()], upstream.T @ x  # type: ignore[union-attr]


def both(rank: int) -> dict[str, Any]:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    mesh = init_device_mesh("cpu", (2,))
    waits, real = [], dist.new_group
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "new_group", lambda *a, **k: (waits.append(k["timeout"]), real(*a, **k))[1])
        rank_zero = RankZero()
    said = message(rank_zero.make, lambda: 1 / 0)
    found = {
        "said": said,
        "hours": [wait.total_seconds() / 3600 for wait in waits],
        **broken(mesh, rank),
        "experts": experts(mesh, rank),
    }
    dist.barrier()
    begun = time.monotonic()
    if rank == 0:  # the other one has failed, and never comes
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RankZero, "ARRIVAL", timedelta(seconds=2))
            with pytest.raises(UserError, match=r"not all ranks came within 0:00:02: one has failed, and its own"):
                RankZero()
    return found | {"waited": time.monotonic() - begun}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(2, both, folder=tmp_path_factory.mktemp("two"), seconds=120)


def test_the_norm_of_shards_is_that_of_the_whole(two) -> None:
    """Of unequal shards in bfloat16, which torch would sum in bfloat16."""
    for found in two:
        assert found["norm"] == pytest.approx(float(gradients().double().norm()), rel=1e-6)


def test_numbers_that_break_on_one_rank_end_all(two) -> None:
    """With the same message: a rank that went on would wait for the others in the next collective."""
    one, other = two
    for name in ("whole", "fine"):
        assert one[name] == other[name] == "fine"
    for name, says in (
        ("gradients", "the gradients of w are infinite or NaN"),
        ("norms", "gradients are infinite or NaN"),
        ("logits", "the logits of w are infinite or NaN"),
    ):
        assert one[name] == other[name]
        assert f"NonFiniteError: training failed at step 3: {says}" in one[name]


def test_ranks_end_with_rank_zero(two) -> None:
    """And wait for what it makes longer than for a collective of the run, whose time would be up."""
    assert two[0]["said"] == "ZeroDivisionError: division by zero"
    assert two[1]["said"] == "UserError: rank 0 failed; its message is above"
    assert two[0]["hours"] == two[1]["hours"] == [1.0, 48.0]


def test_a_rank_that_never_comes_is_not_waited_for_as_a_prior_is(two) -> None:
    assert 1 < two[0]["waited"] < 20


def test_torch_that_mixes_the_gradients_of_experts_is_refused() -> None:
    """Where it would: experts that are modules each, and several ranks."""
    apart = nn.ModuleDict({"mlp": nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(2, 2) for _ in range(2))})})
    with pytest.raises(UserError, match=r"mlp\.experts: a sharded run on 2 ranks .* needs torch 2\.13"):
        check_no_experts(apart, 2)
    check_no_experts(apart, 1)
    check_no_experts(tiny_model("mixtral"), 2)  # whose experts are stacked


@pytest.mark.skipif(
    not hasattr(torch.distributed.fsdp.FSDPModule, "set_reduce_scatter_unused_params"), reason="torch before 2.13"
)
def test_ranks_that_use_different_experts_add_up_the_gradients_of_each(two) -> None:
    for expert, found in enumerate(two):
        mean = found["experts"][1] / 2  # the other rank has none
        for rank in two:
            torch.testing.assert_close(rank["experts"][0][expert], mean)
