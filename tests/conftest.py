"""What several test files use: a tiny model and a little text on disk, and one finished run on them."""

import functools
import gc
import json
import logging
import os
import random
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Read when it is imported: no test waits for a hub.
os.environ["HF_HUB_OFFLINE"] = "1"
# As many workers as there are cores share the tests: no process that one starts takes more, nor a pool that compiles.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import lightning  # noqa: F401
import pytest
import torch
from hypothesis import settings
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from tiny import tiny_folder
from torch.utils import collect_env

from leap_pl.callbacks import sparsity
from leap_pl.errors import warn_once

# Fixtures that a few test files share.
pytest_plugins = [
    "hub_stand_in",
    "made_results",
    "python_runs",
    "recovered_runs",
    "scaled_runs",
    "stopped_runs",
    "tiny_experiment",
]

WORDS = "the mask keeps a weight where text needs it and drops one that no word will miss".split()  # noqa: SIM905


# No test is about its time, and a busy machine is no failure.
settings.register_profile("leap_pl", deadline=None)
settings.load_profile("leap_pl")

# Matrices are tiny.
torch.set_num_threads(1)

# lm-eval surveys the machine in each evaluation, and asks pip for all packages: a second, for the same answer.
collect_env.get_pretty_env_info = functools.cache(collect_env.get_pretty_env_info)

# No test cuts the power: data need not reach the disk. A descriptor that is not open is an error as ever.
os.fsync = lambda descriptor: os.fstat(descriptor) and None

# A shell that runs the tests in its background lets them, and what they start, ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

# After a run Lightning sets each signal's handler to the one that Python knows of. It does not know those of
# faulthandler, which say where a process crashed: a crash in a later run of that process would leave no trace.
_handlers = _SignalConnector._get_current_signal_handlers
_CRASHES = {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL}
_SignalConnector._get_current_signal_handlers = staticmethod(
    lambda: {number: handler for number, handler in _handlers().items() if number not in _CRASHES}
)

# Lightning's handlers hold the stream of the test that imported it, which is closed in the next one.
for name in ("lightning.pytorch", "lightning.fabric"):
    logging.getLogger(name).handlers.clear()


# Files that take longest, first: with two workers none is left alone with one of them at the end.
LONGEST = (
    "test_real.py",
    "test_planted_in_checkpoints.py",
    "test_rehearsal.py",
    "test_private_interfaces.py",
    "test_gpu.py",
    "test_notebooks.py",
    "test_benchmark_gpu.py",
    "test_resume.py",
    "test_resume_validation.py",
    "test_killing.py",
    "test_scale.py",
    "test_library_process.py",
    "test_gates_tile.py",
    "test_results.py",
    "test_weights_ranks.py",
    "test_trained_checkpoints.py",
    "test_scale_memory.py",
    "test_shared_steps_ranks.py",
    "test_gates_nm.py",
)

