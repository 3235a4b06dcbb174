"""Paths as users type them: with commas, as lists, and links where something is written."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Run, refused
from hypothesis import given, settings
from hypothesis import strategies as st

from leap_pl.cli import main as cli
from leap_pl.errors import UserError
from leap_pl.files import atomic_file, atomic_folder
from leap_pl.inputs import register as inputs
from leap_pl.inputs.paths import behind_link
from leap_pl.masks import MaskSet

pytestmark = pytest.mark.usefixtures("eager")

# -- paths with commas -------------------------------------------------------------------------------------------


@given(st.lists(st.text(st.sampled_from("ab, "), max_size=6), min_size=1, max_size=5))
def test_a_list_of_what_is_not_there_is_split_at_every_comma(entries: list[str]) -> None:
    text = ",".join(entries)
    assert inputs.listed(text) == [piece.strip() for piece in text.split(",")]


@given(
    st.lists(st.text(st.sampled_from("ab"), min_size=1, max_size=6), min_size=1, max_size=5), st.sampled_from("'\" ")
)
def test_a_list_in_brackets_is_one(entries: list[str], quote: str) -> None:
    text = ", ".join(f"{quote}{entry}{quote}" for entry in entries)
    assert inputs.listed(f"[{text}]") == entries


def test_many_paths_that_are_no_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than ten, of whose places the name of one begins with that of another."""
    from leap_pl.cli.compare import compare_command

    monkeypatch.chdir(tmp_path)
    names = [f"[{number}]" for number in range(11)]
    for name in names:
        Path(name).write_text("x")
    assert cli.settings_of("compare", compare_command, names)["results"] == names


NAMES = st.text(st.sampled_from("ab,[]*"), min_size=1, max_size=5).map(lambda name: f"{name}.txt")


@settings(max_examples=60, deadline=None)
@given(names=st.lists(NAMES, min_size=1, max_size=4, unique=True))
def test_a_path_that_exists_is_taken_whole(tmp_path_factory: pytest.TempPathFactory, names: list[str]) -> None:
    folder = tmp_path_factory.mktemp("commas")
    paths = [str(folder / name) for name in names]
    for path in paths:
        Path(path).write_text("x")
        assert inputs.listed(path) == [path]
    assert inputs.listed(f"wikitext2,{paths[0]}")[0] == "wikitext2"


def test_a_list_of_texts_with_commas_in_their_names(model_folder, text_file, tmp_path: Path, monkeypatch) -> None:
    from leap_pl.cli.evaluate import evaluate_command

    monkeypatch.chdir(tmp_path)
    for name in ("a,b.jsonl", "c.jsonl"):
        shutil.copy(text_file, name)
    found = evaluate_command(
        model=str(model_folder), perplexity="a,b.jsonl, c.jsonl", seq_length=32, max_tokens=64, batch_size=1
    )
    assert list(found["perplexity"]) == ["a,b.jsonl", "c.jsonl"]


@pytest.mark.parametrize("name", ["a,b", "[a, b]", "[a]", "#1", "null", "{a: b}", "a: b", "&x", "'quoted'", "x #y"])
def test_a_path_is_no_yaml(finished: Run, model_folder, text_file, tmp_path: Path, monkeypatch, name: str) -> None:
    """Of every kind, wherever it is typed: what exists is meant."""
    monkeypatch.chdir(tmp_path)
    from leap_pl.cli.compare import compare_command
    from leap_pl.cli.export import export_command
    from leap_pl.cli.prune import prune_command

    (tmp_path / name).write_text("x")
    (tmp_path / f"{name}.yaml").write_text("seed: 3\n")
    for verb, function, words, key, value in (
        ("export", export_command, ["--mask", name, "--output_dir", "o"], "mask", name),
        ("export", export_command, [f"--model={name}", "--output_dir", "o"], "model", name),
        ("prune", prune_command, ["--model", "m", "--output_dir", "o", "--text", name], "text", name),
        ("prune", prune_command, ["--model", "m", "--output_dir", "o", f"--text={name}"], "text", name),
        ("prune", prune_command, ["--model", name, "--output_dir", "o", f"--config={name}.yaml"], "seed", 3),
        ("prune", prune_command, ["--model=m", "--output_dir=o", "--layer_sparsity", name], "layer_sparsity", name),
        ("compare", compare_command, [name, "other"], "results", [name, "other"]),
        ("compare", compare_command, [f"--results={name}", "other"], "results", [name, "other"]),
    ):
        assert cli.settings_of(verb, function, words)[key] == value, (verb, words)


