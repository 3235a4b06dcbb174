"""MaskSet: what it says, what it does to a model, and a file that is read whole and right or not at all."""

import dataclasses
import functools
import json
import pickle
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hostile_files import Trap
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, safe_open, save_file
from tiny import FAMILIES, tiny_model

from leap_pl.base_model.weights import find_weights, model_fingerprint
from leap_pl.errors import UserError
from leap_pl.masks import patterns
from leap_pl.masks.bits import PackedMasks, count, pack
from leap_pl.masks.mask_set import MaskSet, Provenance, installed_versions
from leap_pl.masks.patterns import NM
from leap_pl.masks.weight_groups import split_name

ORIGIN = Provenance(
    "some/model",
    "0123456789abcdef",
    "wanda",
    sparsity=0.5,
    revision="main",
    config={"sequences": 128, "targets": None, "text": 'Zürich "C4"', "nested": {"a": [1, 2.5]}},
    versions={"torch": "2.13"},
)


def small_mask(seed: int = 0) -> MaskSet:
    """Shapes whose sizes are no multiples of eight, and a stacked one."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "model.layers.0.self_attn.q_proj.weight": (3, 5),
        "model.layers.0.mlp.up_proj.weight": (4, 2),
        "model.layers.10.mlp.up_proj.weight": (7, 1),
        "model.layers.10.mlp.experts.down_proj": (2, 3, 3),
        "head.weight": (1, 1),
    }
    return MaskSet({n: torch.rand(s, generator=generator) < 0.6 for n, s in shapes.items()}, ORIGIN)


def same(a: MaskSet, b: MaskSet) -> bool:
    return (
        a.provenance == b.provenance
        and list(a.masks) == list(b.masks)
        and all(torch.equal(a.masks[n], b.masks[n]) for n in a.masks)
    )


def refused(path: Path) -> str:
    """The one line with which loading ``path`` is refused."""
    with pytest.raises(UserError) as caught:
        MaskSet.load(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


@functools.cache
def good_file() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return small_mask().save(Path(folder) / "m").read_bytes()


@functools.cache
def llama_mask() -> MaskSet:
    model = tiny_model("llama")
    generator = torch.Generator().manual_seed(1)
    masks = {n: torch.rand(w.parameter.shape, generator=generator) < 0.5 for n, w in find_weights(model).items()}
    return MaskSet(masks, Provenance("tiny/llama", model_fingerprint(model), "magnitude", 0.5))


# -- what it says -----------------------------------------------------------------------------------------


def test_counts_and_densities() -> None:
    ones, half = torch.ones(2, 4, dtype=torch.bool), torch.tensor([[True, False]])
    mask = MaskSet(
        {
            "model.layers.0.mlp.up_proj.weight": ones,
            "model.layers.0.mlp.down_proj.weight": half,
            "model.layers.11.mlp.up_proj.weight": ~ones,
            "extra.weight": half,
        },
        ORIGIN,
    )
    assert (mask.kept, mask.total) == (10, 20)
    assert mask.sparsity == 0.5
    assert mask.densities() == {"0": 0.9, "11": 0.0, "None": 0.5}
    assert mask.densities("projection") == {"mlp.up_proj": 0.5, "mlp.down_proj": 0.5, "extra": 0.5}
    assert mask.densities("weight") == {
        "model.layers.0.mlp.up_proj.weight": 1.0,
        "model.layers.0.mlp.down_proj.weight": 0.5,
        "model.layers.11.mlp.up_proj.weight": 0.0,
        "extra.weight": 0.5,
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_names_are_split_as_the_model_has_them(family: str) -> None:
    for name, weight in find_weights(tiny_model(family)).items():
        assert split_name(name) == (weight.layer, weight.projection)


def test_only_bool_masks_and_at_least_one() -> None:
    with pytest.raises(ValueError, match="at least one"):
        MaskSet({}, ORIGIN)
    with pytest.raises(ValueError, match=r"mask of a is torch\.uint8"):
        MaskSet({"a": torch.ones(2, dtype=torch.uint8)}, ORIGIN)


def test_provenance_is_changed_in_a_copy() -> None:
    mask = small_mask()
    other = mask.with_provenance(method="leap", sparsity=None)
    assert (other.provenance.method, other.provenance.sparsity, other.provenance.revision) == ("leap", None, "main")
    assert mask.provenance == ORIGIN
    assert installed_versions().keys() == {"leap_pl", "torch", "lightning", "transformers"}


def test_the_digest_of_bits_tells_masks_and_not_where_they_come_from(tmp_path: Path) -> None:
    mask = small_mask()
    found = mask.digest_of_bits()
    assert mask.with_provenance(method="leap", sparsity=None).digest_of_bits() == found
    assert MaskSet.load(mask.save(tmp_path / "mask.safetensors")).digest_of_bits() == found
    backwards = MaskSet(dict(reversed(mask.masks.items())), mask.provenance)
    assert backwards.digest_of_bits() == found
    name = next(iter(mask.masks))
    for other in (~mask.masks[name], mask.masks[name].reshape(-1, 1)):
        assert MaskSet({**mask.masks, name: other}, mask.provenance).digest_of_bits() != found


# -- on disk ----------------------------------------------------------------------------------------------

masks_strategy = st.dictionaries(
    st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__"),
    st.lists(st.integers(1, 5), min_size=1, max_size=4).flatmap(
        lambda shape: st.integers(0, 2**32).map(
            lambda seed: torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
        )
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=60, deadline=None)
@given(masks_strategy)
def test_round_trip(masks: dict[str, torch.Tensor]) -> None:
    mask = MaskSet(masks, ORIGIN)
    with tempfile.TemporaryDirectory() as folder:
        assert same(MaskSet.load(mask.save(Path(folder) / "m.safetensors")), mask)


def test_an_old_file_is_replaced_and_no_leftover_stays(tmp_path: Path) -> None:
    path = tmp_path / "new" / "mask.safetensors"
    small_mask(0).save(path)
    small_mask(1).save(str(path))
    assert same(MaskSet.load(str(path)), small_mask(1))
    assert [p.name for p in path.parent.iterdir()] == ["mask.safetensors"]


def test_one_bit_a_weight_and_the_first_in_the_lowest(tmp_path: Path) -> None:
    """The format as it is documented, read by safetensors alone."""
    shape = (256, 1000)
    big = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    path = MaskSet({"w": big, "v": torch.tensor([1, 0, 0, 1, 0, 0, 0, 0, 1, 1]).bool()}, ORIGIN).save(tmp_path / "m")
    assert big.numel() / 8 < path.stat().st_size < big.numel() / 8 + 2048
    stored = load_file(path)
    assert stored["v"].tolist() == [0b00001001, 0b00000011]
    bits = (stored["w"][:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    assert torch.equal(bits.bool().view(shape), big)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert (metadata["format"], metadata["format_version"]) == ("leap_pl.MaskSet", "1")
    assert json.loads(metadata["shapes"]) == {"w": [256, 1000], "v": [10]}
    assert json.loads(metadata["provenance"])["base_model"] == "some/model"


def test_same_mask_same_bytes(tmp_path: Path) -> None:
    """Saved, saved again, and read and saved: five metadata keys in a random order agree once in 120 times."""
    mask = small_mask()
    files = [mask.save(tmp_path / name) for name in "abc"]
    files.append(MaskSet.load(files[0]).save(tmp_path / "d"))
    assert len({path.read_bytes() for path in files}) == 1


@pytest.mark.parametrize("base_model", ["a" * n for n in range(8)] + ["Zürich/模型"])
def test_header_ends_on_eight_bytes(tmp_path: Path, base_model: str) -> None:
    """The tensors behind it stay aligned, whatever its length."""
    mask = small_mask().with_provenance(base_model=base_model)
    path = mask.save(tmp_path / "m")
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0
    assert same(MaskSet.load(path), mask)


def test_transposed_masks_keep_their_order(tmp_path: Path) -> None:
    mask = MaskSet({"w": small_mask().masks["model.layers.0.self_attn.q_proj.weight"].T}, ORIGIN)
    assert same(MaskSet.load(mask.save(tmp_path / "m")), mask)


def never_another(content: bytes) -> None:
    """A file with ``content`` is refused in one line, or has the content of the good one."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m"
        path.write_bytes(content)
        try:
            loaded = MaskSet.load(path)
        except UserError as error:
            message = str(error)
        else:
            assert same(loaded, small_mask())
            return
    assert "\n" not in message


