"""``leap_pl export``: exact zeros, every kept bit, whole or not at all."""

import errno
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Run
from random_masks import random_mask
from safetensors.torch import load_file
from tiny import FAMILIES, byte_tokenizer, tiny_folder, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES, tokenizer_class_from_name

from leap_pl.base_model.tokenizer_files import WEIGHTS
from leap_pl.cli.export import export_command
from leap_pl.cli.main import main
from leap_pl.cli.prune import prune_command
from leap_pl.errors import UserError
from leap_pl.export import zeros
from leap_pl.export.zeros import places_in, zero_removed
from leap_pl.masks import MaskSet


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_reloads_alone_with_every_kept_bit(family: str, tmp_path: Path) -> None:
    base = tiny_model(family).bfloat16()
    base.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    mask = random_mask(tmp_path / "base", tmp_path / "mask.safetensors")
    export_command(str(tmp_path / "out"), mask=str(tmp_path / "mask.safetensors"))
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    before, after = dict(base.named_parameters()), dict(reloaded.named_parameters())
    assert before.keys() == after.keys()
    for name, weight in after.items():
        kept = mask.masks.get(name, torch.ones_like(weight, dtype=torch.bool))
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight[kept].view(torch.int16), before[name][kept].view(torch.int16))
        assert not weight[~kept].any()
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("word").input_ids
    # What reads every file of weights that the index does not leave out finds each weight once.
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert index["weight_map"] == dict.fromkeys(sorted(stored), "model.safetensors")
    assert index["metadata"]["total_size"] == sum(weight.nbytes for weight in stored.values())


def test_the_tokenizer_is_the_base_models_file_by_file(tmp_path: Path) -> None:
    """As transformers would write it, it would lack what other programs read."""
    base = tiny_folder(tmp_path / "base")
    settings = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(settings | {"add_bos_token": False}))
    (base / "tokenizer.model").write_bytes(b"\x0a")
    (base / "chat_template.jinja").write_text("{{ messages }}")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    random_mask(base, tmp_path / "mask.safetensors")
    export_command(str(tmp_path / "out"), mask=str(tmp_path / "mask.safetensors"))
    named = "additional_chat_templates/tools.jinja"
    for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "chat_template.jinja", named):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    # A path of the machine that the base model was made on is left behind.
    for key, path in (
        ("name_or_path", "/home/someone/base"),
        ("special_tokens_map_file", "/home/someone/map.json"),
        ("tokenizer_file", "C:\\Users\\someone\\tokenizer.json"),
    ):
        (base / "tokenizer_config.json").write_text(json.dumps(settings | {key: path}))
        export_command(str(tmp_path / "again"), mask=str(tmp_path / "mask.safetensors"), force=True)
        assert b"someone" not in (tmp_path / "again" / "tokenizer_config.json").read_bytes()
        assert AutoTokenizer.from_pretrained(tmp_path / "again")("word").input_ids
    plain = json.dumps(settings | {"special_tokens_map_file": None})
    (base / "tokenizer_config.json").write_text(plain)
    export_command(str(tmp_path / "again"), mask=str(tmp_path / "mask.safetensors"), force=True)
    assert (tmp_path / "again" / "tokenizer_config.json").read_text() == plain


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.model",
        "chat_template.jinja",
        "additional_chat_templates/a.jinja",
        "generation_config.json",
        "bpe.codes",  # read by a tokenizer whose class the settings may name
        "LICENSE",
    ],
)
def test_a_link_out_of_the_models_folder_is_not_published(name: str, tmp_path: Path, text_file: Path) -> None:
    """In a folder of somebody else it may be a link to any file of the user's."""
    base = tiny_folder(tmp_path / "base")
    random_mask(base, tmp_path / "mask.safetensors")
    (tmp_path / "key").write_text('{"secret": 1}')
    (base / name).parent.mkdir(exist_ok=True)
    (base / name).unlink(missing_ok=True)
    (base / name).symlink_to(tmp_path / "key")
    says = rf"{name} is a link to {tmp_path / 'key'}, outside the model's folder, .* Name the folder"
    with pytest.raises(UserError, match=says):
        export_command(str(tmp_path / "out"), mask=str(tmp_path / "mask.safetensors"))
    with pytest.raises(UserError, match=says):
        prune_command(str(base), str(tmp_path / "admm"), text=str(text_file), seq_length=32, sequences=2, method="admm")
    assert not {"out", "admm"} & {path.name for path in tmp_path.iterdir()}


