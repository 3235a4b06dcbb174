"""Settings of a run in its checkpoint: described from the live objects, and read back by a schema.

The table of :mod:`leap_pl.checkpoints.settings` lists them, and says which of them a resumed run takes and compares.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache, partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.optim import lr_scheduler

from leap_pl.base_model.prefix import Bos
from leap_pl.checkpoints.class_spec import ANY_CLASS, Registry, Spec, describe, resolve_class
from leap_pl.checkpoints.identity import Identity
from leap_pl.checkpoints.settings import DATA, MODEL, RULES, Settings, settings_to_store
from leap_pl.errors import UserError, listing
from leap_pl.gates import gate_kinds
from leap_pl.inputs.classes import imported_kinds
from leap_pl.inputs.plain_values import read, shown
from leap_pl.losses.objective import Objective
from leap_pl.losses.term import Term
from leap_pl.prior import Prior
from leap_pl.training.data_state import HELD_OUT, check_not_trained
from leap_pl.training.datamodule import TextDataModule
from leap_pl.training.live_settings import clipping_algorithm
from leap_pl.training.optimizers import PackedAdamW, SharedAdamW
from leap_pl.training.schedules import Annealing, learned_by
from leap_pl.training.shared_steps import DIMENSIONS
from leap_pl.training.trainer_checks import CONVERTING
from leap_pl.training.weights import KINDS, WeightTraining

if TYPE_CHECKING:
    import lightning as L


@cache
def optimizers() -> dict[str, type[torch.optim.Optimizer]]:
    """Return the optimizers that a checkpoint may name, by name: those of torch and of leap_pl."""
    return _kinds(vars(torch.optim), torch.optim.Optimizer) | {"PackedAdamW": PackedAdamW, "SharedAdamW": SharedAdamW}


@cache
def schedulers() -> dict[str, type[lr_scheduler.LRScheduler]]:
    """Return the learning-rate schedulers that a checkpoint may name, by name: those of torch."""
    return _kinds(vars(lr_scheduler), lr_scheduler.LRScheduler)


def check_data_state(checkpoint: Mapping[str, Any], data: Any) -> None:
    """Check that a checkpoint to resume has the position in the text of the data module ``data``.

    Lightning stores it by the name of the data module's class, and loads nothing where there is none of that name: the
    run would read the text from its beginning again.

    Raises:
        UserError: ``data`` is a :class:`.TextDataModule`, and the checkpoint has none of its class.
    """
    name = type(data).__qualname__
    if not isinstance(data, TextDataModule) or name in checkpoint or not checkpoint.get("global_step"):
        return
    states = _positions(checkpoint)
    made = f"that of {listing([shown(key, 200) for key in states])}" if states else "none: its run had its own batches"
    raise UserError(
        f"the checkpoint has no position in the text of {name}, but {made}. Resume with the data that the run was made "
        "with, a class of that name, or start a new run without a checkpoint."
    )


def check_validated_text(checkpoint: Mapping[str, Any], data: Any, settings: Mapping[str, Any]) -> None:
    """Check that the run of a checkpoint was not trained on what the data module ``data`` validates on.

    Args:
        checkpoint: Contents of the checkpoint.
        data: Data module of the validation; only of a :class:`.TextDataModule` it is known what it reads.
        settings: Settings of the run in the checkpoint's identity.

    Raises:
        UserError: It was.
    """
    if not isinstance(data, TextDataModule):
        return
    state = checkpoint.get(type(data).__qualname__)
    before = state.get("data") if isinstance(state, Mapping) else None
    check_not_trained(data, settings, divided=isinstance(before, Mapping) and before.get(HELD_OUT) is True)


def check_ranks_of_loaders(checkpoint: Mapping[str, Any], before: int | None, ranks: int | None) -> None:
    """Check that a run with loaders of its own resumes on as many ranks as before.

    How many batches of theirs make a step, and which a rank has read, is known of :class:`.TextDataModule` alone.

    Args:
        checkpoint: Contents of the checkpoint.
        before: Number of ranks of its run; None if it is not known.
        ranks: Number of ranks of this run.

    Raises:
        UserError: It does not.
    """
    if None not in (before, ranks) and before != ranks and checkpoint.get("global_step") and not _positions(checkpoint):
        raise UserError(
            f"the number of ranks was {before} and is {ranks}, and the run read loaders of its own: which batches come "
            f"next is not known. Resume on {before}."
        )


def _positions(checkpoint: Mapping[str, Any]) -> list[str]:
    """Return the keys of positions in a text."""
    return [key for key, state in checkpoint.items() if isinstance(state, Mapping) and state.keys() >= OF_POSITION]


def _kinds(names: Mapping[str, Any], base: type) -> dict[str, Any]:
    found = {name: kind for name, kind in names.items() if isinstance(kind, type) and issubclass(kind, base)}
    return {name: kind for name, kind in found.items() if kind is not base and not name.startswith("_")}


Found = tuple[type, dict[str, Any]]  # a class, and the arguments for its constructor

# Name of a setting that is a class with its own settings → the classes that a checkpoint may name for it.
CLASSES: dict[str, Callable[[], Registry]] = {
    "model.gate": gate_kinds,
    "model.optimizer": optimizers,
    "model.lr_scheduler": schedulers,
}

CLASSES_OF_MODEL = {name.partition(".")[2] for name in CLASSES}

PRECISIONS = Literal[
    "32-true",
    "16-true",
    "16-mixed",
    "bf16-true",
    "bf16-mixed",
    "64-true",
    "transformer-engine",
    "transformer-engine-float16",
]


# Keys of a position in a text, as checkpoints have had them from the first version on.
OF_POSITION = {"data", "consumed", "position"}

# Settings that earlier versions did not have → the values that give what those versions did.
OF_EARLIER: Settings = {"data.bos": "first"}


@dataclass(frozen=True)
class StoredObjective(Objective):
    """Objective as a checkpoint holds it: its extra terms are descriptions."""

    extra: Sequence[Spec] = ()  # type: ignore[assignment]

    def check_extra(self) -> None:
        """Do nothing: the terms are not constructed yet."""


# Names of the other settings → their types in a checkpoint.
TYPES: dict[str, Any] = {
    "model.base_model": str,
    "model.sparsity": float,
    "model.targets": list[str] | None,
    "model.ignore": list[str],
    "model.objective": StoredObjective,
    "model.annealing": Annealing,
    "model.prior": Prior,
    "model.warmup_steps": int,
    "model.dtype": Literal["auto", "bfloat16", "float16", "float32"],
    "model.logits_dtype": Literal["float32", "bfloat16"],
    "model.activation_checkpointing": bool,
    "model.revision": str | None,
    "model.seed": int,
    "model.train_weights": Literal[*KINDS],
    "model.weight_training": WeightTraining,
    "model.weights": str | None,
    "data.tokenizer": str,
    "data.text": str | list[str],
    "data.config_name": str | None,
    "data.split": str,
    "data.text_column": str,
    "data.validation_text": str | list[str] | None,
    "data.validation_config_name": str | None,
    "data.validation_split": str,
    "data.seq_length": int,
    "data.batch_size": int,
    "data.validation_sequences": int,
    "data.separator": Literal["end_token", "blank_line"],
    "data.seed": int,
    "data.tokenizer_revision": str | None,
    "data.bos": Bos,
    "trainer.max_steps": int,
    "trainer.accumulate_grad_batches": int,
    "trainer.gradient_clip_val": float | None,
    "trainer.gradient_clip_algorithm": Literal["norm", "value"] | None,
    "trainer.precision": PRECISIONS,
}


def of_trainer(trainer: "L.Trainer", data: Any) -> Settings:
    """Return the settings that a checkpoint holds of ``trainer``, and of ``data`` if that is a text data module."""
    settings: Settings = {
        "trainer.max_steps": trainer.max_steps,
        "trainer.accumulate_grad_batches": trainer.accumulate_grad_batches,
        "trainer.gradient_clip_val": trainer.gradient_clip_val,
        "trainer.gradient_clip_algorithm": clipping_algorithm(trainer),
        "trainer.precision": str(trainer.precision),
    }
    if isinstance(data, TextDataModule):
        settings |= {f"data.{name}": getattr(data, name) for name in DATA if name != "tokenizer"}
        if isinstance(data.tokenizer_name, str):
            settings["data.tokenizer"] = data.tokenizer_name
    return settings_to_store(settings)


def dtype_of(model: "torch.nn.Module | None", loaded: str, trainer: "L.Trainer | None") -> str:
    """Return the data type in which a run loads its ``model``: ``loaded``, if Lightning converts that; else its own."""
    if model is None:
        return loaded
    own, converted = str(model.dtype).removeprefix("torch."), CONVERTING.get(str(getattr(trainer, "precision", None)))
    return loaded if own == converted else own


def dtype_of_earlier(stored: Settings, here: Settings, trainer: "L.Trainer") -> Settings:
    """Return the setting ``model.dtype`` if a checkpoint holds it after conversion, as those of earlier versions do.

    Only where the model is loaded in float32 ``here``, from which the conversion rounds as loading does.
    """
    converted = CONVERTING.get(str(trainer.precision))
    earlier = here.get("model.dtype") == "float32" and stored.get("model.dtype") == converted is not None
    return {"model.dtype": converted} if earlier else {}


def computed_in(identity: Identity) -> str | None:
    """Return the data type that Lightning converted the model of a run to, as LeapModule takes it; None: to none."""
    dtype, precision = identity.settings.get("dtype"), identity.settings.get("precision")
    return dtype if str(precision) in CONVERTING and dtype in ("bfloat16", "float16") else None


def check_types(settings: Mapping[str, Any]) -> None:
    """Check that a checkpoint with these ``settings`` can be read back, where pydantic is there to read it.

    Raises:
        UserError: A setting, which only Python code can have given, is not of its type.
    """
    if find_spec("pydantic") is None:
        return
    for name, value in settings.items():
        if name in TYPES:
            read(value, TYPES[name], name, "A checkpoint could not hold it: give a plain value.")


def describe_objective(objective: Objective) -> Settings:
    """Describe an ``objective`` by its weights, and its ``extra`` terms, if any, by class and settings."""
    settings: Settings = {field.name: getattr(objective, field.name) for field in fields(objective)}
    del settings["extra"]
    if objective.extra:  # by full import paths: the reader may have another class of the same name
        settings["extra"] = [describe(term, {}, settings_only=True) for term in objective.extra]
    return settings


def describe_optimizer(optimizer: torch.optim.Optimizer, given: Mapping[str, Any]) -> Spec:
    """Describe an ``optimizer`` by its class and settings; ``given`` are its constructor's arguments, if known."""
    return describe(optimizer, optimizers(), {**dict.fromkeys(DIMENSIONS, 0.0), **given, **optimizer.defaults})


