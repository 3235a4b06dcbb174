"""Every number that a setting takes: what cannot be meant is refused in one line, before anything is loaded."""

import inspect
import math
import typing
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from conftest import fit_flags, refused
from hypothesis import given
from hypothesis import strategies as st
from lightning.fabric.utilities.exceptions import MisconfigurationException
from tiny import tiny_model

from leap_pl.base_model.weights import find_weights
from leap_pl.callbacks import Checkpoints, SparsityLogger, StepProgress
from leap_pl.cli.compare import compare_command
from leap_pl.cli.consolidate import consolidate_command
from leap_pl.cli.evaluate import evaluate_command
from leap_pl.cli.export import export_command
from leap_pl.cli.generate import generate_command
from leap_pl.cli.main import VERBS, settings_of
from leap_pl.cli.prune import prune_command
from leap_pl.data import TextDataModule
from leap_pl.errors import UserError
from leap_pl.gates import BernoulliGate, GateState, NMGate, TileGate
from leap_pl.inputs.ranges import RANGES, Range, check_numbers
from leap_pl.losses.objective import Objective
from leap_pl.oneshot.methods import METHODS
from leap_pl.oneshot.methods import settings_of as settings_of_method
from leap_pl.prior import Prior
from leap_pl.training.module import LeapModule
from leap_pl.training.optimizers import PackedAdamW, check_settings
from leap_pl.training.schedules import ANNEALED, Annealing, Schedule

NUMBERS = [math.nan, math.inf, -math.inf, -1, 0, 1e30]


def gate(kind: Any) -> Callable[..., Any]:
    weight = next(iter(find_weights(tiny_model()).values()))
    return lambda **settings: kind(weight, GateState(), **settings)


def optimizer(kind: Any) -> Callable[..., Any]:
    def make(**settings: Any) -> None:
        check_numbers({"class_path": "any", "init_args": settings}, "model.optimizer.")
        check_settings(kind([torch.nn.Parameter(torch.zeros(1))], **settings))

    return make


def scheduler(kind: Any, **needed: Any) -> Callable[..., Any]:
    def make(**settings: Any) -> None:
        check_numbers(settings, "model.lr_scheduler.")
        rates = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        kind(rates, **{**needed, **settings})
        check_settings(rates)

    return make


def trainer(**settings: Any) -> L.Trainer:
    check_numbers(settings, "trainer.")
    if settings.get("devices") == -1:  # all: Lightning raises a TypeError on a CPU, which is looked at below
        return L.Trainer(accelerator="cpu", logger=False)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    return L.Trainer(**{**quiet, **settings})


def flags(verb: str, function: Callable[..., Any]) -> Callable[..., Any]:
    needed = {
        "prune": ["--output_dir=x", "--model=x"],
        "export": ["--output_dir=x"],
        "generate": ["--model=x", "--prompt=x"],
    }.get(verb, [])

    def parse(**settings: Any) -> None:
        spelled = {math.inf: ".inf", -math.inf: "-.inf"}
        ((name, value),) = settings.items()
        written = ".nan" if math.isnan(value) else spelled.get(value, value)
        words = [f"--{name}=[{written}]" if name == "layer_sparsity" else f"--{name}={written}"]
        settings_of(verb, function, [*needed, *words])

    return parse


def schedule_of(name: str) -> Callable[..., Any]:
    def make(**settings: Any) -> None:
        start = {"start": 1.0, "end": 1.0, **settings}
        Annealing(**{name: Schedule(**start)})

    return make


# Path of the settings → what takes them, and what makes it of them.
TAKERS: list[tuple[str, Any, Callable[..., Any]]] = [
    ("model.", LeapModule, lambda **s: LeapModule("x", **s)),
    ("model.objective.", Objective, Objective),
    ("model.prior.", Prior, Prior),
    ("model.gate.", BernoulliGate, gate(BernoulliGate)),
    ("model.gate.", NMGate, gate(NMGate)),
    ("model.gate.", TileGate, gate(TileGate)),
    ("model.optimizer.", PackedAdamW, optimizer(PackedAdamW)),
    ("model.optimizer.", torch.optim.AdamW, optimizer(torch.optim.AdamW)),
    ("model.optimizer.", torch.optim.SGD, optimizer(torch.optim.SGD)),
    (
        "model.lr_scheduler.",
        torch.optim.lr_scheduler.ExponentialLR,
        scheduler(torch.optim.lr_scheduler.ExponentialLR, gamma=0.9),
    ),
    (
        "model.lr_scheduler.",
        torch.optim.lr_scheduler.CosineAnnealingLR,
        scheduler(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=5),
    ),
    ("data.", TextDataModule, lambda **s: TextDataModule("x", **s)),
    ("sparsity_log.", SparsityLogger, SparsityLogger),
    ("progress.", StepProgress, StepProgress),
    ("checkpoint.", Checkpoints, Checkpoints),
    ("model.annealing.alpha.", Schedule, schedule_of("alpha")),
    ("model.annealing.tau.", Schedule, schedule_of("tau")),
    ("model.annealing.pattern_alpha.", Schedule, schedule_of("pattern_alpha")),
    ("trainer.", L.Trainer, trainer),
    ("prune.", prune_command, flags("prune", prune_command)),
    ("evaluate.", evaluate_command, flags("evaluate", evaluate_command)),
    ("export.", export_command, flags("export", export_command)),
    ("generate.", generate_command, flags("generate", generate_command)),
    ("compare.", compare_command, flags("compare", compare_command)),
    ("consolidate.", consolidate_command, flags("consolidate", consolidate_command)),
]
# Of torch's own signatures, which have no types.
UNTYPED = {"lr", "momentum", "dampening", "weight_decay", "gamma", "eta_min", "T_max"}
OTHER_FORMS = {"trainer.plugins", "trainer.max_time"}  # that have numbers within