def test_a_link_in_a_circle_is_of_no_file(tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base")
    (base / "a.txt").symlink_to("b.txt")
    (base / "b.txt").symlink_to("a.txt")
    random_mask(base, tmp_path / "mask.safetensors")
    export_command(str(tmp_path / "out"), mask=str(tmp_path / "mask.safetensors"))
    assert not (tmp_path / "out" / "a.txt").exists()


def test_links_within_a_models_folder_and_into_a_cache_of_the_hub_are_its_own(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0a1b"
    tiny_folder(snapshot)
    blobs = snapshot.parents[1] / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(snapshot.glob("*.json"))):
        file.rename(blobs / str(number))
        file.symlink_to(f"../../blobs/{number}")
    (snapshot / "model.safetensors").rename(tmp_path / "weights")
    (snapshot / "model.safetensors").symlink_to(tmp_path / "weights")  # weights are written anew, never copied
    (snapshot / "real.jinja").write_text("{{ messages }}")
    (snapshot / "chat_template.jinja").symlink_to("real.jinja")
    random_mask(snapshot, tmp_path / "mask.safetensors")
    export_command(str(tmp_path / "out"), mask=str(tmp_path / "mask.safetensors"))
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (snapshot / "tokenizer.json").read_bytes()


def test_checkpoint_exports_exactly_the_target(finished: Run, model_folder: Path, tmp_path: Path) -> None:
    main(["export", f"--ckpt_path={finished.checkpoint}", f"--output_dir={tmp_path / 'out'}"])
    exported, learned = MaskSet.load(tmp_path / "out" / "mask.safetensors"), MaskSet.load(finished.mask)
    assert all(torch.equal(exported.masks[name], learned.masks[name]) for name in learned.masks)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    base = load_file(model_folder / "model.safetensors")
    zeros = sum(int((weights[name] == 0).sum()) - int((base[name] == 0).sum()) for name in learned.masks)
    assert zeros == round(0.5 * learned.total)
    facts = json.loads((tmp_path / "out" / "leap_pl.json").read_text())
    assert facts["removed"] == zeros
    assert facts["sparsity"] == 0.5


def test_the_mask_of_a_packed_folder(finished: Run, tmp_path: Path) -> None:
    export_command(str(tmp_path / "packed"), mask=str(finished.mask), format="packed", values="int8")
    facts = export_command(str(tmp_path / "mask"), model=str(tmp_path / "packed"), format="mask")
    exported, learned = MaskSet.load(tmp_path / "mask" / "mask.safetensors"), MaskSet.load(finished.mask)
    assert exported.digest_of_bits() == learned.digest_of_bits()
    assert exported.provenance == learned.provenance
    assert "rounded_to" not in facts  # the mask is not


def test_never_over_a_full_folder(finished: Run, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    words = ["export", f"--mask={finished.mask}", f"--output_dir={out}"]
    with pytest.raises(SystemExit):
        main(words)
    assert "--force" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*words, "--force"])
    assert "contains files that leap_pl did not write: precious.txt." in capsys.readouterr().err
    assert (out / "precious.txt").read_text() == "mine"
    (out / "precious.txt").unlink()
    for more in ([], ["--force"]):  # what it has written itself gives way
        main([*words, *more])
        assert (out / "config.json").is_file()
    assert not list(tmp_path.glob(".out*"))


