"""Kill fit, prune and export at random moments, and see what is left and how it goes on.

    python tests/killing.py --faults 200        prints one line of JSON: faults, runs lost, seconds

A process that has imported everything is forked for every run, which takes a second instead of ten. A third of the
faults are SIGKILL from outside after a random time; the others strike from inside, just before a random one of the
file operations (open for writing, flush, rename, remove …) that the run goes through, or when a random write is
half done, since the moments that matter most are the shortest. After each:

* fit: every checkpoint there is can be read and holds, bit for bit, what the run that was never killed held at
  that step; ``last.ckpt`` is one of them; a mask, if there is one, is the final mask. Then ``--ckpt_path last``
  goes on and ends with the same logits, optimizer, mask and curves as the run that was never killed.
* prune, export (``--force`` over an older result): the folder is the old one or the new one, file by file; the
  command, given again, makes the new one, and nothing half-written stays beside it.
"""

import argparse
import builtins
import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "LEAP_PL_COMPILE": "0", "TOKENIZERS_PARALLELISM": "false"}

STEPS, WINDOW = 4, 2
TOUCHING = ("os.rename", "os.remove", "os.symlink", "os.mkdir", "os.rmdir", "os.chmod", "ctypes.dlsym", "shutil.rmtree")


def at_file_operation(kind: str, number: int, act: Callable[[], None]) -> dict[str, int]:
    """Act just before, or amid, the ``number``-th (from 1) file operation or write of this process; counts both."""
    count, fsync = {"operation": 0, "write": 0}, os.fsync

    def operation(what: str = "operation") -> None:
        count[what] += 1
        if (what, count[what]) == (kind, number):
            act()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (event in TOUCHING or writes) and "/dev/" not in str(arguments[0]):
            operation()

    def flush(descriptor: int) -> None:
        operation()
        fsync(descriptor)

    def opened(file: Any, mode: str = "r", *more: Any, **settings: Any) -> Any:
        """A file whose writes reach the disk in two halves, with a moment between them."""
        handle = real_open(file, mode, *more, **settings)
        if set(mode) & set("wxa+") and not isinstance(file, int) and not str(file).startswith("/dev/"):
            write = handle.write

            def in_halves(data: Any) -> int:
                half = write(data[: len(data) // 2])
                handle.flush()
                operation("write")
                return int(half + write(data[len(data) // 2 :]))

            handle.write = in_halves
        return handle

    real_open = io.open
    sys.addaudithook(hook)
    os.fsync = flush
    io.open = builtins.open = opened  # type: ignore[assignment]
    return count


def run(
    words: list[str], log: Path, *, kill_after: float | None = None, kill_at: tuple[str, int] = ("", 0)
) -> tuple[int, dict[str, int], float]:
    """Run ``leap_pl`` in a fork; its exit status (negative: the signal), file operations, and seconds."""
    from tqdm import auto, std

    from leap_pl.cli.main import main

    begun = time.monotonic()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with log.open("a") as said:
                os.dup2(said.fileno(), 1)
                os.dup2(said.fileno(), 2)
            # Theirs is shared by all forks: one that is killed while it has it would block the rest.
            for bars in (std.tqdm, auto.tqdm):
                bars.set_lock(threading.RLock())
            count = at_file_operation(*kill_at, lambda: os.kill(os.getpid(), signal.SIGKILL))
            main(words)
            os.write(writer, json.dumps(count).encode())
            status = 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(status)
    os.close(writer)
    if kill_after is not None:
        time.sleep(kill_after)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with os.fdopen(reader) as pipe:
        count = json.loads(pipe.read() or "{}")
    return status, count, time.monotonic() - begun


def tree(folder: Path) -> dict[str, str]:
    """Every file under ``folder``, hidden ones too, with a digest of its bytes."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@dataclass
class Victim:
    """A command to kill, in a folder of its own."""

    name: str
    words: Callable[[Path], list[str]]
    prepare: Callable[[Path], None]
    """Makes the folder as the command finds it."""
    check: Callable[[Path], None]
    """What a killed command may leave."""
    finished: Callable[[Path], Any]
    """What must be the same in the end."""
    expected: Any = None
    operations: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    faults: int = 0
    struck: int = 0
    lost: list[str] = field(default_factory=list)

    def measure(self, folder: Path) -> None:
        """The run that is never killed."""
        self.prepare(folder)
        status, self.operations, self.seconds = run(self.words(folder), folder.with_suffix(".log"))
        assert status == 0, folder.with_suffix(".log").read_text()
        self.expected = self.finished(folder)

    def strike(self, folder: Path, draw: random.Random) -> None:
        """One fault, what it leaves, and how it goes on."""
        self.prepare(folder)
        log = folder.with_suffix(".log")
        kind = draw.choice(["time", "operation", "write"])
        if kind == "time":
            moment: dict[str, Any] = {"kill_after": draw.uniform(0, self.seconds)}
        else:
            moment = {"kill_at": (kind, draw.randint(1, self.operations[kind]))}
        self.faults += 1
        try:
            status, _, _ = run(self.words(folder), log, **moment)
            assert status in (0, -signal.SIGKILL), f"ended with {status}"
            self.struck += status != 0
            self.check(folder)
            status, _, _ = run(self.words(folder), log)
            assert status == 0, "did not go on"
            assert self.finished(folder) == self.expected, "another end"
            assert not list(folder.rglob(".*.part")), "leftovers"
        except Exception as error:
            self.lost.append(f"{self.name} {moment}: {error!r}: {log.read_text()[-2000:]}")


def victims(model: Path, text: Path, base: Path) -> Iterator[Victim]:
    """The three commands, and what of theirs is compared."""
    import torch
    from conftest import fit_flags
    from stopped_runs import curves

    from leap_pl.checkpoints.layout import load_checkpoint

    def digest(value: Any) -> str:
        if isinstance(value, torch.Tensor):
            return hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()
        if isinstance(value, dict):
            value = {str(key): digest(inner) for key, inner in value.items()}
        return repr(value)

    def at_step(path: Path) -> str:
        checkpoint = load_checkpoint(path, mmap=False)
        kept = ("state_dict", "lr_schedulers", "TextDataModule", "global_step")
        optimizer = [state["state"] for state in checkpoint["optimizer_states"]]
        return digest({key: checkpoint[key] for key in kept} | dict(enumerate(optimizer)))

    history: dict[str, str] = {}  # of the run never killed, which keeps all of its checkpoints

    def fit(folder: Path) -> list[str]:
        return fit_flags(
            model,
            text,
            folder,
            f"--trainer.max_steps={STEPS}",
            f"--trainer.accumulate_grad_batches={WINDOW}",
            "--trainer.val_check_interval=4",
            f"--model.prior.cache_dir={base / 'priors'}",
            "--checkpoint.every_n_train_steps=1",
            f"--checkpoint.save_top_k={2 if history else -1}",
            "--progress.refresh_seconds=1000",
            "--ckpt_path=last",
        )

    def check_fit(folder: Path) -> None:
        found = list((folder / "checkpoints").glob("*.ckpt"))
        for path in found:
            assert at_step(path) == history[path.resolve().name], f"{path.name} is another"
        assert len(found) < 2 or (folder / "checkpoints" / "last.ckpt").exists(), "no last.ckpt"
        mask = folder / "checkpoints" / "mask.safetensors"
        assert not mask.exists() or mask.read_bytes() == history["mask"], "another mask"

    def fit_finished(folder: Path) -> Any:
        checkpoints = folder / "checkpoints"
        if not history:
            history.update({path.name: at_step(path) for path in checkpoints.glob("step=*.ckpt")})
            history["mask"] = (checkpoints / "mask.safetensors").read_bytes()
            assert len(history) == STEPS + 1
        mask = (checkpoints / "mask.safetensors").read_bytes()
        return at_step(checkpoints / "last.ckpt"), mask, curves(folder / "tensorboard")

    yield Victim("fit", fit, lambda folder: folder.mkdir(), check_fit, fit_finished)

    older = base / "older"
    whole = base / "fit"  # of the run never killed

    def over_older(name: str) -> dict[str, Any]:
        """--force over an older result."""

        def prepare(folder: Path) -> None:
            shutil.copytree(older / name, folder / "out")

        old: dict[str, str] = {}
        new: dict[str, str] = {}

        def check(folder: Path) -> None:
            left = tree(folder / "out")
            assert left in (old, new), f"a third state: {sorted(left)}"

        def finished(folder: Path) -> dict[str, str]:
            if not new:
                old.update(tree(older / name))
                new.update(tree(folder / "out"))
                assert old != new
            return tree(folder / "out")

        return {"prepare": prepare, "check": check, "finished": finished}

    def prune(folder: Path, sparsity: float = 0.5) -> list[str]:
        words = ["prune", f"--model={model}", f"--text={text}", "--seq_length=32", "--sequences=8", "--force"]
        return [*words, "--method=sparsegpt", f"--sparsity={sparsity}", f"--output_dir={folder / 'out'}"]

    def export(folder: Path, mask: str = "mask") -> list[str]:
        given = f"--mask={whole / 'checkpoints' / mask}.safetensors"
        return ["export", given, f"--output_dir={folder / 'out'}", "--force"]

    for name, words in (("prune", prune(older / "prune", 0.25)), ("export", export(older / "export", "prior"))):
        (older / name).mkdir(parents=True)
        status, _, _ = run(words, base / f"older-{name}.log")
        assert status == 0, (base / f"older-{name}.log").read_text()
        for item in (older / name / "out").iterdir():
            item.rename(older / name / item.name)
        (older / name / "out").rmdir()
    yield Victim("prune", prune, **over_older("prune"))
    yield Victim("export", export, **over_older("export"))


def kill(faults: int, seed: int, base: Path) -> dict[str, Any]:
    """``faults`` faults, dealt to the three commands; the figures."""
    import torch
    from tiny import tiny_folder

    from leap_pl.cli import fit as trainer_cli  # noqa: F401  (imported once, before the forks)
    from leap_pl.cli import prune as command  # noqa: F401
    from leap_pl.export import hugging_face  # noqa: F401

    torch.set_num_threads(1)
    begun = time.monotonic()
    draw = random.Random(seed)
    text = base / "text.jsonl"
    documents = [
        " ".join(draw.choices(["mask", "keeps", "a", "weight", "where", "text", "needs", "it"], k=40))
        for _ in range(60)
    ]
    text.write_text("\n".join(json.dumps({"text": document}) for document in documents))
    model = tiny_folder(base / "model")
    told: dict[str, Any] = {"faults": 0, "struck": 0, "lost": 0, "seed": seed}
    for place, victim in enumerate(victims(model, text, base)):
        victim.measure(base / victim.name)
        for number in range(faults // 3 + (place < faults % 3)):
            folder = base / f"{victim.name}-{number}"
            victim.strike(folder, draw)
            shutil.rmtree(folder, ignore_errors=True)
        told[victim.name] = {"faults": victim.faults, "struck": victim.struck, **victim.operations}
        told["faults"] += victim.faults
        told["struck"] += victim.struck
        told["lost"] += len(victim.lost)
        for line in victim.lost:
            print(line, file=sys.stderr)
    return told | {"seconds": round(time.monotonic() - begun)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps(kill(given.faults, given.seed, Path(scratch))))