def describe_scheduler(scheduler: Any, given: Mapping[str, Any]) -> Spec:
    """Describe a learning-rate scheduler by its class and settings; ``given`` are its constructor's arguments."""
    return describe(scheduler, schedulers(), {**vars(scheduler), **given})


def read_settings(identity: Identity, checkpoint: Mapping[str, Any], where: str) -> Settings:
    """Return the settings that a checkpoint holds, with their types checked; classes are still descriptions.

    For a checkpoint of a version that did not store settings, they are reconstructed from the rest of it.

    Args:
        identity: Identity that the checkpoint holds.
        checkpoint: Whole checkpoint.
        where: Path of the checkpoint, for messages.

    Raises:
        UserError: A setting has the wrong type, or is unknown to this version of leap_pl.
    """
    stored = OF_EARLIER | (identity.learned_with or _settings_of_older(identity, checkpoint))
    unknown = sorted(name for name in stored if name not in RULES)
    if unknown:
        raise UserError(
            f"{where} has settings that this version of leap_pl does not know ({', '.join(unknown[:3])}). "
            "Update leap_pl: pip install --upgrade leap_pl"
        )
    for name, value in stored.items():
        if name in TYPES:
            read(value, TYPES[name], f"{where}: {name}")
    packed = stored.get("model.optimizer")
    if isinstance(packed, dict) and packed.get("class_path") == "PackedAdamW":  # which had no shared steps
        arguments = {**dict.fromkeys(DIMENSIONS, 0.0), **packed.get("init_args", {})}
        stored = {**stored, "model.optimizer": {**packed, "init_args": arguments}}
    stored = settings_to_store(stored)  # an earlier version's has the folder of the cache, which is this user's
    if "model.prior" in stored:  # under the current names
        stored["model.prior"] = asdict(Prior(**stored["model.prior"]))
    return stored


