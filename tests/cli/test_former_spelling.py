"""``annealing`` where it used to be, in options and in configs, is ``model.annealing``, and one line says so."""

import shlex
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Run, fit_flags, refused
from hypothesis import given
from hypothesis import strategies as st
from tiny_experiment import definition

from experiments.headline.definition import read_experiment
from experiments.headline.digests import digest, identity
from experiments.headline.steps import Steps
from leap_pl.cli.fit import LeapCLI, make_cli
from leap_pl.cli.former_spelling import FormerSpellingParser, check_agree, respelled
from leap_pl.cli.main import main
from leap_pl.errors import UserError
from leap_pl.training.schedules import Annealing, Schedule

DEFAULT = Annealing()
ALPHA, TAU = Schedule(100, 500), Schedule(1, 0.5)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Configs, and what they include from a folder of its own."""
    files: dict[str, Any] = {
        "old": {"annealing": {"alpha": {"start": 100, "end": 500}}},
        "old-again": {"annealing": {"alpha": {"end": 900}, "tau": {"start": 1, "end": 0.5}}},
        "new": {"model": {"annealing": {"alpha": {"start": 100, "end": 500}}}},
        "flat": {"annealing.alpha": {"start": 100, "end": 500}, "model.objective.budget": 3},
        "includes": {"annealing": "shared/schedules.yaml", "model": "shared/model.yaml", "data": "shared/data.yaml"},
        "both": {"annealing": {"alpha": {"start": 100}}, "model": {"annealing": {"alpha": {"start": 100, "end": 500}}}},
        "differ": {"annealing": {"alpha": {"start": 1}}, "model": {"annealing": {"alpha": {"start": 2, "end": 3}}}},
        "differs-inside": {"annealing": {"tau": {"start": 3, "end": 4}}, "model": "shared/annealed.yaml"},
        "shared/schedules": {"alpha": {"start": 100, "end": 500}},
        "shared/model": {"objective": "losses.yaml"},
        "shared/losses": {"budget": 3},
        "shared/annealed": {"annealing": {"tau": {"start": 2, "end": 1}}},
        "shared/data": {"seq_length": 64},
    }
    (tmp_path / "shared").mkdir()
    for name, told in files.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(told), encoding="utf-8")
    return tmp_path


def parsed(folder: Path, line: str) -> tuple[LeapCLI, list[str]]:
    """The command line before its run, and what it warns of in the matter. ``@name`` is a config of ``folder``."""
    words = [f"{folder / word[1:]}.yaml" if word.startswith("@") else word for word in shlex.split(line)]
    more = ["--model.base_model=x", f"--trainer.default_root_dir={folder}", "--trainer.logger=false"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cli = make_cli([*more, "--trainer.accelerator=cpu", *words], run=False)
    told = [str(warning.message) for warning in caught]
    return cli, [message for message in told if message.startswith("annealing is")]


@pytest.mark.parametrize(
    ("line", "expected", "says"),
    [
        (
            "--annealing.alpha '{start: 100, end: 500}'",
            {"alpha": ALPHA},
            "--model.annealing.alpha for --annealing.alpha",
        ),
        (
            "--annealing.alpha='{start: 100, end: 500}'",
            {"alpha": ALPHA},
            "--model.annealing.alpha for --annealing.alpha",
        ),
        ("--annealing.alpha.start 100", {"alpha": Schedule(100, 350)}, "--model.annealing.alpha.start for --annealing"),
        ("--annealing '{alpha: {start: 100, end: 500}}'", {"alpha": ALPHA}, "--model.annealing for --annealing"),
        ("--annealing @shared/schedules", {"alpha": ALPHA}, "--model.annealing for --annealing"),
        ("--config @old", {"alpha": ALPHA}, "'annealing' within 'model' in old.yaml"),
        ("-c @old", {"alpha": ALPHA}, "'annealing' within 'model' in old.yaml"),
        ("--config '{annealing: {alpha: {start: 100, end: 500}}}'", {"alpha": ALPHA}, "within 'model' in --config"),
        ("--config @flat", {"alpha": ALPHA}, "'annealing' within 'model' in flat.yaml"),
        ("--config @includes", {"alpha": ALPHA}, "'annealing' within 'model' in includes.yaml"),
        ("--config @both", {"alpha": ALPHA}, "'annealing' within 'model' in both.yaml"),
        # What comes later wins, however it is spelled.
        ("--config @old --config @old-again", {"alpha": Schedule(100, 900), "tau": TAU}, "old.yaml, old-again.yaml"),
        ("--config @old-again --config @old", {"alpha": ALPHA, "tau": TAU}, "old-again.yaml, old.yaml"),
        ("--config @old-again --config @new", {"alpha": ALPHA, "tau": TAU}, "in old-again.yaml"),
        ("--config @new --config @old-again", {"alpha": Schedule(100, 900), "tau": TAU}, "in old-again.yaml"),
        ("--config @new --annealing.alpha.end 9", {"alpha": Schedule(100, 9)}, "--model.annealing.alpha.end for"),
        ("--config @old --model.annealing.alpha.end 9", {"alpha": Schedule(100, 9)}, "in old.yaml"),
        ("--config @old --annealing.tau.start 2", {"alpha": ALPHA, "tau": Schedule(2, 0.05)}, "and 'annealing' within"),
        (
            "--annealing.alpha.start 100 --model.annealing.alpha '{start: 100, end: 500}'",
            {"alpha": ALPHA},
            "--model.annealing.alpha.start for --annealing.alpha.start",
        ),
    ],
)
def test_the_former_spelling_is_taken(folder: Path, line: str, expected: dict[str, Schedule], says: str) -> None:
    cli, told = parsed(folder, line)
    assert cli.model.annealing == replace(DEFAULT, **expected)
    assert len(told) == 1
    assert says in told[0]
    assert "\n" not in told[0]
    if "@includes" in line or "@flat" in line:  # the rest of the config is taken too
        assert cli.model.objective.budget == 3
    if "@includes" in line:
        assert cli.datamodule.seq_length == 64


@pytest.mark.parametrize("line", ["", "--config @new", "--model.annealing.alpha '{start: 100, end: 500}'"])
def test_the_present_spelling_is_taken_without_a_word(folder: Path, line: str) -> None:
    cli, told = parsed(folder, line)
    assert cli.model.annealing == (replace(DEFAULT, alpha=ALPHA) if line else DEFAULT)
    assert told == []


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (
            "--annealing.alpha.start 1 --model.annealing.alpha.start 2",
            "the command line sets annealing.alpha.start to 1 and model.annealing.alpha.start to 2, but they are one",
        ),
        ("--model.annealing.alpha '{start: 2, end: 3}' --annealing.alpha.start=1", "Leave annealing.alpha.start out"),
        ("--annealing @old --model.annealing.alpha.start=1", "but they are one setting. Leave annealing out"),
        ("--config @differ", "differ.yaml sets annealing.alpha.start to 1.0 and model.annealing.alpha.start to 2.0"),
        ("--config @differs-inside", "annealing.tau.end to 4.0 and model.annealing.tau.end to 1.0"),
        ("--annealing.beta 1", "there is no option --model.annealing.beta"),
        ("--config '{annealing: {beta: 1}}'", "there is no setting model.annealing.beta"),
        ("--annealing.alpha.start x", "model.annealing.alpha.start: expected float"),
    ],
)
def test_both_spellings_that_differ_are_refused_in_one_line(
    folder: Path, line: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"{folder / word[1:]}.yaml" if word.startswith("@") else word for word in shlex.split(line)]
    message = refused(["fit", "--model.base_model=x", "--trainer.logger=false", *words], capsys)
    assert says in message


# -- whatever is laid over whatever -------------------------------------------------------------------------

leaves = st.dictionaries(
    st.tuples(st.sampled_from(["alpha", "tau", "pattern_alpha"]), st.sampled_from(["start", "end"])),
    st.integers(1, 99).map(float),
    min_size=1,
)
layers = st.lists(st.tuples(leaves, st.booleans(), st.booleans()), min_size=1, max_size=4)


def nested(layer: dict[tuple[str, str], float]) -> dict[str, dict[str, float]]:
    told: dict[str, dict[str, float]] = {}
    for (name, end), value in layer.items():
        told.setdefault(name, {})[end] = value
    return told


@given(layers=layers)
def test_layers_of_either_spelling_end_as_if_all_were_of_the_present_one(layers: list[Any]) -> None:
    """Each a config or options; options of both spellings together are refused, which is another test's."""
    words: list[str] = []
    expected = asdict(DEFAULT)
    typed_formerly = layers[0][1]
    for layer, former, as_config in layers:
        if as_config:
            told = {"annealing": nested(layer)}
            words += [
                "--config",
                yaml.safe_dump(told if former else {"model": told}, default_flow_style=True, width=999),
            ]
        else:
            option = "--annealing" if typed_formerly else "--model.annealing"
            words += [word for key, value in layer.items() for word in (f"{option}.{'.'.join(key)}", str(value))]
        for (name, end), value in layer.items():
            expected[name][end] = value
    parser = FormerSpellingParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_argument("--model.annealing", type=Annealing, default=DEFAULT)
    found = parser.parse_args(respelled(words)[0])
    assert found.model.annealing.as_dict() == expected


