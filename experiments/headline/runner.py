"""Runs what is left of an experiment: a finished step is not run again, an interrupted one goes on."""

import fcntl
import json
import math
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from experiments.headline import running
from experiments.headline.cells import told_mask
from experiments.headline.experiment import Cell
from experiments.headline.progress import RECORD, Progress
from experiments.headline.steps import Step
from leap_pl.errors import UserError, listing
from leap_pl.evaluation.record import read_result
from leap_pl.files import atomic_file


class Runner(Progress):
    """The cells of an experiment in a folder, and how to do what is left of them."""

    lock: tuple[int, ...] = ()

    def run(self, cells: Sequence[Cell]) -> dict[str, str]:
        """Do what is left of ``cells``; returns what failed, by cell. One that fails stops only those that need it.

        Of a cell that is told of, needed by another, the mask alone is made: what was measured of it stands.

        Raises:
            UserError: Another process works in the same folder.
        """
        failed: dict[str, str] = {}
        with _alone(self.folder) as lock:
            self.lock = (lock,)
            for number, cell in enumerate(cells, 1):
                caption = f"[{number}/{len(cells)}] {cell.name}"
                without = [name for name in cell.needs if name in failed]
                try:
                    if without:
                        raise UserError(f"{caption}: needs {listing(without)}, which failed.")
                    self._run_cell(cell, caption)
                except UserError as error:
                    failed[cell.name] = str(error)
                    _say(str(error))
        return failed

    def _run_cell(self, cell: Cell, caption: str) -> None:
        steps = self.all_steps(cell)
        assert steps is not None  # the cells that it needs come before it
        if self.is_told(cell):
            steps = [step for step in steps if step.name == "make"]
        if cell.fit is not None:
            self._make_way(cell, steps[0], caption)
        for step in steps:
            if self.is_done(cell, step):
                continue
            began = time.monotonic()
            if step.name == "make":
                self._make(cell, step, f"{caption} {step.words[0]}")
            elif step.work is not None:
                step.work()
                self._write(cell, step, {"seconds": time.monotonic() - began})
            else:
                log = self.steps.place(cell) / "evaluate.log"
                ran = running.run_command(step.words, log, f"{caption} {step.name}", self.lock)
                self._write(cell, step, {"seconds": ran.seconds, "peak_rss": ran.peak_rss})
            _say(f"{caption}: {step.name} done in {time.monotonic() - began:.0f} s")
            if step.name == "make":
                self._compare(cell, caption)

    def _compare(self, cell: Cell, caption: str) -> None:
        """Say so where the mask that was made here is not the one whose measurements another machine told."""
        if self.told is None or not self.is_told(cell):
            return
        told = read_result(self.told / f"{cell.name}.json")["cell"].get("mask")
        if told is None:
            _say(f"{caption}: whether this mask is the one that was measured is not known; its file has no digest")
        elif told != told_mask(self.steps.mask(cell)):
            _say(
                f"{caption}: the mask made here is not, bit by bit, the one that was measured, as on other processors "
                f"or with other versions. What is learned from it may differ; {self.told / cell.name}.json stays."
            )

    def _make_way(self, cell: Cell, make: Step, caption: str) -> None:
        """Put a finished learned cell of other settings away, and take one of today's settings back.

        A mask that took hours is not thrown away because a setting was tried.
        """
        place, told = self.steps.place(cell), self.record(cell).get("make", {})
        if told.get("digest") == make.digest:
            return
        if "finished" in told:
            away = self._away(cell, told["digest"])
            shutil.rmtree(away, ignore_errors=True)
            away.parent.mkdir(parents=True, exist_ok=True)
            place.rename(away)
            _say(f"{caption}: its settings have changed; what was made with the old ones lies in {away}")
        back = self._away(cell, make.digest)
        if back.is_dir():
            shutil.rmtree(place, ignore_errors=True)
            back.rename(place)
            _say(f"{caption}: was made with these settings before, and is taken from {back}")

    def _make(self, cell: Cell, step: Step, caption: str) -> None:
        place, record = self.steps.place(cell), self.record(cell)
        told = record.get("make", {})
        if told.get("digest") != step.digest:
            if told:
                _say(f"{caption}: its settings have changed, it begins anew")
            for name in ("made", "checkpoints", "measured", "log"):
                shutil.rmtree(place / name, ignore_errors=True)
            told = {}
        seconds, peak = told.get("seconds", 0.0), told.get("peak_rss", 0)
        words, checkpoint = list(step.words), None
        if cell.fit is not None:
            with atomic_file(self.steps.config(cell)) as temporary:
                temporary.write_text(yaml.safe_dump(step.settings, sort_keys=False), encoding="utf-8")
            checkpoint = self.steps.checkpoint(cell)
            # Without a checkpoint, a mask may be there all the same: killed between the two, the run begins anew.
            words += ["--force"] if checkpoint is None else ["--ckpt_path", str(checkpoint)]
        if "began" in told and checkpoint is not None:
            # The last session did not come to its end: what counts of it is what it saved. A copy of a checkpoint has a
            # date of its own, so no more counts than the session lasted, where it could say.
            saved = min(checkpoint.stat().st_mtime, told.get("ended", math.inf))
            seconds += max(saved - told["began"], 0)
        begun = {"settings": step.settings, "seconds": seconds, "peak_rss": peak, "began": time.time()}
        self._write(cell, step, begun, finished=False)
        try:
            ran = running.run_command(words, place / f"{words[0]}.log", caption, self.lock)
        except BaseException:
            self._write(cell, step, begun | {"ended": time.time()}, finished=False)
            raise
        done = {"settings": step.settings, "seconds": seconds + ran.seconds, "peak_rss": max(peak, ran.peak_rss)}
        self._write(cell, step, done)
        # A checkpoint holds three float32 numbers a weight, the mask one bit.
        shutil.rmtree(place / "checkpoints", ignore_errors=True)

    def _write(self, cell: Cell, step: Step, told: dict[str, Any], *, finished: bool = True) -> None:
        entry = {"digest": step.digest, "words": step.words, **told}
        if finished:
            entry["finished"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        with atomic_file(self.steps.place(cell) / RECORD) as temporary:
            temporary.write_text(json.dumps(self.record(cell) | {step.name: entry}, indent=1) + "\n", encoding="utf-8")


@contextmanager
def _alone(folder: Path) -> Iterator[int]:
    """Make sure that no other process works in ``folder``, and yield the open file that says so.

    A child that is given it, and outlives its parent, still counts.

    Raises:
        UserError: One does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"another process works in {folder}. Wait for its end, or end it.") from error
        yield lock.fileno()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