# -- outputs that are links ----------------------------------------------------------------------------------------


def test_a_linked_file_is_written_where_it_leads(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name in ("there", "not there yet"):
        target, link = tmp_path / "data" / name, tmp_path / f"link to {name}"
        link.symlink_to(target)
        if name == "there":
            target.write_text("old")
        with atomic_file(link) as temporary:
            assert temporary.parent == target.parent  # beside it: on the same disk
            temporary.write_text("new")
        assert link.readlink() == target
        assert target.read_text() == "new"
        assert not target.is_symlink()


def test_a_linked_folder_is_written_where_it_leads(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    target, link = tmp_path / "data" / "out", tmp_path / "out"
    link.symlink_to("data/out")
    for text in ("one", "other"):
        with atomic_folder(link, force=True) as made:
            assert made.parent == target.parent
            (made / "a").write_text(text)
        assert str(link.readlink()) == "data/out"
        assert (target / "a").read_text() == text
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "data", "leap_pl.json", "out", "out"]


@pytest.mark.parametrize("writer", [atomic_file, atomic_folder])
def test_links_to_nowhere(tmp_path: Path, writer: Callable[[Path], object]) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "not mounted" / "out")
    with pytest.raises(UserError, match=r"there is no folder .*not mounted"), writer(tmp_path / "out"):  # type: ignore[attr-defined]
        pytest.fail("the body must not run")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    with pytest.raises(UserError, match="could not be written"), writer(tmp_path / "circle"):  # type: ignore[attr-defined]
        pytest.fail("the body must not run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["circle", "out"]


def test_a_checkpoint_that_links_in_a_circle_is_none(
    text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    circle = tmp_path / "last.ckpt"
    circle.symlink_to(circle)
    for words in (["export", f"--output_dir={tmp_path / 'out'}"], ["evaluate", f"--perplexity={text_file}"]):
        assert "there is no such checkpoint" in refused([*words, f"--ckpt_path={circle}"], capsys)


def test_a_link_is_followed_to_its_end(tmp_path: Path) -> None:
    """Each of the two readers of a checkpoint would otherwise follow the rest of it by itself."""
    step, last, best = (tmp_path / name for name in ("step=2.ckpt", "last.ckpt", "best.ckpt"))
    step.touch()
    last.symlink_to(step.name)
    best.symlink_to(last)
    assert behind_link(best) == behind_link(last) == behind_link(step) == str(step)


def test_verbs_follow_links(finished: Run, model_folder, text_file, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for name in ("out", "r.json"):
        (tmp_path / name).symlink_to(data / name)
    for _ in range(2):
        cli.main(["export", f"--mask={finished.mask}", f"--output_dir={tmp_path / 'out'}", "--force"])
    words = ["evaluate", f"--model={model_folder}", f"--perplexity={text_file}", "--seq_length=32", "--max_tokens=64"]
    cli.main([*words, f"--output={tmp_path / 'r.json'}"])
    for name in ("out", "r.json"):
        assert (tmp_path / name).is_symlink()
        assert not (data / name).is_symlink()
    assert (data / "out" / "config.json").is_file()
    assert torch.is_tensor(MaskSet.load(data / "out" / "mask.safetensors").masks["model.layers.0.mlp.up_proj.weight"])
