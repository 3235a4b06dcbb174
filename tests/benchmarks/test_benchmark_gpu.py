"""``python -m benchmarks.gpu`` on the CPU: what it says, what it needs, and that what is broken fails."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import cells, checks, device, runs
from benchmarks.gpu.shapes import MODELS, TINY
from leap_pl.gates import BernoulliGate, NMGate

CPU = torch.device("cpu")

# What leap_pl needs for other things than the benchmark, hidden as if it was not installed.
HIDDEN = ["pydantic", "pydantic_core", "datasets", "pyarrow", "gguf", "lm_eval", "tensorboard", "matplotlib"]
HIDDEN += ["accelerate", "pandas", "scipy", "hypothesis", "docstring_parser", "typeshed_client", "_jsonnet"]
ALONE = f"""
import runpy, sys
class Hiding:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {HIDDEN} else self.finder.find_spec(name, path, target)
    def find_distributions(self, context):
        named = lambda name: (name or "").replace("-", "_") in {HIDDEN}
        found = [] if named(context.name) else self.finder.find_distributions(context)
        return (one for one in found if not named(one.metadata["Name"]))
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = [Hiding(one) if hasattr(one, "find_distributions") else one for one in sys.meta_path]
for name in {HIDDEN}:
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{{name}} is not hidden")
runpy.run_module("benchmarks.gpu", run_name="__main__")
"""


def test_the_whole_command_with_few_packages(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    words = ["--device", "cpu", "--tiny", "--seq_length", "32", "--repeats", "2", "--output", str(output)]
    environment = os.environ | {"LEAP_PL_COMPILE": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", ALONE, *words], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    told = json.loads(output.read_text(encoding="utf-8"))
    results = {row["check"]: row["result"] for row in told["checks"]}
    assert {name for name, result in results.items() if result != "PASS"} == {
        f"no host sync in a micro-batch: {kind}" for kind in runs.KINDS
    }
    (note,) = [row["figure"] for row in told["checks"] if row["check"] == "resume: bit for bit, math attention"]
    assert note.startswith("0 of ")
    assert "there is no pydantic" in note
    assert (told["skipped"], told["failed"]) == ([], [])
    steps = {(row["model"], row["tokens"], row["variant"]): row for row in told["rows"] if row["cell"] == "step"}
    assert {variant for _, _, variant in steps} == set(cells.VARIANTS)
    dense, ours = (steps["llama-3.2-1b", 64, variant] for variant in ("dense", "leap_pl"))
    assert ours["of dense"] == pytest.approx(ours["ms"] / dense["ms"])
    assert ours["tokens/s"] == pytest.approx(64e3 / ours["ms"])
    assert ours["operators"] > dense["operators"]
    assert {row["cell"] for row in told["rows"]} == {"step", "evaluation", "pruning", "decoding"}
    assert "cpu" in told["machine"]
    # The table of the rows comes last.
    last = done.stdout.rstrip().splitlines()[-len(told["rows"]) :]
    assert all(line.startswith("|") for line in last)
    assert "| step | llama-3.2-1b | 64 | leap_pl |" in done.stdout


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("kind", [BernoulliGate, NMGate])
def test_a_broken_kernel_fails(kind: type[Any], monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> None:
    """One value of the masked weight that is wrong by 1%: the check of this kind, and no other kernel's."""
    soften_all = kind.soften_all

    def broken(gates: Any, weights: Any) -> list[tuple[Tensor, ...]]:
        wrong = [torch.ones_like(weight) for weight in weights]
        for factors in wrong:
            factors.view(-1)[7] = 1.01
        softened = zip(soften_all(gates, weights), wrong, strict=True)
        return [(masked * factors, *sums) for (masked, *sums), factors in softened]

    monkeypatch.setattr(kind, "soften_all", broken)
    monkeypatch.setattr(checks, "checks_of", only("float64"))
    output = tmp_path / "gpu.json"
    assert command.main(["--device", "cpu", "--tiny", "--check_only", "--output", str(output)]) == 1
    told = json.loads(output.read_text(encoding="utf-8"))
    failed = {row["check"] for row in told["checks"] if row["result"] == "FAIL"}
    assert failed
    assert all(name.startswith(kind.__name__) for name in failed)
    assert told["rows"] == []
    assert "FAIL    " in capsys.readouterr().out


@pytest.mark.usefixtures("eager")
def test_another_bit_of_noise_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    bits = checks.element_bits
    monkeypatch.setattr(checks, "element_bits", lambda *given: bits(*given) ^ 1)
    rows = checks.run({"bits": lambda: checks.random_bits(CPU, large=False)})
    assert (rows[0]["result"], rows[0]["figure"].partition(",")[0]) == (
        "FAIL",
        "CPU and definition: 9312 of 9312 differ",
    )


