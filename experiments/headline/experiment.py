"""The experiment: models, rows of methods, and the cells that they span."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

UNSTRUCTURED = "unstructured"
VALIDATION = "validation"
SHOWN = ("like", "unlike")  # the calibration text; every cell is measured on them
ROLES = (VALIDATION, *SHOWN)  # the texts that an experiment has; it may have more


@dataclass(frozen=True)
class Text:
    """A text that perplexity is measured on.

    Attributes:
        text: As ``leap_pl evaluate --perplexity`` takes it.
        max_tokens: Only the first so many tokens of it. None: all.
        title: What tables call it. None: its role.
        about: A sentence on it that belongs beside every figure.
    """

    text: str
    max_tokens: int | None = None
    title: str | None = None
    about: str | None = None


@dataclass(frozen=True)
class Model:
    """A base model that cells are made of.

    Attributes:
        name: Prefix of the names of its cells; empty for the model of the experiment itself.
        base_model: Hub id, local folder or GGUF file.
        about: Sentences on the model and the texts that belong beside every figure.
        evaluate: Options of ``leap_pl evaluate`` for every cell.
        prune: Options of ``leap_pl prune`` for every cell.
        target: Target of ``make`` that lays the model out. Where that has not been done, its cells are left out.
    """

    name: str
    base_model: str
    about: list[str]
    evaluate: dict[str, Any]
    prune: dict[str, Any]
    target: str | None = None


@dataclass(frozen=True)
class Row:
    """One method of the table, at one sparsity or several.

    Attributes:
        title: What the table calls it. None: its name.
        sparsity: The sparsities it is made at; none for the dense model.
        table: Rows stand in one table with those of their sparsity and the same word here: ``unstructured``, or
            the pattern (``2:4``).
        text: What tables call the text that it reads, if that is not the one of the experiment: another table.
        texts: Roles of further texts that its perplexity is measured on, beside ``like`` and ``unlike``.
        prune: Options of ``leap_pl prune``, over the experiment's; makes the cell a one-shot one.
        fit: Settings of ``leap_pl fit``, over the shared config; makes it a learned one.
        mask: (with fit) The row whose mask of the same sparsity stays as it is, while weights are trained; the settings
            are those of ``leap_pl recover``.
        prior: (with fit) The row whose mask of the same sparsity learning starts from. None: what the config says.
        tokens: (with fit) Training tokens, those of ``mask`` not included. None: the experiment's.
        seeds: (with fit) Further seeds of the gates' noise and of the order of the text, each for a cell of its own.
        best_of: (with prune) Learned rows; the mask of the one with the lowest validation perplexity is kept,
            and its weights are solved anew.
        compared_with: The row that it was changed from: a table has the difference of the two at the same sparsity.
            Where that has no such cell, there is none.
        tasks: Whether the zero-shot tasks are measured. None: at the sparsities of ``tasks_at``.
        baseline: Whether it is one of the baselines whose best the others are measured against.
        reference: Whether its gap to the dense model is what the others of its table close.
        minutes: Estimate of the minutes that a cell takes, measuring included.
        each: Sparsity → fields of the row that are different there (``fit`` and ``prune`` are laid over).
    """

    title: str | None = None
    sparsity: tuple[float, ...] = ()
    table: str = UNSTRUCTURED
    text: str | None = None
    texts: tuple[str, ...] = ()
    prune: dict[str, Any] | None = None
    fit: dict[str, Any] | None = None
    mask: str | None = None
    prior: str | None = None
    tokens: int | None = None
    seeds: tuple[int, ...] = ()
    best_of: tuple[str, ...] = ()
    compared_with: str | None = None
    tasks: bool | None = None
    baseline: bool = False
    reference: bool = False
    minutes: int | None = None
    each: dict[float, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """A row of a model at one sparsity: what is made and measured.

    Attributes are the row's, with what the experiment says laid under; ``mask``, ``prior``, ``best_of`` and
    ``compared_with`` name cells, and ``repeat_of`` the one that it repeats with another seed.
    """

    name: str
    model: Model
    row: str
    title: str
    sparsity: float | None
    table: str
    text: str | None
    texts: tuple[str, ...]
    prune: dict[str, Any] | None
    fit: dict[str, Any] | None
    mask: str | None
    prior: str | None
    tokens: int
    best_of: tuple[str, ...]
    tasks: bool
    baseline: bool
    reference: bool
    minutes: int | None
    compared_with: str | None = None
    repeat_of: str | None = None

    @property
    def needs(self) -> tuple[str, ...]:
        """The cells that must be there first."""
        return self.best_of + tuple(name for name in (self.mask, self.prior) if name is not None)


@dataclass(frozen=True)
class Experiment:
    """All of it.

    Attributes:
        texts: Role → text: ``like`` and ``unlike`` the calibration text, and ``validation``, by which ``best_of``
            chooses. Texts of other roles are measured of the rows that name them.
        tasks: Zero-shot task → limit of questions (of a group: of each of its tasks; None: all).
        tasks_at: Sparsities at which they are measured; 0 is the dense model.
        learn: The shared config of ``leap_pl fit``, as it is written.
        tokens: Training tokens of a learned cell.
        checkpoint_tokens: A learned cell saves a checkpoint each so many tokens.
        cells: In the order of the file, by name.
    """

    texts: dict[str, Text]
    tasks: dict[str, int | None]
    tasks_at: tuple[float, ...]
    learn: dict[str, Any]
    tokens: int
    checkpoint_tokens: int
    cells: dict[str, Cell] = field(default_factory=dict)

    @property
    def reads(self) -> list[str]:
        """All texts that are read, each once: measured on, calibrated on or trained on."""
        settings = [self.learn.get("data", {})]
        for cell in self.cells.values():
            settings += [cell.prune or {}, (cell.fit or {}).get("data", {})]
        found = [text.text for text in self.texts.values()]
        for told in settings:
            for key in ("text", "validation_text"):
                texts = told.get(key) or []
                found += texts if isinstance(texts, list) else [texts]
        return list(dict.fromkeys(found))


def laid_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """``above`` over ``below``, mapping by mapping; another ``class_path`` brings its own ``init_args``."""
    if "class_path" in above and above["class_path"] != below.get("class_path"):
        return deepcopy(dict(above))
    laid = deepcopy(dict(below))
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(laid.get(key), Mapping)
        laid[key] = laid_over(laid[key], value) if both else deepcopy(value)
    return laid
