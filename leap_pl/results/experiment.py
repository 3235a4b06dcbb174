"""The definition of the experiment: a readable YAML file, and the cells that it spans."""

import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from leap_pl.errors import UserError, listing

UNSTRUCTURED = "unstructured"


@dataclass(frozen=True)
class Text:
    """A text that perplexity is measured on, and how far it is read (None: to its end)."""

    text: str
    max_tokens: int | None = None


@dataclass(frozen=True)
class Row:
    """One method of the table, at one sparsity or several.

    Attributes:
        title: What the table calls it.
        sparsity: The sparsities it is made at; none for the dense model.
        table: Rows stand in one table with those of their sparsity and the same word here: ``unstructured``, or
            the pattern (``2:4``).
        prune: Options of ``leap_pl prune``; makes the cell a one-shot one.
        fit: Settings of ``leap_pl fit`` that differ from the shared config, nested; makes it a learned one.
        prior: (with fit) The row whose mask of the same sparsity learning starts from. None: what the config says.
        tokens: (with fit) Training tokens. None: the experiment's.
        best_of: (with prune) Learned rows; the mask of the one with the lowest validation perplexity is kept,
            and its weights are solved anew.
        tasks: Whether the zero-shot tasks are measured. None: at the sparsities of ``tasks_at``.
        baseline: Whether it is one of the baselines that the others are measured against.
        each: Sparsity → fields of the row that are different there (``fit`` and ``prune`` are laid over).
    """

    title: str
    sparsity: tuple[float, ...] = ()
    table: str = UNSTRUCTURED
    prune: dict[str, Any] | None = None
    fit: dict[str, Any] | None = None
    prior: str | None = None
    tokens: int | None = None
    best_of: tuple[str, ...] = ()
    tasks: bool | None = None
    baseline: bool = False
    each: dict[float, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """A row at one sparsity: what is made and measured. Names of other cells are those of the same sparsity."""

    name: str
    row: str
    title: str
    sparsity: float | None
    table: str
    prune: dict[str, Any] | None
    fit: dict[str, Any] | None
    prior: str | None
    tokens: int
    best_of: tuple[str, ...]
    tasks: bool
    baseline: bool

    @property
    def needs(self) -> tuple[str, ...]:
        """The cells that must be there first."""
        return self.best_of + ((self.prior,) if self.prior else ())


@dataclass(frozen=True)
class Experiment:
    """All of it.

    Attributes:
        base_model: Hub id, local folder or GGUF file.
        about: Sentences on the model and the texts that belong beside every figure.
        texts: Role → text: ``like`` and ``unlike`` the calibration text, and ``validation``, by which ``best_of``
            chooses.
        evaluate: Options of ``leap_pl evaluate`` for every cell.
        tasks: Zero-shot task → limit of questions (of a group: of each of its tasks; None: all).
        tasks_at: Sparsities at which they are measured; 0 is the dense model.
        prune: Options of ``leap_pl prune`` for every cell.
        learn: The shared config of ``leap_pl fit``, as it is written.
        tokens: Training tokens of a learned cell.
        checkpoint_tokens: A learned cell saves a checkpoint each so many tokens.
        reference: Row whose gap to the dense model is the measure.
        cells: In the order of the file, by name.
    """

    base_model: str
    about: list[str]
    texts: dict[str, Text]
    evaluate: dict[str, Any]
    tasks: dict[str, int | None]
    tasks_at: tuple[float, ...]
    prune: dict[str, Any]
    learn: dict[str, Any]
    tokens: int
    checkpoint_tokens: int
    reference: str
    cells: dict[str, Cell]


def read_experiment(path: str | Path) -> Experiment:
    """Read the definition in ``path``.

    Raises:
        UserError: It is not there, not YAML, or says something that cannot be.
    """
    path = Path(path)
    told = _yaml(path)
    known = {f.name for f in fields(Experiment)} - {"cells", "learn", "tokens", "checkpoint_tokens"} | {"rows", "learn"}
    _only(told, known, str(path))
    _required(told, {"base_model", "texts", "rows", "learn"}, str(path))
    learn = told["learn"]
    _only(learn, {"config", "tokens", "checkpoint_tokens"}, f"learn in {path}")
    _required(learn, {"config", "tokens"}, f"learn in {path}")
    texts = {role: Text(**text) if isinstance(text, dict) else Text(text) for role, text in told["texts"].items()}
    if set(texts) != {"validation", "like", "unlike"}:
        raise UserError(f"texts in {path} are {listing(sorted(texts))}. Name validation, like and unlike.")
    rows = {name: _row(name, row or {}, path) for name, row in told["rows"].items()}
    experiment = Experiment(
        base_model=told["base_model"],
        about=list(told.get("about", [])),
        texts=texts,
        evaluate=dict(told.get("evaluate", {})),
        tasks=dict(told.get("tasks", {})),
        tasks_at=tuple(told.get("tasks_at", ())),
        prune=dict(told.get("prune", {})),
        learn=_yaml(path.parent / learn["config"]),
        tokens=int(learn["tokens"]),
        checkpoint_tokens=int(learn.get("checkpoint_tokens", learn["tokens"])),
        reference=told.get("reference", "admm"),
        cells={},
    )
    for name, row in rows.items():
        for sparsity in row.sparsity or (None,):
            cell = _cell(experiment, name, row, sparsity)
            experiment.cells[cell.name] = cell
    for cell in experiment.cells.values():
        missing = [name for name in cell.needs if name not in experiment.cells]
        if missing:
            raise UserError(f"{cell.name} in {path} needs {listing(missing)}, which no row makes. Add it to a row.")
    return experiment


def _row(name: str, told: dict[str, Any], path: Path) -> Row:
    where = f"row {name} in {path}"
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", name):
        raise UserError(f"{where}: a row's name becomes a folder's. Use small letters, digits and hyphens.")
    _only(told, {f.name for f in fields(Row)}, where)
    for share, changes in told.get("each", {}).items():
        _only(changes, {f.name for f in fields(Row)} - {"each", "sparsity"}, f"each {share} of {where}")
    lists = {key: tuple(told[key]) for key in ("sparsity", "best_of") if key in told}
    settings: dict[str, Any] = {"title": name} | told | lists
    row = Row(**settings)
    if row.prune is not None and row.fit is not None:
        raise UserError(f"{where} has both prune and fit. A cell is made by one of them: choose.")
    if (row.prune is None and row.fit is None) != (not row.sparsity):
        raise UserError(f"{where}: a row with a sparsity has prune or fit, and the dense one has none of them.")
    return row


def _cell(experiment: Experiment, name: str, row: Row, sparsity: float | None) -> Cell:
    for share, changes in row.each.items():
        if sparsity is not None and abs(share - sparsity) < 1e-9:
            laid = {key: laid_over(getattr(row, key) or {}, changes[key]) for key in ("fit", "prune") if key in changes}
            settings: dict[str, Any] = changes | laid
            row = replace(row, **settings)
    ending = "" if sparsity is None else f"-{100 * sparsity:g}"
    at = any(abs(share - (sparsity or 0)) < 1e-9 for share in experiment.tasks_at)
    return Cell(
        name=name + ending,
        row=name,
        title=row.title,
        sparsity=sparsity,
        table=row.table,
        prune=None if row.prune is None else laid_over(experiment.prune, row.prune),
        fit=row.fit,
        prior=row.prior and row.prior + ending,
        tokens=row.tokens or experiment.tokens,
        best_of=tuple(other + ending for other in row.best_of),
        tasks=at if row.tasks is None else row.tasks,
        baseline=row.baseline,
    )


def laid_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """``above`` over ``below``, mapping by mapping; another ``class_path`` brings its own ``init_args``."""
    if "class_path" in above and above["class_path"] != below.get("class_path"):
        return deepcopy(dict(above))
    laid = deepcopy(dict(below))
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(laid.get(key), Mapping)
        laid[key] = laid_over(laid[key], value) if both else deepcopy(value)
    return laid


def _yaml(path: Path) -> dict[str, Any]:
    try:
        told = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(
            f"{path} cannot be read ({reason}). Name a YAML file such as configs/results/headline.yaml."
        ) from error
    if not isinstance(told, dict):
        raise UserError(f"{path} holds no settings. Take configs/results/headline.yaml for an example.")
    return told


def _only(told: Mapping[str, Any], known: set[str], where: str) -> None:
    unknown = sorted(set(map(str, told)) - known)
    if unknown:
        raise UserError(f"{where} says {listing(unknown)}, which is not known. Known are {listing(sorted(known), 20)}.")


def _required(told: Mapping[str, Any], wanted: set[str], where: str) -> None:
    missing = sorted(wanted - set(told))
    if missing:
        raise UserError(f"{where} lacks {listing(missing)}. Add it.")
