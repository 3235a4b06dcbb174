"""Code planted at every string of a checkpoint: nothing of it runs, and nothing that it names is imported."""

import copy
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run, fit_flags, refused

from leap_pl import LeapModule
from leap_pl.checkpoints.layout import load_checkpoint, masks_from_checkpoint
from leap_pl.cli.fit import LeapCLI
from leap_pl.cli.main import main
from leap_pl.errors import UserError

pytestmark = pytest.mark.usefixtures("eager")

MODULE = "planted_by_a_checkpoint"
PAYLOADS: dict[str, Any] = {
    "name": f"{MODULE}.run",
    "class": {"class_path": f"{MODULE}.Planted", "init_args": {}},
    "call": {"class_path": f"{MODULE}.run", "init_args": {"command": "x"}},
}

Path_ = tuple[Any, ...]


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], bool]]:
    """Whether a module that lies ready was imported, or something of it called."""
    trace = tmp_path / "it-ran"
    folder = tmp_path / "modules"
    folder.mkdir()
    code = f"open({str(trace)!r}, 'a').close()"
    body = (
        f"{code}\ndef run(*_, **__):\n    {code}\nclass Planted:\n    def __init__(self, *_, **__):\n        {code}\n"
    )
    (folder / f"{MODULE}.py").write_text(body)
    monkeypatch.syspath_prepend(str(folder))
    yield trace.exists
    sys.modules.pop(MODULE, None)


def strings(tree: Any, path: Path_ = ()) -> Iterator[Path_]:
    """The place of every string in a checkpoint."""
    if isinstance(tree, str):
        yield path
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from strings(value, (*path, key))
    elif isinstance(tree, list | tuple):
        for place, value in enumerate(tree):
            yield from strings(value, (*path, place))


def with_planted(checkpoint: dict[str, Any], path: Path_, payload: Any) -> dict[str, Any]:
    """A copy of ``checkpoint``, tensors shared, with ``payload`` in the place of one string."""
    changed = shallow(checkpoint)
    inner: Any = changed
    for key in path[:-1]:
        if isinstance(inner[key], tuple):
            inner[key] = list(inner[key])
        inner = inner[key]
    inner[path[-1]] = copy.deepcopy(payload)
    return changed


def shallow(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: shallow(value) for key, value in tree.items()}
    return [shallow(item) for item in tree] if isinstance(tree, list | tuple) else tree


@pytest.fixture(scope="module")
def checkpoint(finished_run: Run) -> dict[str, Any]:
    """As this version writes it, and with what earlier ones did beside."""
    stored = torch.load(finished_run.folder / "checkpoints" / "step=4.ckpt", weights_only=True)
    names = {name: value for name, value in stored["leap_pl"]["learned_with"].items() if name.startswith("model.")}
    hyper_parameters = {name.removeprefix("model."): value for name, value in names.items()}
    hyper_parameters |= {"trust_remote_code": True, "_class_path": "LeapModule", "_instantiator": "x.y"}
    return {**stored, "hyper_parameters": hyper_parameters}


def older(checkpoint: dict[str, Any]) -> dict[str, Any]:
    changed = shallow(checkpoint)
    changed["leap_pl"]["learned_with"] = {}
    return changed


def words_of(finished: Run, tmp_path: Path, path: Path) -> list[str]:
    kept = ("--trainer.", "--checkpoint.", "--sparsity_log.")
    words = [word for word in fit_flags("m", "t", tmp_path / "run") if word.startswith(kept)]
    return [*words, f"--ckpt_path={path}"]


def test_there_are_strings_to_plant_at(checkpoint: dict[str, Any]) -> None:
    places = list(strings(checkpoint))
    assert len(places) > 60
    assert ("leap_pl", "gate", "class_path") in places
    assert ("hyper_parameters", "optimizer", "class_path") in places


@pytest.mark.parametrize(
    ("verb", "form", "payload"),
    [("fit", "new", "name"), ("fit", "new", "call"), ("fit", "older", "call"), ("validate", "new", "class")],
)
def test_the_command_line_takes_no_code(
    checkpoint, finished: Run, tmp_path: Path, planted, monkeypatch, verb: str, form: str, payload: str
) -> None:
    """Up to where the trainer would run: every setting is taken, every class made."""
    ended = []
    monkeypatch.setattr(LeapCLI, "_run_subcommand", lambda self, verb: ended.append(self.model.trust_remote_code))
    base = checkpoint if form == "new" else older(checkpoint)
    heads = ("leap_pl", "hyper_parameters") if form == "older" else ("leap_pl",)
    places = [place for place in strings(base) if place[0] in heads and place[1] not in ("shapes", "input_dims")]
    assert len(places) > 20
    path = tmp_path / "planted.ckpt"
    torch.save(base, path)
    main([verb, *words_of(finished, tmp_path, path)])
    assert ended == [False]  # as it is, the checkpoint is taken
    for place in places:
        torch.save(with_planted(base, place, PAYLOADS[payload]), path)
        try:
            main([verb, *words_of(finished, tmp_path, path)])
        except SystemExit as end:
            assert end.code == 2, place
        assert not planted(), place
        assert MODULE not in sys.modules, place
    assert not any(ended)  # trust_remote_code stands in the checkpoint, and is not taken


