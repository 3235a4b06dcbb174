"""What a command reads is never replaced by what it writes, and what leap_pl did not write is never replaced at all."""

import errno
import json
import os
import shutil
import string
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from conftest import Run, fit_flags
from folders import tree
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_folder

from leap_pl import TextDataModule
from leap_pl.cli import main as cli
from leap_pl.cli.configs import check_configs
from leap_pl.errors import UserError
from leap_pl.files import atomic_file, atomic_folder
from leap_pl.inputs import records
from leap_pl.inputs import register as inputs
from leap_pl.masks import MaskSet

pytestmark = pytest.mark.usefixtures("eager")


def one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What the command says that must be refused."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("leap_pl")]
    assert len(said) == 1
    return said[0]


# -- every verb, every kind of input, every way to name it ---------------------------------------------------

WAYS = ("as it is", "relative", "through a link", "through a linked folder")


@pytest.fixture
def victim(tmp_path: Path, finished: Run, model_folder: Path, text_file: Path, monkeypatch) -> Path:
    """A folder that leap_pl could replace by its record, with one input of each kind in it; its own base model too."""
    folder = tmp_path / "out"
    shutil.copytree(model_folder, folder / "model")
    shutil.copy(text_file, folder / "a.jsonl")
    (folder / "layers.txt").write_text("0.5\n0.5\n")
    mask = MaskSet.load(finished.mask).with_provenance(base_model=str(folder / "model"))
    mask.save(folder / "mask.safetensors")
    shutil.copy(finished.checkpoint.resolve(), folder / "run.ckpt")
    result = {"format": "leap_pl.evaluation", "format_version": 1, "perplexity": {"t": {"value": 3.0}}}
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "config.yaml").write_text("seed: 0\n")
    records.write_record(folder, "prune")
    monkeypatch.chdir(tmp_path)
    return folder


def prune(*more: str) -> Callable[[Callable[[str], str], Path, Path], list[str]]:
    """Words of prune with the input that ``more`` names; the others lie elsewhere."""

    def words(name: Callable[[str], str], model: Path, mask: Path) -> list[str]:
        given = dict(zip(more[::2], [name(file) for file in more[1::2]], strict=True))
        options = {"--model": str(model), "--method": "magnitude"} | given
        return ["prune", *(word for option in options.items() for word in option), "--seq_length", "32"]

    return words


def export(*more: str) -> Callable[[Callable[[str], str], Path, Path], list[str]]:
    def words(name: Callable[[str], str], model: Path, mask: Path) -> list[str]:
        given = dict(zip(more[::2], [name(file) for file in more[1::2]], strict=True))
        options = ({} if "--ckpt_path" in given else {"--mask": str(mask)}) | given
        return ["export", *(word for option in options.items() for word in option)]

    return words


def compare(file: str) -> Callable[[Callable[[str], str], Path, Path], list[str]]:
    return lambda name, model, mask: ["compare", name(file), str(mask)]


