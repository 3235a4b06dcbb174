"""Runs what is left of an experiment: a finished step is not run again, an interrupted one goes on."""

import fcntl
import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from leap_pl.errors import UserError, listing
from leap_pl.evaluation.record import read_result, write_result
from leap_pl.files import atomic_file
from leap_pl.results import running
from leap_pl.results.digests import digest
from leap_pl.results.experiment import Cell, Experiment
from leap_pl.results.steps import Step, Steps

RECORD = "steps.json"  # in a cell's folder: step → what is there of it


class Runner:
    """The cells of an experiment in ``folder``: what is done, what is left, and how to do it."""

    def __init__(self, experiment: Experiment, folder: Path) -> None:
        """Take the experiment and the folder that holds one folder a cell."""
        self.experiment, self.folder, self.steps = experiment, folder, Steps(experiment, folder)

    # -- what there is ------------------------------------------------------------------------------------

    def chosen(self, patterns: Sequence[str]) -> list[Cell]:
        """The cells whose name fits one of ``patterns``, each after those that it needs.

        Raises:
            UserError: A pattern fits none.
        """
        cells = self.experiment.cells
        for pattern in patterns:
            if not any(fnmatch(name, pattern) for name in cells):
                raise UserError(f"--only {pattern} fits no cell. The cells are {listing(list(cells), 40)}.")
        found: dict[str, Cell] = {}
        for name in cells:
            if not patterns or any(fnmatch(name, pattern) for pattern in patterns):
                self._add(name, found)
        return list(found.values())

    def _add(self, name: str, found: dict[str, Cell]) -> None:
        if name not in found:
            for other in self.experiment.cells[name].needs:
                self._add(other, found)
            found[name] = self.experiment.cells[name]

    def record(self, cell: Cell) -> dict[str, Any]:
        """What is written down of the steps of ``cell``."""
        path = self.steps.place(cell) / RECORD
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}

    def is_done(self, cell: Cell, step: Step) -> bool:
        """Whether ``step`` was done with the settings and inputs of today."""
        told = self.record(cell).get(step.name, {})
        return told.get("digest") == step.digest and "finished" in told and step.output.exists()

    def kept(self, cell: Cell) -> Cell | None:
        """Of the cells that ``cell`` is the best of, the one with the lowest validation perplexity; None: not known."""
        values = {name: self._validation(self.experiment.cells[name]) for name in cell.best_of}
        if not values or None in values.values():
            return None
        return self.experiment.cells[min(values, key=lambda name: values[name] or 0.0)]

    def _validation(self, cell: Cell) -> float | None:
        text = self.experiment.texts["validation"].text
        for step in self.all_steps(cell) or ():
            if self.is_done(cell, step) and text in step.settings.get("perplexity", []):
                return float(read_result(step.output)["perplexity"][text]["value"])
        return None

    def all_steps(self, cell: Cell) -> list[Step] | None:
        """The steps of ``cell``; None while it is not known what it is the best of."""
        kept = self.kept(cell) if cell.best_of else None
        if cell.best_of and kept is None:
            return None
        make = self.steps.make(cell, kept)
        steps = [] if make is None else [make]
        if make is not None and cell.prior is not None:
            prior = self.experiment.cells[cell.prior]
            of_prior = self.steps.make(prior)
            assert of_prior is not None
            output = self.steps.place(cell) / "measured" / "overlap.json"
            work = partial(_write_overlap, self.steps.mask(cell), self.steps.mask(prior), output)
            steps.append(Step("overlap", digest(["overlap", make.digest, of_prior.digest]), output, work=work))
        return steps + self.steps.measures(cell, None if make is None else make.digest)

    def is_finished(self, cell: Cell) -> bool:
        """Whether all steps of ``cell`` are done."""
        steps = self.all_steps(cell)
        return steps is not None and all(self.is_done(cell, step) for step in steps)

    # -- doing --------------------------------------------------------------------------------------------

    def run(self, cells: Sequence[Cell]) -> dict[str, str]:
        """Do what is left of ``cells``; returns what failed, by cell. One that fails stops only those that need it.

        Raises:
            UserError: Another process does the same.
        """
        with alone(self.folder) as lock:
            self.lock = lock
            return self._run(cells)

    def _run(self, cells: Sequence[Cell]) -> dict[str, str]:
        failed: dict[str, str] = {}
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
        if steps is None:
            raise UserError(f"{caption}: it is not known which of {listing(list(cell.best_of))} is better.")
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
                ran = running.run_command(step.words, log, f"{caption} {step.name}", [self.lock])
                self._write(cell, step, {"seconds": ran.seconds, "peak_rss": ran.peak_rss})
            _say(f"{caption}: {step.name} done in {time.monotonic() - began:.0f} s")

    def _make(self, cell: Cell, step: Step, caption: str) -> None:
        place, record = self.steps.place(cell), self.record(cell)
        if record.get("make", {}).get("digest") != step.digest:
            if record:
                _say(f"{caption}: its settings have changed, it begins anew")
            for name in ("made", "checkpoints", "measured", "log"):
                shutil.rmtree(place / name, ignore_errors=True)
            record = {}
        told = record.get("make", {"seconds": 0.0, "peak_rss": 0})
        words = list(step.words)
        checkpoint = self.steps.checkpoint(cell)
        if cell.fit is not None:
            with atomic_file(place / "fit.yaml") as temporary:
                temporary.write_text(yaml.safe_dump(step.settings, sort_keys=False), encoding="utf-8")
            if checkpoint.exists():
                words += ["--ckpt_path", str(checkpoint)]
        if "began" in told:
            # The last session did not come to its end: what counts of it is what it saved.
            saved = checkpoint.stat().st_mtime if checkpoint.exists() else told["began"]
            told["seconds"] += max(saved - told["began"], 0)
        self._write(cell, step, {**told, "began": time.time()}, finished=False)
        ran = running.run_command(words, place / f"{words[0]}.log", caption, [self.lock])
        told = {"seconds": told["seconds"] + ran.seconds, "peak_rss": max(told["peak_rss"], ran.peak_rss)}
        self._write(cell, step, told)
        # What a learned cell was resumed from is four gigabytes a billion weights, three times.
        shutil.rmtree(place / "checkpoints", ignore_errors=True)

    def _write(self, cell: Cell, step: Step, told: dict[str, Any], *, finished: bool = True) -> None:
        entry = {"digest": step.digest, "words": step.words, **told}
        if finished:
            entry["finished"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        with atomic_file(self.steps.place(cell) / RECORD) as temporary:
            temporary.write_text(json.dumps(self.record(cell) | {step.name: entry}, indent=1) + "\n", encoding="utf-8")

    # -- telling ------------------------------------------------------------------------------------------

    def lines(self, cells: Sequence[Cell]) -> Iterator[str]:
        """A line a cell: what is done, what is left, with the token budget."""
        left = 0
        for cell in cells:
            steps = self.all_steps(cell)
            budget = ""
            if cell.fit is not None:
                budget = f"{cell.tokens:>11,} tokens"
            if steps is None:
                state = f"waits for {listing(list(cell.best_of))}"
            else:
                undone = [step.name for step in steps if not self.is_done(cell, step)]
                state = f"left: {', '.join(undone)}" if undone else "done"
                if "make" in undone and cell.fit is not None:
                    left += cell.tokens
                    state += self._begun(cell, steps[0])
            yield f"{cell.name:<24} {budget:>18}  {state}"
        yield f"{left:,} training tokens are left"

    def _begun(self, cell: Cell, step: Step) -> str:
        told = self.record(cell).get("make")
        if told is None:
            return ""
        if told["digest"] != step.digest:
            return " (was made with other settings, begins anew)"
        checkpoint = self.steps.checkpoint(cell)
        if not checkpoint.exists():
            return " (begun, nothing saved)"
        return f" (goes on from {checkpoint.resolve().stem} of {step.settings['trainer']['max_steps']})"


def _write_overlap(mask: Path, prior: Path, output: Path) -> None:
    """How far a learned mask agrees with its prior, by layer."""
    from leap_pl.comparison.entries import read_entries
    from leap_pl.comparison.overlap import overlap

    first, second = read_entries([str(mask), str(prior)])
    found = overlap(first, second)
    assert found is not None
    assert first.mask is not None
    assert second.mask is not None
    others = second.mask.masks
    changed = sum(int((bits ^ others[name]).sum()) for name, bits in first.mask.masks.items())
    told = {
        "iou": found.iou,
        "chance": found.chance,
        "layers": {str(layer): value for layer, value in found.layers.items()},
        "changed": changed / first.mask.total,
    }
    with atomic_file(output) as temporary:
        temporary.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def collect(runner: Runner, folder: Path) -> int:
    """Write one file a finished cell into ``folder``; returns how many are there.

    A file of a cell that was not made here stays as long as it belongs to the experiment as it is today.
    """
    for path in folder.glob("*.json"):
        cell = runner.experiment.cells.get(path.stem)
        steps = runner.all_steps(cell) if cell is not None else []
        told = read_result(path).get("cell", {})
        if steps is not None and told.get("digests") != {step.name: step.digest for step in steps}:
            path.unlink()
    for cell in runner.experiment.cells.values():
        if runner.is_finished(cell):
            write_cell(runner, cell, folder / f"{cell.name}.json")
    return len(list(folder.glob("*.json")))


def write_cell(runner: Runner, cell: Cell, path: Path) -> None:
    """Write all that is known of a finished ``cell`` to one file, a result file of ``leap_pl evaluate`` with more.

    The evaluations of its steps are put together, and ``cell`` says what was done, with which settings.
    """
    from leap_pl.evaluation.tasks import mean_accuracy

    steps, record = runner.all_steps(cell), runner.record(cell)
    assert steps is not None
    results = [read_result(step.output) for step in steps if step.words[:1] == ["evaluate"]]
    merged = results[0]
    for result in results[1:]:
        merged["perplexity"] |= result["perplexity"]
        merged["tasks"] |= result["tasks"]
        for name, seconds in result["times"]["seconds"].items():
            merged["times"]["seconds"][name] = merged["times"]["seconds"].get(name, 0) + seconds
    merged["mean"] = mean_accuracy(merged["tasks"])
    merged["cell"] = _told(runner, cell, steps, record)
    write_result(path, merged)


def _told(runner: Runner, cell: Cell, steps: list[Step], record: dict[str, Any]) -> dict[str, Any]:
    experiment = runner.experiment
    kept = runner.kept(cell) if cell.best_of else None
    make = steps[0] if steps[0].name == "make" else None
    learned = cell if cell.fit is not None else kept
    tokens = 0
    if learned is not None:
        config = runner.steps.fit_config(learned)
        tokens = config["trainer"]["max_steps"] * runner.steps.tokens_of_step(config)
    overlap = next((json.loads(s.output.read_text(encoding="utf-8")) for s in steps if s.name == "overlap"), None)
    return {
        "name": cell.name,
        "row": cell.row,
        "title": cell.title,
        "order": list(experiment.cells).index(cell.name),
        "sparsity": cell.sparsity,
        "table": cell.table,
        "baseline": cell.baseline,
        "reference": experiment.reference,
        "about": experiment.about,
        "texts": {role: text.text for role, text in experiment.texts.items()},
        "settings": make.settings if make else {},
        "evaluate": experiment.evaluate,
        "prior": cell.prior,
        "kept": kept and kept.name,
        "tokens": tokens,
        "calibration_tokens": _calibration(runner, cell),
        "seconds": round(record["make"]["seconds"], 1) if make else None,
        "peak_rss": record["make"]["peak_rss"] if make else None,
        "digests": {step.name: step.digest for step in steps},
        "commands": [step.words for step in steps if step.words],
        "overlap": overlap,
    }


def _calibration(runner: Runner, cell: Cell) -> int:
    """Tokens that the one-shot part of ``cell`` read: its own, or its prior's."""
    if cell.prior is not None:
        return _calibration(runner, runner.experiment.cells[cell.prior])
    if cell.prune is None or cell.prune.get("method") == "magnitude":
        return 0
    return int(cell.prune.get("sequences", 128) * cell.prune.get("seq_length", 2048))


@contextmanager
def alone(folder: Path) -> Iterator[int]:
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
