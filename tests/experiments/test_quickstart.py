"""``make quickstart``: its commands in their order, what a second call does again, and the figures that it tells."""

import json
import re
from pathlib import Path

import pytest
from conftest import fit_flags

from experiments import quickstart
from leap_pl import MaskSet, UserError
from leap_pl.cli.main import main

COMMANDS = ["fit", *["evaluate"] * 3, "export", "export", "generate", "generate"]


@pytest.fixture
def said(model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that a quickstart of a tiny model has shown so far."""
    shown: list[list[str]] = []
    flags = fit_flags(model_folder, text_file, tmp_path, "--trainer.max_steps=2", "--force")

    def show(words: list[str]) -> object:
        shown.append(words)
        return main(flags if words == ["fit", "--config", str(tmp_path / "quick.yaml"), "--force"] else words)

    (tmp_path / "quick.yaml").write_text("# settings of a run\n", encoding="utf-8")
    places = {"CONFIG": tmp_path / "quick.yaml", "RUN": tmp_path, "BASE_MODEL": model_folder, "TEXT": text_file}
    for name, value in {**places, "WINDOW": 32, "TOKENS": 128, "NEW_TOKENS": 2, "show": show}.items():
        monkeypatch.setattr(quickstart, name, value)
    return shown


@pytest.mark.usefixtures("eager")
def test_a_tiny_model_from_learning_to_generating(said: list[list[str]], tmp_path: Path) -> None:
    summary = quickstart.run()
    assert [words[0] for words in said] == COMMANDS
    assert json.loads((tmp_path / "summary.json").read_text(encoding="utf-8")) == summary
    checkpoints = tmp_path / "checkpoints"
    digests = {
        name: MaskSet.load(checkpoints / f"{file}.safetensors").digest_of_bits()
        for name, file in (("prior", "prior"), ("learned", "mask"))
    }
    assert len({*digests.values()}) == 2
    values = {}
    for name in ("dense", "prior", "learned"):
        result = json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))
        assert result["model"]["mask_digest"] == digests.get(name)
        (figure,) = result["perplexity"].values()
        values[name] = figure["value"]
        assert summary[f"{name}_perplexity"] == figure["value"]
    assert len({*values.values()}) == 3
    assert MaskSet.load(tmp_path / "model" / "mask.safetensors").digest_of_bits() == digests["learned"]
    assert [words[words.index("--model") + 1] for words in said[-2:]] == [
        str(tmp_path / "model"),
        str(tmp_path / "packed"),
    ]
    assert summary["dense_megabytes"] > summary["packed_megabytes"] > 0  # type: ignore[operator]
    lines = quickstart.report(summary).splitlines()
    for label, name in (("dense model", "dense"), ("Wanda prior", "prior"), ("learned mask", "learned")):
        assert re.search(rf"^  {label} +{values[name]:.2f}$", "\n".join(lines), re.MULTILINE)


@pytest.mark.usefixtures("eager")
def test_what_is_finished_is_not_done_again(said: list[list[str]], tmp_path: Path, text_file: Path) -> None:
    quickstart.run()
    said.clear()
    quickstart.run()
    assert [words[0] for words in said] == ["generate", "generate"]
    said.clear()
    (tmp_path / "quick.yaml").write_text("# other settings\n", encoding="utf-8")
    quickstart.run()
    assert [words[0] for words in said] == COMMANDS
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quickstart, "TEXT", text_file.with_name("gone.jsonl"))
        with pytest.raises(UserError, match="Run `make quickstart` in the project's folder"):
            quickstart.run()