VERBS: dict[str, tuple[str, Callable[[Callable[[str], str], Path, Path], list[str]]]] = {
    "prune: model": ("model", prune("--model", "model")),
    "prune: text": ("a.jsonl", prune("--text", "a.jsonl", "--method", "wanda")),
    "prune: pattern of texts": ("*.jsonl", prune("--text", "*.jsonl")),
    "prune: mask": ("mask.safetensors", prune("--mask", "mask.safetensors")),
    "prune: layer sparsities": ("layers.txt", prune("--layer_sparsity", "layers.txt")),
    "prune: config": ("config.yaml", prune("--config", "config.yaml")),
    "export: mask": ("mask.safetensors", export("--mask", "mask.safetensors")),
    "export: checkpoint": ("run.ckpt", export("--ckpt_path", "run.ckpt")),
    "export: model": ("model", export("--model", "model")),
    "export: result": ("result.json", export("--perplexity", "result.json")),
    "compare: mask": ("mask.safetensors", compare("mask.safetensors")),
    "compare: checkpoint": ("run.ckpt", compare("run.ckpt")),
    "compare: result": ("result.json", compare("result.json")),
    "compare: folder": (".", compare(".")),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", VERBS)
def test_no_verb_replaces_what_it_reads(
    victim: Path, tmp_path: Path, finished: Run, model_folder: Path, capsys, case: str, way: str
) -> None:
    def name(file: str) -> str:
        if not set(file) - set(string.ascii_lowercase) and file not in ("model",):
            return file  # no file: the value of another option
        if way == "relative":
            return f"out/{file}"
        if way == "through a linked folder" or (way == "through a link" and file == "*.jsonl"):
            (tmp_path / "elsewhere").symlink_to(victim)
            return f"{tmp_path / 'elsewhere'}/{file}"
        if way == "through a link":
            link = (tmp_path / "link").with_suffix(Path(file).suffix)
            link.symlink_to(victim / file)
            return str(link)
        return f"{victim}/{file}"

    before = tree(tmp_path)
    said = one_line([*VERBS[case][1](name, model_folder, finished.mask), "--output_dir=out", "--force"], capsys)
    assert "out would be replaced, and " in said
    assert {name: content for name, content in tree(tmp_path).items() if name in before} == before


def test_a_link_within_the_folder_is_an_input_too(victim: Path, finished: Run, capsys) -> None:
    """What it leads to would be left, but the name would be gone."""
    (victim / "linked.safetensors").symlink_to(finished.mask)
    records.write_record(victim, "export")
    said = one_line(["export", f"--mask={victim / 'linked.safetensors'}", "--output_dir=out", "--force"], capsys)
    assert "would be replaced" in said
    assert (victim / "linked.safetensors").is_symlink()


def test_what_an_input_points_at_is_found_in_time(victim: Path, tmp_path: Path, capsys) -> None:
    """The mask's base model, and the mask of a result, neither of which is typed; before anything is loaded."""
    shutil.copy(victim / "mask.safetensors", tmp_path / "mask.safetensors")
    before = tree(victim)
    said = one_line(["export", f"--mask={tmp_path / 'mask.safetensors'}", "--output_dir=out", "--force"], capsys)
    assert f"out would be replaced, and {victim / 'model'}" in said
    result = json.loads((victim / "result.json").read_text())
    mask = MaskSet.load(victim / "mask.safetensors")
    result |= {"method": "leap", "perplexity": {}, "tasks": {}, "sparsity": {"global": 0.5, "weights": {}}}
    result["model"] = {"name": "x", "base_model": "x", "fingerprint": mask.provenance.fingerprint}
    result["model"]["mask"] = str(victim / "mask.safetensors")
    (tmp_path / "r.json").write_text(json.dumps(result))
    said = one_line(["compare", "r.json", "--output_dir=out", "--force"], capsys)
    assert f"{victim / 'mask.safetensors'}, which this command reads, is inside it" in said
    assert tree(victim) == before


def test_a_base_model_in_one_file(tmp_path: Path, finished: Run, capsys) -> None:
    folder = tmp_path / "out"
    with atomic_folder(folder, verb="export") as made:
        (made / "model.gguf").write_bytes(b"GGUF")
    words = ["export", f"--mask={finished.mask}", f"--model={folder}/model.gguf", f"--output_dir={folder}", "--force"]
    assert "would be replaced" in one_line(words, capsys)
    assert (folder / "model.gguf").read_bytes() == b"GGUF"


def test_the_folder_that_a_command_is_called_in(victim: Path, finished: Run, monkeypatch, capsys) -> None:
    monkeypatch.chdir(victim / "model")
    before = tree(victim)
    for folder in ("..", ".", str(victim)):
        said = one_line(["export", f"--mask={finished.mask}", f"--output_dir={folder}", "--force"], capsys)
        assert "would be replaced" in said
    assert tree(victim) == before


def test_an_evaluation_does_not_replace_its_text(model_folder, tmp_path: Path, capsys) -> None:
    """A result is JSON, and JSON can be read as text."""
    result = tmp_path / "r.json"
    result.write_text('{"format": "leap_pl.evaluation", "text": "a"}')
    (tmp_path / "link.json").symlink_to(result)
    for output in (result, tmp_path / "link.json"):
        words = ["evaluate", f"--model={model_folder}", f"--perplexity={result}", f"--output={output}"]
        assert f"{output} would be replaced" in one_line(words, capsys)
    assert json.loads(result.read_text())["text"] == "a"


def test_a_config_of_fit_and_its_prior(finished: Run, model_folder, text_file, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name in ("mask.safetensors", "prior.safetensors"):
        (folder / name).write_bytes(finished.mask.read_bytes())
        words = [w for w in fit_flags(model_folder, text_file, tmp_path) if "prior.method" not in w]
        said = one_line([*words, f"--model.prior.mask={folder / name}", "--force"], capsys)
        assert f"{folder / name} would be replaced, and this command reads" in said
        assert (folder / name).read_bytes() == finished.mask.read_bytes()


def test_consolidate_replaces_no_part_and_no_stranger(tmp_path: Path, capsys) -> None:
    folder = tmp_path / "step=2.ckpt"
    folder.mkdir()
    for name in ("meta.pt", ".metadata", "__0_0.distcp"):
        (folder / name).write_bytes(b"x")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "link.ckpt").symlink_to(folder / "__0_0.distcp")
    for file in (folder / "__0_0.distcp", tmp_path / "link.ckpt", tmp_path / "notes.txt"):
        with pytest.raises(SystemExit):
            cli.main(["consolidate", "--ckpt_path", str(folder), "--output", str(file)])
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1
        assert "would be replaced" in said[0] or "exists and is not a checkpoint of leap_pl" in said[0]
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_every_verb_that_is_a_function_is_a_command() -> None:
    for name, verb in cli.VERBS.items():
        if not verb.run:
            found = cli._find(verb.function)
            assert found.__name__ == f"{name}_command"
            assert found.__wrapped__.__code__ is not found.__code__


# -- that nothing is read which is not known -----------------------------------------------------------------

_opened: list[Path] = []
_watching = False


def _hook(event: str, arguments: tuple[object, ...]) -> None:
    if not (_watching and event == "open" and isinstance(arguments[0], str | os.PathLike)):
        return
    # What is read within limits is opened by its descriptor, and without waiting for a writer.
    by_descriptor = arguments[1] is None and isinstance(arguments[2], int) and arguments[2] & os.O_NONBLOCK
    if arguments[1] in ("r", "rb") or by_descriptor:
        _opened.append(Path(os.fsdecode(arguments[0])))  # type: ignore[arg-type]


sys.addaudithook(_hook)


@pytest.fixture
def watched() -> Iterator[list[Path]]:
    """The files that Python opens for reading while a test runs."""
    global _watching
    _opened.clear()
    _watching = True
    yield _opened
    _watching = False


def test_every_file_that_is_opened_is_known(
    finished: Run, text_file, tmp_path: Path, watched: list[Path], monkeypatch
) -> None:
    """Of all verbs: whatever Python opens among the user's files is in the register, or in a folder that is."""
    place = tmp_path / "user"
    model = tiny_folder(place / "model")
    shutil.copy(text_file, place / "a.jsonl")
    mask = MaskSet.load(finished.mask).with_provenance(base_model=str(model))
    mask.save(place / "mask.safetensors")
    (place / "layers.txt").write_text("0.5\n0.5\n")
    known: set[Path] = set()
    note = inputs.Inputs.note
    monkeypatch.setattr(
        inputs.Inputs, "note", lambda self, name: (known.update(inputs.lookups(Path(name))), note(self, name))[1]
    )
    out = tmp_path / "made"
    (place / "config.yaml").write_text(f"layer_sparsity: {place / 'layers.txt'}\n")
    prune = ["prune", f"--model={model}", f"--text={place}/*.jsonl", "--seq_length=32", "--sequences=2"]
    evaluate = ["evaluate", f"--mask={place / 'mask.safetensors'}", f"--perplexity={place / 'a.jsonl'}"]
    _opened.clear()
    cli.main([*prune, f"--config={place / 'config.yaml'}", f"--output_dir={out / 'pruned'}"])
    cli.main([*evaluate, "--seq_length=32", "--max_tokens=64", f"--output={place / 'r.json'}"])
    words = ["export", f"--mask={place / 'mask.safetensors'}", f"--perplexity={place / 'r.json'}"]
    cli.main([*words, f"--output_dir={out / 'exported'}"])
    cli.main([*words[:2], f"--output_dir={out / 'packed'}", "--format=packed"])
    (out / "packed").rename(place / "packed")
    cli.main(["generate", f"--model={place / 'packed'}", "--prompt=a", "--max_new_tokens=2"])
    cli.main(["export", f"--model={place / 'packed'}", f"--output_dir={out / 'unpacked'}"])
    cli.main(["compare", str(place / "r.json"), str(place / "packed"), f"--output_dir={out / 'compared'}"])
    cli.main(
        [
            *[w for w in fit_flags(model, place / "a.jsonl", out) if "prior.method" not in w],
            f"--model.prior.mask={place / 'mask.safetensors'}",
            "--trainer.max_steps=1",
        ]
    )
    read = {path for path in _opened if path.is_relative_to(place)}
    assert {"a.jsonl", "layers.txt", "r.json", "config.yaml", "config.json"} <= {path.name for path in read}
    strange = [path for path in read if not {path, *path.parents} & known]
    assert strange == []


# -- the register itself ---------------------------------------------------------------------------------------

PARTS = st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=3)


