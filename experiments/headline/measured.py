"""Finished cells as they are read from their files: the one source of every figure of the report."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from statistics import mean
from typing import Any

from experiments.headline.cell_schema import checked_cell, plain_text
from experiments.headline.experiment import SHOWN, UNSTRUCTURED, VALIDATION
from leap_pl.comparison.entries import Entry, check_protocols, entry_of_result
from leap_pl.errors import UserError, listing
from leap_pl.evaluation.record import read_result

# What the report shows of every result: part → keys; of the result itself under "".
SAID = {
    "": ("config", "hardware", "versions", "commit", "seed", "mean"),
    "model": ("dtype",),
    "hardware": ("processor", "cores", "threads"),
}


@dataclass(frozen=True)
class Measured:
    """A finished cell: its file, the same as an entry of a comparison, and what it says of its making."""

    result: dict[str, Any]
    entry: Entry
    cell: dict[str, Any]

    @property
    def title(self) -> str:
        """The row's name in tables."""
        return str(self.cell["title"])

    @property
    def model(self) -> str:
        """The base model's name in tables."""
        return Path(self.result["model"]["base_model"]).name

    @property
    def is_dense(self) -> bool:
        """Whether nothing was removed."""
        return self.cell["sparsity"] is None

    @property
    def repeat_of(self) -> str | None:
        """The name of the cell that it repeats with another seed; None: it is the first of its kind."""
        name: str | None = self.cell.get("repeat_of")
        return name

    @property
    def has_config(self) -> bool:
        """Whether a config was run: of ``leap_pl fit`` or ``leap_pl recover``."""
        return "trainer" in self.cell["settings"]

    @property
    def is_learned(self) -> bool:
        """Whether its mask was learned here, and not taken from another cell, and nothing else was."""
        model = self.cell["settings"].get("model", {})
        return self.has_config and "mask" not in model and model.get("train_weights", "none") == "none"

    @property
    def dtypes(self) -> list[str]:
        """Data types of weights and computation while it was made and while it was measured."""
        made = self.result["config"].get("dtype") if self.has_config else self.cell["settings"].get("dtype")
        return [dtype for dtype in (made, self.result["model"]["dtype"]) if dtype is not None]

    @property
    def seed(self) -> int:
        """The seed that it was made with."""
        return _seed(self.result)

    @property
    def titles(self) -> dict[str, str]:
        """Role → what tables call the text, of the texts that tables show: SHOWN first, then further ones."""
        texts = self.cell["texts"]
        return {role: texts[role]["title"] for role in dict.fromkeys((*SHOWN, *texts)) if role != VALIDATION}

    def perplexity(self, role: str) -> dict[str, Any]:
        """What was measured on the text of ``role``."""
        return dict(self.result["perplexity"][self.cell["texts"][role]["text"]])


def read_cells(folder: Path) -> list[Measured]:
    """The cells in ``folder``, in the order of the experiment.

    Raises:
        UserError: There is none, one cannot be read, two of a model were measured in different ways, or two models have
            one name.
    """
    found = []
    for path in sorted(folder.glob("*.json")):
        result = read_result(path)
        if "cell" not in result:
            raise UserError(f"{path} is a result, but of no cell of the experiment. Take it out of {folder}.")
        try:
            result["cell"] = checked_cell(result, SHOWN, (VALIDATION,))
            _check_shown(result)
        except ValueError as error:
            raise UserError(f"{path} is damaged: {error}. Make the cell again, or take the file out.") from error
        if result["cell"]["name"] != path.stem:  # a copy would count twice
            raise UserError(f"{path} is the file of {result['cell']['name']}. Give it that name, or take it out.")
        found.append(Measured(result, _entry(path, result), result["cell"]))
    if not found:
        raise UserError(f"{folder} holds no finished cell. Run make results first.")
    found = sorted(found, key=lambda measured: measured.cell["order"])
    for name, rows in by_model(found).items():
        named = dict.fromkeys(measured.result["model"]["base_model"] for measured in rows)
        if len({measured.entry.fingerprint for measured in rows}) > 1:
            raise UserError(
                f"{folder} has cells of several models that are called {name} ({listing(list(named))}): figures of one "
                "would be compared with those of another. Take out those of one."
            )
        check_protocols([measured.entry for measured in rows])
    return found


def _check_shown(result: dict[str, Any]) -> None:
    """Check what the report shows of a cell's measuring, and that its model's name is one of a folder.

    Raises:
        ValueError: Something is missing, or is no name; the message is one line that names it.
    """
    for part, keys in SAID.items():
        missing = [key for key in keys if key not in (result[part] if part else result)]
        if missing:
            raise ValueError(f"it lacks {listing([f'{part}.{key}' if part else key for key in missing])}")
    name = Path(result["model"]["base_model"]).name
    if name in ("", ".."):
        raise ValueError(f"the base model {result['model']['base_model']!r} has no name")
    try:
        plain_text(name)
    except ValueError as error:
        raise ValueError(f"the base model's name {error}") from error


def by_model(found: Sequence[Measured]) -> dict[str, list[Measured]]:
    """The cells of each model, in the order of the experiment."""
    models: dict[str, list[Measured]] = {}
    for measured in found:
        models.setdefault(measured.model, []).append(measured)
    return models


