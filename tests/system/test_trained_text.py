"""Text that a run was trained on is not measured as its held-out text."""

from pathlib import Path

import pytest
from conftest import Run, fit_flags, refused

from leap_pl.cli.main import main
from leap_pl.errors import UserError
from leap_pl.evaluation import texts as room
from leap_pl.evaluation.texts import check_held_out
from leap_pl.masks import MaskSet

pytestmark = pytest.mark.usefixtures("eager")


def learned(model_folder: Path, text_file: Path, folder: Path, *more: str) -> list[str]:
    words = fit_flags(model_folder, text_file, folder, "--trainer.max_steps=2", *more)
    main(words)
    return words


def test_a_run_that_held_out_nothing(model_folder: Path, text_file: Path, tmp_path: Path, capsys) -> None:
    words = learned(model_folder, text_file, tmp_path / "run", "--data.validation_sequences=0")
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    again = ["validate", *words[1:-1], f"--ckpt_path={last}", "--data.validation_sequences=4"]
    line = refused([word for word in again if "validation_sequences=0" not in word], capsys)
    assert "the run held out no part of data.text" in line
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


def test_a_mask_has_no_folders_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever made it wrote the pattern, which may be of all disks."""
    file, real = tmp_path / "one.jsonl", room.glob.glob
    file.write_text('{"text": "a"}\n')
    monkeypatch.setattr(
        room.glob, "glob", lambda name, **more: pytest.fail(name) if "**" in name else real(name, **more)
    )
    for pattern in ("/**", "/**/*.jsonl", "/*/one.jsonl/../**"):
        with pytest.raises(UserError, match=r"which of its files one\.jsonl was is not known"):
            check_held_out(str(file), {"data": {"text": f"{pattern}/*.jsonl"}})
    check_held_out(str(file), {"data": {"text": "/**/*.parquet"}})


def test_what_a_mask_tells_of_its_text(tmp_path: Path) -> None:
    """Of the run under it too, of files that were moved, and of their number in a list, by which text is held out."""
    one, two, lines = tmp_path / "one.jsonl", tmp_path / "two.jsonl", tmp_path / "lines.txt"
    for file in (one, two, lines):
        file.write_text('{"text": "a"}\n')
    whole = {"data": {"text": str(one), "held_out": False}}
    for config in (whole, {"data": {"text": str(two)}, "mask": {"config": whole}}):
        with pytest.raises(UserError, match=r"held out no part of one\.jsonl"):
            check_held_out(str(one), config)
        check_held_out(str(two), config)
    moved = {"data": {"text": [str(two), "/elsewhere/one.jsonl"], "held_out": False}}
    with pytest.raises(UserError, match=r"held out no part of one\.jsonl"):
        check_held_out(str(one), moved)
    for texts in ([str(two), str(one)], [str(two), "/elsewhere/one.jsonl"], [str(tmp_path / "t*.jsonl"), str(one)]):
        with pytest.raises(UserError, match=r"one\.jsonl was file 2 of 2 of the text of the run"):
            check_held_out(str(one), {"data": {"text": texts}})
        one_shot = {"pattern": "unstructured", "text": texts, "split": "train"}
        of_weights = {**one_shot, "text": str(one), "weight_update": one_shot}
        for config in (one_shot, of_weights, {"data": {"text": str(two)}, "mask": {"config": one_shot}}):
            with pytest.raises(UserError, match=r"one\.jsonl was file 2 of 2 of the text of the run"):
                check_held_out(str(one), config)
    for config in (
        {"data": {"text": [str(one), str(two)]}},
        {"data": {"text": "/elsewhere/t*.jsonl"}},  # which is another text
        {"data": {"text": "/elsewhere/*.jsonl", "files": ["one.jsonl", "two.jsonl"]}},
        {"data": {"text": str(tmp_path / "*.jsonl"), "files": ["one.jsonl", "two.jsonl"]}},
        {"data": {"text": "some/dataset"}},
        {"text": "some/dataset", "weight_update": {"text": [str(one), str(two)]}},
        {},
    ):
        check_held_out(str(one), config)
    check_held_out(str(lines), {"data": {"text": [str(two), str(lines)]}})  # its last part, whatever its number
    check_held_out(str(lines), {"data": {"text": "/elsewhere/*.txt"}})
    # A pattern was any number of files, of which nobody knows which this is; with their names it is known.
    for texts in ("/elsewhere/*.jsonl", ["/elsewhere/t*.jsonl", str(one)], "/a*/one.jsonl"):
        with pytest.raises(UserError, match=r"this mask read /.*, and which of its files one\.jsonl was is not kno"):
            check_held_out(str(one), {"data": {"text": texts}})
    earlier = {"data": {"text": str(tmp_path / "*.jsonl"), "files": ["a.jsonl", "one.jsonl"]}}
    with pytest.raises(UserError, match=r"one\.jsonl was file 2 of 2 of the text of the run"):
        check_held_out(str(one), earlier)
    with pytest.raises(UserError, match=r"one\.jsonl was file 2 of 2"):  # which of two, nobody knows
        check_held_out(str(one), {"data": {"text": "/elsewhere/*/one.jsonl", "files": ["one.jsonl"] * 2}})


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
