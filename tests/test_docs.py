"""What the documents say exists: every test that they name, and every command that they show."""

import ast
import re
import shlex
from functools import cache
from pathlib import Path

import pytest

from leap_pl.cli.fit import LeapCLI, make_cli
from leap_pl.cli.main import VERBS, _find, settings_of
from leap_pl.cli.recover import RecoverCLI
from leap_pl.cli.token_budget import number_of

ROOT = Path(__file__).parents[1]
PLACES = ("*.md", "docs/*.md", "docs/results/*.md", "docs/tasks_in_full/*.md", "dev/*.md", "configs/*.md")
DOCUMENTS = sorted(path for place in PLACES for path in ROOT.glob(place))
REFERENCE = re.compile(r"`(?:tests/(?:\w+/)?)?(test_\w+\.py|killing\.py)?(?:::)?(test_\w+)?(\[[\w.-]+\])?`")


@cache
def place_of(file: str) -> Path:
    """Where the file of tests of this name is: in one room."""
    found = sorted((ROOT / "tests").rglob(file))
    assert len(found) == 1, f"{file}: {found}"
    return found[0]


@cache
def functions(file: str) -> set[str]:
    """The tests of a file of tests."""
    tree = ast.parse(place_of(file).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def references(text: str) -> list[tuple[str, str, str]]:
    """(file, test, parameter) of every test that is named; a test without a file is of the last one in its line."""
    found = []
    for line in text.splitlines():
        file = ""
        for named, test, parameter in REFERENCE.findall(line):
            file = named or file
            if named or test or parameter:
                found.append((file, test, parameter.strip("[]")))
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_test_that_is_named_exists(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for path in re.findall(r"\btests/[a-z0-9_/]+\.py", text):
        assert (ROOT / path).is_file(), path
    for file, test, parameter in references(text):
        assert file, f"{test} stands in a line that names no file"
        assert not test or test in functions(file), f"{file}::{test}"
        assert not parameter or f'"{parameter}"' in place_of(file).read_text(encoding="utf-8"), parameter


def test_every_promise_names_its_test() -> None:
    """And what it asserts: no cell of the tables of docs/reliability.md is empty."""
    rows = 0
    for line in (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|") or len(cells) != 3 or cells[0] == "promise" or set(line) <= set("|-"):
            continue
        rows += 1
        assert all(cells), line
        assert any(test for _, test, _ in references(cells[1])), line
    assert rows > 40


def test_a_reference_that_is_wrong_is_found() -> None:
    """The parser itself: what it reads, and that it would not read past a mistake."""
    line = "| a | `test_docs.py::test_x[ddp]`, `test_y`; in full `python tests/killing.py` | `[b]` |"
    assert references(line) == [
        ("test_docs.py", "test_x", "ddp"),
        ("test_docs.py", "test_y", ""),
        ("test_docs.py", "", "b"),
    ]
    assert "test_x" not in functions("test_docs.py")


# -- commands ---------------------------------------------------------------------------------------------


def commands(text: str) -> list[str]:
    """The lines of the bash blocks, continued ones joined, without comments and variables set in front."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = re.sub(r"\s+#.*$", "", line).strip()
            if words and not words.startswith("#"):
                found.append(words)
    return found


USED = {"short", "paper", "2of4", "low_memory"}  # recipes that need no second device

SHOWN = [(path.name, line) for path in DOCUMENTS for line in commands(path.read_text(encoding="utf-8"))]
SHOWN_VERBS = [(name, line) for name, line in SHOWN if re.match(r"(python -m )?leap_pl ", line)]


def test_commands_are_found() -> None:
    assert len(SHOWN_VERBS) > 15
    assert {name for name, _ in SHOWN_VERBS} >= {
        "README.md",
        "learn.md",
        "recipes.md",
        "scaling.md",
        "gates.md",
        "tuning.md",
    }


@pytest.mark.parametrize(
    ("document", "line"), SHOWN_VERBS, ids=[f"{name}-{at}" for at, (name, _) in enumerate(SHOWN_VERBS)]
)
def test_a_command_that_is_shown_parses(
    document: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every option of it exists and takes its value; nothing is run."""
    monkeypatch.chdir(ROOT)
    _, verb, *words = [word for word in shlex.split(line.removeprefix("python -m ")) if word != "..."]
    if not VERBS[verb].run:
        assert settings_of(verb, _find(VERBS[verb].function), words)
        return
    for option in {"--ckpt_path", "--model.mask"} & {*words}:  # of a run, which is not made here
        del words[(place := words.index(option)) : place + 2]
    if "--tokens" in words:  # an option of the verb, which the parser without one does not have
        place = words.index("--tokens")
        words[place : place + 2] = [f"--trainer.max_steps={round(number_of(words[place + 1]) / 4096)}"]
    for place, word in enumerate(words):
        if word == "--config" and words[place + 1] not in USED and not Path(words[place + 1]).exists():
            words[place + 1] = "configs/debug.yaml"  # a config of the reader's own
    if not {"--config", "--model.base_model"} & set(words):
        words = ["--config", "configs/debug.yaml", *words]
    more = ["--trainer.accelerator=cpu", "--trainer.logger=false", f"--trainer.default_root_dir={tmp_path}"]
    kind = RecoverCLI if verb == "recover" else LeapCLI
    assert make_cli([*words, *more], run=False, kind=kind).model.base_model


def clashes(text: str) -> list[str]:
    """The commands that would be refused: what they write is a folder that another one, shown before, has written.

    A name in capitals is the reader's own. --force replaces a folder, and --ckpt_path resumes the run in it.
    """
    writers: dict[str, str] = {}
    found = []
    for line in commands(text):
        words = shlex.split(line.replace("=", " "))
        places = [place for place, word in enumerate(words) if word in ("--output_dir", "--checkpoint.dirpath")]
        for folder in (words[place + 1].rstrip("/") for place in places):
            again = writers.setdefault(folder, line) != line and not {"--force", "--ckpt_path"} & {*words}
            found += [line] if again and not folder.isupper() else []
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_of_one_page_write_folders_of_their_own(document: Path) -> None:
    assert not clashes(document.read_text(encoding="utf-8"))


def test_a_folder_that_two_commands_write_is_found() -> None:
    first = "leap_pl compare a.json --output_dir out"
    cases = {
        first: False,
        "leap_pl compare b.json --output_dir=out": True,
        "leap_pl compare b.json --output_dir out/ ": True,
        "leap_pl compare b.json --output_dir out --force": False,
        "leap_pl fit --checkpoint.dirpath out": True,
        "leap_pl fit --checkpoint.dirpath out --ckpt_path last": False,
        "leap_pl compare b.json --output_dir other": False,
    }
    for second, found in cases.items():
        assert clashes(f"```bash\n{first}\n```\nand\n```bash\n{second}\n```") == [second.strip()] * found
    own = "leap_pl prune --output_dir OUT"
    assert not clashes(f"```bash\n{own}\n{own} --method admm\n```")


@pytest.mark.parametrize(
    ("document", "line"), [(name, line) for name, line in SHOWN if line.startswith("make ")], ids=str
)
def test_a_target_that_is_shown_exists(document: str, line: str) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for word in shlex.split(line)[1:]:
        assert "=" in word or word in targets, line


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_modules_and_scripts_that_are_named_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for module in re.findall(r"python -m ((?:benchmarks|experiments|leap_pl)(?:\.\w+)+)", text):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module
    for script in re.findall(r"python (\w+/[\w./]+\.py)", text):
        assert (ROOT / script).is_file(), script
