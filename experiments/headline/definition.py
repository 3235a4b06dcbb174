"""The definition of the experiment: a readable YAML file."""

import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import yaml

from experiments.headline.cell_schema import NAME, plain_text
from experiments.headline.experiment import ROLES, Cell, Experiment, Model, Row, Text, laid_over
from leap_pl.cli.former_spelling import FORMER, GROUP, advice, check_agree
from leap_pl.errors import UserError, listing

MODEL_KEYS = {"base_model", "about", "evaluate", "prune", "target", "rows"}
LISTS = ("sparsity", "seeds", "best_of", "texts")  # of a row
MAPPINGS = ("texts", "rows", "learn", "evaluate", "tasks", "prune", "models")
EXAMPLES = {"prune": "method: wanda", "fit": "model: {...}"}
KEYS = MODEL_KEYS | {"texts", "tasks", "tasks_at", "learn", "models"}


def read_experiment(path: str | Path) -> Experiment:
    """Read the definition in ``path``.

    Raises:
        UserError: It is not there, not YAML, or says something that cannot be.
    """
    path = Path(path)
    told = _told(path)
    _check(told, str(path), KEYS, {"base_model", "texts", "rows", "learn"})
    _check_mappings(told, MAPPINGS, str(path))
    _check(told["learn"], f"learn in {path}", {"config", "tokens", "checkpoint_tokens"}, {"config", "tokens"})
    _check(told["texts"], f"texts in {path}", told["texts"], set(ROLES))
    for role in told["texts"]:
        _check_name(str(role), f"text {role} in {path}")
    _check_lengths(told["texts"], str(path))
    tokens = _positive(told["learn"]["tokens"], f"learn.tokens in {path}")
    saved = _positive(told["learn"].get("checkpoint_tokens", tokens), f"learn.checkpoint_tokens in {path}")
    shares = told.get("tasks_at", [])
    if not isinstance(shares, list) or not all(isinstance(share, float | int) for share in shares):
        raise UserError(f"tasks_at in {path} is {shares!r}. Give a list of sparsities, as in [0, 0.5].")
    experiment = Experiment(
        texts={role: _text(text, f"{role} in {path}") for role, text in told["texts"].items()},
        tasks=dict(told.get("tasks", {})),
        tasks_at=tuple(shares),
        learn=_respelled(_yaml(path.parent / str(told["learn"]["config"])), str(told["learn"]["config"])),
        tokens=tokens,
        checkpoint_tokens=saved,
    )
    _add_cells(experiment, _model("", told), told["rows"], str(path))
    for name, more in told.get("models", {}).items():
        where = f"model {name} in {path}"
        _check_name(str(name), where)
        _check(more, where, MODEL_KEYS, {"base_model", "rows"})
        _check_mappings(more, ("rows", "evaluate", "prune"), where)
        shared = {verb: told.get(verb, {}) | more.get(verb, {}) for verb in ("evaluate", "prune")}
        model = _model(str(name), {**more, **shared})
        for row, changes in more["rows"].items():
            for of in (changes, told["rows"].get(row)):
                if not isinstance(of or {}, dict):
                    raise UserError(f"row {row} of {where} is {of!r}. Give its settings, as in {{sparsity: [0.5]}}.")
        rows = {row: laid_over(told["rows"].get(row) or {}, changes or {}) for row, changes in more["rows"].items()}
        _add_cells(experiment, model, rows, where)
    for cell in experiment.cells.values():
        _check_needs(cell, experiment, str(path))
    return experiment


def _check_lengths(texts: dict[str, Any], where: str) -> None:
    """Check that no two roles read one file to different lengths: a cell has one figure of a text."""
    found: dict[str, tuple[str, Any]] = {}
    for role, text in texts.items():
        of = text if isinstance(text, dict) else {}
        other, length = found.setdefault(str(of.get("text")), (role, of.get("max_tokens")))
        if length != of.get("max_tokens"):
            raise UserError(
                f"{other} and {role} of texts in {where} are one file, {of.get('text')}, with {length or 'all'} and "
                f"{of.get('max_tokens') or 'all'} tokens. Give both the same max_tokens, or a copy of the file."
            )