def _entry(path: Path, result: dict[str, Any]) -> Entry:
    """The cell as a comparison takes it: by its row's title, and with the texts by theirs."""
    cell, told = result["cell"], entry_of_result(str(path), result)
    label = (
        cell["title"]
        if cell["sparsity"] is None
        else f"{cell['title']}, {_heading(cell['sparsity'], cell['table'], cell.get('text'))}"
    )
    shown = [text for role, text in cell["texts"].items() if role != VALIDATION]
    texts = {text["title"]: told.perplexity[text["text"]] for text in shown}
    if cell.get("repeat_of") is not None:
        label += f", seed {_seed(result)}"
    return replace(told, label=label, method=cell["title"], perplexity=texts)


def _seed(result: dict[str, Any]) -> int:
    seed: int = result["config"].get("seed", result["seed"])  # that of a dense model's evaluation
    return seed


def _heading(sparsity: float, table: str, text: str | None) -> str:
    form = "" if table == UNSTRUCTURED else f", {table}"
    return f"{100 * sparsity:g}%{form}" + ("" if text is None else f", from {text}")


@dataclass(frozen=True)
class Group:
    """The rows of one table: one sparsity, one pattern, one text that they read.

    Attributes:
        sparsity: That was asked for.
        table: ``unstructured``, or the pattern.
        text: What tables call the text; None: it is the experiment's.
        rows: All but the dense model.
        dense: That.
        repeats: Rows again, with other seeds.
    """

    sparsity: float
    table: str
    text: str | None
    rows: list[Measured]
    dense: Measured | None
    repeats: list[Measured] = field(default_factory=list)

    @property
    def heading(self) -> str:
        """What the table is called."""
        return _heading(self.sparsity, self.table, self.text)

    @property
    def entries(self) -> list[Entry]:
        """Of the rows."""
        return [measured.entry for measured in self.rows]

    @property
    def baselines(self) -> set[str]:
        """Titles of the rows whose best is the measure of the others."""
        return {measured.title for measured in self.rows if measured.cell["baseline"]}

    @property
    def best_baseline(self) -> Measured | None:
        """The baseline with the lowest geometric mean of the perplexities on both texts."""
        baselines = [measured for measured in self.rows if measured.cell["baseline"]]
        return min(baselines, key=lambda m: prod(m.perplexity(role)["value"] for role in SHOWN), default=None)

    @property
    def best_baselines(self) -> list[Measured]:
        """:attr:`best_baseline`, and that with the best mean accuracy if it is another."""
        scored = [m for m in self.rows if m.cell["baseline"] and m.result["mean"]]
        found = [self.best_baseline, max(scored, key=lambda m: float(m.result["mean"]["value"]), default=None)]
        return list({m.cell["name"]: m for m in found if m is not None}.values())

    @property
    def best_learned(self) -> Measured | None:
        """The learned row with the lowest perplexity on the validation text."""
        return min(self.best_learned_by_tokens, key=_validation, default=None)

    @property
    def best_learned_by_tokens(self) -> list[Measured]:
        """Of each number of training tokens the learned row with the lowest perplexity on the validation text.

        It is one of those with the most seeds, by their mean: one that is low by chance is not chosen before several.
        """
        by_tokens: dict[int, list[Measured]] = {}
        for measured in self.rows:
            if measured.is_learned:
                by_tokens.setdefault(measured.cell["tokens"], []).append(measured)
        return [min(rows, key=self._most_seeds_first) for _, rows in sorted(by_tokens.items())]

    def _most_seeds_first(self, row: Measured) -> tuple[int, float]:
        seeds = self.of_seeds(row)
        return -len(seeds), mean(map(_validation, seeds))

    @property
    def reference(self) -> Measured | None:
        """The row whose gap to the dense model is what the others close."""
        return next((measured for measured in self.rows if measured.cell["reference"]), None)

    def of_seeds(self, row: Measured) -> list[Measured]:
        """Return ``row`` and its repeats with other seeds."""
        return of_seeds(row, self.repeats)

    def gap_closed(self, row: Measured, role: str) -> float | None:
        """(reference − row) / (reference − dense) in perplexity.

        None for the dense model and the baselines, or where the reference or the dense model is not there, or one of
        the three was not measured on that text.
        """
        reference = self.reference
        if reference is None or self.dense is None or row is self.dense or row.cell["baseline"]:
            return None
        three = (reference, row, self.dense)
        if not all(role in m.titles for m in three):
            return None
        far, near, dense = (float(m.perplexity(role)["value"]) for m in three)
        return (far - near) / (far - dense)


def of_seeds(row: Measured, found: Sequence[Measured]) -> list[Measured]:
    """Return ``row`` and those of ``found`` that repeat it with other seeds."""
    return [row, *(measured for measured in found if measured.repeat_of == row.cell["name"])]


def _validation(measured: Measured) -> float:
    return float(measured.perplexity(VALIDATION)["value"])


def titles_of(found: Sequence[Measured]) -> dict[str, str]:
    """Role → what tables call the text, of all texts that tables of ``found`` show."""
    return {role: title for measured in found for role, title in measured.titles.items()}


def groups(found: Sequence[Measured]) -> list[Group]:
    """The tables of the cells of one model, in the order of the experiment, those of one pattern by sparsity."""
    dense = next((measured for measured in found if measured.is_dense), None)
    by_table: dict[tuple[str, str | None], dict[float, list[Measured]]] = {}
    for measured in found:
        if not measured.is_dense:
            kind = (measured.cell["table"], measured.cell.get("text"))
            by_table.setdefault(kind, {}).setdefault(measured.cell["sparsity"], []).append(measured)
    return [
        Group(sparsity, table, text, [m for m in rows if m.repeat_of is None], dense, [m for m in rows if m.repeat_of])
        for (table, text), by_sparsity in by_table.items()
        for sparsity, rows in sorted(by_sparsity.items())
    ]
