"""The notebooks run from top to bottom on a tiny model, and what is committed of them can be read as it is."""

import base64
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import tiny_folder

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A tiny model and a little text, for the notebooks' settings."""
    folder = tmp_path_factory.mktemp("notebooks")
    tiny_folder(folder / "model", max_position_embeddings=512)
    (folder / "text").mkdir()
    draw = random.Random(0)
    for split in ("train", "validation", "test"):
        lines = (
            json.dumps({"text": " ".join(draw.choices(["keep", "drop", "the", "weight"], k=150))}) for _ in range(30)
        )
        (folder / "text" / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {"LEAP_PL_NOTEBOOK_MODEL": str(folder / "model"), "LEAP_PL_NOTEBOOK_TEXT": str(folder / "text")}


# In one process, which imports torch and the rest once; each notebook has a shell of its own, with nothing defined.
RUNNER = """
import os, sys
import matplotlib.pyplot as plt
import nbformat
from IPython.core.interactiveshell import InteractiveShell

def show():
    for number in plt.get_fignums():
        plt.figure(number).canvas.draw()
    plt.close("all")

def fail(*words, **options):  # IPython shows the exception of a %run, and goes on
    raise sys.exc_info()[1]

plt.show = show
InteractiveShell.showtraceback = fail
os.chdir(sys.argv[1])
for run, notebook, most in zip(*[iter(sys.argv[2:])] * 3):
    os.environ["LEAP_PL_NOTEBOOK_RUN"] = run
    InteractiveShell.clear_instance()
    shell = InteractiveShell.instance()
    code = [cell.source for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code"]
    for source in code[: int(most)]:
        shell.run_cell(source).raise_error()
"""
ALL = 1000


def test_notebooks_run(small: dict[str, str], tmp_path: Path) -> None:
    """In turn; and the second alone, whose first cell runs the first."""
    first, second = (path.name for path in NOTEBOOKS)
    turn, alone = tmp_path / "turn", tmp_path / "alone"
    words = [turn, first, ALL, turn, second, ALL, alone, second, 1]
    settings = {"MPLBACKEND": "agg", "LEAP_PL_COMPILE": "0", "HF_HUB_OFFLINE": "1", "IPYTHONDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, str(FOLDER), *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **small, **settings},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for run in (turn, alone):
        assert {path.name for path in run.glob("*.safetensors")} == {"prior.safetensors", "mask.safetensors"}
        assert (run / "model" / "config.json").is_file()
    figures = [json.loads((turn / f"{of}.json").read_text()) for of in ("dense", "prior", "learned")]
    assert [figure["method"] for figure in figures] == ["dense", "wanda", "leap"]
    assert (turn / "comparison" / "index.html").is_file()


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request: pytest.FixtureRequest) -> Any:
    return json.loads(request.param.read_text(encoding="utf-8"))


def test_only_public_names_are_imported(notebook: Any) -> None:
    """Those that the page of the Python API names."""
    page = (FOLDER.parent / "docs" / "python.md").read_text(encoding="utf-8")
    code = "\n".join("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code")
    imported = re.findall(r"^ *(?:from|import) (leap_pl[\w.]*)(?: import (.*))?$", code, re.MULTILINE)
    assert imported
    for module, names in imported:
        shown = " ".join(re.findall(rf"^from {re.escape(module)} import (.*)$", page, re.MULTILINE))
        assert f"`{module}` also has" in page or {*names.split(", ")} <= {*shown.split(", ")}, module


def test_no_warning_of_this_package_is_hidden(notebook: Any) -> None:
    code = "\n".join("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code")
    filters = re.findall(r"(?:filterwarnings|simplefilter)\(.*", code)
    assert filters
    assert all('module="lightning"' in each or "message=" in each for each in filters)


def test_settings_are_those_of_the_quickstart() -> None:
    """As the first notebook says of its schedules, rate and batch."""
    config = yaml.safe_load((FOLDER.parent / "configs" / "quickstart.yaml").read_text(encoding="utf-8"))
    notebook = json.loads(NOTEBOOKS[0].read_text(encoding="utf-8"))
    text = "\n".join("".join(cell["source"]) for cell in notebook["cells"])
    model, data = config["model"], config["data"]
    schedules = (f"{name}=Schedule({each['start']}, {each['end']})" for name, each in model["annealing"].items())
    assert f"Annealing({', '.join(schedules)})" in text
    assert float(re.findall(r"AdamW, lr=([\w.-]+)", text)[0]) == model["optimizer"]["init_args"]["lr"]
    for name in ("seq_length", "batch_size", "validation_sequences"):
        assert f"{name}={data[name]}," in text
    said = f"takes {config['trainer']['max_steps']} steps, and {model['prior']['sequences']} sequences for its prior"
    assert said in " ".join(text.split())


def test_committed_outputs_are_of_one_run_from_top_to_bottom(notebook: Any) -> None:
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    assert len([o for o in outputs if "image/png" in o.get("data", {})]) >= 2


def test_committed_notebooks_hold_nothing_of_the_machine(notebook: Any) -> None:
    for cell in notebook["cells"]:
        assert set(cell["metadata"]) <= {"tags"}  # no times of execution
    pictures = [
        o["data"].pop("image/png")
        for c in notebook["cells"]
        for o in c.get("outputs", ())
        if "data" in o and "image/png" in o["data"]
    ]
    text = json.dumps(notebook)
    assert not re.search(r"(?<![\w.<])/(?:root|home|work|tmp|usr|Users)\b", text)
    assert len(text) < 100_000
    for picture in pictures:
        assert len(base64.b64decode(picture)) < 200_000
