"""The device itself: what it refuses and what it counts, so that the other cases mean something."""

import copy
from typing import Any

import pytest
import sim
import torch

HERE = torch.device(sim.DEVICE)


def test_it_computes_what_the_cpu_does() -> None:
    a = torch.randn(3, 4)
    assert torch.equal((a.to(HERE) @ a.T.to(HERE)).cpu(), a @ a.T)


def test_tensors_are_copied_with_their_storage() -> None:
    here = torch.arange(3.0, device=HERE)
    copied = copy.deepcopy(here)
    assert torch.equal(copied.cpu(), here.cpu())
    assert copied.device == here.device


def test_it_refuses_tensors_of_two_devices_but_for_scalars() -> None:
    here = torch.ones(3, device=HERE)
    with pytest.raises(RuntimeError, match="same device"):
        here + torch.ones(3)
    with pytest.raises(RuntimeError, match="same device"):
        here.index_select(0, torch.tensor([0]))
    assert float((here * torch.tensor(2.0)).sum()) == 6


@pytest.mark.parametrize(
    "use",
    [
        lambda here, scalar: scalar.add_(here.sum()),
        lambda here, scalar: torch.stack([scalar, here.sum()]),
        lambda here, scalar: here.index_select(0, scalar.long()),
        lambda here, scalar: here.scatter(0, scalar.long(), here.sum()),
    ],
)
def test_a_scalar_of_the_cpu_is_no_place_to_write_to_no_index_and_none_of_a_list(use: Any) -> None:
    with pytest.raises(RuntimeError, match="same device"):
        use(torch.ones(3, device=HERE), torch.tensor(1.0))


def test_it_refuses_a_generator_of_the_cpu_and_has_its_own() -> None:
    with pytest.raises(RuntimeError, match="Expected a 'sim' device type for generator but found 'cpu'"):
        torch.randn(3, generator=torch.Generator(), device=HERE)
    with pytest.raises(RuntimeError, match="generator"), HERE:
        torch.randn(3, generator=torch.Generator())
    own = torch.Generator(HERE).manual_seed(1)
    first, second = (torch.rand(2, generator=own, device=HERE) for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(first, torch.rand(2, generator=own.manual_seed(1), device=HERE))


def test_it_refuses_what_is_not_deterministic_where_that_is_required() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(RuntimeError, match="kthvalue on sim does not have a deterministic"):
            torch.ones(3, device=HERE).kthvalue(1)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("wait", "kind"),
    [
        (lambda here: float(here.sum()), "item"),
        (lambda here: bool((here > 0).any()), "item"),
        (lambda here: here.tolist(), "to the host"),
        (lambda here: torch.tensor([1, 2], device=HERE), "to the device"),
        (lambda here: here.cpu(), "to the host"),
        (lambda here: torch.ones(2).to(HERE), "to the device"),
        (lambda here: here.new_tensor(3), "to the device"),
        (lambda here: here.nonzero(), "nonzero"),
        (lambda here: here[torch.tensor([0])], "to the device"),
        (lambda here: here[here > 0], "nonzero"),
        (lambda here: here.index_put((here > 0,), torch.tensor(2.0)), "index"),
        (lambda here: here.long().bincount(), "bincount"),
    ],
)
def test_host_syncs_are_counted_and_refused(wait: object, kind: str) -> None:
    here = torch.ones(3, device=HERE)
    sim.reset()
    wait(here)
    assert sim.syncs()[kind] == 1
    with sim.no_syncs(), pytest.raises(RuntimeError, match=f"a host sync where none is allowed: {kind}"):
        wait(here)


def test_copies_to_and_from_pinned_memory_are_no_syncs_if_asked_for() -> None:
    host = torch.arange(3.0).pin_memory()
    assert host.is_pinned()
    assert not torch.ones(3).is_pinned()
    with sim.no_syncs():
        here = host.to(HERE, non_blocking=True)
        back = torch.empty(3, pin_memory=True).copy_(here, non_blocking=True)
    assert torch.equal(back, host)
    with sim.no_syncs(), pytest.raises(RuntimeError, match="to the device"):
        host.to(HERE)


def test_work_on_the_device_is_no_sync() -> None:
    with sim.no_syncs():
        here = torch.full((4, 4), 2.0, device=HERE, requires_grad=True)
        torch.where(here > 1, here.softmax(0), torch.zeros_like(here)).square().sum().backward()
        here.grad.mul_(torch.tensor(3.0))