def _told(path: Path) -> dict[str, Any]:
    """Return what ``path`` says, over what the definition beside it says that it is ``like``.

    Of that one's rows and models, those that are named again stay; sentences of ``about`` are added to its own.
    """
    told = _yaml(path)
    if "like" not in told:
        _check_compared([told], str(path))
        return told
    other = path.parent / str(told.pop("like"))
    below = _yaml(other)
    if "like" in below:
        raise UserError(f"{path} is like {other}, which is like another. Name that one.")
    for definition, where in ((told, path), (below, other)):
        _check_mappings(definition, MAPPINGS, str(where))
    _check_compared([told, below], str(path))
    rows = below["rows"]
    for part in ("rows", "models"):
        _keep_named(part, told, below, f"{part} of {path}", str(other))
    for name, model in told["models"].items():
        _check(model, f"model {name} in {path}", MODEL_KEYS)
        _check_mappings(model, ("rows",), f"model {name} in {path}")
        kept = below["models"][name]
        _keep_named("rows", model, kept, f"rows of model {name} in {path}", str(other))
        # A row that this definition has for the model alone is still changed from that of the other's own model.
        kept["rows"] |= {
            row: laid_over(rows[row], changes or {})
            for row, changes in kept["rows"].items()
            if row in rows and row not in told["rows"]
        }
    for of, under in ((told, below), *((model, below["models"][name]) for name, model in told["models"].items())):
        if "about" in of:
            of["about"] = [*under.get("about", []), *of["about"]]
    return laid_over(below, told)


def _check_compared(definitions: Sequence[dict[str, Any]], where: str) -> None:
    """Check that rows are compared with rows that there are, if not at every sparsity or of every model."""
    rows = [
        (str(name), row)
        for told in definitions
        for of in (told, *told.get("models", {}).values())
        if isinstance(of, dict) and isinstance(of.get("rows"), dict)
        for name, row in of["rows"].items()
    ]
    names = {name for name, _ in rows}
    for name, row in rows:
        other = row.get("compared_with") if isinstance(row, dict) else None
        if other is not None and (not isinstance(other, str) or other not in names - {name}):
            raise UserError(f"compared_with of row {name} in {where} is {other!r}. Name another row of it.")


def _keep_named(part: str, told: dict[str, Any], below: dict[str, Any], where: str, other: str) -> None:
    """Leave of a ``part`` of ``below`` what ``told`` names there; what has no changes gets empty ones."""
    kept = told.setdefault(part, {})
    unknown = sorted(set(kept) - set(below.get(part, {})))
    if unknown:
        raise UserError(f"{where} names {listing(unknown)}, which {other} has not. Name some that it has.")
    below[part] = {name: of for name, of in below.get(part, {}).items() if name in kept}
    told[part] = {name: changes or {} for name, changes in kept.items()}


def _model(name: str, told: dict[str, Any]) -> Model:
    about = told.get("about") or []
    if not isinstance(about, list):
        raise UserError(f"about of {name or 'the experiment'} is {about!r}. Give a list of sentences.")
    about = [_shown(str(sentence), f"about of {name or 'the experiment'}") for sentence in about]
    evaluate, prune = dict(told.get("evaluate", {})), dict(told.get("prune", {}))
    return Model(name, str(told["base_model"]), about, evaluate, prune, told.get("target"))


def _add_cells(experiment: Experiment, model: Model, rows: dict[str, Any], where: str) -> None:
    for name, settings in rows.items():
        row = _row(str(name), settings or {}, f"row {name} in {where}")
        for sparsity in row.sparsity or (None,):
            for cell in _with_repeats(_cell(experiment, model, str(name), row, sparsity), row, sparsity):
                if cell.name in experiment.cells:
                    raise UserError(f"{where} makes {cell.name} twice. Give one of the rows another name.")
                experiment.cells[cell.name] = cell


