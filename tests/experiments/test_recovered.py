"""``make recovered``: its words are those of recover, and a second call does nothing again."""

from pathlib import Path

import pytest
import yaml
from conftest import Run, fit_flags

from experiments import quickstart, recovered
from leap_pl import UserError
from leap_pl.cli.main import main


def test_the_words_are_those_of_recover(capsys) -> None:
    with pytest.raises(SystemExit):
        main([*recovered.WORDS, "--print_config"])
    config = capsys.readouterr().out
    assert "train_weights: kept" in config
    assert f"mask: {recovered.MASK}" in config


@pytest.mark.usefixtures("eager")
def test_a_tiny_model_is_recovered_once(
    finished_run: Run, model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    said: list[list[str]] = []

    def show(words: list[str]) -> object:
        said.append(words)
        return main(words)

    words = fit_flags(
        model_folder,
        text_file,
        tmp_path,
        "--trainer.max_steps=2",
        f"--model.mask={finished_run.mask.with_name('prior.safetensors')}",
    )
    words = ["recover", *(word for word in words[1:] if not word.startswith("--model.prior.method"))]
    stamp = tmp_path / "config.yaml"
    stamp.write_bytes(recovered.CONFIG.read_bytes())
    for module in (quickstart, recovered):
        monkeypatch.setattr(module, "show", show)
    monkeypatch.setattr(quickstart, "TEXT", text_file)
    monkeypatch.setattr(quickstart, "WINDOW", 32)
    monkeypatch.setattr(quickstart, "TOKENS", 128)
    prior = finished_run.mask.with_name("prior.safetensors")
    places = {"BASE_MODEL": model_folder, "MASK": prior, "RUN": tmp_path, "FOLDER": tmp_path}
    places["LEARNED"] = finished_run.mask
    for name, place in (places | {"WORDS": words}).items():
        monkeypatch.setattr(recovered, name, place)
    closing = recovered.run()
    assert "zeros            0.500000 of the gated weights, exactly those of the mask, read back" in closing
    (line,) = (line for line in closing.splitlines() if line.startswith("fine-tune it"))
    _, command = line.split("leap_pl ")
    capsys.readouterr()
    with pytest.raises(SystemExit):  # the command that is shown is one of some minutes, in a folder to resume from
        main([*command.replace(" TEXT", f" {text_file}").split(), "--print_config"])
    shown = yaml.safe_load(capsys.readouterr().out)
    assert command.endswith(" --tokens 50K --checkpoint.dirpath runs/mine")
    assert (shown["tokens"], shown["checkpoint"]["dirpath"]) == ("50K", "runs/mine")
    assert [words[0] for words in said] == ["recover", *["evaluate"] * 4, "export", "export"]
    assert (tmp_path / "model" / "mask.safetensors").is_file()
    assert recovered.run() == closing
    assert len(said) == 7
    for name in ("MASK", "LEARNED"):
        with monkeypatch.context() as patch:
            patch.setattr(recovered, name, tmp_path / "no.safetensors")
            with pytest.raises(UserError, match="Run `make quickstart` first"):
                recovered.run()
    stamp.write_text("of other settings")
    with pytest.raises(UserError, match=r"has no finished run of .*Run `make quickstart` first"):
        recovered.run()
    assert len(said) == 7