@pytest.mark.parametrize("named", ["base_model", "revision", "weights"])
def test_whose_code_is_trusted_is_typed(checkpoint, finished: Run, tmp_path: Path, planted, capsys, named: str) -> None:
    """With trust_remote_code, a checkpoint alone says neither model nor revision: anyone may have written it."""
    folder = tmp_path / "model"
    shutil.copytree(checkpoint["leap_pl"]["base_model"], folder)
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}
    (folder / "config.json").write_text(json.dumps(settings))
    code = "from transformers import LlamaConfig\nclass Config(LlamaConfig):\n    model_type = 'evil'\n"
    (folder / "evil.py").write_text(f"import {MODULE}\n{code}")
    changed = shallow(checkpoint)
    changed["leap_pl"]["learned_with"] |= {"model.base_model": str(folder), f"model.{named}": str(folder)}
    changed["leap_pl"]["base_model"] = str(folder)
    path = tmp_path / "planted.ckpt"
    torch.save(changed, path)
    typed = [] if named == "base_model" else [f"--model.base_model={folder}"]
    for verb in ("fit", "validate"):
        words = [*words_of(finished, tmp_path, path), *typed, "--model.trust_remote_code=true"]
        assert f"comes only from a file: {folder}. Confirm it with --model.{named} NAME." in refused(
            [verb, *words], capsys
        )
    given: dict[str, Any] = {} if named == "base_model" else {"base_model": str(folder)}
    with pytest.raises(UserError, match=f"Confirm it with {named}=NAME"):
        LeapModule.load_from_checkpoint(path, trust_remote_code=True, **given)
    assert not planted()
    # What is typed is trusted: the code is there to be run.
    with pytest.raises(UserError):
        LeapModule.load_from_checkpoint(
            path, trust_remote_code=True, base_model=str(folder), revision=None, weights=None, dtype="float32"
        )
    assert planted()


@pytest.mark.parametrize("payload", PAYLOADS)
def test_what_reads_a_checkpoint_runs_no_code(
    checkpoint, finished: Run, tmp_path: Path, planted, capsys, payload: str
) -> None:
    """export and compare read the mask, load_from_checkpoint the module: of every string everywhere."""
    path = tmp_path / "planted.ckpt"
    torch.save(checkpoint, path)
    LeapModule.load_from_checkpoint(path)
    masks_from_checkpoint(path)
    for place in strings(checkpoint):
        torch.save(with_planted(checkpoint, place, PAYLOADS[payload]), path)
        try:
            LeapModule.load_from_checkpoint(path)
        except UserError as error:
            assert "\n" not in str(error)
        assert not planted(), place
        try:
            masks_from_checkpoint(path).save(tmp_path / "mask.safetensors")
        except UserError as error:
            assert "\n" not in str(error)
        assert not planted(), place
        assert MODULE not in sys.modules, place


@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_whole_run_runs_no_code(checkpoint, finished: Run, tmp_path: Path, planted, capsys, payload: str) -> None:
    """What Lightning restores: callbacks, loops, optimizer, schedule and data, each with code at all its strings."""
    path = tmp_path / "as-it-is.ckpt"
    torch.save(checkpoint, path)
    main(["fit", *words_of(finished, tmp_path / "as-it-is", path)])
    for head in (
        "callbacks",
        "loops",
        "optimizer_states",
        "lr_schedulers",
        "TextDataModule",
        "pytorch-lightning_version",
    ):
        changed = checkpoint
        for place in strings(checkpoint):
            if place[0] == head:
                changed = with_planted(changed, place, PAYLOADS[payload])
        path = tmp_path / f"{head}.ckpt"
        torch.save(changed, path)
        try:
            main(["fit", *words_of(finished, tmp_path / head, path)])
        except SystemExit as end:
            assert end.code == 2, head
        assert not planted(), head


def test_a_class_that_is_none_of_those_asked_for_is_refused_before_it_is_called(
    model_folder, text_file, tmp_path: Path, planted, capsys
) -> None:
    """A config is the user's own and may name classes: of the kind that is asked for."""
    call = "={class_path: os.system, init_args: {command: 'touch %s'}}"
    for words, says in {
        f"--model.optimizer{call}": "but must be a subclass of Optimizer",
        f"--model.lr_scheduler{call}": "but must be a subclass of LRScheduler",
        f"--model.gate{call}": "but must be a subclass of Gate",
        "--model.optimizer=torch.optim.lr_scheduler.StepLR": "model.optimizer",
        "--model.gate=torch.nn.Linear": "model.gate",
        "--model.gate=torch.optim.SGD": "model.gate",
    }.items():
        trace = tmp_path / "trace"
        line = refused(fit_flags(model_folder, text_file, tmp_path, words.replace("%s", str(trace))), capsys)
        assert says in line, words
        assert not trace.exists(), words


@pytest.mark.parametrize("part", ["state_dict", "optimizer_states"])
def test_a_small_checkpoint_takes_little_memory(finished: Run, tmp_path: Path, part: str) -> None:
    """Views of one element, and of one another, are stored as what they are views of."""
    stored = torch.load(finished.checkpoint, weights_only=True)
    large = torch.zeros(1).expand(1 << 17, 1 << 17)
    views = [torch.zeros(64, 64)] * (finished.checkpoint.stat().st_size // 1000)
    for planted in (large, views, {"exp_avg": [large]}):
        path = tmp_path / "small.ckpt"
        torch.save({**stored, part: {"model.layers.0.self_attn.q_proj.weight": planted}}, path)
        assert path.stat().st_size < 2 * finished.checkpoint.stat().st_size
        with pytest.raises(UserError, match="its tensors are larger than the file"):
            load_checkpoint(path)