def _text(told: Any, where: str) -> Text:
    if not isinstance(told, dict):
        return Text(_shown(str(told), where))
    _check(told, where, {f.name for f in fields(Text)}, {"text"})
    for key in ("text", "title", "about"):
        _shown(told.get(key) or "", f"{key} of {where}")
    if told.get("max_tokens") is not None:
        _positive(told["max_tokens"], f"max_tokens of {where}")
    return Text(**told)


def _row(name: str, told: dict[str, Any], where: str) -> Row:
    _check_name(name, where)
    known = {f.name for f in fields(Row)}
    _check(told, where, known)
    each, sparsity = told.get("each", {}), told.get("sparsity", [])
    if not isinstance(each, dict):
        raise UserError(f"each of {where} is {each!r}. Give what is different by sparsity, as in {{0.6: {{...}}}}.")
    for share, changes in each.items():
        _check(changes, f"each {share} of {where}", known - {"each", "sparsity"})
    if not isinstance(sparsity, list) or not all(isinstance(s, float) and 0 < s < 1 for s in sparsity):
        raise UserError(
            f"sparsity of {where} is {sparsity!r}. Give a list of numbers between 0 and 1, as in [0.5, 0.6]."
        )
    for share in each:  # it may be one that a definition which is like this one leaves out
        if not isinstance(share, float) or not 0 < share < 1:
            raise UserError(f"each of {where} names {share!r}. Give a sparsity, a number between 0 and 1.")
    for settings in (told, *each.values()):
        for key in ("prune", "fit"):
            if not isinstance(settings.get(key) or {}, dict):
                raise UserError(f"{key} of {where} is {settings[key]!r}. Give its options, as in {{{EXAMPLES[key]}}}.")
        for key in ("title", "table", "text"):
            _shown(settings.get(key) or "", f"{key} of {where}")
        for key in ("best_of", "texts"):
            names = settings.get(key, [])
            if not isinstance(names, list) or not all(isinstance(each, str) for each in names):
                raise UserError(f"{key} of {where} is {names!r}. Give a list of names, as in [name].")
        seeds = settings.get("seeds", [])
        if not isinstance(seeds, list) or not all(type(seed) is int and seed >= 0 for seed in seeds):
            raise UserError(f"seeds of {where} is {seeds!r}. Give a list of whole numbers, as in [1, 2].")
        if isinstance(settings.get("fit"), dict):
            settings["fit"] = _respelled(settings["fit"], f"fit of {where}")
        if "tokens" in settings:
            _positive(settings["tokens"], f"tokens of {where}")
        if not isinstance(settings.get("minutes", 1), int):
            raise UserError(f"minutes of {where} is {settings['minutes']!r}. Give a whole number.")
        if not isinstance((settings.get("prune") or {}).get("pattern", ""), str):
            # YAML reads 2:4 as a time of day: 124 minutes.
            raise UserError(f'pattern of {where} is {settings["prune"]["pattern"]!r}. Put it in quotes: "2:4".')
    lists: dict[str, Any] = {key: tuple(told[key]) for key in LISTS if key in told}
    row = Row(**(told | lists))
    if row.prune is not None and row.fit is not None:
        raise UserError(f"{where} has both prune and fit. A cell is made by one of them: choose.")
    if (row.prune is None and row.fit is None) != (not row.sparsity):
        raise UserError(f"{where}: a row with a sparsity has prune or fit, and the dense one has none of them.")
    if row.fit is None and (row.seeds or any("seeds" in changes for changes in row.each.values())):
        raise UserError(f"{where} has seeds, which are of learning. Leave them out, or give it fit.")
    return row


