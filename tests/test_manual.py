"""The manual: its site builds, its Python runs, and the messages that it explains are those of the package."""

import ast
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
from conftest import Run

from leap_pl import LeapModule, MaskSet
from leap_pl.cli.main import main
from leap_pl.losses.objective import Objective
from leap_pl.prior import Prior
from leap_pl.training.schedules import Annealing

ROOT = Path(__file__).parents[1]


def shown(page: str) -> list[str]:
    """The Python of a page that says it is tested here."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return re.findall(r"<!-- tested: tests/test_manual.py -->\n```python\n(.*?)```", text, re.DOTALL)


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    """Every link between documents leads somewhere, every page is in an index, every docstring shown is well formed."""
    words = ["--quiet", "--fail-on-warning", "--conf-dir", "docs", "--doctree-dir", str(tmp_path / "trees"), "."]
    built = subprocess.run(
        [sys.executable, "-m", "sphinx", *words, str(tmp_path / "site")], cwd=ROOT, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    page = (tmp_path / "site" / "docs" / "python.html").read_text(encoding="utf-8")
    for name in ("LeapModule", "TextDataModule", "MaskSet", "UserError"):
        assert f'id="leap_pl.{name}"' in page
    assert (tmp_path / "site" / "index.html").is_file()
    readme = (tmp_path / "site" / "README.html").read_text(encoding="utf-8")
    assert 'href="docs/results.html"' in readme  # a page beside a folder of that name


# -- messages ---------------------------------------------------------------------------------------------


def literals() -> Iterator[str]:
    """The strings of the package; an f-string is one, with … in the place of each value."""
    for file in (ROOT / "leap_pl").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_messages_that_are_explained_are_written() -> None:
    text = (ROOT / "docs" / "troubles.md").read_text(encoding="utf-8").partition("## Messages")[2]
    messages = re.findall(r"^\| `(.*?)` \|", text, re.MULTILINE)
    assert len(messages) > 10
    written = list(literals())
    for message in messages:
        parts = (re.escape(part) for part in message.split("…"))
        assert any(re.search(".*".join(parts), literal) for literal in written), message


# -- Python -----------------------------------------------------------------------------------------------


def test_zeros_are_kept_while_fine_tuning(
    finished: Run, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    apply, hooks, check = shown("after_learning.md")
    names: dict[str, Any] = {}
    exec(apply.replace("runs/qwen/checkpoints/mask.safetensors", str(finished.mask)), names)
    model, masks = names["model"], names["masks"]
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}

    def train() -> None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            tokens = torch.randint(256, (2, 16))
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()

    exec(hooks, names)
    train()
    exec(check, names)
    saved = dict(transformers.AutoModelForCausalLM.from_pretrained("recovered").named_parameters())
    for name, kept in masks.masks.items():
        assert torch.equal(saved[name] != 0, kept & (before[name] != 0))
        assert not torch.equal(saved[name], before[name])

    fresh = masks.apply_(transformers.AutoModelForCausalLM.from_pretrained(model_folder))
    names["model"] = model = fresh  # without the hooks the check of the page fails
    train()
    with pytest.raises(AssertionError):
        exec(check, names)


def test_a_mask_is_read_without_leap_pl(finished: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished.mask.parent)
    (read,) = shown("file_formats.md")
    names: dict[str, Any] = {}
    exec(read, names)
    masks = MaskSet.load(finished.mask).masks
    assert names["masks"].keys() == masks.keys()
    assert all(np.array_equal(names["masks"][name], mask.numpy()) for name, mask in masks.items())


def small(example: str, model: Path, text: Path) -> str:
    """An example on a tiny model, and with fewer and shorter steps."""
    smaller = {"max_steps=1000": "max_steps=2", "2048": "32", "batches=4": "batches=1"}
    smaller |= {"max_steps=244": "max_steps=2", "seq_length=512": "seq_length=32", "batch_size=4": "batch_size=1"}
    for large, little in {**smaller, "Qwen/Qwen2.5-0.5B": str(model), "text.jsonl": str(text)}.items():
        example = example.replace(large, little)
    return example


def test_a_run_from_python(
    model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, eager: None
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))  # the cache of priors
    (example,) = shown("python.md")
    names: dict[str, Any] = {}
    exec(small(example, model_folder, text_file), names)
    mask = MaskSet.load("mask.safetensors")
    assert mask.kept == mask.total // 2
    assert_is_recipe("short", example, names["module"])


def assert_is_recipe(name: str, example: str, module: LeapModule) -> None:
    """What the page says of its example."""
    recipe = yaml.safe_load((ROOT / "leap_pl" / "recipes" / f"{name}.yaml").read_text(encoding="utf-8"))
    model, data = recipe["model"], recipe["data"]
    gate = [f"{key}={value}" for key, value in model["gate"]["init_args"].items()]
    assert f"partial({model['gate']['class_path']}, {', '.join(gate)})" in example
    assert module.sparsity == model["sparsity"]
    assert module.objective == Objective(**model["objective"])
    assert module.annealing == Annealing.of(model["annealing"])
    assert module.hparams["prior"] == asdict(Prior(**model["prior"]))
    for key, value in data.items():
        assert f"{key}={json.dumps(value)}" in example
    assert f"max_steps={recipe['trainer']['max_steps']}" in example


@pytest.mark.usefixtures("eager")
def test_the_commands_of_the_readme_run(
    model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the recipe that it advises, from a text of one's own to a folder of transformers."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))  # the cache of priors
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = (each for each in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) if "leap_pl fit" in each)
    fit, export = re.findall(r"^leap_pl (.*)$", block.replace("\\\n", " "), re.MULTILINE)
    small = {"Qwen/Qwen2.5-0.5B": str(model_folder), "text.jsonl": str(text_file), "2M": "256"}
    words = [small.get(word, word) for word in shlex.split(fit)]
    assert words[1:3] == ["--config", "short"]
    sizes = [
        "--data.seq_length=32",
        "--data.batch_size=2",
        "--model.prior.sequences=4",
        "--data.validation_sequences=2",
    ]
    main([*words, *sizes, "--model.dtype=float32", "--trainer.accelerator=cpu"])
    main(shlex.split(export))
    mask = MaskSet.load("qwen-sparse/mask.safetensors")
    assert mask.kept == mask.total // 2
    assert mask.provenance.config["steps"] == 256 // 64
