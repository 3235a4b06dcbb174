"""Damaged and hostile checkpoints: refused in one line or read as they were saved, and no code in them runs."""

import io
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run, refused
from hostile_files import Trap
from hypothesis import given, settings
from hypothesis import strategies as st

from leap_pl.checkpoints.layout import load_checkpoint
from leap_pl.errors import UserError

pytestmark = pytest.mark.usefixtures("eager")

SMALL = {
    "state_dict": {"logits.a": torch.linspace(-1, 1, 24).view(4, 6), "logits.b": torch.linspace(1, 2, 8).view(2, 4)},
    "global_step": 3,
    "leap_pl": {"sparsity": 0.5, "shapes": {"a": [4, 6], "b": [2, 4]}, "revision": None},
}


def small_file() -> bytes:
    file = io.BytesIO()
    torch.save(SMALL, file)
    return file.getvalue()


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    return bool(one == other)


def loads_right_or_not_at_all(path: Path, data: bytes) -> bool:
    """Whether ``data`` was refused; if not, it is what was saved."""
    path.write_bytes(data)
    try:
        read = load_checkpoint(path, mmap=False)
    except UserError as error:
        assert "\n" not in str(error)
        assert path.name in str(error)
        return True
    assert same(read, SMALL)
    return False


def test_a_bit_flipped_in_every_byte_of_a_checkpoint(tmp_path: Path) -> None:
    """Most are refused; those in paddings and dates, which say nothing, change nothing.

    In the archive's directory, where some bits change how others are read, every bit is tried.
    """
    whole, draw = small_file(), random.Random(0)
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        directory = archive.start_dir
    refusals = tries = 0
    for place in range(len(whole)):
        for bit in range(8) if place >= directory else [draw.randrange(8)]:
            flipped = bytearray(whole)
            flipped[place] ^= 1 << bit
            refusals += loads_right_or_not_at_all(tmp_path / "a.ckpt", bytes(flipped))
            tries += 1
    assert tries > len(whole)
    assert refusals > tries / 2
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        for record in archive.infolist():  # in the content of every part each bit counts
            start = whole.index(archive.read(record), record.header_offset)
            for place in (
                {start, start + record.file_size // 2, start + record.file_size - 1} if record.file_size else ()
            ):
                flipped = bytearray(whole)
                flipped[place] ^= 16
                assert loads_right_or_not_at_all(tmp_path / "a.ckpt", bytes(flipped)), record.filename


def test_a_checkpoint_cut_off_anywhere(tmp_path: Path) -> None:
    whole = small_file()
    for length in {*range(0, len(whole), 37), *range(len(whole) - 40, len(whole))}:
        assert loads_right_or_not_at_all(tmp_path / "a.ckpt", whole[:length])


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_bytes_of_a_checkpoint_replaced_anywhere(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    whole = small_file()
    start = data.draw(st.integers(0, len(whole)))
    gone = data.draw(st.integers(0, 64))
    put = data.draw(st.binary(max_size=64))
    loads_right_or_not_at_all(tmp_path_factory.getbasetemp() / "fuzz.ckpt", whole[:start] + put + whole[start + gone :])


@settings(max_examples=30, deadline=None)
@given(junk=st.binary(max_size=300))
def test_any_bytes_are_no_checkpoint(tmp_path_factory: pytest.TempPathFactory, junk: bytes) -> None:
    assert loads_right_or_not_at_all(tmp_path_factory.getbasetemp() / "junk.ckpt", junk)


def test_a_flipped_logit_of_a_real_checkpoint(finished: Run, tmp_path: Path, capsys) -> None:
    """What torch.load takes for another logit is found by the checksum, by export as by fit."""
    whole = finished.checkpoint.read_bytes()
    logits = torch.load(finished.checkpoint, weights_only=True)["state_dict"].popitem()[1]
    place = whole.index(logits.numpy().tobytes()) + 4 * logits.numel() // 2
    torn = tmp_path / "torn.ckpt"
    torn.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
    torch.load(torn, weights_only=True)
    line = refused(["export", f"--ckpt_path={torn}", f"--output_dir={tmp_path / 'out'}"], capsys)
    assert "does not match its checksum" in line
    assert "does not match" in refused([*finished.flags, f"--ckpt_path={torn}"], capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["pickle", "old torch", "new torch", "packed zip"])
def test_code_in_a_checkpoint_is_not_run(finished: Run, tmp_path: Path, capsys, kind: str) -> None:
    ran, path = tmp_path / "ran", tmp_path / "trap.ckpt"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Trap(ran)))
    elif kind == "packed zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(Trap(ran)))
    else:
        torch.save({"state_dict": Trap(ran)}, path, _use_new_zipfile_serialization=kind == "new torch")
    for words in (["export", "--output_dir", str(tmp_path / "out")], finished.flags):
        assert "trap.ckpt" in refused([*words, f"--ckpt_path={path}"], capsys)
    assert not ran.exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["leap_pl"].pop("shapes"), "leap_pl lacks shapes"),
        (lambda c: c.update(leap_pl=[1]), "not a checkpoint of leap_pl"),
        (lambda c: c.pop("state_dict"), "lacks the logits"),
        (lambda c: c["state_dict"].popitem(), "lacks the logits"),
        (lambda c: c["leap_pl"]["shapes"].update({next(iter(c["leap_pl"]["shapes"])): [1 << 40, 3]}), "expected shape"),
        (lambda c: c["leap_pl"]["gate"].update(class_path="os.system"), "os.system"),
        (lambda c: c["leap_pl"]["gate"].update(init_args={"x": 1}), "do not fit"),
        (lambda c: c["leap_pl"].update(sparsity=7), "trap.ckpt"),
        (lambda c: c["state_dict"].update(dict.fromkeys(c["state_dict"], "text")), "do not fit"),
    ],
)
def test_a_whole_checkpoint_that_makes_no_sense(
    finished: Run, tmp_path: Path, capsys, change: Callable[[dict[str, Any]], Any], words: str
) -> None:
    checkpoint = torch.load(finished.checkpoint, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, tmp_path / "trap.ckpt")
    line = refused(["export", f"--ckpt_path={tmp_path / 'trap.ckpt'}", f"--output_dir={tmp_path / 'out'}"], capsys)
    assert words in line
    assert not (tmp_path / "out").exists()