@given(one=leaves, other=leaves)
def test_what_is_given_twice_must_agree(one: dict[Any, float], other: dict[Any, float]) -> None:
    differs = any(one[key] != other[key] for key in one.keys() & other.keys())
    if not differs:
        check_agree(nested(one), nested(other), "it")
        return
    with pytest.raises(UserError, match=r"^it sets annealing\.\w+\.\w+ to [\d.]+ and model\.annealing\."):
        check_agree(nested(one), nested(other), "it")


# -- in a run -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("eager")
def test_a_config_that_an_earlier_version_saved(
    finished: Run, model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    """As it lies beside the logs, given to a run and to a resume: one line each, and what is saved is today's."""
    saved = yaml.safe_load((finished.folder / "tensorboard" / "config.yaml").read_text(encoding="utf-8"))
    saved["annealing"] = saved["model"].pop("annealing")
    saved["annealing"]["alpha"] = {"start": 100.0, "end": 500.0, "curve": "linear"}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(saved), encoding="utf-8")
    words = ["fit", "--config", str(config), *fit_flags(model_folder, text_file, tmp_path)[1:]]
    masks = []
    for more in ([], ["--ckpt_path", str(tmp_path / "checkpoints" / "step=2.ckpt")], ["--ckpt_path=last"]):
        with pytest.warns(UserWarning, match="annealing is a setting of the model now") as caught:
            cli = main([*words, *more])
        told = [str(warning.message) for warning in caught if "annealing is" in str(warning.message)]
        assert len(told) == 1
        assert "'annealing' within 'model' in config.yaml" in told[0]
        assert cli.model.annealing == replace(DEFAULT, alpha=ALPHA)
        masks.append((tmp_path / "checkpoints" / "mask.safetensors").read_bytes())
    assert masks[0] == masks[1] == masks[2]
    written = yaml.safe_load((tmp_path / "tensorboard" / "config.yaml").read_text(encoding="utf-8"))
    assert "annealing" not in written
    assert written["model"]["annealing"]["alpha"]["end"] == 500