@pytest.mark.parametrize("change", [0x01, 0x20, 0xFF])
def test_every_byte_changed(change: int) -> None:
    good = good_file()
    for place in range(len(good)):
        never_another(good[:place] + bytes([good[place] ^ change]) + good[place + 1 :])


def test_truncated_at_every_place(tmp_path: Path) -> None:
    good, path = good_file(), tmp_path / "m"
    for length in range(len(good)):
        path.write_bytes(good[:length])
        assert "truncated or damaged" in refused(path)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_bytes_replaced_anywhere(data: st.DataObject) -> None:
    good = good_file()
    start = data.draw(st.integers(0, len(good)))
    stop = data.draw(st.integers(start, min(len(good), start + 20)))
    never_another(good[:start] + data.draw(st.binary(max_size=20)) + good[stop:])


def rewritten(path: Path, **changes: Any) -> Path:
    """The good file with other metadata, written by safetensors."""
    path.write_bytes(good_file())
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(load_file(path), path, {**metadata, **changes})
    return path


def test_a_future_format(tmp_path: Path) -> None:
    message = refused(rewritten(tmp_path / "m", format_version="2", surprise="x"))
    assert "format version 2" in message
    assert "pip install --upgrade leap_pl" in message


def test_another_provenance_under_the_same_digest(tmp_path: Path) -> None:
    assert "digest" in refused(rewritten(tmp_path / "m", provenance=json.dumps({"base_model": "other"})))