def numeric(taker: Any) -> Iterator[str]:
    """Names of the parameters that take a number, or several."""
    for name, parameter in inspect.signature(taker).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:  # options of one-shot methods, which are below
            continue
        told = parameter.annotation
        words = str(told)
        if isinstance(told, type):
            is_number = told is not bool and issubclass(told, int | float)
        else:
            is_number = any(word in words for word in ("int", "float", "PositiveInt", "OpenUnitInterval"))
            is_number &= not any(word in words for word in ("Literal", "Callable", "dict[str, Any]"))
        is_number |= isinstance(parameter.default, int | float) or name in UNTYPED
        if is_number and not isinstance(parameter.default, bool):
            yield name


CASES = [
    (path, name, make) for path, taker, make in TAKERS for name in numeric(taker) if path + name not in OTHER_FORMS
]
# Options of one-shot methods have their ranges beside them.
OF_METHODS = [
    ("prune.", option, partial(lambda method, **given: settings_of_method(method, given), method))
    for method, row in METHODS.items()
    for option in row.options
]
CASES += OF_METHODS


def test_the_walk_finds_the_settings() -> None:
    found = {path + name for path, name, _ in CASES}
    assert len(CASES) > 90
    for expected in (
        "model.sparsity",
        "model.objective.lm",
        "model.prior.fisher",
        "model.gate.spread",
        "model.optimizer.lr",
        "model.optimizer.betas",
        "data.seq_length",
        "checkpoint.every_minutes",
        "model.annealing.tau.end",
        "trainer.gradient_clip_val",
        "trainer.val_check_interval",
        "trainer.log_every_n_steps",
        "prune.damping",
        "evaluate.stride",
    ):
        assert expected in found


def test_every_number_has_a_range() -> None:
    """A new setting is in the table, or this fails."""
    schedules = {path + end for path, _, _ in TAKERS if path.startswith("model.annealing.") for end in ("start", "end")}
    assert {path.split(".")[2] for path in schedules} == set(ANNEALED)
    unknown = {path + name for path, name, _ in CASES} - set(RANGES) - schedules
    unknown -= {path + name for path, name, _ in OF_METHODS}
    assert unknown == set()


@pytest.mark.parametrize(("path", "name", "make"), CASES, ids=[path + name for path, name, _ in CASES])
def test_every_number_works_or_is_refused_in_one_line(path: str, name: str, make: Callable[..., Any]) -> None:
    for number in NUMBERS:
        for value in ((float(number), 0.5), (0.5, float(number))) if name == "betas" else (number,):
            try:
                make(**{name: value})
            except Exception as error:
                message = str(error)
                kinds = (UserError, MisconfigurationException, *[ValueError] * (path == "trainer."))
                assert isinstance(error, kinds), (name, value, repr(error))
                assert message
                assert "\n" not in message.strip() or isinstance(error, MisconfigurationException)
            else:
                assert math.isfinite(number), f"{path}{name} takes {number}"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--trainer.gradient_clip_val=-1", "trainer.gradient_clip_val is -1; give 0 or more"),
        ("--trainer.gradient_clip_val=.nan", "trainer.gradient_clip_val is nan"),
        ("--model.annealing.alpha.start=-1", "model.annealing.alpha goes from -1 to 350"),
        ("--model.annealing.tau.end=-1", "model.annealing.tau goes from 4 to -1; a temperature is above 0"),
        ("--model.annealing.tau.start=.inf", "model.annealing.tau"),
        ("--model.optimizer.lr=11", "model.optimizer.lr is 11; give a number from 0 to 10"),
        ("--model.optimizer.lr=-0.001", "model.optimizer.lr is -0.001"),
        ("--model.optimizer.lr=.nan", "model.optimizer.lr is nan"),
        ("--model.optimizer.betas=[0.9,1.0]", "model.optimizer.betas is 1; give a number from 0 to below 1"),
        ("--model.optimizer.weight_decay=-0.1", "model.optimizer.weight_decay is -0.1; give"),
        ("--trainer.val_check_interval=0", "trainer.val_check_interval is 0; give a number above 0"),
        ("--trainer.val_check_interval=-5", "trainer.val_check_interval is -5"),
        ("--trainer.log_every_n_steps=0", "trainer.log_every_n_steps is 0; give 1 or more"),
        ("--model.objective.lm=.nan", "model.objective.lm is nan"),
        ("--model.objective.budget=.inf", "model.objective.budget is inf"),
        ("--model.prior.fisher=.nan", "model.prior.fisher is nan; give a number above 0"),
        ("--checkpoint.every_minutes=.nan", "checkpoint.every_minutes is nan"),
        ("--checkpoint.every_minutes=-1", "checkpoint.every_minutes is -1; give 0 or more"),
        ("--model.gate.spread=.nan", "model.gate.spread is nan"),
        ("--data.seed=99999999999999999999", "data.seed is 1e+20; give a number from"),
        ("--seed_everything=-1", "seed_everything is -1"),
        ("--trainer.devices=-1", "trainer.devices: `devices` selected with `CPUAccelerator` should be"),
    ],
)
def test_fit_refuses_what_cannot_be_meant(tmp_path: Path, capsys, words: str, says: str) -> None:
    """Before the model is looked for: there is none."""
    assert says in refused(fit_flags(tmp_path / "gone", tmp_path / "gone.txt", tmp_path, words), capsys)


