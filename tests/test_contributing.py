"""The examples of docs/extend.md that no room's tests run: a verb, an export format, and masks of other programs."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Run

from leap_pl.base_model.loading import load_model
from leap_pl.base_model.weights import find_weights
from leap_pl.cli import main as command_line
from leap_pl.errors import UserError
from leap_pl.masks import MaskSet

HANDBOOK = Path(__file__).parents[1] / "docs" / "extend.md"


def examples(title: str) -> list[str]:
    section = HANDBOOK.read_text(encoding="utf-8").partition(f"## {title}\n")[2].partition("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


def test_the_example_of_a_verb(finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    file, row = examples("Add a verb")
    (tmp_path / "verb_of_contributing.py").write_text(file, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    name, verb = next(iter(eval(f"{{{row}}}", {"Verb": command_line.Verb}).items()))
    function = verb.function.replace("leap_pl.cli.density", "verb_of_contributing")
    monkeypatch.setitem(command_line.VERBS, name, verb._replace(function=function))
    command_line.main(["density", f"--mask={finished.mask}"])
    assert capsys.readouterr().out.strip() == "0.500000"
    with pytest.raises(SystemExit):
        command_line.main(["density", "--help"])
    said = capsys.readouterr().out
    assert "Print the density of a mask." in said
    assert "MaskSet file." in said


def test_the_example_of_an_export_format(
    finished: Run, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (file,) = examples("Add an export format")
    (tmp_path / "format_of_contributing.py").write_text(file, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    from format_of_contributing import export_numpy  # type: ignore[import-not-found]

    masks = MaskSet.load(finished.mask)
    export_numpy(masks, tmp_path / "numpy", str(model_folder))
    base = dict(load_model(str(model_folder)).named_parameters())
    for weight, mask in masks.masks.items():
        read = torch.from_numpy(np.load(tmp_path / "numpy" / f"{weight}.npy"))
        assert torch.equal(read, (base[weight] * mask).float())
    assert MaskSet.load(tmp_path / "numpy" / "mask.safetensors").digest_of_bits() == masks.digest_of_bits()
    with pytest.raises(UserError, match="force"):
        export_numpy(masks, tmp_path / "numpy", str(model_folder))


def test_the_example_of_a_mask_of_ones_own(
    finished: Run, model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (example,) = examples("Compare a mask of your own")
    monkeypatch.chdir(tmp_path)
    exec(example.replace("Qwen/Qwen2.5-0.5B", str(model_folder)).replace("> 0.01", "> 0.013"), {})
    mine = MaskSet.load("mine.safetensors")
    assert 0 < mine.sparsity < 1
    for name, weight in find_weights(load_model(str(model_folder))).items():
        assert torch.equal(mine.masks[name], weight.parameter.abs() > 0.013)
    protocol = [f"--perplexity={text_file}", "--seq_length=32", "--max_tokens=128", "--batch_size=2"]
    for name, mask in (("mine", "mine.safetensors"), ("leap", str(finished.mask))):
        command_line.main(["evaluate", f"--mask={mask}", *protocol, f"--output={name}.json"])
    record = json.loads(Path("mine.json").read_text(encoding="utf-8"))
    assert record["method"] == "mine"
    assert record["model"]["fingerprint"] == MaskSet.load(finished.mask).provenance.fingerprint
    found = command_line.main(["compare", "leap.json", "mine.json", "--baselines=mine"])
    assert {row["method"] for row in found["table"]} == {"leap", "mine"}