def test_full_disk_leaves_nothing(finished: Run, tmp_path: Path, monkeypatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        export_command(str(tmp_path / "out"), mask=str(finished.mask))
    assert not list(tmp_path.iterdir())


def test_sampling_settings_without_sampling_are_exported_as_they_are(
    finished: Run, model_folder: Path, tmp_path: Path
) -> None:
    """As many models of the hub have them: transformers warns, and from 5.23 on does not refuse to save them."""
    base = Path(shutil.copytree(model_folder, tmp_path / "base"))
    told = {"temperature": 0.6, "top_p": 0.9, "eos_token_id": 2}
    (base / "generation_config.json").write_text(json.dumps(told))
    for format in ("huggingface", "packed"):
        export_command(str(tmp_path / format), mask=str(finished.mask), model=str(base), format=format)  # type: ignore[arg-type]
        exported = json.loads((tmp_path / format / "generation_config.json").read_text())
        assert told.items() <= exported.items()
        assert not exported.get("do_sample")


@pytest.mark.parametrize("kept", [False, True])
def test_a_file_that_does_not_read_back_is_not_exported(kept: bool, finished: Run, tmp_path: Path, monkeypatch) -> None:
    """A removed weight comes back alive, or a kept one is another: the export is refused and leaves nothing."""

    def careless(folder: Path, masks: MaskSet) -> bool:
        assert zero_removed(folder, masks)
        name, mask = next(iter(masks.masks.items()))
        place = places_in(folder)[name]
        values = np.memmap(place.file, np.float32, "r+", place.start, mask.numel())
        values[int((mask if kept else ~mask).flatten().nonzero()[0])] += 1.0
        return True

    monkeypatch.setattr(zeros, "zero_removed", careless)
    with pytest.raises(UserError, match="does not read back"):
        export_command(str(tmp_path / "out"), mask=str(finished.mask))
    assert not list(tmp_path.iterdir())


def test_a_trained_norm_that_does_not_read_back_is_not_exported(recovered: Path, tmp_path: Path, monkeypatch) -> None:
    """It has no mask, and is not the base model's either."""

    def careless(folder: Path, masks: MaskSet) -> bool:
        assert zero_removed(folder, masks)
        place = places_in(folder)["model.norm.weight"]
        np.memmap(place.file, np.float32, "r+", place.start, place.shape)[0] += 1
        return True

    monkeypatch.setattr(zeros, "zero_removed", careless)
    with pytest.raises(UserError, match="does not read back"):
        export_command(str(tmp_path / "out"), mask=str(recovered / "checkpoints" / "mask.safetensors"))
    assert not list(tmp_path.iterdir())


def test_zeros_are_written_in_place(finished: Run, tmp_path: Path, monkeypatch) -> None:
    """The model in memory stays as it is, mapped from its files, unless the family's files are cut otherwise."""
    applied = []
    monkeypatch.setattr(MaskSet, "apply_", lambda self, model, check: applied.append(type(model).__name__))
    export_command(str(tmp_path / "out"), mask=str(finished.mask))
    assert not applied
    mixtral = tiny_folder(tmp_path / "mixtral", "mixtral")
    random_mask(mixtral, tmp_path / "mask.safetensors")
    with pytest.raises(UserError, match="does not read back"):  # nobody has set its zeros
        export_command(str(tmp_path / "experts"), mask=str(tmp_path / "mask.safetensors"))
    assert applied == ["MixtralForCausalLM"]


def test_nothing_is_zeroed_where_a_weight_is_missing(model_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "copy")
    before = (folder / "model.safetensors").read_bytes()
    mask = random_mask(model_folder, tmp_path / "mask.safetensors")
    for wrong in ({"elsewhere": torch.zeros(2, 2, dtype=torch.bool)}, {n: m.T for n, m in mask.masks.items()}):
        assert not zero_removed(folder, MaskSet({**mask.masks, **wrong}, mask.provenance))
    assert (folder / "model.safetensors").read_bytes() == before
    assert zero_removed(folder, mask)
    assert (folder / "model.safetensors").read_bytes() != before


def test_mask_of_another_model(finished: Run, tmp_path: Path) -> None:
    other = tiny_folder(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="fingerprint"):
        export_command(str(tmp_path / "out"), mask=str(finished.mask), model=str(other))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("given", [{}, {"mask": "a", "ckpt_path": "b"}])
def test_one_of_two_is_needed(given: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exactly one"):
        export_command(str(tmp_path / "out"), **given)


def test_a_mask_that_does_not_read_back_is_not_exported(finished: Run, tmp_path: Path, monkeypatch) -> None:
    real = MaskSet.save

    def careless(self: MaskSet, path: Path) -> Path:
        masks = {name: mask.clone() for name, mask in self.masks.items()}
        first = next(iter(masks.values())).view(-1)
        first[0] = ~first[0]
        return real(MaskSet(masks, self.provenance), path)

    monkeypatch.setattr(MaskSet, "save", careless)
    with pytest.raises(UserError, match=r"mask\.safetensors does not read back"):
        export_command(str(tmp_path / "out"), mask=str(finished.mask), format="mask")
    assert not (tmp_path / "out").exists()


def test_no_tokenizer_reads_a_file_that_may_be_a_link() -> None:
    """Of all that transformers has: what ends as weights do is not copied, and may be a link."""
    names = set()
    for name in set(filter(None, TOKENIZER_MAPPING_NAMES.values())):
        with suppress(ImportError):  # of those that need another package
            names |= {str(file) for file in getattr(tokenizer_class_from_name(name), "vocab_files_names", {}).values()}
    assert "vocab.txt" in names
    assert not [name for name in names if Path(name).suffix in WEIGHTS]
