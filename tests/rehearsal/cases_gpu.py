"""``benchmarks.gpu`` on the device: its checks and its measurements take every tensor where it is."""

from pathlib import Path
from typing import Any

import pytest
import sim
import torch

from benchmarks.gpu import cells, checks, runs
from benchmarks.gpu.shapes import TINY

DEVICE = torch.device(sim.DEVICE)


@pytest.fixture(autouse=True)
def _runs_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def accelerator(device: torch.device) -> dict[str, Any]:
        on_sim = {"accelerator": sim.Sim(), "strategy": sim.OnSim()} if device.type == sim.DEVICE else {}
        return {"accelerator": "cpu", "devices": 1, **on_sim}

    monkeypatch.setattr(runs, "accelerator", accelerator)
    monkeypatch.setattr(runs, "refuse_syncs", lambda device, on: torch.ops.rehearsal.refuse(on))


def test_every_check(tmp_path: Path) -> None:
    place = runs.Place.make(DEVICE, tmp_path)
    rows = {row["check"]: row for row in checks.run(checks.checks_of(place, large=False))}
    skipped = [name for name, row in rows.items() if row["result"] == "skipped"]
    assert skipped == ["DDP of one device", "FSDP2 of one device"]  # the device has no process group
    failed = {name: row["figure"] for name, row in rows.items() if row["result"] == "FAIL"}
    assert failed == {}
    assert "of the way" in rows["fit: BernoulliGate"]["figure"]
    assert rows["resume: bit for bit, math attention"]["figure"].endswith("differ")  # by the settings on record too


def test_a_sync_in_a_micro_batch_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, step = runs.Place.make(DEVICE, tmp_path), runs.LeapModule.training_step

    def waits(self: runs.LeapModule, *given: object) -> torch.Tensor:
        loss = step(self, *given)
        float(loss)
        return loss

    monkeypatch.setattr(runs.LeapModule, "training_step", waits)
    name = "no host sync in a micro-batch: BernoulliGate"
    (row,) = checks.run({name: checks.checks_of(place, large=False)[name]})
    assert row["result"] == "FAIL"
    assert "sync" in row["figure"]


def test_every_cell() -> None:
    bench = cells.Bench(DEVICE, TINY, seq_length=32, repeats=1, until=float("inf"))
    kinds = {(type(cell), getattr(cell, "method", "")): cell for cell in cells.cells(tiny=True)}
    rows, skipped, failed = cells.measure(kinds.values(), bench)
    assert (skipped, failed) == ([], []), rows
    assert all(row["tokens/s"] > 0 for row in rows)