def test_another_shape_under_the_same_digest(tmp_path: Path) -> None:
    """As many elements, in other rows."""
    shapes = {n: list(m.shape[::-1]) for n, m in small_mask().masks.items()}
    assert "digest" in refused(rewritten(tmp_path / "m", shapes=json.dumps(shapes)))


def test_a_plain_safetensors_file(tmp_path: Path) -> None:
    save_file({"w": torch.ones(4)}, tmp_path / "m")
    assert "not a MaskSet" in refused(tmp_path / "m")
    save_file({"w": torch.ones(4)}, tmp_path / "m", {"format": "pt"})
    assert "not a MaskSet" in refused(tmp_path / "m")


def test_a_pickle_file(tmp_path: Path) -> None:
    """Nothing in it is run."""

    (tmp_path / "m").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    refused(tmp_path / "m")
    torch.save({"w": torch.ones(4)}, tmp_path / "m")
    refused(tmp_path / "m")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("content", [b"", b"\0" * 8, b"\xff" * 100, b"{}", b"GGUF" + b"\0" * 60])
def test_files_of_other_kinds(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m").write_bytes(content)
    refused(tmp_path / "m")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert "no such MaskSet" in refused(tmp_path / "none")
    assert "is a folder without a mask.safetensors" in refused(tmp_path)


def test_a_text_whose_path_is_no_unicode(tmp_path: Path) -> None:
    origin = dataclasses.replace(ORIGIN, config={"data": {"text": "donn\udce9es.jsonl", "\udce9": 1}})
    path = MaskSet({"a.weight": torch.ones(2, 4, dtype=torch.bool)}, origin).save(tmp_path / "mask.safetensors")
    assert MaskSet.load(path).provenance.config == {"data": {"text": "donn\\udce9es.jsonl", "\\udce9": 1}}


def test_a_folder_that_has_it(tmp_path: Path) -> None:
    masks = MaskSet({"a.weight": torch.ones(2, 4, dtype=torch.bool)}, ORIGIN)
    for place in ("exported", "run/checkpoints"):
        (tmp_path / place).mkdir(parents=True)
        masks.save(tmp_path / place / "mask.safetensors")
        assert MaskSet.load(tmp_path / place.partition("/")[0]).digest_of_bits() == masks.digest_of_bits()


# -- on a model -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_apply_zeroes_the_removed_and_keeps_every_other_bit(family: str) -> None:
    model, base = tiny_model(family), tiny_model(family)
    weights = find_weights(model)
    masks = {n: torch.rand(w.parameter.shape) < 0.4 for n, w in weights.items()}
    with torch.no_grad():
        # What a multiplication by the mask would spoil: -0.0 instead of 0.0, NaN from infinities.
        first = next(iter(weights))
        for m in (model, base):
            m.get_parameter(first).view(-1)[:3] = torch.tensor([torch.inf, -torch.inf, torch.nan])
        masks[first].view(-1)[:6] = torch.tensor([False, False, False, True, True, False])
    mask = MaskSet(masks, Provenance("tiny", model_fingerprint(base), "magnitude"))
    assert mask.apply_(model) is model
    for name, before in base.named_parameters():
        after = model.get_parameter(name).detach().view(torch.int32)
        expected = before.detach().view(torch.int32)
        if name in masks:
            expected = torch.where(masks[name], expected, 0)
        assert torch.equal(after, expected), name


def test_apply_to_bfloat16() -> None:
    mask = llama_mask()
    model, base = tiny_model("llama").bfloat16(), tiny_model("llama").bfloat16()
    mask.apply_(model)
    for name, kept in mask.masks.items():
        expected = torch.where(kept, base.get_parameter(name).view(torch.int16), 0)
        assert torch.equal(model.get_parameter(name).view(torch.int16), expected)


def test_another_model_is_refused_with_both_fingerprints() -> None:
    mask, other = llama_mask(), tiny_model("llama", seed=1)
    before = {n: p.clone() for n, p in other.named_parameters()}
    with pytest.raises(UserError) as caught:
        mask.apply_(other)
    assert mask.provenance.fingerprint in str(caught.value)
    assert model_fingerprint(other) in str(caught.value)
    assert mask.provenance.base_model in str(caught.value)
    assert all(torch.equal(p, before[n]) for n, p in other.named_parameters())


def test_a_pruned_model_is_not_the_base_model() -> None:
    with pytest.raises(UserError, match="unpruned"):
        llama_mask().apply_(llama_mask().apply_(tiny_model("llama")))


def test_a_model_that_the_mask_was_applied_to_is_accepted_on_request() -> None:
    """Whatever it keeps; but not with one removed weight that is not 0, and not another model."""
    mask, model = llama_mask(), tiny_model("llama", seed=1)
    assert mask.check(tiny_model("llama"), or_applied=True)
    mask.apply_(model, check=False)
    assert not mask.check(model, find_weights(model), or_applied=True)
    with pytest.raises(UserError, match="or a model that it was applied to"):  # of another size
        mask.check(tiny_model("llama", hidden_size=64), or_applied=True)
    name, kept = next(iter(mask.masks.items()))
    with torch.no_grad():
        model.get_parameter(name)[tuple((~kept).nonzero()[-1])] = 1e-30
    for other in (model, tiny_model("gpt2")):
        with pytest.raises(UserError, match="or a model that it was applied to"):
            mask.check(other, or_applied=True)


def test_the_check_can_be_left_out_but_names_must_be_there() -> None:
    llama_mask().apply_(tiny_model("llama", seed=1), check=False)
    with pytest.raises(UserError, match="has no weight"):
        llama_mask().apply_(tiny_model("gpt2"), check=False)


def test_check_compares_names_and_shapes_with_the_gated_weights() -> None:
    model, mask = tiny_model("llama"), llama_mask()
    mask.check(model, find_weights(model))
    with pytest.raises(UserError, match=r"covers 14 weights, and 6 are gated.*self_attn"):
        mask.check(model, find_weights(model, targets=[r"re:.*\.mlp\."]))
    fewer = MaskSet(dict(list(mask.masks.items())[1:]), mask.provenance)
    with pytest.raises(UserError, match=r"covers 13 weights, and 14 are gated.*layers\.0\.self_attn\.q_proj"):
        fewer.check(model, find_weights(model))
    name = "model.layers.1.mlp.up_proj.weight"
    turned = MaskSet({**mask.masks, name: mask.masks[name].T}, mask.provenance)
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj"):
        turned.check(model, find_weights(model))


@pytest.mark.parametrize("how", ["loaded", "packed"])
def test_a_loaded_or_packed_mask_is_kept_as_bits(tmp_path: Path, how: str) -> None:
    mask = small_mask()
    mask.save(tmp_path / "mask.safetensors")
    loaded = MaskSet.load(tmp_path / "mask.safetensors") if how == "loaded" else mask.packed()
    assert loaded.packed().masks is loaded.masks
    assert (loaded.digest_of_bits(), loaded.provenance) == (mask.digest_of_bits(), mask.provenance)
    assert isinstance(loaded.masks, PackedMasks)
    held = sum(bits.numel() for bits in loaded.masks.packed.values())
    assert held <= mask.total / 8 + len(mask.masks)
    assert loaded.shapes == mask.shapes
    assert (loaded.total, loaded.kept) == (mask.total, mask.kept)
    name = next(iter(loaded.masks))
    loaded.masks[name].fill_(False)  # of a new tensor
    assert torch.equal(loaded.masks[name], mask.masks[name])
    assert {**loaded.masks}.keys() == mask.masks.keys()


@given(st.lists(st.booleans(), min_size=1, max_size=70), st.integers(0, 255))
def test_kept_weights_are_counted_in_bits(kept: list[bool], beyond: int) -> None:
    """Whatever the bits behind the last weight are, which files of others may set."""
    bits = pack(torch.tensor(kept))
    if rest := len(kept) % 8:
        bits[-1] |= (beyond << rest) & 0xFF
    assert count(bits, [len(kept)]) == sum(kept)


def test_packed_masks_refuse_what_is_no_bits() -> None:
    with pytest.raises(ValueError, match="another length"):
        PackedMasks({"w": torch.zeros(3, dtype=torch.uint8)}, {"w": [2, 4]})
    with pytest.raises(ValueError, match="not packed bits"):
        PackedMasks({"w": torch.zeros(1)}, {"w": [2, 4]})


def test_counts_of_bits_are_those_of_masks() -> None:
    """Without unpacking them, for sizes that fill no byte, too."""
    generator = torch.Generator().manual_seed(0)
    masks = {f"model.layers.{k}.mlp.up_proj.weight": torch.rand(3, 5 + k, generator=generator) > 0.6 for k in range(4)}
    plain = MaskSet(masks, Provenance("m", "0" * 16, "wanda", 0.6))
    bits = plain.packed()
    assert bits.counts() == plain.counts() == {n: (int(m.sum()), m.numel()) for n, m in masks.items()}
    assert (bits.kept, bits.sparsity) == (plain.kept, plain.sparsity)
    for by in ("weight", "layer", "projection"):
        assert bits.densities(by) == plain.densities(by)
    total = sum(mask.numel() for mask in masks.values())
    assert plain.densities("projection") == {"mlp.up_proj": plain.kept / total}
    assert plain.densities("layer")["2"] == pytest.approx(
        float(masks["model.layers.2.mlp.up_proj.weight"].float().mean())
    )


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"sparsity": 50}, "'sparsity'"),
        ({"config": {"data": "c4"}}, "'config > data'"),
        ({"config": {"pattern": None}}, "'config > pattern'"),
        ({"config": {"data": {"seq_length": 0.5}}}, "'config > data > seq_length'"),
        ({"versions": {"mine": 1}}, "'versions > mine'"),
    ],
)
def test_a_record_that_could_not_be_read_is_not_written(fields: dict[str, Any], names: str, tmp_path: Path) -> None:
    masks = MaskSet(dict(llama_mask().masks), replace(llama_mask().provenance, **fields))
    with pytest.raises(UserError, match=rf"{tmp_path / 'm'} was not written: in the provenance of the mask, .*{names}"):
        masks.save(tmp_path / "m")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("half", [torch.tensor(0.5), np.float32(0.5), np.float64(0.5), 0.5])