def _cell(experiment: Experiment, model: Model, name: str, row: Row, sparsity: float | None) -> Cell:
    row = _at(row, sparsity)
    ending = "" if sparsity is None else f"-{100 * sparsity:g}"
    beginning = f"{model.name}-" if model.name else ""
    at = any(_same(share, sparsity or 0.0) for share in experiment.tasks_at)
    return Cell(
        name=beginning + name + ending,
        model=model,
        row=name,
        title=row.title or name,
        sparsity=sparsity,
        table=row.table,
        text=row.text,
        texts=tuple(row.texts),
        prune=None if row.prune is None else laid_over(model.prune, row.prune),
        fit=row.fit,
        mask=row.mask and beginning + row.mask + ending,
        prior=row.prior and beginning + row.prior + ending,
        tokens=row.tokens or experiment.tokens,
        best_of=tuple(beginning + other + ending for other in row.best_of),
        tasks=at if row.tasks is None else row.tasks,
        baseline=row.baseline,
        reference=row.reference,
        minutes=row.minutes,
        compared_with=row.compared_with and beginning + row.compared_with + ending,
    )


def _at(row: Row, sparsity: float | None) -> Row:
    """Return ``row`` with what is different at ``sparsity``."""
    for share, changes in row.each.items():
        if sparsity is not None and _same(share, sparsity):
            laid = {key: laid_over(getattr(row, key) or {}, changes[key]) for key in ("fit", "prune") if key in changes}
            settings: dict[str, Any] = changes | laid
            row = replace(row, **settings)
    return row


def _with_repeats(cell: Cell, row: Row, sparsity: float | None) -> Iterator[Cell]:
    """Yield ``cell``, and the same again with each further seed."""
    yield cell
    for seed in _at(row, sparsity).seeds:
        fit = laid_over(cell.fit or {}, {"model": {"seed": seed}, "data": {"seed": seed}})
        yield replace(cell, name=f"{cell.name}-seed-{seed}", fit=fit, repeat_of=cell.name)


def _same(a: float, b: float) -> bool:
    return abs(a - b) < 1e-9


def _check_needs(cell: Cell, experiment: Experiment, where: str) -> None:
    cells = experiment.cells
    missing = [name for name in cell.needs if name not in cells]
    if missing:
        raise UserError(f"{cell.name} in {where} needs {listing(missing)}, which no row makes. Add it to a row.")
    further = set(experiment.texts) - set(ROLES)
    unknown = sorted(set(cell.texts) - further)
    if unknown:
        known = f"Further texts are {listing(sorted(further))}" if further else "It has no further texts"
        raise UserError(f"{cell.name} in {where} names the text {listing(unknown)}. {known}.")
    if cell.prior and (cell.fit is None or cells[cell.prior].prune is None or cells[cell.prior].best_of):
        raise UserError(
            f"{cell.name} in {where}: a prior is a one-shot row's mask, for a learned row. Name another row."
        )
    if cell.mask and (cell.fit is None or cell.prior or cells[cell.mask].mask or cells[cell.mask].best_of):
        raise UserError(
            f"{cell.name} in {where}: mask is a one-shot or learned row's, for a row with fit and without a prior. "
            "Name another row, or leave the prior out."
        )
    if cell.best_of and (
        cell.prune is None or any(cells[name].fit is None or cells[name].mask for name in cell.best_of)
    ):
        raise UserError(f"{cell.name} in {where}: best_of names learned rows, for a row with prune. Name other rows.")


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


def _check_mappings(told: dict[str, Any], parts: Iterable[str], where: str) -> None:
    for part in parts:
        if not isinstance(told.get(part, {}), dict):
            raise UserError(f"{part} in {where} is to be a mapping, and is {told[part]!r}.")


def _check_name(name: str, where: str) -> None:
    if not re.fullmatch(NAME, name):
        raise UserError(f"{where}: its name becomes a folder's. Use small letters, digits and hyphens.")


def _shown(text: Any, where: str) -> str:
    """Return ``text``, which the report shows: found here, and not after hours, to be no text or to have markup."""
    try:
        return plain_text(str(text))
    except ValueError as error:
        raise UserError(f"{where} is {text!r}: it {error}.") from error


def _positive(value: Any, where: str) -> int:
    if not isinstance(value, int) or value < 1:
        raise UserError(f"{where} is {value!r}. Give a number of tokens, at least 1.")
    return value
