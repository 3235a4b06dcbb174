"""What there is of an experiment: which steps of its cells are done, with the settings of today, and which are left."""

import json
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

from experiments.headline.cells import SUPERSEDED, is_current, write_overlap
from experiments.headline.digests import digest
from experiments.headline.experiment import Cell, Experiment
from experiments.headline.steps import Step, Steps
from leap_pl.data.source import TextSource
from leap_pl.errors import UserError, listing
from leap_pl.evaluation.record import read_result
from leap_pl.evaluation.texts import TEXTS

RECORD = "steps.json"  # in a cell's folder: step → what is known of it
LAID_OUT = "Texts and tasks are laid out by make assets assets-eval assets-mixture."


class Progress:
    """The cells of an experiment in a folder: what is done and what is left."""

    def __init__(self, experiment: Experiment, folder: Path, told: Path | None = None) -> None:
        """Take the experiment and its folders.

        Args:
            experiment: What is made.
            folder: Holds one folder a cell: masks, models and checkpoints, which stay on this machine.
            told: Holds one file a finished cell. What such a file tells with today's settings was done, on
                whatever machine, and is not done again.

        Raises:
            UserError: A local text, or the folder of a task, is not there.
        """
        self.experiment, self.folder, self.steps = experiment, folder, Steps(experiment, folder)
        self.told = told
        # Without one, cells that were made with it would be taken for cells of other settings, and be removed.
        for text in experiment.reads:
            try:
                if text not in TEXTS:
                    TextSource.open(text)
            except UserError as error:
                raise UserError(f"{error} {LAID_OUT}") from error
        for cell in experiment.cells.values():
            tasks = cell.model.evaluate.get("tasks_folder")
            lacking = (
                [task for task in experiment.tasks if not Path(tasks, task).is_dir()] if cell.tasks and tasks else []
            )
            if lacking:
                raise UserError(f"{tasks} has no {listing(lacking)}. {LAID_OUT}")

    def chosen(self, patterns: Sequence[str]) -> list[Cell]:
        """The cells whose name fits one of ``patterns`` (none: all), each after those that it needs.

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

    def _reads(self, cell: Cell) -> list[str]:
        """Names of the cells that are to be there before ``cell`` is made: once it is known which is best, that one."""
        kept = self.kept(cell)
        return list(cell.needs) if kept is None else [kept.name]

    def record(self, cell: Cell) -> dict[str, Any]:
        """What is written down of the steps of ``cell``."""
        return _read_record(self.steps.place(cell))

    def is_done(self, cell: Cell, step: Step) -> bool:
        """Whether ``step`` was done with the settings and inputs of today."""
        told = self.record(cell).get(step.name, {})
        return told.get("digest") == step.digest and "finished" in told and step.output.exists()

    def kept(self, cell: Cell) -> Cell | None:
        """The one with the lowest validation perplexity of those that ``cell`` is the best of; None: not known yet."""
        values = {name: self._validation(self.experiment.cells[name]) for name in cell.best_of}
        known = {name: value for name, value in values.items() if value is not None}
        return self.experiment.cells[min(known, key=known.__getitem__)] if known and len(known) == len(values) else None

    def _validation(self, cell: Cell) -> float | None:
        text = self.experiment.texts["validation"].text
        if self.told is not None and self.is_told(cell):
            return float(read_result(self.told / f"{cell.name}.json")["perplexity"][text]["value"])
        for step in self.all_steps(cell) or ():
            if text in step.settings.get("perplexity", []) and self.is_done(cell, step):
                return float(read_result(step.output)["perplexity"][text]["value"])
        return None

    def all_steps(self, cell: Cell, kept: Cell | None = None) -> list[Step] | None:
        """The steps of ``cell``, in order; None while it is not known what it is the best of.

        Args:
            cell: What is made and measured.
            kept: The cell whose mask it keeps, instead of the one that is the best here.
        """
        if cell.best_of and kept is None:
            kept = self.kept(cell)
            if kept is None:
                return None
        make = self.steps.make(cell, kept)
        if make is None:
            return self.steps.measures(cell, None)
        steps = [make]
        if cell.prior is not None:
            prior = self.experiment.cells[cell.prior]
            of_prior = self.steps.make(prior)
            assert of_prior is not None
            output = self.steps.place(cell) / "measured" / "overlap.json"
            work = partial(write_overlap, self.steps.mask(cell), self.steps.mask(prior), output)
            steps.append(Step("overlap", digest(["overlap", make.digest, of_prior.digest]), output, work=work))
        return steps + self.steps.measures(cell, make.digest)

    def is_finished(self, cell: Cell) -> bool:
        """Whether all steps of ``cell`` are done."""
        steps = self.all_steps(cell)
        return steps is not None and all(self.is_done(cell, step) for step in steps)

    def is_told(self, cell: Cell) -> bool:
        """Whether the file of ``cell``, made here or elsewhere, tells all of it with today's settings."""
        return self.told is not None and is_current(self, cell, self.told)

    def is_within_reach(self, cell: Cell) -> bool:
        """Whether the base model of ``cell`` is here, where a target of make lays it out."""
        return cell.model.target is None or Path(cell.model.base_model).exists()

    def left_out(self, cells: Sequence[Cell]) -> Iterator[str]:
        """A line a model that is not here: how many of ``cells`` cannot be run, and how it is laid out."""
        models = {cell.model.name: cell.model for cell in cells if not self.is_within_reach(cell)}
        for name, model in models.items():
            number = sum(cell.model.name == name for cell in cells)
            yield (
                f"{number} cells of {name or model.base_model} are left out: {model.base_model} is not there. Lay it "
                f"out with make {model.target}."
            )

    def left(self, cells: Sequence[Cell]) -> list[Cell]:
        """Those of ``cells`` that are to be run: not told of yet, or needed, here, by one that is not."""
        wanted = {cell.name for cell in cells if self.is_within_reach(cell) and not self.is_told(cell)}
        # Another may be the best once these are made.
        wanted |= {cell.name for cell in cells if self.is_within_reach(cell) and wanted & {*cell.best_of}}
        reached = list(wanted)
        while reached:
            others = set(self._reads(self.experiment.cells[reached.pop()])) - wanted
            wanted |= others
            reached += others
        return [cell for cell in cells if cell.name in wanted]

    def _away(self, cell: Cell, made: str) -> Path:
        return self.folder / SUPERSEDED / f"{cell.name}-{made}"

    def lines(self, cells: Sequence[Cell]) -> Iterator[str]:
        """A line a cell: what is done, what is left, with the token budget and the minutes that it took or may take."""
        left = minutes = 0
        for cell in cells:
            steps = self.all_steps(cell)
            budget = "" if cell.fit is None else f"{cell.tokens:,} tokens"
            takes = self._minutes(cell)
            if not self.is_within_reach(cell):
                state = f"needs make {cell.model.target}"
            elif self.is_told(cell):
                state = "done"
            elif steps is None:
                state = f"waits for {listing(list(cell.best_of))}"
            else:
                undone = [step.name for step in steps if not self.is_done(cell, step)]
                state = f"left: {', '.join(undone)}" if undone else "done"
                minutes += takes or 0 if undone else 0
                if "make" in undone and cell.fit is not None:
                    left += cell.tokens
                    state += self._begun(cell, steps[0])
            yield f"{cell.name:<32} {budget:>16} {'' if takes is None else f'{takes} min':>8}  {state}".rstrip()
        yield f"{left:,} training tokens are left, those of interrupted cells counted whole; about {minutes} minutes"

    def _minutes(self, cell: Cell) -> int | None:
        """Minutes that making and measuring ``cell`` took, or an estimate of them; None without one."""
        if self.told is None or not self.is_told(cell):
            return cell.minutes
        told = read_result(self.told / f"{cell.name}.json")
        return round(((told["cell"]["seconds"] or 0) + told["times"]["seconds"]["total"]) / 60)

    def _begun(self, cell: Cell, step: Step) -> str:
        told = self.record(cell).get("make")
        if self._away(cell, step.digest).is_dir():
            return " (was made with these settings before, will be taken back)"
        if told is None:
            return ""
        if told["digest"] != step.digest:
            return " (was made with other settings, begins anew)"
        checkpoint = self.steps.checkpoint(cell)
        if checkpoint is None:
            return " (begun, nothing saved)"
        return f" (goes on from {checkpoint.resolve().stem} of {step.settings['trainer']['max_steps']})"


def _read_record(place: Path) -> dict[str, Any]:
    path = place / RECORD
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
