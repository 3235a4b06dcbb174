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


@pytest.mark.parametrize("notebooks", [NOTEBOOKS, NOTEBOOKS[1:]], ids=["in turn", "the second alone"])
def test_notebooks_run(notebooks: list[Path], small: dict[str, str], tmp_path: Path) -> None:
    settings = {"LEAP_PL_NOTEBOOK_RUN": str(tmp_path / "run"), "LEAP_PL_COMPILE": "0", "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, "-m", "pytest", "--nbmake", "-p", "no:cacheprovider", *map(str, notebooks)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env={**os.environ, **small, **settings})
    assert done.returncode == 0, done.stdout
    assert f"{len(notebooks)} passed" in done.stdout
    assert {path.name for path in (tmp_path / "run").glob("*.safetensors")} == {"prior.safetensors", "mask.safetensors"}


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request: pytest.FixtureRequest) -> Any:
    return json.loads(request.param.read_text(encoding="utf-8"))


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