@pytest.mark.usefixtures("eager")
def test_a_run_that_does_not_resume_exactly_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Noise that goes by the number of passes, and not by the step."""
    place, keys, passes = runs.Place.make(CPU, tmp_path), BernoulliGate.key_numbers, [0]

    def counted(self: BernoulliGate, part: str = "") -> tuple[int, int]:
        passes[0] += 1
        return keys(self, f"{part} {passes[0]}")

    monkeypatch.setattr(BernoulliGate, "key_numbers", counted)
    every = checks.checks_of(place, large=False)
    (row,) = checks.run({"resume": every["resume: bit for bit, math attention"]})
    assert row["result"] == "FAIL"
    assert "differ, by" in row["figure"]


def only(word: str) -> Callable[..., dict[str, checks.Check]]:
    every = checks.checks_of

    def some(*given: Any, **more: Any) -> dict[str, checks.Check]:
        return {name: check for name, check in every(*given, **more).items() if word in name}

    return some


# -- measurements -----------------------------------------------------------------------------------------


def bench(**given: Any) -> cells.Bench:
    settings: dict[str, Any] = {"device": CPU, "models": TINY, "seq_length": 32, "repeats": 1, "until": float("inf")}
    return cells.Bench(**{**settings, **given})


@pytest.mark.usefixtures("eager")
def test_what_does_not_fit_is_a_row_and_what_fits_alone_is_measured_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """One variant never fits; another only where no other one is held."""
    make, held = cells.makers, [0]

    class Held:
        def __init__(self, step: Callable[[Tensor], None]) -> None:
            self.step, held[0] = step, held[0] + 1

        def __call__(self, ids: Tensor) -> None:
            self.step(ids)

        def __del__(self) -> None:
            held[0] -= 1

    def makers(**given: Any) -> dict[str, Callable[[Any], Any]]:
        def making(variant: str, maker: Callable[[Any], Any], model: Any) -> Held:
            if variant == "published" or (variant == "leap_pl" and held[0]):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return Held(maker(model))

        return {name: lambda model, n=name, m=maker: making(n, m, model) for name, maker in make(**given).items()}

    monkeypatch.setattr(cells, "makers", makers)
    rows, skipped, failed = cells.measure([cells.Steps("llama-3.2-1b", 32, 1)], bench())
    assert (skipped, failed, held) == ([], [], [0])
    by_variant = {row["variant"]: row for row in rows}
    assert by_variant["published"]["note"] == "out of memory"
    assert by_variant["published"]["ms"] is None
    assert by_variant["leap_pl"]["ms"] > 0
    assert by_variant["leap_pl"]["note"] is None


def test_a_cell_that_fails_leaves_the_others_and_one_without_time_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("\nno kernel image\nfor this device")

    monkeypatch.setattr(cells, "prune", fail)
    monkeypatch.setattr(cells, "makers", lambda **_: {"dense": fail, "published": fail})
    wanted: list[cells.Cell] = [
        cells.Pruning("qwen2.5-0.5b", "wanda", 64, 1),
        cells.Steps("llama-3.1-8b", 64, 1e6),
        cells.Evaluation("qwen2.5-0.5b", 64, 1),
        cells.Steps("llama-3.2-1b", 64, 1, ("dense", "published")),
    ]
    rows, skipped, failed = cells.measure(wanted, bench(until=time.monotonic() + 1000))
    assert failed == ["pruning of qwen2.5-0.5b by wanda", "steps of llama-3.2-1b at 64 tokens"]
    assert skipped == ["steps of llama-3.1-8b at 64 tokens"]
    assert rows[0]["note"] == "RuntimeError: no kernel image"
    assert rows[1]["cell"] == "evaluation"
    assert [row["note"] for row in rows[2:]] == ["RuntimeError: no kernel image"] * 2


def test_on_a_gpu_time_is_that_of_events_and_kernels_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same lines, with CUDA's events and a trace that say what is expected of them."""
    cuda, said = torch.device("cuda"), list[str]()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            said.append("record")

        def synchronize(self) -> None:
            said.append("wait")

        def elapsed_time(self, _: "Event") -> float:
            return 250.0

    class Trace:
        def __init__(self, activities: Any) -> None: ...

        def __enter__(self) -> "Trace":
            return self

        def __exit__(self, *_: object) -> None: ...

        def export_chrome_trace(self, file: str) -> None:
            events = [{"cat": "kernel"}, {"cat": "cuda_runtime", "name": "cudaLaunchKernel"}, {"cat": "kernel"}, {}]
            Path(file).write_text(json.dumps({"traceEvents": events}), encoding="utf-8")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(device, "profile", Trace)
    assert device.clocked(lambda: said.append("step"), cuda) == 0.25
    assert said == ["record", "step", "record", "wait"]
    assert device.launches(lambda: None, cuda) == {"launches": 2}
    assert device.launches(lambda: torch.ones(3).add_(1), CPU) == {"operators": 2}


def test_cells_fit_ten_minutes_and_name_known_models() -> None:
    every = cells.cells(tiny=False)
    assert {cell.model for cell in every} == set(MODELS) == set(TINY)
    assert sum(cell.seconds for cell in every) <= 480  # the checks take the rest
    assert len({cell.name for cell in every}) == len(every)
    large = [cell for cell in every if cell.model == "llama-3.1-8b"]
    assert all(isinstance(cell, cells.Steps) and cell.variants == ("low_memory",) for cell in large)
    assert {type(cell) for cell in cells.cells(tiny=True)} == {type(cell) for cell in every}


def test_the_gpu_that_is_named_is_the_one_that_is_measured(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Events are recorded on the current device, and a trainer takes the first one."""
    assert runs.accelerator(torch.device("cuda", 1)) == {"accelerator": "gpu", "devices": [1]}
    assert runs.accelerator(torch.device("cuda")) == {"accelerator": "gpu", "devices": [0]}
    assert runs.accelerator(torch.device("cpu")) == {"accelerator": "cpu", "devices": 1}
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(command.Place, "make", lambda device, folder: None)
    monkeypatch.setattr(command.checks, "checks_of", lambda place, large: [])
    monkeypatch.setattr(command.checks, "run", lambda checks, say: [])
    command.main(["--device", "cuda:1", "--check_only"])
    assert current == [torch.device("cuda", 1)]
