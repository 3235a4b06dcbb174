"""What a GGUF file says of itself is checked before it is believed."""

import shutil
import struct
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from conftest import one_line
from tiny import byte_tokenizer, tiny_model
from tiny_gguf import gguf_header, gguf_string, gguf_tensor, tiny_gguf
from tokenizers import normalizers

from leap_pl.base_model.config import load_config
from leap_pl.base_model.gguf_structure import read_structure
from leap_pl.base_model.loading import load_model
from leap_pl.base_model.place import locate
from leap_pl.base_model.tokenizer import load_tokenizer
from leap_pl.base_model.weights import find_weights, model_fingerprint
from leap_pl.cli.export import export_command
from leap_pl.errors import UserError
from leap_pl.masks import MaskSet, Provenance

pytestmark = pytest.mark.usefixtures("eager")


def test_a_gguf_file_is_read_as_its_structure_says(tmp_path: Path) -> None:
    file = tiny_gguf(tmp_path / "tiny.gguf")
    found, reader = read_structure(file), gguf.GGUFReader(file)
    assert found.stored.shapes == {tensor.name: tuple(tensor.shape.tolist()[::-1]) for tensor in reader.tensors}
    for key, value in found.metadata.items():
        told = reader.fields[key].contents()
        assert value == (len(told) if isinstance(told, list) else told) or value[1] == len(told), key
    assert len(found.metadata) == len([key for key in reader.fields if not key.startswith("GGUF.")])
    model, expected = load_model(str(file), dtype="float32"), tiny_model()
    # Queries and keys are turned in GGUF files, which the maker of this one leaves out.
    for name, tensor in expected.state_dict().items():
        if not ("q_proj" in name or "k_proj" in name):
            assert torch.equal(model.state_dict()[name], tensor), name
    dequantised = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=file.name, quantization_config=transformers.GgufConfig(dequantize=True), dtype=torch.float32
    )
    ids = torch.arange(24)[None]
    assert torch.equal(model(input_ids=ids).logits, dequantised(input_ids=ids).logits)
    assert not any(one.is_meta for one in (*model.parameters(), *model.buffers()))
    assert load_tokenizer(str(file)).encode("abc") == [257, byte_tokenizer().encode("c")[0]]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"block_count": 1_000_000}, "block_count as 1000000, and the names of the weights count to 2"),
        ({"embedding_length": 10**9}, "embedding_length as 1000000000, and the largest dimension of a weight is 260"),
        ({"attention.head_count": 4_000_000_000}, "attention.head_count as 4000000000"),
        ({"vocab_size": 300}, "vocab_size as 300"),
        ({"feed_forward_length": 260}, ""),
        ({"attention.head_count": 0}, ""),
        ({"attention.head_count_kv": 3}, ""),
        ({"block_count": 1}, None),
    ],
)
def test_settings_of_a_gguf_file_that_lie(tmp_path: Path, change: dict[str, int], words: str | None) -> None:
    file = tiny_gguf(tmp_path / "tiny.gguf", **change)
    if words is None:  # the first blocks of a model are a model
        assert load_model(str(file)).config.num_hidden_layers == 1
        return
    with pytest.raises(UserError) as caught:
        load_model(str(file))
    assert words in one_line(caught)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is truncated"),
        (b"GGML", "does not start with GGUF"),
        (gguf_header(version=1), "its version is 1"),
        (gguf_header(version=3 << 24), "its version is"),
        (gguf_header(tensors=1 << 60), "declares 1,152,921,504,606,846,976 tensors"),
        (gguf_header(keys=1 << 63), "keys"),
        (gguf_header(keys=1) + gguf_string(b"a", 1 << 62), "a string in it has"),
        (gguf_header(keys=1) + gguf_string(b"a", 1 << 20), "is truncated"),
        (gguf_header(keys=1) + gguf_string(b"\xff") + struct.pack("<IB", 0, 0), "utf-8"),
        (gguf_header(keys=1) + gguf_string(b"a") + struct.pack("<I", 13), "unknown kind 13"),
        (gguf_header(keys=1) + gguf_string(b"a") + struct.pack("<IIQ", 9, 0, 1 << 60), "lists have more than"),
        (
            gguf_header(keys=1) + gguf_string(b"a") + struct.pack("<IIQ", 9, 9, 5),
            "list has items of the unknown kind 9",
        ),
        (gguf_header(keys=1) + gguf_string(b"a") + struct.pack("<IIQ", 9, 12, 1 << 20), "is truncated"),
        (gguf_header(keys=2) + (gguf_string(b"a") + struct.pack("<IB", 0, 0)) * 2, "the key 'a' occurs twice"),
        (gguf_header(keys=1) + gguf_string(b"general.alignment") + struct.pack("<II", 4, 0), "its alignment is 0"),
        (gguf_header(keys=1) + gguf_string(b"general.alignment") + struct.pack("<II", 4, 48), "its alignment is 48"),
        (
            gguf_header(keys=1) + gguf_string(b"general.alignment") + struct.pack("<I", 8) + gguf_string(b"a"),
            "its alignment is 'a'",
        ),
        (gguf_header(tensors=1) + gguf_tensor(shape=(8,) * 5), "has 5 dimensions"),
        (gguf_header(tensors=1) + gguf_tensor(shape=()), "has 0 dimensions"),
        (gguf_header(tensors=1) + gguf_tensor(shape=(1 << 63, 4)), "has the shape"),
        (gguf_header(tensors=1) + gguf_tensor(shape=(0,)), "has the shape"),
        (gguf_header(tensors=1) + gguf_tensor(shape=(1 << 39,)), "ends after the file"),
        (gguf_header(tensors=1) + gguf_tensor(kind=99), "unknown type 99"),
        (gguf_header(tensors=1) + gguf_tensor(kind=2, shape=(33,)), "rows of 33, and its type has blocks of 32"),
        (gguf_header(tensors=1) + gguf_tensor(offset=1), "is not aligned"),
        (gguf_header(tensors=1) + gguf_tensor(offset=1 << 63), "ends after the file"),
        (gguf_header(tensors=2) + gguf_tensor() * 2, "'a' occurs twice"),
        (gguf_header(tensors=2) + gguf_tensor() + gguf_tensor(b"b") + bytes(96), "'b' overlaps another"),
        (gguf_header(tensors=1) + gguf_tensor(), "ends after the file, which may be truncated"),
    ],
)
def test_gguf_structures_that_cannot_be(tmp_path: Path, content: bytes, words: str) -> None:
    file = tmp_path / "bad.gguf"
    file.write_bytes(content)
    for load in (load_config, load_model, load_tokenizer):
        with pytest.raises(UserError) as caught:
            load(str(file))
        assert words in one_line(caught)
        assert f"{file} could not be read: it is not a valid GGUF file" in str(caught.value)


