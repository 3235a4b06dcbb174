"""Files of packed weights: what is wrong with one is said in one line, and nothing damaged is loaded."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from packed_models import packed_folder, sparse_folder
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from leap_pl.base_model.loading import load_model
from leap_pl.errors import UserError
from leap_pl.export.hugging_face import export_model
from leap_pl.masks import MaskSet
from leap_pl.sparse.folder import is_packed, packed_weights, read_masks
from leap_pl.sparse.packed_file import read_headers

NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, MaskSet]:
    return packed_folder(tmp_path_factory.mktemp("packed"))


def test_the_mask_and_its_provenance_are_in_the_files(packed: tuple[Path, MaskSet]) -> None:
    folder, masks = packed
    read = read_masks(folder)
    assert read.provenance == masks.provenance
    assert read.digest_of_bits() == masks.digest_of_bits()
    assert is_packed(folder)
    assert not is_packed(folder.parent / "base")
    assert not is_packed("no/such/model")


def test_the_header_says_what_is_stored(packed: tuple[Path, MaskSet]) -> None:
    folder, masks = packed
    found, _ = read_headers([folder / "model.safetensors"])
    assert found.keys() == masks.masks.keys()
    assert {name: stored.shape for name, stored in found.items()} == masks.shapes
    assert all(stored.kept == int(masks.masks[name].sum()) for name, stored in found.items())
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert file.metadata()["packed_version"] == "1"
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "leap_pl"
    assert config["values"] == "bfloat16"


def rewritten(change: Callable[[dict[str, torch.Tensor], dict[str, str]], None]) -> Callable[[Path], None]:
    """A damage that is done to the tensors and the metadata, with right sums of neither."""

    def damage(folder: Path) -> None:
        file = folder / "model.safetensors"
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
        tensors = load_file(file)
        change(tensors, metadata)
        save_file(tensors, file, metadata)

    return damage


def truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def flipped(suffix: str) -> Callable[[Path], None]:
    """One bit of a tensor is flipped in the file."""

    def damage(folder: Path) -> None:
        file = folder / "model.safetensors"
        data = bytearray(file.read_bytes())
        size = int.from_bytes(data[:8], "little")
        start = 8 + size + json.loads(data[8 : 8 + size])[f"{NAME}{suffix}"]["data_offsets"][0]
        data[start + 3] ^= 4
        file.write_bytes(data)

    return damage


def version(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["format_version"] = 2
    path.write_text(json.dumps(config))


def another_config(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 47}))


DAMAGE = {
    "cut off": (truncated, "could not be read"),
    "values flipped": (flipped(""), f"{NAME} has other bytes than were written"),
    "bitmap flipped": (flipped("_bitmap"), f"{NAME}_bitmap has other bytes than were written"),
    "fewer values": (rewritten(lambda t, _: t.update({NAME: t[NAME][1:].clone()})), "has other bytes"),
    "no bitmap": (rewritten(lambda t, _: t.pop(f"{NAME}_bitmap")), "bitmap"),
    "no values": (rewritten(lambda t, _: t.pop(NAME)), f"it lacks {NAME}"),
    "version of the file": (rewritten(lambda _, m: m.update(packed_version="7")), "version 7, and this leap_pl reads"),
    "version of the config": (version, "version 2, and this leap_pl reads"),
    "another config": (another_config, "Check that config.json belongs to"),
    "shapes": (rewritten(lambda _, m: m.update(shapes="{")), "truncated or damaged"),
    "sums": (rewritten(lambda _, m: m.update(crc32="{}")), "truncated or damaged"),
    "provenance": (rewritten(lambda _, m: m.pop("provenance")), "truncated or damaged"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_one_line(damage: str, packed: tuple[Path, MaskSet], tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    folder.mkdir()
    for file in packed[0].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    DAMAGE[damage][0](folder)
    with pytest.raises(UserError, match=DAMAGE[damage][1]) as caught:
        load_model(str(folder))
    assert len(str(caught.value).splitlines()) == 1


def test_bitmap_and_values_that_do_not_agree(packed: tuple[Path, MaskSet], tmp_path: Path, monkeypatch) -> None:
    """Also where every sum is right: nothing is read beyond the values."""
    from leap_pl.sparse import packed_file

    (tmp_path / "f").mkdir()
    for file in packed[0].iterdir():
        (tmp_path / "f" / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(packed_file.zlib, "crc32", lambda data: 0)
    rewritten(lambda t, m: (t[f"{NAME}_bitmap"].fill_(3), m.update(crc32=_zeros(m["crc32"]))))(tmp_path / "f")
    for read in (lambda: load_model(str(tmp_path / "f")), lambda: [*packed_weights(tmp_path / "f")]):
        with pytest.raises(UserError, match="elements, and there are"):
            read()


def _zeros(sums: str) -> str:
    return json.dumps(dict.fromkeys(json.loads(sums), "00000000"))


def test_a_damaged_scale_of_int8_values_is_found(tmp_path: Path) -> None:
    """It would rescale a whole row, and be a number like others."""
    masks = sparse_folder(tmp_path / "base")
    export_model(masks, tmp_path / "packed", str(tmp_path / "base"), format="packed", values="int8")
    flipped("_scale")(tmp_path / "packed")
    with pytest.raises(UserError, match="_scale has other bytes"):
        load_model(str(tmp_path / "packed"))