# Files that share what takes long to make, a whole experiment or the index of lm-eval's tasks, on one worker.
TOGETHER = {
    "test_results.py": "results",
    "test_results_report.py": "results",
    "test_results_definition.py": "results",
    "test_evaluate_command.py": "tasks",
    "test_evaluate_tasks.py": "tasks",
    "test_task_errors.py": "tasks",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # what was imported and collected stays, and need not be searched again and again


def pytest_unconfigure() -> None:
    gc.unfreeze()  # else what libraries free at the end of the process would be told as leaks


@pytest.hookimpl(optionalhook=True)  # some processes of the tests have no workers
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadFileScheduling

    class Files(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = str(super()._split_scope(nodeid))
            return TOGETHER.get(Path(file).name, file)

    return Files(config, log)


@pytest.fixture(autouse=True)
def as_in_a_new_process() -> None:
    """Begin as a new process does, whatever ran in this one before: a test is not to depend on which tests did.

    Commands set the precision of products, seed the random numbers, and warn of some things once.
    """
    torch.set_float32_matmul_precision("highest")
    torch.manual_seed(0)
    warn_once.cache_clear()


_pictures: dict[tuple[str, ...], Any] = {}


@pytest.fixture(autouse=True)
def one_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw densities, which takes longer than a tiny run's step, once for the weights of a model: no run's are read."""
    draw = sparsity.draw_densities

    def drawn(densities: Any) -> Any:
        key = tuple(densities)
        if any(not 0 <= density <= 1 for density in densities.values()):
            return draw(densities)
        if key not in _pictures:
            _pictures[key] = draw(densities)
        return _pictures[key]

    monkeypatch.setattr(sparsity, "draw_densities", drawn)


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the gates uncompiled: compiling takes longer than any tiny run."""
    monkeypatch.setenv("LEAP_PL_COMPILE", "0")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with the byte tokenizer."""
    return tiny_folder(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty short documents of a few words each."""
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    draw = random.Random(0)
    lines = [json.dumps({"text": " ".join(draw.choices(WORDS, k=40))}) for _ in range(60)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@dataclass(frozen=True)
class Run:
    """A finished ``leap_pl fit``."""

    folder: Path
    flags: list[str]

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoints" / "last.ckpt"

    @property
    def mask(self) -> Path:
        return self.folder / "checkpoints" / "mask.safetensors"


def fit_flags(model: str | Path, text: str | Path, folder: Path, *more: str) -> list[str]:
    """The words of a tiny ``leap_pl fit``."""
    has_prior = any(word.startswith("--model.prior.mask=") for word in more)
    return [
        "fit",
        f"--model.base_model={model}",
        "--model.dtype=float32",
        *([] if has_prior else ["--model.prior.method=magnitude"]),
        f"--model.prior.cache_dir={folder / 'priors'}",
        f"--data.text={text}",
        "--data.seq_length=32",
        "--data.batch_size=2",
        "--data.validation_sequences=4",
        "--trainer.accelerator=cpu",
        "--trainer.max_steps=6",
        "--trainer.accumulate_grad_batches=2",
        "--trainer.logger=TensorBoardLogger",
        f"--trainer.logger.save_dir={folder}",
        "--trainer.logger.name=",
        "--trainer.logger.version=tensorboard",
        f"--checkpoint.dirpath={folder / 'checkpoints'}",
        "--checkpoint.every_n_train_steps=2",
        "--checkpoint.save_top_k=-1",
        "--sparsity_log.every_n_steps=1",
        *more,
    ]


@pytest.fixture(scope="session")
def finished_run(model_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of six steps on the tiny model, at 50%."""
    from leap_pl.cli.main import main

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("run")
    flags = fit_flags(model_folder, text_file, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEAP_PL_COMPILE", "0")
        main(flags)
    return Run(folder, flags)


@pytest.fixture
def finished(finished_run: Run) -> Iterator[Run]:
    """The finished run that all tests share; one that writes into it fails, and not another after it."""
    before = _listing(finished_run.folder)
    yield finished_run
    assert _listing(finished_run.folder) == before


def _listing(folder: Path) -> dict[Path, tuple[int, int]]:
    """Return size and time of every file but those of the cache of priors, which tests share by their keys."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.parent.name != "priors"]
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def one_line(error: pytest.ExceptionInfo[Exception]) -> str:
    """The message of an error, which must be one line."""
    message = str(error.value)
    assert "\n" not in message
    return message


def failing(capsys: pytest.CaptureFixture[str], words: list[str]) -> str:
    """The message of a command that must end in status 2: its last line, with no traceback above it."""
    from leap_pl.cli.main import main

    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    text = capsys.readouterr().err
    assert "Traceback" not in text
    return text.strip().splitlines()[-1]


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that the command ends with, behind what it said when it began."""
    from leap_pl.cli.main import main

    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("leap_pl ")]
    assert len(lines) == 1 or lines[0].endswith("starting a new run.")
    return lines[-1]