def find_classes(settings: Mapping[str, Any], where: str) -> tuple[dict[str, Found], dict[str, UserError]]:
    """Find the classes that ``settings`` describe.

    Returns:
        Name of a setting → class and its arguments; and name → error that says why the class must be given instead.
    """
    classes, refused = {}, {}
    for name, registry in CLASSES.items():
        if settings.get(name) is None:
            continue
        try:
            classes[name] = resolve_class(settings[name], registry(), f"{where}: {name}")
        except UserError as error:
            refused[name] = error
    return classes, refused


def take_terms(settings: Settings, where: str, make: Callable[[type, dict[str, Any]], Any]) -> dict[str, UserError]:
    """Replace the descriptions of the objective's extra terms in ``settings`` by terms that ``make`` returns.

    Args:
        settings: Settings of a checkpoint; changed in place.
        where: Path of the checkpoint, for messages.
        make: Function of a term's class and the arguments for its constructor.

    Returns:
        Name of the setting → error that says why it must be given instead, as in :func:`find_classes`; ``settings``
        then have no extra terms.
    """
    objective, name = settings.get("model.objective"), "model.objective.extra"
    if not (isinstance(objective, dict) and objective.get("extra")):
        return {}
    made, refused = [], {}
    try:
        kinds = [
            resolve_class(spec, imported_kinds(Term), f"{where}: {name}", settings_only=True)
            for spec in objective["extra"]
        ]
        made = [make(*each) for each in kinds]
    except UserError as error:
        refused[name] = error
    except TypeError as error:  # of a constructor that fixes what it passes on
        refused[name] = UserError(f"{where}: a term of {name} cannot be made again ({error}). Give the terms.")
    settings["model.objective"] = {**objective, "extra": made}
    return refused


