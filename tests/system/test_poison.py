"""Poisoned input and hostile places: one clear line each, nothing lost, nothing run."""

import errno
import json
import os
import pickle
import resource
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from conftest import fit_flags, refused
from hostile_files import Trap
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import tiny_folder, tiny_model

from leap_pl.checkpoints import folder
from leap_pl.checkpoints.file import WholeCheckpointIO
from leap_pl.cli.consolidate import consolidate_command
from leap_pl.cli.main import main
from leap_pl.data.source import TextSource
from leap_pl.errors import UserError
from leap_pl.masks import MaskSet, Provenance

pytestmark = pytest.mark.usefixtures("eager")

# -- masks --------------------------------------------------------------------------------------------------


def test_names_that_are_paths_go_nowhere(model_folder, tmp_path: Path, capsys) -> None:
    """A name in a file is looked up among the model's weights, and never a place to write to."""
    model = tiny_model()
    from leap_pl.base_model.weights import find_weights, model_fingerprint

    name = next(iter(find_weights(model, None, ())))
    shape = dict(model.named_parameters())[name].shape
    for trick in ("../../escaped", "/tmp/escaped", "a/../../b\0c", "..\\..\\c", name + "/../x", "модель\n"):
        origin = Provenance(str(model_folder), model_fingerprint(model), "wanda", 0.5)
        file = MaskSet({trick: torch.ones(shape, dtype=torch.bool)}, origin).save(tmp_path / "in" / "mask.safetensors")
        (tmp_path / "out").mkdir(exist_ok=True)
        line = refused(["export", f"--mask={file}", f"--output_dir={tmp_path / 'out' / 'sparse'}"], capsys)
        assert "has no weight" in line
        assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == [
            "in",
            "in/mask.safetensors",
            "out",
        ]


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"[" * 1000,
        b'{"a":{"dtype":"U8","shape":[9223372036854775807,9],"data_offsets":[0,8]}}',
        b'{"a":{"dtype":"U8","shape":[8],"data_offsets":[8,0]}}',
        b'{"a":{"dtype":"U8","shape":[8],"data_offsets":[0,99999999999999]}}',
        b'{"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]},"b":{"dtype":"U8","shape":[8],"data_offsets":[0,8]}}',
        b'{"a":{"dtype":"X9","shape":[8],"data_offsets":[0,8]}}',
        b'{"__metadata__":{"format":["leap_pl.MaskSet"]}}',
        b'{"__metadata__":{"format":"leap_pl.MaskSet","format_version":"1","shapes":"[[[","provenance":"{}","digest":""}}',
        '{"é\\ud800":{}}'.encode(),
    ],
)
@pytest.mark.parametrize("length", [None, 0, 1 << 40, (1 << 64) - 1])
def test_hostile_headers_of_a_mask(tmp_path: Path, header: bytes, length: int | None) -> None:
    path = tmp_path / "mask.safetensors"
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + bytes(8))
    with pytest.raises(UserError) as caught:
        MaskSet.load(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


# -- base models --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["cut", "no header", "huge header", "pickle", "torch pickle", "other weights"])
def test_a_base_model_that_is_damaged(text_file, tmp_path: Path, capsys, damage: str) -> None:
    model = tiny_folder(tmp_path / "model")
    file, ran = model / "model.safetensors", tmp_path / "ran"
    whole = file.read_bytes()
    if "pickle" in damage:
        file.unlink()
        file = model / "pytorch_model.bin"
        file.write_bytes(pickle.dumps(Trap(ran)))
        if damage == "torch pickle":
            torch.save({"a": Trap(ran)}, file)
    elif damage == "other weights":
        tensors = load_file(file)
        tensors.pop("model.layers.0.mlp.up_proj.weight")
        save_file(tensors, file, {"format": "pt"})
    else:
        file.write_bytes({"cut": whole[:-9], "no header": b"", "huge header": b"\xff" * 8 + whole[8:]}[damage])
    line = refused(fit_flags(model, text_file, tmp_path / "run"), capsys)
    assert str(model) in line
    assert {"other weights": "model.layers.0.mlp.up_proj.weight", "pickle": "runs no code"}.get(damage, "") in line
    assert "weights_only" not in line
    assert not ran.exists()


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("verb", ["fit", "prune"])
def test_a_base_model_with_a_weight_that_is_no_number(text_file, tmp_path: Path, capsys, value: float, verb: str):
    model = tiny_folder(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][3] = value
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    words = fit_flags(model, text_file, tmp_path / "run")
    if verb == "prune":
        words = ["prune", f"--model={model}", "--method=magnitude", f"--output_dir={tmp_path / 'out'}"]
    line = refused(words, capsys)
    assert "model.norm.weight has 1 values that are infinite or NaN" in line
    assert not (tmp_path / "out").exists()


# -- text ---------------------------------------------------------------------------------------------------


def test_a_line_that_never_ends(tmp_path: Path, monkeypatch) -> None:
    """It is skipped in pieces, counted, and what follows has its place."""
    monkeypatch.setattr("leap_pl.data.local.LONGEST_LINE", 100)
    file = tmp_path / "text.jsonl"
    lines = [{"text": "before"}, {"text": "x" * 1000}, {"text": "y" * 85}, {"text": "after"}, {"text": "z" * 400}]
    file.write_text("\n".join(map(json.dumps, lines)))
    with pytest.warns(UserWarning, match=r"line 2 has more than 100 bytes; it is skipped"):
        documents = [document for _, document in TextSource.open(str(file)).documents(repeat=False)]
    assert [document.text for document in documents] == ["before", "y" * 85, "after"]
    data = file.read_bytes()
    for document in documents:
        assert data[: document.after["byte"]].count(b"\n") == document.after["line"]


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_bytes_in_a_compressed_or_columnar_file(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Texts, or one line that names the file."""
    suffix, whole = data.draw(st.sampled_from(sorted(intact_files(tmp_path_factory.getbasetemp()).items())))
    start, put = data.draw(st.integers(0, len(whole))), data.draw(st.binary(max_size=16))
    gone = data.draw(st.integers(0, 200))
    file = tmp_path_factory.getbasetemp() / f"damaged{suffix}"
    file.write_bytes(whole[:start] + put + whole[start + gone :])
    try:
        for _, document in TextSource.open(str(file)).documents(repeat=False):
            assert isinstance(document.text, str)
    except UserError as error:
        assert "\n" not in str(error)
        assert file.name in str(error)


def intact_files(folder: Path) -> dict[str, bytes]:
    import gzip

    import pyarrow as pa
    import pyarrow.parquet as pq

    file = folder / "intact.parquet"
    if not file.exists():
        pq.write_table(pa.table({"text": [f"document {k} " * 3 for k in range(40)]}), file)
    lines = "\n".join(json.dumps({"text": f"document {k}"}) for k in range(40))
    return {".parquet": file.read_bytes(), ".jsonl.gz": gzip.compress(lines.encode(), mtime=0)}


# -- places that cannot be written --------------------------------------------------------------------------


@pytest.fixture
def in_a_file(tmp_path: Path) -> Path:
    """A folder that cannot be made, by root neither."""
    (tmp_path / "file").write_text("no folder")
    return tmp_path / "file" / "run"


@pytest.mark.parametrize("flag", ["checkpoint.dirpath", "trainer.logger.save_dir"])
def test_a_run_in_a_folder_that_cannot_be_made(
    model_folder, text_file, tmp_path: Path, in_a_file, capsys, flag
) -> None:
    """Said before the model is loaded."""
    words = fit_flags(tmp_path / "model", text_file, tmp_path / "run", f"--{flag}={in_a_file}")
    shutil.copytree(model_folder, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    line = refused(words, capsys)
    assert str(in_a_file) in line
    assert "Not a directory" in line


def test_a_prior_that_cannot_be_kept_is_still_a_prior(
    model_folder, text_file, tmp_path: Path, in_a_file, caplog
) -> None:
    main(fit_flags(model_folder, text_file, tmp_path, f"--model.prior.cache_dir={in_a_file}", "--trainer.max_steps=1"))
    assert "The prior was not cached for the next run" in caplog.text


FULL = "could not be written (File too large). Nothing was left behind; free space or name another path."


@contextmanager
def full_disk() -> Iterator[None]:
    """Let writes beyond a limit fail."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_disk_that_is_full(tmp_path: Path) -> None:
    """Writes beyond a limit fail as on a full disk."""
    origin = Provenance("a", "b", "c")
    writers: dict[str, Callable[[Path], Any]] = {
        "a.ckpt": lambda path: WholeCheckpointIO().save_checkpoint({"a": torch.zeros(300_000)}, path),
        "a.safetensors": MaskSet({"a": torch.ones(9_000_000, dtype=torch.bool)}, origin).save,
    }
    said = {}
    for name in writers:
        (tmp_path / name).write_text("the old one")
    for name, write in writers.items():
        with full_disk(), pytest.raises(UserError) as caught:
            write(tmp_path / name)
        said[name] = str(caught.value)
    assert said == {name: f"{tmp_path / name} {FULL}" for name in writers}
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(writers, "the old one")


def test_a_disk_that_is_full_before_a_folder_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "consolidated", lambda _: {"a": torch.zeros(300_000), "global_step": 2})
    (tmp_path / "step=2.ckpt").mkdir()
    file = tmp_path / "one.ckpt"
    with full_disk(), pytest.raises(UserError) as caught:
        consolidate_command(str(tmp_path / "step=2.ckpt"), str(file))
    assert str(caught.value) == f"{file} {FULL}"
    assert [path.name for path in tmp_path.iterdir()] == ["step=2.ckpt"]


def test_a_disk_that_fills_up_while_learning(model_folder, text_file, tmp_path: Path, capsys, monkeypatch) -> None:
    """The checkpoint before stands, and the run goes on from it when there is room."""

    def full(checkpoint: dict[str, Any], file: Any) -> None:
        if checkpoint["global_step"] == 4:
            try:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            finally:
                raise RuntimeError("unexpected pos 704 vs 598")  # which is all that torch says
        real(checkpoint, file)

    real = torch.save
    words = fit_flags(model_folder, text_file, tmp_path, "--ckpt_path=last")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        line = refused(words, capsys)
    assert "step=4.ckpt could not be written" in line
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["last.ckpt", "leap_pl.json", "prior.safetensors", "step=2.ckpt"]
    main(words)
    assert (tmp_path / "checkpoints" / "mask.safetensors").exists()


def test_checkpoints_with_an_address_are_left_to_lightning(tmp_path: Path) -> None:
    files, address = WholeCheckpointIO(), "memory://leap_pl/a.ckpt"
    files.save_checkpoint({"a": torch.ones(2)}, address)
    assert torch.equal(files.load_checkpoint(address)["a"], torch.ones(2))
    with fsspec.open(address, "wb") as file:
        torch.save({"a": Trap(tmp_path / "ran")}, file)
    for said in (None, False, True):
        with pytest.raises(Exception, match=r"(?i)weights.only"):
            files.load_checkpoint(address, weights_only=said)
    assert not (tmp_path / "ran").exists()
    files.remove_checkpoint(address)
    files.save_checkpoint({"a": torch.ones(3)}, tmp_path / "a.ckpt")
    assert torch.equal(files.load_checkpoint(tmp_path / "a.ckpt")["a"], torch.ones(3))
    files.remove_checkpoint(tmp_path / "a.ckpt")
    assert not list(tmp_path.iterdir())


def test_a_torch_that_fails_for_another_reason_says_so(tmp_path: Path, monkeypatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("cannot be saved")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(RuntimeError, match="cannot be saved"):
        WholeCheckpointIO().save_checkpoint({}, tmp_path / "a.ckpt")
    assert not list(tmp_path.iterdir())
