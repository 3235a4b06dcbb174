"""The definition of the experiment: a readable YAML file, and the cells that it spans."""

import re
import warnings
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from leap_pl.cli.former_spelling import FORMER, GROUP, advice, check_agree
from leap_pl.errors import UserError, listing

UNSTRUCTURED = "unstructured"
ROLES = ("validation", "like", "unlike")
NAME = r"[a-z0-9][a-z0-9._-]*"


@dataclass(frozen=True)
class Text:
    """A text that perplexity is measured on.

    Attributes:
        text: As ``leap_pl evaluate --perplexity`` takes it.
        max_tokens: Only the first so many tokens of it. None: all.
        title: What tables call it. None: its role.
    """

    text: str
    max_tokens: int | None = None
    title: str | None = None


@dataclass(frozen=True)
class Row:
    """One method of the table, at one sparsity or several.

    Attributes:
        title: What the table calls it. None: its name.
        sparsity: The sparsities it is made at; none for the dense model.
        table: Rows stand in one table with those of their sparsity and the same word here: ``unstructured``, or
            the pattern (``2:4``).
        prune: Options of ``leap_pl prune``, over the experiment's; makes the cell a one-shot one.
        fit: Settings of ``leap_pl fit``, over the shared config; makes it a learned one.
        prior: (with fit) The row whose mask of the same sparsity learning starts from. None: what the config says.
        tokens: (with fit) Training tokens. None: the experiment's.
        best_of: (with prune) Learned rows; the mask of the one with the lowest validation perplexity is kept,
            and its weights are solved anew.
        tasks: Whether the zero-shot tasks are measured. None: at the sparsities of ``tasks_at``.
        baseline: Whether it is one of the baselines whose best the others are measured against.
        reference: Whether its gap to the dense model is what the others of its table close.
        each: Sparsity → fields of the row that are different there (``fit`` and ``prune`` are laid over).
    """

    title: str | None = None
    sparsity: tuple[float, ...] = ()
    table: str = UNSTRUCTURED
    prune: dict[str, Any] | None = None
    fit: dict[str, Any] | None = None
    prior: str | None = None
    tokens: int | None = None
    best_of: tuple[str, ...] = ()
    tasks: bool | None = None
    baseline: bool = False
    reference: bool = False
    each: dict[float, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """A row at one sparsity: what is made and measured.

    Attributes are the row's, with what the experiment says laid under; ``prior`` and ``best_of`` name cells.
    """

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
    reference: bool

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
    cells: dict[str, Cell] = field(default_factory=dict)


def read_experiment(path: str | Path) -> Experiment:
    """Read the definition in ``path``.

    Raises:
        UserError: It is not there, not YAML, or says something that cannot be.
    """
    path = Path(path)
    told = _yaml(path)
    known = {f.name for f in fields(Experiment)} - {"cells", "tokens", "checkpoint_tokens"} | {"rows"}
    _check(told, str(path), known, {"base_model", "texts", "rows", "learn"})
    for part in ("texts", "rows", "learn", "evaluate", "tasks", "prune"):
        if not isinstance(told.get(part, {}), dict):
            raise UserError(f"{part} in {path} is to be a mapping, and is {told[part]!r}.")
    _check(told["learn"], f"learn in {path}", {"config", "tokens", "checkpoint_tokens"}, {"config", "tokens"})
    _check(told["texts"], f"texts in {path}", set(ROLES), set(ROLES))
    tokens = _positive(told["learn"]["tokens"], f"learn.tokens in {path}")
    saved = _positive(told["learn"].get("checkpoint_tokens", tokens), f"learn.checkpoint_tokens in {path}")
    experiment = Experiment(
        base_model=str(told["base_model"]),
        about=[str(sentence) for sentence in told.get("about", [])],
        texts={role: _text(text, f"{role} in {path}") for role, text in told["texts"].items()},
        evaluate=dict(told.get("evaluate", {})),
        tasks=dict(told.get("tasks", {})),
        tasks_at=tuple(told.get("tasks_at", ())),
        prune=dict(told.get("prune", {})),
        learn=_respelled(_yaml(path.parent / str(told["learn"]["config"])), str(told["learn"]["config"])),
        tokens=tokens,
        checkpoint_tokens=saved,
    )
    for name, settings in told["rows"].items():
        row = _row(str(name), settings or {}, f"row {name} in {path}")
        for sparsity in row.sparsity or (None,):
            cell = _cell(experiment, str(name), row, sparsity)
            if cell.name in experiment.cells:
                raise UserError(f"{path} makes {cell.name} twice. Give one of the rows another name.")
            experiment.cells[cell.name] = cell
    for cell in experiment.cells.values():
        _check_needs(cell, experiment, str(path))
    return experiment


def _text(told: Any, where: str) -> Text:
    if not isinstance(told, dict):
        return Text(str(told))
    _check(told, where, {f.name for f in fields(Text)}, {"text"})
    if told.get("max_tokens") is not None:
        _positive(told["max_tokens"], f"max_tokens of {where}")
    return Text(**told)


def _row(name: str, told: dict[str, Any], where: str) -> Row:
    if not re.fullmatch(NAME, name):
        raise UserError(f"{where}: its name becomes a folder's. Use small letters, digits and hyphens.")
    known = {f.name for f in fields(Row)}
    _check(told, where, known)
    for share, changes in told.get("each", {}).items():
        _check(changes, f"each {share} of {where}", known - {"each", "sparsity"})
    sparsity = told.get("sparsity", [])
    if not isinstance(sparsity, list) or not all(isinstance(s, float) and 0 < s < 1 for s in sparsity):
        raise UserError(
            f"sparsity of {where} is {sparsity!r}. Give a list of numbers between 0 and 1, as in [0.5, 0.6]."
        )
    for settings in (told, *told.get("each", {}).values()):
        if isinstance(settings.get("fit"), dict):
            settings["fit"] = _respelled(settings["fit"], f"fit of {where}")
        if "tokens" in settings:
            _positive(settings["tokens"], f"tokens of {where}")
        if not isinstance((settings.get("prune") or {}).get("pattern", ""), str):
            # YAML reads 2:4 as a time of day: 124 minutes.
            raise UserError(f'pattern of {where} is {settings["prune"]["pattern"]!r}. Put it in quotes: "2:4".')
    lists: dict[str, Any] = {key: tuple(told[key]) for key in ("sparsity", "best_of") if key in told}
    row = Row(**(told | lists))
    if row.prune is not None and row.fit is not None:
        raise UserError(f"{where} has both prune and fit. A cell is made by one of them: choose.")
    if (row.prune is None and row.fit is None) != (not row.sparsity):
        raise UserError(f"{where}: a row with a sparsity has prune or fit, and the dense one has none of them.")
    return row


def _cell(experiment: Experiment, name: str, row: Row, sparsity: float | None) -> Cell:
    for share, changes in row.each.items():
        if sparsity is not None and _same(share, sparsity):
            laid = {key: laid_over(getattr(row, key) or {}, changes[key]) for key in ("fit", "prune") if key in changes}
            settings: dict[str, Any] = changes | laid
            row = replace(row, **settings)
    ending = "" if sparsity is None else f"-{100 * sparsity:g}"
    at = any(_same(share, sparsity or 0.0) for share in experiment.tasks_at)
    return Cell(
        name=name + ending,
        row=name,
        title=row.title or name,
        sparsity=sparsity,
        table=row.table,
        prune=None if row.prune is None else laid_over(experiment.prune, row.prune),
        fit=row.fit,
        prior=row.prior and row.prior + ending,
        tokens=row.tokens or experiment.tokens,
        best_of=tuple(other + ending for other in row.best_of),
        tasks=at if row.tasks is None else row.tasks,
        baseline=row.baseline,
        reference=row.reference,
    )


def _same(a: float, b: float) -> bool:
    return abs(a - b) < 1e-9


def _check_needs(cell: Cell, experiment: Experiment, where: str) -> None:
    cells = experiment.cells
    missing = [name for name in cell.needs if name not in cells]
    if missing:
        raise UserError(f"{cell.name} in {where} needs {listing(missing)}, which no row makes. Add it to a row.")
    if cell.prior and (cell.fit is None or cells[cell.prior].prune is None or cells[cell.prior].best_of):
        raise UserError(
            f"{cell.name} in {where}: a prior is a one-shot row's mask, for a learned row. Name another row."
        )
    if cell.best_of and (cell.prune is None or any(cells[name].fit is None for name in cell.best_of)):
        raise UserError(f"{cell.name} in {where}: best_of names learned rows, for a row with prune. Name other rows.")


def laid_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """``above`` over ``below``, mapping by mapping; another ``class_path`` brings its own ``init_args``."""
    if "class_path" in above and above["class_path"] != below.get("class_path"):
        return deepcopy(dict(above))
    laid = deepcopy(dict(below))
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(laid.get(key), Mapping)
        laid[key] = laid_over(laid[key], value) if both else deepcopy(value)
    return laid


def _respelled(settings: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the ``settings`` of a fit with those that have moved at their present place."""
    if FORMER not in settings:
        return settings
    rest = {key: value for key, value in settings.items() if key != FORMER}
    group = rest.get(GROUP)
    check_agree(settings[FORMER], group.get(FORMER) if isinstance(group, dict) else None, where)
    warnings.warn(advice([where]), stacklevel=2)
    return laid_over(rest, {GROUP: {FORMER: settings[FORMER]}})


def _yaml(path: Path) -> dict[str, Any]:
    try:
        told = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(
            f"{path} cannot be read ({reason}). Name a YAML file as configs/results/headline.yaml is."
        ) from error
    if not isinstance(told, dict):
        raise UserError(f"{path} holds no settings. Take configs/results/headline.yaml for an example.")
    return told


def _check(told: Any, where: str, known: Iterable[str], wanted: Iterable[str] = ()) -> None:
    """Make sure that ``told`` is a mapping with ``known`` keys alone and all ``wanted`` ones."""
    if not isinstance(told, dict):
        raise UserError(f"{where} is to be a mapping, and is {told!r}.")
    unknown, missing = sorted(set(map(str, told)) - set(known)), sorted(set(wanted) - set(told))
    if unknown:
        raise UserError(f"{where} says {listing(unknown)}, which is not known. Known are {listing(sorted(known), 20)}.")
    if missing:
        raise UserError(f"{where} lacks {listing(missing)}. Add it.")


def _positive(value: Any, where: str) -> int:
    if not isinstance(value, int) or value < 1:
        raise UserError(f"{where} is {value!r}. Give a number of tokens, at least 1.")
    return value