@settings(max_examples=60, deadline=None)
@given(file=PARTS, folder=PARTS, links=st.lists(st.tuples(PARTS, PARTS), max_size=3), data=st.data())
def test_a_folder_is_replaced_only_if_every_input_is_left(
    tmp_path_factory: pytest.TempPathFactory, file: list[str], folder: list[str], links, data
) -> None:
    """Any tree with any links: after a replacement that was allowed, the input reads as before, by its name."""
    root = tmp_path_factory.mktemp("any").resolve()
    target = root.joinpath(*file, "f.txt")
    target.parent.mkdir(parents=True)
    target.write_text("precious")
    for place, leads in links:
        link = root.joinpath(*place, "link")
        if not os.path.lexists(link):
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(root.joinpath(*leads))
    names = [path for path in (*root.rglob("f.txt"), *root.rglob("link/**/f.txt")) if path.is_file()]
    name = data.draw(st.sampled_from(sorted(names)))
    out = root.joinpath(*folder)
    out = data.draw(st.sampled_from([out, *(p for p in sorted(root.rglob("link")) if p.is_dir())]))
    if out.is_dir():
        records.write_record(out, "export")
    with inputs.command_inputs("export"):
        inputs.note_input(name)
        try:
            with atomic_folder(out, force=True) as made:
                (made / "new").write_text("new")
        except UserError as error:
            assert "would be replaced" in str(error)
    assert name.read_text() == "precious"