def test_numbers_of_other_packages_are_numbers(half: Any, tmp_path: Path) -> None:
    config = {"data": {"seq_length": np.int64(32)}, "rate": half, "list": np.arange(2)}
    made = replace(llama_mask().provenance, sparsity=half, config=config)
    MaskSet(dict(llama_mask().masks), made).save(tmp_path / "m")
    read = MaskSet.load(tmp_path / "m").provenance
    assert (read.sparsity, read.config) == (0.5, {"data": {"seq_length": 32}, "rate": 0.5, "list": "[0 1]"})


@pytest.mark.parametrize("shape", [(8, 8), (9, 13), (3, 5), (2, 8, 12)])
@pytest.mark.parametrize("size", [1, 2, 4, 8, 16])
def test_full_tiles_are_those_of_a_loop_over_them(shape: tuple[int, ...], size: int) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.9
    mask[..., :4, :4] = True
    expected = torch.zeros_like(mask)
    for rows in range(0, shape[-2], size):
        for columns in range(0, shape[-1], size):
            place = (..., slice(rows, rows + size), slice(columns, columns + size))
            expected[place] = mask[place].flatten(-2).all(-1)[..., None, None]
    assert torch.equal(patterns._in_full_tiles(mask, size), expected)
    assert expected.any() or size > 4


def test_sparsities_of_patterns_are_as_they_are_typed() -> None:
    assert [NM(n, m).sparsity for n, m in ((2, 4), (7, 10), (4, 5), (9, 10), (11, 20))] == [0.5, 0.3, 0.2, 0.1, 0.45]
