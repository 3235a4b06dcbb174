"""The house: rooms in one order, no arrow that runs up, and next to nothing in the root."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "leap_pl"

# From the bottom to the top: a room imports from those before it alone, also within functions and for types.
ROOMS = [
    *("version", "errors", "escape", "inputs", "files", "kernels", "base_model", "distributed", "data", "masks"),
    "sparse",
    *("gates", "losses", "oneshot", "prior", "checkpoints", "training", "callbacks"),
    *("export", "evaluation", "comparison", "cli"),
]
LIGHTNING_FREE = (
    *("oneshot", "masks", "gates", "losses", "kernels", "base_model", "inputs", "data", "evaluation", "comparison"),
)

# Where what other libraries keep to themselves is used, each with what is done without it
# (tests/system/test_private_interfaces.py). Of attributes that are written out, ruff's SLF says the same.
FENCES = {
    "base_model/backbone.py",  # which attention a model was loaded with
    "base_model/config.py",  # which flash attention a model replaces by kernels of the hub
    "callbacks/lightning_internals.py",  # how ModelCheckpoint saves, and when Lightning validates
    "checkpoints/folder.py",  # the unpickler that is written in Python
    "cli/arguments.py",  # argparse's table of options
    "distributed/strategy.py",  # what DDP sends, and what ModelParallelStrategy was made with
    "kernels/backward_pass.py",  # the number of a backward pass
    "kernels/inductor.py",  # the code that torch.compile makes
    "oneshot/walk.py",  # torch.utils._pytree, which half the world imports
    "training/live_settings.py",  # the schedules within a schedule, for the provenance
}


def imported(file: Path) -> Iterator[str]:
    """Every module that ``file`` imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "leap_pl":
            yield from (f"leap_pl.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            yield node.module or ""


def room_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def arrows() -> Iterator[tuple[str, str, Path]]:
    for file in sorted(PACKAGE.rglob("*.py")):
        for module in imported(file):
            if module.startswith("leap_pl."):
                yield room_of(file), module.split(".")[1], file


def test_every_room_is_known() -> None:
    rooms = {room_of(file) for file in PACKAGE.rglob("*.py")} - {"__init__", "__main__"}
    assert rooms == set(ROOMS)


def test_no_arrow_runs_up() -> None:
    places = {room: place for place, room in enumerate(ROOMS)}
    up = [
        f"{file.relative_to(PACKAGE)} imports {to}"
        for room, to, file in arrows()
        if room in places and to != room and places.get(to, -1) > places[room]
    ]
    assert up == []
    assert sum(1 for _ in arrows()) > 200  # the walk sees imports at all


def test_the_root_holds_what_belongs_to_no_room() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 6
    names = [path.stem for path in PACKAGE.rglob("*") if path.suffix == ".py" or path.is_dir()]
    for folder in (path for path in PACKAGE.rglob("*") if path.is_dir() and path.name != "__pycache__"):
        assert not folder.with_suffix(".py").exists(), folder
    assert not {"utils", "helpers", "misc", "common"} & {*names}


@pytest.mark.parametrize("room", LIGHTNING_FREE)
def test_rooms_that_know_nothing_of_lightning(room: str) -> None:
    found = [
        f"{file.name}: {module}"
        for file in (PACKAGE / room).rglob("*.py")
        for module in imported(file)
        if module.split(".")[0] in ("lightning", "pytorch_lightning")
    ]
    assert found == []


def test_experiments_are_not_in_the_package() -> None:
    assert not any(module.startswith("experiments") for file in PACKAGE.rglob("*.py") for module in imported(file))


def private(tree: ast.AST) -> Iterator[str]:
    """What a file imports or asks for by a name with an underscore before it, of other packages."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and "attr" in node.func.id:
            names = [str(word.value) for word in node.args[1:2] if isinstance(word, ast.Constant)]
        for name in names:
            ours = name.startswith(("leap_pl", "__"))
            if not ours and any(part.startswith("_") for part in name.split(".")):
                yield name


def test_private_interfaces_are_used_within_fences() -> None:
    found = {
        str(file.relative_to(PACKAGE)): [*private(ast.parse(file.read_text(encoding="utf-8")))]
        for file in PACKAGE.rglob("*.py")
    }
    assert {file: names for file, names in found.items() if names and file not in FENCES} == {}
    assert sum(map(len, found.values())) > 5  # the walk sees them at all