def test_a_register_ends_with_its_command(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_text("old")
    with inputs.command_inputs("export"):
        inputs.note_input(file)
        with pytest.raises(UserError, match="would be replaced"), atomic_file(file):
            pytest.fail("the body must not run")
    with atomic_file(file) as temporary:
        temporary.write_text("new")
    with inputs.command_inputs("prune"):  # a cache is read, and made anew
        inputs.release_input(file)
        inputs.note_input(file)
        with atomic_file(file) as temporary:
            temporary.write_text("newer")
    assert file.read_text() == "newer"
    assert inputs.current() is None


@pytest.mark.parametrize("read", ["a.json", "{}/a.json", "link/a.json"])
@pytest.mark.parametrize("written", ["a.json", "./a.json", "{}/a.json", "link/a.json", "link/../real/a.json", "leaf"])
def test_a_file_is_not_replaced_by_whatever_path(read: str, written: str, tmp_path: Path, monkeypatch) -> None:
    real = tmp_path / "real"
    real.mkdir()
    monkeypatch.chdir(real)
    (tmp_path / "link").symlink_to(real)
    (real / "link").symlink_to(real)
    (real / "leaf").symlink_to(real / "a.json")
    (real / "a.json").write_text("read")
    with inputs.command_inputs("evaluate") as register:
        inputs.note_input(read.format(real))
        with (
            pytest.raises(UserError, match="would be replaced, and this command reads"),
            atomic_file(written.format(real)),
        ):
            pytest.fail("the body must not run")
        with (
            pytest.raises(UserError, match="would be replaced"),
            register.replacing(inputs.real_path(Path("link")), "x"),
        ):
            pytest.fail("the body must not run")
    assert (real / "a.json").read_text() == "read"


def test_what_may_not_be_read_is_one_line(tmp_path: Path, monkeypatch, capsys) -> None:
    def refused(path: Path) -> bool:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "is_file", refused)
    said = one_line(["export", "--mask=/locked/mask.safetensors", f"--output_dir={tmp_path / 'out'}"], capsys)
    assert "/locked/mask.safetensors" in said
    assert "may not be read or written (Permission denied). Name another path." in said

    def other(path: Path) -> bool:
        raise PermissionError("of something else")

    monkeypatch.setattr(Path, "is_file", other)
    with pytest.raises(PermissionError, match="of something else"):
        cli.main(["export", "--mask=/locked/mask.safetensors", f"--output_dir={tmp_path / 'out'}"])


def test_a_revision_of_a_local_model_is_refused(model_folder: Path, text_file: Path, tmp_path: Path, capsys) -> None:
    words = [f"--output_dir={tmp_path / 'out'}", "--method=magnitude", "--revision=v2"]
    said = one_line(["prune", f"--model={model_folder}", *words], capsys)
    assert f"--revision is v2, of a repository of the hub, and {model_folder} is a local path. Leave it out." in said
    said = one_line(fit_flags(model_folder, text_file, tmp_path / "run", "--model.revision=v2"), capsys)
    assert "model.revision is v2, of a repository of the hub" in said
    with pytest.raises(UserError, match=r"data\.tokenizer_revision is v3, of a repository of the hub"):
        TextDataModule(str(model_folder), str(text_file), tokenizer_revision="v3").tokenizer  # noqa: B018