def test_a_rate_from_a_checkpoints_settings_is_looked_at_too(finished, tmp_path: Path, capsys) -> None:
    stored = torch.load(finished.checkpoint, weights_only=True)
    stored["leap_pl"]["learned_with"]["model.objective"]["lm"] = math.nan
    (tmp_path / "c").mkdir()
    torch.save(stored, tmp_path / "c" / "step=6.ckpt")
    words = [*finished.flags, f"--checkpoint.dirpath={tmp_path / 'c'}", "--ckpt_path=last"]
    from leap_pl.cli.main import main

    with pytest.raises(SystemExit):
        main(words)
    assert "model.objective: objective.lm is nan; give 0 or more. Use" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"gradient_clip_val": -1.0}, "trainer.gradient_clip_val is -1"),
        ({"gradient_clip_val": math.nan}, "trainer.gradient_clip_val is nan"),
        ({"val_check_interval": 0}, "trainer.val_check_interval is 0"),
    ],
)
def test_a_trainer_of_ones_own_is_looked_at(model_folder, text_file, tmp_path, settings: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        fit_in_python(model_folder, text_file, tmp_path, **settings)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"lr": 11.0}, "model.optimizer.lr is 11"),
        ({"lr": torch.tensor(100.0)}, "model.optimizer.lr is 100"),
        ({"lr": math.nan}, "model.optimizer.lr is nan"),
        ({"lr": 0.1, "momentum": math.inf}, "model.optimizer.momentum is inf"),
    ],
)
def test_an_optimizer_of_ones_own_is_looked_at(model_folder, text_file, tmp_path, settings: dict, says: str) -> None:
    def make(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, **settings)

    with pytest.raises(UserError, match=says):
        fit_in_python(model_folder, text_file, tmp_path, optimizer=make)


def fit_in_python(model: Path, text: Path, folder: Path, optimizer: Any = None, **settings: Any) -> None:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    more = {} if optimizer is None else {"optimizer": optimizer}
    module = LeapModule(str(model), dtype="float32", prior=Prior("none"), **more)
    data = TextDataModule(str(model), str(text), seq_length=32, validation_sequences=2)
    L.Trainer(max_steps=1, default_root_dir=folder, **{**quiet, **settings}).fit(module, data)


def test_a_warmup_longer_than_the_run_is_warned_of(model_folder, text_file, tmp_path, recwarn, eager) -> None:
    fit_in_python(model_folder, text_file, tmp_path)
    (said,) = [str(w.message) for w in recwarn if "warmup_steps" in str(w.message)]
    assert "model.warmup_steps is 5 and trainer.max_steps 1" in said


@given(
    st.floats(-1e6, 1e6),
    st.floats(0, 1e6),
    st.booleans(),
    st.booleans(),
    st.one_of(st.floats(), st.integers(-(10**7), 10**7)),
)
def test_a_range_holds_what_lies_between_its_ends(
    low: float, width: float, above: bool, below: bool, number: float
) -> None:
    high = low + width
    taken = Range(low, high, above=above, below=below)
    expected = low <= number <= high and not (above and number == low) and not (below and number == high)
    assert (number in taken) == expected
    assert math.nan not in taken
    assert math.inf not in Range()
    settings = {"group": {"class_path": "x", "init_args": {"list": [0, number], "switch": True}}}
    if math.isfinite(number):
        check_numbers(settings)
    else:
        with pytest.raises(UserError, match=r"group\.list is"):
            check_numbers(settings)


def test_the_verbs_of_this_test_are_those_there_are() -> None:
    assert {path[:-1] for path, _, _ in TAKERS} >= {name for name, verb in VERBS.items() if not verb.run}
    assert typing.get_type_hints(Schedule)["start"] is float