def arguments_of(stored: Settings, given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return arguments of LeapModule from the settings that a checkpoint holds.

    Args:
        stored: Settings of the checkpoint; changed in place.
        given: Arguments that are given in their place.
        where: Path of the checkpoint, for messages.

    Raises:
        UserError: A class of the checkpoint cannot be found, and none is given in its place.
    """
    classes, refused = find_classes(stored, where)
    refused |= take_terms(stored, where, lambda kind, arguments: kind(**arguments))
    for name, error in refused.items():
        if name.split(".")[1] not in given:
            raise error
    known = {name: value for name, value in stored.items() if name.startswith("model.") and name not in refused}
    known |= {name: partial(kind, **arguments) for name, (kind, arguments) in classes.items()}
    known = without_revision(known, given.get("base_model"))
    return {name.removeprefix("model."): value for name, value in known.items()}


def without_revision(stored: Settings, base_model: Any) -> Settings:
    """Return ``stored`` settings without the revision of a base model that ``base_model``, unless None, replaces."""
    if base_model in (None, stored.get("model.base_model")):
        return stored
    return {name: value for name, value in stored.items() if name != "model.revision"}


def _settings_of_older(identity: Identity, checkpoint: Mapping[str, Any]) -> Settings:
    """Reconstruct the settings from a checkpoint without stored settings: from ``hyper_parameters`` and elsewhere."""
    written = checkpoint.get("hyper_parameters")
    hyper_parameters = written if isinstance(written, Mapping) else {}
    names = ("base_model", "revision", "targets", "ignore", "sparsity")
    settings: Settings = {f"model.{name}": getattr(identity, name) for name in names}
    plain = MODEL.keys() - CLASSES_OF_MODEL
    settings |= {f"model.{key}": value for key, value in hyper_parameters.items() if key in plain}
    settings |= {"model.gate": identity.gate, "trainer.max_steps": identity.max_steps}
    settings["trainer.accumulate_grad_batches"] = identity.accumulation
    settings["model.annealing"] = asdict(learned_by(identity.settings))
    recorded = identity.settings.get("data")
    data = recorded if isinstance(recorded, dict) else {}
    settings |= {f"data.{name}": value for name, value in data.items() if name in DATA}
    if isinstance(identity.settings.get("dtype"), str):
        settings["model.dtype"] = identity.settings["dtype"]
    settings |= _optimizer_of_older(identity, checkpoint) | _scheduler_of_older(checkpoint)
    nullable = {"model.targets", "model.revision", "model.lr_scheduler"}
    return {name: value for name, value in settings.items() if value is not None or name in nullable}


def _optimizer_of_older(identity: Identity, checkpoint: Mapping[str, Any]) -> Settings:
    """Reconstruct the optimizer from its class in the provenance and its settings in its own state."""
    made = identity.settings.get("optimizer")
    try:
        group = dict(checkpoint["optimizer_states"][0]["param_groups"][0])
        return {
            "model.optimizer": {
                "class_path": str(made["class"]),  # type: ignore[index]
                "init_args": {
                    key: value
                    for key, value in {**group, "lr": group["initial_lr"]}.items()
                    if key not in ("params", "initial_lr", "decoupled_weight_decay")
                },
            }
        }
    except (KeyError, IndexError, TypeError, ValueError):
        return {}


def _scheduler_of_older(checkpoint: Mapping[str, Any]) -> Settings:
    """Reconstruct the scheduler from its state, which names no class; leap_pl's own has ``lr_lambdas``."""
    try:
        state = dict(checkpoint["lr_schedulers"][0])
    except (KeyError, IndexError, TypeError, ValueError):
        return {}
    if "lr_lambdas" in state:
        return {"model.lr_scheduler": None}
    return {"model.lr_scheduler": {"class_path": ANY_CLASS, "init_args": state}}