def test_a_part_of_a_gguf_file_is_told_as_one(tmp_path: Path) -> None:
    file = tiny_gguf(tmp_path / "model-00001-of-00003.gguf", parts=3)
    with pytest.raises(UserError, match=r"is one of 3 parts of a GGUF file\. Join them with llama-gguf-split --merge"):
        load_model(str(file))


def test_a_gguf_file_that_lacks_a_weight(tmp_path: Path) -> None:
    """Which transformers would make up."""
    whole, file = gguf.GGUFReader(tiny_gguf(tmp_path / "tiny.gguf")), tmp_path / "less.gguf"
    raw = bytearray((tmp_path / "tiny.gguf").read_bytes())
    place = bytes(raw).index(b"blk.1.ffn_up.weight")
    raw[place : place + 4] = b"xyz."
    file.write_bytes(raw)
    assert len(whole.tensors) == 21
    with pytest.raises(UserError, match=r"lacks the weights model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(str(file))


def test_a_gguf_file_without_a_head_of_its_own_is_tied(tmp_path: Path) -> None:
    """As those of SmolLM2, Llama 3.2 and Gemma: head and embeddings are one tensor."""
    model = load_model(str(tiny_gguf(tmp_path / "tied.gguf", tied=True)), dtype="float32")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model = load_model(str(tiny_gguf(tmp_path / "apart.gguf")), dtype="float32")
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight


def test_a_quantised_gguf_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 32 values are read in bfloat16, as the values that they stand for; their end is the file's."""
    add, kind = gguf.GGUFWriter.add_tensor, gguf.GGMLQuantizationType.Q8_0

    def quantised(self: gguf.GGUFWriter, name: str, tensor: Any) -> None:
        whole = tensor.ndim == 2 and tensor.shape[1] % 32 == 0
        add(self, name, gguf.quants.quantize(tensor, kind), raw_dtype=kind) if whole else add(self, name, tensor)

    monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", quantised)
    file = tiny_gguf(tmp_path / "tiny.gguf")
    model = load_model(str(file))
    assert model.dtype == torch.bfloat16
    dense = tiny_model().model.layers[0].mlp.up_proj.weight.detach().numpy()
    values = gguf.quants.dequantize(gguf.quants.quantize(dense, kind), kind)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, torch.from_numpy(values).bfloat16())
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(UserError, match="ends after the file"):
        read_structure(file)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "mixed"])
