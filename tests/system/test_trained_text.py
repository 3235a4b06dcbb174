"""Text that a run was trained on is not measured as its held-out text."""

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
from conftest import Run, fit_flags, refused

from leap_pl import TextDataModule, UserError
from leap_pl.cli.main import main
from leap_pl.evaluation.texts import check_trained
from leap_pl.masks import MaskSet
from leap_pl.masks import trained_text as room
from leap_pl.masks.trained_text import why_not_held_out
from leap_pl.training.data_state import check_not_trained

pytestmark = pytest.mark.usefixtures("eager")


def learned(model_folder: Path, text_file: Path, folder: Path, *more: str) -> list[str]:
    words = fit_flags(model_folder, text_file, folder, "--trainer.max_steps=2", *more)
    main(words)
    return words


def test_a_run_that_held_out_nothing(
    model_folder: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = learned(model_folder, text_file, tmp_path / "run", "--data.validation_sequences=0")
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    again = ["validate", *words[1:-1], f"--ckpt_path={last}", "--data.validation_sequences=4"]
    line = refused([word for word in again if "validation_sequences=0" not in word], capsys)
    assert f"data.text: the run that made this mask held out no part of {text_file.name}" in line
    main([*(word for word in again if "validation_sequences=0" not in word), f"--data.validation_text={text_file}"])
    mask = tmp_path / "run" / "checkpoints" / "mask.safetensors"
    measured = ["evaluate", f"--mask={mask}", f"--perplexity={text_file}", "--seq_length=16", "--share=held_out"]
    assert f"held out no part of {text_file.name}" in refused(measured, capsys)
    main(measured[:-1])


def test_a_run_with_a_validation_text_was_trained_on_all_of_the_other(
    model_folder: Path, text_file: Path, tmp_path: Path, capsys
) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text(text_file.read_text())
    learned(model_folder, text_file, tmp_path / "run", f"--data.validation_text={other}")
    mask = tmp_path / "run" / "checkpoints" / "mask.safetensors"
    measured = ["evaluate", f"--mask={mask}", "--seq_length=16", "--share=held_out"]
    assert f"held out no part of {text_file.name}" in refused([*measured, f"--perplexity={text_file}"], capsys)
    main([*measured, f"--perplexity={other}"])


def reason(file: Path, config: dict[str, Any]) -> str:
    return str(why_not_held_out([str(file)], config))


def test_a_mask_has_no_folders_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever made it wrote the pattern, which may be of all disks."""
    file, real = tmp_path / "one.jsonl", room.glob.glob
    file.write_text('{"text": "a"}\n')
    monkeypatch.setattr(
        room.glob, "glob", lambda name, **more: pytest.fail(name) if "**" in name else real(name, **more)
    )
    for pattern in ("/**", "/**/*.jsonl", "/*/one.jsonl/../**"):
        assert re.search(
            r"which of its files one\.jsonl was is not known", reason(file, {"data": {"text": f"{pattern}/*.jsonl"}})
        )
    assert reason(file, {"data": {"text": "/**/*.parquet"}}) == "None"


def test_what_a_mask_tells_of_its_text(tmp_path: Path) -> None:
    """Of the run under it too, of files that were moved, and of their number in a list, by which text is held out."""
    one, two, lines = tmp_path / "one.jsonl", tmp_path / "two.jsonl", tmp_path / "lines.txt"
    for file in (one, two, lines):
        file.write_text('{"text": "a"}\n')
    whole = {"data": {"text": str(one), "held_out": False}}
    for config in (whole, {"data": {"text": str(two)}, "mask": {"config": whole}}):
        assert re.search(r"held out no part of one\.jsonl", reason(one, config))
        assert reason(two, config) == "None"
    moved = {"data": {"text": [str(two), "/elsewhere/one.jsonl"], "held_out": False}}
    assert re.search(r"held out no part of one\.jsonl", reason(one, moved))
    for texts in ([str(two), str(one)], [str(two), "/elsewhere/one.jsonl"], [str(tmp_path / "t*.jsonl"), str(one)]):
        assert re.search(r"one\.jsonl was file 2 of 2 of the text of the run", reason(one, {"data": {"text": texts}}))
        one_shot = {"pattern": "unstructured", "text": texts, "split": "train"}
        of_weights = {**one_shot, "text": str(one), "weight_update": one_shot}
        for config in (one_shot, of_weights, {"data": {"text": str(two)}, "mask": {"config": one_shot}}):
            assert re.search(r"one\.jsonl was file 2 of 2 of the text of the run", reason(one, config))
    for config in (
        {"data": {"text": [str(one), str(two)]}},
        {"data": {"text": "/elsewhere/t*.jsonl"}},  # which is another text
        {"data": {"text": "/elsewhere/*.jsonl", "files": ["one.jsonl", "two.jsonl"]}},
        {"data": {"text": str(tmp_path / "*.jsonl"), "files": ["one.jsonl", "two.jsonl"]}},
        {"data": {"text": "some/dataset"}},
        {"text": "some/dataset", "weight_update": {"text": [str(one), str(two)]}},
        {},
    ):
        assert reason(one, config) == "None"
    for texts in ([str(two), str(lines)], "/elsewhere/*.txt"):  # its last part, whatever its number
        assert reason(lines, {"data": {"text": texts}}) == "None"
    # A pattern was any number of files, of which nobody knows which this is; with their names it is known.
    for texts in ("/elsewhere/*.jsonl", ["/elsewhere/t*.jsonl", str(one)], "/a*/one.jsonl"):
        assert re.search(
            r"this mask read /.*, and which of its files one\.jsonl was is not kno",
            reason(one, {"data": {"text": texts}}),
        )
    earlier = {"data": {"text": str(tmp_path / "*.jsonl"), "files": ["a.jsonl", "one.jsonl"]}}
    assert re.search(r"one\.jsonl was file 2 of 2 of the text of the run", reason(one, earlier))
    twice = {"data": {"text": "/elsewhere/*/one.jsonl", "files": ["one.jsonl"] * 2}}  # which of two, nobody knows
    assert re.search(r"one\.jsonl was file 2 of 2", reason(one, twice))


def test_a_run_records_which_files_its_patterns_matched(
    model_folder: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """So that a mask whose text is not where it was is measured on what its run held out, or not at all."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for name in ("a", "b"):
        (texts / f"{name}.jsonl").write_text(text_file.read_text())
    main(fit_flags(model_folder, texts / "*.jsonl", tmp_path / "run", "--trainer.max_steps=1"))
    mask = tmp_path / "run" / "checkpoints" / "mask.safetensors"
    words = [f"--text={texts / '*.jsonl'}", "--seq_length=32", "--sequences=2", f"--output_dir={tmp_path / 'out'}"]
    main(["prune", f"--model={model_folder}", *words])
    of_run = MaskSet.load(mask).provenance.config["data"]
    of_prune = MaskSet.load(tmp_path / "out" / "mask.safetensors").provenance.config
    assert of_run["files"] == of_prune["files"] == ["a.jsonl", "b.jsonl"]
    (texts / "b.jsonl").rename(tmp_path / "b.jsonl")
    (texts / "a.jsonl").unlink()
    for made in (mask, tmp_path / "out"):
        measured = ["evaluate", f"--mask={made}", "--seq_length=16", "--max_tokens=64", "--share=held_out"]
        assert "b.jsonl was file 2 of 2" in refused([*measured, f"--perplexity={tmp_path / 'b.jsonl'}"], capsys)


def test_the_calibration_text_of_a_mask_of_prune(
    model_folder: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text(text_file.read_text())
    words = ["prune", f"--model={model_folder}", f"--text=[{other},{text_file}]", "--seq_length=32", "--sequences=2"]
    main([*words, f"--output_dir={tmp_path / 'out'}"])
    measured = ["evaluate", f"--mask={tmp_path / 'out'}", "--seq_length=16", "--max_tokens=64", "--share=held_out"]
    assert f"{text_file.name} was file 2 of 2" in refused([*measured, f"--perplexity={text_file}"], capsys)
    main([*measured, f"--perplexity={other}"])


def test_a_run_that_held_some_out_is_measured_on_it(finished: Run, text_file: Path) -> None:
    main(["evaluate", f"--mask={finished.mask}", f"--perplexity={text_file}", "--seq_length=16", "--share=held_out"])


def test_validation_of_other_settings_reads_no_text_that_was_trained_on(
    model_folder: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """File by file: which documents of one are held out depends on its number in the list."""
    other, third = tmp_path / "other.jsonl", tmp_path / "third.jsonl"
    for file in (other, third):
        file.write_text(text_file.read_text())
    words = fit_flags(model_folder, text_file, tmp_path / "run", "--trainer.max_steps=1")
    main([f"--data.text=[{text_file},{other}]" if word.startswith("--data.text=") else word for word in words])
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    words = ["validate", f"--ckpt_path={last}", "--trainer.logger=false", "--trainer.accelerator=cpu"]
    for texts in (f"{other}", f"[{other},{text_file}]", f"[{third},{text_file}]"):
        line = refused([*words, f"--data.text={texts}"], capsys)
        assert re.search(r"data\.text: .* was file \d of 2 of the text of the run that made this mask, and is", line)
        assert "Name another text with --data.validation_text." in line
    said = "data.validation_text: the run has read other.jsonl, so that validation does not show"
    for option, texts, warns in (
        ("text", f"{text_file}", False),
        ("text", f"[{text_file},{other},{third}]", False),
        ("text", f"{third}", False),
        ("validation_text", f"{third}", False),
        ("validation_text", f"[{third},{other}]", True),
    ):
        with warnings.catch_warnings(record=True) as caught:
            main([*words, f"--data.{option}={texts}"])
        assert any(said in str(one.message) for one in caught) == warns
        assert warns or not any(str(one.message).startswith("data.") for one in caught)


def test_a_text_that_was_trained_on_is_measured_whole_with_a_warning(
    finished: Run, text_file: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text(text_file.read_text())
    said = f"{text_file.name} was read to make the mask, so that .* or add --share held_out for the part"
    for file, more, warns in ((text_file, [], True), (text_file, ["--share=held_out"], False), (other, [], False)):
        words = ["evaluate", f"--mask={finished.mask}", f"--perplexity={file}", "--seq_length=16", "--max_tokens=64"]
        with warnings.catch_warnings(record=True) as caught:
            main([*words, *more])
        assert [bool(re.search(said, str(one.message))) for one in caught if "to make" in str(one.message)] == [
            True
        ] * warns


@pytest.mark.parametrize(
    ("record", "config_name", "split", "is_read"),
    [
        ({"text": "some/text"}, "", "train", True),
        ({"text": ["some/text"], "split": "train+validation"}, "", "validation", True),
        ({"text": "some/text", "config_name": "en"}, "de", "train", False),
        ({"text": "some/text", "config_name": "en"}, "", "train+test", True),
        ({"text": "some/text"}, "", "test", False),
        ({"text": "another/text"}, "", "train", False),
    ],
)
def test_splits_of_a_hub_dataset(record: dict[str, Any], config_name: str, split: str, is_read: bool) -> None:
    for config in ({"data": record}, record, {"data": {"text": "x"}, "mask": {"config": {"data": record}}}):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            check_trained("some/text", config, share="all", config_name=config_name or None, split=split)
        assert ["this split was read to make the mask" in str(one.message) for one in caught] == [True] * is_read


def test_a_named_text_of_the_hub_that_a_mask_was_calibrated_on() -> None:
    calibrated = {"text": "allenai/c4", "split": "validation"}
    with pytest.warns(UserWarning, match="--perplexity c4: this split was read to make the mask"):
        check_trained("c4", calibrated, share="all", config_name=None, split="test")


def test_validation_on_a_split_that_was_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is fetched; what a run held out of a split stays held out of it."""
    run = {"data": {"text": "some/text"}}
    for split, divided, ok in (
        ("validation", False, True),
        ("train", False, False),
        ("train", True, True),
        ("train+test", True, False),
    ):
        data = TextDataModule(text="some/text", split=split if divided else "train", validation_split=split)
        if ok:
            check_not_trained(data, run, divided=divided)
            continue
        with pytest.raises(UserError, match=r"the run was trained on the split train of some/text\. Name another"):
            check_not_trained(data, run, divided=divided)
    data = TextDataModule(text="some/text", validation_text="some/text", validation_split="train")
    with pytest.warns(UserWarning, match=r"data\.validation_text: the run was trained on the split train of some/"):
        check_not_trained(data, run, divided=False)
    check_not_trained(
        TextDataModule(text="some/text", validation_split="train", validation_sequences=0), run, divided=False
    )