# -- in an experiment ---------------------------------------------------------------------------------------


def test_an_experiment_in_the_former_spelling_is_the_same_one(
    model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    """In the shared config and in a row; and its cells have the digests that they always had."""
    definition(tmp_path, model_folder, text_file)
    learn, told = (yaml.safe_load((tmp_path / f"{name}.yaml").read_text()) for name in ("learn", "tiny"))
    told["rows"]["leap"]["fit"] = {"model": {"annealing": {"tau": {"end": 0.5}}}}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(told, sort_keys=False))
    present = read_experiment(tmp_path / "tiny.yaml")
    learn["annealing"] = learn["model"].pop("annealing")
    told["rows"]["leap"]["fit"] = {"annealing": {"tau": {"end": 0.5}}}
    (tmp_path / "learn.yaml").write_text(yaml.safe_dump(learn, sort_keys=False))
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(told, sort_keys=False))
    with pytest.warns(UserWarning, match="'annealing' within 'model' in learn.yaml"):
        former = read_experiment(tmp_path / "tiny.yaml")
    assert former == present
    steps = Steps(former, tmp_path / "runs")
    cell = former.cells["leap-50"]
    config = steps.fit_config(cell)
    assert config["model"]["annealing"] == {"alpha": {"start": 100, "end": 350}, "tau": {"start": 1, "end": 0.5}}
    assert "annealing" not in config
    known = steps.fit_config(cell, silent=True)
    known["annealing"] = known["model"].pop("annealing")
    known["model"]["base_model"] = identity(str(model_folder))
    known["data"]["text"] = identity(str(text_file))
    known["model"]["prior"]["mask"] = steps.make(former.cells["wanda-50"]).digest
    assert steps.make(cell).digest == digest(["fit", known])