def test_a_gguf_file_that_is_not_quantised_is_read_in_its_type(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit; norms are always float32 there, as the few matrices of a router are."""
    add, kinds = gguf.GGUFWriter.add_tensor, gguf.GGMLQuantizationType

    def stored(self: gguf.GGUFWriter, name: str, tensor: Any) -> None:
        plain = tensor.ndim == 1 or kind == "F32" or (kind == "mixed" and not name.endswith("ffn_up.weight"))
        if plain and kind == "mixed" and tensor.ndim > 1:
            return add(self, name, tensor.astype("float16"))
        as_kind = kinds.F32 if plain else kinds.F32 if kind == "mixed" else kinds[kind]
        data = tensor if as_kind == kinds.F32 else gguf.quants.quantize(tensor, as_kind)
        return add(self, name, data, raw_dtype=as_kind)

    monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", stored)
    file = tiny_gguf(tmp_path / "tiny.gguf")
    model, dense = load_model(str(file)), tiny_model()
    dtype = {"F32": torch.float32, "BF16": torch.bfloat16}.get(kind, torch.float16)
    assert model.dtype == dtype
    found, expected = (each.model.layers[0].mlp.down_proj.weight for each in (model, dense))
    assert torch.equal(found, expected.to(dtype))
    assert load_model(str(file), dtype="bfloat16").dtype == torch.bfloat16


def test_what_lies_beside_a_gguf_file_is_of_another_model(tmp_path: Path) -> None:
    """As in a folder of downloads; of somebody else's it may be a link to any file of the user's."""
    downloads = tmp_path / "downloads"
    (downloads / "additional_chat_templates").mkdir(parents=True)
    file = tiny_gguf(downloads / "tiny.gguf")
    alone = load_tokenizer(str(file)).encode("hello")
    other = byte_tokenizer()
    other.backend_tokenizer.normalizer = normalizers.Replace("h", "j")
    other.save_pretrained(downloads)
    (downloads / "adapter_config.json").write_text('{"base_model_name_or_path": "some/other"}')
    (tmp_path / "key").write_text("SECRET")
    (downloads / "additional_chat_templates" / "x.jinja").symlink_to(tmp_path / "key")
    tokenizer = load_tokenizer(str(file))
    assert tokenizer.encode("hello") == alone != other.encode("hello")
    assert tokenizer.name_or_path == load_config(str(file)).name_or_path == str(file)
    model = load_model(str(file))
    masks = {name: torch.ones(weight.parameter.shape).bool() for name, weight in find_weights(model).items()}
    MaskSet(masks, Provenance(str(file), model_fingerprint(model), "own", 0.0)).save(tmp_path / "mask.safetensors")
    export_command(str(tmp_path / "out"), mask=str(tmp_path / "mask.safetensors"))
    written = {path.name: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert "tokenizer.json" in written
    assert not any(b"SECRET" in content or b"leap_pl-gguf" in content for content in written.values())


def test_the_folder_of_a_gguf_file_may_be_cleared(tmp_path: Path) -> None:
    """By what removes old files from the folder of temporary ones, in a process of days."""
    file = tiny_gguf(tmp_path / "tiny.gguf")
    folder, name = locate(str(file))
    assert [path.name for path in Path(folder).iterdir()] == [name]
    assert locate(str(file)) == (folder, name)
    shutil.rmtree(folder)
    again, name = locate(str(file))
    assert (Path(again) / name).samefile(file)