def test_an_input_found_late_ends_the_command_where_it_is_found(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with atomic_folder(out) as made:
        (made / "a").write_text("read")
    with (
        inputs.command_inputs("export"),
        pytest.raises(UserError, match="is inside it"),
        atomic_folder(out, force=True) as made,
    ):
        inputs.note_input(out / "a")
        pytest.fail("it must not go on")
    assert (out / "a").read_text() == "read"


# -- what leap_pl did not write --------------------------------------------------------------------------------


def test_strangers_are_listed_and_left(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with atomic_folder(out) as made:
        (made / "a").write_text("ours")
    (out / "sub").mkdir()
    for name in ("notes.txt", "sub/more.txt", ".hidden"):
        (out / name).write_text("mine")
    (out / "link").symlink_to(tmp_path)
    before = tree(out)
    with pytest.raises(UserError) as caught, atomic_folder(out, force=True):
        pytest.fail("the body must not run")
    assert "did not write: .hidden, link, notes.txt, sub/more.txt." in str(caught.value)
    assert tree(out) == before


def test_a_stranger_that_comes_while_the_command_runs_is_left(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with atomic_folder(out) as made:
        (made / "a").write_text("ours")
    with pytest.raises(UserError, match=r"did not write: notes\.txt"), atomic_folder(out, force=True) as made:
        (made / "a").write_text("new")
        (out / "notes.txt").write_text("mine")
    assert (out / "notes.txt").read_text() == "mine"
    assert (out / "a").read_text() == "ours"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "record",
    [
        *("", "[]", "{", "[" * 100_000, '{"folder": 3}', '{"folder": {"files": ["a"]}}', '{"provenance": 1}'),
        '{"folder": {"format": "x", "files": ["a"]}}',
        '{"folder": {"format": "leap_pl.folder", "files": {"a": 1}}}',
    ],
)
def test_a_record_that_is_none_recognises_nothing(tmp_path: Path, record: str) -> None:
    (tmp_path / "a").write_text("mine")
    (tmp_path / "leap_pl.json").write_text(record)
    assert records.strangers(tmp_path, "export") == ["a", "leap_pl.json"]


def test_folders_of_before_there_were_records(finished: Run, model_folder, tmp_path: Path, capsys) -> None:
    """An export, a pruned model, and what prune writes around it: without the record, as an older version left them."""
    exported, pruned = tmp_path / "exported", tmp_path / "pruned"
    words = {
        exported: ["export", f"--mask={finished.mask}", f"--output_dir={exported}", "--force"],
        pruned: ["prune", f"--model={model_folder}", "--method=magnitude", f"--output_dir={pruned}", "--force"],
    }
    for folder, command in words.items():
        cli.main(command)
        record = folder / "leap_pl.json"
        facts = json.loads(record.read_text())
        assert facts.pop("folder")["verb"] == command[0]
        record.write_text(json.dumps(facts)) if facts else record.unlink()
        (folder / "notes.txt").write_text("mine")
        assert "notes.txt" in one_line(command, capsys)
        (folder / "notes.txt").unlink()
        cli.main(command)
        assert json.loads(record.read_text())["folder"]["files"] == records.files_in(folder)


def test_only_fit_replaces_what_fit_has_learned(finished: Run, tmp_path: Path, capsys) -> None:
    """A slip in --output_dir does not cost a run that is not even read."""
    run = tmp_path / "run"
    shutil.copytree(finished.checkpoint.parent, run, symlinks=True)
    before = tree(run)
    assert records.verb_of(run) == "fit"
    said = one_line(["export", f"--mask={finished.mask}", f"--output_dir={run}", "--force"], capsys)
    assert "contains the output of leap_pl fit: last.ckpt" in said
    assert tree(run) == before


def test_configs_are_read_without_libyaml(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """PyYAML that was built from source may lack its fast loader."""
    monkeypatch.delattr(yaml, "CSafeLoader")
    (tmp_path / "c.yaml").write_text("a: 1\nb: [2, x]\n")
    assert check_configs(["--config", str(tmp_path / "c.yaml")]) == {str(tmp_path / "c.yaml"): {"a": 1, "b": [2, "x"]}}
